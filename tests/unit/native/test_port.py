"""Port, Bucket and Place: which requests take the fast path, which slot they get, and the queue."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest

from trtx_py import _native

from .rig import FOREVER_NS, PATIENCE_NS, FailedError, RefusedError, at_rest, rig, sample, submit

OUT_OF_MEMORY, LAUNCH_FAILED = 2, 719
INVALID_HANDLE = 400


def ask(port, value=1.0, width=4):
    wait = port.submit({"x": sample(value, width)}, None)
    assert wait is not None
    return wait


def answer(wait):
    assert wait.block(PATIENCE_NS)
    return wait.result()


def test_result_is_new_arrays_of_the_callers():
    with rig() as r:
        port = r.port(r.lane(1).bucket())
        first, second = answer(ask(port, 1.5)), answer(ask(port, 2.5))
        assert list(first) == ["y"]
        assert first["y"].tolist() == [[1.5] * 4]
        assert second["y"].tolist() == [[2.5] * 4]
        assert first["y"].flags.owndata
        assert at_rest(port)
        assert (port.hits, port.completed) == (2, 2)


class Array(np.ndarray):
    """Not exactly an ndarray."""


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"x": sample(), "y": sample()},
        {"y": sample()},
        {"x": [[1.0] * 4]},
        {"x": sample().astype(np.float64)},
        {"x": sample().astype(">f4")},
        {"x": sample().view(Array)},
        {"x": sample(width=5)},
        {"x": sample()[0]},
        {"x": sample(width=8)[:, ::2]},
        {"x": np.array([["a"] * 4])},
        {"x": np.zeros((1, 4), "M8[s]")},
        {"x": np.zeros((1, 4), [("a", "f4")])},
    ],
    ids=str,
)
def test_what_does_not_fit_is_left_to_the_caller(inputs):
    with rig() as r:
        port = r.port(r.lane(1).bucket())
        assert port.submit(inputs, None) is None
        assert port.submit(type("Mapping", (dict,), {})(x=sample()), None) is None
        assert port.hits == 0


def test_large_and_strange_buckets_take_no_arrays_but_give_places():
    with rig() as r:
        lane = r.lane(2)
        port = r.port(lane.bucket(4, on_loop=False, slots=[0]), lane.bucket(8, format=None, slots=[1]))
        for width in (4, 8):
            assert port.submit({"x": sample(width=width)}, None) is None
            place = answer(port.acquire(((1, width),), None))
            assert place.inputs[0].shape == (1, width)
            place.release()
        assert port.acquire(((1, 5),), None) is None


def test_least_busy_lane_is_chosen():
    with rig() as r:
        lanes = [r.lane(2), r.lane(2)]
        buckets = [lane.bucket() for lane in lanes]
        port = r.port(*buckets)
        for lane in lanes:
            lane.hold()
        waits = [ask(port) for _ in range(4)]
        assert [bucket.hits for bucket in buckets] == [2, 2]
        for gate in r.gates:
            gate.open()
        for wait in waits:
            answer(wait)
        assert at_rest(port)


def test_queue_is_first_come_first_served():
    with rig() as r:
        order: list[float] = []
        lane = r.lane(1)
        bucket = lane.bucket()
        port = r.port(bucket)
        gate = lane.hold()
        waits = [ask(port, n) for n in range(5)]
        assert [wait.queued for wait in waits] == [False, True, True, True, True]
        assert (port.in_flight, port.queued, bucket.busy) == (1, 4, 5)
        gate.open()
        for n, wait in enumerate(waits):
            assert not any(later.done for later in waits[n + 2 :])  # one slot: nobody overtakes
            order.append(answer(wait)["y"][0, 0])
        assert order == [0, 1, 2, 3, 4]
        assert at_rest(port)
        assert bucket.busy == 0


def test_newcomer_does_not_overtake_another_shape_that_waits_for_the_same_slot():
    with rig() as r:
        lane = r.lane(1)
        port = r.port(lane.bucket(4), lane.bucket(8), lane.bucket(2))
        gate = lane.hold()
        first, second, third = ask(port, 1, 4), ask(port, 2, 8), ask(port, 3, 4)
        first.cancel()
        gate.open()
        lane.rest()
        fourth = ask(port, 4, 2)  # meets a free slot, and gives it to the one that waits longest
        assert (second.queued, third.queued, fourth.queued) == (False, True, True)
        assert [answer(w)["y"][0, 0] for w in (second, third, fourth)] == [2, 3, 4]
        assert at_rest(port)


def test_only_slots_with_a_place_are_used():
    with rig() as r:
        lane = r.lane(3)
        bucket = lane.bucket(slots=[1])
        port = r.port(bucket)
        lane.hold()
        first, second = ask(port), ask(port)
        assert (first.queued, second.queued) == (False, True)
        assert bucket.places == 1
        r.gates[0].open()
        answer(first)
        answer(second)


def test_place_that_is_added_serves_the_queue():
    with rig() as r:
        lane, other = r.lane(1), r.lane(1)
        port = r.port(lane.bucket())
        lane.hold()
        first, second = ask(port, 1), ask(port, 2)
        port.add(other.bucket())
        assert not second.queued
        assert answer(second)["y"][0, 0] == 2
        first.cancel()
        assert at_rest(port)


def test_removed_bucket_takes_nothing_new_and_its_queue_waits_for_another():
    with rig() as r:
        lane, other = r.lane(1), r.lane(1)
        bucket = lane.bucket()
        port = r.port(bucket)
        gate = lane.hold()
        first, second = ask(port, 1), ask(port, 2)
        port.remove(bucket)
        assert port.submit({"x": sample()}, None) is None
        with pytest.raises(ValueError, match="not in this port"):
            port.remove(bucket)
        gate.open()
        answer(first)
        assert second.queued
        assert bucket.busy == 0
        port.add(other.bucket())
        assert answer(second)["y"][0, 0] == 2
        assert at_rest(port)


def test_silent_slot_serves_the_queue_at_the_next_pump():
    with rig() as r:
        lane = r.lane(1)
        bucket = lane.bucket()
        port = r.port(bucket)
        gate = lane.hold()
        first, second = ask(port, 1), ask(port, 2)
        del first
        assert (port.cancelled, port.pump(), bucket.busy) == (1, 1, 2)
        gate.open()
        lane.rest()
        assert port.pump() == 0
        assert answer(second)["y"][0, 0] == 2
        assert at_rest(port)


def test_queued_array_that_changed_shape_is_refused():
    with rig() as r:
        lane = r.lane(1)
        port = r.port(lane.bucket())
        gate = lane.hold()
        first, array = ask(port), sample()
        second = port.submit({"x": array}, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            array.shape = (2, 2)
        gate.open()
        answer(first)
        with pytest.raises(ValueError, match="changed in place"):
            answer(second)
        assert at_rest(port)


def test_launch_that_fails_is_raised_at_once_and_gives_the_slot_back():
    with rig() as r:
        port = r.port(r.lane(1).bucket())
        r.fault("cuGraphLaunch", OUT_OF_MEMORY)
        with pytest.raises(FailedError) as caught:
            ask(port)
        assert (caught.value.status, caught.value.call) == (OUT_OF_MEMORY, "cuGraphLaunch")
        answer(ask(port))
        assert at_rest(port)
        assert (port.failed, port.completed) == (1, 1)


def test_launch_that_fails_for_a_queued_request_is_that_ones_alone():
    with rig() as r:
        lane = r.lane(1)
        port = r.port(lane.bucket())
        gate = lane.hold()
        waits = [ask(port, n) for n in range(3)]
        r.fault("cuGraphLaunch", OUT_OF_MEMORY)
        gate.open()
        assert answer(waits[0])["y"][0, 0] == 0
        with pytest.raises(FailedError) as caught:
            answer(waits[1])
        assert caught.value.status == OUT_OF_MEMORY
        assert answer(waits[2])["y"][0, 0] == 2
        assert at_rest(port)


def test_dead_lane_ends_all_that_is_in_flight_and_queued():
    with rig(sound=False) as r:
        lane = r.lane(2)
        port = r.port(lane.bucket())
        gate = lane.hold()
        waits = [ask(port) for _ in range(5)]
        r.fault("cuEventQuery", LAUNCH_FAILED, lose=True)
        gate.open()
        for number, wait in enumerate(waits):
            with pytest.raises(FailedError) as caught:
                answer(wait)
            launched = number < 2  # the others say which call would have told them
            assert (caught.value.status, caught.value.call) == (LAUNCH_FAILED, "" if launched else "cuGraphLaunch")
        with pytest.raises(FailedError):
            ask(port)
        with pytest.raises(FailedError):
            port.acquire(((1, 4),), None)
        assert port.pump() == 0
        assert at_rest(port)
        assert port.failed == 6


def test_lane_that_lives_serves_the_shape_of_one_that_died():
    with rig(sound=False) as lost:  # a device of its own: an error that ends a lane ends its device
        doomed = lost.lane(1)
        its_bucket = doomed.bucket()
        with rig() as r:
            port = r.port(its_bucket, r.lane(1).bucket())
            lose(lost, doomed)
            for n in range(4):
                assert answer(ask(port, n))["y"][0, 0] == n
            assert at_rest(port)


def lose(device, lane):
    """An error of the device ends this lane."""
    slot = lane.native.acquire()
    device.fault("cuEventQuery", LAUNCH_FAILED)
    lane.native.mark(slot)
    lane.native.wait(slot, 0, PATIENCE_NS)
    assert lane.native.dead == LAUNCH_FAILED
    lane.native.release(slot)


def test_fail_queued_ends_only_what_is_queued():
    with rig() as r:
        lane = r.lane(1)
        port = r.port(lane.bucket())
        gate = lane.hold()
        first, second = ask(port), ask(port)
        wanted = port.acquire(((1, 4),), None)
        port.fail_queued(RefusedError("closing"))
        for wait in (second, wanted):
            assert wait.done
            with pytest.raises(RefusedError, match="closing"):
                wait.result()
        gate.open()
        answer(first)
        assert at_rest(port)
        with pytest.raises(TypeError):
            port.fail_queued("no exception")


def test_closed_port_refuses():
    with rig() as r:
        port = r.port(r.lane(1).bucket())
        assert port.open
        port.close()
        assert not port.open
        with pytest.raises(RefusedError):
            submit(port)
        with pytest.raises(RefusedError):
            port.acquire(((1, 4),), None)


def test_place_is_filled_and_read_in_place():
    with rig() as r:
        bucket = r.lane(1).bucket()
        port = r.port(bucket)
        place = bucket.acquire()
        assert (place.slot, place.in_flight, bucket.busy) == (0, False, 1)
        assert bucket.acquire() is None
        queued = ask(port, 9)
        for value in (3.0, 4.0):
            place.inputs[0][:] = value
            result = answer(place.submit(None, False))
            assert result["y"] is place.outputs[0]
            assert place.outputs[0].tolist() == [[value] * 4]
        assert answer(place.submit(None, True))["y"] is not place.outputs[0]
        assert queued.queued
        place.release()
        place.release()
        assert not queued.queued
        assert answer(queued)["y"][0, 0] == 9
        with pytest.raises(RuntimeError, match="given back"):
            place.submit(None, True)
        assert at_rest(port)
        assert bucket.busy == 0


def test_place_in_flight():
    with rig() as r:
        lane = r.lane(1)
        bucket = lane.bucket()
        port = r.port(bucket)
        gate = lane.hold()
        place = bucket.acquire()
        wait = place.submit(None, True)
        assert place.in_flight
        with pytest.raises(RuntimeError, match="in flight"):
            place.submit(None, True)
        wait.cancel()
        assert place.in_flight  # the slot stays the place's
        again = ask(port, 5)
        place.release()
        gate.open()
        lane.rest()
        assert answer(again)["y"][0, 0] == 5
        assert at_rest(port)


def test_place_released_under_a_wait_ends_it():
    with rig() as r:
        lane = r.lane(1)
        bucket = lane.bucket()
        port = r.port(bucket)
        lane.hold()
        place = bucket.acquire()
        wait = place.submit(None, True)
        place.release()
        with pytest.raises(RuntimeError, match="given back while"):
            answer(wait)
        assert at_rest(port)


def test_places_and_requests_share_one_queue():
    with rig() as r:
        lane = r.lane(1)
        port = r.port(lane.bucket())
        gate = lane.hold()
        first, wanted, last = ask(port, 1), port.acquire(((1, 4),), None), ask(port, 3)
        gate.open()
        answer(first)
        place = answer(wanted)
        assert last.queued
        del place
        assert answer(last)["y"][0, 0] == 3
        dropped = port.acquire(((1, 4),), None)
        assert dropped.done
        del dropped
        assert answer(ask(port, 4))["y"][0, 0] == 4
        assert at_rest(port)
        assert port.hits == 3


def test_threads_share_a_port():
    with rig() as r:
        lanes = [r.lane(2), r.lane(1)]
        port = r.port(*(lane.bucket() for lane in lanes))
        errors: list[BaseException] = []

        def work(base):
            try:
                for n in range(200):
                    wait = ask(port, base + n)
                    if n % 7 == 3:
                        wait.cancel()
                        continue
                    assert wait.block(FOREVER_NS)
                    assert wait.result()["y"][0, 0] == base + n
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert at_rest(port)
        assert port.hits == 1200


def test_arguments_are_checked():
    with rig() as r:
        lane = r.lane(1)
        bucket = lane.bucket()
        port = r.port(bucket)
        for wrong in (lambda: port.submit({}), lambda: port.submit({}, 3), lambda: port.acquire(3, None)):
            with pytest.raises(TypeError):
                wrong()
        with pytest.raises(ValueError, match="already"):
            port.add(bucket)
        with pytest.raises(TypeError):
            port.add(lane)
        view = np.zeros((1, 4), np.float32)
        with pytest.raises(ValueError, match="added once"):
            bucket.add_place(0, 1, (view,), (view,))
        fresh = _native.Bucket(lane.native, (("x", "f", (1, 4)),), ("y",), True)
        for views in ((), (view.astype(np.float64),), (np.zeros((1, 5), np.float32),)):
            with pytest.raises(ValueError, match="slot 0"):
                fresh.add_place(0, 1, views, (view,))
        other = _native.Bucket(lane.native, (("z", "f", (1, 4)),), ("y",), True)
        with pytest.raises(ValueError, match="same names"):
            port.add(other)
        with pytest.raises(TypeError, match="an input is"):
            _native.Bucket(lane.native, ("x",), ("y",), True)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="never initialised"):
            _native.Bucket.__new__(_native.Bucket).acquire()
        with pytest.raises(ValueError, match="native scalar"):
            _native.Bucket(lane.native, (("x", ">f", (1, 4)),), ("y",), True)


def test_lane_closed_before_the_result_was_taken():
    with rig() as r:
        lane = r.lane(2)
        bucket = lane.bucket()
        port = r.port(bucket)
        wait, place = ask(port), bucket.acquire()
        assert wait.block(PATIENCE_NS)
        while not lane.native.close():  # also while the watcher looks
            pass
        assert wait.done
        with pytest.raises(FailedError) as caught:
            wait.result()
        assert caught.value.status == INVALID_HANDLE
        assert not place.in_flight
        with pytest.raises(RuntimeError, match="lane is closed"):
            place.submit(None, True)
        place.release()
        assert bucket.acquire() is None
        assert bucket.busy == 0
        assert at_rest(port)
