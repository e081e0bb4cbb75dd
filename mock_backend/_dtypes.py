"""ONNX element types, as TensorRT's ONNX parser reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trtx_py._types import Array, DataType, Shape

if TYPE_CHECKING:
    import onnx

__all__ = ["CARRIED", "Dim", "from_bytes", "onnx_type_name", "tensor_dims", "to_bytes", "trt_type"]

#: A static dimension, the name of a dynamic one, or None for one without a name.
Dim = int | str | None

_BY_NAME = {
    "FLOAT": DataType.FLOAT, "FLOAT16": DataType.HALF, "BFLOAT16": DataType.BF16, "INT8": DataType.INT8,
    "INT32": DataType.INT32, "INT64": DataType.INT64, "BOOL": DataType.BOOL, "UINT8": DataType.UINT8,
    "FLOAT8E4M3FN": DataType.FP8, "INT4": DataType.INT4, "FLOAT4E2M1": DataType.FP4,
    # measured with tensorrt-rtx 1.7: a DOUBLE tensor is imported as FLOAT, and its host arrays are float32
    "DOUBLE": DataType.FLOAT,
}  # fmt: skip

#: I/O types that numpy-facing runtimes do not take as they are, with the ONNX type that carries them losslessly.
CARRIED = {
    DataType.BF16: "FLOAT", DataType.FP8: "FLOAT", DataType.FP4: "FLOAT",
    DataType.INT4: "INT8",
}  # fmt: skip


def onnx_type_name(elem_type: int) -> str:
    """The enumerator of a TensorProto.DataType, or its number where onnx does not know it."""
    import onnx

    try:
        return str(onnx.TensorProto.DataType.Name(elem_type))
    except ValueError:
        return str(elem_type)


def trt_type(elem_type: int) -> DataType | None:
    """TensorRT's type for an ONNX element type, None if it has none."""
    return _BY_NAME.get(onnx_type_name(elem_type))


def tensor_dims(tensor: onnx.TypeProto.Tensor) -> tuple[Dim, ...] | None:
    """Dimensions as declared, None for a tensor of unknown rank. A negative value counts as nameless."""
    if not tensor.HasField("shape"):
        return None
    dims: list[Dim] = []
    for dim in tensor.shape.dim:
        if dim.HasField("dim_value") and dim.dim_value >= 0:
            dims.append(dim.dim_value)
        else:
            dims.append(dim.dim_param or None)
    return tuple(dims)


def from_bytes(raw: Array, dtype: DataType, shape: Shape) -> Array:
    """A new array from device or host bytes; 4-bit elements are unpacked, low nibble first."""
    if dtype.bits == 4:
        nibbles = np.empty(raw.size * 2, np.uint8)
        nibbles[0::2] = raw & 0x0F
        nibbles[1::2] = raw >> 4
        count = int(np.prod(shape, dtype=np.int64))
        packed = nibbles[:count]
        if dtype is DataType.INT4:
            signed = packed.astype(np.int8)
            return np.where(signed > 7, signed - 16, signed).astype(dtype.numpy).reshape(shape)
        codes: Array = packed.view(dtype.numpy).reshape(shape)
        return codes
    if dtype is DataType.BOOL:
        flags: Array = (raw != 0).reshape(shape)
        return flags
    return np.frombuffer(raw.tobytes(), dtype.numpy).reshape(shape)


def to_bytes(array: Array, dtype: DataType) -> Array:
    """The bytes of ``array`` as they lie in device memory."""
    flat: Array = np.ascontiguousarray(array).reshape(-1)
    nibbles: Array
    if dtype.bits == 4:
        if dtype is DataType.INT4:
            nibbles = (flat.astype(np.int8) & 0x0F).astype(np.uint8)
        else:
            nibbles = flat.astype(dtype.numpy).view(np.uint8) & 0x0F
        if nibbles.size % 2:
            nibbles = np.append(nibbles, np.uint8(0))
        return (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8)
    return flat.astype(dtype.numpy, copy=False).view(np.uint8)
