"""The network definition: parsed from ONNX, or built layer by layer."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ._aio import run_shielded
from ._arguments import checked_shape
from ._errors import BorrowedError, DTypeError, InvalidArgumentError, TrtxError
from ._hashing import Hashing
from ._onnx_source import OnnxSource, Weights, load_onnx
from ._resource import Resource
from ._types import Array, DataType, LayerPrecision, TensorInfo
from .backends.protocols import BackendNetwork
from .network import TABLE, Layer, LayerRequest, NetworkTensor, TensorFacts
from .network._assembly import Assembly
from .network._checks import Type, data_type, tensor
from .network._table import AllLayers

if TYPE_CHECKING:
    from ._builder import Builder


#: Layers that TensorRT has for uint8.
_TAKE_UINT8 = frozenset({"cast", "identity"})


class Network(AllLayers, Resource):
    """A model on its way into a builder. Made by ``builder.create_network()``.

    Either one model is parsed into it, or it is built of ``add_input``, the ``add_...`` methods and ``mark_output``, by
    one thread at a time. Layers and tensors belong to it, and die with it.

    Source: nvinfer1::INetworkDefinition, nvonnxparser::IParser
    """

    _builder: Builder
    _native: BackendNetwork
    _source: OnnxSource | None
    _broken: bool
    _parsing: threading.Lock
    _assembly: Assembly

    def __init__(self) -> None:
        self._refuse_construction("builder.create_network()")

    @classmethod
    def _create(cls, builder: Builder) -> Network:
        network = cls.__new__(cls)
        with network._opening(builder) as handle:
            with builder._logger.attaching():
                native = builder._native.create_network()
            handle.release = native.destroy
            network._builder, network._native, network._source, network._broken = builder, native, None, False
            network._parsing, network._assembly = threading.Lock(), Assembly()
        return network

    def parse_onnx(
        self, source: str | os.PathLike[str] | bytes | bytearray | memoryview, weights: Weights | None = None
    ) -> None:
        """Fill the network from an ONNX model. Blocks; in a coroutine use ``await network.parse_onnx_async(...)``.

        Args:
            source: path of a model, whose external data lies beside it, or a serialized ModelProto.
            weights: all external data of the model as one blob, or the path of one.

        Raises:
            ParserError: not a model, or one that TensorRT cannot take; ``issues`` has node, operator and reason of
                every error. The network cannot be used after it.
            InvalidArgumentError: a file cannot be read, or the network is not empty.
            BorrowedError: the network is parsing a model already, on another thread.
        Source: nvonnxparser::IParser::parse
        """
        with self._changing("parse_onnx()"):
            if self._source is not None or self._broken or not self._assembly.empty:
                state = "has parsed a model before" if self._assembly.empty else "has layers of its own"
                raise InvalidArgumentError(f"{self._handle} {state}; create another network for this one")
            loaded = load_onnx(source, weights)
            with self._builder._logger.attaching(), self._breaking():
                self._native.parse_onnx(loaded.model, loaded.directory)
            self._source = loaded
            self._handle.name = os.path.basename(loaded.name)

    async def parse_onnx_async(
        self, source: str | os.PathLike[str] | bytes | bytearray | memoryview, weights: Weights | None = None
    ) -> None:
        """As ``parse_onnx``, off the event loop.

        Cancellation: delivered once the parser has returned; the network may then be filled or not.
        """
        await run_shielded(lambda: self.parse_onnx(source, weights))

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Inputs as parsed; -1 for dynamic dimensions. Source: INetworkDefinition::getInput"""
        self._handle.require_open()
        return self._native.inputs

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Outputs as parsed. Source: INetworkDefinition::getOutput"""
        self._handle.require_open()
        return self._native.outputs

    @property
    def num_layers(self) -> int:
        """Layers that the parser made. Source: INetworkDefinition::getNbLayers"""
        self._handle.require_open()
        return self._native.num_layers

    def layer_precisions(self) -> tuple[LayerPrecision, ...]:
        """What each layer will compute in, as far as the network says: all of it where TensorRT is strongly typed.

        Of the model as it was parsed; what ``BuilderConfig.precision`` makes of it, a build's plan says
        (``plan.header.build_options["layers_by_precision"]``).

        Source: nvinfer1::INetworkDefinition::getLayer
        """
        self._handle.require_open()
        return self._native.layer_precisions()

    def add_input(self, name: str, dtype: Type, shape: Any) -> NetworkTensor:
        """A tensor that the caller gives at run time.

        Args:
            name: what the engine will call it.
            shape: -1 for a dimension that an optimization profile is to have a range for.
        Source: nvinfer1::INetworkDefinition::addInput
        """
        with self._building_layers("add_input()"):
            title = self._assembly.unused(name, "input")
            facts = TensorFacts(title, data_type(dtype, "dtype"), checked_shape(shape, "shape", minimum=-1))
            with self._builder._logger.attaching(), self._breaking():
                self._native.add_input(facts)
            self._assembly.keep_input(facts)
            return NetworkTensor._create(self, facts)

    def mark_output(self, tensor: NetworkTensor, name: str | None = None) -> None:
        """Make a tensor an output of the engine.

        Args:
            name: what the engine will call it; None keeps the tensor's own, which is that of its layer.
        Raises InvalidArgumentError for an input, for what is an output already, and for a name that is taken.
        Source: nvinfer1::INetworkDefinition::markOutput
        """
        with self._building_layers("mark_output()"):
            facts = self._own(tensor, "tensor")
            marked = self._assembly.mark(facts, name)
            with self._builder._logger.attaching(), self._breaking():
                self._native.mark_output(facts, marked)

    def unmark_output(self, tensor: NetworkTensor) -> None:
        """Take back a ``mark_output``. Raises InvalidArgumentError for a tensor that is no output.

        Source: nvinfer1::INetworkDefinition::unmarkOutput
        """
        with self._building_layers("unmark_output()"):
            facts = self._own(tensor, "tensor")
            self._assembly.unmark(facts)
            with self._builder._logger.attaching(), self._breaking():
                self._native.unmark_output(facts)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What the ``add_...`` methods made, in order; empty for a parsed network.

        Source: nvinfer1::INetworkDefinition::getLayer
        """
        self._handle.require_open()
        return tuple(Layer._create(self, r, TABLE[r.kind].type, made) for r, made in self._assembly.layers)

    def to_onnx(self) -> bytes:
        """The network as a serialized ONNX model: what was parsed, or what the layers amount to (opset 21).

        Assertions are left out, ONNX has none. The weights of a model that was parsed from a file with external data
        stay beside that file.

        Raises InvalidArgumentError: the network is empty, has no outputs, or has more weights than one model holds.
        """
        return self._parsed().model

    def _add(
        self,
        kind: str,
        name: str | None,
        inputs: Mapping[str, NetworkTensor | None],
        weights: Mapping[str, Array | None] | None = None,
        **settings: Any,
    ) -> Layer:
        definition = TABLE[kind]
        with self._building_layers(f"add_{kind}()"):
            title, outputs = self._assembly.unused_layer(name, kind, definition.outputs)
            request = LayerRequest(
                kind=kind,
                name=title,
                inputs={role: self._input(one, role, kind) for role, one in inputs.items() if one is not None},
                weights={role: one for role, one in (weights or {}).items() if one is not None},
                settings=settings,
                outputs=outputs,
            )
            with self._builder._logger.attaching(), self._breaking():
                made = self._native.add_layer(request)
            self._assembly.keep_layer(request, made)
            return Layer._create(self, request, definition.type, made)

    def _own(self, value: NetworkTensor, what: str) -> TensorFacts:
        found = tensor(value, what)
        if found._network is not self:
            raise InvalidArgumentError(
                f"{what} is {found!r}; expected a tensor of {self._handle}: tensors stay in their network"
            )
        return found._facts

    def _input(self, value: NetworkTensor, role: str, kind: str) -> TensorFacts:
        facts = self._own(value, role)
        if facts.dtype is DataType.UINT8 and kind not in _TAKE_UINT8:
            raise DTypeError(
                f"{role} {facts.name!r} is uint8, which TensorRT has for inputs and outputs of a network only; "
                "put add_cast before it"
            )
        return facts

    def _name_of(self, facts: TensorFacts) -> str:
        self._handle.require_open()
        return self._assembly.public_name(facts)

    def _set_layer_type(self, name: str, output: int | None, dtype: DataType) -> None:
        with self._building_layers("set_output_type()" if output is not None else "set_precision()"):
            request, _ = self._assembly.find_layer(name)
            if output is not None and not 0 <= output < len(request.outputs):
                raise InvalidArgumentError(f"{request} has {len(request.outputs)} outputs; there is no number {output}")
            self._native.set_layer_type(request, output, data_type(dtype, "dtype"))

    @contextlib.contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        """Around every change: one at a time, none while a build reads the network, and no close meanwhile."""
        self._handle.require_open()
        if not self._parsing.acquire(blocking=False):
            raise BorrowedError(f"{self._handle} is in use: it is parsing a model, or being changed or built")
        try:
            with self._handle.lend(what):
                yield
        finally:
            self._parsing.release()

    @contextlib.contextmanager
    def _building_layers(self, what: str) -> Iterator[None]:
        with self._changing(what):
            if self._source is not None:
                raise InvalidArgumentError(
                    f"{what}: {self._handle} has parsed a model, and layers go into a network of their own; "
                    "create another one"
                )
            if self._broken:
                raise InvalidArgumentError(f"{what}: {self._handle} has failed before; create another network")
            yield

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        try:
            yield
        except TrtxError:
            self._broken = True  # what has been put into it so far is part of no model
            raise

    def _parsed(self) -> OnnxSource:
        self._handle.require_open()
        if self._broken:
            raise InvalidArgumentError(
                f"{self._handle} failed to parse its model or to add a layer; create another network"
            )
        if self._source is not None:
            return self._source
        if self._assembly.empty:
            raise InvalidArgumentError(
                f"{self._handle} is empty; call parse_onnx on a new network first, or add layers"
            )
        model = self._assembly.to_onnx(self._handle.name or "network")
        return OnnxSource(model, None, Hashing([model]), str(self._handle))
