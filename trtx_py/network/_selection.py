"""Layers about indices and types: one-hot, non-zero, boxes, quantization; and assertions."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._arguments import checked_int
from .._errors import DTypeError, InvalidArgumentError, ShapeError
from .._types import DataType
from . import _checks as check
from ._checks import Enumerator, LayerMethods, Type, opened
from ._definition import LayerDefinition, LayerRequest, VendorNetwork
from ._onnx_graph import OnnxGraph
from ._tensors import Layer, NetworkTensor

_INDEX_TYPES = (DataType.INT32, DataType.INT64)
_QUANTIZED = (DataType.INT8, DataType.FP8, DataType.INT4)
_REAL = (DataType.FLOAT, DataType.HALF, DataType.BF16)
_BOXES = ("CORNER_PAIRS", "CENTER_SIZES")


def _lower_one_hot(g: OnnxGraph, r: LayerRequest) -> None:
    g.node("OneHot", [r.inputs[role].name for role in ("indices", "depth", "values")], r.outputs, axis=r["axis"])


def _call_one_hot(v: VendorNetwork, r: LayerRequest) -> Any:
    return v.add("add_one_hot", *(v.tensor(r.inputs[role]) for role in ("indices", "values", "depth")), r["axis"])


def _lower_non_zero(g: OnnxGraph, r: LayerRequest) -> None:
    if r["indices_type"] is DataType.INT64:
        g.node("NonZero", [r.input.name], r.outputs)
    else:
        g.cast(g.node("NonZero", [r.input.name]), DataType.INT32, r.outputs[0])


def _call_non_zero(v: VendorNetwork, r: LayerRequest) -> Any:
    wide = (v.dtype(DataType.INT64),) if r["indices_type"] is DataType.INT64 else ()
    return v.add("add_non_zero", v.tensor(r.input), *wide)


def _lower_nms(g: OnnxGraph, r: LayerRequest) -> None:
    boxes, scores = r.inputs["boxes"].name, r.inputs["scores"].name
    by_class = g.node("Transpose", [scores], perm=[0, 2, 1])
    if r.inputs["boxes"].dtype is not DataType.FLOAT:
        boxes, by_class = g.cast(boxes, DataType.FLOAT), g.cast(by_class, DataType.FLOAT)
    most = g.ints([r["max_output_boxes_per_class"]])
    limits = [g.constant(np.array([r[what]], np.float32)) for what in ("iou_threshold", "score_threshold")]
    chosen = g.node(
        "NonMaxSuppression", [boxes, by_class, most, *limits],
        center_point_box=int(r["bounding_box_format"] == "CENTER_SIZES"),
    )  # fmt: skip
    g.cast(chosen, r["indices_type"], r.outputs[0])
    count = g.node("Squeeze", [g.node("Shape", [chosen], start=0, end=1), g.ints([0])])
    g.cast(count, DataType.INT32, r.outputs[1])


def _call_nms(v: VendorNetwork, r: LayerRequest) -> Any:
    wide = (v.dtype(DataType.INT64),) if r["indices_type"] is DataType.INT64 else ()
    most = v.constant(np.array(r["max_output_boxes_per_class"], np.int32))
    layer = v.add("add_nms", v.tensor(r.inputs["boxes"]), v.tensor(r.inputs["scores"]), most, *wide)
    layer.set_input(3, v.constant(np.array(r["iou_threshold"], np.float32)))
    layer.set_input(4, v.constant(np.array(r["score_threshold"], np.float32)))
    v.set(layer, "bounding_box_format", v.member("BoundingBoxFormat", r["bounding_box_format"]))
    if r["topk_box_limit"] is not None:
        v.set(layer, "topk_box_limit", r["topk_box_limit"])
    return layer


def _block(r: LayerRequest) -> tuple[int | None, int | None]:
    """Axis of the scales, and the size of a block along it, as ONNX has them; None where there is none."""
    shape, scale = r.input.shape, r.inputs["scale"].shape
    if not scale:
        return None, None
    if len(scale) == 1:
        return r["axis"], None
    axis = next((at for at, (n, m) in enumerate(zip(shape, scale, strict=True)) if n != m), len(shape) - 1)
    return axis, shape[axis] // scale[axis]


def _lower_quantize(g: OnnxGraph, r: LayerRequest) -> None:
    axis, block = _block(r)
    scale, to = r.inputs["scale"], r["output_type"]
    zero = g.constant(np.zeros(scale.shape, to.numpy))  # its type is what ONNX quantizes to
    g.node("QuantizeLinear", [r.input.name, scale.name, zero], r.outputs, axis=axis, block_size=block)


def _lower_dequantize(g: OnnxGraph, r: LayerRequest) -> None:
    axis, block = _block(r)
    scale, to = r.inputs["scale"], r["output_type"]
    direct = scale.dtype is to
    made = g.node(
        "DequantizeLinear", [r.input.name, scale.name], r.outputs if direct else None, axis=axis, block_size=block
    )
    if not direct:
        g.cast(made, to, r.outputs[0])


def _call_quantization(method: str) -> Any:
    def call(v: VendorNetwork, r: LayerRequest) -> Any:
        # 8.6 has no third argument: it knows INT8 from and to float32 alone, and refuses what is given for another.
        default = DataType.INT8 if method == "add_quantize" else DataType.FLOAT
        types = () if v.before_10 and r["output_type"] is default else (v.dtype(r["output_type"]),)
        layer = v.add(method, v.tensor(r.input), v.tensor(r.inputs["scale"]), *types)
        if len(r.inputs["scale"].shape) == 1:
            v.set(layer, "axis", r["axis"])
        return layer

    return call


def _lower_assertion(g: OnnxGraph, r: LayerRequest) -> None:
    """Nothing: ONNX has no assertions."""


def _call_assertion(v: VendorNetwork, r: LayerRequest) -> Any:
    return v.add("add_assertion", v.tensor(r.inputs["condition"]), r["message"])


TABLE = {
    "one_hot": LayerDefinition("ONE_HOT", _lower_one_hot, _call_one_hot),
    "non_zero": LayerDefinition("NON_ZERO", _lower_non_zero, _call_non_zero),
    "nms": LayerDefinition("NMS", _lower_nms, _call_nms, outputs=2),
    "quantize": LayerDefinition("QUANTIZE", _lower_quantize, _call_quantization("add_quantize")),
    "dequantize": LayerDefinition("DEQUANTIZE", _lower_dequantize, _call_quantization("add_dequantize")),
    "assertion": LayerDefinition("ASSERTION", _lower_assertion, _call_assertion, outputs=0),
}


class SelectionLayers(LayerMethods):
    """The methods for these layers. All raise ClosedError after close, BuilderError where TensorRT refuses."""

    @opened
    def add_one_hot(
        self,
        indices: NetworkTensor,
        values: NetworkTensor,
        depth: NetworkTensor,
        axis: int,
        *,
        name: str | None = None,
    ) -> Layer:
        """A new axis with ``values[1]`` at each index and ``values[0]`` elsewhere.

        Args:
            indices: INT32 or INT64.
            values: two elements; the output has their type.
            depth: an INT32 or INT64 scalar, the size of the new axis.
            axis: where it is, counted in the output.
        Source: nvinfer1::INetworkDefinition::addOneHot
        """
        tensors = {
            "indices": check.tensor(indices, "indices"),
            "values": check.tensor(values, "values"),
            "depth": check.tensor(depth, "depth"),
        }
        if tensors["values"].shape != (2,) or tensors["depth"].shape != ():
            raise ShapeError(
                f"values has shape {list(tensors['values'].shape)} and depth {list(tensors['depth'].shape)}; expected "
                "[2] (off, on) and a scalar"
            )
        check.typed(tensors["indices"], "indices", check.INTEGERS)
        check.typed(tensors["depth"], "depth", check.INTEGERS)
        at = check.axis(axis, len(tensors["indices"].shape) + 1)
        return self._add("one_hot", name, tensors, axis=at)

    @opened
    def add_non_zero(
        self, input: NetworkTensor, *, indices_type: Type = DataType.INT32, name: str | None = None
    ) -> Layer:
        """Indices of all elements that are not 0: [rank of the input, how many there are].

        Source: nvinfer1::INetworkDefinition::addNonZero
        """
        wanted = check.data_type(indices_type, "indices_type", _INDEX_TYPES)
        value = check.tensor(input)
        check.typed(value, "input", (*check.REALS, *check.INTEGERS, DataType.BOOL))
        return self._add("non_zero", name, {"input": value}, indices_type=wanted)

    @opened
    def add_nms(
        self,
        boxes: NetworkTensor,
        scores: NetworkTensor,
        max_output_boxes_per_class: int,
        *,
        iou_threshold: float = 0.0,
        score_threshold: float = 0.0,
        bounding_box_format: Enumerator = "CORNER_PAIRS",
        topk_box_limit: int | None = None,
        indices_type: Type = DataType.INT32,
        name: str | None = None,
    ) -> Layer:
        """The boxes that are left when those that overlap better ones are gone.

        Args:
            boxes: [batch, boxes, 4], shared by all classes; float32 or float16.
            scores: [batch, boxes, classes], of the boxes' type.
            bounding_box_format: CORNER_PAIRS or CENTER_SIZES.
            topk_box_limit: how many boxes of a batch item are looked at; None leaves TensorRT's limit. The mock, and
                ONNX, look at all.
        Two outputs: [selected, 3] with batch index, class index and box index, and how many there are. The order of
        the rows is TensorRT's own on TensorRT and ONNX's on the mock.

        Source: nvinfer1::INetworkDefinition::addNMS
        """
        tensors = {"boxes": check.tensor(boxes, "boxes"), "scores": check.tensor(scores, "scores")}
        for what, value in tensors.items():
            if len(value.shape) != 3:
                raise ShapeError(f"{what} {value.name!r} has shape {list(value.shape)}; expected three dimensions")
        overlap, least = check.number(iou_threshold, "iou_threshold"), check.number(score_threshold, "score_threshold")
        if not 0 <= overlap <= 1:
            raise InvalidArgumentError(f"iou_threshold is {overlap}; expected 0 to 1")
        limit = None if topk_box_limit is None else checked_int(topk_box_limit, "topk_box_limit", minimum=1)
        return self._add(
            "nms", name, tensors,
            max_output_boxes_per_class=checked_int(max_output_boxes_per_class, "max_output_boxes_per_class", minimum=1),
            iou_threshold=overlap, score_threshold=least, topk_box_limit=limit,
            bounding_box_format=check.member(bounding_box_format, "bounding_box_format", _BOXES),
            indices_type=check.data_type(indices_type, "indices_type", _INDEX_TYPES),
        )  # fmt: skip

    @opened
    def add_quantize(
        self,
        input: NetworkTensor,
        scale: NetworkTensor,
        output_type: Type = DataType.INT8,
        *,
        axis: int = 0,
        name: str | None = None,
    ) -> Layer:
        """``round(input / scale)``, cut off at the ends of the type.

        Args:
            input: float32, float16 or bfloat16.
            scale: made by ``add_constant``, of the input's type: a scalar, one for each index of ``axis``, or of the
                input's rank with one for each block.
            output_type: int8, fp8 or int4.
        Source: nvinfer1::INetworkDefinition::addQuantize
        """
        value, by = self._quantized(input, scale, axis, "input")
        if value.dtype not in _REAL or by.dtype not in _REAL:
            raise DTypeError(f"input is {value.dtype.value} and scale {by.dtype.value}; expected real numbers in both")
        check.same_type("add_quantize", value, by)
        to = check.data_type(output_type, "output_type", _QUANTIZED)
        at = check.axis(axis, len(value.shape)) if by.shape else 0
        return self._add("quantize", name, {"input": value, "scale": by}, output_type=to, axis=at)

    @opened
    def add_dequantize(
        self,
        input: NetworkTensor,
        scale: NetworkTensor,
        output_type: Type = DataType.FLOAT,
        *,
        axis: int = 0,
        name: str | None = None,
    ) -> Layer:
        """``input * scale``.

        Args: as ``add_quantize``; ``input`` is int8, fp8 or int4, ``output_type`` float32, float16 or bfloat16.
        Source: nvinfer1::INetworkDefinition::addDequantize
        """
        value, by = self._quantized(input, scale, axis, "input")
        if value.dtype not in _QUANTIZED or by.dtype not in _REAL:
            raise DTypeError(
                f"input is {value.dtype.value} and scale {by.dtype.value}; expected int8, fp8 or int4, and real numbers"
            )
        to = check.data_type(output_type, "output_type", _REAL)
        at = check.axis(axis, len(value.shape)) if by.shape else 0
        return self._add("dequantize", name, {"input": value, "scale": by}, output_type=to, axis=at)

    def _quantized(self, input: Any, scale: Any, axis: Any, what: str) -> tuple[NetworkTensor, NetworkTensor]:
        value, by = check.tensor(input, what), check.tensor(scale, "scale")
        rank = check.rank_at_least(value, 1, what)
        fits = not by.shape
        if len(by.shape) == 1:
            fits = by.shape[0] == value.shape[check.axis(axis, rank)]
        elif by.shape:
            pairs = list(zip(value.shape, by.shape, strict=False))
            fits = len(by.shape) == rank and all(m > 0 and n % m == 0 for n, m in pairs)
            fits = fits and sum(n != m for n, m in pairs) == 1
        if not fits:
            raise ShapeError(
                f"scale {by.name!r} has shape {list(by.shape)}; expected a scalar, one for each index of axis {axis} "
                f"of {list(value.shape)}, or the same rank with blocks along one axis"
            )
        return value, by

    @opened
    def add_assertion(self, condition: NetworkTensor, message: str, *, name: str | None = None) -> Layer:
        """Fail, with ``message``, wherever the BOOL ``condition`` is False; no outputs.

        TensorRT checks it when it builds or when shapes are set. ONNX has no assertions: the mock does not check it,
        and ``to_onnx`` leaves it out.

        Source: nvinfer1::INetworkDefinition::addAssertion
        """
        value = check.tensor(condition, "condition")
        if value.dtype is not DataType.BOOL:
            raise DTypeError(f"condition {value.name!r} is {value.dtype.value}; expected bool")
        if not isinstance(message, str):
            raise InvalidArgumentError(f"message is {message!r}; expected text")
        return self._add("assertion", name, {"condition": value}, message=message)
