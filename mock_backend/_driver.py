"""The mock CUDA driver: trtx_py's driver over the functions of the C mock, and what plays TensorRT's part on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from trtx_py._errors import CudaError
from trtx_py._native import Driver
from trtx_py.backends.protocols import CUDA_ERROR_INVALID_VALUE

from ._clock import Clock, RealClock, VirtualClock
from ._native import CALLS, DeviceFaultError, Mock, Region, Stamp, reason, site
from ._site import call_site

__all__ = ["MockDriver", "Position"]

#: A point in a stream's order.
Position = tuple[int, int]


class MockDriver(Driver):
    """CudaDriver without a GPU. Thread-safe; every method raises CudaError for what the real driver refuses.

    Stricter than the hardware where that finds bugs: memory freed while queued work still names it is an illegal
    address (the real cuMemFree may or may not wait), a destroyed handle is CUDA_ERROR_INVALID_HANDLE (undefined on
    the real driver), and work may only be enqueued while the stream's own device is current. As with CUDA, the
    stack of current contexts belongs to the thread: two mocks in one thread share it.

    Args:
        devices: number of devices, each with ``memory_bytes`` of memory and its own primary context.
        instant: replays of graphs that take no time run inside cuGraphLaunch where their stream is idle.
    """

    def __init__(
        self, *, devices: int, memory_bytes: int, compute_capability: str, clock: Clock, instant: bool = False
    ) -> None:
        major, minor = (int(part) for part in compute_capability.split("."))
        time = clock.time if isinstance(clock, VirtualClock) and type(clock) is VirtualClock else None
        self.clock = clock
        self.mock = Mock(
            devices=devices, memory_bytes=memory_bytes, compute_capability=(major, minor), instant=instant,
            time=time, clock=None if time or type(clock) is RealClock else clock,
        )  # fmt: skip
        super().__init__(self.mock.api)

    # calls that name no handle go to this instance

    def cuInit(self, flags: int, /) -> None:
        self.mock.select()
        super().cuInit(flags)

    def cuDriverGetVersion(self) -> int:
        self.mock.select()
        return super().cuDriverGetVersion()

    def cuDeviceGetCount(self) -> int:
        self.mock.select()
        return super().cuDeviceGetCount()

    def cuDeviceGet(self, ordinal: int, /) -> int:
        self.mock.select()
        return super().cuDeviceGet(ordinal)

    def cuDeviceGetName(self, device: int, /) -> str:
        self.mock.select()
        return super().cuDeviceGetName(device)

    def cuDeviceTotalMem(self, device: int, /) -> int:
        self.mock.select()
        return super().cuDeviceTotalMem(device)

    def cuDeviceGetAttribute(self, attribute: int, device: int, /) -> int:
        self.mock.select()
        return super().cuDeviceGetAttribute(attribute, device)

    def cuDeviceGetUuid(self, device: int, /) -> bytes:
        self.mock.select()
        return super().cuDeviceGetUuid(device)

    def cuDevicePrimaryCtxRetain(self, device: int, /) -> int:
        self.mock.select()
        return super().cuDevicePrimaryCtxRetain(device)

    def cuDevicePrimaryCtxRelease(self, device: int, /) -> None:
        self.mock.select()
        super().cuDevicePrimaryCtxRelease(device)

    def cuCtxPushCurrent(self, context: int, /) -> None:
        self.mock.select()
        super().cuCtxPushCurrent(context)

    def cuCtxPopCurrent(self) -> int:
        self.mock.select()
        return super().cuCtxPopCurrent()

    def cuCtxGetCurrent(self) -> int:
        self.mock.select()
        return super().cuCtxGetCurrent()

    # calls whose caller is kept for the reports

    def cuMemAlloc(self, bytesize: int, /) -> int:
        self._enter()
        return super().cuMemAlloc(bytesize)

    def cuMemFree(self, dptr: int, /) -> None:
        self._enter()
        super().cuMemFree(dptr)

    def cuMemAllocAsync(self, bytesize: int, stream: int, /) -> int:
        self._enter()
        return super().cuMemAllocAsync(bytesize, stream)

    def cuMemFreeAsync(self, dptr: int, stream: int, /) -> None:
        self._enter()
        super().cuMemFreeAsync(dptr, stream)

    def cuMemHostAlloc(self, bytesize: int, flags: int, /) -> int:
        self._enter()
        return super().cuMemHostAlloc(bytesize, flags)

    def cuMemFreeHost(self, pointer: int, /) -> None:
        self._enter()
        super().cuMemFreeHost(pointer)

    def cuStreamCreate(self, flags: int, /) -> int:
        self._enter()
        return super().cuStreamCreate(flags)

    def cuEventCreate(self, flags: int, /) -> int:
        self._enter()
        return super().cuEventCreate(flags)

    def cuStreamEndCapture(self, stream: int, /) -> int:
        self._enter()
        return super().cuStreamEndCapture(stream)

    def cuGraphInstantiate(self, graph: int, flags: int, /) -> int:
        self._enter()
        return super().cuGraphInstantiate(graph, flags)

    # what the mock's TensorRT side uses

    def allocate(self, nbytes: int, call: str, *, label: str) -> int:
        """Memory on the current device for TensorRT itself; CudaError when there is not enough. No fault strikes it."""
        self._enter()
        code, address = self.mock.reserve(nbytes, label)
        if code:
            raise self._failure(call, code)
        return address

    def release(self, address: int) -> None:
        """Give back what allocate returned, unless the end of its context did so already."""
        self._enter()
        self.mock.unreserve(address)

    def device_view(self, address: int, nbytes: int, what: str) -> npt.NDArray[np.uint8]:
        """Device bytes as a kernel sees them. Raises DeviceFaultError (700) for anything no live block holds."""
        try:
            return np.asarray(memoryview(self.mock.view(address, nbytes)))
        except DeviceFaultError as error:
            code, why = error.args
            raise DeviceFaultError(code, f"{what}: {why}") from None

    def launch(
        self,
        stream: int,
        kernel: Callable[[], object] | None,
        call: str,
        *,
        duration_s: float = 0.0,
        counted: bool = False,
        region: Region | None = None,
    ) -> Position:
        """Append a kernel to a stream of the current device, or to the graph that is captured on it.

        Args:
            counted: it is an "execute", which faults may strike.
        """
        code, position = self.mock.launch(
            stream, round(duration_s * 1e9), kernel, counted=counted, region=region
        )  # fmt: skip
        if code:
            raise self._failure(call, code)
        return position

    def launch_blank(
        self,
        stream: int,
        call: str,
        *,
        name: str,
        duration_s: float,
        scratch: tuple[int, int],
        inputs: Sequence[tuple[int, int, str]],
        outputs: Sequence[tuple[int, int, str]],
        region: Region | None,
        stamp: Stamp,
        settings: int,
        captured: bool,
    ) -> Position:
        """As launch, for a kernel in C that checks its memory, given as (address, bytes, name), and leaves zeros."""
        code, position = self.mock.launch_blank(
            stream, round(duration_s * 1e9), name, scratch, inputs, outputs, region, stamp, settings, captured
        )
        if code:
            raise self._failure(call, code)
        return position

    def require_healthy(self, call: str) -> int:
        """The current device. CudaError 201 if there is none, the sticky error if its context is unusable."""
        code, ordinal = self.mock.current()
        if code:
            raise self._failure(call, code)
        return ordinal

    def leaks(self) -> list[str]:
        """Memory, streams, events and graphs still there; nothing of a context that a fault took."""
        return self.mock.leaks()

    def damage(self) -> list[str]:
        """What no error tells of: overwritten red zones, writes after free, kernels that overwrite each other."""
        return self.mock.damage()

    def shutdown(self) -> None:
        """End all stream threads after their pending work; for the end of a test."""
        self.mock.close()

    def _enter(self) -> None:
        self.mock.select()
        site(call_site())

    def _error(self, call: str, code: int, /) -> CudaError:
        if call in CALLS:
            return self._told(call, code, reason(call, code))
        # what native code asked in some thread: the reason is known where a kernel had no result
        return self._told(call, code, self.mock.told() if code == CUDA_ERROR_INVALID_VALUE else reason("", code))

    def _failure(self, call: str, code: int) -> CudaError:
        return self._told(call, code, reason("", code))

    def _told(self, call: str, code: int, why: str) -> CudaError:
        error = super()._error(call, code)
        return CudaError(code, error.name, call, why) if why else error
