"""Memory on the device, and page-locked memory on the host."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .._arguments import checked_int, checked_shape
from .._errors import InvalidArgumentError, ShapeError
from .._resource import Resource
from .._types import Array
from ._device import Device, Releases
from ._stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Self


class DeviceBuffer(Resource):
    """Device memory. Made by ``device.allocate(nbytes)``.

    Source: cuMemAlloc
    """

    _device: Device
    _address: int
    _nbytes: int

    def __init__(self) -> None:
        self._refuse_construction("device.allocate(nbytes) or DeviceBuffer.from_handle(device, address, ...)")

    @classmethod
    def _create(cls, device: Device, nbytes: int) -> Self:
        buffer = cls.__new__(cls)
        with buffer._opening(device) as handle:
            memory = device._access.memory
            releases = Releases(device._access)
            with device.current():
                address = memory.allocate_device(nbytes)
                releases.add(lambda: memory.free_device(address, nbytes))
                handle.release = releases
            handle.device_bytes = nbytes
            buffer._device, buffer._address, buffer._nbytes = device, address, nbytes
        return buffer

    @classmethod
    def from_handle(cls, device: Device, address: int, nbytes: int, *, owner: object) -> Self:
        """Borrow device memory that something else allocated.

        Args:
            address: CUdeviceptr as an integer.
            nbytes: bytes that may be used from there.
            owner: kept alive as long as this object is open, for example a torch tensor.
        """
        address = checked_int(address, "address", minimum=1)
        nbytes = checked_int(nbytes, "nbytes", minimum=0)
        buffer = cls.__new__(cls)
        with buffer._opening(device, name="borrowed") as handle:
            buffer._device, buffer._address, buffer._nbytes = device, address, nbytes
            handle.keeps = owner
        return buffer

    @property
    def address(self) -> int:
        """The CUdeviceptr as an integer, valid while this object is open."""
        self._handle.require_open()
        return self._address

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self._nbytes

    @property
    def device(self) -> Device:
        """The device that the memory is on."""
        return self._device

    def copy_from_host(self, array: npt.ArrayLike, stream: Stream) -> None:
        """Copy a host array to the start of this memory and wait until ``stream`` has done it.

        Raises:
            ShapeError: the array has more bytes than the buffer.
        Source: cuMemcpyHtoDAsync, cuStreamSynchronize
        """
        host = np.ascontiguousarray(array)
        with self._handle.lend("a copy"), stream._handle.lend("a copy"), self._device.current():
            self._check_size(host, "array")
            if host.nbytes:
                driver = self._device._driver
                driver.cuMemcpyHtoDAsync(self._address, host.ctypes.data, host.nbytes, stream._handle_value)
                driver.cuStreamSynchronize(stream._handle_value)

    def copy_to_host(self, shape: tuple[int, ...], dtype: npt.DTypeLike, stream: Stream) -> Array:
        """A new array from the start of this memory, copied behind everything enqueued on ``stream``; waits for it.

        Raises:
            ShapeError: shape and dtype need more bytes than the buffer has.
        Source: cuMemcpyDtoHAsync, cuStreamSynchronize
        """
        host = np.empty(checked_shape(shape, "shape"), dtype)
        with self._handle.lend("a copy"), stream._handle.lend("a copy"), self._device.current():
            self._check_size(host, f"shape {host.shape} of {host.dtype}")
            if host.nbytes:
                driver = self._device._driver
                driver.cuMemcpyDtoHAsync(host.ctypes.data, self._address, host.nbytes, stream._handle_value)
                driver.cuStreamSynchronize(stream._handle_value)
        return host

    def _check_size(self, host: Array, what: str) -> None:
        if host.nbytes > self._nbytes:
            raise ShapeError(f"{what} has {host.nbytes} bytes, {self._handle} has {self._nbytes}; allocate more")


class PinnedBuffer(Resource):
    """Page-locked host memory. Made by ``device.allocate_pinned(nbytes)``.

    Source: cuMemHostAlloc
    """

    _device: Device
    _address: int
    _nbytes: int

    def __init__(self) -> None:
        self._refuse_construction("device.allocate_pinned(nbytes)")

    @classmethod
    def _create(cls, device: Device, nbytes: int) -> Self:
        buffer = cls.__new__(cls)
        with buffer._opening(device) as handle:
            memory = device._access.memory
            releases = Releases(device._access)
            with device.current():
                address = memory.allocate_pinned(nbytes)
                releases.add(lambda: memory.free_pinned(address, nbytes))
                handle.release = releases
            handle.host_bytes = nbytes
            buffer._device, buffer._address, buffer._nbytes = device, address, nbytes
        return buffer

    @property
    def address(self) -> int:
        """Host address as an integer, valid while this object is open."""
        self._handle.require_open()
        return self._address

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self._nbytes

    @property
    def device(self) -> Device:
        """The device that the memory is pinned for."""
        return self._device

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """A numpy view of the start of this memory. The caller must drop it before closing the buffer.

        Raises:
            ShapeError: shape and dtype need more bytes than the buffer has.
        """
        self._handle.require_open()
        wanted = checked_shape(shape, "shape")
        kind = np.dtype(dtype)
        if kind.hasobject:
            raise InvalidArgumentError(f"dtype {kind} holds Python objects; a buffer holds plain bytes")
        view = pinned_view(self.address, self._nbytes)
        count = int(np.prod(wanted, dtype=np.int64))
        if count * kind.itemsize > self._nbytes:
            raise ShapeError(
                f"shape {wanted} of {kind} needs {count * kind.itemsize} bytes, {self._handle} has {self._nbytes}"
            )
        return view[: count * kind.itemsize].view(kind).reshape(wanted)


def pinned_view(address: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """The bytes at a host address as an array that owns nothing."""
    memory: Any = (ctypes.c_uint8 * nbytes).from_address(address)
    view: npt.NDArray[np.uint8] = np.frombuffer(memory, dtype=np.uint8)
    return view
