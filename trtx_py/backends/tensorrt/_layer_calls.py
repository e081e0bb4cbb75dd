"""Adds layers to an INetworkDefinition: what the table of layers calls."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._errors import BuilderError
from ..._types import Array, DataType, Severity, Shape
from ...network import TABLE, LayerRequest, TensorFacts
from ...network._onnx_graph import packed_bytes
from ..protocols import LogSink
from ._guards import data_type
from ._log_router import Operation
from ._vendor import Vendor


class LayerCalls:
    """Implements VendorNetwork for one network. Keeps what TensorRT only has pointers to.

    Source: nvinfer1::INetworkDefinition
    """

    def __init__(self, vendor: Vendor, log: LogSink, network: Any) -> None:
        self._vendor = vendor
        self._log = log
        self._network: Any = network
        self._tensors: dict[str, Any] = {}
        self._layers: dict[str, Any] = {}
        self._weights: list[Any] = []  # TensorRT reads them when it builds
        self._kind = ""
        self._named: list[tuple[Array | None, Any]] = []  # of the layer that is being added

    def release(self) -> object:
        """Let go of the network, which is about to be destroyed; what must stay until it is."""
        weights, self._weights = self._weights, []
        self._network = None
        self._tensors, self._layers = {}, {}
        return weights

    def add_input(self, facts: TensorFacts) -> None:
        with self._vendor.router.operation(self._log) as operation:
            try:
                tensor = self._network.add_input(facts.name, self.dtype(facts.dtype), facts.shape)
            except (TypeError, ValueError, RuntimeError) as error:
                raise self._refused(f"input {facts.name!r}", operation, str(error)) from error
            if tensor is None:
                raise self._refused(f"input {facts.name!r} {facts.dtype.value} {list(facts.shape)}", operation)
        self._tensors[facts.name] = tensor

    def add_layer(self, request: LayerRequest) -> tuple[TensorFacts, ...]:
        self._kind = str(request)
        self._named = []
        with self._vendor.router.operation(self._log) as operation:
            try:
                layer = TABLE[request.kind].call(self, request)
                layer.name = request.name
                made = tuple(
                    self._described(request, layer.get_output(index), name, operation)
                    for index, name in enumerate(request.outputs)
                )
            except (TypeError, ValueError, RuntimeError, AttributeError) as error:
                raise self._refused(str(request), operation, str(error)) from error
            if operation.errors:
                raise self._refused(str(request), operation)
        self._name_weights(request)
        self._layers[request.name] = layer
        return made

    def _name_weights(self, request: LayerRequest) -> None:
        """As in ``to_onnx``: what a Refitter calls them. Source: nvinfer1::INetworkDefinition::setWeightsName"""
        if not self.has("set_weights_name"):
            return
        # Weights that change nothing, such as a shift of 0, TensorRT drops, and has an error for who names them.
        with self._vendor.router.operation(_unheard):
            for role, array in request.weights.items():
                name = request.name if request.kind == "constant" else request.weights_name(role)
                for given, made in self._named:
                    if given is array and array.size:
                        self._network.set_weights_name(made, name)

    def _described(self, request: LayerRequest, tensor: Any, name: str, operation: Operation) -> TensorFacts:
        try:
            shape: Shape = tuple(int(n) for n in tensor.shape)
        except ValueError as error:  # the bindings raise for a rank that TensorRT could not work out
            raise self._refused(str(request), operation, "its inputs do not fit together") from error
        tensor.name = name
        self._tensors[name] = tensor
        return TensorFacts(name, data_type(name, tensor.dtype), shape)

    def mark_output(self, facts: TensorFacts, name: str) -> None:
        with self._vendor.router.operation(self._log) as operation:
            tensor = self._tensors[facts.name]
            tensor.name = name
            self._network.mark_output(tensor)
            if operation.errors:
                raise self._refused(f"output {name!r}", operation)

    def unmark_output(self, facts: TensorFacts) -> None:
        with self._vendor.router.operation(self._log):
            tensor = self._tensors[facts.name]
            self._network.unmark_output(tensor)
            tensor.name = facts.name

    def set_layer_type(self, request: LayerRequest, output: int | None, dtype: DataType) -> None:
        if self._vendor.facts.typing == "strong":
            raise BuilderError(
                f"{self._vendor.title} is strongly typed: the type of {request} follows from its inputs; put add_cast "
                f"before or after it"
            )
        layer, kind = self._layers[request.name], self.dtype(dtype)
        with self._vendor.router.operation(self._log):
            if output is None:
                layer.precision = kind
            else:
                layer.set_output_type(output, kind)

    # VendorNetwork

    def add(self, method: str, *arguments: Any) -> Any:
        if not self.has(method):
            raise BuilderError(f"{self._vendor.title} has no {method}, which {self._kind} needs; {_NEXT_STEP}")
        layer = getattr(self._network, method)(*arguments)
        if layer is None:
            raise ValueError(f"{method} gave no layer")
        return layer

    @property
    def before_10(self) -> bool:
        return self._vendor.version.startswith("8.")

    def has(self, method: str) -> bool:
        return hasattr(self._network, method)

    def tensor(self, facts: TensorFacts) -> Any:
        return self._tensors[facts.name]

    def member(self, enum: str, name: str) -> Any:
        known = self._vendor.members(enum)
        if name not in known:
            raise BuilderError(
                f"{self._vendor.title} has no {enum}.{name}, which {self._kind} needs; it has "
                f"{', '.join(known) or 'no such enumeration'}; {_NEXT_STEP}"
            )
        return known[name]

    def dtype(self, dtype: DataType) -> Any:
        return self.member("DataType", dtype.name)

    def weights(self, array: Array | None, dtype: DataType) -> Any:
        given = array
        if array is None or not array.size:  # TensorRT refuses an address with a count of 0
            return self._vendor.module.Weights(self.dtype(dtype))
        if dtype is DataType.INT64 and not self._vendor.facts.int64_is_real:
            array, dtype = self._narrowed(array), DataType.INT32
        kept: Array = np.ascontiguousarray(array)
        if dtype is DataType.INT4:
            kept = np.frombuffer(packed_bytes(array, dtype), np.uint8)
        made = self._vendor.module.Weights(self.dtype(dtype), kept.ctypes.data, array.size)
        self._weights += [kept, made]
        self._named.append((given, made))
        return made

    def _narrowed(self, array: Array) -> Array:
        limits = np.iinfo(np.int32)
        if array.size and not limits.min <= array.min() <= array.max() <= limits.max:
            raise BuilderError(
                f"{self._vendor.title} has integers of 32 bits; {self._kind} has weights from {array.min()} to "
                f"{array.max()}"
            )
        return array.astype(np.int32)

    def constant(self, array: Array) -> Any:
        weights = self.weights(array, DataType.from_numpy(array.dtype))
        return self.add("add_constant", array.shape, weights).get_output(0)

    def set(self, layer: Any, attribute: str, value: Any) -> None:
        if not hasattr(layer, attribute):
            raise BuilderError(f"{self._vendor.title} has no {attribute} in {self._kind}; {_NEXT_STEP}")
        setattr(layer, attribute, value)

    def _refused(self, what: str, operation: Operation, why: str = "") -> BuilderError:
        # Where there is no GPU, each error is followed by one that says so; what the bindings raise says the least.
        told = [line for line in operation.lines if "catchCudaError" not in line]
        reason = told[0] if told else why or "it does not say why"
        return BuilderError(f"{self._vendor.title} refused {what}: {reason}", tensorrt_log=operation.lines)


_NEXT_STEP = "build it of other layers, or with a newer version"


def _unheard(severity: Severity, message: str) -> None:
    """A sink for lines about what need not work."""
