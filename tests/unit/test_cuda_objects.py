"""Device, Stream, Event, DeviceBuffer and PinnedBuffer: counted, owned, and kept while in use."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, VirtualClock, fail
from tests.unit.ownership import Gate, until


@pytest.fixture
def device(mock_backend: MockBackend) -> Iterator[trtx.Device]:
    with trtx.Device(0, backend=mock_backend) as made:
        yield made


class Foreign:
    """Stands for a tensor or stream of another library."""


def test_device_facts(device: trtx.Device, mock_backend: MockBackend) -> None:
    assert (device.ordinal, device.name, device.compute_capability) == (0, "Mock GPU 0", "8.9")
    assert device.total_bytes == 8 << 30
    assert device.free_bytes() == device.total_bytes
    with device.allocate(1000):
        assert device.free_bytes() == device.total_bytes - 1024
    with pytest.raises(trtx.InvalidArgumentError, match="sees 1"):
        trtx.Device(1, backend=mock_backend)


def test_no_device() -> None:
    for _ in range(2):
        with pytest.raises(trtx.TrtxError):
            trtx.Device(0, backend=MockBackend(devices=0))
    assert trtx.live_objects() == []


def test_current_restores(device: trtx.Device, mock_backend: MockBackend) -> None:
    driver = mock_backend.driver
    assert driver.cuCtxGetCurrent() == 0
    with device.current():
        outer = driver.cuCtxGetCurrent()
        with device.current():
            assert driver.cuCtxGetCurrent() == outer
        assert driver.cuCtxGetCurrent() == outer != 0
    assert driver.cuCtxGetCurrent() == 0


def test_counts(device: trtx.Device) -> None:
    for allocate, statistics in (
        (device.allocate, device.memory_statistics),
        (device.allocate_pinned, device.pinned_statistics),
    ):
        assert statistics() == trtx.MemoryStatistics(0, 0, 0, 0)
        with allocate(100):
            with allocate(50):
                assert statistics() == trtx.MemoryStatistics(150, 150, 2, 2)
            assert statistics() == trtx.MemoryStatistics(100, 150, 2, 1)
            with allocate(0) as empty:
                assert empty.nbytes == 0
                assert empty.address > 0
        assert statistics() == trtx.MemoryStatistics(0, 150, 3, 0)


def test_failed_allocation_is_not_counted(mock_backend_factory: Any) -> None:
    backend = mock_backend_factory(memory_bytes=1024, faults=[fail("cuMemHostAlloc")])
    with trtx.Device(0, backend=backend) as device:
        with pytest.raises(trtx.CudaError) as caught:
            device.allocate(2048)
        assert (caught.value.code, caught.value.name, caught.value.call) == (
            2,
            "CUDA_ERROR_OUT_OF_MEMORY",
            "cuMemAlloc",
        )
        with pytest.raises(trtx.CudaError):
            device.allocate_pinned(16)
        assert device.memory_statistics().allocations == device.pinned_statistics().allocations == 0
        assert len(trtx.live_objects()) == 1
        device.allocate(1024).close()


@pytest.mark.parametrize("nbytes", [-1, 1.5, "1", None, True])
def test_bad_sizes(nbytes: Any, device: trtx.Device) -> None:
    for allocate in (device.allocate, device.allocate_pinned):
        with pytest.raises(trtx.InvalidArgumentError, match="nbytes"):
            allocate(nbytes)


def test_copies(device: trtx.Device) -> None:
    with device.allocate(64) as buffer, device.create_stream() as stream:
        for array in (np.arange(16, dtype=np.float32), np.arange(6).reshape(2, 3).T, np.float16(3), np.zeros((0, 3))):
            buffer.copy_from_host(array, stream)
            back = buffer.copy_to_host(array.shape, array.dtype, stream)
            np.testing.assert_array_equal(back, array)
            assert back.flags.owndata
        with pytest.raises(trtx.ShapeError, match="has 72 bytes"):
            buffer.copy_from_host(np.zeros(9), stream)
        with pytest.raises(trtx.ShapeError, match="has 72 bytes"):
            buffer.copy_to_host((9,), "f8", stream)
        with pytest.raises(trtx.ShapeError):
            buffer.copy_to_host((-1,), "f8", stream)


def test_pinned_view(device: trtx.Device) -> None:
    with device.allocate_pinned(64) as buffer:
        view = buffer.array((4, 4), "f4")
        view[:] = np.arange(16).reshape(4, 4)
        assert view.ctypes.data == buffer.address
        np.testing.assert_array_equal(buffer.array((2,), "f4"), [0, 1])
        assert buffer.array((0, 7), "f8").shape == (0, 7)
        for shape, dtype in (((17,), "f4"), ((-1,), "f4"), ((2**31 - 1, 2**31 - 1), "f4")):
            with pytest.raises(trtx.ShapeError):
                buffer.array(shape, dtype)
        with pytest.raises(trtx.InvalidArgumentError, match="Python objects"):
            buffer.array((1,), object)
        del view


@pytest.mark.parametrize("kind", ["stream", "buffer"])
def test_owner_of_a_borrowed_thing_lives_as_long_as_it_is_open(kind: str, device: trtx.Device) -> None:
    foreign = Foreign()
    seen = weakref.ref(foreign)
    with device.create_stream() as stream, device.allocate(64) as memory:
        item: Any
        if kind == "stream":
            item = trtx.Stream.from_handle(device, stream.handle, owner=foreign)
            assert item.handle == stream.handle
        else:
            item = trtx.DeviceBuffer.from_handle(device, memory.address, 64, owner=foreign)
            assert (item.address, item.nbytes) == (memory.address, 64)
        assert "'borrowed'" in repr(item)
        del foreign
        gc.collect()
        assert seen() is not None
        item.close()
        gc.collect()
        assert seen() is None  # although the closed object is still there
        assert item.closed
        stream.synchronize()  # what was borrowed is not destroyed
        memory.copy_from_host(np.zeros(1), stream)


def test_borrowed_memory_is_not_counted(device: trtx.Device) -> None:
    with device.allocate(64) as memory:
        before = device.memory_statistics()
        with trtx.DeviceBuffer.from_handle(device, memory.address, 32, owner=memory) as half:
            assert device.memory_statistics() == before
            assert [item.device_bytes for item in trtx.live_objects() if item.kind == "DeviceBuffer"] == [64, 0]
            with device.create_stream() as stream:
                half.copy_from_host(np.arange(4), stream)
                np.testing.assert_array_equal(memory.copy_to_host((4,), int, stream), np.arange(4))
        assert device.memory_statistics() == before


def test_handles_that_cannot_be(device: trtx.Device) -> None:
    for handle in (-1, None, 1.5, "1"):
        with pytest.raises(trtx.InvalidArgumentError):
            trtx.Stream.from_handle(device, handle, owner=None)  # type: ignore[arg-type]
    for address, nbytes in ((0, 1), (-1, 1), (None, 1), (256, -1), (256, 1.5)):
        with pytest.raises(trtx.InvalidArgumentError):
            trtx.DeviceBuffer.from_handle(device, address, nbytes, owner=None)  # type: ignore[arg-type]
    assert len(trtx.live_objects()) == 1
    with trtx.Stream.from_handle(device, 0, owner=None) as default:
        default.synchronize()


def test_stream_with_work_is_in_use(device: trtx.Device, mock_backend: MockBackend) -> None:
    stream = device.create_stream()
    assert stream.query()
    gate = Gate(mock_backend, device, stream)
    assert not stream.query()
    with pytest.raises(trtx.BorrowedError, match="has not finished"):
        stream.close()
    with device.create_event() as event:
        assert event.query()
        event.record(stream)
        assert not event.query()
        gate.open()
        event.synchronize()
        assert event.query()
    stream.synchronize()
    assert stream.query()
    stream.close()


async def test_wait_idle_is_not_cut_short(device: trtx.Device, mock_backend: MockBackend) -> None:
    stream = device.create_stream()
    gate = Gate(mock_backend, device, stream)
    waiting = asyncio.create_task(stream.wait_idle())
    await asyncio.sleep(0)
    with pytest.raises(trtx.BorrowedError, match="wait_idle"):
        stream.close()
    waiting.cancel()
    await asyncio.sleep(0)
    assert not waiting.done()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await stream.wait_idle()
    stream.close()


async def test_wait_idle_survives_the_aclose_of_the_device(mock_backend: MockBackend) -> None:
    device = trtx.Device(0, backend=mock_backend)
    stream = device.create_stream()
    gate = Gate(mock_backend, device, stream)
    waiting = asyncio.create_task(stream.wait_idle())
    await asyncio.sleep(0)
    closing = asyncio.create_task(device.aclose())
    await until(lambda: device.closed)
    assert not waiting.done()
    assert not closing.done()
    gate.open()
    await asyncio.gather(waiting, closing)
    assert stream.closed
    assert trtx.live_objects() == []


def test_events_order_streams(device: trtx.Device, mock_backend: MockBackend) -> None:
    with device.create_stream() as first, device.create_stream() as second, device.create_event() as event:
        gate = Gate(mock_backend, device, first)
        event.record(first)
        second.wait(event)
        assert not second.query()
        gate.open()
        second.synchronize()
        first.synchronize()


def test_elapsed_time(mock_backend_factory: Any) -> None:
    clock = VirtualClock()
    backend = mock_backend_factory(clock=clock)
    device = trtx.Device(0, backend=backend)
    with device, device.create_stream() as stream, device.create_event(timing=False) as mark:  # noqa: SIM117
        with device.create_event() as start, device.create_event() as end:
            start.record(stream)
            start.synchronize()
            clock.advance(0.25)
            end.record(stream)
            end.synchronize()
            assert start.elapsed_ms(end) == 250.0
            with pytest.raises(trtx.CudaError):
                start.elapsed_ms(mark)


def test_things_of_two_devices(mock_backend_factory: Any) -> None:
    backend = mock_backend_factory(devices=2)
    with trtx.Device(0, backend=backend) as one, trtx.Device(1, backend=backend) as two:
        with one.create_event() as event, two.create_stream() as stream, one.allocate(16) as buffer:
            with pytest.raises(trtx.InvalidArgumentError, match=r"belongs to .*'cuda:1'.*expected one .*'cuda:0'"):
                event.record(stream)
            with pytest.raises(trtx.InvalidArgumentError, match="belongs to"):
                buffer.copy_from_host(np.zeros(1), stream)
        assert two.name == "Mock GPU 1"


def test_a_copy_keeps_its_buffer(device: trtx.Device, mock_backend: MockBackend) -> None:
    """A thread that closes the buffer meanwhile is refused: the driver would copy from freed memory."""
    buffer, stream = device.allocate(64), device.create_stream()
    gate = Gate(mock_backend, device, stream)
    copying = threading.Thread(target=buffer.copy_to_host, args=((4,), "f4", stream))
    copying.start()
    while not buffer._handle.loans:
        pass
    for item in (buffer, stream):
        with pytest.raises(trtx.BorrowedError, match="a copy"):
            item.close()
    gate.open()
    copying.join()
    buffer.close()
    stream.close()
