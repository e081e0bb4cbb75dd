"""INT8, FP8 and INT4 weights: QuantizeLinear and DequantizeLinear where TensorRT looks for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .._errors import CalibrationError, PrecisionError
from .._types import Array
from ._float_cast import Converted
from ._graph import Graph, is_standard
from ._policy import PrecisionPolicy
from ._weights import block_scales, channel_scales, quantized

if TYPE_CHECKING:
    import onnx

#: Largest magnitude of each type's symmetric grid.
LIMITS = {"int8": 127.0, "fp8": 448.0, "int4-weights": 7.0}
#: Per-channel scales came with opset 13, FP8 with 19, INT4 and blocks with 21.
_OPSET = {"int8": 13, "fp8": 19, "int4-weights": 21}


def has_quantization(model: onnx.ModelProto) -> bool:
    """The main graph has Q/DQ nodes, so that its ranges were chosen by someone already."""
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)


def prepared(model: onnx.ModelProto, word: str) -> Graph:
    """The model in the form that Q/DQ is put into: of a late enough opset, with names for all nodes."""
    graph = Graph(model)
    graph.raise_opset(_OPSET[word], f"precision={word!r}")
    return graph


def activations(graph: Graph, policy: PrecisionPolicy) -> list[str]:
    """Tensors that "int8" and "fp8" quantize and whose range must therefore be known, in the order of the graph."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        if _refusal(graph, node, policy) != "":
            continue
        for name in node.input[:2]:
            if name not in graph.initializers:
                found[name] = None
    return list(found)


def quantize(graph: Graph, word: str, thresholds: Mapping[str, float], policy: PrecisionPolicy) -> Converted:
    """Put Q/DQ in front of the inputs and weights of the policy's operators ("int8", "fp8").

    Symmetric: zero points are zero, which is all that TensorRT takes. One scale for each activation tensor, shared by
    all who read it quantized; one for each output channel of a weight. Biases stay in FP32.

    Args:
        thresholds: by activation, the magnitude that the largest number of the type stands for.
    Raises:
        CalibrationError: a threshold is missing or no positive number.
    """
    editor = _Editor(graph, word)
    changed, kept = set[str](), {}
    for node in graph.nodes:
        reason = _refusal(graph, node, policy)
        if reason == "":
            editor.put(node, {i: editor.operand(node, i, thresholds) for i in (0, 1)})
            changed.add(node.name)
        else:
            if reason:
                kept[node.name] = reason
            editor.put(node, {})
    return Converted(graph.finish(editor.nodes), frozenset(changed), kept, {})


def quantize_weights(graph: Graph, policy: PrecisionPolicy) -> Converted:
    """Store the constant matrices of MatMul and Gemm as INT4, each block of ``policy.block_size`` with its scale.

    Raises:
        PrecisionError: the model has no such matrix.
    """
    editor = _Editor(graph, "int4-weights")
    changed, kept = set[str](), {}
    for node in graph.nodes:
        reason = _int4_refusal(graph, node, policy)
        if reason == "":
            editor.put(node, {1: editor.block_weight(node, policy.block_size)})
            changed.add(node.name)
        else:
            if reason:
                kept[node.name] = reason
            editor.put(node, {})
    if not changed:
        raise PrecisionError(
            "precision='int4-weights' stores constant matrices of MatMul and Gemm in 4 bits, and this model has none "
            f"to store ({'; '.join(f'{name}: {why}' for name, why in list(kept.items())[:4]) or 'no such nodes'}); "
            "build it with another precision"
        )
    return Converted(graph.finish(editor.nodes), frozenset(changed), kept, {})


def _refusal(graph: Graph, node: onnx.NodeProto, policy: PrecisionPolicy) -> str | None:
    """Empty if the node is to be quantized, None if it does not multiply, else why it stays in FP32."""
    from onnx import TensorProto

    if node.op_type not in policy.quantized or not is_standard(node):
        return None
    if node.name in policy.keep:
        return "the policy keeps it"
    for name in node.input[:2]:
        if graph.types.get(name) != TensorProto.FLOAT:
            return f"{name!r} is no float32 tensor"
    if all(name in graph.initializers for name in node.input[:2]):
        return "both operands are constants"
    return ""


def _int4_refusal(graph: Graph, node: onnx.NodeProto, policy: PrecisionPolicy) -> str | None:
    from onnx import TensorProto

    if node.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose") or not is_standard(node):
        return None
    if node.name in policy.keep:
        return "the policy keeps it"
    if node.op_type not in ("MatMul", "Gemm"):
        return f"{node.op_type} has no INT4 weights in TensorRT"
    weight = graph.initializers.get(node.input[1])
    if weight is None or len(weight.dims) != 2 or weight.data_type != TensorProto.FLOAT:
        return "its second operand is no constant float32 matrix"
    if math.prod(weight.dims) % 2:
        return "its matrix has an odd number of elements, which TensorRT cannot pack in pairs"
    return ""


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def channel_axis(node: onnx.NodeProto, position: int, rank: int) -> int | None:
    """The axis of a constant operand that has one scale for each entry; None for one scale in all."""
    if node.op_type == "Conv" and position == 1:
        return 0
    if node.op_type == "ConvTranspose" and position == 1:
        # With groups that axis has the channels of one group only.
        return 1 if _attribute(node, "group", 1) == 1 else None
    if node.op_type == "Gemm" and position == 1:
        return 0 if _attribute(node, "transB", 0) else 1
    if node.op_type == "MatMul" and position == 1 and rank == 2:
        return 1
    return None


class _Editor:
    """The rewritten node list, and what was put into it already."""

    def __init__(self, graph: Graph, word: str) -> None:
        from onnx import TensorProto

        self._graph = graph
        self._word = word
        self._type = {
            "int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN, "int4-weights": TensorProto.INT4,
        }[word]  # fmt: skip
        self.nodes: list[onnx.NodeProto] = []
        self._done: dict[tuple[str, int | None], str] = {}
        self._zeros: dict[tuple[int, ...], str] = {}

    def put(self, node: onnx.NodeProto, operands: Mapping[int, str]) -> None:
        import onnx

        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for index, name in operands.items():
            copy.input[index] = name
        self.nodes.append(copy)

    def operand(self, node: onnx.NodeProto, position: int, thresholds: Mapping[str, float]) -> str:
        name = node.input[position]
        if name in self._graph.initializers:
            return self._weight(name, channel_axis(node, position, len(self._graph.initializers[name].dims)))
        if (name, None) not in self._done:
            threshold = thresholds.get(name)
            if threshold is None or not math.isfinite(threshold) or threshold < 0:
                raise CalibrationError(
                    f"the range of tensor {name!r}, which node {node.name!r} reads, is {threshold}; expected a "
                    "positive number: calibrate with data that runs through this part of the model, or keep the "
                    "node in FP32 (PrecisionPolicy.keep)"
                )
            # What was always zero, or so small that its scale is no normal number, has no range; any keeps its zeros.
            scale = np.array(threshold / LIMITS[self._word], np.float32)
            if scale < np.finfo(np.float32).tiny:
                scale = np.array(1.0 / LIMITS[self._word], np.float32)
            self._done[name, None] = self._pair(name, scale)
        return self._done[name, None]

    def _pair(self, name: str, scale: Array) -> str:
        from onnx import helper

        graph = self._graph
        scale_name, low, back = (graph.unused(f"{name}__{part}") for part in ("scale", "quantized", "dequantized"))
        graph.add_initializer(scale_name, scale)
        operands = [scale_name, self._zero(())]
        self.nodes.append(helper.make_node("QuantizeLinear", [name, *operands], [low], name=f"quantize to {low}"))
        self.nodes.append(helper.make_node("DequantizeLinear", [low, *operands], [back], name=f"dequantize to {back}"))
        return back

    def _weight(self, name: str, axis: int | None) -> str:
        if (name, axis) not in self._done:
            values = self._graph.array(name)
            self._check(name, values)
            scales = channel_scales(values, axis, LIMITS[self._word])
            self._done[name, axis] = self._dequantized(name, values, scales, axis, None)
        return self._done[name, axis]

    def block_weight(self, node: onnx.NodeProto, block: int) -> str:
        name = node.input[1]
        axis = 1 if node.op_type == "Gemm" and _attribute(node, "transB", 0) else 0  # the one that is summed over
        if (name, axis) not in self._done:
            values = self._graph.array(name)
            self._check(name, values)
            block = next((b for b in (block, 128, 64, 32, 16) if b <= block and values.shape[axis] % b == 0), 0)
            if not block:
                other = 1 - axis
                scales = channel_scales(values, other, LIMITS[self._word])
                self._done[name, axis] = self._dequantized(name, values, scales, other, None)
            else:
                scales = block_scales(values, axis, block, LIMITS[self._word])
                self._done[name, axis] = self._dequantized(name, values, scales, axis, block)
        return self._done[name, axis]

    def _check(self, name: str, values: Array) -> None:
        if not np.isfinite(values).all():
            raise PrecisionError(
                f"weight {name!r} has values that are not finite, so it cannot be quantized; keep its nodes in FP32 "
                "(PrecisionPolicy.keep), or repair the model"
            )

    def _dequantized(self, name: str, values: Array, scales: Array, axis: int | None, block: int | None) -> str:
        from onnx import helper

        graph = self._graph
        scale_name, low, back = (graph.unused(f"{name}__{part}") for part in ("scale", "quantized", "dequantized"))
        graph.add_initializer(scale_name, scales)
        graph.add_initializer(low, quantized(values, scales, axis, block, self._word))
        attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
        if block is not None:
            attributes["block_size"] = block
        operands = [low, scale_name, self._zero(scales.shape)]
        self.nodes.append(
            helper.make_node("DequantizeLinear", operands, [back], name=f"dequantize to {back}", **attributes)
        )
        return back

    def _zero(self, shape: tuple[int, ...]) -> str:
        """Zero points of the type: without them Q would make UINT8, and TensorRT takes no other value."""
        from onnx import helper

        if shape not in self._zeros:
            count = math.prod(shape)
            name = self._graph.unused("zero_point")
            raw = bytes((count + 1) // 2 if self._word == "int4-weights" else count)
            self._graph.add_initializer(name, helper.make_tensor(name, self._type, shape, raw, raw=True))
            self._zeros[shape] = name
        return self._zeros[shape]
