"""Tensors and layers of a network: they belong to it, and die with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .._errors import InvalidArgumentError
from .._types import DataType, Shape
from ._definition import LayerRequest, TensorFacts

if TYPE_CHECKING:
    from .._network import Network


class NetworkTensor:
    """A tensor between the layers of a network. Made by ``network.add_input`` and by layers; owned by its network.

    Two are equal if they are the same tensor of the same network.

    Source: nvinfer1::ITensor
    """

    _network: Network
    _facts: TensorFacts

    def __init__(self) -> None:
        raise TypeError("NetworkTensor objects are made by their network: use network.add_input(...) or a layer")

    @classmethod
    def _create(cls, network: Network, facts: TensorFacts) -> NetworkTensor:
        tensor = cls.__new__(cls)
        tensor._network, tensor._facts = network, facts
        return tensor

    @property
    def name(self) -> str:
        """The name in the engine for inputs and outputs; for all others that of the layer. Source: ITensor::getName"""
        return self._network._name_of(self._facts)

    @property
    def dtype(self) -> DataType:
        """Source: nvinfer1::ITensor::getType"""
        self._network._handle.require_open()
        return self._facts.dtype

    @property
    def shape(self) -> Shape:
        """-1 for a dimension that is known only at run time. Source: nvinfer1::ITensor::getDimensions"""
        self._network._handle.require_open()
        return self._facts.shape

    @property
    def network(self) -> Network:
        """The network that owns it."""
        return self._network

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NetworkTensor):
            return NotImplemented
        return self._network is other._network and self._facts.name == other._facts.name

    def __hash__(self) -> int:
        return hash((id(self._network), self._facts.name))

    def __repr__(self) -> str:
        dims = "x".join("?" if n < 0 else str(n) for n in self._facts.shape) or "scalar"
        return f"<NetworkTensor {self._facts.name!r} {self._facts.dtype.value} [{dims}] of {self._network._handle}>"


class Layer:
    """A layer of a network. Made by the network's ``add_...`` methods; owned by its network, and not changed later.

    Source: nvinfer1::ILayer
    """

    _network: Network
    _request: LayerRequest
    _type: str
    _outputs: tuple[TensorFacts, ...]

    def __init__(self) -> None:
        raise TypeError("Layer objects are made by their network: use network.add_...()")

    @classmethod
    def _create(cls, network: Network, request: LayerRequest, type_: str, outputs: tuple[TensorFacts, ...]) -> Layer:
        layer = cls.__new__(cls)
        layer._network, layer._request, layer._type, layer._outputs = network, request, type_, outputs
        return layer

    @property
    def name(self) -> str:
        """Unique in its network. Source: nvinfer1::ILayer::getName"""
        self._network._handle.require_open()
        return self._request.name

    @property
    def type(self) -> str:
        """The name of its nvinfer1::LayerType, such as "CONVOLUTION". Source: nvinfer1::ILayer::getType"""
        self._network._handle.require_open()
        return self._type

    @property
    def settings(self) -> Mapping[str, Any]:
        """What it was made with besides tensors and weights, by name; a copy."""
        self._network._handle.require_open()
        return dict(self._request.settings)

    @property
    def inputs(self) -> tuple[NetworkTensor, ...]:
        """Source: nvinfer1::ILayer::getInput"""
        self._network._handle.require_open()
        return tuple(NetworkTensor._create(self._network, facts) for facts in self._request.inputs.values())

    @property
    def outputs(self) -> tuple[NetworkTensor, ...]:
        """Source: nvinfer1::ILayer::getOutput"""
        self._network._handle.require_open()
        return tuple(NetworkTensor._create(self._network, facts) for facts in self._outputs)

    @property
    def output(self) -> NetworkTensor:
        """Its only output. Raises InvalidArgumentError for a layer that has none or several."""
        outputs = self.outputs
        if len(outputs) != 1:
            raise InvalidArgumentError(f"{self!r} has {len(outputs)} outputs; take one of layer.outputs")
        return outputs[0]

    def set_precision(self, dtype: DataType) -> None:
        """Ask for the type that the layer computes in, on weakly typed versions.

        Raises:
            BuilderError: this TensorRT is strongly typed, so that types come from ``add_cast`` and from the weights.
        Source: nvinfer1::ILayer::setPrecision
        """
        self._network._set_layer_type(self._request.name, None, dtype)

    def set_output_type(self, index: int, dtype: DataType) -> None:
        """Ask for the type of output number ``index``, on weakly typed versions.

        Raises: as ``set_precision``; InvalidArgumentError for an index that the layer does not have.
        Source: nvinfer1::ILayer::setOutputType
        """
        self._network._set_layer_type(self._request.name, index, dtype)

    def __repr__(self) -> str:
        return f"<Layer {self._request.name!r} {self._type} of {self._network._handle}>"
