"""State and rules under the driver calls: current contexts, handle look-up, checks, the way into a stream."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from trtx_py.backends.protocols import STICKY_CUDA_ERRORS

from ._arena import BASE_ADDRESS, DEVICE_SPAN, ArenaError, call_site
from ._clock import Clock
from ._codes import cuda_error
from ._device import Device
from ._faults import FaultPlan
from ._pinned import PinnedMemory
from ._stream import DeviceFaultError, Event, Moment, Stream

__all__ = ["DriverCore", "driver_call"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_D = TypeVar("_D", bound="DriverCore")

_INVALID_VALUE, _OUT_OF_MEMORY, _NOT_INITIALIZED = 1, 2, 3
_INVALID_DEVICE, _INVALID_CONTEXT = 101, 201
_INVALID_HANDLE, _ILLEGAL_ADDRESS = 400, 700
_LEGACY_STREAM = 1


def driver_call(
    *, context: bool = True, initialized: bool = True
) -> Callable[[Callable[Concatenate[_D, _P], _R]], Callable[Concatenate[_D, _P], _R]]:
    """What every driver call passes through: initialization, current context, sticky errors, then faults."""

    def wrap(method: Callable[Concatenate[_D, _P], _R]) -> Callable[Concatenate[_D, _P], _R]:
        name = method.__name__

        @functools.wraps(method)
        def call(self: _D, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
            outcome = self.faults.enter(name)
            if initialized and not self._initialized:
                raise cuda_error(_NOT_INITIALIZED, name, "call cuInit(0) first")
            if context:
                self.require_healthy(name)
            if outcome is not None:
                device = self.current_device()
                if device is not None and (outcome.lose_device or outcome.code in STICKY_CUDA_ERRORS):
                    device.fail(DeviceFaultError(outcome.code, str(outcome)))
                raise cuda_error(outcome.code, name, str(outcome))
            return method(self, *args, **kwargs)

        return call

    return wrap


class DriverCore:
    """What MockDriver's calls stand on, and what the mock's TensorRT side uses of the driver directly."""

    def __init__(
        self, *, devices: int, memory_bytes: int, compute_capability: str, clock: Clock, faults: FaultPlan
    ) -> None:
        self.clock = clock
        self.faults = faults
        self._capability = tuple(int(part) for part in compute_capability.split("."))
        self._devices = [Device(ordinal, memory_bytes) for ordinal in range(devices)]
        self._by_context = {device.context: device for device in self._devices}
        self._pinned = PinnedMemory()
        self._handles = itertools.count(0x5E00_0000, 0x10)
        self._initialized = False
        self._thread = threading.local()
        self._lost: list[str] = []

    # what the mock's TensorRT side uses

    def allocate(self, nbytes: int, call: str, *, label: str = "") -> int:
        """Memory on the current device for TensorRT itself; CudaError when there is not enough."""
        try:
            return self._current(call).arena.allocate(nbytes, label=label)
        except ArenaError as error:
            code = _OUT_OF_MEMORY if error.reason == ArenaError.OUT_OF_MEMORY else _INVALID_VALUE
            raise cuda_error(code, call, error.detail) from None

    def release(self, address: int) -> None:
        """Give back what allocate returned, unless the end of its context did so already."""
        device = self._device_of(address)
        if device is not None:
            try:
                device.arena.free(address)
            except ArenaError:
                # the primary context ended first and took the memory with it, which is legal
                return

    def device_view(self, address: int, nbytes: int, what: str) -> npt.NDArray[np.uint8]:
        """Device bytes as a kernel sees them. Raises DeviceFaultError (700) for anything no live block holds."""
        device = self._device_of(address)
        if device is None:
            raise DeviceFaultError(_ILLEGAL_ADDRESS, f"{what}: 0x{address:x} is not device memory")
        try:
            return device.arena.view(address, nbytes)
        except ArenaError as error:
            raise DeviceFaultError(_ILLEGAL_ADDRESS, f"{what}: {error.detail}") from None

    def launch(self, stream: int, kernel: Callable[[], None], call: str) -> Moment:
        """Append a kernel to a stream of the current device."""
        return self._enqueue(stream, kernel, call)

    def is_ordered_after(self, stream: int, moment: Moment, call: str) -> bool:
        """True if what is enqueued next on ``stream`` runs after ``moment``, whatever the timing."""
        waiter = self._stream(stream, call)
        device = self._current(call)
        with device.lock:
            self._order_with_null(waiter, device)
            return waiter.order().get(moment.stream, 0) >= moment.sequence

    def is_device_address(self, address: int) -> bool:
        """True if ``address`` lies in a device's address range, allocated or not."""
        return self._device_of(address) is not None

    def current_device(self) -> Device | None:
        """The device that is current in the calling thread."""
        stack = self._stack()
        return stack[-1] if stack else None

    def require_healthy(self, call: str) -> Device:
        """The current device. CudaError 201 if there is none, the sticky error if its context is unusable."""
        device = self._current(call)
        if device.fault is not None:
            raise cuda_error(
                device.fault.code,
                call,
                f"{device.fault.detail}; device {device.ordinal}'s context is unusable until its primary context is "
                "released by all owners and retained again",
            )
        return device

    def leaks(self) -> list[str]:
        """Device and pinned memory, streams and events still there; nothing of a context that a fault took."""
        found = list(self._lost)
        faulted = False
        for device in self._devices:
            if device.fault is None:
                found += device.open_handles() + device.arena.leaks()
            faulted = faulted or device.fault is not None
        return found if faulted else found + self._pinned.leaks()

    def damage(self) -> list[str]:
        """Overwritten red zones of device blocks and pinned blocks."""
        return [text for device in self._devices for text in device.arena.damage()] + self._pinned.damage()

    def shutdown(self) -> None:
        """End all stream threads after their pending work; for the end of a test."""
        for device in self._devices:
            with device.lock:
                streams = [*device.streams.values(), *([device.null_stream] if device.null_stream else [])]
            for stream in streams:
                stream.close()

    # helpers

    def _stack(self) -> list[Device]:
        stack: list[Device] | None = getattr(self._thread, "stack", None)
        if stack is None:
            stack = self._thread.stack = []
        return stack

    def _current(self, call: str) -> Device:
        device = self.current_device()
        if device is None:
            raise cuda_error(_INVALID_CONTEXT, call, "no context is current in this thread; call cuCtxPushCurrent")
        if device.retained == 0:
            raise cuda_error(_INVALID_CONTEXT, call, f"the primary context of device {device.ordinal} was released")
        return device

    def _device(self, ordinal: int, call: str) -> Device:
        if not 0 <= ordinal < len(self._devices):
            raise cuda_error(_INVALID_DEVICE, call, f"device {ordinal}; there are {len(self._devices)}")
        return self._devices[ordinal]

    def _device_of(self, address: int) -> Device | None:
        return next((device for device in self._devices if address in device.arena), None)

    def _make_stream(self, device: Device, handle: int, *, blocking: bool) -> Stream:
        return Stream(
            handle, device.context, blocking=blocking, site=call_site(), clock=self.clock, on_fault=device.fail,
            failed=lambda: device.fault is not None,
        )  # fmt: skip

    def _stream(self, handle: int, call: str) -> Stream:
        if handle in (0, _LEGACY_STREAM):
            device = self._current(call)
            with device.lock:
                if device.null_stream is None:
                    device.null_stream = self._make_stream(device, 0, blocking=True)
                return device.null_stream
        for device in self._devices:
            stream = device.streams.get(handle)
            if stream is not None:
                return stream
        raise cuda_error(_INVALID_HANDLE, call, f"stream {handle:#x} does not exist or was destroyed")

    def _event(self, handle: int, call: str) -> Event:
        for device in self._devices:
            event = device.events.get(handle)
            if event is not None:
                return event
        raise cuda_error(_INVALID_HANDLE, call, f"event {handle:#x} does not exist or was destroyed")

    def _enqueue(self, handle: int, run: Callable[[], None], call: str) -> Moment:
        stream = self._stream(handle, call)
        device = self._current(call)
        if stream.owner != device.context:
            owner = self._by_context[stream.owner]
            raise cuda_error(
                _INVALID_HANDLE,
                call,
                f"stream {handle:#x} belongs to device {owner.ordinal}, but device {device.ordinal} is current",
            )
        with device.lock:
            self._order_with_null(stream, device)
            return stream.push(run)

    def _order_with_null(self, stream: Stream, device: Device) -> None:
        """The legacy NULL stream and the blocking streams wait for each other."""
        if stream is device.null_stream:
            for other in device.streams.values():
                if other.blocking:
                    stream.order_after(other.order())
        elif stream.blocking and device.null_stream is not None:
            stream.order_after(device.null_stream.order())

    def _await(self, moment: Moment) -> None:
        moment.stream.wait(moment.sequence)
        moment.stream.observe(moment.sequence)

    def _require_results(self, moment: Moment, call: str, *, clear: bool) -> None:
        """CudaError 1 if a kernel up to ``moment`` could not compute; once, if ``clear``.

        Not sticky, because no GPU would lose its context over values. Queries leave it for the synchronization to
        come: who only looks whether a stream is busy must not take the error from the one who waits for the result.
        """
        failure = moment.stream.failure(moment.sequence, clear=clear)
        if failure is not None:
            raise cuda_error(_INVALID_VALUE, call, failure)

    def _check_device(self, address: int, nbytes: int, call: str) -> None:
        if nbytes < 0:
            raise cuda_error(_INVALID_VALUE, call, f"{nbytes} bytes")
        if nbytes == 0:
            return
        device = self._device_of(address)
        if device is None:
            raise cuda_error(_INVALID_VALUE, call, f"0x{address:x} is not a device pointer of this driver")
        try:
            device.arena.check(address, nbytes)
        except ArenaError as error:
            raise cuda_error(_INVALID_VALUE, call, error.detail) from None

    def _check_host(self, address: int, nbytes: int, call: str) -> bool:
        if nbytes < 0:
            raise cuda_error(_INVALID_VALUE, call, f"{nbytes} bytes")
        if address == 0 and nbytes:
            raise cuda_error(_INVALID_VALUE, call, "the host pointer is null")
        if BASE_ADDRESS <= address < BASE_ADDRESS + DEVICE_SPAN * max(len(self._devices), 1):
            raise cuda_error(_INVALID_VALUE, call, f"0x{address:x} is a device pointer where a host pointer belongs")
        try:
            return self._pinned.check(address, nbytes)
        except ArenaError as error:
            raise cuda_error(_INVALID_VALUE, call, error.detail) from None

    def _recheck_pinned(self, address: int, nbytes: int, call: str) -> None:
        try:
            still = self._pinned.check(address, nbytes)
        except ArenaError as error:
            raise DeviceFaultError(_ILLEGAL_ADDRESS, f"{call}: {error.detail}") from None
        if not still:
            raise DeviceFaultError(
                _ILLEGAL_ADDRESS, f"{call}: the pinned memory at 0x{address:x} was freed before the copy ran"
            )
