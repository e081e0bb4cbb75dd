"""Element types by the numbers of the C ABI, which are WebNN's, and conversion between a type and what carries it."""

from __future__ import annotations

import enum
import math
from typing import Any

import numpy as np

from .._types import Array, DataType, Shape
from ._status import Status, StatusError


class DType(enum.IntEnum):
    """As in trtxpy.h."""

    FLOAT32 = 0
    FLOAT16 = 1
    INT32 = 2
    UINT32 = 3
    INT64 = 4
    UINT64 = 5
    INT8 = 6
    UINT8 = 7
    INT4 = 8
    UINT4 = 9
    BOOL = 16
    BFLOAT16 = 17
    FLOAT8 = 18

    @property
    def packed(self) -> bool:
        """Two elements to a byte, the first in the low half; an odd number leaves the last high half 0."""
        return self in (DType.INT4, DType.UINT4)

    @property
    def numpy(self) -> np.dtype[Any]:
        """The dtype of an array of such elements; int8 and uint8 for the 4-bit types, which numpy has not."""
        if self in _ENGINE_TYPES:
            return _ENGINE_TYPES[self].numpy
        return np.dtype(_NUMPY_NAMES.get(self, self.name.lower()))

    def nbytes(self, shape: Shape) -> int:
        """Bytes of a tensor."""
        count = math.prod(shape)
        return (count + 1) // 2 if self.packed else count * self.numpy.itemsize

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the greatest number; of integers and bool."""
        if self is DType.BOOL:
            return 0, 1
        if self.packed:
            return (-8, 7) if self is DType.INT4 else (0, 15)
        info = np.iinfo(self.numpy)
        return int(info.min), int(info.max)


_NUMPY_NAMES = {DType.INT4: "int8", DType.UINT4: "uint8"}
_ENGINE_TYPES = {
    DType.FLOAT32: DataType.FLOAT, DType.FLOAT16: DataType.HALF, DType.INT32: DataType.INT32,
    DType.INT64: DataType.INT64, DType.INT8: DataType.INT8, DType.UINT8: DataType.UINT8, DType.BOOL: DataType.BOOL,
    DType.BFLOAT16: DataType.BF16, DType.FLOAT8: DataType.FP8,
}  # fmt: skip
_OF_ENGINE = {engine: dtype for dtype, engine in _ENGINE_TYPES.items()}
#: What an integer type that TensorRT lacks is computed in.
CARRIERS = {
    DType.UINT32: DType.INT64, DType.UINT64: DType.INT64, DType.INT8: DType.INT32, DType.UINT8: DType.INT32,
    DType.INT4: DType.INT32, DType.UINT4: DType.INT32,
}  # fmt: skip
#: Of these: the types that no TensorRT has for inputs and outputs.
ALIEN = frozenset({DType.UINT32, DType.UINT64, DType.INT4, DType.UINT4})


def of_engine(dtype: DataType, name: str) -> DType:
    """The number of an engine's element type. Raises StatusError (UNSUPPORTED) for one that the C ABI has not.

    Of 4-bit types neither it nor the engine has arrays: they are carried.
    """
    try:
        return _OF_ENGINE[dtype]
    except KeyError:
        known = ", ".join(_ENGINE_TYPES[each].value for each in _ENGINE_TYPES)
        raise StatusError(
            Status.UNSUPPORTED,
            f"tensor {name!r} is {dtype.value}; inputs and outputs can be {known}: cast it in the model",
        ) from None


def checked_dtype(number: int, name: str) -> DType:
    """Raises StatusError (INVALID_ARGUMENT) if there is no type of that number."""
    try:
        return DType(number)
    except ValueError:
        raise StatusError(Status.INVALID_ARGUMENT, f"{name!r}: there is no data type {number}") from None


def unpacked(content: memoryview, dtype: DType, shape: Shape, name: str) -> Array:
    """The elements of a tensor, a view where possible. Raises StatusError (BUFFER_SIZE)."""
    wanted = dtype.nbytes(shape)
    if content.nbytes != wanted:
        raise StatusError(
            Status.BUFFER_SIZE, f"{name!r} has {content.nbytes} bytes; {dtype.name.lower()} {shape} needs {wanted}"
        )
    if not wanted:
        return np.empty(shape, dtype.numpy)
    flat = np.frombuffer(content, np.uint8)
    if dtype is DType.BOOL:
        flags: Array = flat != 0
        return flags.reshape(shape)
    if not dtype.packed:
        return flat.view(dtype.numpy).reshape(shape)
    halves: Array = np.stack([flat & 15, flat >> 4], axis=-1).reshape(-1)[: math.prod(shape)].astype(dtype.numpy)
    if dtype is DType.INT4:
        halves[halves >= 8] -= 16
    return halves.reshape(shape)


def packed(array: Array, dtype: DType, name: str) -> Array:
    """``array``, as the engine has it, as C-contiguous elements of ``dtype``; 4-bit types two to a byte.

    Raises StatusError (RANGE) if a number does not fit.
    """
    values = converted(array, dtype, name)
    if not dtype.packed:
        return np.array(values, order="C", copy=None)
    flat = values.reshape(-1).view(np.uint8) & 15
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    both: Array = flat[0::2] | (flat[1::2] << 4)
    return both


def converted(array: Array, dtype: DType, name: str) -> Array:
    """The same numbers in another integer type. Raises StatusError (RANGE) if one does not fit."""
    kind = dtype.numpy
    if array.dtype == kind and not dtype.packed:
        return array
    numbers = array.view(np.uint8) if array.dtype == np.bool_ else array
    low, high = dtype.limits
    info = np.iinfo(numbers.dtype)
    for beyond, needed in (
        (numbers < max(low, info.min), info.min < low),
        (numbers > min(high, info.max), info.max > high),
    ):
        if needed and beyond.any():
            index = int(np.flatnonzero(beyond.reshape(-1))[0])
            raise StatusError(
                Status.RANGE,
                f"{name}: element {index} is {int(numbers.reshape(-1)[index])}, which {dtype.name.lower()} cannot hold",
            )
    return numbers.astype(kind)
