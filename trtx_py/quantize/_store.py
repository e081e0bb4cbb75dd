"""Models in and out: read from a path, bytes or an OnnxSource, and handed on within protobuf's 2 GiB."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .._errors import PrecisionError
from .._onnx_source import OnnxSource, load_onnx
from .._types import DataType, TensorInfo, TensorMode

if TYPE_CHECKING:
    import onnx

#: A protobuf message ends at 2 GiB; the graph around the weights needs some of them.
MAX_INLINE = (2 << 30) - (64 << 20)

#: A model as callers give it.
ModelSource = str | os.PathLike[str] | bytes | bytearray | memoryview


def load_model(source: ModelSource) -> tuple[onnx.ModelProto, str]:
    """The model with all its weights, and the SHA-256 over both. Raises ParserError, InvalidArgumentError."""
    loaded = load_onnx(source, None)
    return model_of(loaded), loaded.sha256


def model_of(source: OnnxSource) -> onnx.ModelProto:
    """A source that was read before, with its weights in memory."""
    import onnx

    model = onnx.ModelProto()
    model.ParseFromString(source.model)
    if source.directory is not None:
        onnx.load_external_data_for_model(model, source.directory)
    return model


@contextmanager
def stored(model: onnx.ModelProto) -> Iterator[tuple[bytes, str | None]]:
    """The model serialized, and the folder of its external data: None, or for a model beyond 2 GiB a temporary one,
    which is gone when the block is left.

    Raises PrecisionError if that folder cannot be written.
    """
    import onnx

    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= MAX_INLINE:
        yield model.SerializeToString(), None
        return
    with tempfile.TemporaryDirectory(prefix="trtx-model-") as folder:
        path = os.path.join(folder, "model.onnx")
        try:
            # It moves the weights out of the message that it is given, which nobody reads again.
            onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
            with open(path, "rb") as file:
                blob = file.read()
        except OSError as error:
            raise PrecisionError(
                f"the converted model exceeds 2 GiB and could not be written to {folder!r}: {error.strerror}; set "
                "TMPDIR to a folder with room for it"
            ) from error
        yield blob, folder


def inputs_of(model: onnx.ModelProto) -> tuple[TensorInfo, ...]:
    """The model's inputs that are no weights; -1 for a dynamic dimension. Raises PrecisionError for what TensorRT has
    not: sequences, strings, float64."""
    import onnx

    weights = {tensor.name for tensor in model.graph.initializer}
    found = []
    for value in model.graph.input:
        if value.name in weights:
            continue
        tensor = value.type.tensor_type
        name = onnx.TensorProto.DataType.Name(tensor.elem_type)
        dtype = _dtype(name)
        if dtype is None:
            raise PrecisionError(f"input {value.name!r} has ONNX type {name}, which TensorRT has not; cast it outside")
        shape = tuple(int(d.dim_value) if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
        found.append(TensorInfo(value.name, TensorMode.INPUT, dtype, shape))
    return tuple(found)


def _dtype(name: str) -> DataType | None:
    other = {"FLOAT16": "HALF", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "FP8", "FLOAT4E2M1": "FP4"}
    known: Any = DataType.__members__.get(other.get(name, name))
    return known if isinstance(known, DataType) else None
