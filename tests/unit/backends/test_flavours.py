from __future__ import annotations

import pytest

from trtx_py._errors import InvalidArgumentError
from trtx_py.backends._flavours import (
    FLAVOURS,
    flavour_named,
    lean_library_refusal,
    output_allocator_refusal,
    parse_version,
    plan_fits,
    version_facts,
)


@pytest.mark.parametrize(
    ("text", "version"),
    [("8.6.0.12", (8, 6, 0, 12)), ("10.16.1.dev0", (10, 16, 1)), ("11", (11,)), ("1.7.1.116+cu13", (1, 7, 1, 116))],
)
def test_parse_version(text: str, version: tuple[int, ...]) -> None:
    assert parse_version(text) == version


def test_parse_version_refuses_words() -> None:
    with pytest.raises(InvalidArgumentError, match="'latest' is not a version"):
        parse_version("latest")


@pytest.mark.parametrize(
    ("flavour", "version", "typing", "explicit_batch", "sharing", "progress", "int64"),
    [
        ("tensorrt", "8.6.1", "weak", True, "preview", False, False),
        ("tensorrt", "9.3.0", "weak", True, "preview", False, False),
        ("tensorrt", "10.0.1.6", "optional", False, "always", True, True),
        ("tensorrt", "11.4.0.106", "strong", False, "always", True, True),
        ("tensorrt_rtx", "1.7.1.116", "strong", False, "always", True, True),
    ],
)
def test_version_facts(
    flavour: str, version: str, typing: str, explicit_batch: bool, sharing: str, progress: bool, int64: bool
) -> None:
    facts = version_facts(flavour, version)
    assert facts is not None
    assert (facts.typing, facts.explicit_batch_flag, facts.profile_sharing) == (typing, explicit_batch, sharing)
    assert (facts.progress_monitor, facts.int64_is_real) == (progress, int64)
    assert bool(facts.precision_flags) == (typing != "strong")


def test_versions_before_8_6_are_unknown() -> None:
    assert version_facts("tensorrt", "8.5.3") is None


def test_rtx_runs_where_it_was_made_for() -> None:
    rtx = FLAVOURS["tensorrt_rtx"]
    assert all(rtx.runs_on_capability(*c) for c in [(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)])
    assert not any(rtx.runs_on_capability(*c) for c in [(7, 0), (8, 7), (9, 0), (10, 0)])
    assert FLAVOURS["tensorrt"].runs_on_capability(9, 0)


def test_unknown_flavour_lists_the_known() -> None:
    with pytest.raises(InvalidArgumentError, match="tensorrt_dispatch"):
        flavour_named("tensort")


FIT = [
    # plan, runtime, version compatible, lean library, embedded runtime
    (("tensorrt", "8.6.0.12"), ("tensorrt", "8.6.0"), False, None, None),
    (("tensorrt", "8.6.0.12"), ("tensorrt_dispatch", "10.16.1.11"), False, "8.6.0", None),
    (("tensorrt", "8.6.0.12"), ("tensorrt_dispatch", "10.16.1.11"), True, "8.6.1", None),
    (("tensorrt", "8.6.0.12"), ("tensorrt_dispatch", "8.6.0"), None, None, False),
    (("tensorrt", "8.6.0.12"), ("tensorrt", "10.3.0.26"), True, None, True),
    (("tensorrt", "8.6.0.12"), ("tensorrt", "10.3.0.26"), True, None, None),
    (("tensorrt", "10.1.0.27"), ("tensorrt_lean", "10.3.0.26"), True, None, None),
    (("tensorrt", "10.1.0.27"), ("tensorrt", "10.3.0.26"), None, None, None),
    (("tensorrt_rtx", "1.7.1.116"), ("tensorrt_rtx", "1.7.1.116"), None, None, None),
    (("mock", "1.0.0.0"), ("mock", "1.0.0.0"), None, None, None),
    (("tensorrt_rtx+mock", "1.7.1.116"), ("tensorrt_rtx+mock", "1.7.1.116"), None, None, None),
]
NO_FIT = [
    (("tensorrt", "8.6.1.6"), ("tensorrt", "8.6.0.12"), True, None, None, "newer"),
    (("tensorrt", "8.6.0.12"), ("tensorrt", "8.6.1.6"), False, None, None, "VERSION_COMPATIBLE"),
    (("tensorrt", "8.6.0.12"), ("tensorrt_dispatch", "10.16.1.11"), None, None, False, "lean_library="),
    (("tensorrt", "8.6.0.12"), ("tensorrt_dispatch", "10.16.1.11"), True, None, False, "lean_library="),
    (("tensorrt", "8.6.0.12"), ("tensorrt_dispatch", "11.4.0.106"), True, "8.6.0", None, "ends the process"),
    (("tensorrt", "8.6.0.12"), ("tensorrt_dispatch", "10.16.1.11"), True, "10.3.0", None, "8.6"),
    (("tensorrt", "11.4.0.106"), ("tensorrt", "10.3.0.26"), True, None, None, "newer"),
    (("tensorrt_rtx", "1.7.1.116"), ("tensorrt", "10.3.0.26"), True, None, None, "open the plan with tensorrt_rtx"),
    (("tensorrt", "8.6.0.12"), ("tensorrt_rtx", "1.7.1.116"), True, None, None, "tensorrt_dispatch"),
    (("tensorrt_rtx", "1.6.0.1"), ("tensorrt_rtx", "1.7.1.116"), False, None, None, "VERSION_COMPATIBLE"),
    (("mock", "1.0.0.0"), ("tensorrt", "10.3.0.26"), None, None, None, "backend='mock'"),
    (("tensorrt", "8.6.0.12"), ("mock", "1.0.0.0"), None, None, None, "own plans only"),
    (("mock", "2.0.0.0"), ("mock", "1.0.0.0"), None, None, None, "newer"),
]


@pytest.mark.parametrize(("plan", "runtime", "compatible", "lean", "embedded"), FIT)
def test_plan_fits(
    plan: tuple[str, str], runtime: tuple[str, str], compatible: bool | None, lean: str | None, embedded: bool | None
) -> None:
    assert plan_fits(*plan, *runtime, compatible, lean, embedded_runtime=embedded) is None


@pytest.mark.parametrize(("plan", "runtime", "compatible", "lean", "embedded", "says"), NO_FIT)
def test_plan_does_not_fit(
    plan: tuple[str, str],
    runtime: tuple[str, str],
    compatible: bool | None,
    lean: str | None,
    embedded: bool | None,
    says: str,
) -> None:
    reason = plan_fits(*plan, *runtime, compatible, lean, embedded_runtime=embedded)
    assert reason is not None
    assert says in reason
    assert f"{runtime[0]} {runtime[1]}" in reason


@pytest.mark.parametrize(
    ("flavour", "version", "lean", "allowed"),
    [
        ("tensorrt_dispatch", "10.16.1.11", "8.6.0", True),
        ("tensorrt_dispatch", "10.16.1.11", "10.16.1", True),
        ("tensorrt_dispatch", "10.13.0.35", "10.16.1", False),
        ("tensorrt_dispatch", "11.4.0.106", "10.16.1", True),
        ("tensorrt_dispatch", "11.4.0.106", "8.6.0", False),
        ("tensorrt_dispatch", "8.6.1", "8.6.1", True),
        ("tensorrt_dispatch", "8.6.1", "10.0.0", False),
        ("tensorrt_rtx", "1.7.1.116", "8.6.0", False),
        ("tensorrt", "8.5.0", "8.6.0", False),
    ],
)
def test_lean_library_rules(flavour: str, version: str, lean: str, allowed: bool) -> None:
    refusal = lean_library_refusal(flavour, version, lean)
    assert (refusal is None) is allowed
    if refusal is not None:
        assert version in refusal


def test_output_allocators_stop_at_old_lean_libraries() -> None:
    assert output_allocator_refusal("r", None) is None
    assert output_allocator_refusal("r", "10.0.0") is None
    assert "8.6.0" in (output_allocator_refusal("r", "8.6.0") or "")
