"""Captured shapes and event loops: many callers, loops that end, threads, forks, and closing under load."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, fail, slow
from tests.unit.serving import PATIENCE_S, GateClock, affine, affine_plan, rows, serving, serving_sync

X3 = {"x": (3, 4)}
MODES = ["latency", "balanced", "efficient"]
ROOT = Path(__file__).resolve().parents[2]
BACKENDS = [
    pytest.param("asyncio", {}, id="asyncio"),
    pytest.param("asyncio", {"use_uvloop": True}, id="uvloop"),
    pytest.param("trio", {}, id="trio"),
]


def run(body: Callable[[], Awaitable[Any]], backend: str, options: dict[str, Any]) -> None:
    pytest.importorskip("uvloop" if options else backend)
    anyio.run(body, backend=backend, backend_options=options)


async def until(condition: Callable[[], object]) -> None:
    """What happens beside the requests has no event to wait for."""
    with anyio.fail_after(PATIENCE_S):
        while not condition():
            await anyio.lowlevel.checkpoint()


async def capture(engine: trtx.Engine, *counts: int) -> None:
    for count in counts:
        async with engine.alloc_inputs({"x": (count, 4)}):
            pass


def capture_sync(engine: trtx.Engine, *counts: int) -> None:
    for count in counts:
        with engine.alloc_inputs({"x": (count, 4)}):
            pass


async def infer(engine: trtx.Engine, count: int = 3, seed: int = 0) -> None:
    x = rows(count, seed)
    assert np.array_equal((await engine.infer({"x": x}))["y"], affine(x))


def infer_sync(engine: trtx.Engine, count: int = 3, seed: int = 0) -> None:
    x = rows(count, seed)
    assert np.array_equal(engine.infer_sync({"x": x}, timeout_s=PATIENCE_S)["y"], affine(x))


async def use_slot(engine: trtx.Engine, count: int = 3, seed: int = 0) -> None:
    async with engine.alloc_inputs({"x": (count, 4)}) as slot:
        slot["x"][...] = rows(count, seed)
        assert np.array_equal((await slot.infer())["y"], affine(rows(count, seed)))


def assert_clean(backend: MockBackend) -> None:
    gc.collect()
    assert trtx.live_objects() == []
    backend.assert_clean()


@pytest.mark.parametrize(("kind", "options"), BACKENDS)
@pytest.mark.parametrize("lanes", [1, 4])
def test_a_thousand_callers(mock_backend: MockBackend, lanes: int, kind: str, options: dict[str, Any]) -> None:
    async def body() -> None:
        async with serving(mock_backend, lanes=lanes) as engine:
            await capture(engine, 3, 5)
            async with anyio.create_task_group() as group:
                for seed in range(1000):
                    group.start_soon(infer, engine, 3 + 2 * (seed % 2), seed)
            counts = engine.statistics()
            assert (counts.completed, counts.failed, counts.cancelled) == (1000, 0, 0)
            assert (counts.waiting, counts.running) == (0, 0)
            assert counts.graphs.hits == 1000

    run(body, kind, options)


@pytest.mark.parametrize(("kind", "options"), BACKENDS)
@pytest.mark.parametrize("completion", MODES)
def test_everything_on_every_kind_of_loop(
    mock_backend: MockBackend, completion: str, kind: str, options: dict[str, Any]
) -> None:
    async def body() -> None:
        async with serving(mock_backend, completion=completion, slots=2, lanes=2) as engine:
            await engine.warmup(1)
            async with anyio.create_task_group() as group:
                for seed in range(50):
                    group.start_soon(infer, engine, 2, seed)
                    group.start_soon(use_slot, engine, 3, seed)
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    for seed in range(50):
                        group.start_soon(infer, engine, 2, seed)
                    await anyio.lowlevel.checkpoint()
                    scope.cancel()
            await infer(engine)
            await use_slot(engine)
            await until(lambda: not engine.statistics().running)
            assert (engine.statistics().waiting, engine.statistics().failed) == (0, 0)

    run(body, kind, options)


@pytest.mark.parametrize(("kind", "options"), BACKENDS)
@pytest.mark.parametrize("completion", MODES)
def test_close_under_load(mock_backend: MockBackend, completion: str, kind: str, options: dict[str, Any]) -> None:
    """Each call gives the right answer or ClosedError, and each ends."""

    async def body() -> None:
        runtime = trtx.Runtime(None, mock_backend)
        engine = await runtime.deserialize(affine_plan(), completion=completion, lanes=2, slots=2)
        await capture(engine, 3)
        answers, refused = 0, 0

        async def caller(number: int) -> None:
            nonlocal answers, refused
            while True:
                try:
                    await (use_slot if number % 5 == 0 else infer)(engine, 3, number)
                except trtx.ClosedError:
                    refused += 1
                    return
                answers += 1

        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as group:
                for number in range(50):
                    group.start_soon(caller, number)
                await until(lambda: answers > 200)
                await engine.aclose()
        assert refused == 50
        assert engine.closed
        counts = engine.statistics()
        assert (counts.waiting, counts.running, counts.failed) == (0, 0, 0)
        await runtime.aclose()

    run(body, kind, options)
    assert_clean(mock_backend)


@pytest.mark.parametrize("completion", MODES)
def test_a_loop_that_ends_with_requests_in_flight_and_queued(completion: str) -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    with serving_sync(backend, slots=1, completion=completion) as engine:
        capture_sync(engine, 3)
        backend.inject(slow(seconds=1, count=1))
        tasks: list[asyncio.Task[Any]] = []

        async def leave() -> None:
            tasks.extend(asyncio.create_task(engine.infer({"x": rows(3, seed)})) for seed in range(5))
            await clock.wait_reached()
            assert (engine.statistics().running, engine.statistics().waiting) == (1, 4)

        asyncio.run(leave())
        assert all(task.cancelled() for task in tasks)
        clock.open()

        async def another() -> None:
            await asyncio.gather(*(infer(engine, 3, seed) for seed in range(10)))
            await use_slot(engine)

        asyncio.run(another())
        infer_sync(engine)
        assert (engine.statistics().waiting, engine.statistics().running) == (0, 0)
    assert_clean(backend)


@pytest.mark.parametrize("completion", MODES)
@pytest.mark.parametrize("collected", [False, True])
def test_a_loop_closed_without_a_word(completion: str, collected: bool) -> None:
    """No cancellation, no asyncio.run: the loop is simply closed while its coroutines wait."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    with serving_sync(backend, slots=1, completion=completion) as engine:
        capture_sync(engine, 3)
        backend.inject(slow(seconds=1, count=1))
        loop = asyncio.new_event_loop()
        coroutines = [engine.infer({"x": rows(3, seed)}) for seed in range(3)]

        async def start() -> None:
            for coroutine in coroutines:
                future = coroutine.send(None)
                if future is not None:
                    future._asyncio_future_blocking = False
            await clock.wait_reached()

        loop.run_until_complete(start())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        if collected:
            while coroutines:
                coroutines.pop().close()
            del loop
            gc.collect()
        clock.open()

        async def another() -> None:
            await asyncio.gather(*(infer(engine, 3, seed) for seed in range(5)))

        while coroutines:
            coroutines.pop().close()
        asyncio.run(another())
        infer_sync(engine)
        assert engine.statistics().failed == 0
    assert_clean(backend)


@pytest.mark.parametrize("completion", MODES)
@pytest.mark.parametrize("lanes", [1, 2])
def test_two_loops_and_threads_at_once(mock_backend: MockBackend, completion: str, lanes: int) -> None:
    start = threading.Barrier(5)

    def in_loop(engine: trtx.Engine, first: int) -> None:
        async def body() -> None:
            calls = [infer(engine, 3 + 2 * (seed % 2), seed) for seed in range(first, first + 100)]
            await asyncio.wait_for(asyncio.gather(*calls), PATIENCE_S)

        start.wait(PATIENCE_S)
        asyncio.run(body())

    def in_thread(engine: trtx.Engine, first: int) -> None:
        start.wait(PATIENCE_S)
        for seed in range(first, first + 100):
            infer_sync(engine, 3 + 2 * (seed % 2), seed)

    with (
        serving_sync(mock_backend, lanes=lanes, slots=2, completion=completion) as engine,
        ThreadPoolExecutor(5) as pool,
    ):
        capture_sync(engine, 3, 5)
        bodies = (in_loop, in_loop, in_thread, in_thread, in_thread)
        for future in [pool.submit(body, engine, 1000 * number) for number, body in enumerate(bodies)]:
            future.result(2 * PATIENCE_S)
        counts = engine.statistics()
        assert (counts.completed, counts.failed, counts.cancelled) == (500, 0, 0)
        assert (counts.waiting, counts.running) == (0, 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("completion", MODES)
async def test_counts_add_up(mock_backend: MockBackend, completion: str, seed: int) -> None:
    """Cancelled, failed and completed together are what was asked for."""
    random = np.random.default_rng(seed)
    async with serving(mock_backend, lanes=2, slots=2, completion=completion) as engine:
        await capture(engine)
        before = engine.statistics().completed
        for nth in random.choice(range(1, 100), 5, replace=False).tolist():
            mock_backend.inject(fail("cuGraphLaunch", nth))
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(infer(engine, 3, number)) for number in range(200)]
        doomed = random.choice(200, 60, replace=False).tolist()
        for number in doomed:
            await asyncio.sleep(0)
            tasks[number].cancel()
        await asyncio.wait(tasks)
        mock_backend.clear_faults()
        for number, task in enumerate(tasks):
            if task.cancelled():
                assert number in doomed
            else:
                assert task.exception() is None or isinstance(task.exception(), trtx.CudaError)
        begun = 200 - sum(task.cancelled() for task in tasks)
        await until(lambda: not engine.statistics().running)
        counts = engine.statistics()
        # One that ended just as it was cancelled counts as what it was; a task cancelled before it began as nothing.
        ended = counts.completed - before + counts.failed
        assert begun <= ended <= ended + counts.cancelled <= 200
        assert counts.waiting == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("completion", MODES)
def test_fork_after_use(completion: str) -> None:
    script = f"""
        import asyncio, os, warnings
        import trtx_py as trtx
        from mock_backend import MockBackend
        from tests.unit.serving import affine, affine_plan, rows
        warnings.simplefilter("ignore", DeprecationWarning)
        backend = MockBackend()

        async def refused(call):
            try:
                await call()
            except trtx.ClosedError as error:
                assert "forked" in str(error), error
            else:
                raise AssertionError("the child used its parent's engine")

        async def child(engine, slot):
            await refused(lambda: engine.infer({{"x": rows(3)}}))
            await refused(lambda: engine.alloc_inputs({{"x": (3, 4)}}).__aenter__())
            await refused(slot.infer)

        async def parent(engine, slot):
            for seed in range(3):
                slot["x"][...] = rows(3, seed)
                assert ((await slot.infer())["y"] == affine(rows(3, seed))).all()
                assert ((await engine.infer({{"x": rows(3, seed)}}))["y"] == affine(rows(3, seed))).all()

        with trtx.Runtime(None, backend) as runtime:
            with runtime.deserialize_sync(affine_plan(), completion={completion!r}) as engine:
                with engine.alloc_inputs({{"x": (3, 4)}}) as slot:
                    asyncio.run(parent(engine, slot))
                    pid = os.fork()
                    if pid == 0:
                        try:
                            asyncio.run(child(engine, slot))
                        except BaseException:
                            import traceback
                            traceback.print_exc()
                            os._exit(1)
                        os._exit(0)
                    asyncio.run(parent(engine, slot))
                    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
                    asyncio.run(parent(engine, slot))
        backend.assert_clean()
        print("end")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
