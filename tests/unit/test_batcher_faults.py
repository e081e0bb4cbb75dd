"""What goes wrong: a request that fails alone, a batch that fails, a device that goes, and callers that leave."""

from __future__ import annotations

import asyncio
import gc
import math
import random
from typing import Any

import anyio
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, device_lost, fail
from tests.unit.batching import (
    ALONE,
    NEVER_S,
    ask,
    ask_filled,
    ask_many,
    assert_settled,
    batching,
    held,
    length_plan,
    start,
    turns,
    until,
)
from tests.unit.serving import PATIENCE_S, GateClock, affine, rows
from tests.unit.test_batcher_rows import ask_length, four_plan
from trtx_py._capture import CaptureRefusedError, NotCapturableError
from trtx_py.serving import _groups, _memory
from trtx_py.serving._groups import own_copy

BAD: dict[str, Any] = {
    "shape": {"x": np.zeros((1, 5), np.float32)},
    "rank": {"x": np.zeros((4,), np.float32)},
    "dtype": {"x": np.zeros((1, 4), np.float64)},
    "name": {"y": np.zeros((1, 4), np.float32)},
    "more": {"x": np.zeros((1, 4), np.float32), "y": np.zeros((1, 4), np.float32)},
    "none": {},
    "no rows": {"x": np.zeros((0, 4), np.float32)},
    "too many": {"x": np.zeros((9, 4), np.float32)},
    "object": {"x": object()},
    "not a mapping": [np.zeros((1, 4), np.float32)],
}
OPTIONS: list[dict[str, Any]] = [
    {"priority": "high"}, {"priority": None}, {"priority": math.nan}, {"tenant": []}, {"tenant": None},
    {"deadline_s": -1}, {"deadline_s": "1"}, {"deadline_s": math.nan},
]  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
async def test_a_bad_request_fails_alone(mock_backend: MockBackend, kind: str) -> None:
    async with batching(mock_backend) as batcher:
        for warm in range(3):
            bad = batcher.infer(BAD[kind]) if warm != 1 else batcher.infer_many(BAD[kind])
            if kind == "too many" and warm == 1:
                bad.close()
                continue
            found = await asyncio.gather(
                *(ask(batcher, 1, n) for n in range(4)), bad, *(ask(batcher, 2, n) for n in range(4)),
                return_exceptions=True,
            )  # fmt: skip
            assert isinstance(found[4], trtx.InvalidArgumentError), found[4]
            assert [one for one in found if one is not None] == [found[4]]
        await assert_settled(batcher)
        assert batcher.engine.statistics().failed == 0


@pytest.mark.parametrize("options", OPTIONS)
async def test_a_bad_option_fails_alone(mock_backend: MockBackend, options: dict[str, Any]) -> None:
    async with batching(mock_backend) as batcher:
        await batcher.warmup()
        with pytest.raises(trtx.InvalidArgumentError):
            await ask(batcher, **options)  # alone
        found = await asyncio.gather(
            *(ask(batcher, 1, n) for n in range(4)), ask(batcher, 1, **options), ask_many(batcher, 9, **options),
            ask_filled(batcher, 1, **options), *(ask(batcher, 1, n) for n in range(4)), return_exceptions=True,
        )  # fmt: skip
        assert all(isinstance(error, trtx.InvalidArgumentError) for error in found[4:7]), found
        assert sum(one is None for one in found) == 8
        await assert_settled(batcher)


@pytest.mark.parametrize("graphs", [True, False])
async def test_a_batch_that_fails_is_taken_apart(graphs: bool) -> None:
    """One launch fails, for no fault of those who are in it: each has its answer all the same."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, engine={"cuda_graphs": graphs}, policy=ALONE) as batcher:
        async with held(backend, clock, batcher):
            tasks = [start(ask(batcher, 1 + n % 2, n)) for n in range(5)]
            await turns()
            backend.inject(fail("cuGraphLaunch" if graphs else "execute_async_v3"))
            clock.open()
            await asyncio.gather(*tasks)
        await assert_settled(batcher)
        assert batcher.statistics().failed == 0
        await ask(batcher)
    backend.assert_clean()


@pytest.mark.parametrize("graphs", [True, False])
async def test_a_request_that_spoils_its_batch_fails_alone(graphs: bool) -> None:
    """The batch fails, and of those who are run again, one: it gets the error and nobody else."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    call = "cuGraphLaunch" if graphs else "execute_async_v3"
    async with batching(backend, engine={"cuda_graphs": graphs}, policy=ALONE) as batcher:
        async with held(backend, clock, batcher):
            tasks = [start(ask(batcher, 1, n)) for n in range(4)]
            await turns()
            backend.inject(fail(call, 1))
            backend.inject(fail(call, 3))  # the second of those who are run again
            clock.open()
            found = await asyncio.gather(*tasks, return_exceptions=True)
        failed = [error for error in found if error is not None]
        assert len(failed) == 1
        assert isinstance(failed[0], trtx.TrtxError)
        await assert_settled(batcher)
        assert batcher.statistics().failed == 1
    backend.assert_clean()


async def test_isolation_pads_to_what_the_profile_admits() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, four_plan(), policy=ALONE) as batcher:
        async with held(backend, clock, batcher, 4):
            tasks = [start(ask(batcher, 1, n)) for n in range(5)]
            await turns()
            backend.inject(fail("cuGraphLaunch"))
            clock.open()
            await asyncio.gather(*tasks)
        await assert_settled(batcher)
    backend.assert_clean()


async def test_a_part_of_a_large_request_fails() -> None:
    """infer_many gets the first error, once; the rest of it runs for nobody and harms nobody."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE) as batcher:
        async with held(backend, clock, batcher):
            task = start(ask_many(batcher, 40))
            other = start(ask(batcher, 3))
            await turns()
            backend.inject(fail("cuGraphLaunch", 2))
            clock.open()
            found = await asyncio.gather(task, other, return_exceptions=True)
        assert isinstance(found[0], trtx.TrtxError)
        assert found[1] is None
        await assert_settled(batcher)
    gc.collect()  # an error that nobody asked for would be reported here
    await turns()
    backend.assert_clean()


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("lanes", [1, 2])
async def test_a_lost_device_fails_everybody_typed(lanes: int, graphs: bool) -> None:
    backend = MockBackend()
    async with batching(backend, engine={"lanes": lanes, "cuda_graphs": graphs}, max_queue=50) as batcher:
        await batcher.warmup()
        await asyncio.gather(*(ask(batcher, 1, n) for n in range(20)))
        backend.inject(device_lost(3))
        with anyio.fail_after(PATIENCE_S):
            found = await asyncio.gather(
                *(call(batcher, 1 + n % 4, n) for n in range(30) for call in (ask, ask_many, ask_filled)),
                return_exceptions=True,
            )
        failed = [error for error in found if error is not None]
        assert failed
        assert all(isinstance(error, trtx.ExecutionError) for error in failed), failed
        assert len({id(error) for error in failed}) == len(failed)  # each raises its own
        for call in (ask, ask_many, ask_filled):
            with pytest.raises(trtx.ExecutionError):
                await call(batcher, 1)
        await assert_settled(batcher)
    assert trtx.live_objects() == []
    assert backend.leaks() == []


def test_each_kind_of_error_has_copies() -> None:
    """What several callers get is one error for each of them, with the same text and the same facts."""

    def leaves(kind: type[trtx.TrtxError]) -> set[type[trtx.TrtxError]]:
        return {kind}.union(*(leaves(below) for below in kind.__subclasses__()))

    facts: dict[str, Any] = {
        "plan": "a", "runtime": "b", "code": 719, "name": "N", "call": "c", "requested_bytes": 1, "used_bytes": 2,
        "budget_bytes": 3, "message": "text",
        "causes": {},
    }  # fmt: skip
    import inspect

    found = leaves(trtx.TrtxError)
    assert len(found) > 15
    for kind in found:
        if not kind.__module__.startswith("trtx_py"):
            continue
        needed = [
            parameter
            for parameter in list(inspect.signature(kind.__init__).parameters.values())[1:]
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        positional = [facts.get(p.name, ()) for p in needed if p.kind is not p.KEYWORD_ONLY]
        named = {p.name: facts.get(p.name, ()) for p in needed if p.kind is p.KEYWORD_ONLY}
        error: Any = kind(*positional, **named)
        error.__cause__ = ValueError("why")
        copied = own_copy(error)
        assert type(copied) is kind
        assert copied is not error
        assert str(copied) == str(error)
        assert vars(copied) == vars(error)
        assert copied.__cause__ is error.__cause__
        assert copied.__traceback__ is None


@pytest.mark.parametrize("kind", ["asyncio", "trio"])
@pytest.mark.parametrize("call", ["cuGraphInstantiate", "cuMemHostAlloc", "cuMemAlloc", "create_context"])
def test_a_background_capture_that_fails_harms_nobody(kind: str, call: str) -> None:
    """Not the callers, not the loop: the shape goes on without graphs."""
    backend = MockBackend()

    async def body() -> None:
        async with batching(backend, length_plan()) as batcher:
            await batcher.warmup()
            for step in range(20):
                async with anyio.create_task_group() as group:
                    for number in range(4):
                        group.start_soon(tolerant, batcher, number)
                if step == 1:
                    backend.inject(fail(call, count=None))
            await turns(50)
            backend.clear_faults()
            await ask_length(batcher, 2, 5)
            await assert_settled(batcher)

    async def tolerant(batcher: trtx.DynamicBatcher, number: int) -> None:
        try:
            await ask_length(batcher, 1, 5, number)
        except trtx.ExecutionError as error:  # a request itself may need memory too
            assert call in str(error)  # noqa: PT017

    anyio.run(body, backend=kind)
    gc.collect()
    backend.assert_clean()


@pytest.mark.parametrize(
    ("error", "for_ever"),
    [
        (CaptureRefusedError("not now"), False),
        (trtx.BorrowedError("somebody has its slots"), False),
        (trtx.MemoryBudgetError("no room", requested_bytes=2, used_bytes=1, budget_bytes=2), False),
        (NotCapturableError("never"), True),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_graphs_that_could_not_be_had_at_first(
    error: trtx.TrtxError, for_ever: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stood in their way may be over: they are tried again, and more and more rarely."""
    backend, real = MockBackend(), _memory.capture_pool
    after: list[int] = []
    failures = 2

    async def capture_pool(*args: Any, **kwargs: Any) -> Any:
        after.append(batcher.statistics().batches)
        if len(after) <= failures:
            raise error
        return await real(*args, **kwargs)

    monkeypatch.setattr(_groups, "capture_pool", capture_pool)
    async with batching(backend, policy=ALONE) as batcher:
        await batcher.warmup()
        (state,) = batcher._groups.known.values()
        assert state.graphs is None
        for number in range(700):
            await asyncio.gather(
                *(ask(batcher, 1, number + n) for n in range(2))
            )  # two, or they go to the engine alone
            if state.graphs is not None:
                break
        if for_ever:
            assert len(after) == 1
        else:
            await until(lambda: state.graphs is not None)
            first, second, third = after
            assert first == 0
            assert third - second >= 4 * (second - first) > 0
            before = batcher.statistics().batches
            await asyncio.gather(*(ask(batcher, 1, n) for n in range(3)))
            assert batcher.statistics().batches > before
        await assert_settled(batcher)
    backend.assert_clean()


# ---- cancellation ----


@pytest.mark.parametrize("call", [ask, ask_many, ask_filled])
async def test_cancelled_before_the_launch(call: Any) -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE, max_delay_s=NEVER_S) as batcher:
        async with held(backend, clock, batcher):
            tasks = [start(call(batcher, 1 + n % 3, n)) for n in range(9)]
            await turns()
            for task in tasks[::2]:
                task.cancel()
            await asyncio.gather(*tasks[::2], return_exceptions=True)
            waiting = batcher.statistics().waiting_rows
            assert waiting == sum(1 + n % 3 for n in range(1, 9, 2))
            before = batcher.statistics().rows_completed
            clock.open()
            await asyncio.gather(*tasks[1::2])
            assert batcher.statistics().rows_completed - before == waiting + 2
        await assert_settled(batcher)
        assert batcher.statistics().cancelled == 5
    backend.assert_clean()


async def test_nothing_runs_for_those_who_left() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE) as batcher:
        async with held(backend, clock, batcher) as holder:
            tasks = [start(ask(batcher, 2, n)) for n in range(6)]
            await turns()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            before = backend.calls["cuGraphLaunch"]
            clock.open()
            await holder
            await turns()
            assert backend.calls["cuGraphLaunch"] == before
        await assert_settled(batcher)
    backend.assert_clean()


async def test_holes_are_closed_up() -> None:
    """Eight rows of which six left go as two."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE) as batcher:
        async with held(backend, clock, batcher):
            tasks = [start(ask(batcher, 1, n)) for n in range(8)]
            await turns()
            for n in (0, 1, 2, 3, 5, 6):
                tasks[n].cancel()
            await turns()
            before = batcher.statistics()
            clock.open()
            await asyncio.gather(tasks[4], tasks[7])
            after = batcher.statistics()
            assert after.batches - before.batches == 1
            assert after.padding_rows == before.padding_rows
        await assert_settled(batcher)
    backend.assert_clean()


@pytest.mark.parametrize("graphs", [True, False])
async def test_cancelled_after_the_launch(graphs: bool) -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    engine = {"cuda_graphs": graphs}
    async with batching(backend, engine=engine, policy=trtx.BatchPolicy(depth=2), max_delay_s=0.0) as batcher:
        async with held(backend, clock, batcher) as holder:
            tasks = [start(ask(batcher, 2, n)) for n in range(4)]
            await until(lambda: batcher.statistics().running_batches == 2)
            tasks[0].cancel()
            tasks[2].cancel()
            holder.cancel()
            await asyncio.gather(tasks[0], tasks[2], holder, return_exceptions=True)
            assert holder.cancelled()
            clock.open()
            await asyncio.gather(tasks[1], tasks[3])
        await assert_settled(batcher)
        assert batcher.statistics().cancelled == 3
        await ask(batcher)
    backend.assert_clean()


@pytest.mark.parametrize("kind", ["asyncio", "trio"])
def test_cancelled_at_any_moment(mock_backend: MockBackend, kind: str) -> None:
    """Whatever the moment, the others have their numbers, and no memory is lost."""

    async def body() -> None:
        async with batching(mock_backend, engine={"lanes": 2}) as batcher:
            await batcher.warmup()
            before = None
            for moment in range(60):
                async with anyio.create_task_group() as group:
                    scopes = []
                    for n in range(12):
                        call = (ask, ask_many, ask_filled)[n % 3]
                        if n % 2:
                            group.start_soon(call, batcher, 1 + n % 5, n)
                            continue
                        scope = anyio.CancelScope()
                        scopes.append(scope)
                        group.start_soon(cancellable, scope, call, batcher, 1 + n % 5, n)
                    await turns(moment)
                    for scope in scopes:
                        scope.cancel()
                await assert_settled(batcher)
                engine = batcher.engine.statistics()
                if moment == 30:
                    before = engine.device_memory.live, engine.pinned_memory.live
            after = batcher.engine.statistics()
            assert before == (after.device_memory.live, after.pinned_memory.live)

    anyio.run(body, backend=kind)


async def cancellable(scope: anyio.CancelScope, call: Any, *arguments: Any) -> None:
    with scope:
        await call(*arguments)


async def test_the_others_of_a_cancelled_infer_many() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE) as batcher:
        async with held(backend, clock, batcher):
            many = start(ask_many(batcher, 37))
            one = start(batcher.infer({"x": rows(3)}))
            await turns()
            many.cancel()
            await asyncio.gather(many, return_exceptions=True)
            assert batcher.statistics().waiting_rows == 3
            clock.open()
            assert np.array_equal((await one)["y"], affine(rows(3)))
        await assert_settled(batcher)
        assert batcher.statistics().cancelled == 1
    backend.assert_clean()


@pytest.mark.parametrize("call", [ask, ask_many, ask_filled])
@pytest.mark.parametrize("overload", ["wait", "reject", "shed_oldest"])
async def test_cancelled_with_a_full_queue(mock_backend: MockBackend, overload: str, call: Any) -> None:
    """Whoever waits goes on when those before them leave: nobody is forgotten."""
    chance = random.Random(1)
    policy = trtx.BatchPolicy(overload=overload)
    async with batching(mock_backend, policy=policy, max_queue=8, batch_axis=0) as batcher:

        async def caller() -> None:
            for _ in range(20):
                task = start(call(batcher, chance.choice([1, 1, 2, 3, 8]), 1))
                if chance.random() < 0.4:
                    await turns(chance.randrange(6))
                    task.cancel()
                try:
                    await task
                except (asyncio.CancelledError, trtx.OverloadedError):
                    await turns(3)

        with anyio.fail_after(PATIENCE_S):
            await asyncio.gather(*(caller() for _ in range(30)))
        await assert_settled(batcher)
