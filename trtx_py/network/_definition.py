"""What passes between a network, its layers and the backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from .._types import Array, DataType, Shape

if TYPE_CHECKING:
    from ._onnx_graph import OnnxGraph


@dataclass(frozen=True)
class TensorFacts:
    """A tensor of a network.

    Attributes:
        name: unique in its network; the name that it was made with.
        shape: -1 for a dimension that is known only at run time.
    """

    name: str
    dtype: DataType
    shape: Shape

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class LayerRequest:
    """One layer, checked as far as that needs no backend.

    Attributes:
        kind: which entry of the table it is; TensorRT's method is ``add_`` and this.
        name: unique in its network.
        inputs: tensors by role; those of a layer that takes any number of them are "0", "1", ...
        weights: arrays by role, read-only, C-contiguous, which nobody else changes.
        settings: all the rest, by name; enumerators by TensorRT's names.
        outputs: names of the tensors to be made.
    """

    kind: str
    name: str
    inputs: Mapping[str, TensorFacts]
    weights: Mapping[str, Array]
    settings: Mapping[str, Any]
    outputs: tuple[str, ...]

    def __getitem__(self, setting: str) -> Any:
        return self.settings[setting]

    @property
    def input(self) -> TensorFacts:
        """The tensor in the role "input"."""
        return self.inputs["input"]

    def weights_name(self, role: str) -> str:
        """What ONNX and a Refitter call its weights; no tensor is ever named so."""
        return f"{self.name}//{role}"

    def __str__(self) -> str:
        return f"layer {self.name!r} (add_{self.kind})"


class VendorNetwork(Protocol):
    """One version's INetworkDefinition, as the table calls it. What the version lacks is a BuilderError."""

    def add(self, method: str, *arguments: Any) -> Any:
        """Call ``network.<method>``; the layer."""
        ...

    @property
    def before_10(self) -> bool:
        """TensorRT 8, where some methods take fewer arguments."""
        ...

    def has(self, method: str) -> bool: ...
    def tensor(self, facts: TensorFacts) -> Any: ...
    def member(self, enum: str, name: str) -> Any: ...
    def dtype(self, dtype: DataType) -> Any: ...
    def weights(self, array: Array | None, dtype: DataType) -> Any:
        """Weights that stay where they are until the network goes; None gives none, of ``dtype``."""
        ...

    def constant(self, array: Array) -> Any:
        """A tensor with these values."""
        ...

    def set(self, layer: Any, attribute: str, value: Any) -> None: ...


Lower = Callable[["OnnxGraph", LayerRequest], None]
Call = Callable[[VendorNetwork, LayerRequest], Any]


@dataclass(frozen=True)
class LayerDefinition:
    """One kind of layer.

    Attributes:
        type: the name nvinfer1::LayerType has for it.
        lower: adds nodes to an ONNX graph whose results have the request's output names.
        call: adds the layer to a TensorRT network; returns the vendor's layer.
        outputs: how many tensors it makes.
    """

    type: str
    lower: Lower
    call: Call
    outputs: int = field(default=1)
