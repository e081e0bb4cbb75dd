"""Faults of captured shapes: while they are captured, while they are replayed, and while slots hold them."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Iterator

import anyio
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import Fault, MockBackend, fail, out_of_memory, slow
from tests.unit.serving import PATIENCE_S, GateClock, affine, affine_plan, rows, serving, split_plan

X3 = {"x": (3, 4)}
MODES = ["latency", "balanced", "efficient"]

#: Everything that is called to capture a shape of another profile than the last one, in the order of the first call.
CAPTURE = (
    "cuCtxPushCurrent create_context cuMemAlloc set_device_memory device_memory_bytes set_profile cuStreamSynchronize "
    "set_input_shape set_tensor_address get_tensor_shape cuCtxGetCurrent cuEventCreate cuMemHostAlloc "
    "cuMemcpyHtoDAsync execute_async_v3 cuMemcpyDtoHAsync cuStreamCreate cuStreamBeginCapture cuStreamEndCapture "
    "cuGraphGetNodes cuGraphInstantiate cuGraphDestroy cuMemsetD8Async cuGraphLaunch cuCtxPopCurrent "
    "cuThreadExchangeStreamCaptureMode cuMemFree"
).split()

#: Everything that is called to replay one.
REPLAY = (
    "cuCtxPushCurrent cuCtxGetCurrent cuThreadExchangeStreamCaptureMode cuGraphLaunch cuEventRecord cuEventQuery "
    "cuCtxPopCurrent"
).split()

#: Of these, what nobody calls but who captures.
CAPTURE_ONLY = (
    "cuMemHostAlloc cuStreamBeginCapture cuStreamEndCapture cuGraphGetNodes cuGraphInstantiate cuMemsetD8Async"
).split()

#: They report nothing that could be told: native code restores with them what was, or asks.
SILENT = ("cuCtxGetCurrent", "cuCtxPopCurrent", "cuThreadExchangeStreamCaptureMode")

#: While a graph is replayed these are asked again, since a refusal says nothing about the work.
PATIENT = ("cuCtxPushCurrent", "cuEventQuery")


async def until(condition: Callable[[], object]) -> None:
    """What happens beside the requests has no event to wait for."""
    with anyio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.001)


async def infer(engine: trtx.Engine, count: int = 3, seed: int = 0) -> None:
    x = rows(count, seed)
    assert np.array_equal((await engine.infer({"x": x}))["y"], affine(x))


async def use_slot(engine: trtx.Engine, count: int = 3, seed: int = 0) -> None:
    async with engine.alloc_inputs({"x": (count, 4)}) as slot:
        slot["x"][...] = rows(count, seed)
        assert np.array_equal((await slot.infer())["y"], affine(rows(count, seed)))


async def capture(engine: trtx.Engine, count: int = 3) -> None:
    async with engine.alloc_inputs({"x": (count, 4)}):
        pass


async def enqueue(engine: trtx.Engine, count: int, seed: int = 7) -> None:
    """Through TensorRT's enqueue, whatever is captured."""
    x = rows(count, seed)
    assert np.array_equal((await engine.infer_timed({"x": x})).outputs["y"], affine(x))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def assert_settled(engine: trtx.Engine, asked: int) -> None:
    counts = engine.statistics()
    assert counts.completed + counts.failed + counts.cancelled == asked, counts
    assert (counts.waiting, counts.running) == (0, 0)


def assert_clean(backend: MockBackend) -> None:
    gc.collect()
    assert trtx.live_objects() == []
    backend.assert_clean()


async def test_the_tables_of_calls_are_complete(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, split_plan(), slots=2) as engine:
        before = mock_backend.calls
        for count in (3, 6):
            await capture(engine, count)
        used = mock_backend.calls - before
        assert {call for call in used if call != "execute"} == set(CAPTURE)
        before = mock_backend.calls
        for seed in range(3):
            await infer(engine, 3, seed)
            await infer(engine, 6, seed)
        used = mock_backend.calls - before
        assert {call for call in used if call != "execute"} == set(REPLAY)


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("call", CAPTURE)
async def test_any_call_of_capturing_may_fail(call: str, nth: int) -> None:
    """One typed error that names the call; what was asked before and after is served, by enqueue and by graphs."""
    backend = MockBackend()
    async with serving(backend, split_plan(), slots=2) as engine:
        before = backend.calls[call]
        backend.inject(fail(call, nth))
        failed: list[tuple[int, BaseException]] = []
        for count in (3, 6, 3, 6, 2):
            try:
                await use_slot(engine, count, count)
            except trtx.TrtxError as error:
                failed.append((count, error))
        struck = backend.calls[call] - before >= nth
        assert all(call in str(error) or call in PATIENT for _, error in failed), failed
        assert len(failed) <= struck
        if call not in (*SILENT, *PATIENT):
            assert bool(failed) == struck
        backend.clear_faults()
        for count in (3, 6, 2):
            await enqueue(engine, count)
            await use_slot(engine, count)
        await use_slot(engine, 7)
        counts = engine.statistics()
        assert counts.graphs.captured >= 3
        assert (counts.waiting, counts.running) == (0, 0)
    if call == "cuGraphDestroy" and failed:
        assert len(backend.leaks()) == 1  # the graph that the driver did not destroy
        assert backend.damage() == []
    else:
        assert_clean(backend)


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("call", CAPTURE_ONLY)
async def test_any_call_of_capturing_in_the_background_may_fail(
    call: str, nth: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The captures that a recurring shape starts fail one after another: requests never notice."""
    backend = MockBackend()
    async with serving(backend, slots=2) as engine:
        await enqueue(engine, 3)  # what enqueueing needs is there
        await enqueue(engine, 3)
        await infer(engine)
        with caplog.at_level(logging.WARNING, "trtx_py"):
            backend.inject(fail(call, nth))
            for seed in range(20):
                await infer(engine, 3, seed)
            await until(lambda: "is not captured" in caplog.text or engine.statistics().graphs.captured)
        assert call in caplog.text or engine.statistics().graphs.captured  # nth may be more than there are
        backend.clear_faults()
        for seed in range(12):
            await infer(engine, 3, seed)
        await until(lambda: engine.statistics().graphs.captured)
        await infer(engine)
        await use_slot(engine)
        assert engine.statistics().failed == 0
    assert_clean(backend)


async def test_tensorrt_may_fail_once_while_it_is_captured(mock_backend: MockBackend) -> None:
    """Twice, even: in the background a shape that recurs is captured in the end."""
    async with serving(mock_backend, slots=1) as engine:
        for seed in range(2):
            mock_backend.inject(fail("execute_async_v3", 3))  # the first two are the flush's
            with pytest.raises(trtx.ExecutionError, match="TensorRT does not let it be captured"):
                await capture(engine)
            assert engine.statistics().graphs.failures == seed + 1
        await infer(engine)
        with anyio.fail_after(PATIENCE_S):
            while not engine.statistics().graphs.captured:
                await infer(engine)
        assert engine.statistics().graphs.failures == 2
        await use_slot(engine)


async def test_what_tensorrt_refuses_time_and_again_is_given_up(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, slots=1) as engine:
        for _ in range(3):
            mock_backend.inject(fail("execute_async_v3", 3))
            with pytest.raises(trtx.ExecutionError, match="TensorRT does not let it be captured"):
                await capture(engine)
        before = mock_backend.calls["cuStreamBeginCapture"]
        with pytest.raises(trtx.ExecutionError, match="TensorRT does not let it be captured"):
            await capture(engine)
        for seed in range(5):
            await infer(engine, 3, seed)
        assert mock_backend.calls["cuStreamBeginCapture"] == before
        assert engine.statistics().graphs.failures == 3


@pytest.mark.parametrize("way", ["infer", "slot", "queued"])
async def test_the_call_that_failed_is_named_also_where_it_is_not_the_launch(way: str) -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with serving(backend, slots=2 if way == "slot" else 1) as engine:
        await capture(engine)
        if way == "slot":
            async with engine.alloc_inputs(X3) as slot:
                backend.inject(fail("cuCtxPushCurrent"))
                with pytest.raises(trtx.CudaError, match=r"^cuCtxPushCurrent returned"):
                    await slot.infer()
        elif way == "infer":
            backend.inject(fail("cuCtxPushCurrent"))
            with pytest.raises(trtx.CudaError, match=r"^cuCtxPushCurrent returned"):
                await engine.infer({"x": rows(3)})
        else:
            backend.inject(slow("execute", 1, count=1))
            running = asyncio.create_task(infer(engine))
            await clock.wait_reached()
            queued = asyncio.create_task(engine.infer({"x": rows(3)}))
            await until(lambda: engine.statistics().waiting)
            # For the next launch; whether the first one is done cannot be told meanwhile, and it may fail for that.
            backend.inject(fail("cuCtxPushCurrent", count=None))
            clock.open()
            await asyncio.wait([queued])
            assert str(queued.exception()).startswith("cuCtxPushCurrent returned")
            await asyncio.wait([running])
            running.exception()
            backend.clear_faults()
        await infer(engine)
    assert_clean(backend)


@pytest.mark.parametrize("nth", [1, 2, 5])
@pytest.mark.parametrize("call", ["cuGraphLaunch", "cuEventRecord", "cuEventQuery"])
@pytest.mark.parametrize("completion", MODES)
async def test_a_call_of_replaying_fails_for_one_request(call: str, nth: int, completion: str) -> None:
    backend = MockBackend()
    async with serving(backend, completion=completion, slots=2) as engine:
        await capture(engine)
        backend.inject(fail(call, nth))
        failed: list[int] = []
        told: list[trtx.CudaError] = []
        for number in range(1, 9):
            try:
                await infer(engine, 3, number)
            except trtx.CudaError as error:
                failed.append(number)
                told.append(error)
        assert failed == ([] if call in PATIENT else [nth])
        assert all(call in str(error) and error.code == 304 for error in told)
        assert engine.statistics().failed == len(failed)
        assert_settled(engine, 8)
        await enqueue(engine, 3)
        await use_slot(engine)
    assert_clean(backend)


@pytest.mark.parametrize("nth", [1, 7])
@pytest.mark.parametrize("call", REPLAY)
async def test_a_call_of_replaying_fails_while_many_wait(call: str, nth: int) -> None:
    backend = MockBackend()
    async with serving(backend, slots=2, lanes=2) as engine:
        await capture(engine)
        backend.inject(fail(call, nth))
        calls = [infer(engine, 3, seed) for seed in range(40)]
        failed = [error for error in await asyncio.gather(*calls, return_exceptions=True) if error is not None]
        assert len(failed) <= 1
        assert all(isinstance(error, trtx.CudaError) and error.code == 304 for error in failed), failed
        assert all(call in str(error) for error in failed), failed
        if call not in (*SILENT, *PATIENT):
            assert len(failed) == 1
        await until(lambda: not engine.statistics().running)
        assert_settled(engine, 40)
        backend.clear_faults()
        for seed in range(5):
            await infer(engine, 3, seed)
    assert_clean(backend)


@pytest.mark.parametrize("call", ["cuGraphLaunch", "cuEventRecord", "cuEventQuery"])
async def test_a_call_of_replaying_keeps_failing_in_a_slot(call: str) -> None:
    backend = MockBackend()
    async with serving(backend, slots=2) as engine, engine.alloc_inputs(X3) as slot:
        backend.inject(fail(call, count=None))
        with pytest.raises(trtx.CudaError, match="304"):
            await slot.infer()
        with pytest.raises(trtx.CudaError, match="304"):
            slot.infer_sync(timeout_s=PATIENCE_S)
        backend.clear_faults()
        for seed in range(3):
            slot["x"][...] = rows(3, seed)
            assert np.array_equal((await slot.infer())["y"], affine(rows(3, seed)))
        assert engine.statistics().failed == 2
        assert_settled(engine, 5)
    assert_clean(backend)


@pytest.mark.parametrize("completion", MODES)
async def test_device_lost_with_a_hundred_requests_on_captured_shapes(completion: str) -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock, devices=2)
    survivor = trtx.Runtime(None, backend, device=1)
    other = await survivor.deserialize(affine_plan())
    await other.warmup(1)
    async with serving(backend, lanes=2, slots=4, completion=completion) as engine:
        for count in (3, 5):
            await capture(engine, count)
        backend.inject(Fault("execute", error=719, delay_s=1, lose_device=True, count=None))
        tasks = [asyncio.create_task(engine.infer({"x": rows(3 + 2 * (seed % 2), seed)})) for seed in range(100)]
        await clock.wait_reached()
        await clock.wait_reached()
        counts = engine.statistics()
        assert counts.running == 8
        assert counts.waiting == 92
        for task in tasks[-10:]:
            task.cancel()
        clock.open()
        _done, pending = await asyncio.wait(tasks, timeout=PATIENCE_S)
        assert not pending
        backend.clear_faults()
        errors = [task.exception() for task in tasks[:-10]]
        assert all(isinstance(error, trtx.ExecutionError) for error in errors)
        for error in errors:
            assert any(isinstance(link, trtx.CudaError) and link.code == 719 for link in chain(error)), error
        for _ in range(2):
            with pytest.raises(trtx.ExecutionError, match="is dead") as caught:
                await engine.infer({"x": rows(3)})
            assert isinstance(caught.value.__cause__, trtx.CudaError)
        with pytest.raises(trtx.ExecutionError, match="is dead"):
            await engine.alloc_inputs(X3).__aenter__()
        counts = engine.statistics()
        assert (counts.completed, counts.failed, counts.cancelled) == (0, 90, 10)
        assert (counts.waiting, counts.running) == (0, 0)
        await infer(other)
    await infer(other)
    await survivor.aclose()
    gc.collect()
    assert trtx.live_objects() == []
    assert backend.leaks() == []


async def test_device_lost_while_slots_are_out() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with serving(backend, slots=2) as engine:
        async with engine.alloc_inputs(X3) as first, engine.alloc_inputs(X3) as second:
            backend.inject(Fault("execute", error=719, delay_s=1, lose_device=True))
            running = asyncio.create_task(first.infer())
            waiting = [asyncio.create_task(use_slot(engine)), asyncio.create_task(infer(engine))]
            await clock.wait_reached()
            clock.open()
            for error in await asyncio.gather(running, *waiting, return_exceptions=True):
                assert isinstance(error, trtx.ExecutionError)
                assert any(isinstance(link, trtx.CudaError) for link in chain(error))
            with pytest.raises(trtx.ExecutionError):
                await second.infer()
        with pytest.raises(trtx.ExecutionError, match="is dead"):
            await infer(engine)
    assert trtx.live_objects() == []
    assert backend.leaks() == []


@pytest.mark.parametrize("call", ["cuMemAlloc", "cuMemHostAlloc", "cuGraphInstantiate"])
@pytest.mark.parametrize("lanes", [1, 2])
async def test_no_memory_for_a_capture_under_traffic(call: str, lanes: int, caplog: pytest.LogCaptureFixture) -> None:
    backend = MockBackend()
    async with serving(backend, lanes=lanes, slots=2) as engine:
        await capture(engine, 5)
        # Each lane enqueues once, on the largest shape, in a context of its own: requests need no more memory then.
        with anyio.fail_after(PATIENCE_S):
            while engine.statistics().contexts < 2 * lanes:
                await asyncio.gather(*(enqueue(engine, 8, seed) for seed in range(8)))
        stop, served = False, 0
        asked = engine.statistics().completed

        async def traffic(seed: int) -> None:
            nonlocal served
            while not stop:
                await infer(engine, 3 if seed % 2 else 5, seed)
                served += 1

        with caplog.at_level(logging.WARNING, "trtx_py"):
            backend.inject(out_of_memory(call, count=None))
            tasks = [asyncio.create_task(traffic(seed)) for seed in range(6)]
            await until(lambda: "is not captured" in caplog.text)
            backend.clear_faults()
            await until(lambda: engine.statistics().graphs.captured > lanes)  # the shape of five rows was before
            stop = True
            await asyncio.gather(*tasks)
        assert "OUT_OF_MEMORY" in caplog.text
        assert_settled(engine, served + asked)
        assert engine.statistics().failed == 0
    assert_clean(backend)
