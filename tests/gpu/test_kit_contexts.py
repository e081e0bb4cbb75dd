"""Several contexts at once, plans that allow only one, memory, concurrency and cancellation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np
import pytest

import trtx_py as trtx
from tests.gpu.kit import NON_SHARING, SHARING, STATIC, Side, run


async def running(engine: trtx.Engine) -> None:
    """Until a lane has taken a request."""
    while engine.statistics().running == 0:  # noqa: ASYNC110 - the engine has no event for this, and needs none
        await asyncio.sleep(0)


@pytest.mark.parametrize("name", [*SHARING, *STATIC])
def test_contexts_and_lanes_at_once(side: Side, name: str, record: Callable[..., None]) -> None:
    case = side.kit.case(name)
    inputs = side.kit.inputs(case)
    plan = side.plan(name)

    async def body() -> None:
        async with side.runtime() as runtime, await runtime.deserialize(plan, lanes=2) as engine:
            contexts = [engine.create_execution_context() for _ in range(3)]
            everyone = [engine.infer(inputs) for _ in range(6)]
            everyone += [context.execute(inputs) for context in contexts for _ in range(3)]
            results = await asyncio.gather(*everyone)
            error = max(side.kit.check(case, outputs) for outputs in results)
            statistics = engine.statistics()
            assert statistics.completed == 6
            for context in contexts:
                await context.aclose()
        record(f"{name}: 3 contexts, 2 lanes", error=error, lanes=statistics.lanes, result="pass")

    run(body())


@pytest.mark.parametrize("name", NON_SHARING)
def test_plan_for_one_context_at_a_time(side: Side, name: str) -> None:
    case = side.kit.case(name)
    inputs = side.kit.inputs(case)

    async def body() -> None:
        async with side.runtime() as runtime, await runtime.deserialize(side.plan(name), lanes=4) as engine:
            side.kit.check(case, await engine.infer(inputs))
            async with engine.create_execution_context() as context:  # the idle lane steps back for it
                side.kit.check(case, await context.execute(inputs))
                with pytest.raises(trtx.BorrowedError, match="Context") as busy:
                    await engine.infer(inputs)
                assert any("ExecutionContext" in holder for holder in busy.value.borrowers), busy.value.borrowers
                with pytest.raises(trtx.BorrowedError, match="profile"):
                    engine.create_execution_context()
                side.kit.check(case, await context.execute(inputs))
            results = await asyncio.gather(*[engine.infer(inputs) for _ in range(8)])
            for outputs in results:
                side.kit.check(case, outputs)
            async with engine.create_execution_context() as again:
                side.kit.check(case, await again.execute(inputs))

    run(body())


def test_shapes_outside_the_profile_are_refused_before_the_launch(side: Side) -> None:
    async def body() -> None:
        async with side.runtime() as runtime, await runtime.deserialize(side.plan("mlp.fp32.vcx")) as engine:
            for shape in ((257, 64), (0, 64), (1, 63), (64,)):
                with pytest.raises(trtx.ShapeError, match="'x'"):
                    await engine.infer({"x": np.zeros(shape, np.float32)})
            assert engine.statistics().contexts == 0
            with engine.create_execution_context() as context:
                with pytest.raises(trtx.ShapeError, match="257"):
                    context.set_input_shape("x", (257, 64))
                context.set_input_shape("x", (256, 64))
                assert context.get_tensor_shape("y") == (256, 10)

    run(body())


def test_bare_level(side: Side, record: Callable[..., None]) -> None:
    """Shapes, addresses and streams by hand, owned and checked."""
    case = side.kit.case("mlp.fp32.vcx", 1)
    x = side.kit.inputs(case)["x"]
    with side.runtime() as runtime, runtime.deserialize_sync(side.plan("mlp.fp32.vcx")) as engine:
        device = runtime.device
        with (
            device.create_stream() as stream,
            device.create_event() as start,
            device.create_event() as end,
            device.allocate(x.nbytes) as source,
            device.allocate(len(x) * 10 * 4) as target,
            engine.create_execution_context() as context,
        ):
            with pytest.raises(trtx.ExecutionError, match="x"):
                context.enqueue_v3(stream)
            context.set_input_shape("x", x.shape)
            context.set_tensor_address("x", source)
            context.set_tensor_address("y", target)
            with pytest.raises(trtx.BorrowedError):
                source.close()
            source.copy_from_host(x, stream)
            start.record(stream)
            context.enqueue_v3(stream)
            end.record(stream)
            y = target.copy_to_host((len(x), 10), np.float32, stream)
            error = side.kit.check(case, {"y": y})
            end.synchronize()
            assert start.elapsed_ms(end) > 0
            small = device.allocate(64)
            context.set_tensor_address("y", small)
            with pytest.raises(trtx.ExecutionError, match="'y'"):
                context.enqueue_v3(stream)
            context.set_tensor_address("y", target)
            small.close()
            context.close()
        record("bare level: mlp", error=error, result="pass")


def test_device_memory_comes_back(side: Side, record: Callable[..., None]) -> None:
    """TensorRT and the driver keep pools of their own once they have been used: the second round must cost nothing."""
    case = side.kit.case("resnet50.fp16.vcx", 1)
    inputs = side.kit.inputs(case)

    async def round_trip(runtime: trtx.Runtime) -> int:
        async with await runtime.deserialize(side.plan(case["engine"]), lanes=2) as engine:
            results = await asyncio.gather(*[engine.infer(inputs) for _ in range(4)])
            for outputs in results:
                side.kit.check(case, outputs)
            return runtime.device.free_bytes()

    async def body() -> None:
        async with side.runtime() as runtime:
            fresh = runtime.device.free_bytes()
            await round_trip(runtime)
            before = runtime.device.free_bytes()
            during = [await round_trip(runtime) for _ in range(3)]
            after = runtime.device.free_bytes()
            assert max(during) < before
            if side.name == "mock":
                assert fresh == before == after
            else:
                assert abs(before - after) <= 4 << 20
            assert runtime.device.memory_statistics().current_bytes == 0
            assert runtime.device.pinned_statistics().current_bytes == 0
        record("device memory: resnet50", taken_mib=(before - min(during)) / 2**20, kept_mib=(before - after) / 2**20)

    run(body())


def test_two_hundred_callers(side: Side, record: Callable[..., None]) -> None:
    """Everyone gets the answer to their own question."""
    rng = np.random.default_rng(3)
    questions = [rng.standard_normal((1 + n % 8, 64)).astype(np.float32) for n in range(200)]

    async def body() -> None:
        async with side.runtime() as runtime, await runtime.deserialize(side.plan("mlp.fp32.vcx"), lanes=4) as engine:
            together = (await engine.infer({"x": np.concatenate(questions)[:256]}))["y"]
            started = time.perf_counter()
            answers = await asyncio.gather(*[engine.infer({"x": x}) for x in questions])
            seconds = time.perf_counter() - started
            position = 0
            for x, answer in zip(questions, answers, strict=True):
                assert answer["y"].shape == (len(x), 10)
                if position + len(x) <= 256:
                    want = together[position : position + len(x)]
                    assert side.kit.error(answer, {"y": want}) < 5e-3
                position += len(x)
            again = await engine.infer({"x": questions[-1]})
            assert side.kit.error(answers[-1], again) < 5e-3
            assert engine.statistics().completed == 202
        record("200 callers: mlp", requests_per_second=200 / seconds, result="pass")

    run(body())


def test_cancelled_while_the_gpu_works(side: Side, record: Callable[..., None]) -> None:
    """The result is dropped, the lane keeps its buffers until the GPU is done, and the next caller is served."""
    case = side.kit.case("slow.fp32.vcx")

    async def body() -> None:
        async with side.runtime() as runtime, await runtime.deserialize(side.plan("slow.fp32.vcx")) as engine:
            side.kit.check(case, await engine.infer(side.kit.inputs(case)))
            tasks = [asyncio.create_task(engine.infer(side.slow_inputs())) for _ in range(3)]
            await running(engine)
            for task in tasks:
                task.cancel()
            started = time.perf_counter()
            assert all(
                isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*tasks, return_exceptions=True)
            )
            waited_ms = (time.perf_counter() - started) * 1e3
            outputs = await engine.infer(side.kit.inputs(case))
            error = side.kit.check(case, outputs)
            statistics = engine.statistics()
            assert (statistics.cancelled, statistics.failed, statistics.waiting) == (3, 0, 0)
        record("cancelled while running: slow", error=error, waited_ms=waited_ms, result="pass")

    run(body())


def test_closing_while_the_gpu_works_waits_for_it(side: Side) -> None:
    async def body() -> None:
        async with side.runtime() as runtime:
            engine = await runtime.deserialize(side.plan("slow.fp32.vcx"))
            task = asyncio.create_task(engine.infer(side.slow_inputs()))
            await running(engine)
            with pytest.raises(trtx.BorrowedError):
                engine.close()
            await engine.aclose()
            assert (await task)["y"].shape == side.slow_inputs()["x"].shape
            with pytest.raises(trtx.ClosedError):
                await engine.infer(side.slow_inputs())

    run(body())
