"""Models of another precision: types, borders, scales, what stays, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import trtx_py as trtx
from tests.quantize_models import attention, cnn, images, make
from trtx_py.quantize import ConvertedModel, convert
from trtx_py.quantize._measure import output_errors
from trtx_py.quantize._store import stored
from trtx_py.quantize._weights import block_scales, channel_scales, quantized, spread

FLOATS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def converted(model: onnx.ModelProto, word: str, **options: Any) -> ConvertedModel:
    found = convert(model.SerializeToString(), word, **options)
    onnx.checker.check_model(found.model, full_check=True)
    border = [[(v.name, v.type.tensor_type) for v in row] for row in (model.graph.input, model.graph.output)]
    assert [
        [(v.name, v.type.tensor_type) for v in row] for row in (found.model.graph.input, found.model.graph.output)
    ] == border
    return found


def calibration(array: Any = None, **options: Any) -> trtx.Calibration:
    return trtx.Calibration(images() if array is None else array, **options)


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def weight_of(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


# FP16 and BF16


@pytest.mark.parametrize("word", ["fp16", "bf16"])
def test_products_compute_in_16_bits_and_sensitive_operators_do_not(word: str) -> None:
    found = converted(attention(), word)
    assert {"q", "k", "v", "scores", "mixed", "residual"} <= found.changed
    assert found.kept["softmax"] == "operator Softmax is sensitive"
    assert found.kept["norm"] == "operator LayerNormalization is sensitive"
    assert found.kept["mask"] == "Cast names its types"
    weights = {t.name: t.data_type for t in found.model.graph.initializer}
    assert [dtype for name, dtype in weights.items() if name.startswith("w")] == [FLOATS[word]] * 3
    assert [dtype for name, dtype in weights.items() if name in ("ones", "zeros")] == [TensorProto.FLOAT] * 2
    x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    (error,) = output_errors(attention(), found.model, [{"x": x}]).values()
    assert 0 < error.relative < (2e-3 if word == "fp16" else 2e-2)


def test_a_policy_overrides_the_list_and_names_nodes() -> None:
    policy = trtx.PrecisionPolicy(keep_operators=frozenset(), keep=frozenset({"second"}))
    found = converted(cnn(), "fp16", policy=policy)
    assert found.kept == {"second": "the policy keeps it"}
    assert "softmax" in found.changed
    with pytest.raises(trtx.InvalidArgumentError, match="keep names nonsense; the model has no such nodes"):
        converted(cnn(), "fp16", policy=trtx.PrecisionPolicy(keep=frozenset({"nonsense"})))


def test_constants_that_16_bits_cannot_hold_keep_their_node() -> None:
    node = helper.make_node
    model = make(
        [node("Mul", ["x", "huge"], ["a"], name="a"), node("Add", ["a", "tiny"], ["b"], name="b"),
         node("Add", ["b", "one"], ["y"], name="c")],
        {"x": ["N"]}, {"y": ["N"]},
        {"huge": np.float32(1e30), "tiny": np.float32(1e-12), "one": np.float32(1)},
    )  # fmt: skip
    found = converted(model, "fp16")
    assert "has 1e+30, more than fp16 can hold" in found.kept["a"]
    assert "is 1e-12, which fp16 makes zero" in found.kept["b"]
    assert found.changed == {"c"}
    assert converted(model, "bf16").changed == {"a", "b", "c"}


def test_a_written_out_normalization_stays_in_fp32_as_a_whole() -> None:
    node = helper.make_node
    axes = {"axes": np.array([-1])}
    weight = (np.random.default_rng(0).standard_normal((512, 4)) / 16).astype(np.float32)
    model = make(
        [node("ReduceSum", ["x", "axes"], ["s"], name="sum"), node("Mul", ["s", "share"], ["mean"], name="mean"),
         node("Sub", ["x", "mean"], ["d"], name="centred"), node("Mul", ["d", "d"], ["dd"], name="squared"),
         node("ReduceSum", ["dd", "axes"], ["v"], name="sum2"), node("Mul", ["v", "share"], ["var"], name="var"),
         node("Sqrt", ["var"], ["std"], name="std"), node("Div", ["d", "std"], ["n"], name="normal"),
         node("MatMul", ["n", "w"], ["y"], name="dense")],
        {"x": ["N", 512]}, {"y": ["N", 4]},
        {**axes, "share": np.float32(1 / 512), "w": weight},
    )  # fmt: skip
    found = converted(model, "fp16")
    assert {"mean", "centred", "squared", "var"} <= found.kept.keys()
    assert "dense" in found.changed
    x = (np.random.default_rng(1).standard_normal((3, 512)) * 100).astype(np.float32)  # its squares add up to 5e6
    (error,) = output_errors(model, found.model, [{"x": x}]).values()
    assert error.relative < 1e-2


def test_control_flow_stays_in_fp32_and_reads_what_it_did() -> None:
    node, info = helper.make_node, helper.make_tensor_value_info
    branch = [
        helper.make_graph([node(op, ["a"], [f"{op}_out"])], op, [], [info(f"{op}_out", TensorProto.FLOAT, ["N", 4])])
        for op in ("Relu", "Neg")
    ]
    graph = helper.make_graph(
        [node("MatMul", ["x", "w"], ["a"], name="m"),
         node("If", ["c"], ["y"], name="if", then_branch=branch[0], else_branch=branch[1])],
        "g", [info("x", TensorProto.FLOAT, ["N", 4]), info("c", TensorProto.BOOL, [])],
        [info("y", TensorProto.FLOAT, ["N", 4])], [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = converted(model, "fp16")
    assert found.changed == {"m"}
    assert found.kept["if"] == "control flow stays as it is"


OPERATORS = ("Relu", "Softmax", "Add", "Mul", "Exp", "Cast", "MatMul", "Tanh")


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.sampled_from(OPERATORS), st.integers(0, 20)), min_size=1, max_size=12),
    st.sampled_from(["fp16", "bf16"]),
)
def test_any_graph_stays_correctly_typed(steps: Sequence[tuple[str, int]], word: str) -> None:
    nodes, names = [], ["x"]
    for number, (operator, pick) in enumerate(steps):
        source, name = names[pick % len(names)], f"t{number}"
        inputs = {"Add": [source, names[-1]], "Mul": [source, "c"], "MatMul": [source, "w"]}.get(operator, [source])
        attributes: dict[str, Any] = {"to": TensorProto.FLOAT} if operator == "Cast" else {}
        nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        names.append(name)
    nodes.append(helper.make_node("Identity", [names[-1]], ["y"]))
    model = make(nodes, {"x": ["N", 4]}, {"y": ["N", 4]}, {"c": np.float32(0.5), "w": np.eye(4, dtype=np.float32)})
    found = converted(model, word)
    inferred = onnx.shape_inference.infer_shapes(found.model, strict_mode=True, check_type=True)
    assert found.changed
    assert inferred.graph.value_info


# INT8 and FP8


@pytest.mark.parametrize(("word", "elem"), [("int8", TensorProto.INT8), ("fp8", TensorProto.FLOAT8E4M3FN)])
def test_products_read_quantized_operands_with_symmetric_scales(word: str, elem: int) -> None:
    found = converted(cnn(), word, calibration=calibration(method="minmax"))
    assert found.changed == {"first", "second", "dense"}
    assert found.ranges["image"] == np.abs(images()).max()
    makers = {node.output[0]: node for node in found.model.graph.node}
    for name, axis, channels in (("first", 0, 6), ("second", 0, 4), ("dense", 0, 4)):
        node = node_of(found.model, name)
        activation, weight = makers[node.input[0]], makers[node.input[1]]
        assert (activation.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert makers[activation.input[0]].op_type == "QuantizeLinear"
        assert weight_of(found.model, activation.input[1]).dims == []
        assert list(weight_of(found.model, weight.input[1]).dims) == [channels]
        assert next(a.i for a in weight.attribute if a.name == "axis") == axis
        assert weight_of(found.model, weight.input[0]).data_type == elem
        for zero in (activation.input[2], weight.input[2]):
            assert not numpy_helper.to_array(weight_of(found.model, zero)).astype(np.float32).any()
    assert node_of(found.model, "first").input[2] == "b1"  # TensorRT takes no quantized bias


def test_one_activation_is_quantized_once_for_all_its_readers() -> None:
    x = np.random.default_rng(0).standard_normal((4, 5, 16)).astype(np.float32)
    found = converted(attention(), "int8", calibration=calibration(x))
    pairs = [node for node in found.model.graph.node if node.op_type == "QuantizeLinear"]
    assert sorted(node.input[0] for node in pairs) == ["kt", "p", "q", "v", "x"]


def test_an_activation_that_was_always_zero_keeps_its_zeros() -> None:
    found = converted(cnn(), "int8", calibration=calibration(np.zeros((4, 1, 8, 8), np.float32)))
    assert found.ranges["image"] == 0
    (scale,) = [t for t in found.model.graph.initializer if t.name == "image__scale"]
    assert numpy_helper.to_array(scale) == np.float32(1 / 127)


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21])
@pytest.mark.parametrize("word", ["bf16", "int8", "fp8", "int4-weights"])
def test_older_opsets_are_raised(word: str, opset: int) -> None:
    model = cnn(opset=opset)
    found = converted(model, word, calibration=calibration(method="minmax") if word in ("int8", "fp8") else None)
    wanted = {"bf16": 22, "int8": 13, "fp8": 19, "int4-weights": 21}[word]
    assert found.model.opset_import[0].version == max(opset, wanted)
    (error,) = output_errors(model, found.model, [{"image": images()}]).values()
    assert 0 < error.relative < 0.2


# INT4


def test_int4_weights_have_blocks_that_divide_their_axis() -> None:
    rng = np.random.default_rng(0)
    node = helper.make_node
    model = make(
        [node("MatMul", ["x", "w"], ["h"], name="wide"), node("Gemm", ["h", "v"], ["y"], name="odd", transB=1)],
        {"x": ["N", 256]}, {"y": ["N", 5]},
        {"w": rng.standard_normal((256, 30)).astype(np.float32), "v": rng.standard_normal((5, 30)).astype(np.float32)},
    )  # fmt: skip
    found = converted(model, "int4-weights", policy=trtx.PrecisionPolicy(block_size=64))
    scales = {t.name: list(t.dims) for t in found.model.graph.initializer if t.name.endswith("__scale")}
    assert scales == {"w__scale": [4, 30], "v__scale": [5]}
    with pytest.raises(trtx.PrecisionError, match="Conv has no INT4 weights"):
        converted(make([node("Conv", ["x", "w"], ["y"], name="c")], {"x": ["N", 1, 8, 8]}, {"y": ["N", 1, 6, 6]},
                       {"w": np.ones((1, 1, 3, 3), np.float32)}), "int4-weights")  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5), st.integers(1, 4), st.sampled_from([("int8", 127.0), ("fp8", 448.0), ("int4-weights", 7.0)]),
    st.integers(0, 2**32 - 1), st.floats(-30, 30),
)  # fmt: skip
def test_quantized_weights_are_within_half_a_step(
    rows: int, columns: int, kind: tuple[str, float], seed: int, exponent: float
) -> None:
    word, limit = kind
    values = (np.random.default_rng(seed).standard_normal((rows * 4, columns)) * 2.0**exponent).astype(np.float32)
    for axis, block, scales in (
        (0, None, channel_scales(values, 0, limit)), (1, None, channel_scales(values, 1, limit)),
        (None, None, channel_scales(values, None, limit)), (0, 4, block_scales(values, 0, 4, limit)),
    ):  # fmt: skip
        steps = np.broadcast_to(spread(scales, values.shape, axis, block), values.shape)
        found = quantized(values, scales, axis, block, word).astype(np.float32) * steps
        # FP8 has three bits behind the first; near zero its steps are 2**-9.
        allowed = np.maximum(np.abs(values) / 16, steps * 2.0**-10) if word == "fp8" else steps / 2
        assert (np.abs(found - values) <= allowed * 1.001).all()


# Automatic


@pytest.mark.parametrize("word", ["fp16", "int8"])
def test_the_measured_error_keeps_more_nodes_in_fp32(word: str) -> None:
    given_data = calibration(method="minmax")
    free = converted(cnn(), word, calibration=given_data if word == "int8" else None)
    (error,) = output_errors(cnn(), free.model, [{"image": images()}]).values()
    limit = error.relative * 0.8
    kept = converted(cnn(), word, calibration=given_data, policy=trtx.PrecisionPolicy(max_relative_error=limit))
    (less,) = output_errors(cnn(), kept.model, [{"image": images()}]).values()
    assert less.relative <= limit
    assert kept.changed < free.changed


def test_a_limit_that_nothing_meets_is_an_error() -> None:
    policy = trtx.PrecisionPolicy(max_relative_error=1e-12)
    with pytest.raises(trtx.PrecisionError, match="only if no node is int8"):
        converted(cnn(), "int8", calibration=calibration(), policy=policy)


# Refusals


@pytest.mark.parametrize(
    ("word", "options", "error", "says"),
    [
        ("fp17", {}, trtx.InvalidArgumentError, "expected one of fp16, bf16, int8, fp8, int4-weights"),
        ("int8", {}, trtx.CalibrationError, "needs ranges for the activations"),
        ("fp16", {"policy": trtx.PrecisionPolicy(max_relative_error=0.1)}, trtx.InvalidArgumentError, "measured on"),
        ("int8", {"calibration": calibration(np.zeros((2, 3, 8, 8), np.float32))}, trtx.ShapeError,
         r"'image' has shape \[2, 3, 8, 8\], expected \[-1, 1, 8, 8\]"),
        ("int8", {"calibration": calibration(np.zeros((2, 1, 8, 8)))}, trtx.DTypeError, "is float64, expected float32"),
        ("int8", {"calibration": calibration(np.full((2, 1, 8, 8), np.nan, np.float32))}, trtx.CalibrationError,
         "tensor 'image' has values that are not finite"),
        ("int8", {"calibration": calibration(), "policy": trtx.PrecisionPolicy(quantized_operators=frozenset())},
         trtx.PrecisionError, "none that the policy leaves"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(word: str, options: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        converted(cnn(), word, **options)


def test_a_quantized_model_is_not_quantized_again() -> None:
    once = converted(cnn(), "int8", calibration=calibration())
    with pytest.raises(trtx.InvalidArgumentError, match="nodes already"):
        convert(once.serialized(), "int8", calibration=calibration())


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    model = cnn()
    weight = weight_of(model, "w2")
    values = numpy_helper.to_array(weight).copy()
    values[0, 0, 0, 0] = np.inf
    weight.CopyFrom(numpy_helper.from_array(values, "w2"))
    policy = trtx.PrecisionPolicy(keep=frozenset({"dense"}))
    with pytest.raises((trtx.PrecisionError, trtx.CalibrationError), match="not finite"):
        converted(model, "int8", calibration=calibration(), policy=policy)


@pytest.mark.parametrize(
    "options",
    [{"keep": "node"}, {"keep": [1]}, {"keep_operators": 3}, {"quantized_operators": {"Relu"}}, {"block_size": 100},
     {"max_relative_error": 2}, {"max_relative_error": True}],
)  # fmt: skip
def test_bad_policies_are_refused(options: Any) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=next(iter(options))):
        trtx.PrecisionPolicy(**options)


def test_a_converted_model_is_saved_whole(tmp_path: Path) -> None:
    found = converted(cnn(), "fp16")
    found.save(str(tmp_path / "half.onnx"))
    assert onnx.load(tmp_path / "half.onnx") == found.model
    with pytest.raises(trtx.InvalidArgumentError, match="cannot be saved"):
        found.save(str(tmp_path / "no" / "half.onnx"))


def test_models_beyond_two_gigabytes_go_through_a_folder(monkeypatch: pytest.MonkeyPatch, mock_backend: Any) -> None:
    """The limit is lowered, since such a model takes minutes."""
    monkeypatch.setattr("trtx_py.quantize._store.MAX_INLINE", 1000)
    monkeypatch.setattr("trtx_py.quantize._convert.MAX_INLINE", 1000)
    weight = np.ones((64, 64), np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="m")
    found = converted(make([node], {"x": ["N", 64]}, {"y": ["N", 64]}, {"w": weight}), "fp16")
    with pytest.raises(trtx.PrecisionError, match="save_as_external_data"):
        found.serialized()
    with stored(found.model) as (blob, folder):
        assert folder is not None
        assert (Path(folder) / "weights.bin").stat().st_size > 1000
        with trtx.Builder(None, mock_backend) as builder, builder.create_network() as network:
            network.parse_onnx(Path(folder) / "model.onnx")
            assert [t.name for t in network.outputs] == ["y"]
        assert len(blob) < 10000
    assert not Path(folder).exists()
