"""Watcher and Lane by hand: slots, launches, waiting without the GIL, death."""

from __future__ import annotations

import threading

import pytest

from trtx_py import _native
from trtx_py.backends.protocols import STICKY_CUDA_ERRORS

from .rig import LATENCY, MODES, PATIENCE_NS, rig

HELD, IN_FLIGHT, DONE = 1, 2, 3
LAUNCH_FAILED = 719


def test_slots_are_handed_out_once_and_come_back():
    with rig() as r:
        lane = r.lane(2).native
        assert (lane.slots, lane.acquire(), lane.acquire(), lane.acquire()) == (2, 0, 1, -1)
        lane.release(0)
        assert lane.acquire() == 0
        lane.release(0)
        with pytest.raises(ValueError, match="slot 0 is not held"):
            lane.release(0)
        lane.release(1)


@pytest.mark.parametrize("mode", MODES)
def test_mark_and_wait(mode):
    with rig() as r:
        made = r.lane(1, mode)
        lane, gate = made.native, made.hold()
        slot = lane.acquire()
        assert lane.mark(slot) == 0
        assert lane.wait(slot, 0, 1_000_000)[0] == IN_FLIGHT
        assert lane.poll() == 1
        assert not lane.close()
        gate.open()
        state, status, launched, completed = lane.wait(slot, 0, 0)
        assert (state, status) == (DONE, 0)
        assert 0 < launched <= completed
        statistics = lane.statistics()
        assert (statistics["submitted"], statistics["completed"], statistics["in_flight"]) == (1, 1, 0)
        lane.release(slot)


def test_wait_lets_other_threads_run():
    with rig() as r:
        made = r.lane(1)
        gate, lane = made.hold(), made.native
        slot = lane.acquire()
        lane.mark(slot)
        opener = threading.Timer(0.01, gate.open)
        opener.start()  # could not run if wait held the GIL
        assert lane.wait(slot, 0, PATIENCE_NS)[0] == DONE
        opener.join()
        lane.release(slot)


def test_lane_is_not_closed_under_a_thread_that_waits():
    with rig() as r:
        made = r.lane(1)
        lane, gate = made.native, made.hold()
        slot = lane.acquire()
        lane.mark(slot)
        thread = threading.Thread(target=lane.wait, args=(slot, 0, 0))
        thread.start()
        assert not lane.close()
        gate.open()
        thread.join()
        assert lane.close()
        with pytest.raises(RuntimeError, match="closed"):
            lane.acquire()


def test_slot_given_back_in_flight_comes_back_by_itself():
    with rig() as r:
        made = r.lane(1)
        lane, gate = made.native, made.hold()
        lane.mark(lane.acquire())
        lane.release(0)
        assert lane.acquire() == -1
        gate.open()
        made.rest()
        assert lane.acquire() == 0
        lane.release(0)
        assert lane.statistics()["dropped"] == 1


def test_sticky_error_ends_the_lane():
    with rig(sound=False) as r:
        lane = r.lane(2).native
        slot = lane.acquire()
        r.fault("cuEventQuery", LAUNCH_FAILED, lose=True)
        assert lane.mark(slot) == 0
        assert lane.wait(slot, 0, PATIENCE_NS)[:2] == (DONE, LAUNCH_FAILED)
        assert lane.dead == LAUNCH_FAILED
        assert lane.mark(slot) == LAUNCH_FAILED


#: Errors that cuda.h says nothing grave about.
HARMLESS = {1, 2, 201, 304, 400, 701, 703, 708, 711, 720, 800, 801}


@pytest.mark.parametrize("code", sorted(STICKY_CUDA_ERRORS | HARMLESS))
def test_which_errors_end_a_lane(code: int):
    """What Python takes for the end of a device ends a lane too, and nothing else does."""
    with rig(sound=code in HARMLESS) as r:
        made = r.lane(2)
        lane = made.native
        slot = lane.acquire()
        r.fault("cuEventRecord", code)
        lane.mark(slot)
        made.rest() if code in HARMLESS else None
        assert lane.dead == (0 if code in HARMLESS else code)


def test_arguments_are_checked():
    with rig() as r:
        watcher = r.watcher
        with pytest.raises(ValueError, match="1 to 1024 slots"):
            _native.Lane(r.api, r.context, 0, 0, watcher, LATENCY)
        with pytest.raises(ValueError, match="mode 0 to 2"):
            _native.Lane(r.api, r.context, 0, 1, watcher, 3)
        with pytest.raises(TypeError):
            _native.Lane(object(), r.context, 0, 1, watcher, LATENCY)
        lane = r.lane(1).native
        with pytest.raises(RuntimeError, match="1 open lanes"):
            watcher.close()
        for wrong in (-1, 1, 2**70):
            with pytest.raises((ValueError, OverflowError)):
                lane.release(wrong)
        with pytest.raises(ValueError, match="slot 7"):
            lane.wait(7, 0, 1)
        assert lane.submit(0, 1) != 0  # not held


def test_lane_cannot_be_made_where_events_cannot():
    with rig() as r:
        r.fault("cuEventCreate", 2, nth=2)
        with pytest.raises(RuntimeError, match="events could not be made") as refused:
            _native.Lane(r.api, r.context, 0, 4, r.watcher, LATENCY)
        assert refused.value.args[1] == 2  # the driver's status, for the caller to name
