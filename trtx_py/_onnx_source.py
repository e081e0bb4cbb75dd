"""An ONNX model as the caller gives it: a path or bytes, its weights inside, beside it or in a blob of their own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from ._arguments import MAX_DIM, checked_path
from ._errors import InvalidArgumentError, ParserError
from ._hashing import Hashing
from ._onnx_light import without_weights
from ._plain_file import open_plain

if TYPE_CHECKING:
    import onnx

Weights = bytes | bytearray | memoryview | str | os.PathLike[str]

_MAX_MESSAGE = 2 << 30  # of protobuf
_MAX_INLINE = _MAX_MESSAGE - (1 << 20)


class HasHexDigest(Protocol):
    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class OnnxSource:
    """A model ready for a parser.

    Attributes:
        model: serialized ModelProto.
        directory: where its external data lies; None when all weights are inside ``model``.
        hashed: SHA-256 over the model and all of its weights, which may still be at work.
        name: what to call it in messages.
    """

    model: bytes
    directory: str | None
    hashed: HasHexDigest
    name: str

    @property
    def sha256(self) -> str:
        """As hexadecimal digits; waits for them."""
        return self.hashed.hexdigest()


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
        blob = _read_model(name)
        directory = os.path.dirname(os.path.abspath(name))
    light = without_weights(blob)
    try:
        model = _decode(light, name)
    except ParserError:
        model = _decode(blob, name)  # for the error, which tells how long the model is
    external = [tensor for tensor in _all_tensors(model) if _is_external(tensor)]
    _check_weights_given(external, weights, directory, name)
    if external and light is not blob:
        model = _decode(blob, name)
        external = [tensor for tensor in _all_tensors(model) if _is_external(tensor)]
    if not external:
        return OnnxSource(blob, None, Hashing([blob]), name)
    return _with_external(model, blob, external, weights, directory, name)


class GivenUpError(Exception):
    """Nobody waits for the hash any more; never leaves this package."""


def onnx_sha256(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview,
    weights: Weights | None,
    given_up: Callable[[], bool] = lambda: False,
) -> str:
    """What ``load_onnx`` would put into ``sha256``, without holding the weights in memory.

    A model that has no external data is not even decoded, which takes longer than hashing it.

    Args:
        given_up: asked now and then, since many gigabytes take minutes; True ends it.

    Raises: as ``load_onnx``, for what is wrong with external data; other defects are not looked for. GivenUpError.
    """
    directory: str | None = None
    if isinstance(source, (bytes, bytearray, memoryview)):
        blob, name = bytes(source), "ONNX model (bytes)"
        if weights is None and _LOCATION not in blob:
            return hashlib.sha256(blob).hexdigest()
    else:
        name = checked_path(source, "ONNX source", "a path or bytes")
        if weights is None:
            digest, may_be_external = _hash_file(name, given_up)
            if not may_be_external:
                return digest
        blob = _read_model(name)
        directory = os.path.dirname(os.path.abspath(name))
    external = [tensor for tensor in _all_tensors(_decode(blob, name)) if _is_external(tensor)]
    _check_weights_given(external, weights, directory, name)
    hashed = hashlib.sha256(blob)
    parts = _Parts(weights, directory, name)
    for tensor in external:
        for chunk in parts.chunks(tensor):
            _go_on(given_up)
            hashed.update(chunk)
    return hashed.hexdigest()


#: Every tensor whose data lies in a file beside the model has this key: without it in the bytes there is none.
_LOCATION = b"location"
_CHUNK = 1 << 20


def _go_on(given_up: Callable[[], bool]) -> None:
    if given_up():
        raise GivenUpError


def _hash_file(path: str, given_up: Callable[[], bool]) -> tuple[str, bool]:
    """SHA-256 of a file, and whether ``_LOCATION`` occurs in it."""
    digest, found, tail = hashlib.sha256(), False, b""
    try:
        with _open_model(path) as file:
            while chunk := file.read(_CHUNK):
                _go_on(given_up)
                digest.update(chunk)
                found = found or _LOCATION in chunk or _LOCATION in tail + chunk[: len(_LOCATION)]
                tail = chunk[-len(_LOCATION) :]
    except OSError as error:
        raise _no_model(path, error) from error
    return digest.hexdigest(), found


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


def _read_model(path: str) -> bytes:
    try:
        with _open_model(path) as file:
            return file.read()
    except OSError as error:
        raise _no_model(path, error) from error


def _open_model(path: str) -> BinaryIO:
    file = open_plain(path)
    size = os.fstat(file.fileno()).st_size
    if size > _MAX_MESSAGE:  # before it is hashed, or fills the memory
        file.close()
        raise ParserError(
            f"{path} has {size} bytes, and an ONNX model in one file ends at {_MAX_MESSAGE}: it is none, or damaged; "
            "export models beyond that with their weights in files beside them"
        )
    return file


def _no_model(path: str, error: OSError) -> InvalidArgumentError:
    return InvalidArgumentError(f"ONNX model {path!r} cannot be read: {error.strerror}")


def _all_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that may keep its data outside: of the graph, its subgraphs and the model's own functions."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _graph_tensors(attribute.g)
            for inner in attribute.graphs:
                yield from _graph_tensors(inner)


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == 1)  # TensorProto.EXTERNAL


def _entries(tensor: onnx.TensorProto) -> Mapping[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _location(tensor: onnx.TensorProto) -> str:
    return _entries(tensor).get("location", "")


def _check_weights_given(
    external: list[onnx.TensorProto], weights: Weights | None, directory: str | None, name: str
) -> None:
    if not external and weights is not None:
        raise InvalidArgumentError(f"{name} keeps all its weights inside; leave out the weights argument")
    if external and weights is None and directory is None:
        raise ParserError(
            f"{name} keeps {len(external)} tensors in external data ({_location(external[0])!r}, ...); "
            "give the path of the model file, or the data as weights="
        )


def _external_path(tensor: onnx.TensorProto, directory: str | None, name: str) -> str:
    """The file that a tensor's data lies in, beside the model."""
    location = _location(tensor)
    base = os.path.realpath(directory or ".")
    path = os.path.realpath(os.path.join(base, location)) if "\0" not in location else ""
    # A model is data from elsewhere: it must not make us read files outside its own folder.
    if not location or not path or os.path.commonpath([base, path]) != base:
        raise ParserError(
            f"{name}: tensor {tensor.name!r} has its data at {location!r}, outside the model's folder; "
            "only files beside the model are read"
        )
    if not os.path.isfile(path):
        raise ParserError(
            f"{name}: external data {location!r} (tensor {tensor.name!r}) is not beside the model; "
            "copy it there, or give it as weights="
        )
    return path


def _span(tensor: onnx.TensorProto, available: int, name: str) -> tuple[int, int]:
    """First and last byte of a tensor's data, of ``available`` that there are."""
    entries = _entries(tensor)
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries["length"]) if "length" in entries else available - offset
    except ValueError as error:
        raise ParserError(f"{name}: tensor {tensor.name!r} has a broken external data entry: {error}") from error
    if offset < 0 or length < 0 or offset + length > available:
        raise ParserError(
            f"{name}: tensor {tensor.name!r} needs bytes {offset} to {offset + length} of its external data, "
            f"which has {available}; the data file is too short or belongs to another model"
        )
    return offset, offset + length


class _Parts:
    """Where the data of each external tensor lies: in files beside the model, or in what was given for them all."""

    def __init__(self, weights: Weights | None, directory: str | None, name: str) -> None:
        self._directory, self._name = directory, name
        self._one: memoryview | None = None
        self._path: str | None = None
        if isinstance(weights, (bytes, bytearray, memoryview)):
            view = memoryview(weights)
            self._one = (view if view.c_contiguous else memoryview(bytes(view))).cast("B")
        elif weights is not None:
            self._path = checked_path(weights, "weights", "a path or bytes")

    def span(self, tensor: onnx.TensorProto) -> tuple[int, int]:
        """First and last byte. Raises ParserError if they are not there."""
        if self._one is not None:
            return _span(tensor, len(self._one), self._name)
        path = self._file(tensor)
        try:
            available = os.path.getsize(path)
        except OSError as error:
            raise self._unreadable(path, error) from error
        return _span(tensor, available, self._name)

    def chunks(self, tensor: onnx.TensorProto) -> Iterator[bytes | memoryview]:
        """The data, in pieces. Raises ParserError, InvalidArgumentError."""
        start, end = self.span(tensor)
        if self._one is not None:
            yield self._one[start:end]
            return
        path = self._file(tensor)
        try:
            with open_plain(path) as file:
                file.seek(start)
                while start < end:
                    chunk = file.read(min(_CHUNK, end - start))
                    if not chunk:
                        raise ParserError(f"{self._name}: the external data {path!r} became shorter while it was read")
                    yield chunk
                    start += len(chunk)
        except OSError as error:
            raise self._unreadable(path, error) from error

    def _unreadable(self, path: str, error: OSError) -> InvalidArgumentError:
        what = "external data" if self._path is None else "weights file"
        return InvalidArgumentError(f"{what} {path!r} cannot be read: {error.strerror}")

    def _file(self, tensor: onnx.TensorProto) -> str:
        return _external_path(tensor, self._directory, self._name) if self._path is None else self._path


def _with_external(
    model: onnx.ModelProto,
    blob: bytes,
    external: list[onnx.TensorProto],
    weights: Weights | None,
    directory: str | None,
    name: str,
) -> OnnxSource:
    parts = _Parts(weights, directory, name)
    spans = [parts.span(tensor) for tensor in external]
    digest = hashlib.sha256(blob)
    if len(blob) + sum(end - start for start, end in spans) > _MAX_INLINE:
        if weights is not None:
            raise ParserError(
                f"{name}: with its weights the model exceeds 2 GiB, which only works with the weights in files beside "
                "the model; give its path"
            )
        for tensor in external:  # TensorRT reads them from their files: here they are never whole in memory
            for chunk in parts.chunks(tensor):
                digest.update(chunk)
        return OnnxSource(blob, directory, digest, name)
    for tensor in external:
        data = b"".join(parts.chunks(tensor))
        digest.update(data)
        tensor.raw_data = data
        del tensor.external_data[:]
        tensor.ClearField("data_location")
    return OnnxSource(model.SerializeToString(), None, digest, name)
