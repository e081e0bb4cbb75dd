"""A serialized ONNX model without its weights: to look at it, decoding the weights would copy them for nothing.

That copy costs more than its time. The C library learns from large blocks that are freed to keep such blocks, and the
build that follows takes more memory by the size of the weights (measured with tensorrt-rtx 1.7).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER = 5
#: raw_data, where all exporters put weights of any size; decoding it cannot fail
_TENSOR_DATA = 9
#: Data of fewer bytes stay.
_SMALL = 1024


def without_weights(blob: bytes) -> bytes:
    """``blob`` without the data of large initializers; ``blob`` itself if there are none, or if it is no model."""
    view = memoryview(blob)
    try:
        pieces, changed = _replaced(view, _MODEL_GRAPH, _graph)
    except ValueError:
        return blob  # whoever decodes it will say what is wrong
    return b"".join(pieces) if changed else blob


#: A message in pieces, and whether they differ from what it was.
_Pieces = tuple[list[bytes | memoryview], bool]


def _graph(view: memoryview) -> _Pieces:
    return _replaced(view, _GRAPH_INITIALIZER, _tensor)


def _tensor(view: memoryview) -> _Pieces:
    pieces: list[bytes | memoryview] = []
    changed = False
    for number, kind, begin, value, end in _fields(view):
        if number == _TENSOR_DATA and kind == _LENGTH and end - value > _SMALL:
            changed = True
        else:
            pieces.append(view[begin:end])
    return pieces, changed


def _replaced(view: memoryview, wanted: int, replace: Callable[[memoryview], _Pieces]) -> _Pieces:
    """The message with what ``replace`` makes of each field number ``wanted``."""
    pieces: list[bytes | memoryview] = []
    changed, kept = False, 0
    for number, kind, begin, value, end in _fields(view):
        if number != wanted or kind != _LENGTH:
            continue
        inner, other = replace(view[value:end])
        if other:
            changed = True
            pieces += [view[kept:begin], _varint(wanted << 3 | _LENGTH), _varint(sum(map(len, inner))), *inner]
            kept = end
    pieces.append(view[kept:])
    return pieces, changed


def _fields(view: memoryview) -> Iterator[tuple[int, int, int, int, int]]:
    """Number and wire type of each field, where it begins, where its value does, and where that ends.

    Raises ValueError for what is no protobuf message.
    """
    position, size = 0, len(view)
    while position < size:
        begin = position
        tag, position = _read_varint(view, position)
        kind, value = tag & 7, position
        if kind == _VARINT:
            _, position = _read_varint(view, position)
        elif kind == _LENGTH:
            length, value = _read_varint(view, position)
            position = value + length
        elif kind in (_FIXED32, _FIXED64):
            position += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if position > size:
            raise ValueError("a field reaches over the end")
        yield tag >> 3, kind, begin, value, position


def _read_varint(view: memoryview, position: int) -> tuple[int, int]:
    number = shift = 0
    while shift < 64:
        if position >= len(view):
            raise ValueError("a number reaches over the end")
        byte = view[position]
        number |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return number, position
        shift += 7
    raise ValueError("a number of more than 64 bits")


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)
