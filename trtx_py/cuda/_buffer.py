"""Memory on the device, and page-locked memory on the host."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .._arguments import checked_int, checked_shape
from .._errors import InvalidArgumentError, ShapeError
from .._resource import Resource
from .._types import Array, Shape
from ._device import Device, Releases, checked_device, checked_peer
from ._mark import Uses
from ._stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Self


def _checked_dtype(dtype: Any) -> np.dtype[Any]:
    """``dtype`` as a numpy dtype whose items are plain bytes: the address of a Python object means nothing elsewhere.

    Raises:
        InvalidArgumentError: not a dtype, or items that hold Python objects, or have no size of their own.
    """
    try:
        kind: np.dtype[Any] = np.dtype(dtype)
    except Exception as error:  # numpy raises TypeError, ValueError and SyntaxError, and runs code of the caller's
        raise InvalidArgumentError(f"dtype is {dtype!r}: {error}; expected a numpy dtype such as 'float32'") from error
    if kind.hasobject:
        raise InvalidArgumentError(f"dtype {kind} holds Python objects; a buffer holds plain bytes: use a number dtype")
    if not kind.itemsize or kind.subdtype is not None:
        # numpy makes S1 of S, and more dimensions of a subarray: the array would not be what was measured.
        raise InvalidArgumentError(f"dtype {kind!r} has no fixed item; expected one such as 'float32' or 'S8'")
    return kind


def _measured(shape: Any, dtype: Any) -> tuple[Shape, np.dtype[Any], int]:
    """Shape, dtype and the bytes that both need, before numpy sees them: its own product wraps around."""
    wanted, kind = checked_shape(shape, "shape"), _checked_dtype(dtype)
    if math.prod(max(dim, 1) for dim in wanted) * kind.itemsize > sys.maxsize:  # numpy counts an empty axis as one
        raise ShapeError(f"shape {wanted} of {kind} needs more bytes than an array can have ({sys.maxsize})")
    return wanted, kind, math.prod(wanted) * kind.itemsize


class _Buffer(Resource):
    """What device and pinned memory have in common."""

    _device: Device
    _address: int
    _nbytes: int
    _uses: Uses

    @classmethod
    def _allocated(
        cls, device: Device, nbytes: int, allocate: Callable[[int, str], int], free: Callable[[int, int], None]
    ) -> Self:
        buffer = cls.__new__(cls)
        with buffer._opening(device) as handle:
            releases = Releases(device._access)
            with device.current():
                address = allocate(nbytes, str(handle))
                releases.add(lambda: free(address, nbytes))
                handle.release = releases
            buffer._device, buffer._address, buffer._nbytes = device, address, nbytes
            buffer._uses = Uses(handle)
        return buffer

    @property
    def address(self) -> int:
        """CUdeviceptr or host address as an integer, valid while this object is open."""
        self._handle.require_open()
        return self._address

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self._nbytes

    @property
    def device(self) -> Device:
        """The device that the memory is on, or pinned for."""
        return self._device


class DeviceBuffer(_Buffer):
    """Device memory. Made by ``device.allocate(nbytes)``.

    Source: cuMemAlloc
    """

    def __init__(self) -> None:
        self._refuse_construction("device.allocate(nbytes) or DeviceBuffer.from_handle(device, address, ...)")

    @classmethod
    def _create(cls, device: Device, nbytes: int) -> Self:
        memory = device._access.memory
        buffer = cls._allocated(
            device, nbytes, lambda n, owner: memory.allocate_device(n, owner=owner), memory.free_device
        )
        buffer._handle.device_bytes = nbytes
        return buffer

    @classmethod
    def from_handle(cls, device: Device, address: int, nbytes: int, *, owner: object) -> Self:
        """Borrow device memory that something else allocated.

        Args:
            address: CUdeviceptr as an integer.
            nbytes: bytes that may be used from there.
            owner: kept alive as long as this object is open, for example a torch tensor.
        Raises:
            InvalidArgumentError: not a Device, a null address or a negative size.
        """
        device = checked_device(device)
        address = checked_int(address, "address", minimum=1)
        nbytes = checked_int(nbytes, "nbytes", minimum=0)
        buffer = cls.__new__(cls)
        with buffer._opening(device, name="borrowed") as handle:
            buffer._device, buffer._address, buffer._nbytes = device, address, nbytes
            buffer._uses = Uses(handle)
            handle.keeps = owner
        return buffer

    def copy_from_host(self, array: npt.ArrayLike, stream: Stream) -> None:
        """Copy a host array to the start of this memory and wait until ``stream`` has done it.

        Raises:
            ShapeError: the array has more bytes than the buffer.
            InvalidArgumentError: not an array, Python objects in it, or a stream of another device.
        Source: cuMemcpyHtoDAsync, cuStreamSynchronize
        """
        stream = checked_peer(stream, Stream, self._device)
        try:
            host = np.ascontiguousarray(array)
        except Exception as error:  # ragged lists, and whatever the caller's own __array__ raises
            raise InvalidArgumentError(
                f"numpy cannot make an array of a {type(array).__name__}: {error}; expected an array of numbers"
            ) from error
        if host.dtype.itemsize:
            _checked_dtype(host.dtype)
        with self._handle.lend("a copy"), stream._handle.lend("a copy"), self._device.current():
            self._check_size(host.nbytes, "array")
            if host.nbytes:
                driver = self._device._driver
                driver.cuMemcpyHtoDAsync(self._address, host.ctypes.data, host.nbytes, stream._handle_value)
                driver.cuStreamSynchronize(stream._handle_value)

    def copy_to_host(self, shape: tuple[int, ...], dtype: npt.DTypeLike, stream: Stream) -> Array:
        """A new array from the start of this memory, copied behind everything enqueued on ``stream``; waits for it.

        Raises:
            ShapeError: shape and dtype need more bytes than the buffer has.
            InvalidArgumentError: a dtype that is none or holds Python objects, or a stream of another device.
        Source: cuMemcpyDtoHAsync, cuStreamSynchronize
        """
        stream = checked_peer(stream, Stream, self._device)
        wanted, kind, need = _measured(shape, dtype)
        with self._handle.lend("a copy"), stream._handle.lend("a copy"), self._device.current():
            self._check_size(need, f"shape {wanted} of {kind}")
            host = np.empty(wanted, kind)
            if host.nbytes:
                driver = self._device._driver
                driver.cuMemcpyDtoHAsync(host.ctypes.data, self._address, host.nbytes, stream._handle_value)
                driver.cuStreamSynchronize(stream._handle_value)
        return host

    def _check_size(self, need: int, what: str) -> None:
        if need > self._nbytes:
            raise ShapeError(f"{what} has {need} bytes, {self._handle} has {self._nbytes}; allocate more")


class PinnedBuffer(_Buffer):
    """Page-locked host memory. Made by ``device.allocate_pinned(nbytes)``.

    Source: cuMemHostAlloc
    """

    def __init__(self) -> None:
        self._refuse_construction("device.allocate_pinned(nbytes)")

    @classmethod
    def _create(cls, device: Device, nbytes: int) -> Self:
        memory = device._access.memory
        buffer = cls._allocated(
            device, nbytes, lambda n, owner: memory.allocate_pinned(n, owner=owner), memory.free_pinned
        )
        buffer._handle.host_bytes = nbytes
        return buffer

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """A numpy view of the start of this memory. The caller must drop it before closing the buffer.

        Raises:
            ShapeError: shape and dtype need more bytes than the buffer has.
            InvalidArgumentError: a dtype that is none or holds Python objects.
        """
        self._handle.require_open()
        wanted, kind, need = _measured(shape, dtype)
        if need > self._nbytes:
            raise ShapeError(f"shape {wanted} of {kind} has {need} bytes, {self._handle} has {self._nbytes}")
        return pinned_view(self.address, self._nbytes)[:need].view(kind).reshape(wanted)


def pinned_view(address: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """The bytes at a host address as an array that owns nothing."""
    memory: Any = (ctypes.c_uint8 * nbytes).from_address(address)
    view: npt.NDArray[np.uint8] = np.frombuffer(memory, dtype=np.uint8)
    return view
