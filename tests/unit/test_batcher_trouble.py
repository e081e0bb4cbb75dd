"""What should not happen to a batcher, and does: no memory, graphs that go, and leaving or closing at any moment."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, fail
from tests.unit.batching import (
    ALONE,
    answered,
    ask,
    ask_filled,
    ask_many,
    assert_settled,
    batching,
    held,
    length_plan,
    start,
    turns,
)
from tests.unit.serving import PATIENCE_S, GateClock, affine, cancel_at, rows, serving
from trtx_py.backends.protocols import STICKY_CUDA_ERRORS
from trtx_py.serving._memory import PlainPool

LOOPS = ["asyncio", "trio"]
CALLS: dict[str, Any] = {"infer": ask, "infer_many": ask_many, "alloc_rows": ask_filled}


@pytest.mark.parametrize("code", sorted(STICKY_CUDA_ERRORS))
async def test_an_error_that_ends_the_context_is_not_tried_again(code: int) -> None:
    """Neither in smaller batches: everybody gets it, and nothing more is launched."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE) as batcher:
        async with held(backend, clock, batcher) as first:
            tasks = [start(ask(batcher, 1, n)) for n in range(4)]
            await turns()
            backend.inject(fail("cuGraphLaunch", error=code))
            before = backend.calls["cuGraphLaunch"]
            clock.open()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(first, return_exceptions=True)
        assert backend.calls["cuGraphLaunch"] == before + 1
        for error in found:
            assert isinstance(error, trtx.ExecutionError), error
            assert f"({code})" in f"{error} {error.__cause__}"
        await assert_settled(batcher)


@pytest.mark.parametrize("lanes", [1, 2])
async def test_graphs_that_go_to_another_batcher_are_captured_again(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch, lanes: int
) -> None:
    """Between their capture and their use: then smaller ones must not stand for them."""
    async with serving(mock_backend, lanes=lanes) as engine, trtx.DynamicBatcher(engine, max_batch_size=4) as batcher:
        borrow, seen = engine._front.borrow, Counter[int]()

        def taken(key: Any) -> Any:
            size = key.shapes[0][1][0]
            seen[size] += 1
            return () if size == 4 and seen[size] == 1 else borrow(key)

        monkeypatch.setattr(engine._front, "borrow", taken)
        await batcher.warmup()
        assert seen[4] == 2
        (state,) = batcher._groups.known.values()
        assert state.graphs is not None
        assert [lane.host for lane in state.graphs._lanes] == [lane.members[-1][1] for lane in state.graphs._lanes]
        with anyio.fail_after(PATIENCE_S):
            await asyncio.gather(*(ask(batcher, 1 + n % 4, n) for n in range(40)))
        assert state.graphs.lanes == lanes
        await assert_settled(batcher)


async def test_graphs_that_always_go_are_done_without(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(mock_backend) as engine, trtx.DynamicBatcher(engine, max_batch_size=4) as batcher:
        monkeypatch.setattr(engine._front, "borrow", lambda _key: ())
        with anyio.fail_after(PATIENCE_S):
            await asyncio.gather(*(ask(batcher, 1 + n % 4, n) for n in range(40)))
        await assert_settled(batcher)


@pytest.mark.parametrize("kind", LOOPS)
def test_batchers_of_one_engine_that_begin_at_once(mock_backend: MockBackend, kind: str) -> None:
    """Each records graphs, of which those of one are the beginnings of those of another."""

    async def serve() -> None:
        async with serving(mock_backend, lanes=2) as engine, anyio.create_task_group() as group:
            sizes = (2, 4, 8, 3)
            batchers = [trtx.DynamicBatcher(engine, max_batch_size=size, batch_axis=0) for size in sizes]
            with anyio.fail_after(PATIENCE_S):
                async with anyio.create_task_group() as callers:
                    for seed, (size, batcher) in itertools.product(range(25), zip(sizes, batchers, strict=True)):
                        callers.start_soon(ask, batcher, 1 + seed % size, seed)
            for batcher in batchers:
                assert batcher.statistics().completed == 25
                group.start_soon(batcher.aclose)

    for _ in range(3):
        anyio.run(serve, backend=kind)


@pytest.mark.parametrize("graphs", [True, False])
async def test_no_memory_for_a_batch(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch, graphs: bool) -> None:
    """Those who wait are told, and the next ones are served."""
    async with batching(mock_backend, engine={"cuda_graphs": graphs}) as batcher:
        await batcher.warmup()
        groups, memory = batcher._groups, batcher._groups.memory
        missing = iter([True])

        def none(group: Any) -> Any:
            if next(missing, False):
                raise MemoryError
            return memory(group)

        monkeypatch.setattr(groups, "memory", none)
        with anyio.fail_after(PATIENCE_S):
            found = await asyncio.gather(
                *(call(batcher, 1 + n % 3, n) for n in range(8) for call in (ask, ask_filled)), return_exceptions=True
            )
        failed = [error for error in found if error is not None]
        assert failed
        assert all(isinstance(error, trtx.ExecutionError) and "MemoryError" in str(error) for error in failed), failed
        await asyncio.gather(*(ask(batcher, 1, n) for n in range(8)))
        await assert_settled(batcher)
        assert batcher.statistics().failed == len(failed)


async def test_arrays_that_cannot_be_had(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where it would really happen: new arrays for a shape that has no graphs."""
    async with batching(mock_backend, length_plan(), engine={"cuda_graphs": False}, batch_axis=0) as batcher:
        take, missing = PlainPool.take, iter([True])

        def none(pool: PlainPool) -> Any:
            if next(missing, False):
                raise MemoryError
            return take(pool)

        monkeypatch.setattr(PlainPool, "take", none)
        x = np.arange(6, dtype=np.float32).reshape(1, 6)
        with anyio.fail_after(PATIENCE_S):
            found = await asyncio.gather(*(batcher.infer({"x": x}) for _ in range(6)), return_exceptions=True)
        assert any(isinstance(error, trtx.ExecutionError) for error in found)
        assert np.array_equal((await batcher.infer({"x": x}))["y"], affine(x))
        await assert_settled(batcher)


async def test_rows_that_cannot_be_written_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE) as batcher, held(backend, clock, batcher):
        write = batcher._layout.write

        def three(targets: Any, at: int, arrays: Any, count: int) -> None:
            if count == 3:
                raise ValueError("three")
            write(targets, at, arrays, count)

        monkeypatch.setattr(batcher._layout, "write", three)
        tasks = [start(ask(batcher, 1 + n, n, priority=1)) for n in range(3)]
        await turns()
        clock.open()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert found[:2] == [None, None]
        assert isinstance(found[2], trtx.ExecutionError)
        assert "three" in str(found[2])
        await assert_settled(batcher)


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("call", [*CALLS, "warmup"])
async def test_cancelled_at_every_suspension(call: str, cold: bool) -> None:
    """From the first request, which prepares and captures, and beside others; then it is asked once more."""
    for suspension in itertools.count(1):
        backend = MockBackend()
        async with batching(backend, max_queue=20) as batcher:
            if not cold:
                await batcher.warmup()
            others = [] if cold else [start(ask(batcher, 1 + n % 3, n)) for n in range(6)]
            made: Callable[[], Awaitable[Any]]
            made = batcher.warmup if call == "warmup" else lambda: CALLS[call](batcher, 3)
            with anyio.fail_after(PATIENCE_S):
                how, _, suspensions = await cancel_at(made, suspension)
                await asyncio.gather(*others)
                await asyncio.gather(*(one(batcher, 3, 5) for one in CALLS.values()))
            await assert_settled(batcher)
        assert backend.leaks() == []
        backend.assert_clean()
        if how == "finished" and suspensions < suspension:
            break


@pytest.mark.parametrize("of", ["batcher", "engine"])
async def test_aclose_cancelled_at_every_suspension(of: str) -> None:
    """Under load. It closes all the same; who was accepted gets an answer or ClosedError."""
    for suspension in itertools.count(1):
        backend = MockBackend()
        async with batching(backend, max_queue=20) as batcher:
            await batcher.warmup()
            tasks = [start(call(batcher, 1 + n % 3, n)) for n in range(10) for call in CALLS.values()]
            await turns(2)
            owner: Any = batcher if of == "batcher" else batcher.engine
            with anyio.fail_after(PATIENCE_S):
                how, _, suspensions = await cancel_at(owner.aclose, suspension)
                found = await asyncio.gather(*tasks, return_exceptions=True)
                await owner.aclose()
            assert all(error is None or isinstance(error, trtx.ClosedError) for error in found), found
            s = batcher.statistics()
            assert s.accepted == answered(s), s
            assert batcher.closed
        backend.assert_clean()
        if how == "finished" and suspensions < suspension:
            break


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("of", ["batcher", "engine", "timeout", "drop"])
def test_closing_under_load(kind: str, of: str) -> None:
    """Callers who never stop asking: all that was let in is answered, or told that it was given up."""
    seen: Counter[str] = Counter()

    async def caller(batcher: trtx.DynamicBatcher, number: int) -> None:
        for seed in itertools.count(number):
            try:
                await list(CALLS.values())[seed % 3](batcher, 1 + seed % 4, seed)
            except trtx.ClosedError:
                seen["closed"] += 1
                return
            seen["answered"] += 1

    async def serve() -> None:
        backend = MockBackend()
        async with batching(backend, engine={"lanes": 2}, max_queue=30) as batcher:
            with anyio.fail_after(PATIENCE_S):
                async with anyio.create_task_group() as group:
                    for number in range(24):
                        group.start_soon(caller, batcher, number)
                    while seen["answered"] < 100:
                        await anyio.lowlevel.checkpoint()
                    if of == "engine":
                        await batcher.engine.aclose()
                    else:
                        await batcher.aclose(drain=of != "drop", timeout_s=0.0 if of == "timeout" else None)
            s = batcher.statistics()
            assert s.accepted == answered(s), s
            assert s.completed == seen["answered"]
            assert seen["closed"] == 24
            if of in ("batcher", "engine"):
                assert s.dropped == 0
        backend.assert_clean()

    anyio.run(serve, backend=kind)


@pytest.mark.parametrize("kind", LOOPS)
def test_all_calls_on_both_loops(kind: str) -> None:
    """Deadlines, tenants, priorities, parts, rows to fill, and their cancellation by a scope that ends at any time."""

    async def limited(batcher: trtx.DynamicBatcher, seed: int) -> None:
        call = list(CALLS.values())[seed % 3]
        with anyio.move_on_after(0.0005 * (seed % 7)):
            await call(batcher, 1 + seed % 8, seed, tenant=f"{seed % 2}", priority=seed % 3)

    async def late(batcher: trtx.DynamicBatcher, seed: int) -> None:
        try:
            await ask(batcher, 1, seed, deadline_s=0.0001 * (seed % 20))
        except trtx.DeadlineExceededError:
            return

    async def serve() -> None:
        backend = MockBackend()
        async with batching(backend, engine={"lanes": 2}, max_queue=30) as batcher:
            with anyio.fail_after(PATIENCE_S):
                async with anyio.create_task_group() as group:
                    for seed in range(120):
                        group.start_soon(limited, batcher, seed)
                        group.start_soon(late, batcher, seed)
                        group.start_soon(list(CALLS.values())[seed % 3], batcher, 1 + seed % 8, seed)
                found = await batcher.infer_many({"x": rows(100)})
                assert np.array_equal(found["y"], affine(rows(100)))
            await assert_settled(batcher)
            assert batcher.statistics().completed >= 121
        backend.assert_clean()

    anyio.run(serve, backend=kind)


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("lanes", [1, 2])
def test_slots_that_are_held_leave_some_to_what_runs(mock_backend: MockBackend, kind: str, lanes: int) -> None:
    """Batches beside the slots need slots when they are launched, and batches in slots wait for those to end."""

    async def filler(batcher: trtx.DynamicBatcher, leave: anyio.Event) -> None:
        async with batcher.alloc_rows(1) as own:
            own["x"][...] = rows(1)
            await leave.wait()
            assert np.array_equal((await own.infer())["y"], affine(rows(1)))

    async def serve() -> None:
        async with batching(mock_backend, engine={"lanes": lanes}, max_delay_s=0.0) as batcher:
            await batcher.warmup()
            leave = anyio.Event()
            with anyio.fail_after(PATIENCE_S):
                async with anyio.create_task_group() as group:
                    for _ in range(2):
                        group.start_soon(filler, batcher, leave)
                    async with anyio.create_task_group() as callers:
                        for seed in range(150):
                            callers.start_soon(ask, batcher, 1 + seed % 8, seed)
                    leave.set()
            await assert_settled(batcher)

    anyio.run(serve, backend=kind)
