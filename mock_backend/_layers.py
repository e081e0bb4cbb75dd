"""What the layers of the mock compute in: one for each node, with the types that the model gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtx_py._types import DataType, LayerPrecision

from ._dtypes import trt_type
from ._graph import without_weights
from ._shapes import infer

if TYPE_CHECKING:
    import onnx

__all__ = ["model_precisions"]

#: Operators that TensorRT's parser makes a layer of another name of.
_KINDS = {
    "Cast": "CAST", "Conv": "CONVOLUTION", "ConvTranspose": "DECONVOLUTION", "DequantizeLinear": "DEQUANTIZE",
    "Gemm": "MATRIX_MULTIPLY", "MatMul": "MATRIX_MULTIPLY", "QuantizeLinear": "QUANTIZE",
}  # fmt: skip


def model_precisions(model: onnx.ModelProto) -> tuple[LayerPrecision, ...]:
    """The layers of the main graph, as TensorRT's parser would type them."""
    inferred = infer(without_weights(model)).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    dequantized = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}

    def typed(names: list[str]) -> tuple[DataType, ...]:
        found = (trt_type(types[name]) for name in names if types.get(name))
        return tuple(dtype for dtype in found if dtype is not None)

    layers = []
    for node in model.graph.node:
        if node.op_type == "Constant":
            continue
        kind = _KINDS.get(node.op_type, node.op_type.upper())
        own = kind in ("QUANTIZE", "DEQUANTIZE")
        inputs = [name if own else dequantized.get(name, name) for name in node.input if name]
        layers.append(LayerPrecision(node.name, kind, typed(inputs), typed(list(node.output))))
    return tuple(layers)
