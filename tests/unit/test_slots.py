"""Slots that the caller fills: pinned memory of a lane, one graph launch, and outputs that may stay where they are."""

from __future__ import annotations

import asyncio
import threading

import anyio
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, slow
from tests.unit.serving import (
    PAIR,
    PATIENCE_S,
    RESHAPE,
    GateClock,
    affine,
    build,
    pair_model,
    reshape_model,
    rows,
    serving,
    serving_sync,
)

X3 = {"x": (3, 4)}


async def test_fill_and_infer_again_and_again(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine, engine.alloc_inputs(X3) as slot:
        results = []
        for seed in range(4):
            slot["x"][...] = rows(3, seed)
            results.append((await slot.infer())["y"])
        for seed, found in enumerate(results):  # the caller's own: not overwritten by later inferences
            assert np.array_equal(found, affine(rows(3, seed)))


async def test_nothing_is_allocated_once_a_slot_is_out(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine, engine.alloc_inputs(X3) as slot:
        await slot.infer()
        before, statistics = mock_backend.calls, engine.statistics()
        for _ in range(20):
            await slot.infer()
        used = mock_backend.calls - before
        after = engine.statistics()
    assert used["cuGraphLaunch"] == 20
    assert {call for call in used if "Alloc" in call or "Create" in call or "memcpy" in call.lower()} == set()
    assert after.device_memory == statistics.device_memory
    assert after.pinned_memory == statistics.pinned_memory


async def test_outputs_may_stay_in_the_slot(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine, engine.alloc_inputs(X3) as slot:
        slot["x"][...] = rows(3, 1)
        kept = await slot.infer(copy_outputs=False)
        assert kept["y"] is slot.outputs["y"]
        slot["x"][...] = rows(3, 2)
        await slot.infer(copy_outputs=False)
        assert np.array_equal(kept["y"], affine(rows(3, 2)))  # that is what staying means


async def test_several_inputs_and_outputs(mock_backend: MockBackend) -> None:
    shapes = {"left": (2, 2), "right": (2, 2), "fixed": (3,)}
    async with serving(mock_backend, build(pair_model(), [PAIR])) as engine, engine.alloc_inputs(shapes) as slot:
        slot["left"][...], slot["right"][...], slot["fixed"][...] = 2, 3, [7, 8, 9]
        found = await slot.infer()
        assert found["total"].tolist() == [[5, 5], [5, 5]]
        assert found["same"].tolist() == [7, 8, 9]
        assert list(slot.inputs) == ["left", "right", "fixed"]


async def test_waits_while_all_slots_are_out(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, slots=1) as engine:
        order: list[str] = []

        async def second() -> None:
            async with engine.alloc_inputs(X3) as slot:
                order.append("second")
                slot["x"][...] = rows(3)
                assert np.array_equal((await slot.infer())["y"], affine(rows(3)))

        async with engine.alloc_inputs(X3):
            task = asyncio.create_task(second())
            await asyncio.sleep(0.02)
            order.append("first")
        await task
        assert order == ["first", "second"]


async def test_a_cancelled_wait_takes_no_slot(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, slots=1) as engine:
        async with engine.alloc_inputs(X3):
            with anyio.move_on_after(0.02) as scope:
                async with engine.alloc_inputs(X3):
                    raise AssertionError("there was one slot, and it is out")
            assert scope.cancelled_caught
        async with engine.alloc_inputs(X3) as slot:
            await slot.infer()


async def test_arrays_queue_behind_slots_that_are_out(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, slots=1) as engine:
        async with engine.alloc_inputs(X3):
            task = asyncio.create_task(engine.infer({"x": rows(3)}))
            with anyio.fail_after(PATIENCE_S):
                while not engine.statistics().waiting:  # noqa: ASYNC110 - there is no event
                    await asyncio.sleep(0)
            await asyncio.sleep(0.02)
            assert not task.done()
            assert engine.statistics().waiting == 1
        assert np.array_equal((await task)["y"], affine(rows(3)))


async def test_one_inference_at_a_time() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with serving(backend) as engine, engine.alloc_inputs(X3) as slot:
        backend.inject(slow(count=1))
        task = asyncio.create_task(slot.infer())
        await clock.wait_reached()
        with pytest.raises(trtx.BorrowedError, match="in flight"):
            await slot.infer()
        clock.open()
        await task
    backend.assert_clean()


async def test_cancelling_drops_the_result_and_the_slot_is_good_again() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with serving(backend) as engine, engine.alloc_inputs(X3) as slot:
        backend.inject(slow(count=1))
        with pytest.raises(TimeoutError):
            with anyio.fail_after(0.005):
                await slot.infer()
        with pytest.raises(trtx.BorrowedError):
            await slot.infer()  # the GPU still works on it
        clock.open()
        with anyio.fail_after(PATIENCE_S):
            while True:
                try:
                    slot["x"][...] = rows(3)
                    assert np.array_equal((await slot.infer())["y"], affine(rows(3)))
                    break
                except trtx.BorrowedError:
                    await asyncio.sleep(0.005)
    backend.assert_clean()


async def test_leaving_while_in_flight_waits_for_the_gpu() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with serving(backend) as engine:

        async def leave() -> trtx.Slot:
            async with engine.alloc_inputs(X3) as slot:
                backend.inject(slow(count=1))
                inferring.append(asyncio.create_task(slot.infer()))
                await clock.wait_reached()
            return slot

        inferring: list[asyncio.Task[object]] = []
        leaving = asyncio.create_task(leave())
        await asyncio.wait([leaving], timeout=0.05)
        assert not leaving.done()
        clock.open()
        slot = await leaving
        await asyncio.gather(*inferring, return_exceptions=True)
        with pytest.raises(trtx.ClosedError):
            await slot.infer()
        with pytest.raises(trtx.ClosedError):
            slot["x"]


async def test_a_slot_is_an_owned_object(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine:
        async with engine.alloc_inputs(X3):
            with pytest.raises(trtx.BorrowedError, match="Slot"):
                engine.close()
        slot = await engine.alloc_inputs(X3).__aenter__()
        assert any(item.kind == "Slot" for item in trtx.live_objects())
        await engine.aclose()
        assert slot.closed


@pytest.mark.parametrize(
    ("shapes", "error", "text"),
    [
        ({}, trtx.InvalidArgumentError, "expected a shape for each"),
        ({"y": (3, 4)}, trtx.InvalidArgumentError, "input 'x'"),
        ([3, 4], trtx.InvalidArgumentError, "list"),
        ({"x": (3, 5)}, trtx.ShapeError, r"\(3, 5\)"),
        ({"x": (9, 4)}, trtx.ShapeError, "no optimization profile"),
        ({"x": 3}, trtx.InvalidArgumentError, "'x'"),
        ({"x": (-1, 4)}, trtx.InvalidArgumentError, "'x'"),
    ],
)
async def test_bad_shapes(mock_backend: MockBackend, shapes: object, error: type[Exception], text: str) -> None:
    async with serving(mock_backend) as engine:
        with pytest.raises(error, match=text):
            async with engine.alloc_inputs(shapes):  # type: ignore[arg-type]
                pass


async def test_an_unknown_input(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine, engine.alloc_inputs(X3) as slot:
        with pytest.raises(trtx.InvalidArgumentError, match="there is no input 'image'"):
            slot["image"]


async def test_shape_tensors_have_no_place_in_a_slot(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, build(reshape_model(), [RESHAPE])) as engine:
        with pytest.raises(trtx.InvalidArgumentError, match="use infer"):
            engine.alloc_inputs({"x": (6,), "shape": (2,)})


async def test_lanes_share_the_work(mock_backend: MockBackend) -> None:
    """Six slots of three lanes run three at a time: one kernel's delay for two rounds, not for six."""
    async with serving(mock_backend, lanes=3, slots=2) as engine:
        async with engine.alloc_inputs(X3):
            pass

        async def one(seed: int) -> None:
            async with engine.alloc_inputs(X3) as slot:
                slot["x"][...] = rows(3, seed)
                assert np.array_equal((await slot.infer())["y"], affine(rows(3, seed)))

        await asyncio.gather(*(one(seed) for seed in range(12)))
        assert engine.statistics().lanes == 3
        assert engine.statistics().completed == 12


def test_in_threads(mock_backend: MockBackend) -> None:
    with serving_sync(mock_backend) as engine:
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                with engine.alloc_inputs(X3) as slot:
                    for n in range(5):
                        slot["x"][...] = rows(3, seed + n)
                        assert np.array_equal(slot.infer_sync()["y"], affine(rows(3, seed + n)))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(10 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert not failures


def test_sync_timeout() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    with serving_sync(backend) as engine, engine.alloc_inputs(X3) as slot:
        backend.inject(slow(count=1))
        with pytest.raises(TimeoutError, match="dropped"):
            slot.infer_sync(timeout_s=0.005)
        with pytest.raises(trtx.BorrowedError):
            slot.infer_sync()  # the GPU still works on it
        clock.open()
        while True:
            try:
                slot.infer_sync()
                break
            except trtx.BorrowedError:
                continue
    backend.assert_clean()


@pytest.mark.parametrize("completion", ["latency", "balanced", "efficient"])
def test_on_trio(mock_backend: MockBackend, completion: str) -> None:
    async def main() -> None:
        async with serving(mock_backend, completion=completion, slots=2) as engine:
            async with engine.alloc_inputs(X3) as slot:
                slot["x"][...] = rows(3)
                assert np.array_equal((await slot.infer())["y"], affine(rows(3)))
            async with anyio.create_task_group() as group:
                for _ in range(8):
                    group.start_soon(engine.infer, {"x": rows(3)})

    anyio.run(main, backend="trio")
