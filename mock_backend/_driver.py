"""The mock CUDA driver: contexts, memory, copies, streams and events behind the CudaDriver seam."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from ._arena import ArenaError, call_site
from ._codes import cuda_error
from ._driver_core import DriverCore, driver_call
from ._stream import Event

__all__ = ["MockDriver"]

_INVALID_VALUE, _OUT_OF_MEMORY = 1, 2
_NO_DEVICE, _INVALID_CONTEXT = 100, 201
_INVALID_HANDLE, _NOT_READY = 400, 600
_LEGACY_STREAM = 1
_DRIVER_VERSION = 12080


class MockDriver(DriverCore):
    """CudaDriver without a GPU. Thread-safe; every method raises CudaError for what the real driver refuses.

    Stricter than the hardware where that finds bugs: memory freed while queued work still names it is an illegal
    address (the real cuMemFree may or may not wait), a destroyed handle is CUDA_ERROR_INVALID_HANDLE (undefined on
    the real driver), and work may only be enqueued while the stream's own device is current.

    Args:
        devices: number of devices, each with ``memory_bytes`` of memory and its own primary context.
    """

    # devices and contexts

    @driver_call(context=False, initialized=False)
    def cuInit(self, flags: int) -> None:
        if flags != 0:
            raise cuda_error(_INVALID_VALUE, "cuInit", f"flags is {flags}, and must be 0")
        if not self._devices:
            raise cuda_error(_NO_DEVICE, "cuInit", "this mock was made with devices=0")
        self._initialized = True

    @driver_call(context=False, initialized=False)
    def cuDriverGetVersion(self) -> int:
        return _DRIVER_VERSION

    @driver_call(context=False)
    def cuDeviceGetCount(self) -> int:
        return len(self._devices)

    @driver_call(context=False)
    def cuDeviceGet(self, ordinal: int) -> int:
        self._device(ordinal, "cuDeviceGet")
        return ordinal

    @driver_call(context=False)
    def cuDeviceGetName(self, device: int) -> str:
        self._device(device, "cuDeviceGetName")
        return f"Mock GPU {device}"

    @driver_call(context=False)
    def cuDeviceTotalMem(self, device: int) -> int:
        return self._device(device, "cuDeviceTotalMem").arena.limit_bytes

    @driver_call(context=False)
    def cuDeviceGetAttribute(self, attribute: int, device: int) -> int:
        self._device(device, "cuDeviceGetAttribute")
        values = {75: self._capability[0], 76: self._capability[1], 1: 1024, 10: 32, 16: 64, 40: 2, 41: 1, 31: 1}
        if attribute not in values:
            raise cuda_error(
                _INVALID_VALUE, "cuDeviceGetAttribute", f"the mock knows {sorted(values)}, not {attribute}"
            )
        return values[attribute]

    @driver_call(context=False)
    def cuDevicePrimaryCtxRetain(self, device: int) -> int:
        found = self._device(device, "cuDevicePrimaryCtxRetain")
        with found.lock:
            if found.retained == 0:
                found.fault = None
            found.retained += 1
        return found.context

    @driver_call(context=False)
    def cuDevicePrimaryCtxRelease(self, device: int) -> None:
        found = self._device(device, "cuDevicePrimaryCtxRelease")
        with found.lock:
            if found.retained == 0:
                raise cuda_error(_INVALID_CONTEXT, "cuDevicePrimaryCtxRelease", f"device {device} is not retained")
            found.retained -= 1
            if found.retained:
                return
            streams = found.end_streams()
        # outside the lock: a stream that faults while it ends takes the lock to say so
        for stream in streams:
            stream.close()
        for stream in streams:
            stream.join()
        lost = found.end_memory()
        if all(other.retained == 0 for other in self._devices):
            pinned = self._pinned.reset()
            lost += pinned if found.fault is None else []
        self._lost += [f"{text} (still there when its context ended)" for text in lost]

    @driver_call(context=False)
    def cuCtxPushCurrent(self, context: int) -> None:
        device = self._by_context.get(context)
        if device is None or device.retained == 0:
            raise cuda_error(
                _INVALID_CONTEXT, "cuCtxPushCurrent", f"{context:#x} is no live context; retain a primary context first"
            )
        self._stack().append(device)

    @driver_call(context=False)
    def cuCtxPopCurrent(self) -> int:
        stack = self._stack()
        if not stack:
            raise cuda_error(_INVALID_CONTEXT, "cuCtxPopCurrent", "no context is current in this thread")
        return stack.pop().context

    @driver_call(context=False)
    def cuCtxGetCurrent(self) -> int:
        stack = self._stack()
        return stack[-1].context if stack else 0

    # memory

    @driver_call()
    def cuMemGetInfo(self) -> tuple[int, int]:
        arena = self._current("cuMemGetInfo").arena
        return arena.limit_bytes - arena.used_bytes, arena.limit_bytes

    @driver_call()
    def cuMemAlloc(self, bytesize: int) -> int:
        return self.allocate(bytesize, "cuMemAlloc")

    @driver_call()
    def cuMemFree(self, dptr: int) -> None:
        if dptr == 0:
            return
        device = self._device_of(dptr)
        try:
            (device or self._current("cuMemFree")).arena.free(dptr)
        except ArenaError as error:
            raise cuda_error(_INVALID_VALUE, "cuMemFree", error.detail) from None

    @driver_call()
    def cuMemHostAlloc(self, bytesize: int, flags: int) -> int:
        if flags & ~0x7:
            raise cuda_error(_INVALID_VALUE, "cuMemHostAlloc", f"unknown flags {flags:#x}")
        try:
            return self._pinned.allocate(bytesize)
        except ArenaError as error:
            code = _OUT_OF_MEMORY if error.reason == ArenaError.OUT_OF_MEMORY else _INVALID_VALUE
            raise cuda_error(code, "cuMemHostAlloc", error.detail) from error

    @driver_call()
    def cuMemFreeHost(self, pointer: int) -> None:
        try:
            self._pinned.free(pointer)
        except ArenaError as error:
            raise cuda_error(_INVALID_VALUE, "cuMemFreeHost", error.detail) from None

    @driver_call()
    def cuMemcpyHtoDAsync(self, dst_device: int, src_host: int, byte_count: int, stream: int) -> None:
        call = "cuMemcpyHtoDAsync"
        pinned = self._check_host(src_host, byte_count, call)
        self._check_device(dst_device, byte_count, call)
        if byte_count == 0:
            return
        # pageable memory is staged before the call returns, so the caller may reuse it at once; pinned memory is
        # read only when the copy runs
        staged = None if pinned else _host_view(src_host, byte_count).copy()

        def copy() -> None:
            target = self.device_view(dst_device, byte_count, call)
            if staged is None:
                self._recheck_pinned(src_host, byte_count, call)
            target[:] = _host_view(src_host, byte_count) if staged is None else staged

        self._enqueue(stream, copy, call)

    @driver_call()
    def cuMemcpyDtoHAsync(self, dst_host: int, src_device: int, byte_count: int, stream: int) -> None:
        call = "cuMemcpyDtoHAsync"
        pinned = self._check_host(dst_host, byte_count, call)
        self._check_device(src_device, byte_count, call)
        if byte_count == 0:
            return

        def copy() -> None:
            source = self.device_view(src_device, byte_count, call)
            if pinned:
                self._recheck_pinned(dst_host, byte_count, call)
            _host_view(dst_host, byte_count)[:] = source

        moment = self._enqueue(stream, copy, call)
        if not pinned:
            # a copy into pageable memory returns only when it is complete
            self._await(moment)
            self.require_healthy(call)

    @driver_call()
    def cuMemcpyDtoDAsync(self, dst_device: int, src_device: int, byte_count: int, stream: int) -> None:
        call = "cuMemcpyDtoDAsync"
        self._check_device(dst_device, byte_count, call)
        self._check_device(src_device, byte_count, call)
        if byte_count == 0:
            return

        def copy() -> None:
            source = self.device_view(src_device, byte_count, call)
            self.device_view(dst_device, byte_count, call)[:] = source

        self._enqueue(stream, copy, call)

    @driver_call()
    def cuMemsetD8Async(self, dst_device: int, value: int, count: int, stream: int) -> None:
        call = "cuMemsetD8Async"
        if not 0 <= value <= 255:
            raise cuda_error(_INVALID_VALUE, call, f"value is {value}, and must fit one byte")
        self._check_device(dst_device, count, call)
        if count == 0:
            return

        def fill() -> None:
            self.device_view(dst_device, count, call)[:] = value

        self._enqueue(stream, fill, call)

    # streams

    @driver_call()
    def cuStreamCreate(self, flags: int) -> int:
        if flags not in (0, 1):
            raise cuda_error(_INVALID_VALUE, "cuStreamCreate", f"flags is {flags}, and must be 0 or 1 (non-blocking)")
        device = self._current("cuStreamCreate")
        with device.lock:
            stream = self._make_stream(device, next(self._handles), blocking=flags == 0)
            device.streams[stream.handle] = stream
        return stream.handle

    @driver_call()
    def cuStreamDestroy(self, stream: int) -> None:
        found = self._stream(stream, "cuStreamDestroy")
        if stream in (0, _LEGACY_STREAM):
            raise cuda_error(_INVALID_HANDLE, "cuStreamDestroy", "the NULL stream cannot be destroyed")
        device = self._by_context[found.owner]
        with device.lock:
            device.streams.pop(stream, None)
        found.close()

    @driver_call()
    def cuStreamSynchronize(self, stream: int) -> None:
        moment = self._stream(stream, "cuStreamSynchronize").last
        self._await(moment)
        self.require_healthy("cuStreamSynchronize")
        self._require_results(moment, "cuStreamSynchronize", clear=True)

    @driver_call()
    def cuStreamQuery(self, stream: int) -> int:
        found = self._stream(stream, "cuStreamQuery")
        moment = found.last
        if not moment.reached:
            return _NOT_READY
        self.require_healthy("cuStreamQuery")
        self._require_results(moment, "cuStreamQuery", clear=False)
        found.observe(moment.sequence)
        return 0

    @driver_call()
    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        if flags not in (0, 1):
            raise cuda_error(_INVALID_VALUE, "cuStreamWaitEvent", f"flags is {flags}, and must be 0")
        waiter = self._stream(stream, "cuStreamWaitEvent")
        record = self._event(event, "cuStreamWaitEvent").record
        if record is None:
            return  # CUDA: waiting for an event that was never recorded is no wait
        waiter.order_after(record.past)

        def arrive() -> None:
            """Nothing to do: reaching this operation is the wait."""

        self._enqueue(stream, arrive, "cuStreamWaitEvent")

    # events

    @driver_call()
    def cuEventCreate(self, flags: int) -> int:
        if flags & ~0x7:
            raise cuda_error(_INVALID_VALUE, "cuEventCreate", f"unknown flags {flags:#x}")
        device = self._current("cuEventCreate")
        event = Event(next(self._handles), device.context, not flags & 2, call_site())
        with device.lock:
            device.events[event.handle] = event
        return event.handle

    @driver_call()
    def cuEventDestroy(self, event: int) -> None:
        found = self._event(event, "cuEventDestroy")
        device = self._by_context[found.owner]
        with device.lock:
            device.events.pop(event, None)

    @driver_call()
    def cuEventRecord(self, event: int, stream: int) -> None:
        found = self._event(event, "cuEventRecord")
        queue = self._stream(stream, "cuEventRecord")
        if found.owner != queue.owner:
            raise cuda_error(_INVALID_HANDLE, "cuEventRecord", "event and stream belong to different devices")
        box: list[Event.Recording] = []
        ready = threading.Event()

        def stamp() -> None:
            ready.wait()  # the recording is published right after the push that made this operation
            box[0].time_ns = self.clock.now_ns()

        device = self._by_context[found.owner]
        with device.lock:
            moment = self._enqueue(stream, stamp, "cuEventRecord")
            found.record = Event.Recording(moment, queue.order())
            box.append(found.record)
        ready.set()

    @driver_call()
    def cuEventQuery(self, event: int) -> int:
        record = self._event(event, "cuEventQuery").record
        if record is None:
            return 0
        if not record.moment.reached:
            return _NOT_READY
        self.require_healthy("cuEventQuery")
        self._require_results(record.moment, "cuEventQuery", clear=False)
        record.moment.stream.observe(record.moment.sequence)
        return 0

    @driver_call()
    def cuEventSynchronize(self, event: int) -> None:
        record = self._event(event, "cuEventSynchronize").record
        if record is not None:
            self._await(record.moment)
            self.require_healthy("cuEventSynchronize")
            self._require_results(record.moment, "cuEventSynchronize", clear=True)

    @driver_call()
    def cuEventElapsedTime(self, start: int, end: int) -> float:
        call = "cuEventElapsedTime"
        times: list[int] = []
        pending = False
        for role, handle in (("start", start), ("end", end)):
            event = self._event(handle, call)
            if not event.timing:
                raise cuda_error(_INVALID_HANDLE, call, f"the {role} event was created with CU_EVENT_DISABLE_TIMING")
            if event.record is None:
                raise cuda_error(_INVALID_HANDLE, call, f"the {role} event was never recorded")
            pending = pending or not event.record.moment.reached
            times.append(event.record.time_ns)
        if pending:
            raise cuda_error(_NOT_READY, call, "an event is not complete yet; synchronize it first")
        return (times[1] - times[0]) / 1e6


def _host_view(address: int, nbytes: int) -> npt.NDArray[np.uint8]:
    buffer: Any = (ctypes.c_uint8 * nbytes).from_address(address)
    return np.frombuffer(buffer, np.uint8)
