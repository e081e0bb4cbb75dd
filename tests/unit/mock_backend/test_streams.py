"""Order, events and time of the mock's streams."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest

from mock_backend import VirtualClock
from trtx_py._errors import CudaError


def read(rig, pointer, nbytes, stream):
    host = np.zeros(nbytes, np.uint8)
    rig.driver.cuMemcpyDtoHAsync(host.ctypes.data, pointer, nbytes, stream)
    return set(host.tolist())


def test_a_stream_is_asynchronous_and_in_order(rig):
    pointer = rig.alloc(32)
    with rig.blocked(rig.stream):
        rig.driver.cuMemsetD8Async(pointer, 1, 32, rig.stream)
        rig.driver.cuMemsetD8Async(pointer, 2, 32, rig.stream)
        assert rig.driver.cuStreamQuery(rig.stream) == 600
        assert read(rig, pointer, 32, rig.new_stream()) == {0xCB}
    assert read(rig, pointer, 32, rig.stream) == {2}
    assert rig.driver.cuStreamQuery(rig.stream) == 0


def test_wait_event_orders_streams(rig):
    pointer, event, other = rig.alloc(8), rig.new_event(), rig.new_stream()
    with rig.blocked(rig.stream):
        rig.driver.cuMemsetD8Async(pointer, 5, 8, rig.stream)
        rig.driver.cuEventRecord(event, rig.stream)
        rig.driver.cuStreamWaitEvent(other, event, 0)
        rig.driver.cuMemsetD8Async(pointer + 4, 6, 4, other)
        assert rig.driver.cuEventQuery(event) == 600
        assert rig.driver.cuStreamQuery(other) == 600
    assert read(rig, pointer, 8, other) == {5, 6}


def test_wait_for_an_unrecorded_event_is_no_wait(rig):
    event = rig.new_event()
    rig.driver.cuStreamWaitEvent(rig.stream, event, 0)
    rig.driver.cuStreamSynchronize(rig.stream)  # would hang if it waited
    rig.driver.cuEventSynchronize(event)
    assert rig.driver.cuStreamQuery(rig.stream) == 0
    assert rig.driver.cuEventQuery(event) == 0


def test_a_wait_means_the_recording_at_the_time_of_the_call(rig):
    event, other = rig.new_event(), rig.new_stream()
    rig.driver.cuEventRecord(event, rig.stream)
    rig.driver.cuStreamWaitEvent(other, event, 0)
    with rig.blocked(rig.stream):
        rig.driver.cuEventRecord(event, rig.stream)
        rig.driver.cuStreamSynchronize(other)  # would hang if it waited for the second recording
        assert rig.driver.cuEventQuery(event) == 600


def test_null_stream_and_blocking_streams_wait_for_each_other(rig):
    blocking, free = rig.new_stream(flags=0), rig.new_stream(flags=1)
    pointer = rig.alloc(4)
    with rig.blocked(blocking):
        rig.driver.cuMemsetD8Async(pointer, 1, 4, 0)
        assert rig.driver.cuStreamQuery(0) == 600
        rig.driver.cuStreamSynchronize(free)
    assert read(rig, pointer, 4, 0) == {1}
    with rig.blocked(0):
        rig.driver.cuMemsetD8Async(pointer, 2, 4, blocking)
        rig.driver.cuMemsetD8Async(pointer, 3, 4, free)
        rig.driver.cuStreamSynchronize(free)
        assert rig.driver.cuStreamQuery(blocking) == 600
    assert read(rig, pointer, 4, blocking) == {2}


def test_destroyed_stream_finishes_its_work(rig):
    pointer = rig.alloc(4)
    stream = rig.driver.cuStreamCreate(1)
    event = rig.new_event()
    with rig.blocked(stream):
        rig.driver.cuMemsetD8Async(pointer, 9, 4, stream)
        rig.driver.cuEventRecord(event, stream)
        rig.driver.cuStreamDestroy(stream)
        with pytest.raises(CudaError, match="was destroyed"):
            rig.driver.cuStreamSynchronize(stream)
    rig.driver.cuEventSynchronize(event)
    assert read(rig, pointer, 4, rig.stream) == {9}


def test_stream_threads_end(rig):
    stream = rig.driver.cuStreamCreate(1)
    threads = set(os.listdir("/proc/self/task"))
    rig.driver.cuStreamQuery(stream)
    assert set(os.listdir("/proc/self/task")) <= threads  # started by the first operation
    rig.driver.cuMemsetD8Async(rig.alloc(4), 0, 4, stream)
    rig.driver.cuStreamSynchronize(stream)
    (thread,) = set(os.listdir("/proc/self/task")) - threads
    rig.driver.cuStreamDestroy(stream)
    deadline = time.monotonic() + 10
    while thread in os.listdir("/proc/self/task"):
        assert time.monotonic() < deadline


def test_elapsed_time_follows_the_clock(rig_with):
    clock = VirtualClock()
    rig = rig_with(clock=clock)
    start, end = rig.new_event(), rig.new_event()
    rig.driver.cuEventRecord(start, rig.stream)
    rig.driver.launch(rig.stream, lambda: clock.sleep(0.25), "kernel")
    rig.driver.cuEventRecord(end, rig.stream)
    rig.driver.cuStreamSynchronize(rig.stream)
    assert rig.driver.cuEventElapsedTime(start, end) == 250.0


def test_elapsed_time_rules(rig):
    start, end, untimed = rig.new_event(), rig.new_event(), rig.new_event(2)

    def code(first, second):
        with pytest.raises(CudaError) as caught:
            rig.driver.cuEventElapsedTime(first, second)
        return caught.value.code

    assert code(start, end) == 400
    rig.driver.cuEventRecord(start, rig.stream)
    rig.driver.cuEventRecord(untimed, rig.stream)
    with rig.blocked(rig.stream):
        rig.driver.cuEventRecord(end, rig.stream)
        assert code(start, end) == 600
    rig.driver.cuStreamSynchronize(rig.stream)
    assert rig.driver.cuEventElapsedTime(start, end) >= 0
    assert code(start, untimed) == 400


def test_elapsed_time_is_never_negative(rig_with):
    """The host reads a clock of its own for the second event, and before it records it the stream reaches the first."""

    class Clock:
        def __init__(self):
            self.ns, self.meanwhile = 1, None

        def now_ns(self):
            now, meanwhile = self.ns, self.meanwhile
            self.ns += 1000
            if meanwhile is not None and threading.current_thread() is threading.main_thread():
                self.meanwhile = None
                meanwhile()
            return now

        def sleep(self, seconds):
            raise AssertionError("nothing here takes time")

    clock, gate = Clock(), threading.Event()
    rig = rig_with(clock=clock)
    start, end = rig.new_event(), rig.new_event()
    rig.driver.launch(rig.stream, gate.wait, "kernel")
    rig.driver.cuEventRecord(start, rig.stream)

    def finish():
        gate.set()
        rig.driver.cuStreamSynchronize(rig.stream)

    clock.meanwhile = finish
    rig.driver.cuEventRecord(end, rig.stream)
    assert clock.meanwhile is None
    assert rig.driver.cuEventElapsedTime(start, end) == 0.0


def test_virtual_clock_only_goes_forward():
    clock = VirtualClock(start_ns=5)
    clock.sleep(3600)
    assert clock.now_ns() == 3600 * 10**9 + 5
    with pytest.raises(ValueError, match="backwards"):
        clock.advance(-1)


def test_many_streams_from_many_threads(rig):
    pointer = rig.alloc(16 * 8)
    errors = []

    def work(index):
        try:
            rig.driver.cuCtxPushCurrent(rig.context)
            stream = rig.driver.cuStreamCreate(index % 2)
            for value in range(50):
                rig.driver.cuMemsetD8Async(pointer + 16 * index, value, 16, stream)
            rig.driver.cuStreamSynchronize(stream)
            rig.driver.cuStreamDestroy(stream)
            rig.driver.cuCtxPopCurrent()
        except CudaError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert read(rig, pointer, 128, rig.stream) == {49}
