"""Who is let in, who waits, who is given up: overload policies, bytes, deadlines, priorities, and backpressure."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import anyio
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.batching import (
    ALONE,
    NEVER_S,
    Skip,
    ask,
    ask_many,
    assert_settled,
    batching,
    held,
    start,
    turns,
    until,
)
from tests.unit.serving import PATIENCE_S, GateClock, affine, rows


async def test_waiting_callers_are_let_in_in_order() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, max_queue=4, max_batch_size=4, policy=ALONE) as batcher:
        async with held(backend, clock, batcher):
            order: list[int] = []

            async def one(number: int) -> None:
                await ask(batcher, 2, number)
                order.append(number)

            tasks = [start(one(number)) for number in range(9)]
            await turns()
            s = batcher.statistics()
            assert (s.waiting_rows, s.rejected) == (4, 0)
            assert s.accepted == 10
            clock.open()
            await asyncio.gather(*tasks)
            assert order == sorted(order)
        await assert_settled(batcher)
    backend.assert_clean()


async def test_reject() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    policy = trtx.BatchPolicy(overload="reject", depth=1)
    async with batching(backend, max_queue=4, policy=policy) as batcher:
        async with held(backend, clock, batcher):
            inside = [start(ask(batcher, 2, number)) for number in range(2)]
            await turns()
            for _ in range(3):
                with pytest.raises(trtx.OverloadedError, match="max_queue 4"):
                    await ask(batcher)
            with pytest.raises(trtx.OverloadedError):
                async with batcher.alloc_rows(1):
                    pass
            with pytest.raises(trtx.OverloadedError):
                await ask_many(batcher, 3)
            clock.open()
            await asyncio.gather(*inside)
        await assert_settled(batcher)
        assert batcher.statistics().rejected == 5
        await ask(batcher)
    backend.assert_clean()


async def test_a_large_request_is_let_in_by_its_first_rows() -> None:
    """More rows than may wait: they follow as there is room, and count as one request."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    policy = trtx.BatchPolicy(overload="reject", depth=1)
    async with batching(backend, max_queue=20, policy=policy) as batcher:
        async with held(backend, clock, batcher):
            many = start(ask_many(batcher, 50))
            await turns()
            assert batcher.statistics().waiting_rows <= 20
            with pytest.raises(trtx.OverloadedError):
                await ask(batcher, 8)
            clock.open()
            await many
        await assert_settled(batcher)
        assert (batcher.statistics().rejected, batcher.statistics().accepted) == (1, 2)
    backend.assert_clean()


async def test_the_oldest_is_shed() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    policy = trtx.BatchPolicy(overload="shed_oldest", depth=1)
    async with batching(backend, max_queue=4, policy=policy) as batcher:
        async with held(backend, clock, batcher):
            tasks = []
            for number in range(6):
                tasks.append(start(ask(batcher, 1, number, priority=int(number == 1))))
                await turns(5)
            await turns()
            assert [task.done() for task in tasks] == [True, False, True, False, False, False]
            for task in (tasks[0], tasks[2]):
                with pytest.raises(trtx.OverloadedError, match="given up"):
                    await task
            clock.open()
            await asyncio.gather(*(task for number, task in enumerate(tasks) if number not in (0, 2)))
        await assert_settled(batcher)
        assert batcher.statistics().shed == 2
    backend.assert_clean()


async def test_a_large_request_sheds_none_of_its_own() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    policy = trtx.BatchPolicy(overload="shed_oldest", depth=1)
    async with batching(backend, max_queue=8, max_batch_size=4, policy=policy) as batcher:
        async with held(backend, clock, batcher):
            task = start(ask_many(batcher, 30, 3))
            await turns()
            clock.open()
            await task
        await assert_settled(batcher)
    backend.assert_clean()


async def test_rows_that_are_filled_may_be_shed() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    policy = trtx.BatchPolicy(overload="shed_oldest", depth=1)
    async with batching(backend, max_queue=1, policy=policy, max_delay_s=NEVER_S) as batcher:
        async with held(backend, clock, batcher, 1), batcher.alloc_rows(1) as own:
            other = start(ask(batcher))
            await turns()
            own["x"][...] = 1  # the memory is still theirs
            with pytest.raises(trtx.OverloadedError):
                await own.infer()
            clock.open()
            await other
        await assert_settled(batcher)
    backend.assert_clean()


async def test_bytes_in_flight_let_the_next_in() -> None:
    """What holds them back is being computed: nobody else is in line whose launch would let them in."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    policy = trtx.BatchPolicy(max_bytes_in_flight=64, depth=1)
    async with batching(backend, policy=policy) as batcher:
        async with held(backend, clock, batcher):
            tasks = [start(ask(batcher, 4, number)) for number in range(5)]
            await turns()
            assert batcher.statistics().bytes_in_flight <= 64
            clock.open()
            with anyio.fail_after(PATIENCE_S):
                await asyncio.gather(*tasks)
        with anyio.fail_after(PATIENCE_S):
            await ask_many(batcher, 40)
        await assert_settled(batcher)
    backend.assert_clean()


async def test_a_lone_request_counts_its_bytes() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    policy = trtx.BatchPolicy(max_bytes_in_flight=64, overload="reject")
    async with batching(backend, policy=policy) as batcher:
        await batcher.warmup()
        with pytest.raises(trtx.InvalidArgumentError, match="max_bytes_in_flight"):
            await ask(batcher, 8)  # nobody is there, and it is too much all the same
        async with held(backend, clock, batcher):  # 32 bytes
            assert batcher.statistics().bytes_in_flight == 32
            with pytest.raises(trtx.OverloadedError):
                await ask(batcher, 3)
            clock.open()
        await assert_settled(batcher)
    backend.assert_clean()


async def test_what_could_never_be_taken(mock_backend: MockBackend) -> None:
    async with batching(mock_backend, policy=trtx.BatchPolicy(max_bytes_in_flight=63)) as batcher:
        with pytest.raises(trtx.InvalidArgumentError):
            await ask(batcher, 4)
        with anyio.fail_after(PATIENCE_S):
            await ask(batcher, 3)
            with pytest.raises(trtx.InvalidArgumentError):
                await asyncio.gather(*(ask(batcher, 1) for _ in range(4)), ask(batcher, 4))
            await ask(batcher, 3)
        await assert_settled(batcher)


async def test_the_smallest_queue(mock_backend: MockBackend) -> None:
    async with batching(mock_backend, max_queue=1) as batcher:
        with anyio.fail_after(PATIENCE_S):
            await asyncio.gather(*(ask(batcher, 1, seed) for seed in range(30)), ask_many(batcher, 20))
        await assert_settled(batcher)


# ---- deadlines ----


async def test_late_requests_never_run() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE, max_queue=6) as batcher:
        skip = Skip()
        async with held(backend, clock, batcher):
            placed = start(ask(batcher, 2, deadline_s=100))
            in_time = start(ask(batcher, 2, deadline_s=900))
            many = start(ask_many(batcher, 2, deadline_s=100))
            outside = start(ask(batcher, 3, deadline_s=100))
            await turns()
            await skip.by(99)
            assert not any(task.done() for task in (placed, many, outside))
            await skip.by(2)
            for task in (placed, many, outside):
                assert task.done()
                with pytest.raises(trtx.DeadlineExceededError, match="deadline_s"):
                    await task
            with pytest.raises(TimeoutError):
                placed.result()
            assert not in_time.done()
            before = backend.calls["cuGraphLaunch"]
            clock.open()
            await in_time
            assert backend.calls["cuGraphLaunch"] - before == 1
        await assert_settled(batcher)
        assert batcher.statistics().late == 2 + 1
    backend.assert_clean()


async def test_rows_that_are_filled_too_late() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE, max_delay_s=NEVER_S) as batcher:
        skip = Skip()
        async with held(backend, clock, batcher):
            async with batcher.alloc_rows(2, deadline_s=10) as own:
                await skip.by(11)
                own["x"][...] = 1
                with pytest.raises(trtx.DeadlineExceededError):
                    await own.infer()
            async with batcher.alloc_rows(2, deadline_s=10):
                await skip.by(11)
            clock.open()
        await assert_settled(batcher)
        assert batcher.statistics().late == 2
    backend.assert_clean()


async def test_a_deadline_of_no_time(mock_backend: MockBackend) -> None:
    """It is late unless it can be launched at once."""
    async with batching(mock_backend) as batcher:
        found = await asyncio.gather(*(ask(batcher, 1, n, deadline_s=0) for n in range(20)), return_exceptions=True)
        assert all(error is None or isinstance(error, trtx.DeadlineExceededError) for error in found)
        await assert_settled(batcher)


async def test_answered_requests_are_forgotten(mock_backend: MockBackend) -> None:
    """A deadline in an hour keeps nobody's arrays for an hour."""
    async with batching(mock_backend) as batcher:
        for _ in range(20):
            await asyncio.gather(*(ask(batcher, 1, n, deadline_s=3600) for n in range(20)))
        gc.collect()
        left = [item for item in gc.get_objects() if type(item).__name__ == "Ticket"]
        assert len(left) < 100


# ---- priorities, tenants ----


async def test_priorities_and_tenants() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    policy = trtx.BatchPolicy(depth=1, shares={"b": 3.0})
    async with batching(backend, policy=policy, max_batch_size=1) as batcher:
        async with held(backend, clock, batcher, 1):
            order: list[str] = []

            async def one(name: str, **options: Any) -> None:
                await ask(batcher, 1, **options)
                order.append(name)

            tasks = [start(one("first"))]  # has a place in the next batch already
            await turns()
            tasks += [start(one("a", tenant="a")) for _ in range(12)]
            tasks += [start(one("b", tenant="b")) for _ in range(12)]
            tasks += [start(one("high", priority=1))]
            await turns()
            clock.open()
            await asyncio.gather(*tasks)
            assert order[:2] == ["high", "first"]  # it has a batch of its own beside the full one
            assert 8 <= order[2:14].count("b") <= 10
        await assert_settled(batcher)
    backend.assert_clean()


# ---- backpressure ----


async def test_a_producer_feels_the_queue() -> None:
    """``async for`` over a source, with one task for each item: with a full queue nothing more is taken from it."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    taken = 0

    async def source() -> AsyncIterator[np.ndarray]:
        nonlocal taken
        for number in range(50):
            taken += 1
            yield rows(1, number)

    async with batching(backend, policy=ALONE, max_queue=8) as batcher:
        async with held(backend, clock, batcher):

            async def consume() -> list[tuple[np.ndarray, np.ndarray]]:
                found = []
                async for x in source():
                    found.append((x, (await batcher.infer({"x": x}))["y"]))
                return found

            consumers = [start(consume()) for _ in range(3)]
            await turns(50)
            assert taken == 3  # one under way for each
            clock.open()
            for pairs in await asyncio.gather(*consumers):
                assert all(np.array_equal(y, affine(x)) for x, y in pairs)
        await assert_settled(batcher)
    backend.assert_clean()


async def test_rows_to_fill_are_backpressure_too() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE, max_queue=2, max_delay_s=NEVER_S) as batcher:
        async with held(backend, clock, batcher), batcher.alloc_rows(2):
            entered = asyncio.Event()

            async def second() -> None:
                async with batcher.alloc_rows(1) as own:
                    entered.set()
                    own["x"][...] = rows(1)
                    assert np.array_equal((await own.infer())["y"], affine(rows(1)))

            task = start(second())
            await turns(50)
            assert not entered.is_set()
            clock.open()
        await task
        await assert_settled(batcher)
    backend.assert_clean()


@pytest.mark.parametrize("kind", ["infer", "infer_many", "alloc_rows"])
async def test_cancelled_while_waiting_outside(kind: str) -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE, max_queue=2, max_batch_size=2) as batcher:
        async with held(backend, clock, batcher):
            inside = start(ask(batcher, 2))
            await turns()

            async def fill() -> None:
                async with batcher.alloc_rows(2):
                    raise AssertionError("there was no room")

            calls = {"infer": ask(batcher, 2), "infer_many": ask_many(batcher, 5), "alloc_rows": fill()}
            task = start(calls.pop(kind))
            for call in calls.values():
                call.close()
            last = start(ask(batcher, 1))
            await turns()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()
            clock.open()
            await inside
            await last
        await until(lambda: not batcher.statistics().running_batches)
        await assert_settled(batcher)
    backend.assert_clean()
