"""The short way into a batch: where rows are written, what is not taken, how requests end, and what is held."""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref
from collections.abc import Awaitable
from typing import Any

import numpy as np
import pytest

from trtx_py import _native

WIDTH = 3
CAPACITY = 8


class Cancelled(BaseException):
    """What await raises for a request that was cancelled."""


class Turns:
    """As much of an event loop as a seat needs: who was to be called soon."""

    def __init__(self) -> None:
        self.soon: list[tuple[Any, tuple[Any, ...], Any]] = []

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> object:
        self.soon.append((callback, args, context))
        return object()


def make(
    loop: Any = None, *, max_bytes: int = 1 << 20, inputs: tuple[str, ...] = ("x",)
) -> tuple[_native.RowGate, tuple[np.ndarray, ...]]:
    """A gate for rows of three float32, and memory for eight of them, full of -1."""
    own: Any = _native.RowGate(
        tuple((name, "f", 4, (WIDTH,)) for name in inputs), ("y",), loop or Turns(), Cancelled, max_bytes
    )
    return own, tuple(np.full((CAPACITY, WIDTH), -1, np.float32) for _ in inputs)


def rows(count: int, value: float = 1.0) -> np.ndarray:
    return np.full((count, WIDTH), value, np.float32)


def offer(gate: _native.RowGate, count: int, value: float = 1.0, now: float = 0.0) -> Any:
    seat = gate.submit({"x": rows(count, value)}, now)
    assert seat is not None
    return seat


def outputs() -> np.ndarray:
    return np.arange(CAPACITY * 2, dtype=np.float32).reshape(CAPACITY, 2)


# ---- writing ----


@pytest.mark.parametrize("start", [0, 3])
def test_rows_are_written_one_behind_the_other(start: int) -> None:
    gate, views = make()
    load = gate.open(views, start, CAPACITY)
    seats = [offer(gate, count, value) for count, value in ((1, 5.0), (3, 6.0), (1, 7.0))]
    assert [(seat.offset, seat.rows) for seat in seats] == [(start, 1), (start + 1, 3), (start + 4, 1)]
    expected = np.repeat([-1.0, 5, 6, 7, -1], [start, 1, 3, 1, CAPACITY - start - 5]).astype(np.float32)
    np.testing.assert_array_equal(views[0], np.repeat(expected[:, None], WIDTH, 1))
    assert (load.start, load.stop, load.end, load.capacity) == (start, start + 5, start + 5, CAPACITY)
    assert (load.live, load.wanted, load.count) == (5, 3, 3)
    assert load.seats() == seats


def test_several_inputs() -> None:
    gate, views = make(inputs=("x", "z"))
    load = gate.open(views, 0, CAPACITY)
    assert gate.submit({"z": rows(2, 9.0), "x": rows(2, 4.0)}, 0.0) is not None
    assert (views[0][:2] == 4).all()
    assert (views[1][:2] == 9).all()
    for uneven in ({"x": rows(1), "z": rows(2)}, {"x": rows(2), "z": rows(1)}, {"x": rows(1), "w": rows(1)}):
        assert gate.submit(uneven, 0.0) is None
    assert (load.stop, load.count) == (2, 1)  # what was refused halfway counts for nothing
    assert (views[0][4:] == -1).all()


def test_no_more_than_there_is_room_for() -> None:
    gate, views = make()
    load = gate.open(views, 2, 7)
    for count in (2, 2):
        offer(gate, count)
    assert gate.submit({"x": rows(2)}, 0.0) is None
    last = offer(gate, 1)
    assert gate.submit({"x": rows(1)}, 0.0) is None
    assert (load.stop, last.offset) == (7, 6)
    assert (views[0][7:] == -1).all()


def test_large_requests_go_another_way() -> None:
    gate, views = make(max_bytes=2 * WIDTH * 4)
    load = gate.open(views, 0, CAPACITY)
    offer(gate, 2)
    assert gate.submit({"x": rows(3)}, 0.0) is None
    assert load.count == 1


def others() -> dict[str, Any]:
    return {
        "another dtype": {"x": rows(1).astype(np.float64)},
        "integers": {"x": rows(1).astype(np.int32)},
        "another byte order": {"x": rows(1).astype(">f4")},
        "longer rows": {"x": np.ones((1, WIDTH + 1), np.float32)},
        "no batch axis": {"x": np.ones(WIDTH, np.float32)},
        "another axis": {"x": np.ones((1, 1, WIDTH), np.float32)},
        "no rows": {"x": rows(0)},
        "strided": {"x": np.ones((2, 2 * WIDTH), np.float32)[:, ::2]},
        "a list": {"x": [[1.0] * WIDTH]},
        "another name": {"y": rows(1)},
        "one more": {"x": rows(1), "y": rows(1)},
        "nothing": {},
        "no dictionary": [("x", rows(1))],
    }


@pytest.mark.parametrize("what", others())
def test_what_does_not_go_this_way(what: str) -> None:
    """None, and no exception: the ordinary way says what is wrong with it, or takes it."""
    gate, views = make()
    load = gate.open(views, 0, CAPACITY)
    assert gate.submit(others()[what], 0.0) is None
    assert (load.stop, load.count) == (0, 0)
    assert (views[0] == -1).all()


def test_a_gate_that_is_shut() -> None:
    gate, views = make()
    assert gate.load is None
    assert gate.submit({"x": rows(1)}, 0.0) is None
    load = gate.open(views, 0, CAPACITY)
    assert gate.load is load
    with pytest.raises(ValueError, match="open already"):
        gate.open(views, 0, CAPACITY)
    first = offer(gate, 1)
    gate.shut()
    assert gate.load is None
    assert gate.submit({"x": rows(1)}, 0.0) is None
    assert load.seats() == [first]  # who is in stays in
    again = gate.open(views, 1, CAPACITY)
    assert offer(gate, 1).offset == 1
    assert (load.count, again.count) == (1, 1)


def test_memory_that_does_not_fit() -> None:
    gate, views = make()
    frozen = views[0].copy()
    frozen.flags.writeable = False
    for bad in (
        lambda: gate.open(views, 0, CAPACITY + 1),
        lambda: gate.open(views, -1, CAPACITY),
        lambda: gate.open(views, 5, 4),
        lambda: gate.open((), 0, CAPACITY),
        lambda: gate.open((*views, *views), 0, CAPACITY),
        lambda: gate.open((frozen,), 0, CAPACITY),
        lambda: gate.open((object(),), 0, CAPACITY),  # type: ignore[arg-type]
    ):
        with pytest.raises((ValueError, TypeError, BufferError)):
            bad()
        assert gate.load is None
    assert gate.open(views, 0, CAPACITY) is gate.load


@pytest.mark.parametrize("now", ["soon", None])
def test_a_time_that_is_none(now: Any) -> None:
    gate, views = make()
    load = gate.open(views, 0, CAPACITY)
    with pytest.raises(TypeError):
        gate.submit({"x": rows(1)}, now)
    assert load.count == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ((("x", "f", 4, [WIDTH]),), ("y",), Turns(), Cancelled, 10),
        ((("x", "E", 4, (WIDTH,)),), ("y",), Turns(), Cancelled, 10),
        ((("x", "f", 4, (1,) * 8),), ("y",), Turns(), Cancelled, 10),
        ((("x", "f", 4, (WIDTH,)),), ("y",), object(), Cancelled, 10),
        ((1,), ("y",), Turns(), Cancelled, 10),
    ],
)
def test_gates_that_make_no_sense(arguments: Any) -> None:
    with pytest.raises((TypeError, ValueError, AttributeError, SystemError)):
        _native.RowGate(*arguments)


# ---- arrivals ----


def test_arrivals() -> None:
    gate, views = make()
    load = gate.open(views, 0, CAPACITY)
    assert load.oldest == float("inf")
    assert load.arrivals() == b""
    seats = [offer(gate, 1, now=now) for now in (3.0, 4.0, 5.5)]
    assert load.oldest == 3.0
    assert np.frombuffer(load.arrivals()).tolist() == [3.0, 4.0, 5.5]
    seats[0].cancel()
    assert load.oldest == 4.0
    assert np.frombuffer(load.arrivals()).tolist() == [4.0, 5.5]
    seats[2].cancel()
    assert load.end == 2
    seats[1].cancel()
    assert (load.oldest, load.end, load.live, load.wanted) == (float("inf"), 0, 0, 0)
    assert (load.stop, load.count) == (3, 3)  # their rows are not used again


# ---- results ----


def test_each_gets_copies_of_its_rows() -> None:
    gate, views = make()
    load = gate.open(views, 1, CAPACITY)
    seats = [offer(gate, count) for count in (1, 2, 3)]
    seats[1].cancel()
    y = outputs()
    assert load.deliver((y,)) == (2, 4)
    first, last = (seat.result()["y"] for seat in (seats[0], seats[2]))
    np.testing.assert_array_equal(first, outputs()[1:2])
    np.testing.assert_array_equal(last, outputs()[4:7])
    y[:] = 0
    np.testing.assert_array_equal(last, outputs()[4:7])
    assert load.deliver((y,)) == (0, 0)
    assert (load.live, load.wanted, load.seats()) == (0, 0, [])


@pytest.mark.parametrize("wrong", [(), (1, 2), [outputs()]])
def test_outputs_that_are_none(wrong: Any) -> None:
    gate, views = make()
    load = gate.open(views, 0, CAPACITY)
    seat = offer(gate, 1)
    with pytest.raises(TypeError):
        load.deliver(wrong)
    assert not seat.done()


def test_an_output_that_cannot_be_cut_fails_its_requests() -> None:
    gate, views = make()
    load = gate.open(views, 0, CAPACITY)
    seats = [offer(gate, 1) for _ in range(2)]
    assert load.deliver((7,)) == (0, 0)  # type: ignore[arg-type]
    for seat in seats:
        with pytest.raises(TypeError):
            seat.result()


def test_an_end_is_one_end() -> None:
    gate, views = make()
    load = gate.open(views, 0, CAPACITY)
    done, failed, cancelled = (offer(gate, 1) for _ in range(3))
    with pytest.raises(RuntimeError, match="under way"):
        done.result()
    done.set_result({"y": 1})
    failed.set_exception(LookupError("gone"))
    assert cancelled.cancel()
    assert load.wanted == 0
    for seat in (done, failed, cancelled):
        assert seat.done()
        assert not seat.cancel()
        seat.set_result({"y": 2})
        seat.set_exception(KeyError())
    assert load.deliver((outputs(),)) == (0, 0)
    assert done.result() == {"y": 1}
    with pytest.raises(LookupError, match="gone"):
        failed.result()
    with pytest.raises(Cancelled):
        cancelled.result()
    assert [seat.cancelled() for seat in (done, failed, cancelled)] == [False, False, True]
    with pytest.raises(TypeError):
        done.set_exception("no exception")


def test_whoever_waits_is_called_soon_and_once() -> None:
    loop = Turns()
    gate, views = make(loop)
    load = gate.open(views, 0, CAPACITY)
    seat, late = offer(gate, 1), offer(gate, 1)
    called: list[Any] = []
    seat.add_done_callback(called.append, context="own")
    with pytest.raises(RuntimeError, match="one task"):
        seat.add_done_callback(called.append)
    load.deliver((outputs(),))
    ((callback, args, context),) = loop.soon
    assert (args, context, called) == ((seat,), "own", [])
    late.add_done_callback(called.append)  # it has ended: soon all the same
    assert len(loop.soon) == 2
    callback(*args)
    assert called == [seat]


# ---- awaited by tasks ----


def wait_for(count: int, body: Any) -> None:
    """``body(gate, load, tasks)`` with tasks that await a seat each."""

    async def ask(seat: Awaitable[Any]) -> Any:
        return await seat

    async def run() -> None:
        loop = asyncio.get_running_loop()
        gate: Any = _native.RowGate((("x", "f", 4, (WIDTH,)),), ("y",), loop, asyncio.CancelledError, 1 << 20)
        load = gate.open((np.zeros((CAPACITY, WIDTH), np.float32),), 0, CAPACITY)
        tasks = [asyncio.create_task(ask(offer(gate, 1))) for _ in range(count)]
        await asyncio.sleep(0)
        assert load.wanted == count
        await body(gate, load, tasks)

    asyncio.run(run())


def test_awaited_results() -> None:
    async def body(_: Any, load: Any, tasks: list[asyncio.Task[Any]]) -> None:
        load.seats()[1].set_exception(LookupError("mine"))
        assert load.deliver((outputs(),)) == (2, 2)
        found: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
        assert [found[0]["y"][0, 0], found[2]["y"][0, 0]] == [0, 4]
        assert isinstance(found[1], LookupError)

    wait_for(3, body)


def test_a_cancelled_task_takes_its_rows_out() -> None:
    async def body(_: Any, load: Any, tasks: list[asyncio.Task[Any]]) -> None:
        tasks[0].cancel()
        assert (await asyncio.gather(tasks[0], return_exceptions=True))[0].__class__ is asyncio.CancelledError
        assert (load.wanted, load.live) == (1, 1)
        load.deliver((outputs(),))
        assert (await tasks[1])["y"][0, 0] == 2

    wait_for(2, body)


def test_an_exception_thrown_in_takes_the_rows_out() -> None:
    gate, views = make()
    load = gate.open(views, 0, CAPACITY)
    for throw in ((LookupError("x"),), (LookupError,), (LookupError, "x"), (LookupError, LookupError("x"), None)):
        seat = offer(gate, 1)
        assert seat.send(None) is seat
        with pytest.raises(LookupError):
            seat.throw(*throw)
        assert seat.cancelled()
    seat = offer(gate, 1)
    for wrong in ((), (1,), (1, 2, 3, 4)):
        with pytest.raises(TypeError):
            seat.throw(*wrong)
    seat.close()
    assert seat.cancelled()
    assert load.wanted == 0


# ---- what is held ----


def test_who_is_dropped_takes_itself_out() -> None:
    gate, views = make()
    load = gate.open(views, 0, CAPACITY)
    seat, other = offer(gate, 2), offer(gate, 1)
    del seat
    assert (load.wanted, load.live, load.seats()) == (1, 1, [other])
    assert load.deliver((outputs(),)) == (1, 1)
    assert other.result()["y"][0, 0] == 4


def test_a_load_that_goes_shuts_the_gate() -> None:
    gate, views = make()
    load = gate.open(views, 0, CAPACITY)
    seat = offer(gate, 1)
    del load
    assert gate.load is not None  # its seat keeps it
    seat.cancel()
    assert gate.load is None
    assert gate.submit({"x": rows(1)}, 0.0) is None


def test_nothing_is_held_for_longer_than_it_is_needed() -> None:
    loop = Turns()
    gate, views = make(loop)
    view, given, result = views[0], rows(1), {"y": object()}
    objects: tuple[Any, ...] = (view, given, result, loop, Cancelled)
    before = [sys.getrefcount(each) for each in objects]
    for _ in range(50):
        load = gate.open(views, 0, CAPACITY)
        seats: list[Any] = [gate.submit({"x": given}, 0.0) for _ in range(6)]
        seats[0].set_result(result)
        seats[1].set_exception(LookupError())
        seats[2].cancel()
        seats[3].add_done_callback(len)
        load.deliver((outputs(),))
        del load, seats
        loop.soon.clear()
    assert [sys.getrefcount(each) for each in objects] == before
    del gate
    assert sys.getrefcount(loop) < before[3]


def test_cycles_are_collected() -> None:
    """A seat's callback refers to the seat, as a task does; and a loop refers to its gate."""

    class Loop(Turns):
        gate: Any = None

    loop = Loop()
    gate, views = make(loop)
    loop.gate = gate
    load = gate.open(views, 0, CAPACITY)
    seat: Any = offer(gate, 1)

    class Task:
        def __call__(self, _: object) -> None: ...

        waits_for: Any = None

    task = Task()
    task.waits_for = seat
    seat.add_done_callback(task)
    gone = weakref.ref(task), weakref.ref(loop)
    del loop, gate, views, load, seat, task
    gc.collect()
    gc.collect()  # the seat's own cycle keeps its load, which is no container, and that keeps the gate
    assert [each() for each in gone] == [None, None]


# ---- rows that the caller fills ----


def test_placed_rows_are_the_memory_itself() -> None:
    gate, views = make(inputs=("x", "z"))
    load = gate.open(views, 2, CAPACITY)
    caller = object()
    seat = gate.place(3, 1.5, caller)
    assert seat is not None
    assert (seat.offset, seat.rows, load.stop, load.live, load.filling) == (2, 3, 5, 3, 1)
    assert load.fillers() == [caller]
    assert load.oldest == 1.5
    inputs = seat.inputs()
    assert list(inputs) == ["x", "z"]
    inputs["x"][...], inputs["z"][...] = 5, 6
    assert (views[0][2:5] == 5).all()
    assert (views[1][2:5] == 6).all()
    assert (views[0][5:] == -1).all()
    seat.filled()
    seat.filled()
    assert (load.filling, load.fillers(), load.live) == (0, [], 3)


def test_placed_and_copied_rows_share_a_load() -> None:
    gate, views = make()
    load = gate.open(views, 0, CAPACITY)
    first, placed, last = offer(gate, 2), gate.place(4, 0.0, "caller"), offer(gate, 2)
    assert placed is not None
    placed.inputs()["x"][...] = 9
    placed.filled()
    assert (views[0][:, 0] == [1, 1, 9, 9, 9, 9, 1, 1]).all()
    assert gate.place(1, 0.0, "nobody") is None  # full
    assert load.deliver((outputs(),)) == (3, CAPACITY)
    for seat in (first, placed, last):
        np.testing.assert_array_equal(result_of(seat)["y"], outputs()[seat.offset : seat.offset + seat.rows])


def result_of(seat: Any) -> Any:
    with pytest.raises(StopIteration) as ended:
        seat.__await__().send(None)
    return ended.value.value


@pytest.mark.parametrize("how", ["cancel", "drop", "fail"])
def test_who_fills_rows_and_ends_is_not_waited_for(how: str) -> None:
    gate, views = make()
    load = gate.open(views, 0, CAPACITY)
    seat: Any = gate.place(2, 0.0, "caller")
    stays = gate.place(1, 0.0, "other")
    if how == "cancel":
        assert seat.cancel()
    elif how == "fail":
        seat.set_exception(ValueError("no"))
    if how != "drop":
        with pytest.raises(RuntimeError, match="its rows are not its own"):
            seat.inputs()
        seat.filled()  # it has ended: nothing to count
    del seat
    assert (load.live, load.wanted, load.filling, load.fillers()) == (1, 1, 1, ["other"])
    assert load.stop == 3  # what was given out is not given out again
    assert stays is not None


def test_a_caller_that_is_held_by_its_own_seat_is_collected() -> None:
    class Caller:
        seat: Any = None

    gate, views = make()
    load = gate.open(views, 0, CAPACITY)
    caller = Caller()
    caller.seat = gate.place(1, 0.0, caller)
    gone = weakref.ref(caller)
    del caller
    gc.collect()
    assert gone() is None
    assert (load.live, load.filling) == (0, 0)


def test_what_cannot_be_placed() -> None:
    gate, views = make()
    assert gate.place(1, 0.0, None) is None  # shut
    load = gate.open(views, 0, CAPACITY)
    assert gate.place(CAPACITY + 1, 0.0, None) is None
    place: Any = gate.place
    with pytest.raises(ValueError, match="0 rows"):
        place(0, 0.0, None)
    for arguments in ((1, 0.0), (1.5, 0.0, None), (1, "now", None), (2**70, 0.0, None)):
        with pytest.raises((TypeError, OverflowError)):
            place(*arguments)
    assert (load.stop, load.count) == (0, 0)
    gate.shut()
    assert gate.place(1, 0.0, None) is None
