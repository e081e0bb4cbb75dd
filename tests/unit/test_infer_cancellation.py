"""Cancellation at every await point: what was accepted is dropped, nothing is lost, nothing is leaked."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, slow
from tests.unit.serving import (
    N4,
    NONZERO,
    PATIENCE_S,
    GateClock,
    affine,
    affine_model,
    affine_plan,
    build,
    cancel_at,
    nonzero_model,
    rows,
    serving,
)

Ready = Callable[[], Awaitable[None]]
Way = Callable[[Awaitable[Any], Ready], Awaitable[None]]


def gated(call: str = "execute", *, count: int | None = 1, nth: int = 1) -> tuple[GateClock, MockBackend]:
    clock = GateClock()
    return clock, MockBackend(clock=clock, faults=[slow(call, 1, nth=nth, count=count)])


def assert_clean(backend: MockBackend) -> None:
    gc.collect()
    assert trtx.live_objects() == []
    assert backend.leaks() == []
    backend.assert_clean()


async def assert_serves(engine: trtx.Engine, seed: int = 99) -> None:
    assert np.array_equal((await engine.infer({"x": rows(3, seed)}))["y"], affine(rows(3, seed)))


async def _every_suspension(make: Callable[[], Awaitable[Any]], after: Callable[[], Awaitable[None]]) -> int:
    """Cancel ``make()`` at its first, second, ... suspension until there is none left; how many there were."""
    for suspension in range(1, 200):
        outcome, _value, _count = await cancel_at(make, suspension)
        await after()
        if outcome == "finished":
            return suspension - 1
    raise AssertionError("it never ends")


@pytest.mark.parametrize("what", ["infer", "infer_timed", "execute", "warmup"])
async def test_at_every_suspension_of_an_inference(mock_backend: MockBackend, what: str) -> None:
    async with serving(mock_backend) as engine:
        context = engine.create_execution_context()
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "infer": lambda: engine.infer({"x": rows(2)}),
            "infer_timed": lambda: engine.infer_timed({"x": rows(2)}),
            "execute": lambda: context.execute({"x": rows(2)}),
            "warmup": lambda: engine.warmup(3),
        }
        points = await _every_suspension(calls[what], lambda: assert_serves(engine))
        assert points >= (3 if what == "warmup" else 1)
        counts = engine.statistics()
        assert (counts.waiting, counts.running, counts.failed) == (0, 0, 0)
    assert_clean(mock_backend)


async def _open_and_use(source: Any, backend: MockBackend, **options: Any) -> None:
    async with trtx.open_engine(source, backend, **options) as engine:
        await engine.infer({"x": rows(2)})


@pytest.mark.parametrize("source", ["model", "plan", "path of a model", "path of a plan"])
async def test_at_every_suspension_of_open_engine(mock_backend: MockBackend, tmp_path: Path, source: str) -> None:
    (tmp_path / "model.onnx").write_bytes(affine_model())
    affine_plan().save(tmp_path / "model.plan")
    given: dict[str, Any] = {
        "model": affine_model(), "plan": affine_plan(),
        "path of a model": tmp_path / "model.onnx", "path of a plan": str(tmp_path / "model.plan"),
    }  # fmt: skip
    options = {"profiles": [N4]} if source.endswith("model") else {}

    async def after() -> None:
        assert_clean(mock_backend)

    points = await _every_suspension(lambda: _open_and_use(given[source], mock_backend, **options), after)
    assert points >= (8 if options else 5)  # read, (builder, parse, build, close,) runtime, engine, infer, close, close


async def test_at_every_suspension_of_the_long_way(mock_backend: MockBackend) -> None:
    """Every await of the object model, one after another."""

    async def long_way() -> None:
        async with trtx.Builder(None, mock_backend) as builder:
            network = builder.create_network()
            await network.parse_onnx_async(affine_model())
            config = builder.create_config()
            profile = builder.create_optimization_profile()
            profile.set_shape("x", *N4["x"])
            config.add_optimization_profile(profile)
            plan = await builder.build_serialized_network(network, config)
        async with trtx.Runtime(None, mock_backend) as runtime, await runtime.deserialize(plan) as engine:
            async with engine.create_execution_context() as context:
                await context.execute({"x": rows(2)})
            stream = runtime.device.create_stream()
            await stream.wait_idle()
            await engine.infer({"x": rows(2)})

    async def after() -> None:
        assert_clean(mock_backend)

    assert await _every_suspension(long_way, after) >= 9


# Ways to give up a call. Each starts it, awaits ``ready()``, and then cancels it.


async def _task_cancel(call: Awaitable[Any], ready: Ready) -> None:
    task = asyncio.ensure_future(call)
    await ready()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _task_cancel_twice(call: Awaitable[Any], ready: Ready) -> None:
    task = asyncio.ensure_future(call)
    await ready()
    task.cancel()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def _wait_for(call: Awaitable[Any], ready: Ready) -> None:
    task = asyncio.ensure_future(call)
    await ready()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(task, 0.001)
    assert task.cancelled()


async def _timeout(call: Awaitable[Any], ready: Ready) -> None:
    timeout: Any = vars(asyncio)["timeout"]  # since CPython 3.11
    task = asyncio.ensure_future(call)
    await ready()
    with pytest.raises(TimeoutError):
        async with timeout(0.001):
            await task
    assert task.cancelled()


async def _move_on_after(call: Awaitable[Any], ready: Ready) -> None:
    async def cancel() -> None:
        await ready()
        scope.deadline = anyio.current_time()

    with anyio.move_on_after(PATIENCE_S) as scope:
        canceller = asyncio.create_task(cancel())
        await call
    assert scope.cancelled_caught
    await canceller


async def _task_group(call: Awaitable[Any], ready: Ready) -> None:
    ended = []

    async def child() -> None:
        try:
            await call
        finally:
            ended.append(True)

    async with anyio.create_task_group() as group:
        group.start_soon(child)
        await ready()
        group.cancel_scope.cancel()
    assert ended == [True]


WAYS = [_task_cancel, _task_cancel_twice, _wait_for, _move_on_after, _task_group]
if sys.version_info >= (3, 11):
    WAYS.append(_timeout)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.strip("_"))
async def test_while_waiting_nothing_runs(way: Way) -> None:
    clock, backend = gated()
    async with serving(backend) as engine:
        running = asyncio.create_task(engine.infer({"x": rows(2)}))
        await clock.wait_reached()

        async def queued() -> None:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert engine.statistics().waiting == 1

        try:
            await way(engine.infer({"x": rows(5)}), queued)
            assert engine.statistics().waiting == 0
        finally:
            clock.open()
        assert np.array_equal((await running)["y"], affine(rows(2)))
        await assert_serves(engine)
        counts = engine.statistics()
        assert (counts.completed, counts.cancelled, counts.failed) == (2, 1, 0)
        assert backend.calls["execute"] == 2
    assert_clean(backend)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.strip("_"))
async def test_while_running_the_result_is_dropped(way: Way) -> None:
    clock, backend = gated()
    async with serving(backend) as engine:
        try:
            await way(engine.infer({"x": rows(5)}), clock.wait_reached)
            assert engine.statistics().running == 1  # the caller has gone, the kernel has not
        finally:
            clock.open()
        await assert_serves(engine)
        counts = engine.statistics()
        assert (counts.completed, counts.cancelled, counts.failed) == (1, 1, 0)
        assert backend.calls["execute"] == 2  # the dropped one ran to its end
    assert_clean(backend)


async def test_cancelled_while_the_kernel_holds_its_buffers() -> None:
    """The lane keeps the buffers until the device is done: the next caller's data never meet the old kernel."""
    clock, backend = gated()
    async with serving(backend) as engine:
        task = asyncio.create_task(engine.infer({"x": rows(8, 1)}))
        await clock.wait_reached()
        task.cancel()
        await asyncio.wait([task])
        following = [asyncio.create_task(engine.infer({"x": rows(8, seed)})) for seed in range(2, 6)]
        await asyncio.sleep(0)
        clock.open()
        for seed, result in enumerate(await asyncio.gather(*following), start=2):
            assert np.array_equal(result["y"], affine(rows(8, seed)))
    assert_clean(backend)


@pytest.mark.parametrize("seed", range(5))
async def test_some_of_many(mock_backend: MockBackend, seed: int) -> None:
    """Cancel at random moments; everyone else gets the right answer."""
    random = np.random.default_rng(seed)
    async with serving(mock_backend, lanes=2) as engine:
        tasks = [asyncio.create_task(engine.infer({"x": rows(1 + i % 8, i)})) for i in range(300)]
        doomed = set(random.choice(300, 100, replace=False).tolist())
        for number in doomed:
            await asyncio.sleep(0)
            tasks[number].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for number, result in enumerate(results):
            if isinstance(result, dict):
                assert np.array_equal(result["y"], affine(rows(1 + number % 8, number)))
            else:
                assert number in doomed
                assert isinstance(result, asyncio.CancelledError)
    counts = engine.statistics()
    assert counts.completed + counts.cancelled == 300
    assert counts.failed == 0
    assert_clean(mock_backend)


async def test_data_dependent_output_cancelled_in_the_middle() -> None:
    clock, backend = gated()
    async with serving(backend, build(nonzero_model(), [NONZERO])) as engine:
        task = asyncio.create_task(engine.infer({"x": np.ones(64, np.float32)}))
        await clock.wait_reached()
        task.cancel()
        await asyncio.wait([task])
        clock.open()
        assert (await engine.infer({"x": np.array([0, 1], np.float32)}))["where"].tolist() == [[1]]
    assert_clean(backend)


async def _cancel_held(clock: GateClock, task: asyncio.Task[Any], times: int = 1) -> None:
    """Cancel while a native call is held: the task must not end before that call has."""
    await clock.wait_reached()
    for _ in range(times):
        task.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done()
    clock.open()
    await asyncio.wait([task])
    assert task.cancelled()


@pytest.mark.parametrize("times", [1, 3])
async def test_deserialize(times: int) -> None:
    clock, backend = gated("deserialize")
    async with trtx.Runtime(None, backend) as runtime:
        await _cancel_held(clock, asyncio.create_task(runtime.deserialize(affine_plan())), times)
        assert [item.kind for item in trtx.live_objects()] == ["Runtime", "Device"]
        async with await runtime.deserialize(affine_plan()) as engine:
            await assert_serves(engine)
    assert_clean(backend)


@pytest.mark.parametrize("times", [1, 3])
async def test_parse_onnx_async(times: int) -> None:
    clock, backend = gated("parse_onnx")
    async with trtx.Builder(None, backend) as builder:
        network = builder.create_network()
        await _cancel_held(clock, asyncio.create_task(network.parse_onnx_async(affine_model())), times)
        with builder.create_network() as another:
            await another.parse_onnx_async(affine_model())
    assert_clean(backend)


@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancelled_build_stops_at_its_next_step(mock_backend: MockBackend, times: int) -> None:
    reached, gate = threading.Event(), threading.Event()
    steps: list[str] = []

    def on_progress(phase: str, step: int, total: int) -> None:
        steps.append(phase)
        reached.set()
        assert gate.wait(PATIENCE_S)

    async with trtx.Builder(None, mock_backend) as builder:
        network, config = builder.create_network(), builder.create_config()
        network.parse_onnx(affine_model())
        with builder.create_optimization_profile() as profile:
            profile.set_shape("x", *N4["x"])
            config.add_optimization_profile(profile)
        task = asyncio.create_task(builder.build_serialized_network(network, config, on_progress=on_progress))
        assert await asyncio.to_thread(reached.wait, PATIENCE_S)
        for _ in range(times):
            task.cancel()
            for _ in range(10):
                await asyncio.sleep(0)
            assert not task.done()
        gate.set()
        await asyncio.wait([task])
        assert task.cancelled()
        stopped_after = len(steps)
        steps.clear()
        plan = await builder.build_serialized_network(network, config, on_progress=on_progress)
        assert len(steps) > stopped_after
        assert plan.header.io_tensors
    assert_clean(mock_backend)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("owner", ["engine", "runtime", "context"])
async def test_aclose_completes_then_the_cancellation_is_delivered(owner: str, times: int) -> None:
    clock, backend = gated()
    runtime = trtx.Runtime(None, backend)
    engine = await runtime.deserialize(affine_plan())
    context = engine.create_execution_context()
    target: Any = {"engine": engine, "runtime": runtime, "context": context}[owner]
    call = context.execute if owner == "context" else engine.infer
    running = asyncio.create_task(call({"x": rows(2)}))
    await asyncio.sleep(0)  # it must have been accepted before the closing begins
    await _cancel_held(clock, asyncio.create_task(target.aclose()), times)
    assert target.closed
    assert np.array_equal((await running)["y"], affine(rows(2)))
    await runtime.aclose()
    assert_clean(backend)


async def test_cancelled_aclose_in_a_cancel_scope() -> None:
    clock, backend = gated()
    runtime = trtx.Runtime(None, backend)
    engine = await runtime.deserialize(affine_plan())
    running = asyncio.create_task(engine.infer({"x": rows(2)}))
    await clock.wait_reached()
    with anyio.CancelScope() as scope:
        scope.cancel()
        asyncio.get_running_loop().call_later(0, clock.open)
        await runtime.aclose()
    assert scope.cancelled_caught
    assert runtime.closed
    assert (await running)["y"].shape == (2, 4)
    assert_clean(backend)


async def test_a_failing_sibling_cancels_the_group(mock_backend: MockBackend) -> None:
    """One caller's error cancels the rest of an anyio task group, and the engine goes on."""
    failures: list[BaseException] = []
    async with serving(mock_backend) as engine:

        async def good() -> None:
            while True:
                await engine.infer({"x": rows(2)})

        try:
            async with anyio.create_task_group() as group:
                for _ in range(5):
                    group.start_soon(good)
                await engine.infer({"x": rows(9)})
        except BaseException as error:  # an ExceptionGroup, which CPython 3.10 has not as a builtin
            failures.append(error)
        inner = getattr(failures[0], "exceptions", ())
        assert [type(error) for error in inner] == [trtx.ShapeError]
        await assert_serves(engine)
    assert_clean(mock_backend)
