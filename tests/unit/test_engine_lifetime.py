"""Engines: closing with work in flight, idle lanes, and what an engine holds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.ownership import SAMPLE, WEIGHTS, shared_plan, until


class Kernel:
    """Stops every ``execute_async_v3`` on its lane's thread until opened; counts those that came."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from mock_backend._context import MockContext

        self.entered, self.go_on = threading.Semaphore(0), threading.Event()
        real = MockContext.execute_async_v3
        kernel = self

        def held(context: Any, stream: int) -> None:
            kernel.entered.release()
            assert kernel.go_on.wait(30)
            real(context, stream)

        monkeypatch.setattr(MockContext, "execute_async_v3", held)

    async def until_running(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=30)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    made = Kernel(monkeypatch)
    yield made
    made.go_on.set()


@pytest.fixture
def runtime(mock_backend: MockBackend) -> Iterator[trtx.Runtime]:
    with trtx.Runtime(None, mock_backend) as made:
        yield made


async def test_idle_lanes_do_not_block_close(runtime: trtx.Runtime, mock_backend: MockBackend) -> None:
    engine = await runtime.deserialize(shared_plan(), lanes=3)
    await asyncio.gather(*[engine.infer({"x": SAMPLE}) for _ in range(20)])
    lanes = [item for item in trtx.live_objects() if item.kind == "Lane"]
    assert 1 <= len(lanes) <= 3
    assert all(item.internal and item.device_bytes > 0 and item.host_bytes > 0 for item in lanes)
    assert all(item.owner is not None and item.owner.startswith("Engine#") for item in lanes)
    assert engine.statistics().lanes == len(lanes)
    threads = [t for t in threading.enumerate() if t.name.startswith("trtx_py-Lane")]
    assert len(threads) == len(lanes)
    engine.close()
    assert not any(thread.is_alive() for thread in threads)
    assert runtime.device.memory_statistics().current_bytes == 0
    assert runtime.device.pinned_statistics().live == 0


async def test_close_with_work_in_flight_is_refused(runtime: trtx.Runtime, kernel: Kernel) -> None:
    engine = await runtime.deserialize(shared_plan())
    tasks = [asyncio.create_task(engine.infer({"x": SAMPLE})) for _ in range(3)]
    await kernel.until_running()
    with pytest.raises(trtx.BorrowedError, match="1 requests running, 2 waiting"):
        engine.close()
    with pytest.raises(trtx.BorrowedError):
        runtime.close()
    assert not engine.closed
    kernel.go_on.set()
    for outputs in await asyncio.gather(*tasks):
        np.testing.assert_allclose(outputs["y"], SAMPLE @ WEIGHTS, rtol=1e-5)
    await engine.aclose()


async def test_aclose_delivers_what_was_accepted(runtime: trtx.Runtime, kernel: Kernel) -> None:
    engine = await runtime.deserialize(shared_plan())
    tasks = [asyncio.create_task(engine.infer({"x": SAMPLE})) for _ in range(5)]
    await kernel.until_running()
    closing = asyncio.create_task(runtime.aclose())
    await until(lambda: engine.closed)
    with pytest.raises(trtx.ClosedError):
        await engine.infer({"x": SAMPLE})
    kernel.go_on.set()
    await closing
    assert all(task.done() for task in tasks) or await asyncio.gather(*tasks)
    for task in tasks:
        np.testing.assert_allclose((await task)["y"], SAMPLE @ WEIGHTS, rtol=1e-5)
    assert trtx.live_objects() == []
    assert engine.statistics().completed == 5


async def test_results_outlive_their_engine(runtime: trtx.Runtime) -> None:
    async with await runtime.deserialize(shared_plan()) as engine:
        first = await engine.infer({"x": SAMPLE})
        await engine.infer({"x": SAMPLE * 2})  # the lane reuses its buffers
    np.testing.assert_allclose(first["y"], SAMPLE @ WEIGHTS, rtol=1e-5)
    assert first["y"].flags.owndata or first["y"].base is not None
    first["y"][:] = 0


async def test_cancelled_callers_do_not_block_close(runtime: trtx.Runtime, kernel: Kernel) -> None:
    engine = await runtime.deserialize(shared_plan())
    tasks = [asyncio.create_task(engine.infer({"x": SAMPLE})) for _ in range(3)]
    await kernel.until_running()
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} == {asyncio.CancelledError}
    kernel.go_on.set()
    await engine.aclose()
    counts = engine.statistics()
    assert (counts.completed, counts.cancelled, counts.waiting, counts.running) == (0, 3, 0, 0)


def test_a_lane_that_cannot_start_leaves_no_request_behind(
    runtime: trtx.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = runtime.deserialize_sync(shared_plan())
    start = threading.Thread.start

    def no_more(thread: threading.Thread) -> None:
        if thread.name.startswith("trtx_py-Lane"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", no_more)
    with pytest.raises((RuntimeError, trtx.TrtxError)):
        engine.infer_sync({"x": SAMPLE})
    monkeypatch.undo()
    assert engine.statistics().waiting == 0
    engine.infer_sync({"x": SAMPLE})
    engine.close()


async def test_open_engine_closes_all_it_made(mock_backend: MockBackend) -> None:
    async with trtx.open_engine(shared_plan(), mock_backend) as engine:
        await engine.warmup(2)
        runtime = engine.runtime
    assert engine.closed
    assert runtime.closed
    assert trtx.live_objects() == []
    error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError) as caught:  # noqa: PT012 - the block is the point
        async with trtx.open_engine(shared_plan(), mock_backend) as engine:
            context = engine.create_execution_context()
            raise error
    assert caught.value is error
    assert context.closed
    assert engine.closed


async def test_open_engine_leaves_the_callers_logger_open(mock_backend: MockBackend) -> None:
    with trtx.Logger() as logger:
        async with trtx.open_engine(shared_plan(), mock_backend, logger=logger):
            with pytest.raises(trtx.BorrowedError, match="Runtime"):
                logger.close()
        assert [item.kind for item in trtx.live_objects()] == ["Logger"]


def test_queries(runtime: trtx.Runtime) -> None:
    with runtime.deserialize_sync(shared_plan()) as engine:
        assert engine.name == "matmul"
        assert repr(engine).endswith("'matmul' open>")
        assert engine.num_optimization_profiles == 1
        assert engine.num_layers == 1
        assert engine.device_memory_bytes(0) == engine.device_memory_bytes()
        assert engine.plan_header == shared_plan().header
        assert {t.name: t.shape for t in engine.io_tensors} == {"x": (-1, 4), "y": (-1, 3)}
        for profile in (-1, 1, 1.5, "0"):
            with pytest.raises(trtx.InvalidArgumentError):
                engine.device_memory_bytes(profile)  # type: ignore[arg-type]
