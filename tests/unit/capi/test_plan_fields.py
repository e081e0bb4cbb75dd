"""A mock plan that was sealed again: its checksum is right, and its fields need not be."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from mock_backend import PlanPayload
from mock_backend._plan import _HEAD, MAGIC
from tests.unit.capi.kit import context, control, ok, options
from tests.unit.serving import affine_plan
from trtx_py._errors import PlanError
from trtx_py._plan import Plan, PlanHeader
from trtx_py._types import DataType, ShapeRange, TensorInfo, TensorMode
from trtx_py.capi._dtypes import DType
from trtx_py.capi._models import carried_in
from trtx_py.capi._status import Status

PAYLOAD = PlanPayload(
    flavour="mock",
    version="1.0.0.0",
    name="net",
    compute_capabilities=("8.9",),
    profile_sharing=True,
    tensors=(
        TensorInfo("x", TensorMode.INPUT, DataType("float32"), (-1, 4), ranges=(ShapeRange((1, 4), (2, 4), (8, 4)),)),
        TensorInfo("y", TensorMode.OUTPUT, DataType("float32"), (-1, 4)),
    ),
    num_profiles=1,
    num_layers=1,
    model=b"model",
    options={"precision": None},
    real_plan=None,
)


def header_of(plan: bytes) -> dict[str, Any]:
    length = _HEAD.unpack_from(plan)[5]
    found: dict[str, Any] = json.loads(plan[_HEAD.size : _HEAD.size + length])
    return found


def sealed(header: bytes | Any) -> bytes:
    """A plan with this header, and everything about it right but what the header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = text + PAYLOAD.model
    digest = hashlib.sha256(body).digest()
    return _HEAD.pack(MAGIC, 1, 0, _HEAD.size + len(body), bytes([1, 0, 0, 0]), len(text), digest) + body


def changed(*path: str | int, to: Any) -> bytes:
    header = header_of(PAYLOAD.to_bytes())
    place: Any = header
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return sealed(header)


def test_what_was_not_changed_is_read_as_it_was_written() -> None:
    header = header_of(PAYLOAD.to_bytes())
    assert PlanPayload.from_bytes(sealed(header)) == PAYLOAD


#: Values of every kind that JSON has; each field takes some of them.
KINDS: dict[str, Any] = {
    "null": None,
    "true": True,
    "number": 7,
    "fraction": 1.5,
    "string": "text",
    "list": [],
    "nested": [[]],
    "object": {},
}

#: Where, what is expected there in words, and which kinds may stand there.
FIELDS: list[tuple[tuple[str | int, ...], str, set[str]]] = [
    (("flavour",), "header.flavour", {"string"}),
    (("version",), "header.version", set()),
    (("name",), "header.name", {"string"}),
    (("compute_capabilities",), "header.compute_capabilities", {"list"}),
    (("compute_capabilities", 0), "header.compute_capabilities[0]", {"string"}),
    (("profile_sharing",), "header.profile_sharing", {"true"}),
    (("tensors",), "tensors", {"list"}),
    (("tensors", 0), "tensors[0]", set()),
    (("tensors", 0, "name"), "tensors[0].name", {"string"}),
    (("tensors", 0, "mode"), "tensors[0].mode", set()),
    (("tensors", 0, "dtype"), "tensors[0].dtype", set()),
    (("tensors", 0, "shape"), "tensors[0].shape", {"list"}),
    (("tensors", 0, "shape", 1), "tensors[0].shape[1]", {"number"}),
    (("tensors", 0, "location"), "tensors[0].location", set()),
    (("tensors", 0, "is_shape_tensor"), "tensors[0].is_shape_tensor", {"true"}),
    (("tensors", 0, "ranges"), "tensors[0].ranges", {"list"}),
    (("tensors", 0, "ranges", 0), "tensors[0].ranges[0]", set()),
    (("tensors", 0, "ranges", 0, 1), "tensors[0].ranges[0]", set()),
    (("tensors", 0, "ranges", 0, 1, 0), "tensors[0].ranges[0][1][0]", {"number"}),
    (("num_profiles",), "num_profiles", set()),
    (("num_layers",), "header.num_layers", {"number"}),
    (("options",), "header.options", {"object"}),
    (("real_plan",), "header.real_plan", {"null", "object"}),
]

WRONG = [
    pytest.param(path, words, KINDS[kind], id=f"{'.'.join(map(str, path))}-{kind}")
    for path, words, right in FIELDS
    for kind in KINDS
    if kind not in right and not (path == ("num_profiles",) and kind == "number")
]


@pytest.mark.parametrize(("path", "words", "value"), WRONG)
def test_a_field_of_another_type_is_named(path: tuple[str | int, ...], words: str, value: Any) -> None:
    with pytest.raises(PlanError, match="the plan's head is damaged") as caught:
        PlanPayload.from_bytes(changed(*path, to=value))
    if path == ("version",) and isinstance(value, str):
        assert "'text'" in str(caught.value)
    else:
        assert words in str(caught.value)


@pytest.mark.usefixtures("nothing_stays_open")
@pytest.mark.parametrize("path", [("num_layers",), ("tensors", 0, "ranges"), ("options",)], ids=str)
def test_a_caller_in_c_hears_that_the_plan_is_damaged(path: tuple[str | int, ...]) -> None:
    with context() as made:
        status, text = control.open_plan(made, memoryview(changed(*path, to="text")), options())
    assert status == Status.PLAN
    assert str(path[-1]) in text


@pytest.mark.usefixtures("nothing_stays_open")
@pytest.mark.parametrize("version", ["1b1", "1n0.0.0"])
def test_a_version_may_have_more_than_numbers(version: str) -> None:
    """Betas do. It is the container's own; the mock goes by the one in its plan."""
    built = affine_plan()
    plan = Plan.seal(built.serialized, dataclasses.replace(built.header, version=version))
    with context() as made:
        graph, _ = ok(control.open_plan(made, memoryview(plan), options()))
        assert control.close_graph(graph) == (0,)


@pytest.mark.parametrize("path", [path for path, _, _ in FIELDS if isinstance(path[-1], str)], ids=str)
def test_a_field_that_is_missing_is_named(path: tuple[str | int, ...]) -> None:
    header = copy.deepcopy(header_of(PAYLOAD.to_bytes()))
    place: Any = header
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    with pytest.raises(PlanError, match=f"has no '{path[-1]}'"):
        PlanPayload.from_bytes(sealed(header))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sealed(b"[" * 100_000), "no JSON"),
        (lambda: sealed(b"\xff{}"), "no JSON"),
        (lambda: sealed([]), "header is list"),
        (lambda: changed("tensors", 0, "shape", 0, to=1 << 80), "tensors[0].shape[0] does not fit 64 bits"),
        (lambda: changed("num_layers", to=-1), "header.num_layers is -1; expected 0 or more"),
        (lambda: changed("num_profiles", to=2), "'x' has 1 ranges; expected one for each of 2 profiles"),
        (lambda: changed("num_profiles", to=10**15), "expected at most"),
        (lambda: changed("tensors", 0, "ranges", 0, 2, to=[8]), "2, 2 and 1 numbers"),
        (lambda: changed("tensors", 0, "dtype", to="complex"), "expected one of"),
    ],
    ids=["deep", "no text", "a list", "too great", "negative", "profiles", "many profiles", "uneven", "unknown type"],
)
def test_values_that_no_plan_has(make: Callable[[], bytes], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        PlanPayload.from_bytes(make())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "note", [None, 7, [1], {"x": [8]}, {"x": {}}, {"x": "8"}, {"x": 1.5}, {"x": 1000}, {"x": None}]
)
def test_types_in_a_plan_that_mean_nothing(note: object) -> None:
    """Found by the fuzzer: a list where a type's number should be."""
    header = PlanHeader("mock", "1.0.0.0", build_options={"capi_types": note})
    assert carried_in(header) == {}


def test_types_in_a_plan() -> None:
    header = PlanHeader("mock", "1.0.0.0", build_options={"capi_types": {"x": int(DType.UINT32), "y": [1]}})
    assert carried_in(header) == {"x": DType.UINT32}
