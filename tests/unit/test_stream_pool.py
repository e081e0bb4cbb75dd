"""The pool of streams: lent once, reused, grown with a warning, gone with the device."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

import trtx_py as trtx
from mock_backend import MockBackend, fail
from tests.unit.ownership import Gate
from trtx_py.cuda._stream_pool import SOFT_LIMIT, StreamPool


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_streams_are_made_on_demand_and_reused_longest_idle_first(mock_backend: MockBackend) -> None:
    with trtx.Device(0, backend=mock_backend) as device, device.current():
        pool = device._access.streams
        assert (pool.out, pool.idle) == (0, 0)
        first, second = pool.take(), pool.take()
        assert first != second
        pool.give(second)
        pool.give(first)
        assert (pool.out, pool.idle) == (0, 2)
        assert [pool.take(), pool.take()] == [second, first]
        third = pool.take()
        assert third not in (first, second)
        for stream in (first, second, third):
            pool.give(stream)
        assert (pool.out, pool.idle) == (0, 3)


def test_a_stream_given_back_with_work_on_it_runs_the_next_takers_behind_that(mock_backend: MockBackend) -> None:
    with trtx.Device(0, backend=mock_backend) as device:
        pool, driver = device._access.streams, mock_backend.driver
        with device.current():
            stream = pool.take()
            address = driver.cuMemAlloc(1)
        with trtx.Stream.from_handle(device, stream, owner=None) as view:
            gate = Gate(mock_backend, device, view)
            pool.give(stream)
            with device.current():
                assert pool.take() == stream
                driver.cuMemsetD8Async(address, 1, 1, stream)
            assert not view.query()
            gate.open()
            view.synchronize()
        pool.give(stream)
        with device.current():
            driver.cuMemFree(address)


def test_the_device_takes_its_streams_along(mock_backend: MockBackend) -> None:
    device = trtx.Device(0, backend=mock_backend)
    pool = device._access.streams
    with device.current():
        kept, given = pool.take(), pool.take()
    pool.give(given)
    with device.current():
        mock_backend.driver.cuStreamDestroy(kept)  # stands for its owner's end: the mock counts what is left behind
    device.close()
    assert (pool.out, pool.idle) == (1, 0)
    pool.give(kept)  # too late, and harmless
    assert (pool.out, pool.idle) == (0, 0)
    with pytest.raises(trtx.ClosedError, match=r"'cuda:0' was closed"):
        pool.take()


def test_the_context_goes_although_a_stream_does_not() -> None:
    backend = MockBackend(faults=[fail("cuStreamDestroy")])
    device = trtx.Device(0, backend=backend)
    pool = device._access.streams
    with device.current():
        streams = [pool.take(), pool.take()]
    for stream in streams:
        pool.give(stream)
    with pytest.raises(trtx.CudaError, match="cuStreamDestroy"):
        device.close()
    assert device.closed
    assert backend.calls["cuStreamDestroy"] == 2
    assert backend.calls["cuDevicePrimaryCtxRelease"] == 1
    assert trtx.live_objects() == []
    backend.close()


def test_what_is_not_lent_cannot_be_given(mock_backend: MockBackend) -> None:
    with trtx.Device(0, backend=mock_backend) as device, device.current():
        pool = device._access.streams
        stream = pool.take()
        pool.give(stream)
        for wrong in (stream, 0, 12345):
            with pytest.raises(trtx.InvalidArgumentError, match="once"):
                pool.give(wrong)
        assert (pool.out, pool.idle) == (0, 1)


def test_a_stream_that_cannot_be_made_is_not_lent(mock_backend_factory: Any) -> None:
    backend = mock_backend_factory(faults=[fail("cuStreamCreate")])
    with trtx.Device(0, backend=backend) as device, device.current():
        pool = device._access.streams
        with pytest.raises(trtx.CudaError):
            pool.take()
        assert (pool.out, pool.idle) == (0, 0)
        pool.give(pool.take())


class Streams:
    """A driver that only makes streams."""

    def __init__(self) -> None:
        self.made = 0

    def cuStreamCreate(self, flags: int) -> int:
        assert flags == 1  # does not wait for the legacy default stream
        self.made += 1
        return self.made


def pool_of(driver: Any, soft_limit: int = SOFT_LIMIT) -> StreamPool:
    return StreamPool(driver, "Device#1 'cuda:0'", soft_limit)


def test_warns_once_for_every_doubling(caplog: pytest.LogCaptureFixture) -> None:
    pool = pool_of(Streams())
    warned_at: list[int] = []
    for count in range(1, 131):
        pool.take()
        if len(warnings_of(caplog)) > len(warned_at):
            warned_at.append(count)
    assert warned_at == [33, 65, 129]
    assert all(record.name == "trtx_py" for record in caplog.records)
    assert warnings_of(caplog)[0].startswith(
        "33 streams of Device#1 'cuda:0' are in use at once, more than the 32 that are usual; "
    )
    assert "fewer lanes" in warnings_of(caplog)[0]


def test_streams_that_come_and_go_are_nothing_to_warn_of(caplog: pytest.LogCaptureFixture) -> None:
    driver = Streams()
    pool = pool_of(driver, soft_limit=2)
    for _ in range(50):
        pool.give(pool.take())
    assert driver.made == 1
    for _ in range(5):  # the same peak again and again is said once
        streams = [pool.take() for _ in range(3)]
        for stream in streams:
            pool.give(stream)
    assert len(warnings_of(caplog)) == 1
    assert driver.made == 3


def test_threads_never_share_a_stream() -> None:
    driver = Streams()
    pool = pool_of(driver)
    lent: set[int] = set()
    shared: list[int] = []

    def work() -> None:
        for _ in range(500):
            stream = pool.take()
            if stream in lent:
                shared.append(stream)
            lent.add(stream)
            lent.discard(stream)
            pool.give(stream)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shared == []
    assert driver.made <= 6
    assert (pool.out, pool.idle) == (0, driver.made)
