"""infer_many by native threads: right rows in order, room for others, cancellation, closing, failure, statistics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anyio
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, device_lost, fail, slow
from tests.unit.batching import (
    NEVER_S,
    Skip,
    answered,
    ask,
    ask_filled,
    ask_many,
    assert_settled,
    batching,
    start,
    turns,
    until,
    wide_plan,
)
from tests.unit.serving import GateClock, affine, affine_plan, rows
from trtx_py import _native
from trtx_py.serving import _many

KINDS = [pytest.param("asyncio", id="asyncio"), pytest.param("trio", id="trio")]


def native_runs(batcher: trtx.DynamicBatcher) -> int:
    return len(batcher._native._runs)


class Many:
    """A request of many rows, whose first launches are held."""

    def __init__(self, backend: MockBackend, clock: GateClock, batcher: trtx.DynamicBatcher) -> None:
        self._backend, self._clock, self._batcher = backend, clock, batcher

    async def start(self, count: int, seed: int = 0, **options: Any) -> asyncio.Task[Any]:
        await self._batcher.warmup()
        self._backend.inject(slow(count=1))
        task = start(ask_many(self._batcher, count, seed, **options))
        await until(lambda: task.done() or self._clock.reached.acquire(blocking=False))
        assert not task.done(), "it never reached the device"
        assert native_runs(self._batcher) == 1
        return task


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("depth", [1, 2])
def test_rows_in_order(mock_backend: MockBackend, kind: str, lanes: int, depth: int) -> None:
    async def body() -> None:
        policy = trtx.BatchPolicy(depth=depth)
        async with batching(mock_backend, engine={"lanes": lanes}, policy=policy) as batcher:
            await batcher.warmup()
            for count in (9, 16, 17, 63, 400):
                before = batcher.statistics()
                await ask_many(batcher, count, count)
                s = batcher.statistics()
                assert s.batches - before.batches == -(-count // 8)
                assert s.rows_completed - before.rows_completed == count
                assert s.padding_rows - before.padding_rows == (1 if count % 8 == 7 else 0)
                assert s.batch_rows.sum - before.batch_rows.sum == count
                assert s.batch_rows.count == s.batches == s.gpu_s.count == s.queue_s.count == s.completion_s.count
            await assert_settled(batcher)
            assert batcher.statistics().completed == 5

    anyio.run(body, backend=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_several_at_once(mock_backend: MockBackend, kind: str) -> None:
    """They share the lanes, and each gets its own rows."""

    async def body() -> None:
        async with batching(mock_backend, engine={"lanes": 2}) as batcher:
            await batcher.warmup()
            async with anyio.create_task_group() as group:
                for seed in range(6):
                    group.start_soon(ask_many, batcher, 100 + 31 * seed, seed)
            await assert_settled(batcher)
            assert batcher.statistics().completed == 6

    anyio.run(body, backend=kind)


class Threads:
    """Stands in for a crew: of its threads, those from `none_from` on cannot be started."""

    def __init__(self, batcher: trtx.DynamicBatcher, monkeypatch: pytest.MonkeyPatch, none_from: int = 100) -> None:
        self.started = 0
        self._none_from = none_from
        self._start = batcher._native._crew.start
        monkeypatch.setattr(batcher._native._crew, "start", self.start)

    def start(self, call: Callable[[], object], job: _native.ManyRows) -> Any:
        if self.started == self._none_from:
            raise RuntimeError("can't start new thread")
        self.started += 1
        return self._start(call, job)


def large_rows(count: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal((count, 32768)).astype(np.float32)


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (64, 8)])
async def test_large_rows_by_several_threads(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    async with batching(mock_backend, wide_plan(), engine={"lanes": 2}) as batcher:
        await batcher.warmup()
        batcher._native._cores = cores
        crew = Threads(batcher, monkeypatch)
        x = large_rows(61)
        found = await batcher.infer_many({"x": x})
        assert np.array_equal(found["y"], affine(x))
        assert crew.started == threads
        await assert_settled(batcher)


async def test_small_rows_by_one_thread(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    async with batching(mock_backend, engine={"lanes": 2}) as batcher:
        await batcher.warmup()
        batcher._native._cores = 64
        crew = Threads(batcher, monkeypatch)
        await ask_many(batcher, 80)
        assert crew.started == 1
        await assert_settled(batcher)


async def test_large_rows_of_two_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first has all threads; another, which comes meanwhile, begins beside it with half as many."""
    monkeypatch.setattr(_many, "_QUANTUM_NS", 1 << 60)
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, wide_plan(), engine={"lanes": 1}) as batcher:
        await batcher.warmup()
        batcher._native._cores = 8
        crew = Threads(batcher, monkeypatch)
        backend.inject(slow(count=1))
        x = [large_rows(61, seed) for seed in range(2)]
        first = start(batcher.infer_many({"x": x[0]}))
        await until(lambda: clock.reached.acquire(blocking=False))
        assert crew.started == 8
        second = start(batcher.infer_many({"x": x[1]}))
        await turns()
        clock.open()
        for each, task in zip(x, (first, second), strict=True):
            assert np.array_equal((await task)["y"], affine(each))
        assert crew.started == 8 + 4
        await assert_settled(batcher)
    backend.assert_clean()


async def test_without_enough_threads(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers are not needed; whoever launches is."""
    async with batching(mock_backend, wide_plan(), engine={"lanes": 2}) as batcher:
        await batcher.warmup()
        batcher._native._cores = 6
        x = large_rows(61)
        for enough in (2, 1):
            with monkeypatch.context() as patch:
                Threads(batcher, patch, enough)
                found = await batcher.infer_many({"x": x})
            assert np.array_equal(found["y"], affine(x))
            await assert_settled(batcher)
        with monkeypatch.context() as patch:
            Threads(batcher, patch, 0)
            with pytest.raises(trtx.ExecutionError, match="new thread"):
                await batcher.infer_many({"x": x})
        await assert_settled(batcher)
        found = await batcher.infer_many({"x": x})
        assert np.array_equal(found["y"], affine(x))
        await assert_settled(batcher)


async def test_others_are_let_in() -> None:
    """Whoever comes later is answered while most of the rows are still to be launched."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, engine={"lanes": 2}, max_delay_s=NEVER_S) as batcher:
        many = await Many(backend, clock, batcher).start(8 * 3000)
        others = [start(ask(batcher, 3, 1)), start(ask_filled(batcher, 2, 2)), start(ask_many(batcher, 5, 3))]
        await turns()
        clock.open()
        await asyncio.gather(*others)
        assert not many.done()
        assert batcher.statistics().rows_completed < 8 * 2000
        await many
        await assert_settled(batcher)
        s = batcher.statistics()
        assert (s.completed, s.rows_completed) == (4, 8 * 3000 + 10)
        assert s.batch_rows.sum == s.rows_completed
    backend.assert_clean()


async def test_it_takes_over_again_when_others_are_gone() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend) as batcher:
        many = await Many(backend, clock, batcher).start(8 * 3000)
        other = start(ask(batcher, 3, 1))
        await turns()
        clock.open()
        await until(lambda: native_runs(batcher) == 0)
        await other
        await until(lambda: many.done() or native_runs(batcher) == 1)
        assert not many.done()
        await many
        await assert_settled(batcher)
    backend.assert_clean()


async def test_a_more_important_one_goes_first() -> None:
    """Priorities count among requests of many rows too."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend) as batcher:
        many = await Many(backend, clock, batcher).start(8 * 3000)
        other = start(ask_many(batcher, 8 * 20, 1, priority=1))
        await turns()
        clock.open()
        await other
        assert not many.done()
        assert batcher.statistics().rows_completed < 8 * 1000
        await many
        await assert_settled(batcher)
    backend.assert_clean()


async def test_two_alike_share() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, engine={"lanes": 2}) as batcher:
        many = await Many(backend, clock, batcher).start(8 * 3000)
        other = start(ask_many(batcher, 8 * 20, 1))
        await turns()
        clock.open()
        await other
        assert not many.done()
        await many
        await assert_settled(batcher)
    backend.assert_clean()


@pytest.mark.parametrize("kind", KINDS)
def test_cancelled(kind: str) -> None:
    """The rest never runs, and the slots come back."""

    async def body() -> None:
        clock = GateClock()
        backend = MockBackend(clock=clock)
        async with batching(backend) as batcher:
            await batcher.warmup()
            backend.inject(slow(count=1))
            async with anyio.create_task_group() as group:
                group.start_soon(ask_many, batcher, 800)
                await until(lambda: clock.reached.acquire(blocking=False))
                assert native_runs(batcher) == 1
                group.cancel_scope.cancel()
            clock.open()
            await assert_settled(batcher)
            s = batcher.statistics()
            assert (s.cancelled, s.accepted, s.completed) == (1, 1, 0)
            assert s.rows_completed <= 8 * 4
            await ask_many(batcher, 80)
            await assert_settled(batcher)
        backend.assert_clean()

    anyio.run(body, backend=kind)


async def test_late() -> None:
    """What was not launched by the deadline is given up."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend) as batcher:
        skip = Skip()
        many = await Many(backend, clock, batcher).start(800, deadline_s=100.0)
        await skip.by(101.0)
        with pytest.raises(trtx.DeadlineExceededError, match="deadline_s"):
            await many
        clock.open()
        await assert_settled(batcher)
        s = batcher.statistics()
        assert (s.late, s.failed) == (1, 0)
        await ask_many(batcher, 80, deadline_s=100.0)
        await assert_settled(batcher)
    backend.assert_clean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("native", [True, False])
def test_what_is_late_at_once_is_not_launched_at_all(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch, kind: str, native: bool
) -> None:
    async def body() -> None:
        async with batching(mock_backend) as batcher:
            await batcher.warmup()
            monkeypatch.setattr(batcher._native, "_possible", native)
            for count in (1, 100):
                before = mock_backend.calls["cuGraphLaunch"]
                with pytest.raises(trtx.DeadlineExceededError, match="deadline_s"):
                    await batcher.infer_many({"x": rows(count)}, deadline_s=0)
                assert mock_backend.calls["cuGraphLaunch"] == before
            await assert_settled(batcher)
            s = batcher.statistics()
            assert (s.accepted, s.late, s.batches) == (2, 2, 0)
            await ask_many(batcher, 100, deadline_s=100.0)

    anyio.run(body, backend=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_times_are_observed_batch_by_batch(mock_backend: MockBackend, kind: str) -> None:
    """As BatcherStatistics says; of other requests one by one."""

    async def body() -> None:
        async with batching(mock_backend) as batcher:
            await batcher.warmup()
            await ask_many(batcher, 80)
            s = batcher.statistics()
            assert (s.completed, s.queue_s.count, s.completion_s.count) == (1, 10, 10)
            await ask(batcher)
            s = batcher.statistics()
            assert (s.completed, s.queue_s.count, s.completion_s.count) == (2, 11 - s.bypassed, 11)

    anyio.run(body, backend=kind)


async def test_closing_awaits_it() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend) as batcher:
        many = await Many(backend, clock, batcher).start(800)
        closing = start(batcher.aclose())
        await turns()
        assert not closing.done()
        with pytest.raises(trtx.ClosedError):
            await ask_many(batcher, 80)
        clock.open()
        await many
        await closing
        assert batcher.statistics().completed == 1
    backend.assert_clean()


async def test_closing_gives_up_the_rest() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend) as batcher:
        many = await Many(backend, clock, batcher).start(800)
        closing = start(batcher.aclose(drain=False))
        with pytest.raises(trtx.ClosedError, match="before the request was launched"):
            await many
        assert not closing.done()  # what was launched is awaited
        clock.open()
        await closing
        s = batcher.statistics()
        assert (s.dropped, s.failed, answered(s)) == (1, 0, s.accepted)
    backend.assert_clean()


async def test_a_launch_that_fails(mock_backend: MockBackend) -> None:
    """The first error ends it; the slots are as good as before."""
    async with batching(mock_backend, engine={"lanes": 2}) as batcher:
        await batcher.warmup()
        mock_backend.inject(fail("cuGraphLaunch", 10))
        with pytest.raises(trtx.ExecutionError) as caught:
            await ask_many(batcher, 800)
        assert isinstance(caught.value, trtx.CudaError) or isinstance(caught.value.__cause__, trtx.CudaError)
        await assert_settled(batcher)
        s = batcher.statistics()
        assert (s.failed, s.completed) == (1, 0)
        assert s.batches < 100
        await ask_many(batcher, 800)
        await assert_settled(batcher)


async def test_a_lost_device() -> None:
    backend = MockBackend()
    async with batching(backend, engine={"lanes": 2}) as batcher:
        await batcher.warmup()
        backend.inject(device_lost(10))
        found = await asyncio.gather(*(ask_many(batcher, 800, n) for n in range(3)), return_exceptions=True)
        assert all(isinstance(error, trtx.ExecutionError) for error in found), found
        assert len({id(error) for error in found}) == 3
        await assert_settled(batcher)
    assert trtx.live_objects() == []
    assert backend.leaks() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_that_ends_in_the_middle(mock_backend: MockBackend, kind: str) -> None:
    """What is in flight is left behind; the engine is as good as before, and closes."""
    made: list[Any] = []

    class EnoughError(Exception):
        pass

    async def body() -> None:
        runtime = trtx.Runtime(None, mock_backend)
        engine = await runtime.deserialize(affine_plan(), lanes=2)
        batcher = trtx.DynamicBatcher(engine)
        made.extend((runtime, engine, batcher))
        await batcher.warmup()
        mock_backend.inject(slow(seconds=0.02, count=3))
        async with anyio.create_task_group() as group:
            group.start_soon(ask_many, batcher, 8000)
            await until(lambda: native_runs(batcher))
            raise EnoughError

    with pytest.raises(BaseException) as caught:
        anyio.run(body, backend=kind)
    assert "EnoughError" in repr(caught.value)

    async def after() -> None:
        runtime, engine, batcher = made
        assert batcher._scheduler.idle
        x = rows(3)
        with anyio.fail_after(30):
            assert np.array_equal((await engine.infer({"x": x}))["y"], affine(x))
            await engine.aclose()
        await runtime.aclose()

    anyio.run(after, backend=kind)
    made.clear()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(np.asfortranarray, id="not contiguous"),
        pytest.param(lambda x: x[:8], id="one batch"),
    ],
)
async def test_what_goes_in_pieces(mock_backend: MockBackend, make: Callable[[Any], Any]) -> None:
    async with batching(mock_backend) as batcher:
        await batcher.warmup()
        x = make(rows(100))
        task = start(batcher.infer_many({"x": x}))
        await turns(1)
        assert native_runs(batcher) == 0
        assert np.array_equal((await task)["y"], affine(x))
        await assert_settled(batcher)


async def test_bytes_in_flight_are_bounded() -> None:
    """As many batches at once as the bound allows."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    policy = trtx.BatchPolicy(max_bytes_in_flight=300)  # two batches of 128 bytes
    async with batching(backend, engine={"lanes": 3}, policy=policy) as batcher:
        many = await Many(backend, clock, batcher).start(800)
        s = batcher.statistics()
        assert (s.bytes_in_flight, s.running_batches) == (256, 2)
        clock.open()
        await many
        await assert_settled(batcher)
    backend.assert_clean()
