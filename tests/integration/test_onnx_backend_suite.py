"""The onnx package's backend test suite through trtx_py on the mock, with the operators that TensorRT's parser imports.

tests/data/onnx_suite.json is the committed result; ``python -m tests.onnx_suite`` writes it anew.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.onnx_suite import SUMMARY, Case, Outcome, category_of, collect_cases, run_suite, summarize

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads(SUMMARY.read_text())


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    pytest.importorskip("onnxruntime")
    return run_suite(collect_cases())


def test_nothing_fails_beyond_what_is_listed(outcomes: list[Outcome], committed: dict[str, Any]) -> None:
    """Also with another version of the onnx package, whose cases may be others."""
    failures = {f"{o.kind}/{o.name}": o.reason for o in outcomes if o.status == "failed"}
    new = {name: reason for name, reason in failures.items() if name not in committed["failures"]}
    assert not new, json.dumps(new, indent=1)


def test_counts_are_the_committed_ones(outcomes: list[Outcome], committed: dict[str, Any]) -> None:
    """With the same onnx package an improvement is noticed too: write the summary anew and commit it."""
    if onnx.__version__ != committed["onnx"]:
        pytest.skip(f"the summary is of onnx {committed['onnx']}, this is {onnx.__version__}")
    assert summarize(outcomes) == committed


def test_every_refusal_has_a_category_and_a_reason(outcomes: list[Outcome]) -> None:
    skipped = [o for o in outcomes if o.status == "skipped"]
    assert all(o.category and o.reason for o in skipped)
    assert sum(o.status == "passed" for o in outcomes) > len(skipped)


def test_readme_tells_the_number(committed: dict[str, Any]) -> None:
    after = (ROOT / "README.md").read_text().split("<!-- onnx-suite -->")[1]
    assert f"{committed['passed']:,} of" in after.replace("\n", " ")[:400]


def _relu(expected: Callable[[Any], Any], *, rtol: float = 1e-3) -> Case:
    """A case of our own, with an expectation that may be wrong."""
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "relu",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    x = np.array([-1, 2, -3, 4], np.float32)
    return Case("relu", "node", rtol, 1e-7, lambda: (model, [([x], [expected(x)])]))


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        (lambda x: np.maximum(x, 0) + np.float32(0.1), "output 'y'"),
        (lambda x: np.maximum(x, 0)[:3], "has shape (4,), expected (3,)"),
        (lambda x: np.maximum(x, 0).astype(np.int32), "has dtype float32, expected int32"),
    ],
    ids=["values", "shape", "dtype"],
)
def test_a_wrong_answer_is_a_failure(expected: Callable[[Any], Any], words: str) -> None:
    (right,) = run_suite([_relu(lambda x: np.maximum(x, 0))])
    assert right.status == "passed"
    (wrong,) = run_suite([_relu(expected)])
    assert wrong.status == "failed"
    assert words in wrong.reason


def test_an_unknown_refusal_is_a_failure() -> None:
    import trtx_py as trtx

    assert category_of(trtx.ParserError("something nobody thought of")) == ""
    assert category_of(trtx.ExecutionError("operator is not imported by the ONNX parser")) == ""
    broken = dataclasses.replace(_relu(lambda x: x), load=lambda: (onnx.ModelProto(), []))
    assert [o.status for o in run_suite([broken])] == ["failed"]


def test_a_lost_device_does_not_take_the_next_cases_with_it() -> None:
    """A Gather beyond the end fails in the kernel, as it may on a GPU."""
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["x", "i"], ["y"])], "gather",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4]),
         onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, [1])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    x, i = np.zeros(4, np.float32), np.array([99], np.int64)
    bad = Case("gather", "node", 1e-3, 1e-7, lambda: (model, [([x, i], [x[:1]])]))
    good = _relu(lambda x: np.maximum(x, 0))
    assert [o.status for o in run_suite([good, bad, good])] == ["passed", "failed", "passed"]
