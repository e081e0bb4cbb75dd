"""Layers that move elements around: reshape, transpose, slice, gather, scatter, resize, pad."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from .._arguments import checked_shape
from .._errors import DTypeError, InvalidArgumentError, ShapeError
from .._types import Array, DataType
from . import _checks as check
from ._checks import Enumerator, LayerMethods, opened
from ._definition import LayerDefinition, LayerRequest, VendorNetwork
from ._onnx_graph import OnnxGraph
from ._products import sequence
from ._tensors import Layer, NetworkTensor

_SAMPLES = ("STRICT_BOUNDS", "WRAP", "CLAMP", "FILL", "REFLECT")


def _lower_shuffle(g: OnnxGraph, r: LayerRequest) -> None:
    value = r.input.name
    if r["first_transpose"] is not None:
        value = g.node("Transpose", [value], perm=r["first_transpose"])
    if "reshape" in r.inputs:
        dims = g.cast(r.inputs["reshape"].name, DataType.INT64)
        value = g.node("Reshape", [value, dims], allowzero=int(not r["zero_is_placeholder"]))
    elif r["reshape_dims"] is not None:
        # With a 0 that is a size and a -1 both, ONNX has no answer; TensorRT's is 0 elements.
        value = g.node("Reshape", [value, g.ints(r["reshape_dims"])], allowzero=int(not r["zero_is_placeholder"]))
    if r["second_transpose"] is not None:
        value = g.node("Transpose", [value], perm=r["second_transpose"])
    g.node("Identity", [value], r.outputs)


def _call_shuffle(v: VendorNetwork, r: LayerRequest) -> Any:
    layer = v.add("add_shuffle", v.tensor(r.input))
    v.set(layer, "zero_is_placeholder", r["zero_is_placeholder"])
    for setting in ("first_transpose", "reshape_dims", "second_transpose"):
        if r[setting] is not None:
            v.set(layer, setting, r[setting])
    if "reshape" in r.inputs:
        layer.set_input(1, v.tensor(r.inputs["reshape"]))
    return layer


def _lower_concatenation(g: OnnxGraph, r: LayerRequest) -> None:
    g.node("Concat", [facts.name for facts in r.inputs.values()], r.outputs, axis=r["axis"])


def _call_concatenation(v: VendorNetwork, r: LayerRequest) -> Any:
    layer = v.add("add_concatenation", [v.tensor(facts) for facts in r.inputs.values()])
    v.set(layer, "axis", r["axis"])
    return layer


def _lower_slice(g: OnnxGraph, r: LayerRequest) -> None:
    if r["mode"] != "STRICT_BOUNDS":
        _lower_slice_beyond(g, r)
        return
    axes = g.ints(range(r.input.rank))
    if not {"start", "shape", "stride"} & r.inputs.keys():
        ends = [_end(*one) for one in zip(r["start"], r["shape"], r["stride"], strict=True)]
        g.node("Slice", [r.input.name, g.ints(r["start"]), g.ints(ends), axes, g.ints(r["stride"])], r.outputs)
        return
    start, shape, stride = (
        g.cast(r.inputs[role].name, DataType.INT64) if role in r.inputs else g.ints(r[role])
        for role in ("start", "shape", "stride")
    )
    end = g.node("Add", [start, g.node("Mul", [shape, stride])])
    # Counted down to the first element the end is -1 or less, which ONNX would count from the back.
    below = g.node("Less", [end, g.ints([0])])
    end = g.node("Where", [below, g.ints([np.iinfo(np.int64).min]), end])
    g.node("Slice", [r.input.name, start, end, axes, stride], r.outputs)


def _end(start: int, size: int, stride: int) -> int:
    end = start + size * stride
    return end if end >= 0 else np.iinfo(np.int64).min


def _lower_slice_beyond(g: OnnxGraph, r: LayerRequest) -> None:
    """Slices that reach over the edge: one gather for each axis, by indices that are known now."""
    g.check_size(r["shape"], "a slice")
    value, outside = r.input.name, []
    for axis, size in enumerate(r.input.shape):
        wanted = r["start"][axis] + np.arange(r["shape"][axis], dtype=np.int64) * r["stride"][axis]
        value = g.node("Gather", [value, g.constant(_folded(wanted, size, r["mode"]))], axis=axis)
        outside.append((wanted < 0) | (wanted >= size))
    if r["mode"] != "FILL":
        g.node("Identity", [value], r.outputs)
        return
    missing: Array = np.zeros(r["shape"], bool)
    for axis, found in enumerate(outside):
        missing |= found.reshape([-1 if at == axis else 1 for at in range(len(outside))])
    fill = r.inputs["fill"].name if "fill" in r.inputs else g.scalar(0, r.input.dtype)
    g.node("Where", [g.constant(missing), fill, value], r.outputs)


def _folded(wanted: Array, size: int, mode: str) -> Array:
    """Indices brought back into 0 to ``size``."""
    if mode == "WRAP":
        inside: Array = wanted % size
    elif mode == "REFLECT":
        period = max(2 * size - 2, 1)
        back = np.abs(wanted) % period
        inside = np.where(back < size, back, period - back)
    else:
        inside = np.clip(wanted, 0, size - 1)
    return inside.astype(np.int64)


def _call_slice(v: VendorNetwork, r: LayerRequest) -> Any:
    rank = r.input.rank
    # What a tensor gives instead is a placeholder here.
    dims = [(default,) * rank if r[role] is None else r[role] for role, default in _SLICE_DEFAULTS]
    layer = v.add("add_slice", v.tensor(r.input), *dims)
    mode = r["mode"]
    if mode != "STRICT_BOUNDS":  # called DEFAULT in 8.6, and the default everywhere
        v.set(layer, "mode", v.member("SampleMode", mode))
    for index, role in enumerate(("start", "shape", "stride", "fill"), start=1):
        if role in r.inputs:
            layer.set_input(index, v.tensor(r.inputs[role]))
    return layer


_SLICE_DEFAULTS = (("start", 0), ("shape", 1), ("stride", 1))


def _lower_padding(g: OnnxGraph, r: LayerRequest) -> None:
    front = [0] * (r.input.rank - 2)
    pads = g.ints([*front, *r["pre_padding"], *front, *r["post_padding"]])
    g.node("Pad", [r.input.name, pads, g.scalar(0, r.input.dtype)], r.outputs, mode="constant")


def _call_padding(v: VendorNetwork, r: LayerRequest) -> Any:
    return v.add("add_padding_nd", v.tensor(r.input), r["pre_padding"], r["post_padding"])


def _lower_axes(operator: str) -> Any:
    def lower(g: OnnxGraph, r: LayerRequest) -> None:
        g.node(operator, [r.input.name, g.ints(r["axes"])], r.outputs)

    return lower


def _call_axes(method: str) -> Any:
    def call(v: VendorNetwork, r: LayerRequest) -> Any:
        return v.add(method, v.tensor(r.input), v.constant(np.array(r["axes"], np.int64)))

    return call


def _lower_shape(g: OnnxGraph, r: LayerRequest) -> None:
    g.node("Shape", [r.input.name], r.outputs)


def _call_shape(v: VendorNetwork, r: LayerRequest) -> Any:
    return v.add("add_shape", v.tensor(r.input))


TABLE = {
    "shuffle": LayerDefinition("SHUFFLE", _lower_shuffle, _call_shuffle),
    "concatenation": LayerDefinition("CONCATENATION", _lower_concatenation, _call_concatenation),
    "slice": LayerDefinition("SLICE", _lower_slice, _call_slice),
    "padding_nd": LayerDefinition("PADDING", _lower_padding, _call_padding),
    "squeeze": LayerDefinition("SQUEEZE", _lower_axes("Squeeze"), _call_axes("add_squeeze")),
    "unsqueeze": LayerDefinition("UNSQUEEZE", _lower_axes("Unsqueeze"), _call_axes("add_unsqueeze")),
    "shape": LayerDefinition("SHAPE", _lower_shape, _call_shape),
}


def _permutation(value: Any, rank: int, what: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    order = checked_shape(value, what)
    if sorted(order) != list(range(rank)):
        raise ShapeError(f"{what} is {order}; expected each of 0 to {rank - 1} once")
    return order


class ShapingLayers(LayerMethods):
    """The methods for these layers. All raise ClosedError after close, BuilderError where TensorRT refuses."""

    @opened
    def add_shuffle(
        self,
        input: NetworkTensor,
        *,
        first_transpose: Any = None,
        reshape: Any = None,
        second_transpose: Any = None,
        zero_is_placeholder: bool = True,
        name: str | None = None,
    ) -> Layer:
        """Transpose, reshape, transpose; what is left out does nothing.

        Args:
            first_transpose, second_transpose: for each axis of the result, the axis that it comes from.
            reshape: the new dimensions (0 keeps that of the input, one -1 is worked out), or a one-dimensional integer
                tensor with them.
            zero_is_placeholder: False makes a 0 mean 0.
        Source: nvinfer1::INetworkDefinition::addShuffle
        """
        value = check.tensor(input)
        first = _permutation(first_transpose, len(value.shape), "first_transpose")
        tensors: dict[str, NetworkTensor | None] = {"input": value}
        dims, rank = None, len(value.shape)
        if isinstance(reshape, NetworkTensor):
            tensors["reshape"] = check.vector(reshape, "reshape")
            rank = reshape.shape[0]
        elif reshape is not None:
            dims = checked_shape(reshape, "reshape", minimum=-1)
            if dims.count(-1) > 1:
                raise ShapeError(f"reshape is {dims}; expected -1 once at most")
            rank = len(dims)
            _check_volume(value, first, dims, zero_is_placeholder)
        return self._add(
            "shuffle", name, tensors, first_transpose=first, reshape_dims=dims,
            second_transpose=_permutation(second_transpose, rank, "second_transpose"),
            zero_is_placeholder=check.flag(zero_is_placeholder, "zero_is_placeholder"),
        )  # fmt: skip

    @opened
    def add_concatenation(self, inputs: Any, axis: int = 0, *, name: str | None = None) -> Layer:
        """Tensors of one rank and type behind each other along an axis.

        Source: nvinfer1::INetworkDefinition::addConcatenation
        """
        tensors = sequence(inputs)
        first = next(iter(tensors.values()))
        assert first is not None
        for other in tensors.values():
            assert other is not None
            check.same_rank("add_concatenation", first, other)
            check.same_type("add_concatenation", first, other)
        return self._add("concatenation", name, tensors, axis=check.axis(axis, len(first.shape)))

    @opened
    def add_slice(
        self,
        input: NetworkTensor,
        start: Any,
        shape: Any,
        stride: Any,
        *,
        mode: Enumerator = "STRICT_BOUNDS",
        fill: NetworkTensor | None = None,
        name: str | None = None,
    ) -> Layer:
        """Elements from ``start`` on, ``stride`` apart, as many as ``shape`` says, in every dimension.

        Args:
            start, shape, stride: a number for each dimension, or a one-dimensional integer tensor with them. Strides
                may be negative; ``shape`` is the shape of the output.
            mode: what lies outside: STRICT_BOUNDS (an error), WRAP, CLAMP, REFLECT or FILL; all but the first need
                numbers, and an input whose shape is known.
            fill: a scalar of the input's type, for FILL; None is 0.
        Source: nvinfer1::INetworkDefinition::addSlice
        """
        value = check.tensor(input)
        rank, kind = len(value.shape), check.member(mode, "mode", _SAMPLES)
        tensors: dict[str, NetworkTensor | None] = {"input": value}
        dims: dict[str, Any] = {"start": None, "shape": None, "stride": None}
        for what, given in (("start", start), ("shape", shape), ("stride", stride)):
            if isinstance(given, NetworkTensor):
                tensors[what] = check.vector(given, what, rank)
                continue
            dims[what] = found = checked_shape(given, what, minimum=0 if what == "shape" else -(2**31))
            if len(found) != rank or (what == "stride" and 0 in found):
                raise ShapeError(f"{what} is {found}; expected {rank} numbers{', none 0' * (what == 'stride')}")
        if fill is not None:
            if kind != "FILL":
                raise InvalidArgumentError(f"fill is given, and mode is {kind}; leave it out or use mode='fill'")
            if check.tensor(fill, "fill").dtype is not value.dtype:
                raise DTypeError(f"fill {fill.name!r} is {fill.dtype.value}; expected {value.dtype.value}")
            tensors["fill"] = fill
        if kind != "STRICT_BOUNDS":
            if None in dims.values() or min(value.shape, default=1) < 1:
                raise ShapeError(
                    f"mode {kind} needs start, shape and stride as numbers and a known input shape; found "
                    f"{list(value.shape)} of {value.name!r}"
                )
        elif None not in dims.values():
            _check_bounds(value, dims)
        return self._add("slice", name, tensors, mode=kind, **dims)

    @opened
    def add_padding(
        self, input: NetworkTensor, pre_padding: Any, post_padding: Any, *, name: str | None = None
    ) -> Layer:
        """Zeros around the last two dimensions; negative numbers cut off.

        Args:
            input: of four dimensions at least; real numbers or int8.
        Source: nvinfer1::INetworkDefinition::addPaddingNd
        """
        value = check.tensor(input)
        check.rank_at_least(value, 4, "input")
        check.typed(value, "input", (*check.REALS, DataType.INT8))
        before, after = (
            check.spatial(given, 2, what, minimum=-(2**31))
            for given, what in ((pre_padding, "pre_padding"), (post_padding, "post_padding"))
        )
        return self._add("padding_nd", name, {"input": value}, pre_padding=before, post_padding=after)

    @opened
    def add_squeeze(self, input: NetworkTensor, axes: Any, *, name: str | None = None) -> Layer:
        """Without dimensions of 1. Source: nvinfer1::INetworkDefinition::addSqueeze"""
        value = check.tensor(input)
        along = check.axes(axes, len(value.shape))
        wide = [at for at in along if value.shape[at] not in (1, -1)]
        if wide:
            raise ShapeError(f"{value.name!r} has shape {list(value.shape)}; expected 1 at axis {wide[0]}")
        return self._add("squeeze", name, {"input": value}, axes=along)

    @opened
    def add_unsqueeze(self, input: NetworkTensor, axes: Any, *, name: str | None = None) -> Layer:
        """With new dimensions of 1, at ``axes`` of the output. Source: nvinfer1::INetworkDefinition::addUnsqueeze"""
        value = check.tensor(input)
        wanted = tuple(axes) if isinstance(axes, Iterable) and not isinstance(axes, str) else axes
        rank = len(value.shape) + (len(wanted) if isinstance(wanted, tuple) else 1)
        if rank > check.MAX_RANK:
            raise ShapeError(
                f"axes are {wanted}: {value.name!r} would have {rank} dimensions; TensorRT allows {check.MAX_RANK}"
            )
        return self._add("unsqueeze", name, {"input": value}, axes=check.axes(wanted, rank))

    @opened
    def add_shape(self, input: NetworkTensor, *, name: str | None = None) -> Layer:
        """The dimensions as a one-dimensional tensor, INT64 (INT32 on TensorRT 8).

        Source: nvinfer1::INetworkDefinition::addShape
        """
        return self._add("shape", name, {"input": check.tensor(input)})


def _check_volume(value: NetworkTensor, first: Any, dims: tuple[int, ...], zero_is_placeholder: bool) -> None:
    """A reshape keeps all elements. Checked as far as the input's shape is known."""
    before = [value.shape[at] for at in first] if first is not None else list(value.shape)
    after = list(dims)
    for axis, size in enumerate(after):
        if size == 0 and zero_is_placeholder:
            if axis >= len(before):
                raise ShapeError(
                    f"reshape is {dims}: the 0 at {axis} keeps a dimension of the input, which has {len(before)}; "
                    "expected a size, or zero_is_placeholder=False"
                )
            after[axis] = before[axis]
    unknown = dims.count(-1)
    if -1 in before or after.count(-1) > unknown:
        return
    have, want = math.prod(before), math.prod(n for n in after if n != -1)
    fits = have == want if not unknown else (have % want == 0 if want else have == 0)
    if not fits:
        raise ShapeError(
            f"reshape is {dims}: {value.name!r} {list(value.shape)} has {have} elements; expected as many"
            + f", a multiple of {want}" * bool(unknown)
        )


def _check_bounds(value: NetworkTensor, dims: dict[str, Any]) -> None:
    for axis, size in enumerate(value.shape):
        start, count, stride = (dims[what][axis] for what in ("start", "shape", "stride"))
        last = start + (count - 1) * stride
        if size >= 0 and count and not (0 <= start < size and 0 <= last < size):
            raise ShapeError(
                f"slice of {value.name!r} {list(value.shape)}: axis {axis} from {start} to {last} lies outside 0 to "
                f"{size - 1}; use mode='clamp', 'wrap', 'reflect' or 'fill' to reach further"
            )
