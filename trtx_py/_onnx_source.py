"""An ONNX model as the caller gives it: a path or bytes, its weights inside, beside it or in a blob of their own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    elif isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        blob = _read(name, "ONNX model")
        directory = os.path.dirname(os.path.abspath(name))
    else:
        raise InvalidArgumentError(f"ONNX source is {type(source).__name__}; expected a path or bytes")
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
    except DecodeError as error:
        raise ParserError(
            f"{name} is not an ONNX model: {len(blob)} bytes that do not decode ({error}); "
            "export the model again, or copy it again if it was cut short"
        ) from error
    if not model.HasField("graph") or not model.opset_import:
        raise ParserError(f"{name} decodes, but has no graph or no opset: it is not an ONNX model, or was cut short")
    return model


def _read(path: str, what: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise InvalidArgumentError(f"{what} {path!r} cannot be read: {reason}") from error


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
            self._one = memoryview(weights).cast("B")
        elif weights is not None:
            self._one = memoryview(_read(os.fspath(weights), "weights file"))

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
