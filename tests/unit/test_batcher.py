"""Requests of many callers in one launch: every row's numbers, what is padded, what is launched when."""

from __future__ import annotations

import asyncio
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
    ask_filled,
    ask_many,
    assert_settled,
    batching,
    held,
    start,
    turns,
    two_plan,
    until,
)
from tests.unit.serving import GateClock, affine, rows, split_plan

KINDS = [pytest.param("asyncio", {}, id="asyncio"), pytest.param("trio", {}, id="trio")]


def run(body: Any, backend: str, options: dict[str, Any]) -> None:
    anyio.run(body, backend=backend, backend_options=options)


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("lanes", [1, 3])
def test_many_callers_of_every_kind(
    mock_backend: MockBackend, lanes: int, graphs: bool, kind: str, options: dict[str, Any]
) -> None:
    async def body() -> None:
        engine = {"lanes": lanes, "cuda_graphs": graphs}
        async with batching(mock_backend, engine=engine) as batcher:
            async with anyio.create_task_group() as group:
                for seed in range(60):
                    group.start_soon(ask, batcher, 1, seed)
                    group.start_soon(ask, batcher, 1 + seed % 8, seed)
                    group.start_soon(ask_many, batcher, 1 + seed % 30, seed)
                    group.start_soon(ask_filled, batcher, 1 + seed % 3, seed)
            await assert_settled(batcher)
            s = batcher.statistics()
            assert s.completed == s.accepted >= 240
            assert s.failed == s.cancelled == s.late == s.dropped == s.shed == s.rejected == 0
            assert s.rows_completed > 4 * s.batches  # that is what it is for

    run(body, kind, options)


async def test_requests_of_one_turn_share_a_launch(mock_backend: MockBackend) -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE) as batcher, held(backend, clock, batcher):
        before = batcher.statistics().batches
        tasks = [start(ask(batcher, 1, seed)) for seed in range(5)]
        await turns()
        assert batcher.statistics().waiting_rows == 5
        clock.open()
        await asyncio.gather(*tasks)
        s = batcher.statistics()
        assert (s.batches - before, s.padding_rows) == (1, 3)  # five rows in a graph of eight
    backend.assert_clean()


async def test_rows_are_ceiled_to_captured_sizes(mock_backend: MockBackend) -> None:
    async with batching(mock_backend) as batcher:
        assert batcher.batch_sizes == (1, 2, 4, 8)
        await batcher.warmup()
        before = batcher.engine.statistics().graphs
        for seed in range(8):
            await asyncio.gather(*(ask(batcher, 1, seed) for seed in range(1 + seed)))
            await asyncio.gather(*(ask(batcher, 1 + seed, seed) for _ in range(3)))
        after = batcher.engine.statistics().graphs
        s = batcher.statistics()
        assert after.misses == before.misses
        assert after.captures == before.captures
        assert after.hits - before.hits == s.batches + s.bypassed
        assert s.rows_completed + s.padding_rows >= s.rows_completed


async def test_given_sizes(mock_backend: MockBackend) -> None:
    async with batching(mock_backend, policy=trtx.BatchPolicy(batch_sizes=(3, 5, 100)), max_batch_size=6) as batcher:
        assert batcher.batch_sizes == (3, 5, 6)
        async with anyio.create_task_group() as group:
            for seed in range(20):
                group.start_soon(ask, batcher, 1 + seed % 6, seed)
        await assert_settled(batcher)


async def test_a_lone_caller_bypasses(mock_backend: MockBackend) -> None:
    async with batching(mock_backend) as batcher:
        for seed in range(5):
            await ask(batcher, 1, seed)
        await ask(batcher, 8)
        s = batcher.statistics()
        assert (s.bypassed, s.batches, s.completed, s.rows_completed) == (6, 0, 6, 13)
        await ask(batcher, 3)  # no graph of three rows: it goes padded
        s = batcher.statistics()
        assert (s.bypassed, s.batches, s.padding_rows) == (6, 1, 1)
        await ask(batcher, 4)
        assert batcher.statistics().bypassed == 7


async def test_two_inputs_and_two_outputs(mock_backend: MockBackend) -> None:
    random = np.random.default_rng(0)

    async def one(batcher: trtx.DynamicBatcher, count: int) -> None:
        left, right = (random.standard_normal((count, 2)).astype(np.float32) for _ in range(2))
        found = await batcher.infer({"right": right, "left": left})
        assert found.keys() == {"total", "double"}
        assert np.array_equal(found["total"], left + right)
        assert np.array_equal(found["double"], left + left)
        many = await batcher.infer_many({"left": np.tile(left, (9, 1)), "right": np.tile(right, (9, 1))})
        assert np.array_equal(many["total"], np.tile(left + right, (9, 1)))

    async with batching(mock_backend, two_plan(), engine={"lanes": 2}) as batcher:
        await asyncio.gather(*(one(batcher, 1 + number % 8) for number in range(40)))
        await assert_settled(batcher)


async def test_the_answer_is_the_callers_own(mock_backend: MockBackend) -> None:
    """A later batch in the same memory changes nothing in it, and neither do the neighbours."""
    async with batching(mock_backend) as batcher:
        x = rows(40)
        first = await asyncio.gather(*(batcher.infer({"x": x[n : n + 1]}) for n in range(40)))
        for found in first:
            assert found["y"].flags.owndata
            assert found["y"].flags.writeable
        kept = [found["y"].copy() for found in first]
        first[0]["y"][...] = 7
        kept[0][...] = 7
        await asyncio.gather(*(ask(batcher, 1, seed) for seed in range(40)))
        assert all(np.array_equal(found["y"], copy) for found, copy in zip(first, kept, strict=True))


@pytest.mark.parametrize("layout", ["strided", "fortran", "reversed", "broadcast", "readonly", "list"])
async def test_inputs_of_any_layout(mock_backend: MockBackend, layout: str) -> None:
    def laid_out(x: np.ndarray) -> Any:
        if layout == "strided":
            wide = np.zeros((len(x), 8), np.float32)
            wide[:, ::2] = x
            return wide[:, ::2]
        if layout == "fortran":
            return np.asfortranarray(x)
        if layout == "reversed":
            return x[::-1].copy()[::-1]
        if layout == "broadcast":
            return np.broadcast_to(x[:1], x.shape)
        if layout == "readonly":
            x.flags.writeable = False
            return x
        return x.tolist()

    async def one(batcher: trtx.DynamicBatcher, seed: int) -> None:
        given = laid_out(rows(3, seed))
        try:
            found = await batcher.infer({"x": given})
        except trtx.InvalidArgumentError:
            assert layout == "list"  # float64 is not what the engine takes
            return
        assert np.array_equal(found["y"], affine(np.asarray(given, np.float32)))

    async with batching(mock_backend) as batcher:
        await asyncio.gather(*(one(batcher, seed) for seed in range(10)))
        await assert_settled(batcher)


async def test_profiles_are_not_switched(mock_backend: MockBackend) -> None:
    async with batching(mock_backend, split_plan()) as batcher:
        await batcher.warmup()
        before = batcher.engine.statistics()
        for _ in range(5):
            await asyncio.gather(*(ask(batcher, 1 + seed % 8, seed) for seed in range(20)))
        after = batcher.engine.statistics()
        assert after.profile_switches == before.profile_switches
        assert after.graphs.misses == before.graphs.misses
        await assert_settled(batcher)


async def test_a_full_batch_goes_behind_the_one_that_runs() -> None:
    """Full: at once. Not full: when its delay is over. One more than ``depth``: not at all."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=trtx.BatchPolicy(depth=2), max_delay_s=NEVER_S) as batcher:
        async with held(backend, clock, batcher):
            first = [start(ask(batcher, 1, seed)) for seed in range(7)]
            await turns()
            assert batcher.statistics().running_batches == 1
            first.append(start(ask(batcher, 1, 7)))
            await turns()
            assert batcher.statistics().running_batches == 2
            second = [start(ask(batcher, 1, seed)) for seed in range(8)]
            await turns()
            assert batcher.statistics().running_batches == 2
            assert batcher.statistics().waiting_rows == 8
            clock.open()
            await asyncio.gather(*first, *second)
        await assert_settled(batcher)
    backend.assert_clean()


async def test_rows_that_callers_fill_go_behind_after_the_delay() -> None:
    """Two that are placed before either is filled: there is a timer for them all the same."""
    skip = Skip()
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=trtx.BatchPolicy(depth=2), max_delay_s=3600.0) as batcher:
        async with held(backend, clock, batcher, 3), batcher.alloc_rows(1) as one, batcher.alloc_rows(1) as two:
            assert batcher._launcher.gate is not None
            one["x"][...], two["x"][...] = rows(1, 1), rows(1, 2)
            sent = [start(one.infer()), start(two.infer())]
            await turns()
            assert batcher.statistics().running_batches == 1
            await skip.by(3601.0)
            assert batcher.statistics().running_batches == 2
            clock.open()
            for seed, outputs in enumerate(await asyncio.gather(*sent), start=1):
                assert np.array_equal(outputs["y"], affine(rows(1, seed)))
        await assert_settled(batcher)
    backend.assert_clean()


async def test_a_launch_leaves_at_once_when_a_lane_is_free() -> None:
    """A delay of hours does not matter: nobody waits for it."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, engine={"lanes": 2}, max_delay_s=NEVER_S) as batcher:
        async with held(backend, clock, batcher):
            await ask(batcher, 3)
            await asyncio.gather(*(ask(batcher, 1, seed) for seed in range(5)))
        await assert_settled(batcher)
    backend.assert_clean()


async def test_order_of_infer_many(mock_backend: MockBackend) -> None:
    async with batching(mock_backend, engine={"lanes": 3}) as batcher:
        await asyncio.gather(*(ask_many(batcher, 8 * 20 + seed, seed) for seed in range(6)))
        await ask_many(batcher, 1)
        await ask_many(batcher, 5000)  # more than may wait
        await assert_settled(batcher)


async def test_statistics_of_batches(mock_backend: MockBackend) -> None:
    async with batching(mock_backend) as batcher:
        await asyncio.gather(*(ask(batcher, 1, seed) for seed in range(50)))
        await until(lambda: not batcher.statistics().running_batches)
        s = batcher.statistics()
        assert s.rows_completed == 50
        assert s.completion_s.count == s.completed == 50
        assert s.queue_s.count == s.completed - s.bypassed
        assert s.batch_rows.count == s.batches
        assert s.batch_rows.sum == s.rows_completed - s.bypassed
        assert s.gpu_s.count == s.batches + s.bypassed


async def test_a_request_larger_than_a_batch(mock_backend: MockBackend) -> None:
    async with batching(mock_backend) as batcher:
        with pytest.raises(trtx.ShapeError, match="infer_many"):
            await batcher.infer({"x": rows(9)})
        with pytest.raises(trtx.ShapeError, match="at most 8"):
            async with batcher.alloc_rows(9):
                pass
        await ask_many(batcher, 9)
        await assert_settled(batcher)


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_size": 0}, {"max_batch_size": "8"}, {"max_delay_s": None}, {"max_delay_s": -1}, {"max_queue": 0},
        {"policy": "wait"}, {"batch_axis": 2}, {"batch_axis": -1}, {"batch_axis": {"z": 0}}, {"batch_axis": "x"},
        {"max_delay_s": float("nan")}, {"pad": 3}, {"crop": "x"},
    ],
)  # fmt: skip
async def test_bad_options(mock_backend: MockBackend, options: dict[str, Any]) -> None:
    with pytest.raises(trtx.InvalidArgumentError):
        async with batching(mock_backend, **options):
            pass


async def test_of_a_closed_engine(mock_backend: MockBackend) -> None:
    async with batching(mock_backend) as batcher:
        engine = batcher.engine
    with pytest.raises(trtx.ClosedError):
        trtx.DynamicBatcher(engine)


async def test_several_batchers_of_one_engine(mock_backend: MockBackend) -> None:
    async with batching(mock_backend, engine={"lanes": 2}) as first:
        async with trtx.DynamicBatcher(first.engine, max_batch_size=4) as second:
            await asyncio.gather(
                *(ask(batcher, 1 + seed % 4, seed) for seed in range(30) for batcher in (first, second))
            )
            await asyncio.gather(*(first.engine.infer({"x": rows(3)}) for _ in range(10)))
            await assert_settled(second)
        await ask(first)
        await assert_settled(first)
