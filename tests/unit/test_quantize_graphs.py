"""Graphs with something odd in them: converted into models that load, run and parse."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import trtx_py as trtx
from tests.quantize_models import make, recurrent
from trtx_py.quantize import ConvertedModel, convert
from trtx_py.quantize._measure import output_errors

RNG = np.random.default_rng(4)
WORDS = ("fp16", "bf16", "int8", "fp8", "int4-weights")
#: Relative error that each word may make of one or two products.
ALLOWED = {"fp16": 0.01, "bf16": 0.05, "int8": 0.1, "fp8": 0.2, "int4-weights": 0.4}
X = RNG.standard_normal((4, 32)).astype(np.float32)
SQUARE = (RNG.standard_normal((32, 32)) / 6).astype(np.float32)


def converted(model: onnx.ModelProto, word: str, feeds: dict[str, Any]) -> ConvertedModel:
    """Converted, checked and run: node names are unique, and the numbers are near."""
    calibration = trtx.Calibration([feeds], method="minmax") if word in ("int8", "fp8") else None
    found = convert(model.SerializeToString(), word, calibration=calibration)
    onnx.checker.check_model(found.model, full_check=True)
    names = [node.name for node in found.model.graph.node]
    assert len(set(names)) == len(names)
    errors = output_errors(model, found.model, [feeds])
    assert all(error.relative < ALLOWED[word] for error in errors.values()), errors
    return found


def parse(model: onnx.ModelProto) -> None:
    """By NVIDIA's own parser, where it is installed."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return
    with trtx.Builder(backend="tensorrt_rtx") as builder, builder.create_network() as network:
        network.parse_onnx(model.SerializeToString())


@pytest.mark.parametrize("word", WORDS)
def test_one_weight_with_scales_along_both_axes(word: str) -> None:
    model = make(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], name="rows"),
            helper.make_node("Gemm", ["a", "w"], ["b"], name="columns", transB=1),
            helper.make_node("Add", ["b", "w"], ["y"], name="plain"),
        ],
        {"x": [32, 32]},
        {"y": [32, 32]},
        {"w": SQUARE},
    )
    found = converted(model, word, {"x": np.resize(X, (32, 32))})
    assert {"rows", "columns"} <= found.changed
    parse(found.model)


def with_function(opset: int) -> onnx.ModelProto:
    inner = [helper.make_node("MatMul", ["p", "q"], ["r0"], name="inner"), helper.make_node("Relu", ["r0"], ["r"])]
    function = helper.make_function("own", "Dense", ["p", "q"], ["r"], inner, [helper.make_opsetid("", opset)])
    graph = helper.make_graph(
        [
            helper.make_node("Dense", ["x", "w"], ["a"], domain="own", name="call"),
            helper.make_node("MatMul", ["a", "w"], ["y"], name="after"),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 32])],
        [numpy_helper.from_array(SQUARE, "w")],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=8)
    onnx.checker.check_model(model)
    return model


@pytest.mark.parametrize("opset", [17, 22])
@pytest.mark.parametrize("word", WORDS)
def test_local_functions_are_converted_too(word: str, opset: int) -> None:
    found = converted(with_function(opset), word, {"x": X})
    assert not found.model.functions
    products = {node.name for node in found.model.graph.node if node.op_type == "MatMul"}
    assert len(products) == 2
    assert products <= found.changed
    parse(found.model)


def test_a_matrix_that_cannot_be_packed_in_pairs_stays() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "even"], ["a"], name="packed"),
        helper.make_node("MatMul", ["a", "odd"], ["y"], name="odd_one"),
    ]
    weights = {"even": SQUARE[:, :11], "odd": SQUARE[:11, :7]}
    found = converted(make(nodes, {"x": [4, 32]}, {"y": [4, 7]}, weights), "int4-weights", {"x": X})
    assert found.changed == {"packed"}
    assert "odd number of elements" in found.kept["odd_one"]
    parse(found.model)


@pytest.mark.parametrize("operator", ["HardSwish", "Mish"])
def test_what_tensorrt_has_not_in_bf16_stays(operator: str) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="product"),
        helper.make_node(operator, ["a"], ["b"], name="activation"),
        helper.make_node("MatMul", ["b", "w"], ["y"], name="last"),
    ]
    found = converted(make(nodes, {"x": [4, 32]}, {"y": [4, 32]}, {"w": SQUARE}, 18), "bf16", {"x": X})
    assert found.changed == {"product", "last"}
    assert found.kept == {"activation": f"TensorRT has no {operator} in bf16"}
    parse(found.model)


@pytest.mark.parametrize("word", ["fp16", "bf16"])
def test_what_a_recurrent_node_reads_stays(word: str) -> None:
    """TensorRT-RTX 1.7 builds no LSTM behind a cast; tests/integration/test_precision_rtx.py builds this one."""
    found = converted(recurrent(), word, {"x": RNG.standard_normal((2, 6, 32)).astype(np.float32)})
    assert found.changed == {"product", "squeeze", "last"}
    for name in ("feeds", "swap"):
        assert "recurrent node reads" in found.kept[name]
    parse(found.model)
    # A policy that lets the LSTM be 16 bits leaves no cast before it.
    everything = convert(recurrent().SerializeToString(), word, policy=trtx.PrecisionPolicy(keep_operators=frozenset()))
    assert {"feeds", "swap"} <= everything.changed


def test_ranges_too_small_for_a_scale_do_not_become_nan() -> None:
    model = make([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [4, 32]}, {"y": [4, 32]}, {"w": SQUARE})
    calibration = trtx.Calibration({"x": X * np.float32(1e-43)}, method="minmax")
    found = convert(model.SerializeToString(), "int8", calibration=calibration)
    (error,) = output_errors(model, found.model, [{"x": np.zeros_like(X)}]).values()
    assert error.largest == 0


def test_nan_is_the_largest_error() -> None:
    from trtx_py.quantize._measure import ErrorSum

    error = ErrorSum()
    error.add(np.ones(3, np.float32), np.array([1, np.nan, 1.5], np.float32))
    error.add(np.ones(3, np.float32), np.ones(3, np.float32))
    assert error.largest == error.relative == np.inf
    assert error.snr_db == -np.inf


# Where the error starts


def chain(scale: float = 1.0) -> onnx.ModelProto:
    """Five products with Relu between; what "third" computes is ``scale`` times too large, until "fourth"."""
    weights = {name: np.abs(SQUARE) for name in ("w0", "w1", "w2", "w3", "w4")}
    weights["w2"], weights["w3"] = weights["w2"] * np.float32(scale), weights["w3"] / np.float32(scale)
    nodes, last = [], "x"
    for index, name in enumerate(("first", "second", "third", "fourth", "fifth")):
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [f"m{index}"], name=name))
        last = "y" if index == 4 else f"r{index}"
        nodes.append(helper.make_node("Relu", [f"m{index}"], [last], name=f"relu_{name}"))
    return make(nodes, {"x": [4, 32]}, {"y": [4, 32]}, weights)


PLAIN = {"x": np.abs(X)}


async def test_compare_finds_the_layer_that_leaves_the_range_of_fp16(mock_backend: Any) -> None:
    model = chain(1e4).SerializeToString()
    async with trtx.open_engine(model, mock_backend, precision="fp16") as engine:
        found = await trtx.compare(model, engine, [PLAIN])
    assert found.outputs["y"].snr_db == -np.inf
    assert found.starts_at is not None
    assert (found.starts_at.node, found.starts_at.relative_error) == ("third", np.inf)
    assert found.adds_most == found.starts_at
    assert "the error starts at node 'third' (MatMul)" in str(found)


async def test_a_measured_limit_keeps_what_leaves_the_range_of_fp16(mock_backend: Any) -> None:
    model, policy = chain(1e4).SerializeToString(), trtx.PrecisionPolicy(max_relative_error=0.01)
    data = trtx.Calibration(PLAIN)
    async with trtx.open_engine(
        model, mock_backend, precision="fp16", precision_policy=policy, require_precision=True, calibration=data
    ) as engine:
        found = await trtx.compare(model, engine, [PLAIN], policy=policy, calibration=data)
    assert found.outputs["y"].relative < 0.01
    assert found.starts_at is None
    kept = convert(model, "fp16", policy=policy, calibration=data).kept
    assert {"third", "relu_third", "fourth"} <= kept.keys()
    assert len(kept) < 6, "and hardly more"


def test_a_limit_that_only_fp32_meets_is_said_to_be_one() -> None:
    model = make([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [4, 32]}, {"y": [4, 32]}, {"w": SQUARE})
    with pytest.raises(trtx.PrecisionError, match=r"within max_relative_error=0\.01 .* only if no node is fp16"):
        convert(
            model.SerializeToString(), "fp16",
            calibration=trtx.Calibration({"x": X * 1e6}), policy=trtx.PrecisionPolicy(max_relative_error=0.01),
        )  # fmt: skip


class Crushing:
    """The largest magnitude, but for one tensor a thousandth of it: what that tensor feeds is broken."""

    made = 0

    def __init__(self) -> None:
        self.largest, self.divisor = 0.0, 1000.0 if Crushing.made % 5 == 2 else 1.0
        Crushing.made += 1

    def collect(self, values: Any) -> None:
        self.largest = max(self.largest, float(np.abs(values).max()))

    def threshold(self) -> float:
        return self.largest / self.divisor


async def test_compare_finds_the_layer_with_a_broken_range(mock_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Crushing, "made", 0)
    model, calibration = chain().SerializeToString(), trtx.Calibration([PLAIN], method=Crushing)
    async with trtx.open_engine(model, mock_backend, precision="int8", calibration=calibration) as engine:
        found = await trtx.compare(model, engine, [PLAIN], calibration=calibration, layer_limit=0.2)
    assert found.outputs["y"].relative > 0.9
    assert found.starts_at is not None
    assert found.adds_most is not None
    assert found.starts_at.node == found.adds_most.node == "third"
    assert [layer.node for layer in found.layers if layer.relative_error <= 0.2] == [
        "first", "relu_first", "second", "relu_second",
    ]  # fmt: skip


async def test_compare_ranks_rows(mock_backend: Any) -> None:
    """The engine of another model: numbers that are known."""
    wanted, given = (np.zeros((8, 8), np.float32) for _ in range(2))
    wanted[0], given[0] = np.arange(8), np.arange(8)
    given[0, [0, 7]] = 7, 0  # of the rows of x, which are 1, 0, 0, ...: the first is the last, and the last the first

    def product(weight: Any) -> bytes:
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        return make([node], {"x": [2, 8]}, {"y": [2, 8]}, {"w": weight}).SerializeToString()

    x = np.zeros((2, 8), np.float32)
    x[:, 0] = 1, 2
    async with trtx.open_engine(product(given), mock_backend) as engine:
        found = await trtx.compare(product(wanted), engine, [{"x": x}], top_k=4)
    error = found.outputs["y"]
    assert (error.top1, error.topk, error.rows, error.max_abs) == (0.0, 0.75, 2, 14.0)
    signal = np.square(np.arange(8)).sum()
    assert error.relative == pytest.approx(np.sqrt(98 / signal))
    assert error.snr_db == pytest.approx(10 * np.log10(signal / 98))
    assert found.layers == ()
    assert "nothing to convert" in found.no_layers
