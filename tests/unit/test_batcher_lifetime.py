"""Closing, draining, forgetting: nothing that was accepted is lost, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, slow
from tests.unit.batching import (
    ALONE,
    NEVER_S,
    ask,
    ask_filled,
    ask_many,
    assert_settled,
    batching,
    held,
    length_plan,
    start,
    turns,
    until,
)
from tests.unit.serving import PATIENCE_S, GateClock, affine, affine_plan, rows, serving
from tests.unit.test_batcher_rows import ask_length

ROOT = Path(__file__).resolve().parents[2]


def calls(batcher: trtx.DynamicBatcher) -> list[Any]:
    """Some of each kind, more than fit into one batch."""
    return [call(batcher, 1 + n % 3, n) for n in range(10) for call in (ask, ask_many, ask_filled)]


@pytest.mark.parametrize("graphs", [True, False])
async def test_draining_loses_nothing(graphs: bool) -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, engine={"cuda_graphs": graphs}, policy=ALONE, max_queue=20) as batcher:
        async with held(backend, clock, batcher) as holder:
            tasks = [start(call) for call in calls(batcher)]
            await turns()
            closing = start(batcher.aclose())
            await turns()
            for refused in (ask(batcher), ask_many(batcher, 3), ask_filled(batcher)):
                with pytest.raises(trtx.ClosedError):
                    await refused
            assert not closing.done()
            clock.open()
            await asyncio.gather(holder, *tasks)
            await closing
        assert batcher.closed
        s = batcher.statistics()
        assert s.dropped == 0
        assert s.completed == s.accepted
        await batcher.aclose()
        batcher.close()
    backend.assert_clean()


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("lanes", [1, 2])
async def test_closing_the_engine_loses_nothing(graphs: bool, lanes: int) -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    engine = {"cuda_graphs": graphs, "lanes": lanes}
    async with batching(backend, engine=engine, policy=ALONE, max_queue=20) as batcher:
        async with held(backend, clock, batcher) as holder:
            tasks = [start(call) for call in calls(batcher)]
            await turns()
            closing = start(batcher.engine.aclose())
            await turns()
            clock.open()
            with anyio.fail_after(PATIENCE_S):
                await asyncio.gather(holder, *tasks)
                await closing
        assert batcher.closed
        assert batcher.statistics().completed == batcher.statistics().accepted
    backend.assert_clean()


async def test_closing_without_draining() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE, max_queue=20) as batcher:
        async with held(backend, clock, batcher) as holder:
            tasks = [start(call) for call in calls(batcher)]
            await turns()
            closing = start(batcher.aclose(drain=False))
            await turns()
            clock.open()
            await holder  # what was launched is finished
            with anyio.fail_after(PATIENCE_S):
                found = await asyncio.gather(*tasks, return_exceptions=True)
                await closing
            assert all(isinstance(one, trtx.ClosedError) for one in found), found
        s = batcher.statistics()
        assert s.dropped == len(tasks)
        assert s.accepted == s.completed + s.dropped
    backend.assert_clean()


async def test_closing_with_a_timeout() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE) as batcher:
        async with held(backend, clock, batcher) as holder:
            tasks = [start(call) for call in calls(batcher)]
            await turns()
            closing = start(batcher.aclose(timeout_s=0.01))
            found = await asyncio.gather(*tasks, return_exceptions=True)  # nothing else ends them
            assert all(isinstance(one, trtx.ClosedError) for one in found), found
            clock.open()
            await holder
            await closing
        assert batcher.statistics().dropped == len(tasks)
        assert batcher.statistics().waiting_rows == 0
    backend.assert_clean()


@pytest.mark.parametrize("timeout", [-1, "1", float("nan")])
async def test_a_bad_timeout(mock_backend: MockBackend, timeout: Any) -> None:
    async with batching(mock_backend) as batcher:
        with pytest.raises(trtx.InvalidArgumentError):
            await batcher.aclose(timeout_s=timeout)
        await ask(batcher)


async def test_a_cancelled_aclose_closes_all_the_same() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE) as batcher, held(backend, clock, batcher) as holder:
        tasks = [start(ask(batcher, 1, n)) for n in range(10)]
        await turns()
        closing = start(batcher.aclose())
        await turns()
        closing.cancel()
        await turns()
        clock.open()
        await asyncio.gather(closing, return_exceptions=True)
        assert closing.cancelled()
        assert batcher.closed
        assert not any(item.kind == "DynamicBatcher" for item in trtx.live_objects())
        found = await asyncio.gather(holder, *tasks, return_exceptions=True)
        assert all(one is None or isinstance(one, trtx.ClosedError) for one in found)
    backend.assert_clean()


async def test_two_who_close() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE) as batcher, held(backend, clock, batcher):
        tasks = [start(ask(batcher, 1, n)) for n in range(10)]
        await turns()
        closing = [start(batcher.aclose()), start(batcher.aclose()), start(batcher.engine.aclose())]
        await turns()
        clock.open()
        await asyncio.gather(*tasks, *closing)
    backend.assert_clean()


async def test_close_refuses_while_something_is_under_way() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE) as batcher:
        with pytest.raises(trtx.BorrowedError, match="DynamicBatcher"):
            batcher.engine.close()
        async with held(backend, clock, batcher) as holder:
            tasks = [start(ask(batcher, 1, n)) for n in range(4)]
            await turns()
            for close in (batcher.close, batcher.engine.close):
                with pytest.raises(trtx.BorrowedError):
                    close()
            assert not batcher.closed
            clock.open()
            await asyncio.gather(holder, *tasks)
        await assert_settled(batcher)
        await ask(batcher)
        await assert_settled(batcher)
        batcher.close()
        batcher.engine.close()
    backend.assert_clean()


async def test_the_context_manager_drains(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine:
        async with trtx.DynamicBatcher(engine) as batcher:
            tasks = [start(ask(batcher, 1, n)) for n in range(30)]
            await turns(3)
        await asyncio.gather(*tasks)
        assert batcher.statistics().completed == 30
        assert (await engine.infer({"x": rows(2)}))["y"].shape == (2, 4)  # the graphs are the engine's again


# ---- while something is captured ----


@pytest.mark.parametrize("steps", [0, 1, 3, 10, 40, 200])
@pytest.mark.parametrize("of", ["batcher", "engine"])
async def test_closing_while_the_first_request_prepares(mock_backend: MockBackend, of: str, steps: int) -> None:
    async with batching(mock_backend) as batcher:
        tasks = [start(ask(batcher, 1, n)) for n in range(5)]
        await turns(steps)
        with anyio.fail_after(PATIENCE_S):
            await (batcher if of == "batcher" else batcher.engine).aclose()
            found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(one is None or isinstance(one, trtx.ClosedError) for one in found), found
        s = batcher.statistics()
        assert s.accepted == s.completed + s.failed + s.cancelled + s.dropped
        if of == "batcher":  # nothing of it is borrowed any more
            await batcher.engine.infer({"x": rows(2)})
            await until(lambda: not batcher.engine.statistics().running)
            batcher.engine.close()


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 20, 100])
@pytest.mark.parametrize("of", ["batcher", "engine"])
async def test_closing_while_graphs_are_captured_in_the_background(
    mock_backend: MockBackend, of: str, steps: int
) -> None:
    async with batching(mock_backend, length_plan()) as batcher:
        await batcher.warmup()
        for _ in range(9):  # after so many batches it recurs
            await asyncio.gather(*(ask_length(batcher, 1, 5, n) for n in range(3)))
        await turns(steps)
        with anyio.fail_after(PATIENCE_S):
            await (batcher if of == "batcher" else batcher.engine).aclose()
        if of == "batcher":
            await turns(100)
            await batcher.engine.infer({"x": rows(2)})
            with anyio.fail_after(PATIENCE_S):
                while not batcher.engine.closed:  # what was being captured lets go of it by itself
                    with contextlib.suppress(trtx.BorrowedError):
                        batcher.engine.close()
                    await turns(1)


# ---- forgotten ----


async def test_a_forgotten_batcher_warns_and_is_released(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine:
        batcher = trtx.DynamicBatcher(engine)
        await asyncio.gather(*(ask(batcher, 1, n) for n in range(20)))
        await assert_settled(batcher)
        await turns()
        gone = weakref.ref(batcher)
        with pytest.warns(ResourceWarning, match="unclosed DynamicBatcher"):  # noqa: PT031
            del batcher
            gc.collect()
        assert gone() is None
        assert not any(item.kind == "DynamicBatcher" for item in trtx.live_objects())
        await engine.infer({"x": rows(2)})


async def test_a_forgotten_tree(mock_backend: MockBackend) -> None:
    runtime = trtx.Runtime(None, mock_backend)
    engine = await runtime.deserialize(affine_plan())
    batcher = trtx.DynamicBatcher(engine)
    await asyncio.gather(*(ask(batcher, 1, n) for n in range(20)))
    await assert_settled(batcher)
    await turns()
    with pytest.warns(ResourceWarning):  # noqa: PT031
        del runtime, engine, batcher
        gc.collect()
    assert trtx.live_objects() == []


async def test_memory_comes_back(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, lanes=2) as engine:
        levels = []
        for _ in range(4):
            async with trtx.DynamicBatcher(engine) as batcher:
                await asyncio.gather(*calls(batcher))
                await assert_settled(batcher)
            s = engine.statistics()
            levels.append((s.device_memory.live, s.pinned_memory.live, s.pinned_memory.current_bytes))
        assert levels[1:] == levels[:1] * 3
    assert trtx.live_objects() == []


async def test_no_thread_is_left(mock_backend: MockBackend) -> None:
    before = set(threading.enumerate())
    async with batching(mock_backend) as batcher:
        await asyncio.gather(*calls(batcher))
    left = [thread for thread in set(threading.enumerate()) - before if "rows" in thread.name]
    assert not left


# ---- loops and threads ----


def test_another_loop_is_refused(mock_backend: MockBackend) -> None:
    async def body() -> None:
        async with batching(mock_backend) as batcher:
            await ask(batcher)

            async def elsewhere() -> None:
                for call in (ask(batcher), ask_many(batcher, 3), ask_filled(batcher), batcher.warmup()):
                    with pytest.raises(trtx.InvalidArgumentError, match="another event loop"):
                        await call

            await asyncio.to_thread(asyncio.run, elsewhere())
            await asyncio.to_thread(lambda: anyio.run(elsewhere, backend="trio"))
            await ask(batcher)
            await assert_settled(batcher)

    asyncio.run(body())


@pytest.mark.parametrize("kind", ["asyncio", "trio"])
@pytest.mark.parametrize("graphs", [True, False])
def test_a_loop_that_ends_in_the_middle(mock_backend: MockBackend, kind: str, graphs: bool) -> None:
    """Its callers are gone; the engine is as good as before, and closes."""
    made: list[Any] = []

    class EnoughError(Exception):
        pass

    async def body() -> None:
        runtime = trtx.Runtime(None, mock_backend)
        engine = await runtime.deserialize(affine_plan(), cuda_graphs=graphs, lanes=2)
        batcher = trtx.DynamicBatcher(engine)
        made.extend((runtime, engine, batcher))
        await batcher.warmup()
        mock_backend.inject(slow(seconds=0.02, count=3))
        async with anyio.create_task_group() as group:
            for n in range(30):
                group.start_soon(ask, batcher, 1, n)
            await turns(5)
            raise EnoughError

    with pytest.raises(BaseException) as caught:
        anyio.run(body, backend=kind)
    assert "Enough" in repr(caught.value) or "Enough" in repr(getattr(caught.value, "exceptions", ()))

    async def after() -> None:
        runtime, engine, _ = made
        assert np.array_equal((await engine.infer({"x": rows(2)}))["y"], affine(rows(2)))
        with anyio.fail_after(PATIENCE_S):
            await engine.aclose()
        await runtime.aclose()

    asyncio.run(after())
    made.clear()


def test_held_rows_outlive_the_engine_safely() -> None:
    """Memory that a caller fills is never taken away under their hands: no crash, and a typed error."""
    script = textwrap.dedent(
        """
        import asyncio, faulthandler
        faulthandler.dump_traceback_later(60, exit=True)
        import numpy as np
        import trtx_py as trtx
        from mock_backend import MockBackend
        from tests.unit.serving import affine_plan

        async def main():
            backend = MockBackend()
            runtime = trtx.Runtime(None, backend)
            engine = await runtime.deserialize(affine_plan())
            batcher = trtx.DynamicBatcher(engine, max_delay_s=0.0)
            await batcher.warmup()
            async with batcher.alloc_rows(8) as own:
                view = own["x"]
                await engine.aclose()
                await runtime.aclose()
                try:
                    view[...] = 1
                except (trtx.TrtxError, ValueError):
                    pass
                try:
                    await own.infer()
                except trtx.TrtxError as error:
                    print("typed", type(error).__name__)
            print("alive", trtx.live_objects())
        asyncio.run(main())
        """
    )
    found = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore", "-c", script], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "typed ClosedError" in found.stdout
    assert "alive []" in found.stdout


# ---- numbers ----


@pytest.mark.parametrize("what", ["left", "detached", "many cancelled", "outside cancelled", "late outside", "dropped"])
async def test_the_numbers_add_up(what: str) -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    delay = 0.0 if what == "detached" else NEVER_S
    async with batching(backend, policy=ALONE, max_queue=8, max_delay_s=delay) as batcher:
        async with held(backend, clock, batcher):
            filling = start(ask(batcher, 4))
            await turns()
            if what == "left":
                async with batcher.alloc_rows(2):
                    pass
            elif what == "detached":
                async with batcher.alloc_rows(2) as own:
                    own["x"][...] = 1
                    clock.open()
                    await filling
                    await own.infer()
            elif what == "dropped":
                others = [start(ask(batcher, 2)), start(ask_many(batcher, 30))]
                await turns()
                closing = start(batcher.aclose(drain=False))
                await turns()
                clock.open()
                await asyncio.gather(*others, filling, closing, return_exceptions=True)
            else:
                deadline = 0.01 if what == "late outside" else None
                others = [start(ask(batcher, 8, deadline_s=deadline)), start(ask_many(batcher, 40))]
                await turns()
                if what == "late outside":
                    with pytest.raises(trtx.DeadlineExceededError):
                        await others[0]
                for task in others:
                    task.cancel()
                await asyncio.gather(*others, return_exceptions=True)
            clock.open()
        await assert_settled(batcher)
    backend.assert_clean()
