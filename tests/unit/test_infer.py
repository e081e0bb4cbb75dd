"""``infer``: right numbers for every caller, owned by the caller, whatever the others do."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from typing import Any

import anyio
import numpy as np
import onnxruntime
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, fail, slow
from tests.unit.serving import (
    NONZERO,
    PAIR,
    PATIENCE_S,
    RESHAPE,
    GateClock,
    affine,
    affine_model,
    affine_plan,
    build,
    nonzero_model,
    pair_model,
    reshape_model,
    rows,
    serving,
    serving_sync,
    split_plan,
)

CASES: dict[str, tuple[bytes, Any, dict[str, np.ndarray]]] = {
    "affine": (affine_model(), {"x": ((1, 4), (2, 4), (8, 4))}, {"x": rows(5)}),
    "pair": (
        pair_model(),
        PAIR,
        {"left": rows(3)[:, :2], "right": rows(3, 1)[:, 2:], "fixed": np.array([1, -2, 3], np.int32)},
    ),
    "shape tensor": (reshape_model(), RESHAPE, {"x": rows(3).reshape(-1), "shape": np.array([2, 6])}),
    "data-dependent": (nonzero_model(), NONZERO, {"x": np.array([0, 1, 0, 0, 2, 3], np.float32)}),
    "data-dependent, empty": (nonzero_model(), NONZERO, {"x": np.zeros(5, np.float32)}),
}


@pytest.mark.parametrize("name", CASES)
async def test_numbers_are_those_of_onnxruntime(mock_backend: MockBackend, name: str) -> None:
    model, profile, feeds = CASES[name]
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    expected = dict(zip(names, session.run(names, {k: np.ascontiguousarray(v) for k, v in feeds.items()}), strict=True))
    async with serving(mock_backend, build(model, [profile])) as engine:
        outputs = await engine.infer(feeds)
        timed = (await engine.infer_timed(feeds)).outputs
        blocking = await asyncio.to_thread(engine.infer_sync, feeds)
        with engine.create_execution_context() as context:
            own = await context.execute(feeds)
    for found in (outputs, timed, blocking, own):
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            assert found[key].dtype == array.dtype
            assert found[key].shape == array.shape
            assert np.array_equal(found[key], array)


async def test_data_dependent_sizes_one_after_another(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, build(nonzero_model(), [NONZERO])) as engine:
        for count in (3, 64, 0, 1, 40, 2):
            x = np.zeros(64, np.float32)
            x[:count] = 1
            assert np.array_equal((await engine.infer({"x": x}))["where"], [np.arange(count)])


@pytest.mark.parametrize("lanes", [1, 4])
async def test_a_thousand_callers_each_get_their_own_answer(mock_backend: MockBackend, lanes: int) -> None:
    failing = 500
    mock_backend.inject(fail("execute_async_v3", failing))
    async with serving(mock_backend, lanes=lanes, cuda_graphs=False) as engine:
        inputs = [rows(1 + number % 8, seed=number) for number in range(1000)]
        calls = [engine.infer({"x": x}) for x in inputs]
        results: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
        failed = [result for result in results if isinstance(result, BaseException)]
        assert [type(error) for error in failed] == [trtx.ExecutionError]
        assert "fault injected into call 500 of execute_async_v3" in str(failed[0])
        for x, result in zip(inputs, results, strict=True):
            if result is not failed[0]:
                assert np.array_equal(result["y"], affine(x))
        counts = engine.statistics()
        assert (counts.completed, counts.failed, counts.cancelled) == (999, 1, 0)
        assert (counts.waiting, counts.running) == (0, 0)
        assert 1 <= counts.lanes == counts.contexts <= lanes


async def test_several_lanes_run_at_once() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock, faults=[slow("execute", 1)])
    async with serving(backend, lanes=3) as engine:
        tasks = [asyncio.create_task(engine.infer({"x": rows(2, seed)})) for seed in range(5)]
        for _ in range(3):
            await clock.wait_reached()  # three kernels are held at the same time
        assert not clock.reached.acquire(blocking=False)
        counts = engine.statistics()
        assert (counts.running, counts.waiting, counts.lanes, counts.contexts) == (3, 2, 3, 3)
        clock.open()
        for seed, result in enumerate(await asyncio.gather(*tasks)):
            assert np.array_equal(result["y"], affine(rows(2, seed)))
    backend.assert_clean()


@pytest.mark.parametrize("lanes", [2, 8])
@pytest.mark.parametrize("plan", ["one profile", "two profiles"])
async def test_plans_that_share_no_profiles_fall_back(mock_backend: MockBackend, plan: str, lanes: int) -> None:
    chosen = affine_plan(False) if plan == "one profile" else split_plan(False)
    async with serving(mock_backend, chosen, lanes=lanes) as engine:
        for seed in range(5):
            inputs = [rows(1 + number % 8, seed * 100 + number) for number in range(60)]
            results = await asyncio.gather(*[engine.infer({"x": x}) for x in inputs])
            for x, result in zip(inputs, results, strict=True):
                assert np.array_equal(result["y"], affine(x))
        counts = engine.statistics()
        assert (counts.completed, counts.failed, counts.cancelled) == (300, 0, 0)


async def test_a_lane_that_steps_back_frees_its_profile() -> None:
    """Two lanes hold one profile each and want the other's: one gives up its own, and everything is served."""
    clock = GateClock()
    backend = MockBackend(clock=clock, faults=[slow("execute", 1, count=2)])
    small, large = rows(2), rows(6)
    async with serving(backend, split_plan(False), lanes=2) as engine:
        first = [asyncio.create_task(engine.infer({"x": x})) for x in (small, large)]
        await clock.wait_reached()
        await clock.wait_reached()
        assert engine.statistics().contexts == 2
        more = [asyncio.create_task(engine.infer({"x": x})) for x in (large, large, small, small) * 10]
        clock.open()
        for x, result in zip((small, large), await asyncio.gather(*first), strict=True):
            assert np.array_equal(result["y"], affine(x))
        for x, result in zip((large, large, small, small) * 10, await asyncio.gather(*more), strict=True):
            assert np.array_equal(result["y"], affine(x))
        assert np.array_equal((await engine.infer({"x": small}))["y"], affine(small))
        assert np.array_equal((await engine.infer({"x": large}))["y"], affine(large))
        assert engine.statistics().failed == 0
    backend.assert_clean()


async def test_a_users_context_that_holds_the_only_profile_is_named(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, affine_plan(False), lanes=2) as engine:
        async with engine.create_execution_context() as context:
            with pytest.raises(trtx.BorrowedError, match=r"ExecutionContext#\d+ .*made at .*test_infer.py") as caught:
                await engine.infer({"x": rows(2)})
            assert len(caught.value.borrowers) == 1
            assert np.array_equal((await context.execute({"x": rows(2)}))["y"], affine(rows(2)))
        assert np.array_equal((await engine.infer({"x": rows(2)}))["y"], affine(rows(2)))
        counts = engine.statistics()
        assert (counts.completed, counts.failed) == (1, 1)


async def test_switching_profiles(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, split_plan(), cuda_graphs=False) as engine:
        for count in (2, 6, 3, 8, 8, 1, 5):
            x = rows(count, count)
            assert np.array_equal((await engine.infer({"x": x}))["y"], affine(x))
        assert engine.statistics().profile_switches == 5


@pytest.mark.parametrize("sharing", [True, False])
async def test_contexts_of_ones_own_on_two_profiles(mock_backend: MockBackend, sharing: bool) -> None:
    async with serving(mock_backend, split_plan(sharing)) as engine:
        one, two = engine.create_execution_context(), engine.create_execution_context()
        for _ in range(3):
            results = await asyncio.gather(one.execute({"x": rows(2)}), two.execute({"x": rows(6)}))
            assert np.array_equal(results[0]["y"], affine(rows(2)))
            assert np.array_equal(results[1]["y"], affine(rows(6)))


async def test_results_are_the_callers(mock_backend: MockBackend) -> None:
    x = rows(3)
    async with serving(mock_backend) as engine:
        first = await engine.infer({"x": x})
        second = await engine.infer({"x": x})
        assert first["y"].flags.writeable
        first["y"][:] = -1
        assert np.array_equal(second["y"], affine(x))
        third = await engine.infer({"x": x})
        assert np.array_equal(third["y"], affine(x))
        kept = [await engine.infer({"x": rows(8, seed)}) for seed in range(20)]
        assert not any(np.shares_memory(a["y"], b["y"]) for a in kept for b in kept if a is not b)
        assert not np.shares_memory(third["y"], x)
    assert (first["y"] == -1).all()
    assert np.array_equal(second["y"], affine(x))
    for seed, result in enumerate(kept):
        assert np.array_equal(result["y"], affine(rows(8, seed)))


async def test_results_of_a_pass_through_do_not_alias_the_input(mock_backend: MockBackend) -> None:
    feeds = {"left": np.ones((1, 2), np.float32), "right": np.ones((1, 2), np.float32)}
    fixed = np.array([1, 2, 3], np.int32)
    async with serving(mock_backend, build(pair_model(), [PAIR])) as engine:
        outputs = await engine.infer({**feeds, "fixed": fixed})
    fixed[:] = 0
    assert outputs["same"].tolist() == [1, 2, 3]


async def test_inputs_may_change_once_the_call_has_returned(mock_backend: MockBackend) -> None:
    x = rows(4)
    async with serving(mock_backend) as engine:
        for step in range(20):
            x[:] = step
            assert np.array_equal((await engine.infer({"x": x}))["y"], affine(np.full((4, 4), step, np.float32)))


async def test_inputs_are_let_go(mock_backend: MockBackend) -> None:
    mock_backend.inject(fail("execute_async_v3", 5))  # two calls in each round
    async with serving(mock_backend, cuda_graphs=False) as engine:
        gc.collect()
        gc.disable()  # cycles would keep them until some later collection
        try:
            for failing in (False, False, True, False):
                x = rows(3)
                gone = weakref.ref(x)
                failed = False
                try:
                    await engine.infer({"x": x})
                except trtx.ExecutionError:
                    failed = True
                assert failed == failing
                del x
                # the lane lets go of the request just after the answer: the next answer comes after that
                await engine.infer({"x": rows(1)})
                assert gone() is None
        finally:
            gc.enable()


async def test_cancelled_requests_let_go_of_their_inputs_at_once() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock, faults=[slow("execute", 1, count=1)])
    async with serving(backend) as engine:
        running = asyncio.create_task(engine.infer({"x": rows(2)}))
        await clock.wait_reached()
        x = rows(3)
        gone = weakref.ref(x)
        waiting = asyncio.create_task(engine.infer({"x": x}))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        del x, waiting
        gc.collect()
        released = gone() is None
        clock.open()
        assert released
        await running
    backend.assert_clean()


async def test_timed_fields_are_consistent() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock, faults=[slow("execute", 1, count=1)])
    async with serving(backend) as engine:
        first = asyncio.create_task(engine.infer_timed({"x": rows(2)}))
        await clock.wait_reached()
        others = [asyncio.create_task(engine.infer_timed({"x": rows(2)})) for _ in range(50)]
        with anyio.fail_after(PATIENCE_S):
            while engine.statistics().waiting < 50:  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(0)
        begun = time.perf_counter()
        await asyncio.sleep(0.01)
        held_ms = (time.perf_counter() - begun) * 1e3
        clock.open()
        results = await asyncio.gather(first, *others)
        for result in results:
            assert isinstance(result, trtx.InferenceResult)
            assert 0 <= result.queue_ms <= result.latency_ms
            assert 0 < result.gpu_ms <= result.latency_ms - result.queue_ms
        assert results[0].gpu_ms >= held_ms
        assert all(result.queue_ms >= held_ms for result in results[1:])
    backend.assert_clean()


async def test_gpu_time_is_that_of_the_events() -> None:
    from mock_backend import VirtualClock

    backend = MockBackend(clock=VirtualClock(), duration_s=3600)
    async with serving(backend) as engine:
        assert (await engine.infer_timed({"x": rows(2)})).gpu_ms == 3_600_000
    backend.assert_clean()


@pytest.mark.parametrize("plan", ["affine", "split", "shape tensor", "data-dependent"])
async def test_warmup(mock_backend: MockBackend, plan: str) -> None:
    chosen, profiles = {
        "affine": (affine_plan(), 1), "split": (split_plan(), 2),
        "shape tensor": (build(reshape_model(), [RESHAPE]), 1),
        "data-dependent": (build(nonzero_model(), [NONZERO]), 1),
    }[plan]  # fmt: skip
    async with serving(mock_backend, chosen) as engine:
        await engine.warmup(0)
        assert mock_backend.calls["execute"] == 0
        await engine.warmup(3)
        await engine.warmup(iterations=1)
        assert engine.statistics().completed == 4 * profiles
        for bad in (-1, 1.5, "3", True):
            with pytest.raises(trtx.InvalidArgumentError, match="iterations"):
                await engine.warmup(bad)  # type: ignore[arg-type]


async def test_after_the_first_request_nothing_is_allocated(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, cuda_graphs=False) as engine:
        await engine.infer({"x": rows(8)})
        before = mock_backend.calls
        for count in (8, 1, 5, 8):
            await engine.infer({"x": rows(count)})
        new = mock_backend.calls - before
        for call in ("cuMemAlloc", "cuMemHostAlloc", "cuMemFree", "cuStreamCreate", "cuEventCreate", "create_context"):
            assert new[call] == 0, call


async def test_statistics_add_up() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock, faults=[slow("execute", 1, count=1), fail("execute_async_v3", 3)])
    async with serving(backend, cuda_graphs=False) as engine:
        assert engine.statistics().lanes == 0  # an engine that nobody asks costs nothing
        tasks = [asyncio.create_task(engine.infer({"x": rows(2)})) for _ in range(10)]
        await clock.wait_reached()
        counts = engine.statistics()
        assert (counts.running, counts.waiting, counts.completed) == (1, 9, 0)
        for task in (tasks[0], *tasks[7:]):
            task.cancel()
        await asyncio.wait([tasks[0], *tasks[7:]])
        counts = engine.statistics()
        assert (counts.running, counts.waiting) == (1, 6)
        with pytest.raises(trtx.ShapeError):
            await engine.infer({"x": rows(9)})  # was never accepted
        clock.open()
        await asyncio.gather(*tasks, return_exceptions=True)
        await engine.infer({"x": rows(1)})
        counts = engine.statistics()
        assert (counts.completed, counts.failed, counts.cancelled) == (6, 1, 4)
        assert (counts.running, counts.waiting) == (0, 0)
        assert counts.device_memory.live > 0
    assert engine.statistics().completed == 6  # after the end, the last figures
    assert engine.statistics().device_memory.current_bytes == 0
    assert engine.statistics().pinned_memory.live == 0
    backend.assert_clean()


async def test_the_loop_goes_on_while_a_request_runs() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock, faults=[slow("execute", 0.05)])
    async with serving(backend) as engine:
        task = asyncio.create_task(engine.infer({"x": rows(2)}))
        await clock.wait_reached()
        turns = 0
        for _ in range(1000):
            await asyncio.sleep(0)
            turns += 1
        assert turns == 1000
        assert not task.done()
        clock.open()
        await task
    backend.assert_clean()


@pytest.mark.parametrize("call", ["deserialize", "build_serialized_network", "parse_onnx", "create_runtime"])
async def test_the_loop_goes_on_while_an_engine_opens(call: str) -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock, faults=[slow(call, 0.05)])
    opened = asyncio.Event()

    async def serve() -> None:
        async with trtx.open_engine(affine_model(), backend, profiles=[{"x": ((1, 4), (2, 4), (8, 4))}]) as engine:
            opened.set()
            assert np.array_equal((await engine.infer({"x": rows(2)}))["y"], affine(rows(2)))

    def watch() -> None:
        clock.wait_reached_sync()
        done.set()

    done = threading.Event()
    held = threading.Thread(target=watch)
    held.start()
    task = asyncio.create_task(serve())
    turns = 0
    while not done.is_set():  # were the loop blocked, the gate would never be opened
        await asyncio.sleep(0)
        turns += 1
    for _ in range(100):
        await asyncio.sleep(0)
    assert not opened.is_set()
    clock.open()
    await task
    held.join(PATIENCE_S)
    backend.assert_clean()


async def test_closed_engines_take_nothing(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine:
        await engine.infer({"x": rows(1)})
    for call in (engine.infer, engine.infer_timed):
        with pytest.raises(trtx.ClosedError, match=r"Engine#\d+"):
            await call({"x": rows(1)})
    with pytest.raises(trtx.ClosedError):
        engine.infer_sync({"x": rows(1)})
    with pytest.raises(trtx.ClosedError):
        await engine.warmup()


async def test_aclose_serves_what_was_accepted() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock, faults=[slow("execute", 1, count=1)])
    async with trtx.Runtime(None, backend) as runtime:
        engine = await runtime.deserialize(affine_plan())
        tasks = [asyncio.create_task(engine.infer({"x": rows(2, seed)})) for seed in range(20)]
        await clock.wait_reached()
        with pytest.raises(trtx.BorrowedError, match="1 requests running, 19 waiting"):
            engine.close()
        closing = asyncio.create_task(engine.aclose())
        await asyncio.sleep(0)
        assert engine.closed
        with pytest.raises(trtx.ClosedError):
            await engine.infer({"x": rows(1)})
        clock.open()
        await closing
        for seed, task in enumerate(tasks):
            assert np.array_equal((await task)["y"], affine(rows(2, seed)))
    backend.assert_clean()


def test_without_an_event_loop(mock_backend: MockBackend) -> None:
    with serving_sync(mock_backend) as engine:
        for seed in range(10):
            x = rows(3, seed)
            assert np.array_equal(engine.infer_sync({"x": x}, timeout_s=PATIENCE_S)["y"], affine(x))
