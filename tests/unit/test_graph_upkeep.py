"""What a lane makes up for and clears away beside its requests: lost captures, and graphs above the bound."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable

import anyio
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, fail, slow
from tests.unit.serving import PATIENCE_S, GateClock, affine, rows, serving, serving_sync
from trtx_py._capture import ShapeKey
from trtx_py._request import Request
from trtx_py._upkeep import Upkeep

X3 = {"x": (3, 4)}
KEY = ShapeKey((("x", (3, 4)),))
SOON_S = 30.0  # less than a hang, more than a loaded machine needs


async def until(condition: Callable[[], object]) -> None:
    """What happens beside the requests has no event to wait for."""
    with anyio.fail_after(SOON_S):
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.001)


async def infer(engine: trtx.Engine, seed: int = 0) -> None:
    assert np.array_equal((await engine.infer({"x": rows(3, seed)}))["y"], affine(rows(3, seed)))


async def lose_one_capture(backend: MockBackend, engine: trtx.Engine) -> None:
    """Of two lanes, one has the shape of three rows captured, and the other one failed to."""
    backend.inject(fail("cuGraphInstantiate", 2))
    for seed in range(2):
        await infer(engine, seed)
        await until(lambda: engine._front.lanes._idle)  # else another lane serves the next, and each has seen one
    await until(lambda: engine.statistics().graphs.failures == engine.statistics().graphs.captured == 1)


async def test_a_failed_capture_is_made_up_for_when_the_shape_recurs(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, lanes=2, slots=1) as engine:
        await lose_one_capture(mock_backend, engine)
        await asyncio.sleep(0.1)
        assert engine.statistics().graphs.captured == 1  # nobody asks for it
        await infer(engine)
        await until(lambda: engine.statistics().graphs.captured == 2)
        assert engine.statistics().graphs.failures == 1
        assert engine.statistics().failed == 0


async def test_it_is_tried_again_until_it_succeeds(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, lanes=2, slots=1) as engine:
        await lose_one_capture(mock_backend, engine)
        mock_backend.inject(fail("cuGraphInstantiate", count=2))
        with anyio.fail_after(SOON_S):
            while engine.statistics().graphs.captured < 2:
                await infer(engine)
        assert engine.statistics().graphs.failures == 3


async def test_a_cancelled_capture_is_made_up_for_when_the_shape_recurs() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with serving(backend, lanes=2, slots=1) as engine:
        backend.inject(slow("execute", 1, count=1))
        busy = asyncio.create_task(engine.infer_timed({"x": rows(5)}))  # on the lane that was started first
        await clock.wait_reached()
        request = asyncio.create_task(engine.alloc_inputs(X3).__aenter__())
        await until(lambda: engine.statistics().graphs.captured == 1)
        request.cancel()  # it waits for the busy lane's capture, which was not begun
        with contextlib.suppress(asyncio.CancelledError):
            await request
        clock.open()
        await busy
        await asyncio.sleep(0.1)
        assert engine.statistics().graphs.captured == 1
        await infer(engine)
        await until(lambda: engine.statistics().graphs.captured == 2)


async def test_who_holds_two_slots_gets_the_second_although_a_capture_was_lost(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, lanes=2, slots=1) as engine:
        await lose_one_capture(mock_backend, engine)
        with anyio.fail_after(SOON_S):
            async with engine.alloc_inputs(X3) as first, engine.alloc_inputs(X3) as second:
                first["x"][...], second["x"][...] = rows(3, 1), rows(3, 2)
                found = await asyncio.gather(first.infer(), second.infer())
        assert np.array_equal(found[0]["y"], affine(rows(3, 1)))
        assert np.array_equal(found[1]["y"], affine(rows(3, 2)))
        assert engine.statistics().graphs.captured == 2


async def test_the_second_slot_comes_although_the_capture_fails_again(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, lanes=2, slots=1) as engine:
        await lose_one_capture(mock_backend, engine)
        async with engine.alloc_inputs(X3):
            mock_backend.inject(fail("cuGraphInstantiate", count=2))
            with anyio.fail_after(SOON_S):
                async with engine.alloc_inputs(X3) as second:
                    await second.infer()
        assert engine.statistics().graphs.failures == 3


async def test_an_array_gets_the_other_lane_although_a_capture_was_lost(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, lanes=2, slots=1) as engine:
        await lose_one_capture(mock_backend, engine)
        with anyio.fail_after(SOON_S):
            async with engine.alloc_inputs(X3):
                await infer(engine)


def test_two_slots_in_a_thread(mock_backend: MockBackend) -> None:
    with serving_sync(mock_backend, lanes=2, slots=1) as engine:
        anyio.run(lose_one_capture, mock_backend, engine)

        def hold_two() -> None:
            with engine.alloc_inputs(X3) as first, engine.alloc_inputs(X3) as second:
                first.infer_sync(timeout_s=PATIENCE_S)
                second.infer_sync(timeout_s=PATIENCE_S)

        thread = threading.Thread(target=hold_two, daemon=True)  # a hang must not become the test run's
        thread.start()
        thread.join(SOON_S)
        assert not thread.is_alive()
        assert engine.statistics().completed == 4


async def test_graphs_above_the_bound_go_when_they_are_idle(mock_backend: MockBackend) -> None:
    """Held slots keep a second shape alive; nothing is captured afterwards that would make room."""
    async with serving(mock_backend, max_graphs=1, slots=2) as engine:
        async with engine.alloc_inputs(X3):
            one = engine.statistics().pinned_memory
            async with engine.alloc_inputs({"x": (2, 4)}):
                assert engine.statistics().graphs.captured == 2
            assert engine.statistics().graphs.captured == 2  # one is held, the other one new: somebody may come for it
        await until(lambda: engine.statistics().graphs.evictions == 1)  # counted last
        graphs = engine.statistics().graphs
        assert (graphs.captured, graphs.captures) == (1, 2)
        await until(lambda: engine.statistics().pinned_memory.current_bytes <= one.current_bytes)


async def test_what_was_given_up_in_use_goes_when_it_is_idle(mock_backend: MockBackend) -> None:
    """Also while the engine has nothing else to do."""
    async with serving(mock_backend, max_graphs=1, slots=2) as engine:
        async with engine.alloc_inputs(X3), engine.alloc_inputs({"x": (2, 4)}):
            contexts = engine.statistics().contexts
        await until(lambda: engine.statistics().contexts == contexts - 1)


class Graphs:
    """Stands for GraphCache: nothing is captured on this lane."""

    untidy = False

    def lacks(self, key: ShapeKey) -> bool:
        return True

    def hits(self, key: ShapeKey) -> int | None:
        return None


def upkeep() -> Upkeep:
    return Upkeep(Graphs())  # type: ignore[arg-type]


def test_ever_longer_pauses_after_each_failure() -> None:
    kept, capture, pauses = upkeep(), Request({}, [0], capture=KEY), []
    for _ in range(9):
        kept.lost(capture, 0.0, 0)
        pause = kept.pause_s(0.0)
        assert pause is not None
        assert kept.due_captures(pause * 0.9, lambda key: 1, True) == []
        (capture,) = kept.due_captures(pause * 1.01, lambda key: 1, True)
        pauses.append(pause)
    assert pauses == sorted(pauses)
    assert pauses[0] < 0.1
    assert 10 < pauses[-1] == pauses[-2]
    assert kept.pause_s(0.0) is None


def test_a_lane_that_waits_for_a_shape_to_recur_looks_ever_more_rarely() -> None:
    kept, now = upkeep(), 0.0
    kept.lost(Request({}, [0], capture=KEY), now, 7)
    looks = 0
    while now < 60:
        pause = kept.pause_s(now)
        assert pause is not None
        now += pause
        looks += 1
        assert kept.due_captures(now, lambda key: 7, False) == []
    assert looks < 80
    assert len(kept.due_captures(now + 2, lambda key: 8, False)) == 1


def test_what_no_lane_serves_is_left_to_the_requests() -> None:
    kept = upkeep()
    kept.lost(Request({}, [0], capture=KEY), 0.0, None)
    assert kept.due_captures(1.0, lambda key: None, True) == []
    assert kept.pause_s(1.0) is None


def test_nothing_is_owed_where_nothing_is_captured() -> None:
    kept = Upkeep(None)
    kept.lost(Request({}, [0], capture=KEY), 0.0, None)
    kept.want(KEY, [0], 0.0)
    assert kept.pause_s(0.0) is None
    assert not kept.tidying_is_due(0.0)


@pytest.mark.parametrize("way", ["infer", "slot"])
async def test_a_cancelled_request_is_running_until_the_gpu_is_done(way: str) -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with serving(backend, slots=2) as engine, engine.alloc_inputs(X3) as slot:
        backend.inject(slow("execute", 1, count=1))
        task = asyncio.create_task(slot.infer() if way == "slot" else engine.infer({"x": rows(3)}))
        await clock.wait_reached()
        assert engine.statistics().running == 1
        task.cancel()
        await asyncio.wait([task])
        for _ in range(3):
            assert engine.statistics().running == 1
            await asyncio.sleep(0.005)
        clock.open()
        await until(lambda: not engine.statistics().running)
        assert engine.statistics().cancelled == 1
