"""More slots for a shape that is captured already, while its graphs serve."""

from __future__ import annotations

import anyio
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, fail
from tests.unit.serving import affine, affine_model, build, rows, serving
from trtx_py._capture import ShapeKey
from trtx_py._native import Place, return_bucket

COUNT = 1 << 13  # rows: so large that a lane has few slots at first


def large_plan() -> trtx.Plan:
    return build(affine_model(), [{"x": ((1, 4), (COUNT, 4), (COUNT, 4))}])


KEY = ShapeKey((("x", (COUNT, 4)),))


async def infer(engine: trtx.Engine, seed: int) -> None:
    assert np.array_equal((await engine.infer({"x": rows(COUNT, seed)}))["y"], affine(rows(COUNT, seed)))


async def capture(engine: trtx.Engine, places: int) -> None:
    await engine._front.capture_for_batches(KEY, within=None, places=places)


def slots_of(engine: trtx.Engine) -> int:
    """How many of the shape's slots can be had at once."""
    buckets = engine._front.borrow(KEY)
    held: list[Place] = []
    try:
        while (place := buckets[0].acquire()) is not None:
            held.append(place)
        return len(held)
    finally:
        for place in held:
            place.release()
        for bucket in buckets:
            return_bucket(bucket)


@pytest.mark.parametrize("places", [7, 16])
async def test_slots_are_added_while_others_are_in_use(mock_backend: MockBackend, places: int) -> None:
    """To enqueue the context once more would change what its graphs compute."""
    async with serving(mock_backend, large_plan()) as engine:
        await capture(engine, 0)
        had = slots_of(engine)
        before = mock_backend.calls
        async with anyio.create_task_group() as group:
            group.start_soon(capture, engine, places)
            while slots_of(engine) < places:
                await infer(engine, 3)
        used = mock_backend.calls - before
        assert 1 < had < places
        assert used["execute_async_v3"] == places - had  # each of them captured
        assert mock_backend.damage() == []


async def test_slots_that_could_not_be_added_are_nobodys(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, large_plan()) as engine:
        await capture(engine, 0)
        had = slots_of(engine)
        mock_backend.inject(fail("cuGraphInstantiate", nth=2))
        with pytest.raises(trtx.CudaError, match="cuGraphInstantiate"):
            await capture(engine, 9)
        assert slots_of(engine) == had + 1
        await capture(engine, 9)
        assert slots_of(engine) == 9
        await infer(engine, 3)


async def test_slots_within_larger_ones_are_not_added_while_these_are_in_use(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share their memory, which recording writes into; and there are no more of them than of the larger ones."""
    monkeypatch.setattr("trtx_py._graphs._SLOTS_S", 0.0)
    small = ShapeKey((("x", (4, 4)),))
    async with serving(mock_backend, large_plan()) as engine:
        front = engine._front
        await capture(engine, 5)
        await front.capture_for_batches(small, within=KEY, places=5)
        await capture(engine, 8)
        large, little = *front.borrow(KEY), *front.borrow(small)
        held = [place for place in (large.acquire() for _ in range(8)) if place is not None]
        for place in held:
            place.inputs[0][...] = 7
        with pytest.raises(trtx.BorrowedError, match="slots"):
            await front.capture_for_batches(small, within=KEY, places=8)
        assert len(held) == 8
        assert all((place.inputs[0] == 7).all() for place in held)
        for place in held:
            place.release()
        await front.capture_for_batches(small, within=KEY, places=8)
        await front.capture_for_batches(small, within=None, places=12)
        assert large.places == little.places == 8
        return_bucket(large)
        return_bucket(little)
