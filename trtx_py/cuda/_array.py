"""Results that stay on the device: arrays that torch, cupy, jax and numba read where they lie."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import _native
from .._aio import run_shielded
from .._arguments import checked_int
from .._errors import BorrowedError, ClosedError, CudaError, DTypeError, InvalidArgumentError
from .._interop import DL_CUDA, LEGACY_DEFAULT_STREAM, dlpack_type
from .._resource import Handle, Loan, Resource, State, _process, opening
from .._types import Array, Shape
from ..backends.protocols import STICKY_CUDA_ERRORS
from ._buffer import _measured
from ._device import Device, DeviceAccess, Releases, checked_device, checked_peer
from ._mark import Mark
from ._stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Self

_NO_ORDERING = -1
_ARRAY = 0  # the array's own share of its memory; consumers' shares count from 1
_share_numbers = itertools.count(1)


class ExportError(InvalidArgumentError, BufferError):
    """BufferError is what the array API standard has DLPack producers raise."""


class Written(Mark):
    """The end of the work that writes device arrays, all of one request: for the host and for streams to wait for."""

    def __init__(self, access: DeviceAccess) -> None:
        super().__init__(access)
        self.stream = 0

    def record(self, stream: int) -> None:
        """Mark the present end of ``stream``, behind the work. To be called once, before any array knows this mark."""
        self.stream = stream
        super().record(stream)

    def before(self, stream: int) -> None:
        """Let what is enqueued on ``stream`` from now on wait for the work. The device must be current."""
        if stream != self.stream and not self.over():
            with self._lock:  # over() in another thread destroys the event
                if self._event:
                    self._access.driver.cuStreamWaitEvent(stream, self._event, 0)


class _ArrayHandle(Handle):
    """What is left of an array that nobody holds any more is no obstacle to closing its owner."""

    deserted = False
    memory: _Memory | None = None

    def blockers(self, root: Handle) -> list[str]:
        if self.deserted:
            return []
        if self is not root and self.memory is not None and self.memory.shared():
            return [f"{self.describe()}, in use through DLPack"]
        return super().blockers(root)


class _Memory:
    """Device memory and who shares it: the array itself and every DLPack consumer. Freed behind the last of them."""

    def __init__(self, device: Device, handle: _ArrayHandle, address: int, nbytes: int) -> None:
        self.device = device  # as long as anybody has a share, for what is released here is released on it
        self.access = device._access
        self.handle = handle
        self.address = address
        self.nbytes = nbytes
        self.written: Written | None = None
        self._shares = {_ARRAY}

    def share(self) -> _Share:
        number = next(_share_numbers)
        self._shares.add(number)
        return _Share(self, number)

    def shared(self) -> bool:
        """True if a DLPack consumer has a share."""
        return bool(self._shares - {_ARRAY})

    def leave(self, number: int) -> None:
        """Give a share back, on any thread, in the garbage collector too: takes no lock, frees nothing itself."""
        self._shares.discard(number)
        handle = self.handle  # after the discard: see _outlive
        if not self._shares and handle.state is State.OPEN:
            handle.deserted = True
            _process.graveyard.put(handle)

    def busy(self) -> str | None:
        if self.written is None or self.written.over():
            return None
        return "the inference that writes it is not finished"

    def drain(self) -> None:
        if self.written is not None:
            self.written.wait()

    def release(self) -> None:
        """The array's owner ends, or nobody is left. Consumers do not know of either: for them the memory goes on."""
        self._shares.discard(_ARRAY)
        self.handle.memory = None
        if self._shares:
            self._outlive()
        else:
            self._free()

    def _free(self) -> None:
        releases = Releases(self.access)
        releases.add(partial(self.access.memory.free_device, self.address, self.nbytes))
        releases()

    def _outlive(self) -> None:
        """Under a handle of its own, with the device's context retained once more."""
        driver, cu_device = self.access.driver, self.device._cu_device
        try:
            driver.cuDevicePrimaryCtxRetain(cu_device)
        except CudaError as error:
            if error.code in STICKY_CUDA_ERRORS:
                return  # the device is lost, and the memory with it
            raise
        orphan = _ArrayHandle(self.handle.kind, None, name="in use through DLPack")
        orphan.made_at, orphan.device_bytes = self.handle.made_at, self.nbytes

        def release() -> None:
            if self._shares:
                return  # the process ends: better not freed than freed while somebody reads it
            try:
                self._free()
            finally:
                driver.cuDevicePrimaryCtxRelease(cu_device)

        with opening(orphan):
            orphan.release = release
        self.handle = orphan
        # The last consumer may have left meanwhile. If leave() saw the handle from before, its share was gone by now.
        if not self._shares:
            orphan.deserted = True
            _process.graveyard.put(orphan)


class _Share:
    """What a DLPack capsule owns; goes with it, on whatever thread the consumer drops its tensor."""

    __slots__ = ("_memory", "_number")

    def __init__(self, memory: _Memory, number: int) -> None:
        self._memory = memory
        self._number = number

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._memory.leave(self._number)


class DeviceArray(Resource):
    """An array in device memory: the result of an inference that stays on the device.

    Other libraries take it without a copy through DLPack, as in ``torch.from_dlpack(array)``, which orders their
    stream behind the work that writes the array, or through ``__cuda_array_interface__``. It need not be closed: the
    memory is freed when the array and every DLPack consumer are gone and the work that writes it is over. ``aclose()``
    of a device or runtime closes its arrays; memory that DLPack consumers use stays until these let go.

    Source: cuMemAlloc
    """

    _device: Device
    _memory: _Memory
    _shape: Shape
    _dtype: np.dtype[Any]
    _let_go: bool

    def __init__(self) -> None:
        self._refuse_construction("infer(..., outputs on the device) or DeviceArray.from_host(device, array, stream)")

    @classmethod
    def _create(cls, device: Device, shape: Shape, dtype: np.dtype[Any]) -> Self:
        """Memory that nothing is written to yet; whoever enqueues the writing calls ``_written_by`` behind it."""
        array = cls.__new__(cls)
        access, nbytes = device._access, math.prod(shape) * dtype.itemsize
        handle = _ArrayHandle(cls.__name__, device._handle)
        with opening(handle):
            with access.current:
                address = access.memory.allocate_device(nbytes, owner=str(handle))
            memory = _Memory(device, handle, address, nbytes)
            handle.release, handle.busy, handle.drain = memory.release, memory.busy, memory.drain
            handle.memory = memory
            handle.device_bytes = nbytes
        array._handle, array._parent = handle, device
        array._device, array._memory, array._let_go = device, memory, False
        array._shape, array._dtype = shape, dtype
        return array

    def _written_by(self, work: Written) -> None:
        """``work`` has been recorded behind what writes this array; without it the array counts as written."""
        self._memory.written = work

    @classmethod
    def from_host(cls, device: Device, array: npt.ArrayLike, stream: Stream) -> Self:
        """A copy of a host array on ``device``, made on ``stream``, which is waited for.

        Raises:
            InvalidArgumentError: not an array, Python objects in it, or a stream of another device.
            CudaError: for example too little device memory.
        Source: cuMemcpyHtoDAsync, cuStreamSynchronize
        """
        stream = checked_peer(stream, Stream, checked_device(device))
        try:
            host = np.ascontiguousarray(array).reshape(np.shape(array))  # ascontiguousarray makes scalars 1-d
        except Exception as error:  # ragged lists, and whatever the caller's own __array__ raises
            raise InvalidArgumentError(
                f"numpy cannot make an array of a {type(array).__name__}: {error}; expected an array of numbers"
            ) from error
        shape, dtype, nbytes = _measured(host.shape, host.dtype)
        made = cls._create(device, shape, dtype)
        try:
            with made._handle.lend("a copy"), stream._handle.lend("a copy"), device.current():
                if nbytes:
                    driver = device._driver
                    driver.cuMemcpyHtoDAsync(made._memory.address, host.ctypes.data, nbytes, stream._handle_value)
                    driver.cuStreamSynchronize(stream._handle_value)
        except BaseException:
            made.close()
            raise
        return made

    # what it is

    @property
    def shape(self) -> Shape:
        """Dimensions, outermost first; elements are C-contiguous."""
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """numpy dtype; bfloat16 and 8-bit floats are those of ml_dtypes."""
        return self._dtype

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self._shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self._shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self._memory.nbytes

    @property
    def device(self) -> Device:
        """The device that the memory is on."""
        return self._device

    @property
    def address(self) -> int:
        """CUdeviceptr as an integer, valid while this array is open."""
        self._require_open()
        return self._memory.address

    def __len__(self) -> int:
        if not self._shape:
            raise TypeError("len() of an array without dimensions")
        return self._shape[0]

    def __bool__(self) -> bool:
        raise TypeError("the truth of a device array is not known here; use array.copy_to_host()")

    def __array__(self, dtype: object = None, copy: object = None) -> Array:
        raise InvalidArgumentError(f"{self!r} is on the device; use copy_to_host() or await to_host()")

    def __repr__(self) -> str:
        state = "closed" if self.closed else self._handle.state.value
        return f"<{self._handle} {self._dtype.name}{list(self._shape)} on {self._device._handle} {state}>"

    # when it is ready, and what is in it

    @property
    def ready(self) -> bool:
        """True once the work that writes it is over. Never blocks. Source: cuEventQuery"""
        self._require_open()
        return self._memory.busy() is None

    def synchronize(self) -> None:
        """Block this thread until the work that writes it is over.

        Raises CudaError if the device failed. In a coroutine use ``await array.to_host()``. Source: cuStreamSynchronize
        """
        with self._lend("synchronize()"):
            self._fetch(None)

    def copy_to_host(self) -> Array:
        """A new host array with the values; blocks this thread until they are there.

        Raises CudaError if the device failed. Source: cuMemcpyDtoHAsync, cuStreamSynchronize
        """
        with self._lend("a copy"):
            return self._copied()

    async def to_host(self) -> Array:
        """As ``copy_to_host()``, off the event loop.

        Cancellation: delivered once the copy has ended, because its memory is in use until then.
        """
        return await run_shielded(self._copied, on_end=self._lend("a copy").end)

    def _copied(self) -> Array:
        host = np.empty(self._shape, self._dtype)
        self._fetch(host)
        return host

    def _fetch(self, host: Array | None) -> None:
        memory, access = self._memory, self._memory.access
        with access.current:
            stream = access.streams.take()  # the one of the work may be gone by now
            try:
                if memory.written is not None:
                    memory.written.before(stream)
                if host is not None and host.nbytes:
                    access.driver.cuMemcpyDtoHAsync(host.ctypes.data, memory.address, host.nbytes, stream)
                access.driver.cuStreamSynchronize(stream)
            finally:
                access.streams.give(stream)

    # handing it to other libraries

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The CUDA array interface, version 3. A consumer must keep this array: the memory is freed without it.

        ``stream`` is the stream of the work that writes the array, None once that is over.
        """
        self._require_open()
        dtype = self._dtype
        if dtype.kind not in "biufc":
            raise DTypeError(f"the CUDA array interface has no {dtype.name}; hand {self!r} over through DLPack")
        memory, stream = self._memory, None
        if memory.busy() is not None and memory.written is not None:
            stream = memory.written.stream or LEGACY_DEFAULT_STREAM
        return {
            "version": 3,
            "shape": self._shape,
            "typestr": dtype.str,
            "data": (memory.address if memory.nbytes else 0, False),
            "strides": None,
            "stream": stream,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """(kDLCUDA, ordinal)."""
        return DL_CUDA, self._device.ordinal

    def __dlpack__(
        self,
        stream: int | None = None,
        *,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A DLPack capsule of this memory, which stays until the capsule's consumer lets go.

        Args:
            stream: the consumer's CUstream, which is made to wait for the work that writes the array. None or 1: the
                legacy default stream; 2: the per-thread one; -1: no ordering.
            max_version: the newest DLPack that the consumer knows; None: older than 1.0.
            dl_device, copy: nothing but the memory as it is can be had.
        Raises:
            InvalidArgumentError: another device, a copy or a forbidden stream is asked for. A BufferError too.
            ClosedError: the array or its device is closed.
        """
        memory = self._memory
        target = LEGACY_DEFAULT_STREAM if stream is None else checked_int(stream, "stream", minimum=_NO_ORDERING)
        if target == 0:
            raise ExportError(
                "stream is 0, which is ambiguous; expected 1 (legacy default), 2 (per-thread) or a handle"
            )
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise ExportError(
                f"dl_device is {dl_device!r}; {self!r} is on {self.__dlpack_device__()}: use copy_to_host()"
            )
        if copy:
            raise ExportError(f"copy is {copy!r}; {self!r} is shared as it is: let the consumer copy it")
        kind = dlpack_type(self._dtype)
        if kind is None:
            raise ExportError(f"DLPack has no type for {self._dtype.name}; use copy_to_host()")
        with self._lend("a DLPack export"):
            if target != _NO_ORDERING and memory.written is not None:
                with memory.access.current:
                    memory.written.before(target)
            return _native.dlpack_capsule(
                memory.address, DL_CUDA, self._device.ordinal, self._shape, *kind, memory.share(),
                max_version is not None and max_version[0] >= 1,
            )  # fmt: skip

    # letting go

    @property
    def closed(self) -> bool:
        """True once the array, or the device or runtime that it belongs to, is closed or closing."""
        return self._let_go or super().closed

    def close(self) -> None:
        """Let go of the memory. Neither waits nor refuses; idempotent.

        It is freed at once if it is ready and nothing uses it; else when the work that writes it is over, and copies
        and DLPack consumers are done.
        """
        if not self.closed and not self._memory.shared() and self._memory.busy() is None:
            with contextlib.suppress(BorrowedError):  # a copy in another thread: freed behind it
                super().close()
        self._leave()

    async def aclose(self) -> None:
        """As ``close()``, and waits until the work that writes the array is over."""
        if not self.closed and not self._memory.shared():
            await super().aclose()
        self._leave()

    def _leave(self) -> None:
        self._let_go = True
        if self._handle.epoch == _process.epoch:
            self._memory.leave(_ARRAY)

    def _require_open(self) -> None:
        self._handle.require_open()
        if self._let_go:
            raise ClosedError(f"{self._handle} is closed; it was made at {self._handle.made_at}")

    def _lend(self, what: str) -> Loan:
        self._require_open()
        return self._handle.lend(what)

    def __del__(self) -> None:
        if "_memory" in self.__dict__ and not sys.is_finalizing():
            self._leave()  # a result, so nobody is warned: it is dropped like any array
