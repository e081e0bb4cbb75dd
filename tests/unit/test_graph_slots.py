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
