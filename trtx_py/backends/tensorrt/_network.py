"""A network and the parser that filled it."""

from __future__ import annotations

import os
from typing import Any

from ..._errors import EngineError, ParserError, ParserIssue
from ..._types import DataType, LayerPrecision, TensorInfo, TensorLocation, TensorMode
from ...network import LayerRequest, TensorFacts
from ..protocols import LogSink
from ._guards import alive, created, data_type
from ._layer_calls import LayerCalls
from ._layers import network_precisions
from ._vendor import Vendor

#: protobuf cannot hold more in one message
_MAX_MODEL_BYTES = 2**31 - 1


class Network:
    """Implements BackendNetwork.

    Source: nvinfer1::INetworkDefinition, nvonnxparser::IParser
    """

    def __init__(self, vendor: Vendor, log: LogSink, builder: Any, handle: Any) -> None:
        self._vendor = vendor
        self._log = log
        self._builder: Any = builder
        self._handle: Any = handle
        # The network's weights point into memory that the parser owns.
        self._parser: Any = None
        self._calls: LayerCalls | None = LayerCalls(vendor, log, handle)

    @property
    def native(self) -> Any:
        """The vendor's network, for the builder."""
        return alive(self._handle, "network")

    def belongs_to(self, builder: Any) -> bool:
        """True if that builder created it."""
        return self._builder is builder or self._handle is None

    def parse_onnx(self, model: bytes, directory: str | None) -> None:
        """Source: nvonnxparser::IParser::parse"""
        network = alive(self._handle, "network")
        self._check_source(model, directory)
        with self._vendor.router.operation(self._log) as operation:
            try:
                parser = self._vendor.module.OnnxParser(network, self._vendor.logger)
                if not created(parser, operation):
                    raise ParserError(
                        f"{self._vendor.title} could not create an ONNX parser", tensorrt_log=operation.lines
                    )
                self._parser = parser
                if directory is None:
                    parsed = parser.parse(model)
                else:
                    # TensorRT takes the directory of the model's path; the file itself is not opened.
                    parsed = parser.parse(model, os.path.join(directory, "model.onnx"))
            except (TypeError, ValueError, RuntimeError, MemoryError) as error:
                raise ParserError(
                    f"{self._vendor.title} could not parse the ONNX model ({len(model)} bytes): {error}",
                    tensorrt_log=operation.lines,
                ) from error
            if not parsed:
                issues = [_issue(parser.get_error(i)) for i in range(parser.num_errors)]
                if not issues:
                    issues = [ParserIssue(reason=line) for line in operation.lines]
                raise ParserError(
                    f"{self._vendor.title} could not parse the ONNX model ({len(model)} bytes)",
                    issues=issues,
                    tensorrt_log=operation.lines,
                )
            if network.num_outputs == 0:
                raise ParserError(
                    f"the ONNX model ({len(model)} bytes) has no outputs: it is empty or no ONNX model; pass a "
                    f"serialized ModelProto",
                    tensorrt_log=operation.lines,
                )

    def add_input(self, facts: TensorFacts) -> None:
        """Source: nvinfer1::INetworkDefinition::addInput"""
        alive(self._calls, "network").add_input(facts)

    def add_layer(self, request: LayerRequest) -> tuple[TensorFacts, ...]:
        """See BackendNetwork."""
        return alive(self._calls, "network").add_layer(request)

    def mark_output(self, facts: TensorFacts, name: str) -> None:
        """Source: nvinfer1::INetworkDefinition::markOutput"""
        alive(self._calls, "network").mark_output(facts, name)

    def unmark_output(self, facts: TensorFacts) -> None:
        """Source: nvinfer1::INetworkDefinition::unmarkOutput"""
        alive(self._calls, "network").unmark_output(facts)

    def set_layer_type(self, request: LayerRequest, output: int | None, dtype: DataType) -> None:
        """See BackendNetwork."""
        alive(self._calls, "network").set_layer_type(request, output, dtype)

    def _check_source(self, model: bytes, directory: str | None) -> None:
        if self._parser is not None:
            raise ParserError("this network has been parsed already; create a new one for each model")
        if not model:
            raise ParserError("the ONNX model is empty (0 bytes); pass a serialized ModelProto")
        if len(model) > _MAX_MODEL_BYTES:
            raise ParserError(
                f"the ONNX model has {len(model)} bytes, more than protobuf's 2 GiB; save its weights as external data"
            )
        if directory is not None and not os.path.isdir(directory):
            raise ParserError(f"{directory!r} is no directory; pass the one that holds the model's external data")

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        network = alive(self._handle, "network")
        return tuple(_describe(network.get_input(i), TensorMode.INPUT) for i in range(network.num_inputs))

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        network = alive(self._handle, "network")
        return tuple(_describe(network.get_output(i), TensorMode.OUTPUT) for i in range(network.num_outputs))

    @property
    def num_layers(self) -> int:
        return int(alive(self._handle, "network").num_layers)

    def layer_precisions(self) -> tuple[LayerPrecision, ...]:
        """See BackendNetwork."""
        return network_precisions(alive(self._handle, "network"))

    def destroy(self) -> None:
        """Idempotent."""
        with self._vendor.router.operation(self._log):
            # The parser refers to the network, the network to the builder.
            self._parser = None
            weights = None if self._calls is None else self._calls.release()
            self._calls = None
            self._handle = None
            self._builder = None
        del weights  # which the network had pointers to


def _describe(tensor: Any, mode: TensorMode) -> TensorInfo:
    try:
        shape = tuple(int(n) for n in tensor.shape)
    except ValueError as error:
        # The bindings raise for a tensor whose rank TensorRT could not work out.
        raise EngineError(f"the shape of {mode.value} {tensor.name!r} is not known: {error}") from error
    is_shape_tensor = bool(tensor.is_shape_tensor)
    return TensorInfo(
        name=str(tensor.name),
        mode=mode,
        dtype=data_type(tensor.name, tensor.dtype),
        shape=shape,
        location=TensorLocation.HOST if is_shape_tensor else TensorLocation.DEVICE,
        is_shape_tensor=is_shape_tensor,
    )


def _issue(error: Any) -> ParserIssue:
    """One parser error; which of its attributes exist depends on the version."""

    def ask(name: str) -> Any:
        method = getattr(error, name, None)
        return method() if callable(method) else None

    index = ask("node")
    node = ask("node_name") or (f"#{index}" if isinstance(index, int) and index >= 0 else "")
    code = ask("code")
    reason = str(ask("desc") or error)
    if reason == "false":
        # All that the checker of an operator without an importer says.
        reason = f"the ONNX parser does not import this operator ({ask('func') or 'its check'}: false)"
    return ParserIssue(
        reason=reason,
        node=str(node),
        operator=str(ask("node_operator") or ""),
        code=str(getattr(code, "name", code) or ""),
    )
