"""Layers that read or write at places: gather, scatter, resize, grid sample, reversed sequences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .._arguments import checked_int, checked_shape
from .._errors import InvalidArgumentError, ShapeError
from .._types import DataType, Shape
from . import _checks as check
from ._checks import Enumerator, LayerMethods, opened
from ._definition import LayerDefinition, LayerRequest, VendorNetwork
from ._onnx_graph import OnnxGraph
from ._tensors import Layer, NetworkTensor

_GATHERS = {"DEFAULT": "Gather", "ELEMENT": "GatherElements", "ND": "GatherND"}
_SCATTERS = ("ELEMENT", "ND")
_INTERPOLATIONS = {"NEAREST": "nearest", "LINEAR": "linear", "CUBIC": "cubic"}
_COORDINATES = {"ALIGN_CORNERS": "align_corners", "ASYMMETRIC": "asymmetric", "HALF_PIXEL": "half_pixel"}
_ROUNDINGS = {
    "HALF_UP": "round_prefer_ceil", "HALF_DOWN": "round_prefer_floor", "FLOOR": "floor", "CEIL": "ceil",
}  # fmt: skip
_GRID_EDGES = {"FILL": "zeros", "CLAMP": "border", "REFLECT": "reflection"}


def _lower_gather(g: OnnxGraph, r: LayerRequest) -> None:
    place = {"batch_dims": r["num_elementwise_dims"]} if r["mode"] == "ND" else {"axis": r["axis"]}
    indices = r.inputs["indices"].name
    if r["mode"] == "ND":  # of INT64 only, unlike the others
        indices = g.cast(indices, DataType.INT64)
    g.node(_GATHERS[r["mode"]], [r.input.name, indices], r.outputs, **place)


def _call_gather(v: VendorNetwork, r: LayerRequest) -> Any:
    value, indices = v.tensor(r.input), v.tensor(r.inputs["indices"])
    layer = v.add("add_gather_v2", value, indices, v.member("GatherMode", r["mode"]))
    if r["mode"] == "ND":
        v.set(layer, "num_elementwise_dims", r["num_elementwise_dims"])
    else:
        v.set(layer, "axis", r["axis"])
    return layer


def _lower_scatter(g: OnnxGraph, r: LayerRequest) -> None:
    data, indices, updates = (r.inputs[role].name for role in ("data", "indices", "updates"))
    if r["mode"] == "ND":
        g.node("ScatterND", [data, g.cast(indices, DataType.INT64), updates], r.outputs)
    else:
        g.node("ScatterElements", [data, indices, updates], r.outputs, axis=r["axis"])


def _call_scatter(v: VendorNetwork, r: LayerRequest) -> Any:
    tensors = [v.tensor(r.inputs[role]) for role in ("data", "indices", "updates")]
    layer = v.add("add_scatter", *tensors, v.member("ScatterMode", r["mode"]))
    if r["mode"] == "ELEMENT":
        v.set(layer, "axis", r["axis"])
    return layer


def _lower_resize(g: OnnxGraph, r: LayerRequest) -> None:
    scales = sizes = ""
    if "shape" in r.inputs:
        sizes = g.cast(r.inputs["shape"].name, DataType.INT64)
    elif r["shape"] is not None:
        sizes = g.ints(r["shape"])
    else:
        scales = g.constant(np.array(r["scales"], np.float32))
    g.node(
        "Resize", [r.input.name, "", scales, *([sizes] if sizes else [])], r.outputs, mode=_INTERPOLATIONS[r["mode"]],
        coordinate_transformation_mode=_COORDINATES[r["coordinate_transformation"]],
        nearest_mode=_ROUNDINGS[r["nearest_rounding"]], cubic_coeff_a=r["cubic_coeff"],
        exclude_outside=int(r["exclude_outside"]),
    )  # fmt: skip


def _call_resize(v: VendorNetwork, r: LayerRequest) -> Any:
    layer = v.add("add_resize", v.tensor(r.input))
    if "shape" in r.inputs:
        layer.set_input(1, v.tensor(r.inputs["shape"]))
    elif r["shape"] is not None:
        v.set(layer, "shape", r["shape"])
    else:
        v.set(layer, "scales", list(r["scales"]))
    v.set(layer, "resize_mode", v.member("InterpolationMode", r["mode"]))
    transformation = v.member("ResizeCoordinateTransformation", r["coordinate_transformation"])
    v.set(layer, "coordinate_transformation", transformation)
    v.set(layer, "nearest_rounding", v.member("ResizeRoundMode", r["nearest_rounding"]))
    if r["mode"] == "CUBIC":
        v.set(layer, "cubic_coeff", r["cubic_coeff"])
        v.set(layer, "exclude_outside", int(r["exclude_outside"]))
    return layer


def _lower_reverse_sequence(g: OnnxGraph, r: LayerRequest) -> None:
    lengths = g.cast(r.inputs["sequence_lens"].name, DataType.INT64)
    g.node(
        "ReverseSequence", [r.input.name, lengths], r.outputs, batch_axis=r["batch_axis"], time_axis=r["sequence_axis"]
    )


def _call_reverse_sequence(v: VendorNetwork, r: LayerRequest) -> Any:
    layer = v.add("add_reverse_sequence", v.tensor(r.input), v.tensor(r.inputs["sequence_lens"]))
    v.set(layer, "batch_axis", r["batch_axis"])
    v.set(layer, "sequence_axis", r["sequence_axis"])
    return layer


def _lower_grid_sample(g: OnnxGraph, r: LayerRequest) -> None:
    g.node(
        "GridSample", [r.input.name, r.inputs["grid"].name], r.outputs, mode=_INTERPOLATIONS[r["mode"]],
        padding_mode=_GRID_EDGES[r["sample_mode"]], align_corners=int(r["align_corners"]),
    )  # fmt: skip


def _call_grid_sample(v: VendorNetwork, r: LayerRequest) -> Any:
    layer = v.add("add_grid_sample", v.tensor(r.input), v.tensor(r.inputs["grid"]))
    v.set(layer, "interpolation_mode", v.member("InterpolationMode", r["mode"]))
    v.set(layer, "sample_mode", v.member("SampleMode", r["sample_mode"]))
    v.set(layer, "align_corners", r["align_corners"])
    return layer


TABLE = {
    "gather": LayerDefinition("GATHER", _lower_gather, _call_gather),
    "scatter": LayerDefinition("SCATTER", _lower_scatter, _call_scatter),
    "resize": LayerDefinition("RESIZE", _lower_resize, _call_resize),
    "reverse_sequence": LayerDefinition("REVERSE_SEQUENCE", _lower_reverse_sequence, _call_reverse_sequence),
    "grid_sample": LayerDefinition("GRID_SAMPLE", _lower_grid_sample, _call_grid_sample),
}


def _check_scatter(data: Shape, indices: Shape, updates: Shape, mode: str) -> None:
    wanted: Shape | None = indices if len(indices) == len(data) else None
    if mode == "ND":
        depth = indices[-1] if indices else -1
        wanted = (*indices[:-1], *data[depth:]) if 0 <= depth <= len(data) else updates if depth == -1 else None
    same = wanted is not None and len(wanted) == len(updates)
    if wanted is None or not same or any(n != m and -1 not in (n, m) for n, m in zip(wanted, updates, strict=True)):
        rule = (
            "indices.shape[:-1] + data.shape[indices.shape[-1]:]" if mode == "ND" else "indices.shape, in data's rank"
        )
        raise ShapeError(
            f"add_scatter: data has shape {list(data)}, indices {list(indices)} and updates {list(updates)}; expected "
            f"the shape of updates to be {rule}"
        )


class SamplingLayers(LayerMethods):
    """The methods for these layers. All raise ClosedError after close, BuilderError where TensorRT refuses."""

    @opened
    def add_gather(
        self,
        input: NetworkTensor,
        indices: NetworkTensor,
        axis: int = 0,
        *,
        mode: Enumerator = "DEFAULT",
        num_elementwise_dims: int = 0,
        name: str | None = None,
    ) -> Layer:
        """Elements by their indices.

        Args:
            indices: INT32 or INT64.
            mode: DEFAULT (whole slices along ``axis``), ELEMENT (one element for each index along ``axis``) or ND
                (each row of ``indices`` is one place).
            num_elementwise_dims: with ND, how many leading dimensions both have in common.
        Source: nvinfer1::INetworkDefinition::addGatherV2
        """
        value, places = check.tensor(input), check.tensor(indices, "indices")
        check.typed(places, "indices", check.INTEGERS)
        kind = check.member(mode, "mode", _GATHERS)
        common = checked_int(num_elementwise_dims, "num_elementwise_dims", minimum=0)
        if common and kind != "ND":
            raise InvalidArgumentError(f"num_elementwise_dims is {common}, and mode is {kind}; expected 0 or mode='nd'")
        return self._add(
            "gather", name, {"input": value, "indices": places}, mode=kind, num_elementwise_dims=common,
            axis=check.axis(axis, len(value.shape)),
        )  # fmt: skip

    @opened
    def add_scatter(
        self,
        data: NetworkTensor,
        indices: NetworkTensor,
        updates: NetworkTensor,
        mode: Enumerator,
        axis: int = 0,
        *,
        name: str | None = None,
    ) -> Layer:
        """``data`` with ``updates`` at ``indices``.

        Args:
            indices: INT32 or INT64.
            updates: of the data's type.
            mode: ELEMENT (indices along ``axis``, one for each of ``updates``) or ND (each row of ``indices`` is one
                place, and ``updates`` has what comes there).
        Source: nvinfer1::INetworkDefinition::addScatter
        """
        tensors = {
            "data": check.tensor(data, "data"),
            "indices": check.tensor(indices, "indices"),
            "updates": check.tensor(updates, "updates"),
        }
        kind = check.member(mode, "mode", _SCATTERS)
        check.typed(tensors["indices"], "indices", check.INTEGERS)
        check.same_type("add_scatter", tensors["data"], tensors["updates"])
        _check_scatter(tensors["data"].shape, tensors["indices"].shape, tensors["updates"].shape, kind)
        return self._add("scatter", name, tensors, mode=kind, axis=check.axis(axis, len(tensors["data"].shape)))

    @opened
    def add_resize(
        self,
        input: NetworkTensor,
        *,
        shape: Any = None,
        scales: Any = None,
        mode: Enumerator = "NEAREST",
        coordinate_transformation: Enumerator = "ASYMMETRIC",
        nearest_rounding: Enumerator = "FLOOR",
        cubic_coeff: float = -0.75,
        exclude_outside: bool = False,
        name: str | None = None,
    ) -> Layer:
        """The same picture in another size.

        Args:
            shape: of the output, complete, or a one-dimensional integer tensor with it.
            scales: for each dimension; the output's size is rounded down. Give ``shape`` or ``scales``.
            mode: NEAREST, LINEAR or CUBIC.
            coordinate_transformation: ASYMMETRIC, HALF_PIXEL or ALIGN_CORNERS.
            nearest_rounding: FLOOR, CEIL, HALF_DOWN or HALF_UP, for NEAREST.
        Source: nvinfer1::INetworkDefinition::addResize
        """
        value = check.tensor(input)
        rank = len(value.shape)
        tensors: dict[str, NetworkTensor | None] = {"input": value}
        if (shape is None) == (scales is None):
            raise InvalidArgumentError("expected either shape, the size of the output, or scales")
        dims = factors = None
        if isinstance(shape, NetworkTensor):
            tensors["shape"] = check.vector(shape, "shape", rank)
        elif shape is not None:
            dims = checked_shape(shape, "shape", minimum=1)
        else:
            if isinstance(scales, str) or not isinstance(scales, Iterable):
                raise InvalidArgumentError(f"scales is {scales!r}; expected a number for each of {rank} dimensions")
            factors = tuple(check.number(one, "one of scales") for one in scales)
        if any(given is not None and len(given) != rank for given in (dims, factors)):
            raise ShapeError(f"shape is {dims} and scales {factors}; expected {rank} numbers, as {value.name!r} has")
        if factors is not None and not all(0 < one < float("inf") for one in factors):
            raise ShapeError(f"scales is {factors}; expected numbers above 0")
        return self._add(
            "resize", name, tensors, shape=dims, scales=factors, mode=check.member(mode, "mode", _INTERPOLATIONS),
            coordinate_transformation=check.member(
                coordinate_transformation, "coordinate_transformation", _COORDINATES
            ),
            nearest_rounding=check.member(nearest_rounding, "nearest_rounding", _ROUNDINGS),
            cubic_coeff=check.number(cubic_coeff, "cubic_coeff"),
            exclude_outside=check.flag(exclude_outside, "exclude_outside"),
        )  # fmt: skip

    @opened
    def add_reverse_sequence(
        self,
        input: NetworkTensor,
        sequence_lens: NetworkTensor,
        *,
        batch_axis: int = 1,
        sequence_axis: int = 0,
        name: str | None = None,
    ) -> Layer:
        """The first ``sequence_lens[i]`` elements of each sequence in reverse order, the rest as they are.

        Source: nvinfer1::INetworkDefinition::addReverseSequence
        """
        value, lengths = check.tensor(input), check.tensor(sequence_lens, "sequence_lens")
        rank = len(value.shape)
        check.vector(lengths, "sequence_lens")
        batch, along = check.axis(batch_axis, rank, "batch_axis"), check.axis(sequence_axis, rank, "sequence_axis")
        if {batch, along} != {0, 1}:
            raise ShapeError(f"batch_axis is {batch} and sequence_axis {along}; expected 0 and 1 in some order")
        return self._add(
            "reverse_sequence", name, {"input": value, "sequence_lens": lengths}, batch_axis=batch, sequence_axis=along
        )

    @opened
    def add_grid_sample(
        self,
        input: NetworkTensor,
        grid: NetworkTensor,
        *,
        mode: Enumerator = "LINEAR",
        align_corners: bool = False,
        sample_mode: Enumerator = "FILL",
        name: str | None = None,
    ) -> Layer:
        """Pixels of [batch, channels, height, width] at the places of ``grid`` [batch, rows, columns, 2], -1 to 1.

        Args:
            mode: LINEAR, NEAREST or CUBIC.
            sample_mode: what lies outside: FILL (0), CLAMP or REFLECT.
        Source: nvinfer1::INetworkDefinition::addGridSample
        """
        value, places = check.tensor(input), check.tensor(grid, "grid")
        if len(value.shape) != 4 or len(places.shape) != 4 or places.shape[3] != 2:
            raise ShapeError(
                f"input has shape {list(value.shape)} and grid {list(places.shape)}; expected [batch, channels, "
                "height, width] and [batch, rows, columns, 2]"
            )
        return self._add(
            "grid_sample", name, {"input": value, "grid": places}, mode=check.member(mode, "mode", _INTERPOLATIONS),
            sample_mode=check.member(sample_mode, "sample_mode", _GRID_EDGES),
            align_corners=check.flag(align_corners, "align_corners"),
        )  # fmt: skip
