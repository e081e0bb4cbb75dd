"""Result files: the same when read again, and refused with a reason when they are something else; two compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trtx_py as trtx
from trtx_py.benchmark import (
    SCHEMA_VERSION,
    Accuracy,
    BenchmarkResult,
    ContenderResult,
    Environment,
    GpuState,
    Interval,
    Measurement,
    Ratio,
    ResultFileError,
    WarmUpResult,
    compare_results,
    load_result,
    parse_result,
)
from trtx_py.benchmark._compare import quotient
from trtx_py.benchmark._report import engine_rows


def figures(p50: float, rate: float, spread: float | None = 0.01) -> Measurement:
    def near(value: float) -> Interval:
        return Interval(value) if spread is None else Interval(value, value * (1 - spread), value * (1 + spread))

    return Measurement(
        rounds=20, requests=2000, p50_us=near(p50), p90_us=near(p50 * 1.1), p95_us=near(p50 * 1.2),
        p99_us=near(p50 * 1.5), mean_us=p50, min_us=p50 / 2, max_us=p50 * 3, requests_per_s=near(rate),
        rows_per_s=near(rate), round_p50_us=(p50,) * 20, round_rows_per_s=(rate,) * 20, curve_us=(p50,) * 101,
        late_p99_us=None,
    )  # fmt: skip


def contender(name: str, p50: float = 100.0, rate: float = 1e4, **changes: Any) -> ContenderResult:
    spread = changes.pop("spread", 0.01)
    result = ContenderResult(
        name, "engine", 1, "fp16", "closed, 1 client", {"lanes": "2"}, "measured", checked=40, max_error=1e-4,
        tolerance=0.03, warmup=WarmUpResult(True, 80, 0.5, (100.0, 99.0)), measurement=figures(p50, rate, spread),
        ratio=Ratio("other", Interval(1.0), Interval(1.1, 1.0, 1.2), Interval(0.9)),
        accuracy=(Accuracy("y", 0.1, 0.01, None, 0.99, 100),), device_bytes=1024, pinned_bytes=64,
    )  # fmt: skip
    return dataclasses.replace(result, **changes)


ABSENT = ContenderResult("torch", "torch", 1, None, "closed, 1 client", {}, "not available", "torch is | not <there>")
ENVIRONMENT = Environment(
    "2026-11-21T19:00:00+00:00", "python bench.py", "CPython 3.12", "Linux", "Fast CPU", 16, (0.1, 0.2, 0.3),
    {"numpy": "2.0"}, "tensorrt", "tensorrt 10.16", "H200", "580.1", "uvloop",
    GpuState((1900, 1980), 1980, 55, 400.5, ("software power cap",)), ("the GPU throttled",),
)  # fmt: skip


def result(*contenders: ContenderResult, **changes: Any) -> BenchmarkResult:
    found = BenchmarkResult(
        True, "", True, "model.onnx", "ONNX Runtime", 20, 100, 0, 0.95, 12.5, contenders or (contender("a"), ABSENT),
        ENVIRONMENT,
    )  # fmt: skip
    return dataclasses.replace(found, **changes)


def test_a_result_comes_back_the_same(tmp_path: Path) -> None:
    before = result()
    before.save(tmp_path / "result.json")
    assert load_result(tmp_path / "result.json") == before
    assert load_result(str(tmp_path / "result.json")).to_json() == before.to_json()
    content = json.loads(before.to_json())
    assert content["schema"] == "trtx_py.benchmark"
    assert content["version"] == SCHEMA_VERSION
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_what_later_versions_add_is_left_out_and_what_they_leave_out_has_a_default() -> None:
    content = json.loads(result().to_json())
    content["new"] = 1
    content["contenders"][0]["new"] = {"x": []}
    content["environment"]["gpu_state"]["fan"] = 3
    del content["contenders"][0]["pinned_bytes"]
    read = parse_result(json.dumps(content))
    assert read.contenders[0] == contender("a", pinned_bytes=None)


def cut(content: Any) -> Any:
    return json.dumps(content)[:-20]


def without(*path: Any) -> Callable[[Any], Any]:
    def change(content: Any) -> Any:
        place = content
        for name in path[:-1]:
            place = place[name]
        del place[path[-1]]
        return json.dumps(content)

    return change


def put(value: Any, *path: Any) -> Callable[[Any], Any]:
    def change(content: Any) -> Any:
        place = content
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
        return json.dumps(content)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [(cut, "not JSON"), (lambda _: "", "not JSON"), (lambda _: "[]", "not a file of this kind"),
     (lambda _: "[" * 100_000, "not JSON"), (put("other", "schema"), "not a file of this kind"),
     (put(99, "version"), r"schema version 99; this trtx_py reads version 1"), (without("version"), "version None"),
     (without("contenders"), "contenders is missing"), (put({}, "contenders"), "contenders is {}; expected a list"),
     (put("fast", "contenders", 0, "measurement", "p50_us", "value"),
      r"contenders\[0\].measurement.p50_us.value is 'fast'; expected a number"),
     (put(float("nan"), "seconds"), "seconds is nan; expected a number"), (put(1.5, "rounds"), "expected an integer"),
     (put(1, "complete"), "expected true or false"), (put(None, "source"), "expected a text"),
     (put("great", "contenders", 0, "status"), r"contenders\[0\].status is 'great'; expected one of 'measured'"),
     (put([1], "environment", "gpu_state", "sm_clock_mhz"), "sm_clock_mhz has 1 entries; expected 2"),
     (put([], "contenders", 0, "options"), r"options is \[\]; expected an object"),
     (put(3, "contenders", 0), r"contenders\[0\] is 3; expected an object")],
)  # fmt: skip
def test_files_that_are_something_else(change: Callable[[Any], str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(change(json.loads(result().to_json())))
    with pytest.raises(ResultFileError, match=message) as caught:
        load_result(path)
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, trtx.InvalidArgumentError)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(ResultFileError, match="cannot be read"):
        load_result(tmp_path / "none.json")
    with pytest.raises(ResultFileError, match="cannot be read"):
        load_result(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultFileError, match="not text"):
        load_result(tmp_path / "binary.json")
    with pytest.raises(trtx.InvalidArgumentError, match="cannot be saved"):
        result().save(tmp_path / "no" / "such" / "folder.json")


def test_numbers_that_json_has_not_are_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        result(seconds=float("inf")).to_json()


# ---- two compared ----


def verdicts(old: BenchmarkResult, new: BenchmarkResult, **options: Any) -> dict[str, str]:
    return {f"{c.contender} {c.figure}".strip(): c.verdict for c in compare_results(old, new, **options).changes}


def test_the_same_result_has_no_regression(tmp_path: Path) -> None:
    result().save(tmp_path / "old.json")
    found = compare_results(tmp_path / "old.json", result())
    assert found.ok
    assert [change.verdict for change in found.changes] == ["same"] * 3  # what was absent on both sides is no change
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("p50", "spread", "allowed", "verdict"),
    [(104.0, 0.001, 0.05, "same"), (110.0, 0.01, 0.05, "regression"), (110.0, 0.01, 0.2, "same"),
     (110.0, 0.2, 0.05, "unclear"), (80.0, 0.01, 0.05, "improvement"), (80.0, 0.3, 0.05, "unclear"),
     (300.0, None, 0.05, "unclear"), (100.2, 0.0001, 0.0, "regression")],
)  # fmt: skip
def test_a_regression_is_more_than_is_allowed_and_more_than_chance(
    p50: float, spread: float | None, allowed: float, verdict: str
) -> None:
    old, new = result(contender("a", spread=spread)), result(contender("a", p50, spread=spread))
    found = compare_results(old, new, max_regression=allowed, figures=("p50",))
    assert [change.verdict for change in found.changes] == [verdict]
    assert found.ok == (verdict != "regression")
    assert found.changes[0].worse_by is not None
    assert found.changes[0].worse_by.value == pytest.approx(p50 / 100)


def test_less_throughput_is_worse() -> None:
    old = result(contender("a"))
    assert verdicts(old, result(contender("a", rate=8e3)))["a rows/s"] == "regression"
    assert verdicts(old, result(contender("a", rate=12e3)))["a rows/s"] == "improvement"


def test_contenders_that_are_not_on_both_sides() -> None:
    old = result(contender("a"), contender("b"), contender("c"), ABSENT)
    gone = dataclasses.replace(ABSENT, name="c", reason="not installed")
    new = result(contender("a"), gone, contender("torch"))
    found = compare_results(old, new, figures=("p50",))
    assert verdicts(old, new, figures=("p50",)) == {
        "a p50": "same", "b": "missing", "c": "missing", "torch": "new",
    }  # fmt: skip
    assert not found.ok
    assert [change.contender for change in found.regressions] == ["b", "c"]
    assert "not installed" in found.markdown()
    assert "missing" in str(found)


@pytest.mark.parametrize(
    "changes", [{"batch": 8}, {"load": "open, 100/s"}, {"kind": "batcher"}, {"precision": None}, {"options": {}}]
)
def test_what_was_measured_otherwise_is_not_compared(changes: Any) -> None:
    found = compare_results(result(contender("a")), result(contender("a", **changes)))
    assert [change.verdict for change in found.changes] == ["not comparable"]
    assert next(iter(changes)) in found.changes[0].reason
    assert not found.ok


def test_other_machines_and_incomplete_results_are_warned_of() -> None:
    other = dataclasses.replace(ENVIRONMENT, gpu="H100", cpus=8)
    found = compare_results(result(), result(environment=other, complete=False, reason="ctrl-C"))
    assert [warning.split(":")[0] for warning in found.warnings] == [
        "the new result is not complete", "the GPU is another", "the number of CPUs is another",
    ]  # fmt: skip
    assert "H100" in str(found)
    on_mock = result(meaningful=False)
    assert any("mock" in warning for warning in compare_results(on_mock, on_mock).warnings)
    with pytest.raises(trtx.InvalidArgumentError, match="mock"):
        compare_results(result(), result(meaningful=False))


@pytest.mark.parametrize(
    "options", [{"max_regression": -0.1}, {"max_regression": float("nan")}, {"max_regression": "5%"},
                {"max_regression": True}, {"figures": ("p42",)}, {"figures": ()}],
)  # fmt: skip
def test_comparisons_that_cannot_be(options: Any) -> None:
    with pytest.raises(trtx.InvalidArgumentError):
        compare_results(result(), result(), **options)


def test_widths_of_independent_intervals_add_up() -> None:
    found = quotient(Interval(2.0, 1.8, 2.2), Interval(1.0, 0.9, 1.1))
    assert found.value == 2.0
    assert found.low == pytest.approx(2 / 1.16, rel=0.02)
    assert found.high == pytest.approx(2 * 1.16, rel=0.02)
    assert quotient(Interval(2.0, 2.0, 2.0), Interval(1.0, 1.0, 1.0)) == Interval(2.0, 2.0, 2.0)
    assert quotient(Interval(2.0), Interval(1.0, 0.9, 1.1)) == Interval(2.0)
    assert quotient(Interval(2.0, 2.1, 2.2), Interval(1.0, 1.0, 1.0)).low == 2.0  # a bootstrap may miss its own figure


# ---- for people ----


def test_reports_say_what_matters() -> None:
    partial = result(complete=False, reason="interrupted after 3 of 20 rounds", meaningful=False)
    for text in (partial.text(), partial.markdown()):
        assert "MOCK BACKEND: these figures say nothing about speed" in text
        assert "NOT COMPLETE: interrupted after 3 of 20 rounds" in text
        assert "100.0 (99.00 to 101.0)" in text
        assert "torch: not available: torch is" in text
        assert "the GPU throttled" in text
        assert "GPU clocks 1900 to 1980 MHz" in text
        assert "no difference" in text
    assert "<there>" not in partial.markdown()
    lines = partial.markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table[:3]}) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.61157, "0.6116"), (1.5, "1.500"), (23.456, "23.46"), (999.96, "1,000.0"), (12345.6, "12,346"),
     (1.5e-7, "1.5e-07"), (3e12, "3e+12")],
)  # fmt: skip
def test_numbers_have_four_digits(value: float, text: str) -> None:
    from trtx_py.benchmark._stats import number

    assert number(value) == text


def test_html_has_plots_and_needs_no_network() -> None:
    pytest.importorskip("plotly")
    page = result(contender("<b>a"), contender("c", batch=8), ABSENT).html()
    assert "<b>a" not in page
    assert "&lt;b&gt;a" in page
    assert "torch: not available" in page
    assert page.count("data-figure=") >= 4


def test_engines_show_memory_now_and_at_most_and_what_is_shared_once() -> None:
    memory = {"device_bytes": 4 << 20, "device_now_bytes": 2 << 20, "graph_hits": 7, "graph_misses": 1}
    found = result(
        contender("b1", **memory), contender("b2", batch=2, **memory), contender("slot", kind="slot", **memory),
        contender("old", device_bytes=1 << 20, options={}),
    )  # fmt: skip
    assert engine_rows(found) == [
        ["b1, b2", "4.00", "2.00", "0.00", "7", "1"],
        ["slot", "4.00", "2.00", "0.00", "7", "1"],
        ["old", "1.00", "", "0.00", "0", "0"],
    ]
    assert "device memory at most, MiB  at the end" in found.text()


@pytest.mark.parametrize(
    "interval",
    [{"value": 0.0}, {"value": -1.0}, {"value": 1.0, "low": 0.0, "high": 2.0}, {"value": 1.0, "low": 2.0, "high": 1.0},
     {"value": 1.0, "low": 1.0, "high": None}, {"value": 10**400}],
)  # fmt: skip
def test_intervals_that_cannot_be_compared_are_refused(interval: Any) -> None:
    content = json.loads(result(contender("a")).to_json())
    content["contenders"][0]["measurement"]["p50_us"] = interval
    with pytest.raises(ResultFileError, match=r"measurement\.p50_us"):
        parse_result(json.dumps(content))


def test_names_of_a_file_do_not_reach_the_terminal_as_they_are() -> None:
    wicked = "a\x1b]0;owned\x07\n\ud800 ![x](http://example.org) `c`"
    found = result(contender(wicked))
    for text in (found.text(), found.markdown(), str(compare_results(found, found))):
        assert text.encode()
        assert not set("\x1b\x07") & set(text)
    assert "![x](" not in found.markdown()
    assert "![x](" not in compare_results(found, result()).markdown()


def test_another_model_is_warned_of() -> None:
    old, new = result(contender("a"), source="/here/mlp.onnx"), result(contender("a"), source="/there/resnet50.onnx")
    assert compare_results(old, new).warnings[0] == "the model is another: 'mlp.onnx' then, 'resnet50.onnx' now"
    moved = result(contender("a"), source="/there/mlp.onnx")
    assert not any("model" in warning for warning in compare_results(old, moved).warnings)


@pytest.mark.parametrize("figures", [5, [["p50"]], None, "p50"])
def test_figures_that_are_none(figures: Any) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="figures are"):
        compare_results(result(), result(), figures=figures)
