"""Streams and events."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._aio import run_shielded
from .._arguments import checked_int
from .._errors import CudaError
from .._resource import Handle, Resource
from ..backends.protocols import (
    CU_EVENT_DEFAULT,
    CU_EVENT_DISABLE_TIMING,
    CU_STREAM_NON_BLOCKING,
    CUDA_SUCCESS,
    STICKY_CUDA_ERRORS,
)
from ._device import Device, DeviceAccess, Releases, checked_device, checked_peer

if TYPE_CHECKING:
    from typing_extensions import Self


def _watch(handle: Handle, access: DeviceAccess, stream: int) -> None:
    """A stream with work on it is in use: ``close()`` refuses, ``aclose()`` waits, and an owner lives on."""

    def busy() -> str | None:
        try:
            with access.current:
                done = access.driver.cuStreamQuery(stream) == CUDA_SUCCESS
        except CudaError:
            return None  # the device failed and runs nothing any more; if not, drain() meets the same error and says so
        return None if done else "work enqueued on it has not finished"

    def drain() -> None:
        try:
            with access.current:
                access.driver.cuStreamSynchronize(stream)
        except CudaError as error:
            if error.code not in STICKY_CUDA_ERRORS:  # those say that the device is lost, which ended the work too
                raise

    handle.busy, handle.drain = busy, drain


class Stream(Resource):
    """An in-order queue of work on one device. Made by ``device.create_stream()``.

    It is in use while work enqueued on it has not finished.

    Source: CUstream
    """

    _device: Device
    _handle_value: int

    def __init__(self) -> None:
        self._refuse_construction("device.create_stream() or Stream.from_handle(device, handle, owner=...)")

    @classmethod
    def _create(cls, device: Device) -> Self:
        stream = cls.__new__(cls)
        with stream._opening(device) as handle:
            driver = device._driver
            releases = Releases(device._access)
            with device.current():
                value = driver.cuStreamCreate(CU_STREAM_NON_BLOCKING)
                releases.add(lambda: driver.cuStreamDestroy(value))
                handle.release = releases
            _watch(handle, device._access, value)
            stream._device, stream._handle_value = device, value
        return stream

    @classmethod
    def from_handle(cls, device: Device, handle: int, *, owner: object) -> Self:
        """Borrow a stream that something else made: a CUstream or cudaStream_t as an integer, 0 for the default stream.

        Args:
            owner: kept alive as long as this object is open, for example the torch or cupy stream object.
        """
        device = checked_device(device)
        value = checked_int(handle, "handle", minimum=0)
        stream = cls.__new__(cls)
        with stream._opening(device, name="borrowed") as record:
            stream._device, stream._handle_value = device, value
            _watch(record, device._access, value)
            record.keeps = owner
        return stream

    @property
    def handle(self) -> int:
        """The CUstream as an integer, valid while this object is open."""
        self._handle.require_open()
        return self._handle_value

    @property
    def device(self) -> Device:
        """The device that this stream belongs to."""
        return self._device

    def query(self) -> bool:
        """True if everything enqueued so far has finished. Raises CudaError if it failed. Source: cuStreamQuery"""
        with self._handle.lend("query()"), self._device.current():
            return self._device._driver.cuStreamQuery(self._handle_value) == CUDA_SUCCESS

    def synchronize(self) -> None:
        """Block this thread until everything enqueued so far has finished.

        Raises CudaError if it failed. In a coroutine use ``await stream.wait_idle()``. Source: cuStreamSynchronize
        """
        with self._handle.lend("synchronize()"), self._device.current():
            self._device._driver.cuStreamSynchronize(self._handle_value)

    async def wait_idle(self) -> None:
        """As ``synchronize()``, off the event loop.

        Cancellation: delivered once the stream has finished, because the stream cannot be left while it is in use.
        """
        await run_shielded(self._synchronize, on_end=self._handle.lend("wait_idle()").end)

    def _synchronize(self) -> None:
        with self._device._access.current:
            self._device._driver.cuStreamSynchronize(self._handle_value)

    def wait(self, event: Event) -> None:
        """Let work enqueued from now on wait for ``event``, one of the same device. Source: cuStreamWaitEvent"""
        event = checked_peer(event, Event, self._device)
        with self._handle.lend("wait()"), event._handle.lend("wait()"), self._device.current():
            self._device._driver.cuStreamWaitEvent(self._handle_value, event._handle_value, 0)


class Event(Resource):
    """A mark in a stream that other streams and the host can wait for. Made by ``device.create_event()``.

    Source: CUevent
    """

    _device: Device
    _handle_value: int

    def __init__(self) -> None:
        self._refuse_construction("device.create_event()")

    @classmethod
    def _create(cls, device: Device, *, timing: bool) -> Self:
        event = cls.__new__(cls)
        with event._opening(device) as handle:
            driver = device._driver
            releases = Releases(device._access)
            with device.current():
                value = driver.cuEventCreate(CU_EVENT_DEFAULT if timing else CU_EVENT_DISABLE_TIMING)
                releases.add(lambda: driver.cuEventDestroy(value))
                handle.release = releases
            event._device, event._handle_value = device, value
        return event

    @property
    def handle(self) -> int:
        """The CUevent as an integer, valid while this object is open."""
        self._handle.require_open()
        return self._handle_value

    @property
    def device(self) -> Device:
        """The device that this event belongs to."""
        return self._device

    def record(self, stream: Stream) -> None:
        """Mark the present end of ``stream``, one of the same device. Source: cuEventRecord"""
        stream = checked_peer(stream, Stream, self._device)
        with self._handle.lend("record()"), stream._handle.lend("record()"), self._device.current():
            self._device._driver.cuEventRecord(self._handle_value, stream._handle_value)

    def query(self) -> bool:
        """True if the work before the mark has finished, or nothing was recorded. Source: cuEventQuery"""
        with self._handle.lend("query()"), self._device.current():
            return self._device._driver.cuEventQuery(self._handle_value) == CUDA_SUCCESS

    def synchronize(self) -> None:
        """Block this thread until the work before the mark has finished. Source: cuEventSynchronize"""
        with self._handle.lend("synchronize()"), self._device.current():
            self._device._driver.cuEventSynchronize(self._handle_value)

    def elapsed_ms(self, end: Event) -> float:
        """Milliseconds from this event to ``end``; both recorded, finished and made with timing on one device.

        Source: cuEventElapsedTime
        """
        end = checked_peer(end, Event, self._device)
        with self._handle.lend("elapsed_ms()"), end._handle.lend("elapsed_ms()"), self._device.current():
            return self._device._driver.cuEventElapsedTime(self._handle_value, end._handle_value)
