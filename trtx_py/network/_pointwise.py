"""Layers that compute element by element, and those that only give values: constants, fills, casts."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._arguments import checked_shape
from .._errors import DTypeError, InvalidArgumentError, ShapeError
from .._types import Array, DataType
from . import _checks as check
from ._checks import Enumerator, LayerMethods, Type, Weights, opened
from ._definition import LayerDefinition, LayerRequest, VendorNetwork
from ._onnx_graph import OnnxGraph
from ._tensors import Layer, NetworkTensor

#: Activation -> its parameters that matter, with the values they have if they are not given (None: must be given).
_ACTIVATIONS: dict[str, dict[str, float | None]] = {
    "RELU": {}, "SIGMOID": {}, "TANH": {}, "SOFTSIGN": {}, "GELU_ERF": {}, "GELU_TANH": {},
    "LEAKY_RELU": {"alpha": 0.01}, "ELU": {"alpha": 1.0}, "THRESHOLDED_RELU": {"alpha": 1.0},
    "SELU": {"alpha": 1.6732632423543772, "beta": 1.0507009873554805}, "SOFTPLUS": {"alpha": 1.0, "beta": 1.0},
    "CLIP": {"alpha": None, "beta": None}, "HARD_SIGMOID": {"alpha": 0.2, "beta": 0.5},
    "SCALED_TANH": {"alpha": 1.0, "beta": 1.0},
}  # fmt: skip
_PLAIN_ACTIVATIONS = {"RELU": "Relu", "SIGMOID": "Sigmoid", "TANH": "Tanh", "SOFTSIGN": "Softsign"}
_UNARY = {
    "EXP": "Exp", "LOG": "Log", "SQRT": "Sqrt", "RECIP": "Reciprocal", "ABS": "Abs", "NEG": "Neg", "SIN": "Sin",
    "COS": "Cos", "TAN": "Tan", "SINH": "Sinh", "COSH": "Cosh", "ASIN": "Asin", "ACOS": "Acos", "ATAN": "Atan",
    "ASINH": "Asinh", "ACOSH": "Acosh", "ATANH": "Atanh", "CEIL": "Ceil", "FLOOR": "Floor", "ERF": "Erf", "NOT": "Not",
    "SIGN": "Sign", "ROUND": "Round", "ISINF": "IsInf", "ISNAN": "IsNaN",
}  # fmt: skip
_ELEMENTWISE = {
    "SUM": "Add", "PROD": "Mul", "MAX": "Max", "MIN": "Min", "SUB": "Sub", "DIV": "Div", "POW": "Pow",
    "FLOOR_DIV": "", "AND": "And", "OR": "Or", "XOR": "Xor", "EQUAL": "Equal", "GREATER": "Greater", "LESS": "Less",
}  # fmt: skip
_SCALES = ("UNIFORM", "CHANNEL", "ELEMENTWISE")
_FILLS = ("LINSPACE", "RANDOM_UNIFORM", "RANDOM_NORMAL")
_INTEGERS = (DataType.INT32, DataType.INT64, DataType.INT8, DataType.UINT8)


def _lower_activation(g: OnnxGraph, r: LayerRequest) -> None:
    x, dtype, kind = r.input.name, r.input.dtype, r["type"]
    alpha, beta = r["alpha"], r["beta"]
    (y,) = r.outputs
    if kind in _PLAIN_ACTIVATIONS:
        g.node(_PLAIN_ACTIVATIONS[kind], [x], y)
    elif kind in ("GELU_ERF", "GELU_TANH"):
        g.node("Gelu", [x], y, approximate="tanh" if kind == "GELU_TANH" else "none")
    elif kind == "LEAKY_RELU":
        g.node("LeakyRelu", [x], y, alpha=alpha)
    elif kind == "ELU":
        g.node("Elu", [x], y, alpha=alpha)
    elif kind == "THRESHOLDED_RELU":
        g.node("ThresholdedRelu", [x], y, alpha=alpha)
    elif kind == "SELU":
        g.node("Selu", [x], y, alpha=alpha, gamma=beta)
    elif kind == "CLIP":
        g.node("Clip", [x, g.scalar(alpha, dtype), g.scalar(beta, dtype)], y)
    elif kind == "HARD_SIGMOID":
        g.node("HardSigmoid", [x], y, alpha=alpha, beta=beta)
    else:  # alpha * f(beta * x)
        inner = g.node("Mul", [x, g.scalar(beta, dtype)])
        curve = g.node({"SOFTPLUS": "Softplus", "SCALED_TANH": "Tanh"}[kind], [inner])
        g.node("Mul", [curve, g.scalar(alpha, dtype)], y)


def _call_activation(v: VendorNetwork, r: LayerRequest) -> Any:
    layer = v.add("add_activation", v.tensor(r.input), v.member("ActivationType", r["type"]))
    for parameter in _ACTIVATIONS[r["type"]]:
        v.set(layer, parameter, r[parameter])
    return layer


def _lower_unary(g: OnnxGraph, r: LayerRequest) -> None:
    g.node(_UNARY[r["op"]], [r.input.name], r.outputs)


def _call_unary(v: VendorNetwork, r: LayerRequest) -> Any:
    return v.add("add_unary", v.tensor(r.input), v.member("UnaryOperation", r["op"]))


def _lower_elementwise(g: OnnxGraph, r: LayerRequest) -> None:
    a, b = r.inputs["input1"].name, r.inputs["input2"].name
    if r["op"] != "FLOOR_DIV":
        g.node(_ELEMENTWISE[r["op"]], [a, b], r.outputs)
        return
    quotient = g.node("Div", [a, b])
    dtype = r.inputs["input1"].dtype
    if dtype not in _INTEGERS:
        g.node("Floor", [quotient], r.outputs)
        return
    # ONNX rounds towards zero: one too many where there is a rest and the signs differ.
    zero, one = g.scalar(0, dtype), g.scalar(1, dtype)
    rest = g.node("Sub", [a, g.node("Mul", [quotient, b])])
    uneven = g.node("Not", [g.node("Equal", [rest, zero])])
    differ = g.node("Xor", [g.node("Less", [rest, zero]), g.node("Less", [b, zero])])
    lower = g.node("Sub", [quotient, one])
    g.node("Where", [g.node("And", [uneven, differ]), lower, quotient], r.outputs)


def _call_elementwise(v: VendorNetwork, r: LayerRequest) -> Any:
    first, second = v.tensor(r.inputs["input1"]), v.tensor(r.inputs["input2"])
    return v.add("add_elementwise", first, second, v.member("ElementWiseOperation", r["op"]))


def _lower_scale(g: OnnxGraph, r: LayerRequest) -> None:
    value = r.input.name
    for role, operator in (("scale", "Mul"), ("shift", "Add"), ("power", "Pow")):
        if role in r.weights:
            value = g.node(operator, [value, g.constant(_spread(r, r.weights[role]), r.weights_name(role))])
    g.node("Identity", [value], r.outputs)


def _spread(r: LayerRequest, weights: Array) -> Array:
    """Weights of a scale layer in the rank of its input."""
    rank, shape = r.input.rank, [1] * r.input.rank
    if r["mode"] == "CHANNEL":
        shape[r["channel_axis"]] = weights.size
    elif r["mode"] == "ELEMENTWISE":
        shape = [1, *r.input.shape[1:]]
    return weights.reshape(shape[:rank])


def _call_scale(v: VendorNetwork, r: LayerRequest) -> Any:
    shift, scale, power = (v.weights(r.weights.get(role), r.input.dtype) for role in ("shift", "scale", "power"))
    mode = v.member("ScaleMode", r["mode"])
    return v.add("add_scale_nd", v.tensor(r.input), mode, shift, scale, power, r["channel_axis"])


def _lower_select(g: OnnxGraph, r: LayerRequest) -> None:
    g.node("Where", [r.inputs[role].name for role in ("condition", "then_input", "else_input")], r.outputs)


def _call_select(v: VendorNetwork, r: LayerRequest) -> Any:
    return v.add("add_select", *(v.tensor(r.inputs[role]) for role in ("condition", "then_input", "else_input")))


def _lower_prelu(g: OnnxGraph, r: LayerRequest) -> None:
    g.node("PRelu", [r.input.name, r.inputs["slopes"].name], r.outputs)


def _call_prelu(v: VendorNetwork, r: LayerRequest) -> Any:
    return v.add("add_parametric_relu", v.tensor(r.input), v.tensor(r.inputs["slopes"]))


def _lower_cast(g: OnnxGraph, r: LayerRequest) -> None:
    g.cast(r.input.name, r["to_type"], r.outputs[0])


def _call_cast(v: VendorNetwork, r: LayerRequest) -> Any:
    return v.add("add_cast", v.tensor(r.input), v.dtype(r["to_type"]))


def _lower_identity(g: OnnxGraph, r: LayerRequest) -> None:
    g.node("Identity", [r.input.name], r.outputs)


def _call_identity(v: VendorNetwork, r: LayerRequest) -> Any:
    return v.add("add_identity", v.tensor(r.input))


def _lower_constant(g: OnnxGraph, r: LayerRequest) -> None:
    g.constant(r.weights["value"], r.outputs[0])


def _call_constant(v: VendorNetwork, r: LayerRequest) -> Any:
    value = r.weights["value"]
    return v.add("add_constant", value.shape, v.weights(value, DataType.from_numpy(value.dtype)))


def _lower_fill(g: OnnxGraph, r: LayerRequest) -> None:
    shape, dtype, alpha, beta = r["shape"], r["dtype"], r["alpha"], r["beta"]
    if r["op"] == "LINSPACE":
        g.check_size(shape, "a linspace")
        g.constant((alpha + beta * np.arange(shape[0])).astype(dtype.numpy), r.outputs[0])
        return
    uniform = r["op"] == "RANDOM_UNIFORM"
    limits: dict[str, Any] = {"low": alpha, "high": beta} if uniform else {"mean": alpha, "scale": beta}
    if any(n == 0 for n in shape):
        g.constant(np.zeros(shape, dtype.numpy), r.outputs[0])
        return
    made = g.node("RandomUniform" if uniform else "RandomNormal", [], shape=list(shape), **limits)
    g.cast(made, dtype, r.outputs[0])


def _call_fill(v: VendorNetwork, r: LayerRequest) -> Any:
    # Versions before 9 have no third argument and fill with float32, which later ones do without it.
    types = () if r["dtype"] is DataType.FLOAT else (v.dtype(r["dtype"]),)
    layer = v.add("add_fill", r["shape"], v.member("FillOperation", r["op"]), *types)
    whole = r["dtype"] in _INTEGERS
    v.set(layer, "alpha", int(r["alpha"]) if whole else r["alpha"])
    v.set(layer, "beta", int(r["beta"]) if whole else r["beta"])
    return layer


TABLE = {
    "activation": LayerDefinition("ACTIVATION", _lower_activation, _call_activation),
    "unary": LayerDefinition("UNARY", _lower_unary, _call_unary),
    "elementwise": LayerDefinition("ELEMENTWISE", _lower_elementwise, _call_elementwise),
    "scale": LayerDefinition("SCALE", _lower_scale, _call_scale),
    "select": LayerDefinition("SELECT", _lower_select, _call_select),
    "parametric_relu": LayerDefinition("PARAMETRIC_RELU", _lower_prelu, _call_prelu),
    "cast": LayerDefinition("CAST", _lower_cast, _call_cast),
    "identity": LayerDefinition("IDENTITY", _lower_identity, _call_identity),
    "constant": LayerDefinition("CONSTANT", _lower_constant, _call_constant),
    "fill": LayerDefinition("FILL", _lower_fill, _call_fill),
}


class PointwiseLayers(LayerMethods):
    """The methods for these layers. All raise ClosedError after close, BuilderError where TensorRT refuses."""

    @opened
    def add_activation(
        self,
        input: NetworkTensor,
        type: Enumerator,
        alpha: float | None = None,
        beta: float | None = None,
        *,
        name: str | None = None,
    ) -> Layer:
        """An activation function; the output has the input's shape and type.

        Args:
            type: RELU, SIGMOID, TANH, LEAKY_RELU, ELU, SELU, SOFTSIGN, SOFTPLUS, CLIP, HARD_SIGMOID, SCALED_TANH,
                THRESHOLDED_RELU, GELU_ERF or GELU_TANH.
            alpha, beta: of those that have parameters; ONNX's defaults where they are left out. CLIP needs both:
                ``max(alpha, min(beta, x))``.
        Raises InvalidArgumentError for parameters that the function does not have.
        Source: nvinfer1::INetworkDefinition::addActivation
        """
        kind = check.member(type, "type", _ACTIVATIONS)
        known = _ACTIVATIONS[kind]
        values: dict[str, Any] = {"alpha": None, "beta": None}
        for what, given in (("alpha", alpha), ("beta", beta)):
            if given is not None and what not in known:
                raise InvalidArgumentError(f"{what} is {given!r}, and {kind} has no {what}; leave it out")
            if what in known:
                value = known[what] if given is None else check.number(given, what)
                if value is None:
                    raise InvalidArgumentError(f"{kind} needs {what}; expected alpha=lowest, beta=highest value")
                values[what] = value
        return self._add("activation", name, {"input": check.tensor(input)}, type=kind, **values)

    @opened
    def add_unary(self, input: NetworkTensor, op: Enumerator, *, name: str | None = None) -> Layer:
        """A function of one tensor, such as EXP, SQRT, RECIP, ABS, ERF or NOT.

        Source: nvinfer1::INetworkDefinition::addUnary
        """
        return self._add("unary", name, {"input": check.tensor(input)}, op=check.member(op, "op", _UNARY))

    @opened
    def add_elementwise(
        self, input1: NetworkTensor, input2: NetworkTensor, op: Enumerator, *, name: str | None = None
    ) -> Layer:
        """An operation of two tensors of one rank and type; dimensions of 1 are broadcast.

        Args:
            op: SUM, PROD, MAX, MIN, SUB, DIV, POW, FLOOR_DIV, AND, OR, XOR, EQUAL, GREATER or LESS.
        Raises ShapeError for ranks that differ.
        Source: nvinfer1::INetworkDefinition::addElementWise
        """
        first, second = check.tensor(input1, "input1"), check.tensor(input2, "input2")
        kind = check.member(op, "op", _ELEMENTWISE)
        check.same_rank("add_elementwise", first, second)
        check.same_type("add_elementwise", first, second)
        return self._add("elementwise", name, {"input1": first, "input2": second}, op=kind)

    @opened
    def add_scale(
        self,
        input: NetworkTensor,
        mode: Enumerator,
        shift: Weights | None = None,
        scale: Weights | None = None,
        power: Weights | None = None,
        *,
        channel_axis: int = 1,
        name: str | None = None,
    ) -> Layer:
        """``(input * scale + shift) ** power``; what is left out does nothing.

        Args:
            input: of four dimensions at least.
            mode: UNIFORM (one weight), CHANNEL (one for each index of ``channel_axis``), ELEMENTWISE (one for each
                element besides the leading axis).
            shift, scale, power: weights of the input's type.
        Source: nvinfer1::INetworkDefinition::addScaleNd
        """
        value = check.tensor(input)
        rank = check.rank_at_least(value, 4, "input")
        kind, at = check.member(mode, "mode", _SCALES), check.axis(channel_axis, rank, "channel_axis")
        count = 1
        if kind == "CHANNEL":
            count = check.channels(value, at)
        elif kind == "ELEMENTWISE":
            for index in range(1, rank):
                count *= check.channels(value, index)
        weights = {
            role: check.array(given, role, value.dtype, count)
            for role, given in (("shift", shift), ("scale", scale), ("power", power))
            if given is not None
        }
        return self._add("scale", name, {"input": value}, weights, mode=kind, channel_axis=at)

    @opened
    def add_select(
        self,
        condition: NetworkTensor,
        then_input: NetworkTensor,
        else_input: NetworkTensor,
        *,
        name: str | None = None,
    ) -> Layer:
        """Elements of ``then_input`` where the BOOL ``condition`` holds, of ``else_input`` elsewhere; broadcast.

        Source: nvinfer1::INetworkDefinition::addSelect
        """
        tensors = {
            "condition": check.tensor(condition, "condition"),
            "then_input": check.tensor(then_input, "then_input"),
            "else_input": check.tensor(else_input, "else_input"),
        }
        for what in ("then_input", "else_input"):
            check.same_rank("add_select", tensors["condition"], tensors[what])
        check.typed(tensors["condition"], "condition", (DataType.BOOL,))
        check.same_type("add_select", tensors["then_input"], tensors["else_input"])
        return self._add("select", name, tensors)

    @opened
    def add_parametric_relu(self, input: NetworkTensor, slopes: NetworkTensor, *, name: str | None = None) -> Layer:
        """``x`` where it is positive, ``slopes * x`` elsewhere; ``slopes`` has the input's rank and is broadcast.

        Source: nvinfer1::INetworkDefinition::addParametricReLU
        """
        value, other = check.tensor(input), check.tensor(slopes, "slopes")
        check.same_rank("add_parametric_relu", value, other)
        check.same_type("add_parametric_relu", value, other)
        check.typed(value, "input", check.REALS)
        check.broadcast_to(other, value, "slopes")
        return self._add("parametric_relu", name, {"input": value, "slopes": other})

    @opened
    def add_cast(self, input: NetworkTensor, to_type: Type, *, name: str | None = None) -> Layer:
        """The same values in another type. Source: nvinfer1::INetworkDefinition::addCast"""
        return self._add("cast", name, {"input": check.tensor(input)}, to_type=check.data_type(to_type, "to_type"))

    @opened
    def add_identity(self, input: NetworkTensor, *, name: str | None = None) -> Layer:
        """The same tensor again, for an output that is also an input. Source: INetworkDefinition::addIdentity"""
        return self._add("identity", name, {"input": check.tensor(input)})

    @opened
    def add_constant(self, value: Weights, *, name: str | None = None) -> Layer:
        """A tensor with the values of an array, whose shape and type it has; the array is copied.

        Numbers that are no array make a float32 or an int64 tensor.

        Raises DTypeError for an array of a type that TensorRT does not have, such as float64.
        Source: nvinfer1::INetworkDefinition::addConstant
        """
        found = check.array(value, "value")
        if found.dtype == np.uint8:
            raise DTypeError(
                "value is uint8, which TensorRT has no constants of; give float32, and put add_cast behind it"
            )
        return self._add("constant", name, {}, {"value": found})

    @opened
    def add_fill(
        self,
        shape: Any,
        op: Enumerator,
        alpha: float,
        beta: float,
        dtype: Type = DataType.FLOAT,
        *,
        name: str | None = None,
    ) -> Layer:
        """A tensor filled by a rule.

        Args:
            shape: complete; one dimension for LINSPACE.
            op: LINSPACE (``alpha + beta * index``), RANDOM_UNIFORM (from alpha to beta) or RANDOM_NORMAL (mean alpha,
                standard deviation beta). Random values differ from run to run and from backend to backend.
            dtype: float32, or int32 and int64 for LINSPACE, float16 for the others.
        Source: nvinfer1::INetworkDefinition::addFill
        """
        kind, dims = check.member(op, "op", _FILLS), checked_shape(shape, "shape")
        other = (DataType.INT32, DataType.INT64) if kind == "LINSPACE" else (DataType.HALF,)
        if kind == "LINSPACE" and len(dims) != 1:
            raise ShapeError(f"shape is {dims}; LINSPACE fills one dimension: reshape its output with add_shuffle")
        return self._add(
            "fill", name, {}, shape=dims, op=kind, alpha=check.number(alpha, "alpha"), beta=check.number(beta, "beta"),
            dtype=check.data_type(dtype, "dtype", (DataType.FLOAT, *other)),
        )  # fmt: skip
