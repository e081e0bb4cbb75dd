"""One CUDA device, through its primary context."""

from __future__ import annotations

from collections.abc import Callable
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
from ._memory import CountedMemory, MemoryStatistics

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
    """What working on a device takes, without owning it: valid as long as the Device behind it is not released."""

    def __init__(self, driver: CudaDriver, context: int) -> None:
        self.driver = driver
        self.memory = CountedMemory(driver)
        self.current = Current(driver, context)


class Device(Resource):
    """One CUDA device: its primary context stays retained while this is open.

    Owns the streams, events and buffers that are made from it. A Runtime makes one for itself (``runtime.device``).

    Args:
        ordinal: number of the device, from 0, in the driver's order.
        backend: a backend name or object as for Builder; None as there.

    Raises:
        InvalidArgumentError: there is no such device.
        BackendUnavailableError: there is no usable driver.
        CudaError: the primary context could not be had.

    Source: cuDevicePrimaryCtxRetain
    """

    def __init__(self, ordinal: int = 0, *, backend: str | TensorRTBackend | None = None) -> None:
        chosen = resolve_backend(backend, need="run")
        self._construct(chosen, ordinal, parent=None, internal=False)

    @classmethod
    def _create(cls, backend: TensorRTBackend, ordinal: int, *, parent: Resource) -> Device:
        device = cls.__new__(cls)
        device._construct(backend, ordinal, parent=parent, internal=True)
        return device

    def _construct(self, backend: TensorRTBackend, ordinal: int, *, parent: Resource | None, internal: bool) -> None:
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
            cu_device = self._cu_device
            handle.release = lambda: driver.cuDevicePrimaryCtxRelease(cu_device)
            self._access = DeviceAccess(driver, context)

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
        """Device memory. Raises CudaError (CUDA_ERROR_OUT_OF_MEMORY) if there is not enough. Source: cuMemAlloc"""
        from ._buffer import DeviceBuffer

        return DeviceBuffer._create(self, checked_int(nbytes, "nbytes", minimum=0))

    def allocate_pinned(self, nbytes: int) -> PinnedBuffer:
        """Page-locked host memory, which the GPU can copy to and from on its own. Source: cuMemHostAlloc"""
        from ._buffer import PinnedBuffer

        return PinnedBuffer._create(self, checked_int(nbytes, "nbytes", minimum=0))

    def memory_statistics(self) -> MemoryStatistics:
        """Device memory allocated through this object; after it was closed, the last figures."""
        self._handle.require_process()
        return self._access.memory.device_statistics()

    def pinned_statistics(self) -> MemoryStatistics:
        """Page-locked host memory allocated through this object; after it was closed, the last figures."""
        self._handle.require_process()
        return self._access.memory.pinned_statistics()


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
