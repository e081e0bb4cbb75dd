"""Weights on a coarser grid: scales per channel or per block, and the numbers themselves."""

from __future__ import annotations

import numpy as np

from .._types import Array


def channel_scales(values: Array, axis: int | None, limit: float) -> Array:
    """Symmetric scales of a weight, float32: one for each entry of ``axis`` [n], or a scalar where it is None.

    The largest magnitude of a channel becomes ``limit``. A channel of zeros gets scale 1.
    """
    magnitudes = np.abs(values.astype(np.float32))
    if axis is None:
        largest = magnitudes.max(initial=0.0)
    else:
        largest = magnitudes.max(axis=tuple(i for i in range(values.ndim) if i != axis), initial=0.0)
    return _scales(np.asarray(largest), limit)


def block_scales(values: Array, axis: int, block: int, limit: float) -> Array:
    """Symmetric scales of a matrix [rows, columns], float32: one for each ``block`` entries along ``axis``, which it
    must divide."""
    shape = list(values.shape)
    shape[axis : axis + 1] = [shape[axis] // block, block]
    return _scales(np.abs(values.astype(np.float32)).reshape(shape).max(axis=axis + 1), limit)


def _scales(largest: Array, limit: float) -> Array:
    scales = largest.astype(np.float32) / np.float32(limit)
    # The smallest magnitudes have no scale that is a normal number; they are zero for every purpose.
    result: Array = np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales).astype(np.float32)
    return result


def spread(scales: Array, shape: tuple[int, ...], axis: int | None, block: int | None) -> Array:
    """``scales`` in a shape that broadcasts against a weight of ``shape``."""
    if axis is None:
        return scales
    if block is not None:
        return np.repeat(scales, block, axis)
    return scales.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def quantized(values: Array, scales: Array, axis: int | None, block: int | None, word: str) -> Array:
    """``values`` divided by their scales and rounded to the type of ``word``: int8, float8_e4m3fn or int4."""
    import ml_dtypes

    ratio = values.astype(np.float32) / spread(scales, values.shape, axis, block)
    if word == "fp8":
        narrow: Array = np.clip(ratio, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        return narrow
    if word == "int8":
        return np.clip(np.rint(ratio), -127, 127).astype(np.int8)
    small: Array = np.clip(np.rint(ratio), -7, 7).astype(np.int8).astype(ml_dtypes.int4)
    return small
