"""The network definition."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from ._aio import run_shielded
from ._errors import BorrowedError, InvalidArgumentError, TrtxError
from ._onnx_source import OnnxSource, Weights, load_onnx
from ._resource import Resource
from ._types import TensorInfo
from .backends.protocols import BackendNetwork

if TYPE_CHECKING:
    from ._builder import Builder


class Network(Resource):
    """A model on its way into a builder. Made by ``builder.create_network()``.

    Source: nvinfer1::INetworkDefinition, nvonnxparser::IParser
    """

    _builder: Builder
    _native: BackendNetwork
    _source: OnnxSource | None
    _broken: bool
    _parsing: threading.Lock

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
            network._parsing = threading.Lock()
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
        self._handle.require_open()
        if not self._parsing.acquire(blocking=False):
            raise BorrowedError(f"{self._handle} is parsing a model; create another network for this one")
        try:
            if self._source is not None or self._broken:
                raise InvalidArgumentError(
                    f"{self._handle} has parsed a model before; create another network for this one"
                )
            loaded = load_onnx(source, weights)
            with self._handle.lend("parse_onnx()"), self._builder._logger.attaching():
                try:
                    self._native.parse_onnx(loaded.model, loaded.directory)
                except TrtxError:
                    self._broken = True  # what the parser has put into it so far is part of no model
                    raise
            self._source = loaded
            self._handle.name = os.path.basename(loaded.name)
        finally:
            self._parsing.release()

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

    def _parsed(self) -> OnnxSource:
        self._handle.require_open()
        if self._source is None:
            state = "failed to parse its model" if self._broken else "is empty"
            raise InvalidArgumentError(f"{self._handle} {state}; call parse_onnx on a new network first")
        return self._source
