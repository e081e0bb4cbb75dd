"""Networks built layer by layer: what each layer is, in ONNX and in TensorRT, and the methods that add them."""

from ._definition import LayerDefinition, LayerRequest, TensorFacts, VendorNetwork
from ._onnx_graph import OnnxGraph
from ._table import TABLE
from ._tensors import Layer, NetworkTensor

__all__ = [
    "TABLE",
    "Layer",
    "LayerDefinition",
    "LayerRequest",
    "NetworkTensor",
    "OnnxGraph",
    "TensorFacts",
    "VendorNetwork",
]
