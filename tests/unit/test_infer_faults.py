"""Faults on the way of a request: typed, told to whom they concern, and over when they are over."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import weakref
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import Fault, MockBackend, VirtualClock, device_lost, fail, out_of_memory, slow
from tests.unit.serving import (
    NONZERO,
    PATIENCE_S,
    GateClock,
    affine,
    affine_plan,
    build,
    nonzero_model,
    rows,
    serving,
    split_plan,
    without_pools,
)

#: Everything that ``infer`` may call where no graph is captured, in the order of the first call.
CALLS = (
    "cuCtxPushCurrent cuStreamCreate cuEventCreate create_context set_profile cuMemAlloc cuDeviceGetAttribute "
    "cuMemAllocAsync cuMemHostAlloc cuMemcpyHtoDAsync set_input_shape set_tensor_address get_tensor_shape "
    "cuEventRecord execute_async_v3 cuMemcpyDtoHAsync cuStreamSynchronize cuEventElapsedTime cuMemFreeAsync "
    "cuMemFreeHost cuCtxPopCurrent device_memory_bytes set_device_memory"
).split()
#: The same where the device has no memory pools.
PLAIN_CALLS = [*(call for call in CALLS if call not in {"cuMemAllocAsync", "cuMemFreeAsync"}), "cuMemFree"]
TABLE = [*((call, True) for call in CALLS), *((call, False) for call in PLAIN_CALLS if call != "cuDeviceGetAttribute")]
#: Rows of requests after which every call of the tables was made: at 7 there is more outgrown pinned memory than new.
GROWTH = (2, 6, 7)


async def assert_serves(engine: trtx.Engine, count: int = 3) -> None:
    assert np.array_equal((await engine.infer({"x": rows(count, 7)}))["y"], affine(rows(count, 7)))


@pytest.mark.parametrize("pools", [True, False])
async def test_the_tables_of_calls_are_complete(pools: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = MockBackend()
    if not pools:
        without_pools(backend, monkeypatch)
    async with serving(backend, split_plan(), cuda_graphs=False) as engine:
        before = backend.calls
        for count in GROWTH:
            await engine.infer_timed({"x": rows(count)})
        used = {call for call in backend.calls - before if call != "execute"}
    assert used == (set(CALLS) if pools else set(PLAIN_CALLS) - {"cuDeviceGetAttribute"})  # asked, but not the mock


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize(("call", "pools"), TABLE)
async def test_any_call_may_fail_and_the_engine_goes_on(
    call: str, pools: bool, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the nth call within five requests on two profiles: one typed error, the others right, nothing leaked."""
    backend = MockBackend()
    if not pools:
        without_pools(backend, monkeypatch)
    async with serving(backend, split_plan(), cuda_graphs=False) as engine:
        before = backend.calls
        backend.inject(fail(call, nth))
        failed: list[BaseException] = []
        for seed, count in enumerate((*GROWTH, 2, 6)):
            x = rows(count, seed)
            try:
                result = await engine.infer_timed({"x": x})
            except trtx.TrtxError as error:
                failed.append(error)
            else:
                assert np.array_equal(result.outputs["y"], affine(x))
        assert len(failed) == ((backend.calls - before)[call] >= nth), failed
        assert all(call in str(error) for error in failed)
        backend.clear_faults()
        await assert_serves(engine)
        await assert_serves(engine, 8)
        counts = engine.statistics()
        assert counts.failed == len(failed)
        assert counts.running == counts.waiting == 0
        # x and y, the weights and the lane's activation memory
        assert counts.device_memory.live == 4
        # what was outgrown is never more than what is in use
        assert 2 * 8 * 16 <= counts.pinned_memory.current_bytes <= 2 * 2 * 8 * 16
    assert engine.statistics().device_memory.current_bytes == engine.statistics().pinned_memory.current_bytes == 0
    if call.startswith("cuMemFree") and failed:
        assert len(backend.leaks()) == 1  # memory that the driver does not take back is not used again either
        assert backend.damage() == []
    else:
        backend.assert_clean()


@pytest.mark.parametrize(("call", "pools"), [*TABLE, ("execute", True)])
async def test_the_device_may_go_away_in_any_call(call: str, pools: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = MockBackend()
    if not pools:
        without_pools(backend, monkeypatch)
    async with serving(backend, split_plan(), cuda_graphs=False) as engine:
        once = (
            "cuStreamCreate", "cuEventCreate", "create_context", "device_memory_bytes", "set_device_memory",
            "cuMemAlloc", "cuDeviceGetAttribute",
        )  # fmt: skip
        if call not in once:  # the others are made by the first request alone
            for count in GROWTH[: 2 if call == "cuMemFreeHost" else 1]:
                await engine.infer_timed({"x": rows(count)})
        backend.inject(device_lost(call=call))
        failed: list[Any] = []
        for _ in range(3):
            with pytest.raises(trtx.TrtxError) as caught:
                await engine.infer_timed({"x": rows(GROWTH[2])})
            failed.append(caught.value)
        assert all("dead" in str(error) for error in failed[1:]), failed
        causes = {id(error.__cause__) for error in failed[1:]}
        assert len(causes) == 1
        assert isinstance(failed[1].__cause__, trtx.CudaError)
        assert failed[1].__cause__.code == 719
    assert trtx.live_objects() == []
    assert backend.leaks() == []


async def test_the_nth_enqueue_fails_alone() -> None:
    backend = MockBackend(faults=[fail("execute_async_v3", 3)])
    async with serving(backend, cuda_graphs=False) as engine:
        for number in range(1, 6):
            if number == 3:
                with pytest.raises(trtx.ExecutionError, match="call 3 of execute_async_v3") as caught:
                    await engine.infer({"x": rows(2)})
                assert type(caught.value) is trtx.ExecutionError
                assert len(caught.value.tensorrt_log) == 1
                assert "Error Code" in caught.value.tensorrt_log[0]
                assert "TensorRT said" in str(caught.value)
            else:
                await assert_serves(engine)
    backend.assert_clean()


@pytest.mark.parametrize("lanes", [1, 3])
async def test_device_lost_with_a_hundred_requests_queued(lanes: int) -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock, faults=[Fault("execute", error=719, delay_s=1, lose_device=True, count=lanes)])
    other = MockBackend()
    async with serving(other) as survivor:
        async with serving(backend, lanes=lanes) as engine:
            tasks = [asyncio.create_task(engine.infer({"x": rows(2, seed)})) for seed in range(100)]
            for _ in range(lanes):
                await clock.wait_reached()
            for task in tasks[-10:]:
                task.cancel()
            await asyncio.wait(tasks[-10:])
            clock.open()
            await asyncio.wait(tasks)
            errors = [task.exception() for task in tasks[:-10]]
            assert all(isinstance(error, trtx.ExecutionError) for error in errors)
            direct = [error for error in errors if isinstance(error, trtx.CudaError)]
            assert 1 <= len(direct) <= lanes
            assert {error.code for error in direct} == {719}
            causes = [error.__cause__ for error in errors if error is not None and error not in direct]
            assert len(causes) == 90 - len(direct)
            assert all(cause is causes[0] for cause in causes)
            assert isinstance(causes[0], trtx.CudaError)
            assert str(causes[0]) in map(str, direct)
            with pytest.raises(trtx.ExecutionError, match=r"is dead: its device failed .*719") as caught:
                await engine.infer({"x": rows(2)})
            assert caught.value.__cause__ is causes[0]
            counts = engine.statistics()
            assert (counts.completed, counts.failed, counts.cancelled) == (0, 90, 10)
            assert (counts.running, counts.waiting) == (0, 0)
            await assert_serves(survivor)
        await assert_serves(survivor)
    assert trtx.live_objects() == []
    assert backend.leaks() == []
    other.assert_clean()


async def test_a_dead_engine_keeps_no_inputs() -> None:
    backend = MockBackend(faults=[device_lost()])
    async with serving(backend) as engine:
        x = rows(3)
        gone = weakref.ref(x)
        gc.collect()
        gc.disable()
        try:
            with contextlib.suppress(trtx.CudaError):
                await engine.infer({"x": x})
            del x
            with contextlib.suppress(trtx.ExecutionError):
                await engine.infer({"x": rows(1)})
            # The lane's thread may not have left the frame yet that holds the error and so its traceback.
            deadline = time.monotonic() + PATIENCE_S
            while gone() is not None and time.monotonic() < deadline:  # noqa: ASYNC110 - no event says "collected"
                await asyncio.sleep(0)
            assert gone() is None
        finally:
            gc.enable()


async def test_the_device_comes_back_once_all_have_let_go() -> None:
    backend = MockBackend(faults=[device_lost()])
    async with serving(backend) as engine:
        with pytest.raises(trtx.CudaError):
            await engine.infer({"x": rows(2)})
    async with serving(backend) as engine:
        await assert_serves(engine)
    assert backend.leaks() == []


@pytest.mark.parametrize(
    ("call", "pools"), [("cuMemAlloc", False), ("cuMemAllocAsync", True), ("cuMemHostAlloc", True)]
)
@pytest.mark.parametrize("nth", [1, 2])
async def test_allocation_failure_recovers(call: str, pools: bool, nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = MockBackend(faults=[out_of_memory(call, nth)])
    if not pools:
        without_pools(backend, monkeypatch)
    async with serving(backend, cuda_graphs=False) as engine:
        with pytest.raises(trtx.CudaError, match="OUT_OF_MEMORY") as caught:
            await engine.infer({"x": rows(3)})
        assert caught.value.code == 2
        before = engine.statistics().device_memory.live
        await assert_serves(engine)
        attempts = 1 if call == "cuMemHostAlloc" else 2  # the stream is waited for, and it is tried again
        backend.inject(out_of_memory(call, nth, count=attempts))  # while the buffers grow
        with pytest.raises(trtx.CudaError, match="OUT_OF_MEMORY"):
            await engine.infer({"x": rows(8)})
        await assert_serves(engine, 8)
        statistics = engine.statistics()
        assert statistics.device_memory.live == 4 >= before  # weights, activations, x and y
        assert statistics.pinned_memory.current_bytes == 2 * (8 + 3) * 16  # with what was outgrown
    assert engine.statistics().device_memory.live == engine.statistics().pinned_memory.live == 0
    backend.assert_clean()


async def test_memory_that_the_stream_has_yet_to_free_is_waited_for(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, cuda_graphs=False) as engine:
        await assert_serves(engine)
        mock_backend.inject(out_of_memory("cuMemAllocAsync"))
        before = mock_backend.calls
        await assert_serves(engine, 8)
        new = mock_backend.calls - before
        assert (new["cuMemAllocAsync"], new["cuMemFreeAsync"], new["cuStreamSynchronize"]) == (3, 2, 2)


@pytest.mark.parametrize("call", ["cuMemAllocAsync", "cuMemHostAlloc"])
async def test_no_memory_for_a_data_dependent_output(call: str) -> None:
    backend = MockBackend()
    async with serving(backend, build(nonzero_model(), [NONZERO])) as engine:
        ones, few = np.ones(64, np.float32), np.array([0, 1], np.float32)
        assert (await engine.infer({"x": few}))["where"].tolist() == [[1]]
        await engine.infer({"x": np.zeros(64, np.float32)})  # the input's buffers have grown, the output's have not
        backend.inject(out_of_memory(call, count=2 if call == "cuMemAllocAsync" else 1))  # it is tried again
        with pytest.raises(trtx.CudaError, match="OUT_OF_MEMORY") as caught:
            await engine.infer({"x": ones})
        assert isinstance(caught.value.__cause__, trtx.ExecutionError)  # what TensorRT made of it
        assert (await engine.infer({"x": ones}))["where"].tolist() == [list(range(64))]
        assert (await engine.infer({"x": few}))["where"].tolist() == [[1]]
    backend.assert_clean()


async def test_a_device_that_is_too_small() -> None:
    backend = MockBackend(memory_bytes=2048)
    async with serving(backend) as engine:
        await assert_serves(engine)
        with contextlib.ExitStack() as contexts:

            def fill() -> None:
                for _ in range(10):
                    contexts.enter_context(engine.create_execution_context())

            with pytest.raises(trtx.TrtxError, match="OUT_OF_MEMORY"):
                fill()
        await assert_serves(engine)
    backend.assert_clean()


async def test_slow_kernels_are_only_slow() -> None:
    backend = MockBackend(clock=VirtualClock(), faults=[slow("execute", 60, count=2)])
    async with serving(backend) as engine:
        times = [(await engine.infer_timed({"x": rows(2)})).gpu_ms for _ in range(3)]
    assert times == [60_000, 60_000, 0]
    backend.assert_clean()


async def test_an_error_of_the_library_itself_is_typed(mock_backend: MockBackend, monkeypatch: Any) -> None:
    async with serving(mock_backend, affine_plan()) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(mock_backend.driver, "cuEventRecord", lambda event, stream: 1 / 0)
            with pytest.raises(trtx.ExecutionError, match="inside trtx_py: ZeroDivisionError") as caught:
                await engine.infer({"x": rows(2)})
            assert isinstance(caught.value.__cause__, ZeroDivisionError)
        await assert_serves(engine)
