"""One engine, any number of event loops and threads; loops that end in the middle; trio and uvloop."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, slow
from tests.unit.serving import (
    N4,
    PATIENCE_S,
    GateClock,
    affine,
    affine_model,
    affine_plan,
    rows,
    serving,
    serving_sync,
)

BACKENDS = [
    pytest.param("asyncio", {}, id="asyncio"),
    pytest.param("asyncio", {"use_uvloop": True}, id="uvloop"),
    pytest.param("trio", {}, id="trio"),
]


def run(body: Callable[[], Awaitable[Any]], backend: str, options: dict[str, Any]) -> None:
    pytest.importorskip("uvloop" if options else backend)
    anyio.run(body, backend=backend, backend_options=options)


def gated(count: int | None = 1) -> tuple[GateClock, MockBackend]:
    clock = GateClock()
    return clock, MockBackend(clock=clock, faults=[slow("execute", 1, count=count)])


def assert_serves(engine: trtx.Engine, seed: int = 5) -> None:
    x = rows(3, seed)
    assert np.array_equal(engine.infer_sync({"x": x}, timeout_s=PATIENCE_S)["y"], affine(x))


@pytest.mark.parametrize(("kind", "options"), BACKENDS)
def test_everything_on_every_kind_of_loop(mock_backend: MockBackend, kind: str, options: dict[str, Any]) -> None:
    async def body() -> None:
        async with trtx.open_engine(affine_model(), mock_backend, profiles=[N4], lanes=2) as engine:
            found: dict[int, Any] = {}

            async def call(seed: int) -> None:
                found[seed] = await engine.infer({"x": rows(1 + seed % 8, seed)})

            async with anyio.create_task_group() as group:
                for seed in range(100):
                    group.start_soon(call, seed)
            for seed, outputs in found.items():
                assert np.array_equal(outputs["y"], affine(rows(1 + seed % 8, seed)))
            assert len(found) == 100
            async with engine.create_execution_context() as context:
                assert np.array_equal((await context.execute({"x": rows(2)}))["y"], affine(rows(2)))
            with pytest.raises(trtx.ShapeError):
                await engine.infer({"x": rows(9)})
            await engine.warmup(1)
            assert (await engine.infer_timed({"x": rows(2)})).latency_ms > 0

    run(body, kind, options)


@pytest.mark.parametrize(("kind", "options"), BACKENDS)
@pytest.mark.parametrize("phase", ["waiting", "running"])
def test_cancel_scopes_on_every_kind_of_loop(kind: str, options: dict[str, Any], phase: str) -> None:
    clock, backend = gated()

    async def body() -> None:
        async with serving(backend) as engine:
            async with anyio.create_task_group() as group:
                with anyio.CancelScope() as outer:
                    async with anyio.create_task_group() as inner:
                        inner.start_soon(engine.infer, {"x": rows(2)})
                        await anyio.to_thread.run_sync(clock.wait_reached_sync)
                        if phase == "waiting":
                            inner.start_soon(engine.infer, {"x": rows(3)})
                            while not engine.statistics().waiting:
                                await anyio.lowlevel.checkpoint()
                        outer.cancel()
                assert outer.cancelled_caught or outer.cancel_called
                assert engine.statistics().waiting == 0
                group.start_soon(engine.infer, {"x": rows(4)})
                clock.open()
            counts = engine.statistics()
            assert (counts.completed, counts.cancelled) == (1, 2 if phase == "waiting" else 1)

    run(body, kind, options)
    backend.assert_clean()


@pytest.mark.parametrize(("kind", "options"), BACKENDS)
def test_cancelled_while_opening_on_every_kind_of_loop(kind: str, options: dict[str, Any]) -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock, faults=[slow("deserialize", 1, count=1)])

    async def body() -> None:
        async with anyio.create_task_group() as group:

            async def opening() -> None:
                async with trtx.open_engine(affine_plan(), backend):
                    raise AssertionError("it was cancelled before")

            group.start_soon(opening)
            await anyio.to_thread.run_sync(clock.wait_reached_sync)
            group.cancel_scope.cancel()
            clock.open()

    run(body, kind, options)
    gc.collect()
    assert trtx.live_objects() == []
    backend.assert_clean()


def test_a_loop_that_ends_while_a_request_runs() -> None:
    clock, backend = gated()
    with serving_sync(backend) as engine:

        async def leave() -> None:
            tasks.append(asyncio.create_task(engine.infer({"x": rows(2)})))
            tasks.append(asyncio.create_task(engine.infer({"x": rows(3)})))
            await clock.wait_reached()

        tasks: list[asyncio.Task[Any]] = []
        asyncio.run(leave())
        assert all(task.cancelled() for task in tasks)
        clock.open()

        async def another() -> None:
            assert np.array_equal((await engine.infer({"x": rows(4)}))["y"], affine(rows(4)))

        asyncio.run(another())
        assert_serves(engine)
        counts = engine.statistics()
        assert (counts.completed, counts.cancelled, counts.failed) == (2, 2, 0)
    backend.assert_clean()


def test_a_loop_closed_without_a_word() -> None:
    """No cancellation, no asyncio.run: the loop is simply closed, and its coroutine collected."""
    clock, backend = gated()
    with serving_sync(backend) as engine:
        loop = asyncio.new_event_loop()
        coroutine = engine.infer({"x": rows(2)})

        async def start() -> None:
            future = coroutine.send(None)
            future._asyncio_future_blocking = False
            await clock.wait_reached()

        loop.run_until_complete(start())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        clock.open()
        assert_serves(engine)  # the lane has found the loop closed by now
        coroutine.close()
        assert_serves(engine)
        assert engine.statistics().failed == 0
    backend.assert_clean()


def test_a_coroutine_that_is_dropped_cancels_its_request() -> None:
    clock, backend = gated()
    with serving_sync(backend) as engine:

        async def drop() -> None:
            first = asyncio.create_task(engine.infer({"x": rows(2)}))
            await clock.wait_reached()
            coroutine = engine.infer({"x": rows(3)})
            coroutine.send(None)
            assert engine.statistics().waiting == 1
            coroutine.close()
            assert engine.statistics().waiting == 0
            clock.open()
            await first

        asyncio.run(drop())
        assert_serves(engine)
        assert backend.calls["execute"] == 2
    backend.assert_clean()


@pytest.mark.parametrize("lanes", [1, 3])
def test_loops_and_threads_at_once(mock_backend: MockBackend, lanes: int) -> None:
    start = threading.Barrier(5)

    def in_loop(engine: trtx.Engine, first: int) -> None:
        async def body() -> None:
            calls = [engine.infer({"x": rows(1 + seed % 8, seed)}) for seed in range(first, first + 100)]
            for seed, result in enumerate(await asyncio.gather(*calls), start=first):
                assert np.array_equal(result["y"], affine(rows(1 + seed % 8, seed)))

        start.wait(PATIENCE_S)
        asyncio.run(body())

    def in_thread(engine: trtx.Engine, first: int) -> None:
        start.wait(PATIENCE_S)
        for seed in range(first, first + 100):
            x = rows(1 + seed % 8, seed)
            assert np.array_equal(engine.infer_sync({"x": x}, timeout_s=PATIENCE_S)["y"], affine(x))

    with serving_sync(mock_backend, lanes=lanes) as engine, ThreadPoolExecutor(5) as pool:
        bodies = (in_loop, in_loop, in_thread, in_thread, in_thread)
        for future in [pool.submit(body, engine, 1000 * number) for number, body in enumerate(bodies)]:
            future.result()
        counts = engine.statistics()
        assert (counts.completed, counts.failed, counts.cancelled) == (500, 0, 0)


@pytest.mark.parametrize("timeout_s", [0, 0.001])
def test_infer_sync_gives_up_after_its_timeout(timeout_s: float) -> None:
    clock, backend = gated()
    with serving_sync(backend) as engine, ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.infer_sync, {"x": rows(2)})
        clock.wait_reached_sync()
        with pytest.raises(TimeoutError, match=f"within {float(timeout_s)} s; the request was cancelled"):
            engine.infer_sync({"x": rows(3)}, timeout_s=timeout_s)
        assert engine.statistics().waiting == 0
        clock.open()
        assert np.array_equal(running.result()["y"], affine(rows(2)))
        assert_serves(engine)
        assert backend.calls["execute"] == 2
        assert engine.statistics().cancelled == 1
    backend.assert_clean()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="sends a signal to this thread")
def test_keyboard_interrupt_in_infer_sync() -> None:
    clock, backend = gated()
    main = threading.get_ident()

    def interrupt() -> None:
        clock.wait_reached_sync()
        time.sleep(0.2)  # a signal just before CPython begins to sleep is seen only when that ends: let it sleep
        signal.pthread_kill(main, signal.SIGINT)

    with serving_sync(backend) as engine:
        thread = threading.Thread(target=interrupt)
        # Of a job that a shell put into the background the interpreter inherits that SIGINT is ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                engine.infer_sync({"x": rows(2)}, timeout_s=PATIENCE_S)
            thread.join()
        finally:
            signal.signal(signal.SIGINT, before)
        assert engine.statistics().running == 1
        clock.open()
        assert_serves(engine)
        assert (engine.statistics().cancelled, engine.statistics().completed) == (1, 1)
    backend.assert_clean()


def test_an_error_reaches_the_loop_and_the_thread_it_belongs_to(mock_backend: MockBackend) -> None:
    from mock_backend import fail

    with serving_sync(mock_backend) as engine:
        mock_backend.inject(fail("execute_async_v3", 1))
        with pytest.raises(trtx.ExecutionError):
            engine.infer_sync({"x": rows(2)})
        mock_backend.inject(fail("execute_async_v3", 1))

        async def body() -> None:
            with pytest.raises(trtx.ExecutionError):
                await engine.infer({"x": rows(2)})

        asyncio.run(body())
        assert_serves(engine)
