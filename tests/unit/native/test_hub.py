"""Hub: completions of one loop, taken by drain; wakers."""

from __future__ import annotations

import gc
import os
import select
import weakref
from functools import partial
from typing import Any, cast

import pytest

from trtx_py import _native

from .rig import MODES, PATIENCE_NS, at_rest, rig, submit


def readable(hub, timeout_s):
    return bool(select.select([hub.fd], [], [], timeout_s)[0])


@pytest.mark.parametrize("mode", MODES)
def test_fd_becomes_readable_for_a_waker_and_drain_calls_it_once(mode):
    with rig() as r:
        lane, hub, woken = r.lane(1, mode), _native.Hub(None), []
        port = r.port(lane.bucket())
        gate = lane.hold()
        wait = submit(port, 1.0, hub)
        wait.set_waker(lambda: woken.append(wait.done))
        hub.drain()
        assert not woken
        assert not readable(hub, 0)
        gate.open()
        assert readable(hub, 20)
        hub.drain()
        hub.drain()
        assert woken == [True]
        assert not readable(hub, 0)
        assert wait.result()["y"].tolist() == [[1.0] * 4]
        assert at_rest(port)


def test_waker_of_what_is_done_is_called_at_once():
    with rig() as r:
        lane, hub, woken = r.lane(1), _native.Hub(None), []
        port = r.port(lane.bucket())
        wait = submit(port, 1.0, hub)
        assert wait.block(PATIENCE_NS)
        wait.set_waker(lambda: woken.append(1))
        assert woken == [1]
        hub.drain()
        assert woken == [1]
        with pytest.raises(TypeError, match="callable"):
            wait.set_waker(3)


def test_waker_that_is_taken_back_is_not_called():
    with rig() as r:
        lane, hub, woken = r.lane(1), _native.Hub(None), []
        port = r.port(lane.bucket())
        gate = lane.hold()
        wait = submit(port, 1.0, hub)
        wait.set_waker(lambda: woken.append(1))
        wait.set_waker(None)
        gate.open()
        assert wait.block(PATIENCE_NS)
        hub.drain()
        assert not woken


def test_waker_that_raises_is_reported_and_the_others_are_woken(monkeypatch):
    with rig() as r:
        lane, hub, woken, reports = r.lane(2), _native.Hub(None), [], []
        monkeypatch.setattr("sys.unraisablehook", lambda report: reports.append(report.exc_type))
        port = r.port(lane.bucket())
        gate = lane.hold()
        first, second = (submit(port, 1.0, hub) for _ in range(2))
        first.set_waker(lambda: 1 / 0)
        second.set_waker(lambda: woken.append(1))
        gate.open()
        while not woken:
            assert readable(hub, 20)
            hub.drain()
        assert reports == [ZeroDivisionError]
        first.result()
        second.result()
        assert at_rest(port)


def test_waker_may_call_back_into_everything():
    with rig() as r:
        lane, hub, results = r.lane(2), _native.Hub(None), []
        port = r.port(lane.bucket())
        gate = lane.hold()
        waits = [submit(port, n, hub) for n in range(6)]

        def woken():
            if len(waits) == 6:
                waits.pop().cancel()
                submit(port, 9, hub).cancel()
            hub.drain()
            port.pump()
            for wait in list(waits):
                if wait.done:
                    waits.remove(wait)
                    results.append(wait.result()["y"][0, 0])

        for wait in waits:
            wait.set_waker(woken)
        del wait
        gate.open()
        while len(results) < 5:
            assert readable(hub, 20)
            hub.drain()
        assert sorted(results) == [0, 1, 2, 3, 4]
        lane.rest()
        assert at_rest(port)
        assert port.cancelled == 2


def test_waker_that_drops_another_wait_of_the_same_drain():
    with rig() as r:
        lane, hub, calls = r.lane(2), _native.Hub(None), []
        port = r.port(lane.bucket())
        gate = lane.hold()
        waits = [submit(port, 1.0, hub) for _ in range(2)]

        def woken():
            calls.append(1)
            waits.clear()

        for wait in waits:
            wait.set_waker(woken)
        del wait
        gate.open()
        lane.rest()
        hub.drain()
        assert calls
        assert port.cancelled == 2
        assert at_rest(port)


def test_hub_waits_for_the_last_wait_with_its_fd():
    with rig() as r:
        lane, hub = r.lane(1), _native.Hub(None)
        port = r.port(lane.bucket())
        gate = lane.hold()
        wait = submit(port, 1.0, hub)
        fd, gone = hub.fd, weakref.ref(hub)
        del hub
        assert wait.hub is gone()
        del wait
        assert gone() is None
        gate.open()
        lane.rest()
        assert lane.native.acquire() == 0  # the slot let go of the hub's queue too
        lane.native.release(0)
        with pytest.raises(OSError):
            os.fstat(fd)


def test_cycle_through_a_waker_is_collected():
    with rig() as r:
        lane, hub = r.lane(1), _native.Hub(None)
        port = r.port(lane.bucket())
        lane.hold()
        for _ in range(2):  # in flight, and queued
            wait = submit(port, 1.0, hub)
            wait.set_waker(partial(id, wait))
            del wait
        gc.collect()
        assert port.cancelled == 2
        assert at_rest(port)


def test_hub_and_its_loop_are_collected():
    class Loop:
        def create_future(self):
            raise AssertionError

    loop: Any = Loop()
    loop.hub = _native.Hub(loop.create_future)
    gone = weakref.ref(loop)
    del loop
    gc.collect()
    assert gone() is None


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="create_future"):
        _native.Hub(cast("Any", 3))
    with rig() as r:
        port = r.port(r.lane(1).bucket())
        wait = submit(port)
        with pytest.raises(RuntimeError, match="no hub"):
            wait.set_waker(print)
        with pytest.raises(RuntimeError, match="no hub"):
            next(wait.__await__())
        assert wait.block(0)
