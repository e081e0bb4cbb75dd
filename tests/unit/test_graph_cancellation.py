"""Cancellation on the way of a captured graph, and what is let go of: inputs, slots, results."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, fail, slow
from tests.unit.serving import PATIENCE_S, GateClock, affine, cancel_at, rows, serving

X3 = {"x": (3, 4)}
COMPLETIONS = ["latency", "balanced", "efficient"]
every_completion = pytest.mark.parametrize("completion", COMPLETIONS)


def assert_clean(backend: MockBackend) -> None:
    gc.collect()
    assert trtx.live_objects() == []
    backend.assert_clean()


async def assert_serves(engine: trtx.Engine, seed: int = 9) -> None:
    assert np.array_equal((await engine.infer({"x": rows(3, seed)}))["y"], affine(rows(3, seed)))


async def assert_all_slots_are_free(engine: trtx.Engine, slots: int) -> None:
    with anyio.fail_after(PATIENCE_S):
        async with contextlib.AsyncExitStack() as held:
            for _ in range(slots):
                await held.enter_async_context(engine.alloc_inputs(X3))


async def capture(engine: trtx.Engine) -> None:
    async with engine.alloc_inputs(X3):
        pass


async def settled(engine: trtx.Engine) -> None:
    """Until what was cancelled in flight has ended too."""
    with anyio.fail_after(PATIENCE_S):
        while engine.statistics().running or engine.statistics().waiting:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0)


async def every_suspension(make: Callable[[], Awaitable[Any]], after: Callable[[], Awaitable[None]]) -> int:
    """Cancel ``make()`` at its first, second, ... suspension until there is none left; how many there were."""
    for suspension in range(1, 1000):
        outcome, _value, _count = await cancel_at(make, suspension)
        await after()
        if outcome == "finished":
            return suspension - 1
    raise AssertionError("it never ends")


@every_completion
@pytest.mark.parametrize("lanes", [1, 2])
async def test_infer_at_every_suspension(mock_backend: MockBackend, completion: str, lanes: int) -> None:
    async with serving(mock_backend, completion=completion, slots=2, lanes=lanes) as engine:
        await capture(engine)
        assert await every_suspension(lambda: assert_serves(engine, 1), lambda: assert_serves(engine)) >= 1
        await settled(engine)
        await assert_all_slots_are_free(engine, 2 * lanes)
        counts = engine.statistics()
        assert (counts.failed, counts.graphs.misses) == (0, 0)
    assert_clean(mock_backend)


@every_completion
async def test_infer_at_every_suspension_while_it_is_queued(mock_backend: MockBackend, completion: str) -> None:
    async with serving(mock_backend, completion=completion, slots=1) as engine:

        async def queued() -> None:
            async with engine.alloc_inputs(X3):
                task = asyncio.create_task(assert_serves(engine, 1))
                try:
                    await asyncio.sleep(0)
                    assert engine.statistics().waiting == 1
                    await asyncio.sleep(0)
                finally:
                    task.cancel()
                    await asyncio.wait([task])
                    assert engine.statistics().waiting == 0

        assert await every_suspension(queued, lambda: assert_serves(engine)) >= 2
        await settled(engine)
        await assert_all_slots_are_free(engine, 1)
    assert_clean(mock_backend)


@every_completion
@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("is_captured", [False, True])
async def test_alloc_inputs_at_every_suspension(completion: str, lanes: int, is_captured: bool) -> None:
    backends: list[MockBackend] = []

    async def once(engine: trtx.Engine) -> None:
        request = engine.alloc_inputs(X3)
        slot = await request.__aenter__()
        slot.close()

    for suspension in range(1, 100):
        backend = MockBackend()
        backends.append(backend)
        async with serving(backend, completion=completion, slots=1, lanes=lanes) as engine:
            if is_captured:
                await capture(engine)
            outcome, _, _ = await cancel_at(lambda engine=engine: once(engine), suspension)  # type: ignore[misc]
            await assert_all_slots_are_free(engine, lanes)
            await assert_serves(engine)
            assert engine.statistics().failed == 0
        assert_clean(backend)
        backend.close()
        if outcome == "finished":
            break
    assert len(backends) >= (2 if is_captured else 2 + lanes)


@every_completion
@pytest.mark.parametrize("copy_outputs", [True, False])
async def test_slot_infer_at_every_suspension(mock_backend: MockBackend, completion: str, copy_outputs: bool) -> None:
    async with serving(mock_backend, completion=completion, slots=1) as engine:
        async with engine.alloc_inputs(X3) as slot:

            async def infer() -> None:
                slot["x"][...] = rows(3, 1)
                assert np.array_equal((await slot.infer(copy_outputs=copy_outputs))["y"], affine(rows(3, 1)))

            async def after() -> None:
                with anyio.fail_after(PATIENCE_S):
                    while True:  # the slot is busy until the GPU is done with what was cancelled
                        with contextlib.suppress(trtx.BorrowedError):
                            return await infer()
                        await asyncio.sleep(0)

            assert await every_suspension(infer, after) >= 1
        await assert_serves(engine)
    assert_clean(mock_backend)


@pytest.mark.parametrize("nbytes", [16, 1])
async def test_slot_infer_at_every_suspension_of_large_outputs(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    """Copied in turns of the loop, or by a thread: cancelled in the middle, the slot is good again."""
    monkeypatch.setattr("trtx_py._slot.ON_LOOP_BYTES", nbytes)
    if nbytes == 1:
        monkeypatch.setattr("trtx_py._slot._IN_TURNS_BYTES", 1)
    async with serving(mock_backend, slots=1) as engine:
        async with engine.alloc_inputs(X3) as slot:

            async def infer() -> None:
                slot["x"][...] = rows(3, 1)
                assert np.array_equal((await slot.infer())["y"], affine(rows(3, 1)))

            async def after() -> None:
                with anyio.fail_after(PATIENCE_S):
                    while True:
                        with contextlib.suppress(trtx.BorrowedError):
                            return await infer()
                        await asyncio.sleep(0)

            assert await every_suspension(infer, after) >= 2
        await assert_serves(engine)
    assert_clean(mock_backend)


@every_completion
async def test_a_cancelled_inference_never_meets_the_next_ones_data(completion: str) -> None:
    """Its slot comes back only when the GPU is done; who is queued gets it then."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with serving(backend, completion=completion, slots=1) as engine:
        await capture(engine)
        backend.inject(slow("execute", 1, count=1))
        task = asyncio.create_task(engine.infer({"x": rows(3, 1)}))
        await clock.wait_reached()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        following = [asyncio.create_task(engine.infer({"x": rows(3, seed)})) for seed in range(2, 6)]
        await asyncio.sleep(0.01)
        assert engine.statistics().waiting == 4
        clock.open()
        with anyio.fail_after(PATIENCE_S):
            for seed, result in enumerate(await asyncio.gather(*following), start=2):
                assert np.array_equal(result["y"], affine(rows(3, seed)))
        counts = engine.statistics()
        assert (counts.completed, counts.cancelled, counts.failed) == (4, 1, 0)
    assert_clean(backend)


@every_completion
@pytest.mark.parametrize("seed", range(3))
async def test_some_of_many(mock_backend: MockBackend, completion: str, seed: int) -> None:
    """Cancel at random moments; everyone else gets the right answer, and every slot comes back."""
    random = np.random.default_rng(seed)
    async with serving(mock_backend, lanes=2, slots=3, completion=completion) as engine:
        await capture(engine)

        async def by_slot(number: int) -> dict[str, Any]:
            async with engine.alloc_inputs(X3) as slot:
                slot["x"][...] = rows(3, number)
                return await slot.infer()

        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(by_slot(number) if number % 3 == 0 else engine.infer({"x": rows(3, number)}))
            for number in range(300)
        ]
        doomed = set(random.choice(300, 100, replace=False).tolist())
        for number in doomed:
            await asyncio.sleep(0)
            tasks[number].cancel()
        with anyio.fail_after(PATIENCE_S):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for number, result in enumerate(results):
            if isinstance(result, dict):
                assert np.array_equal(result["y"], affine(rows(3, number)))
            else:
                assert number in doomed
                assert isinstance(result, asyncio.CancelledError), result
        await settled(engine)
        await assert_all_slots_are_free(engine, 6)
        assert engine.statistics().failed == 0
    assert_clean(mock_backend)


@every_completion
@pytest.mark.parametrize("fails", [False, True])
async def test_inputs_are_let_go_with_the_answer(mock_backend: MockBackend, completion: str, fails: bool) -> None:
    async with serving(mock_backend, completion=completion) as engine:
        await capture(engine)
        gc.collect()
        gc.disable()  # cycles would keep them until some later collection
        try:
            for _ in range(3):
                x = rows(3)
                gone = weakref.ref(x)
                if fails:
                    mock_backend.inject(fail("cuGraphLaunch"))
                with pytest.raises(trtx.CudaError) if fails else contextlib.nullcontext():
                    await engine.infer({"x": x})
                del x
                assert gone() is None
        finally:
            gc.enable()


@every_completion
@pytest.mark.parametrize("way", ["launched", "cancelled", "failed"])
async def test_inputs_that_were_queued_are_let_go(completion: str, way: str) -> None:
    """Kept while the request is queued, and not a moment longer: they are in pinned memory once it is launched."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with serving(backend, completion=completion, slots=1) as engine:
        await capture(engine)
        backend.inject(slow("execute", 1, count=1))
        running = asyncio.create_task(engine.infer({"x": rows(3, 1)}))
        await clock.wait_reached()
        gc.collect()
        gc.disable()
        try:
            box = [rows(3, 2)]
            gone = weakref.ref(box[0])

            async def infer() -> dict[str, Any]:
                return await engine.infer({"x": box.pop()})

            queued = asyncio.create_task(infer())
            while not engine.statistics().waiting:  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(0)
            assert gone() is not None
            if way == "cancelled":
                queued.cancel()
                await asyncio.wait([queued])
                del queued  # its exception refers to the frames that the inputs are in
                assert gone() is None
            if way == "failed":
                backend.inject(fail("cuGraphLaunch"))
            clock.open()
            await running
            if way != "cancelled":
                await asyncio.wait([queued])
                if way == "launched":
                    assert np.array_equal(queued.result()["y"], affine(rows(3, 2)))
                else:
                    assert isinstance(queued.exception(), trtx.CudaError)
                del queued
            assert gone() is None
        finally:
            gc.enable()
            clock.open()
        await assert_serves(engine)
    assert_clean(backend)


async def test_a_slot_that_is_dropped_in_flight_comes_back(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, slots=1) as engine:
        slot = await engine.alloc_inputs(X3).__aenter__()
        mock_backend.inject(slow(seconds=0.02, count=1))
        coroutine = slot.infer()
        coroutine.send(None)
        coroutine.close()
        await slot.aclose()
        await assert_serves(engine)
        await assert_all_slots_are_free(engine, 1)
    assert_clean(mock_backend)
