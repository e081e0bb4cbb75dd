"""Graphs in the form of the WebNN tests of web-platform-tests, as ONNX models: what a WebNN implementation does.

A graph has inputs (constants among them), operators with named arguments and options, and expected outputs. Comparisons
give uint8, as in WebNN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]

TYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name)
    for name in ("float32", "float16", "int32", "uint32", "int64", "uint64", "int8", "uint8")
} | {"int4": np.dtype(ml_dtypes.int4), "uint4": np.dtype(ml_dtypes.uint4)}  # fmt: skip
#: Of results, relative; float16 gets two units in the last place.
_RELATIVE = {"float32": 1e-5, "float16": 2**-9}
_ABSOLUTE = {"float32": 1e-6, "float16": 1e-3}


@dataclasses.dataclass(frozen=True)
class Built:
    """A graph as ONNX, and the arrays of its inputs and expected outputs."""

    model: onnx.ModelProto
    inputs: dict[str, Array]
    expected: dict[str, Array]


def array_of(tensor: Mapping[str, Any]) -> Array:
    """``data`` is a list, one number for all elements, or texts where JSON has no number: "NaN", "-Infinity"."""
    dtype, shape = TYPES[tensor["descriptor"]["dataType"]], tuple(tensor["descriptor"]["shape"])
    data = tensor["data"]
    if not isinstance(data, list):
        data = [data] * int(np.prod(shape, dtype=np.int64))
    if dtype.kind == "f":
        return np.array([float(value) for value in data], dtype).reshape(shape)
    return np.array([int(value) for value in data], object).astype(dtype if dtype.kind in "iu" else np.int8).astype(
        dtype
    ).reshape(shape)  # fmt: skip


def require_close(found: Array, expected: Array, name: str) -> None:
    """Raises AssertionError. Integers must be equal."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), f"{name}: {found.dtype} {found.shape}"
    kind = found.dtype.name
    if kind not in _RELATIVE:
        np.testing.assert_array_equal(found, expected, err_msg=name)
        return
    np.testing.assert_allclose(
        found.astype(np.float64), expected.astype(np.float64), rtol=_RELATIVE[kind], atol=_ABSOLUTE[kind], err_msg=name
    )


def translate(graph: Mapping[str, Any]) -> Built:
    """Raises KeyError for an operator that is not in OPERATORS."""
    writer = _Writer()
    inputs: dict[str, Array] = {}
    values = []
    for name, tensor in graph["inputs"].items():
        array = array_of(tensor)
        writer.dtypes[name], writer.shapes[name] = array.dtype, array.shape
        if tensor.get("constant"):
            writer.weights.append(numpy_helper.from_array(array, name))
        else:
            inputs[name] = array
            values.append(_value(name, array))
    for operator in graph["operators"]:
        arguments: dict[str, Any] = {}
        for argument in operator["arguments"]:
            arguments |= argument
        outputs = operator["outputs"]
        options = arguments.pop("options", {})
        OPERATORS[operator["name"]](writer, arguments, options, [outputs] if isinstance(outputs, str) else outputs)
    expected = {name: array_of(tensor) for name, tensor in graph.get("expectedOutputs", {}).items()}
    results = [_value(name, array) for name, array in expected.items()]
    made = helper.make_graph(writer.nodes, "webnn", values, results, initializer=writer.weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Built(model, inputs, expected)


def _value(name: str, array: Array) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


class _Writer:
    """Nodes and constants; types and shapes of what operators need to know."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.dtypes: dict[str, np.dtype[Any]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def node(self, operator: str, inputs: Sequence[str], outputs: str | Sequence[str], **attributes: Any) -> str:
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        self.nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
        if inputs and inputs[0] in self.dtypes:
            for name in names:
                self.dtypes.setdefault(name, self.dtypes[inputs[0]])
        return names[0]

    def name(self) -> str:
        return f"_{len(self.nodes)}_{len(self.weights)}"

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        name = self.name()
        self.weights.append(numpy_helper.from_array(np.array(value, dtype), name))
        self.dtypes[name] = np.dtype(dtype)
        return name


_Arguments = Mapping[str, Any]
_Translation = Callable[[_Writer, _Arguments, _Arguments, list[str]], None]


def _plain(operator: str, *names: str) -> _Translation:
    """An ONNX operator of the same inputs."""

    def write(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
        w.node(operator, [a[name] for name in names], y)

    return write


def _with(operator: str, **attributes: tuple[str, float]) -> _Translation:
    """Of one input; attributes are options with defaults."""

    def write(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
        w.node(operator, [a["input"]], y, **{name: float(o.get(*option)) for name, option in attributes.items()})

    return write


def _flags(operator: str, *names: str) -> _Translation:
    """A comparison, which gives uint8."""

    def write(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
        w.node("Cast", [w.node(operator, [a[name] for name in names], w.name())], y, to=onnx.TensorProto.UINT8)

    return write


def _as_bool(w: _Writer, name: str) -> str:
    return w.node("Cast", [name], w.name(), to=onnx.TensorProto.BOOL)


def _logical(operator: str, *names: str) -> _Translation:
    """Of uint8, any number but 0 being true."""

    def write(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
        found = w.node(operator, [_as_bool(w, a[name]) for name in names], w.name())
        w.node("Cast", [found], y, to=onnx.TensorProto.UINT8)

    return write


def _not_equal(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    differs = w.node("Not", [w.node("Equal", [a["a"], a["b"]], w.name())], w.name())
    w.node("Cast", [differs], y, to=onnx.TensorProto.UINT8)


def _where(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    w.node("Where", [_as_bool(w, a["condition"]), a["trueValue"], a["falseValue"]], y)


def _reduce(operator: str) -> _Translation:
    def write(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
        axes = o.get("axes", list(range(len(w.shapes[a["input"]]))))
        w.node(operator, [a["input"], w.constant(axes)], y, keepdims=int(o.get("keepDimensions", False)))

    return write


def _arg(operator: str) -> _Translation:
    """WebNN gives int32 unless asked for int64, which is what ONNX gives."""

    def write(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
        keep = int(o.get("keepDimensions", False))
        found = w.node(operator, [a["input"]], w.name(), axis=a["axis"], keepdims=keep)
        kind = helper.np_dtype_to_tensor_dtype(TYPES[o.get("outputDataType", "int32")])
        w.node("Cast", [found], y, to=kind)

    return write


def _clamp(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    dtype = w.dtypes[a["input"]]
    bounds = [w.constant(o[key], dtype) if key in o else "" for key in ("minValue", "maxValue")]
    w.node("Clip", [a["input"], *bounds], y)


def _linear(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    dtype = w.dtypes[a["input"]]
    scaled = w.node("Mul", [a["input"], w.constant(o.get("alpha", 1), dtype)], w.name())
    w.node("Add", [scaled, w.constant(o.get("beta", 0), dtype)], y)


def _cast(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    w.node("Cast", [a["input"]], y, to=helper.np_dtype_to_tensor_dtype(TYPES[a["type"]]))


def _concat(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    w.node("Concat", a["inputs"], y, axis=a["axis"])


def _split(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    splits, axis = a["splits"], o.get("axis", 0)
    if isinstance(splits, int):
        w.node("Split", [a["input"]], y, axis=axis, num_outputs=splits)
    else:
        w.node("Split", [a["input"], w.constant(splits)], y, axis=axis)


def _sized(operator: str, key: str) -> _Translation:
    """The second operand is a list of numbers."""

    def write(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
        w.node(operator, [a["input"], w.constant(a[key])], y)

    return write


def _transpose(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    w.node("Transpose", [a["input"]], y, **({"perm": o["permutation"]} if "permutation" in o else {}))


def _slice(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    starts, axes = a["starts"], list(range(len(a["starts"])))
    ends = [start + size for start, size in zip(starts, a["sizes"], strict=True)]
    steps = o.get("strides", [1] * len(axes))
    w.node("Slice", [a["input"], *map(w.constant, (starts, ends, axes, steps))], y)


def _pad(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    mode = {"constant": "constant", "edge": "edge", "reflection": "reflect"}[o.get("mode", "constant")]
    pads = [*a["beginningPadding"], *a["endingPadding"]]
    value = [w.constant(o.get("value", 0), w.dtypes[a["input"]])] if mode == "constant" else []
    w.node("Pad", [a["input"], w.constant(pads), *value], y, mode=mode)


def _indexed(operator: str, *names: str) -> _Translation:
    """Indices may be int32, uint32 or int64; ONNX knows the signed ones."""

    def write(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
        indices = a["indices"]
        if w.dtypes[indices] == np.uint32 or operator.endswith("ND"):
            indices = w.node("Cast", [indices], w.name(), to=onnx.TensorProto.INT64)
        attributes = {} if operator.endswith("ND") else {"axis": o.get("axis", 0)}
        given = [indices if name == "indices" else a[name] for name in names]
        w.node(operator, given, y, **attributes)

    return write


def _triangular(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    w.node("Trilu", [a["input"], w.constant(o.get("diagonal", 0))], y, upper=int(o.get("upper", True)))


def _cumulative_sum(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    flags = {"exclusive": int(o.get("exclusive", False)), "reverse": int(o.get("reversed", False))}
    w.node("CumSum", [a["input"], w.constant(a["axis"])], y, **flags)


def _gemm(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    w.node(
        "Gemm", [a["a"], a["b"], *([o["c"]] if "c" in o else [])], y, alpha=float(o.get("alpha", 1)),
        beta=float(o.get("beta", 1)), transA=int(o.get("aTranspose", False)), transB=int(o.get("bTranspose", False)),
    )  # fmt: skip


def _pads(o: _Arguments) -> list[int]:
    top, bottom, left, right = o.get("padding", [0, 0, 0, 0])
    return [top, left, bottom, right]


def _conv2d(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    w.node(
        "Conv", [a["input"], a["filter"], *([o["bias"]] if "bias" in o else [])], y, pads=_pads(o),
        strides=o.get("strides", [1, 1]), dilations=o.get("dilations", [1, 1]), group=o.get("groups", 1),
    )  # fmt: skip


def _conv_transpose2d(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    w.node(
        "ConvTranspose", [a["input"], a["filter"], *([o["bias"]] if "bias" in o else [])], y, pads=_pads(o),
        strides=o.get("strides", [1, 1]), output_padding=o.get("outputPadding", [0, 0]), group=o.get("groups", 1),
    )  # fmt: skip


def _pool2d(operator: str) -> _Translation:
    def write(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
        window = o.get("windowDimensions", w.shapes[a["input"]][2:])
        w.node(operator, [a["input"]], y, kernel_shape=window, pads=_pads(o), strides=o.get("strides", [1, 1]))

    return write


def _softmax(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    w.node("Softmax", [a["input"]], y, axis=a["axis"])


def _batch_normalization(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    w.node(
        "BatchNormalization", [a["input"], o["scale"], o["bias"], a["mean"], a["variance"]], y,
        epsilon=float(o.get("epsilon", 1e-5)),
    )  # fmt: skip


def _layer_normalization(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    given = [a["input"], o["scale"], *([o["bias"]] if "bias" in o else [])]
    w.node("LayerNormalization", given, y, axis=min(o["axes"]), epsilon=float(o.get("epsilon", 1e-5)))


def _instance_normalization(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    w.node("InstanceNormalization", [a["input"], o["scale"], o["bias"]], y, epsilon=float(o.get("epsilon", 1e-5)))


def _resample2d(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    scales = w.constant([1, 1, *o.get("scales", [1, 1])], np.float32)
    mode = {"nearest-neighbor": "nearest", "linear": "linear"}[o.get("mode", "nearest-neighbor")]
    w.node("Resize", [a["input"], "", scales], y, mode=mode, coordinate_transformation_mode="half_pixel")


def _quantization(operator: str) -> _Translation:
    """One scale for the whole tensor, which is what a scale of one element is."""

    def write(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
        w.node(operator, [a["input"], a["scale"], a["zeroPoint"]], y)

    return write


def _gelu(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    w.node("Gelu", [a["input"]], y)


def _is_infinite(w: _Writer, a: _Arguments, o: _Arguments, y: list[str]) -> None:
    w.node("Cast", [w.node("IsInf", [a["a"]], w.name())], y, to=onnx.TensorProto.UINT8)


#: By WebNN's names.
OPERATORS: dict[str, _Translation] = {
    **{name: _plain(operator, "a", "b") for name, operator in {
        "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow",
        "matmul": "MatMul",
    }.items()},
    **{name: _plain(operator, "input") for name, operator in {
        "abs": "Abs", "ceil": "Ceil", "cos": "Cos", "erf": "Erf", "exp": "Exp", "floor": "Floor",
        "identity": "Identity", "log": "Log", "neg": "Neg", "reciprocal": "Reciprocal", "roundEven": "Round",
        "sign": "Sign", "sin": "Sin", "sqrt": "Sqrt", "tan": "Tan", "relu": "Relu", "sigmoid": "Sigmoid",
        "tanh": "Tanh", "softplus": "Softplus", "softsign": "Softsign", "hardSwish": "HardSwish",
    }.items()},
    **{name: _flags(operator, "a", "b") for name, operator in {
        "equal": "Equal", "greater": "Greater", "greaterOrEqual": "GreaterOrEqual", "lesser": "Less",
        "lesserOrEqual": "LessOrEqual",
    }.items()},
    **{name: _logical(operator, "a", "b") for name, operator in {
        "logicalAnd": "And", "logicalOr": "Or", "logicalXor": "Xor",
    }.items()},
    **{name: _reduce(operator) for name, operator in {
        "reduceL1": "ReduceL1", "reduceL2": "ReduceL2", "reduceLogSumExp": "ReduceLogSumExp", "reduceMax": "ReduceMax",
        "reduceMean": "ReduceMean", "reduceMin": "ReduceMin", "reduceProduct": "ReduceProd", "reduceSum": "ReduceSum",
        "reduceSumSquare": "ReduceSumSquare",
    }.items()},
    "argMax": _arg("ArgMax"),
    "argMin": _arg("ArgMin"),
    "averagePool2d": _pool2d("AveragePool"),
    "batchNormalization": _batch_normalization,
    "cast": _cast,
    "clamp": _clamp,
    "concat": _concat,
    "conv2d": _conv2d,
    "convTranspose2d": _conv_transpose2d,
    "cumulativeSum": _cumulative_sum,
    "dequantizeLinear": _quantization("DequantizeLinear"),
    "elu": _with("Elu", alpha=("alpha", 1.0)),
    "expand": _sized("Expand", "newShape"),
    "gather": _indexed("Gather", "input", "indices"),
    "gatherElements": _indexed("GatherElements", "input", "indices"),
    "gatherND": _indexed("GatherND", "input", "indices"),
    "gelu": _gelu,
    "gemm": _gemm,
    "hardSigmoid": _with("HardSigmoid", alpha=("alpha", 0.2), beta=("beta", 0.5)),
    "instanceNormalization": _instance_normalization,
    "isInfinite": _is_infinite,
    "isNaN": _flags("IsNaN", "a"),
    "layerNormalization": _layer_normalization,
    "leakyRelu": _with("LeakyRelu", alpha=("alpha", 0.01)),
    "linear": _linear,
    "logicalNot": _logical("Not", "a"),
    "maxPool2d": _pool2d("MaxPool"),
    "notEqual": _not_equal,
    "pad": _pad,
    "prelu": _plain("PRelu", "input", "slope"),
    "quantizeLinear": _quantization("QuantizeLinear"),
    "resample2d": _resample2d,
    "reshape": _sized("Reshape", "newShape"),
    "scatterElements": _indexed("ScatterElements", "input", "indices", "updates"),
    "scatterND": _indexed("ScatterND", "input", "indices", "updates"),
    "slice": _slice,
    "softmax": _softmax,
    "split": _split,
    "tile": _sized("Tile", "repetitions"),
    "transpose": _transpose,
    "triangular": _triangular,
    "where": _where,
}  # fmt: skip
