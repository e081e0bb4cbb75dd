"""ONNX models in files: read with large weights left where they are, checked, and written with weights beside them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ._task import RefusedError

#: Of a model whose weights exceed what one message holds, those below this size are kept in memory all the same.
_SMALL = 64 << 10
_CHUNK = 16 << 20
_MAX_MESSAGE = 2 << 30  # of protobuf
_ALIGNMENT = 4096


@dataclass
class Stored:
    """A model, and where the weights lie that are not inside it.

    Attributes:
        model: the ModelProto.
        folder: what the locations of external data count from.
        outside: the main graph's weights that stay in their files, taken out of ``model``, by name. While they are out
            they are inputs of the graph: everything else can be worked on, and nothing can fold them by accident.
        put: they are back in it.
        fixed: some weights that stay outside are not the main graph's, so that the graph cannot be rewritten.
    """

    model: Any
    folder: str
    outside: dict[str, Any] = field(default_factory=dict)
    fixed: bool = False
    put: bool = False


def read(path: str, limit: int) -> Stored:
    """The model of ``path``; with all its weights inside if they take less than ``limit`` bytes.

    Raises RefusedError if it is no ONNX model, or its external data is missing, short, or outside its folder.
    """
    import onnx
    from google.protobuf.message import DecodeError

    size = os.path.getsize(path)
    if size > _MAX_MESSAGE:  # before it fills the memory
        raise RefusedError(
            f"it has {size} bytes, and an ONNX model in one file ends at {_MAX_MESSAGE}: it is none, or damaged; "
            "models beyond that have their weights in files beside them", "damaged",
        )  # fmt: skip
    with open(path, "rb") as file:
        blob = file.read()
    model = onnx.ModelProto()
    try:
        model.ParseFromString(blob)
    except (DecodeError, UnicodeDecodeError) as error:
        raise RefusedError(
            f"{len(blob)} bytes do not decode as an ONNX model ({error}); it was cut short or damaged: copy or export "
            "it again", "damaged",
        ) from error  # fmt: skip
    if not model.HasField("graph") or not model.opset_import:
        raise RefusedError("it has no graph or no opset: it is no ONNX model, or was cut short", "damaged")
    folder = os.path.dirname(os.path.abspath(path))
    outside = [(tensor, *_span(tensor, folder)) for tensor in tensors(model) if _is_external(tensor)]
    in_all = len(blob) + sum(length for _, _, _, length in outside)
    stored = Stored(model, folder)
    for tensor, file_path, offset, length in outside:
        if in_all <= limit or length <= _SMALL:
            with open(file_path, "rb") as file:
                file.seek(offset)
                tensor.raw_data = file.read(length)
            del tensor.external_data[:]
            tensor.ClearField("data_location")
    for tensor in model.graph.initializer:
        if _is_external(tensor):
            stored.outside[tensor.name] = _copy(tensor)
    stored.fixed = any(_is_external(t) for t in tensors(model)) and len(stored.outside) != sum(
        _is_external(t) for t in tensors(model)
    )
    if stored.outside and not stored.fixed:
        _take_out(stored)
    return stored


def _take_out(stored: Stored) -> None:
    from onnx import helper

    graph = stored.model.graph
    kept = [tensor for tensor in graph.initializer if tensor.name not in stored.outside]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    named = {value.name for value in graph.input}
    graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for tensor in stored.outside.values()
        if tensor.name not in named
    )


def put_back(stored: Stored) -> None:
    """Undo what ``read`` did to the graph: the weights outside are weights again, but those that nothing reads now."""
    if not stored.outside or stored.fixed or stored.put:
        return
    graph = stored.model.graph
    inputs = [value for value in graph.input if value.name not in stored.outside]
    del graph.input[:]
    graph.input.extend(inputs)
    wanted = {name for node in graph.node for name in _reads(node)} | {value.name for value in graph.output}
    graph.initializer.extend(tensor for name, tensor in stored.outside.items() if name in wanted)
    stored.put = True


def _reads(node: Any) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            for inner in graph.node:
                yield from _reads(inner)


def write(stored: Stored, path: str, limit: int) -> list[str]:
    """Write the model to ``path``, and if it takes more than ``limit`` bytes its weights beside it.

    Returns the names of the files that belong to it, ``path`` last. The name of a file of weights holds its hash: a
    model never finds another one's weights under it.
    """
    model = stored.model
    large = [tensor for tensor in tensors(model) if _is_external(tensor) or len(tensor.raw_data) > _SMALL]
    anything_outside = any(_is_external(tensor) for tensor in large)
    if not anything_outside and sum(len(tensor.raw_data) for tensor in large) + _rest(model, large) <= limit:
        with open(path, "wb") as file:
            file.write(model.SerializeToString())
        return [os.path.basename(path)]
    temporary = f"{path}.data"
    digest, spans = hashlib.sha256(), []
    with open(temporary, "wb") as file:
        for tensor in large:
            start = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
            file.write(bytes(start - file.tell()))
            for chunk in _chunks(tensor, stored.folder):
                digest.update(chunk)
                file.write(chunk)
            spans.append((start, file.tell() - start))
    name = f"{os.path.basename(path)}.{digest.hexdigest()[:12]}.data"
    os.replace(temporary, os.path.join(os.path.dirname(path), name))
    for tensor, (start, length) in zip(large, spans, strict=True):
        tensor.ClearField("raw_data")
        del tensor.external_data[:]
        tensor.data_location = 1  # TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", str(start)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
    with open(path, "wb") as file:
        file.write(model.SerializeToString())
    return [name, os.path.basename(path)]


def _rest(model: Any, large: list[Any]) -> int:
    """Bytes of the model without its large weights, which together may exceed what protobuf counts to."""
    known = {id(tensor) for tensor in large}
    small = sum(tensor.ByteSize() for tensor in tensors(model) if id(tensor) not in known)
    return int(small) + 1024 * len(model.graph.node)


def _chunks(tensor: Any, folder: str) -> Iterator[bytes]:
    if not _is_external(tensor):
        yield tensor.raw_data
        return
    path, offset, length = _span(tensor, folder)
    with open(path, "rb") as file:
        file.seek(offset)
        while length:
            chunk = file.read(min(_CHUNK, length))
            if not chunk:
                raise RefusedError(f"external data {path!r} became shorter while it was read", "damaged")
            length -= len(chunk)
            yield chunk


def tensors(model: Any) -> Iterator[Any]:
    """Every tensor that may keep its data outside."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _graph_tensors(graph)


def _is_external(tensor: Any) -> bool:
    return bool(tensor.data_location == 1)


def _copy(tensor: Any) -> Any:
    copied = type(tensor)()
    copied.CopyFrom(tensor)
    return copied


def _span(tensor: Any, folder: str) -> tuple[str, int, int]:
    """File, offset and length of a tensor's external data."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    base = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(base, location)) if "\0" not in location else ""
    # A model is data from elsewhere: it must not make us read files outside its own folder.
    if not location or not path or os.path.commonpath([base, path]) != base:
        raise RefusedError(
            f"tensor {tensor.name!r} has its data at {location!r}, outside the model's folder; only files beside the "
            "model are read", "damaged",
        )  # fmt: skip
    if not os.path.isfile(path):
        raise RefusedError(
            f"external data {location!r} (tensor {tensor.name!r}) is not beside the model; copy it there", "damaged"
        )
    available = os.path.getsize(path)
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries["length"]) if "length" in entries else available - offset
    except ValueError as error:
        raise RefusedError(f"tensor {tensor.name!r} has a broken external data entry: {error}", "damaged") from error
    if offset < 0 or length < 0 or offset + length > available:
        raise RefusedError(
            f"tensor {tensor.name!r} needs bytes {offset} to {offset + length} of {location!r}, which has {available}; "
            "the data file is too short or belongs to another model", "damaged",
        )  # fmt: skip
    return path, offset, length
