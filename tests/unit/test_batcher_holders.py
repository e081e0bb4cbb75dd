"""Callers inside ``alloc_rows`` who do not send: what they keep, who waits for them, and what counts them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import anyio
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, slow
from tests.unit.batching import NEVER_S, Skip, answered, ask, assert_settled, batching, start, turns, until, wide_plan
from tests.unit.serving import PATIENCE_S, GateClock, affine, affine_plan, rows, serving

HOLDERS = ["guest", "ticket", "detached guest", "detached ticket"]


class Holder:
    """A caller inside ``alloc_rows`` that writes, and sends, when it is told to."""

    def __init__(self, batcher: trtx.DynamicBatcher, count: int = 2, **options: Any) -> None:
        self.entered, self.go, self.leave = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.task = start(self._hold(batcher, count, options))

    async def _hold(self, batcher: trtx.DynamicBatcher, count: int, options: Any) -> trtx.TrtxError | None:
        error = None
        async with batcher.alloc_rows(count, **options) as own:
            view = own["x"]
            self.entered.set()
            await self.go.wait()
            view[...] = rows(count, 5)
            try:
                found = await own.infer()
                assert np.array_equal(found["y"], affine(rows(count, 5)))
            except trtx.TrtxError as caught:
                error = caught
            await self.leave.wait()
        return error

    async def end(self) -> trtx.TrtxError | None:
        """Let it write, send and leave."""
        self.go.set()
        self.leave.set()
        with anyio.fail_after(PATIENCE_S):
            return await self.task


async def holder(batcher: trtx.DynamicBatcher, kind: str, skip: Skip, **options: Any) -> Holder:
    """Its rows came through a gate or with a ticket, and its batch has gone without it or waits."""
    if "ticket" in kind:
        options["tenant"] = "own"
    elif batcher._groups.gate(next(iter(batcher._groups.known))) is not None:
        batcher._launcher.lone = False
        await asyncio.gather(*(ask(batcher, 1, n) for n in range(3)))  # what comes next finds a batch that takes guests
    found = Holder(batcher, **options)
    await found.entered.wait()
    if "detached" in kind:
        await skip.by(1000.0)
    return found


@pytest.mark.parametrize("kind", HOLDERS)
async def test_closing_waits_for_holders(kind: str) -> None:
    """What was accepted is finished: they may still send."""
    backend = MockBackend()
    async with batching(backend, max_delay_s=10.0) as batcher:
        skip = Skip()
        await batcher.warmup()
        one = await holder(batcher, kind, skip)
        with pytest.raises(trtx.BorrowedError, match="1 requests waiting" if "detached" in kind else "waiting"):
            batcher.close()
        closing = start(batcher.aclose())
        await turns()
        assert not closing.done()
        assert await one.end() is None
        with anyio.fail_after(PATIENCE_S):
            await closing
        await assert_settled(batcher)
        assert batcher.statistics().dropped == 0
    backend.assert_clean()


@pytest.mark.parametrize("kind", HOLDERS)
@pytest.mark.parametrize("how", [{"drain": False}, {"timeout_s": 0.0}])
async def test_a_holder_that_was_given_up(kind: str, how: dict[str, Any]) -> None:
    """It hears of it, it is counted, and its rows are nobody else's while it is inside."""
    backend = MockBackend()
    async with serving(backend) as engine:
        async with trtx.DynamicBatcher(engine, max_delay_s=10.0) as batcher:
            skip = Skip()
            await batcher.warmup()
            one = await holder(batcher, kind, skip)
            with anyio.fail_after(PATIENCE_S):
                await batcher.aclose(**how)
            await assert_settled(batcher)
            assert batcher.statistics().dropped == 1
        async with trtx.DynamicBatcher(engine, max_delay_s=NEVER_S) as other, contextlib.AsyncExitStack() as stack:
            await other.warmup()
            theirs = [await stack.enter_async_context(other.alloc_rows(1)) for _ in range(8)]
            for n, own in enumerate(theirs):
                own["x"][...] = rows(1, n)
            one.go.set()
            await turns()
            with anyio.fail_after(PATIENCE_S):
                found = await asyncio.gather(*(own.infer() for own in theirs))
            assert all(np.array_equal(each["y"], affine(rows(1, n))) for n, each in enumerate(found))
        assert isinstance(await one.end(), trtx.ClosedError)
        assert batcher.statistics().dropped == 1
    backend.assert_clean()


@pytest.mark.parametrize("kind", HOLDERS)
@pytest.mark.parametrize("of", ["engine", "batcher first"])
async def test_rows_outlive_the_engine(kind: str, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the device: nothing is written to what was freed, and all of it is freed in the end."""
    monkeypatch.setattr("trtx_py.serving._batcher._HOLDERS_S", 0.0)
    backend = MockBackend()
    runtime = trtx.Runtime(None, backend)
    engine = await runtime.deserialize(affine_plan())
    batcher = trtx.DynamicBatcher(engine, max_delay_s=0.01)
    skip = Skip()
    await batcher.warmup()
    one = await holder(batcher, kind, skip)
    with anyio.fail_after(PATIENCE_S):
        if of == "batcher first":
            await batcher.aclose(drain=False)
        await engine.aclose()
        await runtime.aclose()
    assert isinstance(await one.end(), trtx.ClosedError)
    s = batcher.statistics()
    assert (s.dropped, s.accepted) == (1, answered(s)), s
    assert trtx.live_objects() == []
    backend.assert_clean()


async def test_an_engine_that_closes_lets_holders_send() -> None:
    backend = MockBackend()
    async with batching(backend, max_delay_s=0.0) as batcher:
        skip = Skip()
        await batcher.warmup()
        one = await holder(batcher, "detached ticket", skip)
        closing = start(batcher.engine.aclose())
        await turns()
        assert await one.end() is None
        with anyio.fail_after(PATIENCE_S):
            await closing
        s = batcher.statistics()
        assert (s.dropped, s.accepted) == (0, answered(s)), s
    backend.assert_clean()


async def test_two_that_close_at_once() -> None:
    """One waits for what is accepted, the other gives it up: then neither waits."""
    backend = MockBackend()
    async with batching(backend, max_delay_s=NEVER_S) as batcher:
        skip = Skip()
        await batcher.warmup()
        one = await holder(batcher, "guest", skip)
        first = start(batcher.aclose())
        await turns()
        with anyio.fail_after(PATIENCE_S):
            await asyncio.gather(first, batcher.aclose(drain=False))
        assert isinstance(await one.end(), trtx.ClosedError)
        await assert_settled(batcher)
    backend.assert_clean()


def test_a_loop_that_was_closed_with_requests_in_line() -> None:
    """Nobody cancelled them, and nobody is left to bring them to an end."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    loop = asyncio.new_event_loop()

    async def begin() -> tuple[trtx.Runtime, trtx.DynamicBatcher, list[asyncio.Task[Any]]]:
        runtime = trtx.Runtime(None, backend)
        engine = await runtime.deserialize(affine_plan())
        batcher = trtx.DynamicBatcher(engine, max_delay_s=NEVER_S, policy=trtx.BatchPolicy(depth=1))
        await batcher.warmup()
        backend.inject(slow(count=1))
        tasks = [start(ask(batcher, 2, 99))]
        await turns()
        tasks += [start(ask(batcher, 1, n)) for n in range(5)]
        tasks.append(Holder(batcher, tenant="own").task)
        await turns()
        return runtime, batcher, tasks

    runtime, batcher, tasks = loop.run_until_complete(begin())
    loop.close()
    clock.open()
    before = batcher.statistics()
    assert before.accepted == 7
    assert answered(before) == 0

    async def close() -> None:
        with anyio.fail_after(PATIENCE_S):
            await batcher.aclose()
            await runtime.aclose()

    asyncio.run(close())
    s = batcher.statistics()
    assert (s.dropped, s.waiting, s.waiting_rows, s.running_batches, s.bytes_in_flight) == (7, 0, 0, 0, 0), s
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("overload", ["reject", "wait", "shed_oldest"])
async def test_holders_are_bounded(overload: str) -> None:
    """They count as waiting until they send or leave, and each keeps little more than its own rows."""
    backend = MockBackend()
    policy = trtx.BatchPolicy(overload=overload, max_bytes_in_flight=4 << 20)
    async with batching(backend, wide_plan(), max_delay_s=1.0, max_queue=16, policy=policy) as batcher:
        skip = Skip()
        await batcher.warmup()
        holders = []
        for _ in range(16):
            holders.append(Holder(batcher, 1))
            await turns()
            await skip.by(10.0)
        late = Holder(batcher, 1)
        await turns()
        assert all(one.entered.is_set() for one in holders)
        assert not late.entered.is_set()
        s = batcher.statistics()
        assert (s.waiting, s.waiting_rows, s.bytes_in_flight) == (16, 16, 16 * 131072), s
        (state,) = batcher._groups.known.values()
        assert len(state.plain._out) <= state.plain.limit
        for one in holders:
            one.task.cancel()
        await asyncio.gather(*(one.task for one in holders), return_exceptions=True)
        if overload == "wait":
            await late.entered.wait()
        late.task.cancel()
        await asyncio.gather(late.task, return_exceptions=True)
        await assert_settled(batcher)
        assert not state.plain._out
        assert batcher.statistics().rejected == (overload != "wait")
    backend.assert_clean()


async def test_rows_of_ones_own_are_sent() -> None:
    """So many are slow that the next ones get memory of their own: their results are right all the same."""
    backend = MockBackend()
    async with batching(backend, max_delay_s=1.0, max_queue=64) as batcher:
        skip = Skip()
        await batcher.warmup()
        holders = []
        for n in range(20):
            holders.append(Holder(batcher, 1 + n % 3, deadline_s=None if n % 2 else NEVER_S))
            await holders[-1].entered.wait()
            await skip.by(10.0)
        assert batcher._groups.crowded(next(iter(batcher._groups.known)))
        assert batcher.statistics().waiting == 20
        await ask(batcher, 3)
        assert await asyncio.gather(*(one.end() for one in holders)) == [None] * 20
        await assert_settled(batcher)
    backend.assert_clean()


async def test_a_deadline_passes_while_rows_are_held() -> None:
    """They count until they are sent; then it is too late."""
    backend = MockBackend()
    async with batching(backend, max_delay_s=1.0) as batcher:
        skip = Skip()
        await batcher.warmup()
        one = Holder(batcher, deadline_s=50.0)
        await one.entered.wait()
        await skip.by(10.0)
        await skip.by(100.0)
        assert batcher.statistics().waiting_rows == 2
        assert isinstance(await one.end(), trtx.DeadlineExceededError)
        await assert_settled(batcher)
        assert batcher.statistics().late == 1
    backend.assert_clean()


@pytest.mark.parametrize("graphs", [True, False])
async def test_who_sends_at_last_needs_no_other_room(graphs: bool) -> None:
    """Its rows are all that the queue can take, others wait for room, and nothing runs that could make any."""
    backend = MockBackend()
    async with batching(backend, engine={"cuda_graphs": graphs}, max_queue=8, max_delay_s=10.0) as batcher:
        skip = Skip()
        await batcher.warmup()
        one = await holder(batcher, "detached ticket", skip, count=8)
        await until(lambda: batcher._scheduler.apart)
        others = [start(ask(batcher, 3, n)) for n in range(3)]
        await turns()
        s = batcher.statistics()
        assert (s.waiting, s.running_batches) == (1, 0), "the others are to wait for room"
        assert await one.end() is None
        with anyio.fail_after(PATIENCE_S):
            await asyncio.gather(*others)
        await assert_settled(batcher)
    backend.assert_clean()


async def test_who_leaves_makes_room() -> None:
    backend = MockBackend()
    async with batching(backend, max_queue=8, max_delay_s=10.0) as batcher:
        skip = Skip()
        await batcher.warmup()
        one = await holder(batcher, "detached ticket", skip, count=8)
        await until(lambda: batcher._scheduler.apart)
        other = start(ask(batcher, 3, 1))
        await turns()
        assert not other.done()
        one.task.cancel()
        with anyio.fail_after(PATIENCE_S):
            await other
        await assert_settled(batcher)
        assert batcher.statistics().cancelled == 1
    backend.assert_clean()


async def test_a_guest_is_not_forgotten_when_a_lone_request_ends() -> None:
    """It came into the batch of one that has gone, and only the lone request's end can launch it."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    policy = trtx.BatchPolicy(depth=1)
    async with batching(backend, policy=policy, max_delay_s=0.0) as batcher:
        await batcher.warmup()
        await ask(batcher, 1, 0)
        assert batcher._launcher.lone
        backend.inject(slow(count=1))
        lone = start(ask(batcher, 1, 1))
        await until(lambda: batcher.statistics().running_batches == 1)
        first = start(ask(batcher, 1, 2))
        await turns()
        guest = start(ask(batcher, 1, 3))
        await turns()
        assert batcher.statistics().waiting == 2
        assert batcher._scheduler.waiting == 1, "the second came through the gate"
        first.cancel()
        await turns()
        assert not lone.done()
        clock.open()
        with anyio.fail_after(PATIENCE_S):
            await asyncio.gather(lone, guest)
        await assert_settled(batcher)
    backend.assert_clean()
