"""CUDA graphs of recurring shapes: captured in the background, proven, bounded, counted, and given up when need be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import anyio
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, fail, out_of_memory
from tests.unit.serving import (
    NONZERO,
    PATIENCE_S,
    RESHAPE,
    affine,
    affine_plan,
    build,
    nonzero_model,
    reshape_model,
    rows,
    serving,
    split_plan,
)
from trtx_py._capture import ShapeKey
from trtx_py._graphs import GraphCounts
from trtx_py._native import return_bucket


async def until(condition: Callable[[], object]) -> None:
    """What happens beside the requests has no event to wait for."""
    with anyio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - see above
            await anyio.sleep(0.001)


async def captured(engine: trtx.Engine, count: int) -> None:
    await until(lambda: engine.statistics().graphs.captured >= count)


async def infer(engine: trtx.Engine, count: int, seed: int = 0) -> None:
    assert np.array_equal((await engine.infer({"x": rows(count, seed)}))["y"], affine(rows(count, seed)))


async def test_a_shape_that_recurs_is_captured_and_replayed(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine:
        await infer(engine, 3)
        assert engine.statistics().graphs.captured == 0
        await infer(engine, 3, 1)
        await captured(engine, 1)
        before = mock_backend.calls
        for seed in range(5):
            await infer(engine, 3, seed)
        used = mock_backend.calls - before
        graphs = engine.statistics().graphs
    assert used["cuGraphLaunch"] == 5
    assert used["execute_async_v3"] == used["cuMemAlloc"] == used["cuMemHostAlloc"] == 0
    assert (graphs.hits, graphs.misses, graphs.captures, graphs.failures) == (5, 2, 1, 0)
    assert graphs.capture_ms > 0


async def test_a_shape_counts_as_captured_when_requests_find_it(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a moment before: whoever waits for the count may rely on the graph."""
    found: list[int] = []
    add = GraphCounts.add

    def looked(counts: GraphCounts, **more: int) -> None:
        add(counts, **more)
        if more.get("captured", 0) > 0:
            buckets = engine._front.borrow(ShapeKey((("x", (3, 4)),)))
            found.append(len(buckets))
            for bucket in buckets:
                return_bucket(bucket)

    monkeypatch.setattr(GraphCounts, "add", looked)
    async with serving(mock_backend) as engine:
        async with engine.alloc_inputs({"x": (3, 4)}):
            pass
        assert found == [1]


async def test_warmup_captures_so_that_the_first_request_hits(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, lanes=2) as engine:
        await engine.warmup(1)
        assert engine.statistics().graphs.captured == 2  # on each lane
        await infer(engine, 2)  # the optimal shape
        assert engine.statistics().graphs.hits == 1


async def test_the_cache_is_bounded_and_the_least_used_goes(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, max_graphs=2) as engine:
        for count in (1, 2, 3):
            async with engine.alloc_inputs({"x": (count, 4)}):
                pass
            await infer(engine, 1)
        graphs = engine.statistics().graphs
        assert (graphs.captured, graphs.captures, graphs.evictions) == (2, 3, 1)
        hits = graphs.hits
        await infer(engine, 1)  # still captured: it was used most since the last one came
        assert engine.statistics().graphs.hits == hits + 1
        async with engine.alloc_inputs({"x": (2, 4)}):
            pass
        assert engine.statistics().graphs.recaptures == 1


async def test_other_profiles_and_shapes_do_not_disturb_a_graph(mock_backend: MockBackend) -> None:
    """One context for each captured shape: the mock notices a graph whose context was used for anything else."""
    async with serving(mock_backend, split_plan()) as engine:
        for count in (2, 6):
            async with engine.alloc_inputs({"x": (count, 4)}):
                pass
        for seed in range(3):
            for count in (2, 6, 7, 1):
                await infer(engine, count, seed)


async def test_a_plan_without_shared_profiles_gives_up_its_graph_for_another_shape(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, affine_plan(sharing=False)) as engine:
        async with engine.alloc_inputs({"x": (3, 4)}) as slot:
            slot["x"][...] = rows(3)
            assert np.array_equal((await slot.infer())["y"], affine(rows(3)))
        for seed in range(4):
            await infer(engine, 5, seed)
            await infer(engine, 3, seed)
        async with engine.alloc_inputs({"x": (3, 4)}):
            pass
        graphs = engine.statistics().graphs
        assert graphs.recaptures >= 1
        assert engine.statistics().contexts == 1


async def test_without_shared_profiles_a_held_slot_is_named(mock_backend: MockBackend, monkeypatch: Any) -> None:
    monkeypatch.setattr("trtx_py._graphs._GIVE_UP_S", 0.05)
    async with serving(mock_backend, affine_plan(sharing=False)) as engine:
        async with engine.alloc_inputs({"x": (3, 4)}):
            with pytest.raises(trtx.BorrowedError, match="alloc_inputs"):
                await engine.infer({"x": rows(5)})
        await infer(engine, 5)


@pytest.mark.parametrize("call", ["cuGraphInstantiate", "cuStreamBeginCapture", "cuStreamEndCapture", "cuMemHostAlloc"])
async def test_a_capture_that_fails_leaves_the_engine_serving(call: str, caplog: pytest.LogCaptureFixture) -> None:
    backend = MockBackend()
    async with serving(backend) as engine:
        await infer(engine, 3)
        backend.inject(out_of_memory(call) if call == "cuMemHostAlloc" else fail(call))
        with caplog.at_level(logging.WARNING, "trtx_py"):
            for seed in range(3):
                await infer(engine, 3, seed)
            await until(lambda: "is not captured" in caplog.text)
        assert call in caplog.text
        for seed in range(4):  # it recurs: the next attempt succeeds
            await infer(engine, 3, seed)
        await captured(engine, 1)
        await infer(engine, 3)
    backend.assert_clean()
    backend.close()


async def test_an_empty_graph_is_found_out(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a context without a profile does on a GPU: it enqueues nothing, and the replay is stale and very fast."""
    from mock_backend._context import MockContext

    real = MockContext.execute_async_v3

    def execute(self: MockContext, stream: int) -> None:
        if mock_backend.driver.cuStreamIsCapturing(stream) == 0:
            real(self, stream)

    monkeypatch.setattr(MockContext, "execute_async_v3", execute)
    async with serving(mock_backend) as engine:
        with pytest.raises(trtx.ExecutionError, match="TensorRT enqueued nothing"):
            await engine.alloc_inputs({"x": (3, 4)}).__aenter__()
        for seed in range(4):
            await infer(engine, 3, seed)
        graphs = engine.statistics().graphs
        assert (graphs.captured, graphs.hits, graphs.failures) == (0, 0, 1)


async def test_a_graph_with_other_outputs_is_found_out(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mock_backend._context import MockContext

    real = MockContext.execute_async_v3

    def execute(self: MockContext, stream: int) -> None:
        real(self, stream)
        if mock_backend.driver.cuStreamIsCapturing(stream):
            mock_backend.driver.cuMemsetD8Async(self._addresses["y"], 0x3F, 4, stream)

    monkeypatch.setattr(MockContext, "execute_async_v3", execute)
    async with serving(mock_backend) as engine:
        with pytest.raises(trtx.ExecutionError, match="another 'y'"):
            await engine.alloc_inputs({"x": (3, 4)}).__aenter__()
        await infer(engine, 3)


async def test_outputs_of_unknown_size_are_never_captured(mock_backend: MockBackend) -> None:
    x = np.array([0, 1, 0, 2], np.float32)
    async with serving(mock_backend, build(nonzero_model(), [NONZERO])) as engine:
        for _ in range(4):
            assert (await engine.infer({"x": x}))["where"].tolist() == [[1, 3]]
        await until(lambda: engine.statistics().graphs.failures)
        with pytest.raises(trtx.ExecutionError, match="depends on data"):
            await engine.alloc_inputs({"x": (4,)}).__aenter__()
        assert engine.statistics().graphs.captured == 0


async def test_values_of_shape_tensors_belong_to_the_graph(mock_backend: MockBackend) -> None:
    """A graph has them baked in: other values of the same shape must not be served by it."""
    x = np.arange(6, dtype=np.float32)
    async with serving(mock_backend, build(reshape_model(), [RESHAPE])) as engine:
        for _ in range(3):
            for shape in ((2, 3), (3, 2), (1, 6)):
                found = (await engine.infer({"x": x, "shape": np.array(shape)}))["y"]
                assert np.array_equal(found, x.reshape(shape))
        await captured(engine, 3)
        hits = engine.statistics().graphs.hits
        for shape in ((2, 3), (3, 2), (1, 6)):
            assert np.array_equal((await engine.infer({"x": x, "shape": np.array(shape)}))["y"], x.reshape(shape))
        assert engine.statistics().graphs.hits == hits + 3


async def test_cuda_graphs_can_be_switched_off(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, cuda_graphs=False) as engine:
        for seed in range(4):
            await infer(engine, 3, seed)
        with pytest.raises(trtx.ExecutionError, match="cuda_graphs is off"):
            await engine.alloc_inputs({"x": (3, 4)}).__aenter__()
        assert mock_backend.calls["cuGraphLaunch"] == 0


async def test_a_large_request_is_split_along_a_declared_batch_axis(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtx_py._capture._SPLIT_BYTES", 1)
    monkeypatch.setattr("trtx_py._capture.CapturedShape.measure_s", lambda self: 1.0 / self.parts)
    async with serving(mock_backend, batch_axis=0) as engine, engine.alloc_inputs({"x": (8, 4)}) as slot:
        assert engine.statistics().contexts == 4
        for seed in range(3):
            slot["x"][...] = rows(8, seed)
            assert np.array_equal((await slot.infer())["y"], affine(rows(8, seed)))
    async with serving(mock_backend) as engine, engine.alloc_inputs({"x": (8, 4)}):
        assert engine.statistics().contexts == 1  # never guessed


async def test_large_arrays_go_through_the_graph_off_the_loop(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtx_py._capture.ON_LOOP_BYTES", 16)
    async with serving(mock_backend) as engine:
        await infer(engine, 3)
        await infer(engine, 3)
        await captured(engine, 1)
        before = mock_backend.calls["cuGraphLaunch"]
        await infer(engine, 3, 5)
        assert mock_backend.calls["cuGraphLaunch"] == before + 1
        assert engine.statistics().graphs.hits == 1
