"""Nobody waits for what nobody does: who looks when room is needed, and what is heard where things go wrong."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import anyio
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, slow
from tests.unit.batching import (
    ALONE,
    ask,
    ask_many,
    assert_settled,
    batching,
    held,
    length_plan,
    start,
    turns,
    until,
    wide_plan,
)
from tests.unit.serving import PATIENCE_S, GateClock, affine, rows
from tests.unit.test_batcher_rows import ask_length
from trtx_py import _native
from trtx_py.serving import _groups
from trtx_py.serving._policy import BatchPolicy, Scheduler, State, Ticket


async def test_who_waits_for_bytes_has_native_work_make_room() -> None:
    """It holds all the bytes there may be, and goes on for long if nobody tells it that others wait."""
    backend = MockBackend()
    policy = trtx.BatchPolicy(max_bytes_in_flight=256)  # two batches of 128 bytes
    async with batching(backend, engine={"lanes": 2}, policy=policy) as batcher:
        await batcher.warmup()
        many = start(ask_many(batcher, 8 * 100_000))  # some ten seconds, on a machine of its own
        await until(lambda: batcher._native._runs)
        assert batcher.statistics().bytes_in_flight == 256
        await ask(batcher, 1, 1)
        assert not many.done()
        many.cancel()
        await asyncio.gather(many, return_exceptions=True)
        await assert_settled(batcher)
    backend.assert_clean()


@pytest.mark.parametrize("overload", ["wait", "reject", "shed_oldest"])
async def test_room_for_guests_that_nobody_uses_is_for_others(overload: str) -> None:
    """A batch is open for more of a kind that does not come; the rest of the queue is callers' who are slow to fill."""
    backend = MockBackend()
    policy = trtx.BatchPolicy(overload=overload)
    options: dict[str, Any] = {"max_queue": 40, "max_delay_s": 0.0, "policy": policy, "batch_axis": 0}
    async with batching(backend, length_plan(), **options) as batcher:
        await ask_length(batcher, 1, 4)
        await ask_length(batcher, 1, 5)
        batcher._launcher.lone = False
        await asyncio.gather(*(ask_length(batcher, 1, 4) for _ in range(6)))
        await turns()
        assert [batch.reserved for batch in batcher._scheduler.opened()] == [8]
        go = asyncio.Event()

        async def hold() -> None:
            async with batcher.alloc_rows(8, {"x": (8, 5)}):
                await go.wait()

        holders = [start(hold()) for _ in range(4)]
        await until(lambda: len(batcher._scheduler.apart) == 4)
        await turns()
        assert batcher.statistics().waiting_rows == 32
        try:
            with anyio.fail_after(PATIENCE_S):
                await ask_length(batcher, 2, 5)
        finally:
            go.set()
        assert (batcher.statistics().shed, batcher.statistics().rejected) == (0, 0)
        await asyncio.gather(*holders)
        await assert_settled(batcher)
    backend.assert_clean()


async def test_a_shape_is_not_forgotten_while_somebody_waits_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = MockBackend()
    monkeypatch.setattr(_groups, "_MOST_GROUPS", 2)
    async with batching(backend, length_plan(), max_queue=8, max_delay_s=0.0, batch_axis=0) as batcher:
        await ask_length(batcher, 1, 4)
        await ask_length(batcher, 1, 5)
        async with batcher.alloc_rows(8, {"x": (8, 4)}) as own:
            await until(lambda: batcher._scheduler.apart)
            outside = start(ask_length(batcher, 1, 5))
            await turns()
            another = start(ask_length(batcher, 1, 6))
            await until(lambda: ((6,),) in batcher._groups.known)
            own["x"][...] = 1
            await own.infer()
        await asyncio.gather(outside, another)
        await assert_settled(batcher)
    backend.assert_clean()


class Filled:
    """Eight rows that came in as guests', all of them still being filled."""

    stop = end = live = 8
    oldest = 0.0
    filling = 1


def test_nobody_is_shed_for_a_request_that_is_refused() -> None:
    """For a moment more rows wait than may: a guest's rows count twice while its batch is about to go without them."""
    core = Scheduler(BatchPolicy(overload="shed_oldest"), max_rows=40, max_delay_s=0.0, lanes=1)
    core.started()
    batch = core.open("guests", 8, 0.0)
    core.welcome(batch, Filled(), core.room_for_guests(batch))
    for _ in range(31):
        core.offer(Ticket(1, "others", priority=1), 0.0)
    one = Ticket(1, "others")
    core.offer(one, 0.0)
    core.set_apart(Ticket(8, "guests"))
    assert core.waiting_rows == 48
    with pytest.raises(trtx.OverloadedError):
        core.offer(Ticket(1, "others"), 1.0)
    assert one.state is State.WAITING, "nobody would have told it"


class NoThreads:
    """No more threads that copy can be started. What they write waits for ``go``."""

    def __init__(self, batcher: trtx.DynamicBatcher, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self._write, self._start = batcher._layout.write, threading.Thread.start
        monkeypatch.setattr(batcher._layout, "write", self.write)
        monkeypatch.setattr(threading.Thread, "start", lambda thread: self.start(thread))

    def write(self, *args: Any) -> None:
        if threading.current_thread().name.startswith("trtx_py-rows"):
            assert self.go.wait(PATIENCE_S)
        self._write(*args)

    def start(self, thread: threading.Thread) -> None:
        if thread.name.startswith("trtx_py-rows"):
            raise RuntimeError("can't start new thread")
        self._start(thread)


async def ask_wide(batcher: trtx.DynamicBatcher, count: int, value: float) -> None:
    """Rows that threads copy."""
    x = np.full((count, 32768), value, np.float32)
    assert np.array_equal((await batcher.infer({"x": x}, tenant="own"))["y"], affine(x))


async def test_large_rows_without_threads(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    async with batching(mock_backend, wide_plan(), policy=ALONE, max_delay_s=0.0) as batcher:
        await batcher.warmup()
        batcher._launcher.lone = False
        NoThreads(batcher, monkeypatch)
        with anyio.fail_after(PATIENCE_S):
            await asyncio.gather(*(ask_wide(batcher, 2, float(n)) for n in range(3)))
        await assert_settled(batcher)


async def test_large_rows_without_enough_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that there is comes to them late, when they were copied already; it must not count as another copy."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4))
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, wide_plan(), policy=ALONE, max_delay_s=0.0) as batcher:
        await batcher.warmup()
        batcher._launcher.lone = False
        backend.inject(slow(count=1))
        first = start(ask_wide(batcher, 2, 1.0))
        await until(lambda: clock.reached.acquire(blocking=False))
        crew = NoThreads(batcher, monkeypatch)
        second = start(ask_wide(batcher, 2, 2.0))
        await until(lambda: batcher._scheduler.opened())
        third = start(ask_wide(batcher, 2, 3.0))
        await turns()
        crew.go.set()
        await until(lambda: all(batch.written for batch in batcher._scheduler.opened()))
        clock.open()
        with anyio.fail_after(PATIENCE_S):
            await asyncio.gather(first, second, third)
            await asyncio.gather(*(ask_wide(batcher, 2, float(n)) for n in range(3)))
        await assert_settled(batcher)
    backend.assert_clean()


@pytest.mark.parametrize("of", ["arrays", "pieces", "statistics"])
async def test_many_rows_that_meet_an_error_of_our_own(monkeypatch: pytest.MonkeyPatch, of: str) -> None:
    """In the loop's own turns, where nobody would be told: whoever waits is, and the batcher can be closed."""
    backend = MockBackend()
    async with batching(backend, engine={"lanes": 2}, policy=ALONE, max_delay_s=0.0) as batcher:
        await batcher.warmup()
        native, missing = batcher._native, iter([True])

        def none(call: Any) -> Any:
            def first(*args: Any) -> Any:
                if next(missing, False):
                    raise ValueError("one of our own")
                return call(*args)

            return first

        if of == "arrays":
            monkeypatch.setattr("trtx_py._native.ManyRows", none(_native.ManyRows))
            await ask_many(batcher, 100)
        elif of == "pieces":
            many = start(batcher.infer_many({"x": rows(8 * 2000)}))
            await until(lambda: native._runs)
            monkeypatch.setattr(batcher._layout, "part", none(batcher._layout.part))
            await ask(batcher, 3, 1, tenant="own")
            with pytest.raises(trtx.ExecutionError, match="one of our own"), anyio.fail_after(PATIENCE_S):
                await many
        else:
            monkeypatch.setattr(batcher._launcher, "chunks_done", none(batcher._launcher.chunks_done))
            with pytest.raises(trtx.ExecutionError, match="one of our own"), anyio.fail_after(PATIENCE_S):
                await batcher.infer_many({"x": rows(100)})
        await ask_many(batcher, 100)
        await ask(batcher, 3, 1)
        await assert_settled(batcher)
    backend.assert_clean()


async def test_a_batch_whose_holes_cannot_be_closed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory to move rows in: those who are in it hear of it, and the next ones are served."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE) as batcher:
        async with held(backend, clock, batcher):
            tasks = [start(ask(batcher, 1, n, tenant="own")) for n in range(8)]
            await turns()
            for n in (0, 1, 2, 3, 5, 6):
                tasks[n].cancel()
            await turns()
            part, missing = batcher._layout.part, iter([True])

            def none(*args: Any) -> Any:
                if next(missing, False):
                    raise MemoryError
                return part(*args)

            monkeypatch.setattr(batcher._layout, "part", none)
            clock.open()
            with anyio.fail_after(PATIENCE_S):
                found = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(found[4], trtx.ExecutionError)
            assert isinstance(found[7], trtx.ExecutionError)
            assert "MemoryError" in str(found[4])
        await assert_settled(batcher)
        await ask(batcher, 1, 1)
        await ask(batcher, 3, 2, tenant="own")
        await assert_settled(batcher)
    backend.assert_clean()
