"""An ONNX model as the caller gives it: a path or bytes, its weights inside, beside it or in a blob of their own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._arguments import MAX_DIM, checked_path
from ._errors import InvalidArgumentError, ParserError

if TYPE_CHECKING:
    import onnx

Weights = bytes | bytearray | memoryview | str | os.PathLike[str]

_MAX_INLINE = (2 << 30) - (1 << 20)  # a protobuf message ends at 2 GiB


@dataclass(frozen=True)
class OnnxSource:
    """A model ready for a parser.

    Attributes:
        model: serialized ModelProto.
        directory: where its external data lies; None when all weights are inside ``model``.
        sha256: over the model and all of its weights, as hexadecimal digits.
        name: what to call it in messages.
    """

    model: bytes
    directory: str | None
    sha256: str
    name: str


def load_onnx(source: str | os.PathLike[str] | bytes | bytearray | memoryview, weights: Weights | None) -> OnnxSource:
    """Read a model and check that it is one.

    Args:
        source: path of a ``.onnx`` file, whose external data lies beside it, or the serialized model.
        weights: for a model with external data: all of it, as one blob or the path of one; every tensor's offset and
            length count from the start of the blob.

    Raises:
        ParserError: empty, not an ONNX model, or its external data is missing, too short or outside its folder.
        InvalidArgumentError: a file cannot be read, or ``weights`` are given to a model that has none outside.
    """
    directory: str | None = None
    if isinstance(source, (bytes, bytearray, memoryview)):
        blob, name = bytes(source), "ONNX model (bytes)"
    else:
        name = checked_path(source, "ONNX source", "a path or bytes")
        blob = _read(name, "ONNX model")
        directory = os.path.dirname(os.path.abspath(name))
    model = _decode(blob, name)
    external = [tensor for tensor in _all_tensors(model.graph) if _is_external(tensor)]
    if not external:
        if weights is not None:
            raise InvalidArgumentError(f"{name} keeps all its weights inside; leave out the weights argument")
        return OnnxSource(blob, None, hashlib.sha256(blob).hexdigest(), name)
    if weights is None and directory is None:
        raise ParserError(
            f"{name} keeps {len(external)} tensors in external data ({_location(external[0])!r}, ...); "
            "give the path of the model file, or the data as weights="
        )
    return _with_external(model, blob, external, weights, directory, name)


def _decode(blob: bytes, name: str) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    if not blob:
        raise ParserError(f"{name} is empty; expected a serialized ONNX ModelProto")
    try:
        model = onnx.ModelProto()
        model.ParseFromString(blob)
    except (DecodeError, UnicodeDecodeError) as error:  # protobuf in pure Python decodes text at once
        raise ParserError(
            f"{name} is not an ONNX model: {len(blob)} bytes that do not decode ({error}); "
            "export the model again, or copy it again if it was cut short"
        ) from error
    if not model.HasField("graph") or not model.opset_import:
        raise ParserError(f"{name} decodes, but has no graph or no opset: it is not an ONNX model, or was cut short")
    _check_content(model, name)
    return model


def _check_content(model: onnx.ModelProto, name: str) -> None:
    """Refuse what decodes and still is no model: native parsers end the process over it, or change it silently."""
    for message, where in _messages(model, "", name):
        kind = message.DESCRIPTOR.name
        if kind == "NodeProto":
            label = f"{name}: node {message.name!r} ({where})"
            if not message.op_type:
                raise ParserError(f"{label} has no op_type; expected the name of an operator; export the model again")
            if not any(message.output):
                raise ParserError(
                    f"{label}, operator {message.op_type}, has no outputs; expected one at least: "
                    "export the model again"
                )
        elif kind == "TensorProto":
            label = f"{name}: tensor {message.name!r} ({where})"
            _check_element_type(message.data_type, label, required=True)
            for dim in message.dims:
                _check_dim(dim, label, minimum=0)
        elif kind == "Tensor" and message.HasField("elem_type"):  # TypeProto.Tensor, the type of a value
            _check_element_type(message.elem_type, f"{name}: {where}", required=False)
        elif kind == "Dimension" and message.HasField("dim_value"):
            _check_dim(message.dim_value, f"{name}: {where}", minimum=None)
    for value in (*model.graph.input, *model.graph.output):
        # Of values inside the graph the type is inferred, and exporters leave it out.
        if value.type.HasField("tensor_type"):
            label = f"{name}: {value.name!r}, an input or output of the graph,"
            _check_element_type(value.type.tensor_type.elem_type, label, required=True)


def _check_element_type(found: int, label: str, *, required: bool) -> None:
    from onnx import TensorProto

    if found not in TensorProto.DataType.values() or (required and found == TensorProto.UNDEFINED):
        raise ParserError(
            f"{label} has element type {found}; expected one of onnx.TensorProto.DataType"
            f"{' other than UNDEFINED' if required else ''}: export the model again"
        )


def _check_dim(found: int, label: str, *, minimum: int | None) -> None:
    # TensorRT's parser keeps the low bits of a larger one and builds an engine of another shape.
    if found > MAX_DIM or (minimum is not None and found < minimum):
        raise ParserError(
            f"{label} has a dimension of {found}; expected at most {MAX_DIM}"
            f"{'' if minimum is None else f' and at least {minimum}'}: "
            "export the model with shapes that TensorRT can hold"
        )


def _messages(message: Any, where: str, name: str) -> Iterator[tuple[Any, str]]:
    """``message`` and all messages inside it, each after its own text was found to be text."""
    texts, parts = _fields(message)
    for field in texts:
        try:
            text = getattr(message, field)
            # Reading decodes it; some versions of protobuf give bytes instead of raising.
            broken = any(not isinstance(part, str) for part in ([text] if isinstance(text, (str, bytes)) else text))
        except UnicodeDecodeError:
            broken = True
        if broken:
            raise ParserError(
                f"{name}: {where + '.' if where else ''}{field} is not UTF-8 text, which ONNX expects; "
                "the file is damaged: copy or export the model again"
            )
    yield message, where
    for field, repeated in parts:
        path = f"{where}.{field}" if where else field
        if repeated:
            for index, part in enumerate(getattr(message, field)):
                yield from _messages(part, f"{path}[{index}]", name)
        elif message.HasField(field):
            yield from _messages(getattr(message, field), path, name)


def _fields(message: Any) -> tuple[tuple[str, ...], tuple[tuple[str, bool], ...]]:
    """Names of the fields that hold text, and of those that hold messages, the latter with "it is repeated".

    Numbers and bytes, which is where weights lie, are not looked at: reading them would copy them.
    """
    descriptor = message.DESCRIPTOR
    known = _FIELDS.get(descriptor.full_name)
    if known is None:
        fields = descriptor.fields
        # Repeated fields are told by their default: the names for it differ between protobuf 3 and 7.
        known = _FIELDS[descriptor.full_name] = (
            tuple(f.name for f in fields if f.type == f.TYPE_STRING),
            tuple((f.name, f.default_value == []) for f in fields if f.type == f.TYPE_MESSAGE),
        )
    return known


_FIELDS: dict[str, tuple[tuple[str, ...], tuple[tuple[str, bool], ...]]] = {}


def _read(path: str, what: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InvalidArgumentError(f"{what} {path!r} cannot be read: {error.strerror}") from error


def _all_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _all_tensors(attribute.g)
            for inner in attribute.graphs:
                yield from _all_tensors(inner)


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == 1)  # TensorProto.EXTERNAL


def _entries(tensor: onnx.TensorProto) -> Mapping[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _location(tensor: onnx.TensorProto) -> str:
    return _entries(tensor).get("location", "")


class _Blobs:
    """The files that external data lies in, or the one blob that stands for them all."""

    def __init__(self, weights: Weights | None, directory: str | None, name: str) -> None:
        self._directory = directory
        self._name = name
        self._one: memoryview | None = None
        self._files: dict[str, memoryview] = {}
        if isinstance(weights, (bytes, bytearray, memoryview)):
            view = memoryview(weights)
            self._one = (view if view.c_contiguous else memoryview(bytes(view))).cast("B")
        elif weights is not None:
            self._one = memoryview(_read(checked_path(weights, "weights", "a path or bytes"), "weights file"))

    def of(self, tensor: onnx.TensorProto) -> memoryview:
        if self._one is not None:
            return self._one
        location = _location(tensor)
        if location not in self._files:
            base = os.path.realpath(self._directory or ".")
            path = os.path.realpath(os.path.join(base, location)) if "\0" not in location else ""
            # A model is data from elsewhere: it must not make us read files outside its own folder.
            if not location or not path or os.path.commonpath([base, path]) != base:
                raise ParserError(
                    f"{self._name}: tensor {tensor.name!r} has its data at {location!r}, outside the model's folder; "
                    "only files beside the model are read"
                )
            if not os.path.isfile(path):
                raise ParserError(
                    f"{self._name}: external data {location!r} (tensor {tensor.name!r}) is not beside the model; "
                    "copy it there, or give it as weights="
                )
            self._files[location] = memoryview(_read(path, "external data"))
        return self._files[location]


def _with_external(
    model: onnx.ModelProto,
    blob: bytes,
    external: list[onnx.TensorProto],
    weights: Weights | None,
    directory: str | None,
    name: str,
) -> OnnxSource:
    blobs = _Blobs(weights, directory, name)
    digest = hashlib.sha256(blob)
    pieces: list[memoryview] = []
    for tensor in external:
        data, entries = blobs.of(tensor), _entries(tensor)
        try:
            offset = int(entries.get("offset", "0"))
            length = int(entries["length"]) if "length" in entries else len(data) - offset
        except ValueError as error:
            raise ParserError(f"{name}: tensor {tensor.name!r} has a broken external data entry: {error}") from error
        if offset < 0 or length < 0 or offset + length > len(data):
            raise ParserError(
                f"{name}: tensor {tensor.name!r} needs bytes {offset} to {offset + length} of its external data, "
                f"which has {len(data)}; the data file is too short or belongs to another model"
            )
        piece = data[offset : offset + length]
        digest.update(piece)
        pieces.append(piece)
    if len(blob) + sum(len(piece) for piece in pieces) > _MAX_INLINE:
        if weights is not None:
            raise ParserError(
                f"{name}: with its weights the model exceeds 2 GiB, which only works with the weights in files beside "
                "the model; give its path"
            )
        return OnnxSource(blob, directory, digest.hexdigest(), name)
    for tensor, piece in zip(external, pieces, strict=True):
        tensor.raw_data = bytes(piece)
        del tensor.external_data[:]
        tensor.ClearField("data_location")
    return OnnxSource(model.SerializeToString(), None, digest.hexdigest(), name)
