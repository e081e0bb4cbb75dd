"""Memory of the caller's, by address; and copies between host and device."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from .._types import Array, Shape
from ..cuda._buffer import DeviceBuffer, PinnedBuffer, pinned_view
from ..cuda._device import Device


def array_at(address: int, shape: Shape, dtype: np.dtype[Any]) -> Array:
    """The host memory there as an array; valid as long as the memory."""
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes:
        return np.empty(shape, dtype)
    return pinned_view(address, nbytes).view(dtype).reshape(shape)


def address_of(array: Array) -> int:
    """0 for no bytes."""
    return array.ctypes.data if array.nbytes else 0


def copy(device: Device, to: int, to_device: bool, source: int, source_device: bool, nbytes: int) -> None:
    """Between host and device, or on either; waits for it. Raises CudaError."""
    if not nbytes:
        return
    if not to_device and not source_device:
        ctypes.memmove(to, source, nbytes)
        return
    access = device._access
    driver = access.driver
    with device.current():
        stream = access.streams.take()
        try:
            if to_device and source_device:
                driver.cuMemcpyDtoDAsync(to, source, nbytes, stream)
            elif to_device:
                driver.cuMemcpyHtoDAsync(to, source, nbytes, stream)
            else:
                driver.cuMemcpyDtoHAsync(to, source, nbytes, stream)
            driver.cuStreamSynchronize(stream)
        finally:
            access.streams.give(stream)


def allocate(device: Device, nbytes: int, *, on_device: bool) -> DeviceBuffer | PinnedBuffer:
    """Zeroed memory. Raises MemoryBudgetError, CudaError."""
    if not on_device:
        pinned = device.allocate_pinned(nbytes)
        ctypes.memset(pinned.address, 0, nbytes)
        return pinned
    memory = device.allocate(nbytes)
    try:
        if nbytes:
            _clear(device, memory.address, nbytes)
    except BaseException:
        memory.close()
        raise
    return memory


def _clear(device: Device, address: int, nbytes: int) -> None:
    access = device._access
    with device.current():
        stream = access.streams.take()
        try:
            access.driver.cuMemsetD8Async(address, 0, nbytes, stream)
            access.driver.cuStreamSynchronize(stream)
        finally:
            access.streams.give(stream)
