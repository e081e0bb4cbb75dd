"""One CUDA device, through its primary context."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .._arguments import checked_int
from .._errors import CudaError, InvalidArgumentError, TrtxError
from .._resource import Resource
from ..backends.protocols import (
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    STICKY_CUDA_ERRORS,
    CudaDriver,
    TensorRTBackend,
)
from ..backends.registry import resolve_backend
from ._memory import AllocationRecord, CountedMemory, MemoryStatistics
from ._stream_pool import StreamPool

if TYPE_CHECKING:
    from ._buffer import DeviceBuffer, PinnedBuffer
    from ._stream import Event, Stream


class Current:
    """Makes a device's primary context current in this thread and restores what was current before."""

    def __init__(self, driver: CudaDriver, context: int) -> None:
        self._driver = driver
        self._context = context

    def __enter__(self) -> None:
        self._driver.cuCtxPushCurrent(self._context)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._driver.cuCtxPopCurrent()


class DeviceAccess:
    """What working on a device takes, without owning it: valid as long as the Device behind it is not released.

    Args:
        cu_device: the CUdevice; None: the driver is not asked what the device can do.
        name: for messages.
        max_bytes: the budget for device memory.
    """

    def __init__(
        self,
        driver: CudaDriver,
        context: int,
        cu_device: int | None = None,
        *,
        name: str = "",
        max_bytes: int | None = None,
    ) -> None:
        self.driver = driver
        self.context = context
        self.memory = CountedMemory(driver, cu_device, max_bytes)
        self.streams = StreamPool(driver, name)
        self.current = Current(driver, context)
        self._cu_device = cu_device

    def keep_pinned(self, address: int) -> Callable[[], None]:
        """Keep the pinned block that has this address, whatever is closed, until what is returned is called, once.

        The context that it is of is retained as long.
        """
        let_go = self.memory.keep_pinned(address)
        if self._cu_device is None:
            return let_go
        self.driver.cuDevicePrimaryCtxRetain(self._cu_device)

        def end() -> None:
            assert self._cu_device is not None
            try:
                with self.current:
                    let_go()
            finally:
                self.driver.cuDevicePrimaryCtxRelease(self._cu_device)

        return end


class Device(Resource):
    """One CUDA device: its primary context stays retained while this is open.

    Owns the streams, events and buffers that are made from it. A Runtime makes one for itself (``runtime.device``).

    Args:
        ordinal: number of the device, from 0, in the driver's order.
        backend: a backend name or object as for Builder; None as there.
        max_device_bytes: how much device memory may be allocated through this object; what would exceed it raises
            MemoryBudgetError and leaves everything usable. None: as much as there is.

    Raises:
        InvalidArgumentError: there is no such device, or the budget is not a positive number.
        BackendUnavailableError: there is no usable driver.
        CudaError: the primary context could not be had.

    Source: cuDevicePrimaryCtxRetain
    """

    def __init__(
        self,
        ordinal: int = 0,
        *,
        backend: str | TensorRTBackend | None = None,
        max_device_bytes: int | None = None,
    ) -> None:
        budget = checked_budget(max_device_bytes)
        chosen = resolve_backend(backend, need="run")
        self._construct(chosen, ordinal, parent=None, internal=False, budget=budget)

    @classmethod
    def _create(
        cls, backend: TensorRTBackend, ordinal: int, *, parent: Resource, max_device_bytes: int | None = None
    ) -> Device:
        device = cls.__new__(cls)
        budget = checked_budget(max_device_bytes)
        device._construct(backend, ordinal, parent=parent, internal=True, budget=budget)
        return device

    def _construct(
        self, backend: TensorRTBackend, ordinal: int, *, parent: Resource | None, internal: bool, budget: int | None
    ) -> None:
        ordinal = checked_int(ordinal, "device", minimum=0)
        with self._opening(parent, name=f"cuda:{ordinal}", internal=internal) as handle:
            driver = backend.driver
            driver.cuInit(0)
            count = driver.cuDeviceGetCount()
            if ordinal >= count:
                raise InvalidArgumentError(
                    f"device {ordinal} does not exist: the driver sees {count} (0 to {count - 1}); "
                    "CUDA_VISIBLE_DEVICES hides devices"
                )
            self._driver = driver
            self._cu_device = driver.cuDeviceGet(ordinal)
            self._ordinal = ordinal
            context = driver.cuDevicePrimaryCtxRetain(self._cu_device)
            self._access = DeviceAccess(driver, context, self._cu_device, name=str(handle), max_bytes=budget)
            handle.release = partial(_release_device, self._access, self._cu_device)

    def _carry(self, destroy: Callable[[], object]) -> Callable[[], None]:
        """The release of an owner that made this device for itself: its native object first, then the context.

        Children go before their owner, but here the owner's native object lives on the device, so the owner takes the
        end of the context over.
        """
        releases = Releases(self._access)
        releases.add(destroy)
        let_go, self._handle.release = self._handle.release, None

        def release() -> None:
            try:
                releases()
            finally:
                if let_go is not None:
                    let_go()

        return release

    @property
    def ordinal(self) -> int:
        """Number of the device in the driver's order."""
        return self._ordinal

    @property
    def name(self) -> str:
        """Source: cuDeviceGetName"""
        self._handle.require_open()
        return self._driver.cuDeviceGetName(self._cu_device)

    @property
    def compute_capability(self) -> str:
        """Architecture as "major.minor", for example "9.0"."""
        self._handle.require_open()
        return self._compute_capability()

    def _compute_capability(self) -> str:
        major = self._driver.cuDeviceGetAttribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, self._cu_device)
        minor = self._driver.cuDeviceGetAttribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, self._cu_device)
        return f"{major}.{minor}"

    @property
    def total_bytes(self) -> int:
        """Memory of the device. Source: cuDeviceTotalMem"""
        self._handle.require_open()
        return self._driver.cuDeviceTotalMem(self._cu_device)

    def free_bytes(self) -> int:
        """Memory that is free now, for all processes. Source: cuMemGetInfo"""
        with self.current():
            return self._driver.cuMemGetInfo()[0]

    def current(self) -> Current:
        """``with device.current():`` makes its primary context current in this thread and restores the old one."""
        self._handle.require_open()
        return self._access.current

    def create_stream(self) -> Stream:
        """A new stream that does not wait for the legacy default stream. Source: cuStreamCreate"""
        from ._stream import Stream

        return Stream._create(self)

    def create_event(self, *, timing: bool = True) -> Event:
        """A new event. Source: cuEventCreate"""
        from ._stream import Event

        return Event._create(self, timing=timing)

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """Device memory.

        Raises:
            MemoryBudgetError: it would exceed the budget; the driver was not asked.
            CudaError: (CUDA_ERROR_OUT_OF_MEMORY) there is not enough.
        Source: cuMemAlloc
        """
        from ._buffer import DeviceBuffer

        return DeviceBuffer._create(self, checked_int(nbytes, "nbytes", minimum=0))

    def allocate_pinned(self, nbytes: int) -> PinnedBuffer:
        """Page-locked host memory, which the GPU can copy to and from on its own. Source: cuMemHostAlloc"""
        from ._buffer import PinnedBuffer

        return PinnedBuffer._create(self, checked_int(nbytes, "nbytes", minimum=0))

    def memory_statistics(self) -> MemoryStatistics:
        """Device memory allocated through this object, or by TensorRT for it; after it was closed, the last figures."""
        self._handle.require_process()
        return self._access.memory.device_statistics()

    def pinned_statistics(self) -> MemoryStatistics:
        """Page-locked host memory allocated through this object; after it was closed, the last figures."""
        self._handle.require_process()
        return self._access.memory.pinned_statistics()

    def memory_allocations(self) -> tuple[AllocationRecord, ...]:
        """Every allocation in these statistics that is not freed, the biggest first."""
        self._handle.require_open()
        return self._access.memory.allocations()


class _OnDevice(Protocol):
    @property
    def device(self) -> Device: ...


_P = TypeVar("_P", bound=_OnDevice)


def checked_peer(item: Any, kind: type[_P], device: Device) -> _P:
    """``item`` if it is a ``kind`` of ``device``; the driver must not see a handle that another one gave out.

    Raises:
        InvalidArgumentError: it is something else, or belongs to another device or another driver.
    """
    if not isinstance(item, kind):
        raise InvalidArgumentError(f"got {item!r}; expected an object of class {kind.__name__} made from {device!r}")
    theirs = item.device
    if theirs._access.driver is not device._access.driver or theirs.ordinal != device.ordinal:
        reason = "" if theirs.ordinal != device.ordinal else ", the same ordinal of another driver"
        raise InvalidArgumentError(f"{item!r} belongs to {theirs!r}{reason}; expected one made from {device!r}")
    return item


def checked_device(device: Any) -> Device:
    """``device`` if it is one. Raises InvalidArgumentError otherwise."""
    if not isinstance(device, Device):
        raise InvalidArgumentError(f"device is {device!r}; expected a Device such as runtime.device")
    return device


def checked_budget(value: Any, what: str = "max_device_bytes") -> int | None:
    """``value`` as a number of bytes, None for no budget. Raises InvalidArgumentError for anything else."""
    return None if value is None else checked_int(value, what, minimum=1)


class Releases:
    """What to undo when something ends, run in reverse order with the device's context current.

    Holds no reference to the Device object, so that an object whose release this is can still be collected with it.
    A device that is lost took all its memory with it: errors that say only that are not raised again.
    """

    def __init__(self, access: DeviceAccess) -> None:
        self._current = access.current
        self._steps: list[Callable[[], object]] = []

    def add(self, step: Callable[[], object]) -> None:
        self._steps.append(step)

    def __call__(self) -> None:
        errors: list[TrtxError] = []
        try:
            with self._current:
                self._run(errors)
        except CudaError as error:
            errors.append(error)
            # The context could not be made current. Some steps need none, and what is native must go before its owner.
            self._run(errors)
        for failure in errors:
            if not isinstance(failure, CudaError) or failure.code not in STICKY_CUDA_ERRORS:
                raise failure

    def _run(self, errors: list[TrtxError]) -> None:
        while self._steps:
            try:
                self._steps.pop()()
            except TrtxError as error:  # the other steps are still due
                errors.append(error)


def _release_device(access: DeviceAccess, cu_device: int) -> None:
    """The end of a device: its pooled streams, then its context."""
    try:
        streams = access.streams.close()
        if streams:
            releases = Releases(access)
            for stream in streams:
                releases.add(partial(access.driver.cuStreamDestroy, stream))
            releases()
    finally:
        access.driver.cuDevicePrimaryCtxRelease(cu_device)
