"""What a model file is, told by its content, and by its name where content cannot tell."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from typing import BinaryIO

from .._arguments import checked_path
from .._errors import ConversionError, InvalidArgumentError
from .._plain_file import open_plain
from .._plan import looks_like_plan

ModelSource = str | os.PathLike[str] | bytes | bytearray | memoryview

#: Every format that is told apart, in words.
FORMATS = {
    "onnx": "an ONNX model",
    "plan": "a TensorRT plan",
    "tf-graph": "a frozen TensorFlow graph",
    "saved-model": "a TensorFlow SavedModel",
    "keras": "a Keras model",
    "keras-h5": "a Keras model in HDF5",
    "tflite": "a TensorFlow Lite model",
    "torch-pickle": "a pickle of PyTorch",
    "torchscript": "a TorchScript program",
    "torch-export": "a program of torch.export",
    "safetensors": "weights in safetensors",
    "torch-module": "a PyTorch module, as package.module:factory",
}

#: What a name promises. One that promises several things keeps its word with any of them.
_SUFFIXES: dict[str, tuple[str, ...]] = {
    ".onnx": ("onnx",),
    ".pb": ("tf-graph", "saved-model"),
    ".keras": ("keras",),
    ".h5": ("keras-h5",),
    ".hdf5": ("keras-h5",),
    ".tflite": ("tflite",),
    ".pt": ("torch-pickle", "torchscript", "torch-export"),
    ".pth": ("torch-pickle", "torchscript", "torch-export"),
    ".torchscript": ("torchscript",),
    ".pt2": ("torch-export",),
    ".safetensors": ("safetensors",),
    ".engine": ("plan",),
    ".plan": ("plan",),
    ".trt": ("plan",),
}

_LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before version 1.6
_MAX_HEADER = 1 << 30
#: Graphs of TensorFlow have a field for each node; what comes after so many need not be looked at to tell the format.
_MAX_FIELDS = 1 << 18


@dataclass(frozen=True)
class Detected:
    """What a source is.

    Attributes:
        format: a key of FORMATS, or a format that was registered.
        note: where name and content disagree, what was found; empty otherwise.
    """

    format: str
    note: str = ""


def detect(source: ModelSource) -> Detected:
    """Which format ``source`` has.

    Raises:
        ConversionError: it is none of them, is cut short, or is not what its name says.
        InvalidArgumentError: it cannot be read.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        content = memoryview(source)
        found = _of_content(BytesIO(content if content.c_contiguous else bytes(content)), content.nbytes)
        if found is None:
            raise _unknown("the model (bytes)", start_of(source, 16), ())
        return Detected(found)
    path = checked_path(source, "source", "a path, bytes or package.module:factory")
    if not os.path.exists(path) and is_module_name(path):
        return Detected("torch-module")
    if os.path.isdir(path):
        if any(os.path.isfile(os.path.join(path, name)) for name in ("saved_model.pb", "saved_model.pbtxt")):
            return Detected("saved-model")
        raise ConversionError(
            f"{path!r} is a folder without saved_model.pb; expected a TensorFlow SavedModel, or the path of a file",
            format=None, step="detect", cause="damaged",
        )  # fmt: skip
    promised = _SUFFIXES.get(os.path.splitext(path)[1].lower(), ())
    try:
        with open_plain(path) as file:
            start = file.read(16)
            size = os.fstat(file.fileno()).st_size
            file.seek(0)
            found = _of_content(file, size)
    except OSError as error:
        raise InvalidArgumentError(f"source {path!r} cannot be read: {error.strerror}") from error
    if found is None:
        raise _unknown(repr(path), start, promised, size)
    if promised and found not in promised:
        return Detected(found, f"{os.path.basename(path)} is named as {FORMATS[promised[0]]} and is {FORMATS[found]}")
    return Detected(found)


def start_of(source: bytes | bytearray | memoryview, nbytes: int) -> bytes:
    """The first bytes, in whatever pieces they lie."""
    content = memoryview(source)
    return bytes(content.cast("B")[:nbytes]) if content.c_contiguous else bytes(content)[:nbytes]


def is_module_name(text: str) -> bool:
    """True for ``package.module:factory``."""
    module, colon, factory = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *factory.split(".")])


def _unknown(name: str, start: bytes, promised: tuple[str, ...], size: int | None = None) -> ConversionError:
    if not start:
        return ConversionError(
            f"{name} is empty; expected a model", format=promised[0] if promised else None, step="detect",
            cause="damaged",
        )  # fmt: skip
    if promised:
        length = "" if size is None else f" ({size} bytes, which begin with {start!r})"
        wanted = " or ".join(FORMATS[one] for one in promised)
        return ConversionError(
            f"{name} is named as {wanted}, and its content{length} is none: it is cut short, damaged or misnamed; "
            "copy or export it again",
            format=promised[0], step="detect", cause="damaged",
        )  # fmt: skip
    return ConversionError(
        f"{name} begins with {start!r}, which is no model that is known here; expected one of "
        f"{', '.join(FORMATS.values())}; formats of your own are added with trtx_py.convert.register",
        format=None, step="detect", cause="damaged",
    )  # fmt: skip


def _of_content(file: BinaryIO, size: int) -> str | None:
    start = file.read(64)
    if looks_like_plan(start):
        return "plan"
    if start[4:8] == b"TFL3":
        return "tflite"
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return "keras-h5"
    if start.startswith(_LEGACY_TORCH):
        return "torch-pickle"
    if start.startswith(b"PK"):
        return _of_archive(file)
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and 2 <= header <= min(_MAX_HEADER, size - 8):
        return "safetensors"
    return _of_protobuf(file, size)


def _of_archive(file: BinaryIO) -> str | None:
    file.seek(0)
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    inner = {name.partition("/")[2] for name in names}
    if {"config.json", "metadata.json"} <= set(names):
        return "keras"
    if "serialized_exported_program.json" in {*names, *inner} or any(name.startswith("models/") for name in inner):
        return "torch-export"
    if "data.pkl" in inner:
        return "torchscript" if "constants.pkl" in inner else "torch-pickle"
    return None


def _of_protobuf(file: BinaryIO, size: int) -> str | None:
    """ONNX, a frozen graph or a SavedModel: by numbers and kinds of the outermost fields, which must fill the file."""
    kinds: dict[int, int] = {}
    for number, kind in islice(_fields(file, size), _MAX_FIELDS):
        if number is None or kinds.setdefault(number, kind) != kind:
            return None
    if kinds.get(7) == 2 and (kinds.get(1, 0) == 0) and set(kinds) <= {1, 2, 3, 4, 5, 6, 7, 8, 14, 20, 25, 26}:
        return "onnx"
    if kinds.get(1) == 2 and set(kinds) <= {1, 2, 3, 4, 5}:
        return "tf-graph"
    if kinds.get(1) == 0 and kinds.get(2) == 2 and set(kinds) == {1, 2}:
        return "saved-model"
    return None


def _fields(file: BinaryIO, size: int) -> Iterator[tuple[int | None, int]]:
    """Number and wire type of each outermost field; (None, 0) where the bytes are no message."""
    position = 0
    while position < size:
        file.seek(position)
        head = file.read(20)
        tag, used = _varint(head, 0)
        if tag is None:
            yield None, 0
            return
        kind = tag & 7
        value, after = _varint(head, used) if kind in (0, 2) else (0, used)
        length = {0: 0, 1: 8, 2: value, 5: 4}.get(kind)
        if value is None or length is None or not tag >> 3 or position + after + length > size:
            yield None, 0
            return
        yield tag >> 3, kind
        position += after + length


def _varint(data: bytes, start: int) -> tuple[int | None, int]:
    value = 0
    for index, byte in enumerate(data[start : start + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, start + index + 1
    return None, start
