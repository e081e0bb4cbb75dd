"""Graphs of fewer rows over the memory of a larger shape's slots."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.serving import affine, rows, serving
from trtx_py import _native
from trtx_py._capture import NotCapturableError, ShapeKey
from trtx_py._loops import current_hub, finish


def key(count: int) -> ShapeKey:
    return ShapeKey((("x", (count, 4)),))


async def family(engine: trtx.Engine, *sizes: int) -> list[tuple[_native.Bucket, ...]]:
    """Graphs for so many rows on every lane, in the memory of the first; borrowed."""
    for size in sizes:
        await engine._front.capture_for_batches(key(size), within=None if size == sizes[0] else key(sizes[0]), places=3)
    # lane by lane: each has its graphs in the order in which its thread was done with them
    return [tuple(sorted(engine._front.borrow(key(size)), key=lambda bucket: id(bucket.lane))) for size in sizes]


def give_back(found: list[tuple[_native.Bucket, ...]]) -> None:
    for buckets in found:
        for bucket in buckets:
            _native.return_bucket(bucket)


async def test_slots_share_their_memory(mock_backend: MockBackend) -> None:
    """Slot by slot a smaller shape is the beginning of the larger one, and each graph computes its rows."""
    async with serving(mock_backend, lanes=2) as engine:
        found = await family(engine, 8, 4, 1)
        for host, *members in zip(*found, strict=True):
            places = {slot: addresses for slot, _, *addresses in _native.bucket_table(host)[1]}
            assert len(places) >= 3
            for member in members:
                assert {slot: addresses for slot, _, *addresses in _native.bucket_table(member)[1]} == places
            place = host.acquire()
            assert place is not None
            x = rows(8)
            place.inputs[0][...] = x
            for bucket, count in zip((host, *members), (8, 4, 1), strict=True):
                place.outputs[0][...] = 0
                result: Any = await finish(place.submit(current_hub(), False, bucket))
                assert result["y"].shape == (count, 4)
                assert np.array_equal(place.outputs[0][:count], affine(x[:count]))
                assert not place.outputs[0][count:].any()
            place.release()
        give_back(found)


@pytest.mark.parametrize("size", [5, 8])
async def test_only_the_beginning_of_a_larger_one(mock_backend: MockBackend, size: int) -> None:
    async with serving(mock_backend) as engine:
        await engine._front.capture_for_batches(key(4), within=None, places=2)
        with pytest.raises(NotCapturableError, match="not the beginning"):
            await engine._front.capture_for_batches(key(size), within=key(4), places=2)
        assert engine._front.borrow(key(size)) == ()
        assert np.array_equal((await engine.infer({"x": rows(4)}))["y"], affine(rows(4)))


async def test_the_larger_one_stays_while_others_are_within(mock_backend: MockBackend) -> None:
    """Its memory is theirs: however many other shapes come, it is not given up before them."""
    async with serving(mock_backend, max_graphs=3) as engine:
        await family(engine, 8, 4)
        found = engine._front.borrow(key(4))
        for count in (1, 2, 3, 5, 6, 7):
            await engine.infer({"x": rows(count)})
        assert engine._front.borrow(key(8)) != ()
        place = found[0].acquire()
        assert place is not None
        place.inputs[0][...] = rows(4)
        await finish(place.submit(current_hub(), False))
        assert np.array_equal(place.outputs[0], affine(rows(4)))
        place.release()
