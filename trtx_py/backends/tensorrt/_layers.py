"""What the layers of a network, or of an engine, compute in."""

from __future__ import annotations

import json
import re
from typing import Any

from ..._types import DataType, LayerPrecision

#: Layers that hand values on as they are.
_PASSING = frozenset({"IDENTITY", "SHUFFLE", "SQUEEZE", "UNSQUEEZE"})
#: Word in the inspector's "Format/Datatype" -> type. Longer ones first: "FP8" is not "FP16".
_WORDS = (
    ("bfloat16", DataType.BF16), ("bf16", DataType.BF16), ("fp16", DataType.HALF), ("half", DataType.HALF),
    ("fp32", DataType.FLOAT), ("float", DataType.FLOAT), ("fp8", DataType.FP8), ("fp4", DataType.FP4),
    ("int64", DataType.INT64), ("int32", DataType.INT32), ("int8", DataType.INT8), ("int4", DataType.INT4),
    ("uint8", DataType.UINT8), ("bool", DataType.BOOL),
)  # fmt: skip
#: Word in an inspected layer's type -> the layer type that it is, or has inside.
_KINDS = (
    ("deconv", "DECONVOLUTION"), ("conv", "CONVOLUTION"), ("matrixmultiply", "MATRIX_MULTIPLY"),
    ("gemm", "MATRIX_MULTIPLY"), ("matmul", "MATRIX_MULTIPLY"), ("fullyconnected", "FULLY_CONNECTED"),
    ("einsum", "EINSUM"),
)  # fmt: skip


def network_precisions(network: Any) -> tuple[LayerPrecision, ...]:
    """Source: nvinfer1::INetworkDefinition::getLayer, ILayer::getInput, ITensor::getType"""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    return tuple(_described(layer, makers) for layer in layers)


def _described(layer: Any, makers: dict[str, Any]) -> LayerPrecision:
    kind = layer.type.name
    tensors = [layer.get_input(i) for i in range(layer.num_inputs)]
    own = kind in ("QUANTIZE", "DEQUANTIZE")
    inputs = [_type(t if own else _origin(t, makers)) for t in tensors if t is not None]
    if (kind == "CONVOLUTION" and len(inputs) == 1) or (kind == "DECONVOLUTION" and len(inputs) == 1):
        inputs.append(inputs[0])  # constant weights are no input tensor; where typing is strong they have its type
    outputs = [_type(layer.get_output(i)) for i in range(layer.num_outputs)]
    return LayerPrecision(
        str(layer.name), kind, tuple(t for t in inputs if t is not None), tuple(t for t in outputs if t is not None)
    )


def _origin(tensor: Any, makers: dict[str, Any]) -> Any:
    """The quantized tensor behind one that was dequantized, else the tensor itself."""
    current = tensor
    while (maker := makers.get(current.name)) is not None and maker.type.name in _PASSING:
        current = maker.get_input(0)
    if maker is not None and maker.type.name == "DEQUANTIZE":
        return maker.get_input(0)
    return tensor


def _type(tensor: Any) -> DataType | None:
    return DataType.__members__.get(tensor.dtype.name)


def inspected_precisions(text: str) -> tuple[LayerPrecision, ...]:
    """From the engine inspector's JSON; empty where it has layer names alone.

    Source: nvinfer1::IEngineInspector::getEngineInformation, with ProfilingVerbosity::kDETAILED at the build
    """
    try:
        content = json.loads(text)
    except ValueError:
        return ()
    layers = content.get("Layers", ()) if isinstance(content, dict) else ()
    return tuple(_inspected(layer) for layer in layers if isinstance(layer, dict) and "Inputs" in layer)


def _inspected(layer: dict[str, Any]) -> LayerPrecision:
    kind = str(layer.get("ParameterType") or layer.get("LayerType") or "")
    words = re.sub(r"[^a-z]", "", f"{kind} {layer.get('LayerType', '')}".lower())
    known = next((name for word, name in _KINDS if word in words), kind.upper())
    inputs = [t for t in map(_inspected_type, layer.get("Inputs", ())) if t is not None]
    weights = layer.get("Weights")
    if isinstance(weights, dict) and len(inputs) == 1:
        found = _inspected_type({"Format/Datatype": weights.get("Type", "")})
        inputs += [found] if found is not None else []
    outputs = [t for t in map(_inspected_type, layer.get("Outputs", ())) if t is not None]
    return LayerPrecision(str(layer.get("Name", "")), known, tuple(inputs), tuple(outputs))


def _inspected_type(tensor: Any) -> DataType | None:
    text = (
        str(tensor.get("Format/Datatype") or tensor.get("Datatype") or "").lower() if isinstance(tensor, dict) else ""
    )
    return next((dtype for word, dtype in _WORDS if word in text), None)
