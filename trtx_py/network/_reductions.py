"""Layers that look along axes: reductions, normalizations, sorting, running sums."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._arguments import checked_int
from .._errors import InvalidArgumentError, ShapeError
from .._types import DataType
from . import _checks as check
from ._checks import Enumerator, LayerMethods, Type, opened
from ._definition import LayerDefinition, LayerRequest, VendorNetwork
from ._onnx_graph import OnnxGraph
from ._tensors import Layer, NetworkTensor

_REDUCTIONS = {
    "SUM": "ReduceSum", "PROD": "ReduceProd", "MAX": "ReduceMax", "MIN": "ReduceMin", "AVG": "ReduceMean",
}  # fmt: skip
_INDEX_TYPES = (DataType.INT32, DataType.INT64)


def _lower_reduce(g: OnnxGraph, r: LayerRequest) -> None:
    g.node(_REDUCTIONS[r["op"]], [r.input.name, g.ints(r["axes"])], r.outputs, keepdims=int(r["keep_dims"]))


def _call_reduce(v: VendorNetwork, r: LayerRequest) -> Any:
    operation = v.member("ReduceOperation", r["op"])
    return v.add("add_reduce", v.tensor(r.input), operation, check.mask(r["axes"]), r["keep_dims"])


def _lower_softmax(g: OnnxGraph, r: LayerRequest) -> None:
    g.node("Softmax", [r.input.name], r.outputs, axis=r["axis"])


def _call_softmax(v: VendorNetwork, r: LayerRequest) -> Any:
    layer = v.add("add_softmax", v.tensor(r.input))
    v.set(layer, "axes", check.mask([r["axis"]]))
    return layer


def _lower_ragged_softmax(g: OnnxGraph, r: LayerRequest) -> None:
    x, dtype = r.input.name, r.input.dtype
    size = g.node("Squeeze", [g.node("Shape", [x], start=r.input.rank - 1), g.ints([0])])
    columns = g.node("Range", [g.scalar(0, DataType.INT64), size, g.scalar(1, DataType.INT64)])
    inside = g.node("Less", [columns, g.cast(r.inputs["bounds"].name, DataType.INT64)])
    lowest = -6e4 if dtype is DataType.HALF else -1e30
    shares = g.node("Softmax", [g.node("Where", [inside, x, g.scalar(lowest, dtype)])], axis=-1)
    g.node("Where", [inside, shares, g.scalar(0, dtype)], r.outputs)


def _call_ragged_softmax(v: VendorNetwork, r: LayerRequest) -> Any:
    return v.add("add_ragged_softmax", v.tensor(r.input), v.tensor(r.inputs["bounds"]))


def _lower_topk(g: OnnxGraph, r: LayerRequest) -> None:
    wide = r.outputs[1] if r["indices_type"] is DataType.INT64 else g.fresh()
    g.node(
        "TopK", [r.input.name, g.ints([r["k"]])], [r.outputs[0], wide], axis=r["axis"],
        largest=int(r["op"] == "MAX"), sorted=1,
    )  # fmt: skip
    if wide != r.outputs[1]:
        g.cast(wide, DataType.INT32, r.outputs[1])


def _call_topk(v: VendorNetwork, r: LayerRequest) -> Any:
    wide = (v.dtype(DataType.INT64),) if r["indices_type"] is DataType.INT64 else ()
    operation = v.member("TopKOperation", r["op"])
    return v.add("add_topk", v.tensor(r.input), operation, r["k"], check.mask([r["axis"]]), *wide)


def _lower_normalization(g: OnnxGraph, r: LayerRequest) -> None:
    x, dtype, axes, groups = r.input.name, r.input.dtype, r["axes"], r["num_groups"]
    value = x
    if groups > 1:
        value, axes = g.node("Reshape", [x, g.ints([0, groups, -1])]), (2,)
    # In half precision the squares overflow: TensorRT adds up in float32 too.
    wide = g.cast(value, DataType.FLOAT) if dtype is not DataType.FLOAT else value
    along = g.ints(axes)
    centred = g.node("Sub", [wide, g.node("ReduceMean", [wide, along], keepdims=1)])
    variance = g.node("ReduceMean", [g.node("Mul", [centred, centred]), along], keepdims=1)
    deviation = g.node("Sqrt", [g.node("Add", [variance, g.scalar(r["epsilon"], DataType.FLOAT)])])
    value = g.node("Div", [centred, deviation])
    if dtype is not DataType.FLOAT:
        value = g.cast(value, dtype)
    if groups > 1:
        value = g.node("Reshape", [value, g.node("Shape", [x])])
    g.node("Add", [g.node("Mul", [value, r.inputs["scale"].name]), r.inputs["bias"].name], r.outputs)


def _call_normalization(v: VendorNetwork, r: LayerRequest) -> Any:
    # The older method wants one weight for each group, the newer one for each channel; without groups they agree.
    newer = v.has("add_normalization_v2") or r["num_groups"] > 1
    tensors = [v.tensor(r.inputs[role]) for role in ("input", "scale", "bias")]
    layer = v.add("add_normalization_v2" if newer else "add_normalization", *tensors, check.mask(r["axes"]))
    v.set(layer, "epsilon", r["epsilon"])
    if r["num_groups"] > 1:
        v.set(layer, "num_groups", r["num_groups"])
    return layer


def _lower_lrn(g: OnnxGraph, r: LayerRequest) -> None:
    g.node("LRN", [r.input.name], r.outputs, size=r["window"], alpha=r["alpha"], beta=r["beta"], bias=r["k"])


def _call_lrn(v: VendorNetwork, r: LayerRequest) -> Any:
    return v.add("add_lrn", v.tensor(r.input), r["window"], r["alpha"], r["beta"], r["k"])


def _lower_cumulative(g: OnnxGraph, r: LayerRequest) -> None:
    along = g.scalar(r["axis"], DataType.INT64)
    g.node("CumSum", [r.input.name, along], r.outputs, exclusive=int(r["exclusive"]), reverse=int(r["reverse"]))


def _call_cumulative(v: VendorNetwork, r: LayerRequest) -> Any:
    along = v.constant(np.array(r["axis"], np.int32))
    operation = v.member("CumulativeOperation", r["op"])
    return v.add("add_cumulative", v.tensor(r.input), along, operation, r["exclusive"], r["reverse"])


_MOST_K = 3840  # of ITopKLayer::setK

TABLE = {
    "reduce": LayerDefinition("REDUCE", _lower_reduce, _call_reduce),
    "softmax": LayerDefinition("SOFTMAX", _lower_softmax, _call_softmax),
    "ragged_softmax": LayerDefinition("RAGGED_SOFTMAX", _lower_ragged_softmax, _call_ragged_softmax),
    "topk": LayerDefinition("TOPK", _lower_topk, _call_topk, outputs=2),
    "normalization": LayerDefinition("NORMALIZATION", _lower_normalization, _call_normalization),
    "lrn": LayerDefinition("LRN", _lower_lrn, _call_lrn),
    "cumulative": LayerDefinition("CUMULATIVE", _lower_cumulative, _call_cumulative),
}


class ReductionLayers(LayerMethods):
    """The methods for these layers. All raise ClosedError after close, BuilderError where TensorRT refuses."""

    @opened
    def add_reduce(
        self, input: NetworkTensor, op: Enumerator, axes: Any, keep_dims: bool, *, name: str | None = None
    ) -> Layer:
        """One value for all that lies along some axes.

        Args:
            op: SUM, PROD, MAX, MIN or AVG.
            axes: such as (2, 3), negative ones from the back; TensorRT's own method has a bit mask here.
            keep_dims: leave a dimension of 1 for each of them.
        Source: nvinfer1::INetworkDefinition::addReduce
        """
        value = check.tensor(input)
        return self._add(
            "reduce", name, {"input": value}, op=check.member(op, "op", _REDUCTIONS),
            axes=check.axes(axes, len(value.shape)), keep_dims=check.flag(keep_dims, "keep_dims"),
        )  # fmt: skip

    @opened
    def add_softmax(self, input: NetworkTensor, axis: int = -1, *, name: str | None = None) -> Layer:
        """Exponentials that add up to 1 along one axis.

        Args:
            input: of two dimensions at least.
        Source: nvinfer1::INetworkDefinition::addSoftMax
        """
        value = check.tensor(input)
        check.rank_at_least(value, 2, "input")
        return self._add("softmax", name, {"input": value}, axis=check.axis(axis, len(value.shape)))

    @opened
    def add_ragged_softmax(self, input: NetworkTensor, bounds: NetworkTensor, *, name: str | None = None) -> Layer:
        """A softmax over the first elements of each row, and 0 for the rest.

        Args:
            input: [batch, rows, elements].
            bounds: INT32 [batch, rows, 1], how many elements of each row count.
        Source: nvinfer1::INetworkDefinition::addRaggedSoftMax
        """
        value, limits = check.tensor(input), check.tensor(bounds, "bounds")
        if len(value.shape) != 3 or limits.shape != (*value.shape[:2], 1):
            raise ShapeError(
                f"input has shape {list(value.shape)} and bounds {list(limits.shape)}; expected [batch, rows, "
                "elements] and [batch, rows, 1]"
            )
        return self._add("ragged_softmax", name, {"input": value, "bounds": limits})

    @opened
    def add_topk(
        self,
        input: NetworkTensor,
        op: Enumerator,
        k: int,
        axis: int,
        *,
        indices_type: Type = DataType.INT32,
        name: str | None = None,
    ) -> Layer:
        """The ``k`` largest (MAX) or smallest (MIN) elements along an axis, in order; two outputs: values and indices.

        Args:
            input: of two dimensions at least.
            k: up to 3840.
            indices_type: int32, or int64 where TensorRT has that.
        Source: nvinfer1::INetworkDefinition::addTopK
        """
        value = check.tensor(input)
        along = check.axis(axis, check.rank_at_least(value, 2, "input"))
        count = checked_int(k, "k", minimum=1, maximum=_MOST_K)
        if 0 <= value.shape[along] < count:
            raise ShapeError(f"k is {count}; axis {along} of {value.name!r} has {value.shape[along]} elements")
        return self._add(
            "topk", name, {"input": value}, op=check.member(op, "op", ("MAX", "MIN")), k=count, axis=along,
            indices_type=check.data_type(indices_type, "indices_type", _INDEX_TYPES),
        )  # fmt: skip

    @opened
    def add_normalization(
        self,
        input: NetworkTensor,
        scale: NetworkTensor,
        bias: NetworkTensor,
        axes: Any,
        *,
        epsilon: float = 1e-5,
        num_groups: int = 1,
        name: str | None = None,
    ) -> Layer:
        """``(x - mean) / sqrt(variance + epsilon) * scale + bias``, mean and variance along ``axes``.

        Args:
            scale, bias: of the input's rank and type, broadcast to it: for [N, C, H, W] normally [1, C, 1, 1].
            axes: (2, 3) of such a tensor for an instance or group normalization, (-1,) for a layer normalization.
            num_groups: in how many groups the channels are normalized together; with more than one, ``axes`` are all
                dimensions after the channels, and ``scale`` and ``bias`` are per channel (addNormalizationV2, which
                TensorRT has since 10.15).
        Source: nvinfer1::INetworkDefinition::addNormalizationV2, addNormalization
        """
        value = check.tensor(input)
        tensors = {"input": value, "scale": check.tensor(scale, "scale"), "bias": check.tensor(bias, "bias")}
        for what in ("scale", "bias"):
            check.same_rank("add_normalization", value, tensors[what])
            check.same_type("add_normalization", value, tensors[what])
            check.broadcast_to(tensors[what], value, what)
        rank, groups = len(value.shape), checked_int(num_groups, "num_groups", minimum=1)
        along = check.axes(axes, rank)
        if groups > 1 and (along != tuple(range(2, rank)) or check.channels(value) % groups):
            raise ShapeError(
                f"num_groups is {groups}; expected a divisor of the channels, dimension 1 of {list(value.shape)}, and "
                f"axes {tuple(range(2, rank))}"
            )
        limit = check.number(epsilon, "epsilon")
        if not limit >= 0:
            raise InvalidArgumentError(f"epsilon is {limit}; expected 0 or more")
        return self._add("normalization", name, tensors, axes=along, epsilon=limit, num_groups=groups)

    @opened
    def add_lrn(
        self, input: NetworkTensor, window: int, alpha: float, beta: float, k: float, *, name: str | None = None
    ) -> Layer:
        """Local response normalization: ``x / (k + alpha / window * sum of squares) ** beta`` over nearby channels.

        Args:
            input: [batch, channels, height, width].
            window: odd, 1 to 15.
            alpha, beta, k: at most 1e20 either way, 0.01 to 1e5, and 1e-5 to 1e10.
        Source: nvinfer1::INetworkDefinition::addLRN
        """
        value = check.tensor(input)
        check.rank_at_least(value, 4, "input")
        size = checked_int(window, "window", minimum=1, maximum=15)
        if size % 2 == 0:
            raise InvalidArgumentError(f"window is {size}; expected an odd number of channels")
        limits = {"alpha": (alpha, -1e20, 1e20), "beta": (beta, 0.01, 1e5), "k": (k, 1e-5, 1e10)}
        parameters: dict[str, Any] = {what: check.number(given, what) for what, (given, _, _) in limits.items()}
        for what, (_, low, high) in limits.items():
            if not low <= parameters[what] <= high:
                raise InvalidArgumentError(f"{what} is {parameters[what]}; expected {low:g} to {high:g}")
        return self._add("lrn", name, {"input": value}, window=size, **parameters)

    @opened
    def add_cumulative(
        self,
        input: NetworkTensor,
        axis: int,
        op: Enumerator = "SUM",
        exclusive: bool = False,
        reverse: bool = False,
        *,
        name: str | None = None,
    ) -> Layer:
        """Running sums along an axis.

        Args:
            exclusive: leave an element out of its own sum.
            reverse: start at the end.
        Source: nvinfer1::INetworkDefinition::addCumulative
        """
        value = check.tensor(input)
        return self._add(
            "cumulative", name, {"input": value}, op=check.member(op, "op", ("SUM",)),
            axis=check.axis(axis, len(value.shape)), exclusive=check.flag(exclusive, "exclusive"),
            reverse=check.flag(reverse, "reverse"),
        )  # fmt: skip
