"""``profile`` on the mock: what it measures, what it refuses, and that it leaves nothing behind however it ends."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, VirtualClock, fail, slow
from tests.unit.serving import (
    NONZERO,
    RESHAPE,
    GateClock,
    affine_plan,
    build,
    nonzero_model,
    reshape_model,
    rows,
    serving,
)
from tests.unit.test_profile_device import FakeSource
from trtx_py.profiling import ProfileReport, profile

X = {"x": rows(2)}
SHORT: dict[str, Any] = {"requests": 4, "warmup": 2, "runs": 2}


async def test_a_report_of_everything(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, lanes=2, batch_axis=0) as engine:
        made = await profile(engine, X, requests=30, warmup=5, concurrency=3, runs=4, source=FakeSource())
        after = engine.statistics()
    assert isinstance(made, ProfileReport)
    assert (made.requests, made.warmup, made.concurrency, made.latency.count) == (30, 5, 3, 30)
    assert made.engine.inputs == {"x": (2, 4)}
    assert (made.engine.name, made.engine.lanes, made.engine.layers) == (engine.name, 2, 2)
    assert made.ways == {"graph": 30}
    assert made.throughput_per_s == pytest.approx(30 / made.duration_s)
    assert made.items_per_s == pytest.approx(60 / made.duration_s)
    assert after.completed == 35
    assert after.graphs.captured == 2
    assert made.queue is not None
    assert made.in_flight is not None
    assert made.wake_up is not None
    whole = made.queue.mean + made.in_flight.mean + made.wake_up.mean
    assert made.latency.mean == pytest.approx(whole)
    assert {each.worker for each in made.timeline} == {0, 1, 2}
    for each in made.timeline:
        assert each.launched is not None
        assert each.completed is not None
        assert 0 <= each.submitted <= each.launched <= each.completed <= each.resumed
    assert made.stages.unavailable is None
    assert made.stages.runs == 4
    assert made.stages.h2d_share + made.stages.gpu_share + made.stages.d2h_share == pytest.approx(1)
    assert made.layers.unavailable is None
    assert [layer.name for layer in made.layers.layers] == ["Mul_0", "Add_1", "between nodes"]
    assert sum(layer.share for layer in made.layers.layers) == pytest.approx(1)
    assert made.layers.ratio == pytest.approx(made.layers.sum_us / made.layers.gpu_us)
    assert 0 < made.layers.ratio <= 1.01
    assert made.memory.device_peak >= made.memory.device > 0
    assert made.memory.pinned_peak >= made.memory.pinned > 0
    assert made.device.extremes("power_w") == (250, 250, 250)
    assert ProfileReport.from_json(made.to_json()) == made
    assert json.loads(made.to_trace())["traceEvents"]


async def test_on_virtual_time_layers_add_up_exactly() -> None:
    backend = MockBackend(clock=VirtualClock(), duration_s=0.003)
    async with serving(backend) as engine:
        made = await profile(engine, X, **SHORT)
    backend.assert_clean()
    backend.close()
    assert [(layer.name, layer.mean_us) for layer in made.layers.layers] == [("Mul_0", 1500.0), ("Add_1", 1500.0)]
    assert [made.layers.sum_us, made.layers.gpu_us, made.layers.ratio] == pytest.approx([3000.0, 3000.0, 1.0])
    assert made.stages.gpu is not None
    assert [made.stages.gpu.p50, made.stages.gpu_share] == pytest.approx([3000.0, 1.0])


async def test_slow_kernels_are_found_in_every_part() -> None:
    backend = MockBackend(duration_s=0.004)
    async with serving(backend) as engine:
        made = await profile(engine, X, **SHORT)
    backend.close()
    assert made.latency.minimum >= 4000
    assert made.in_flight is not None
    assert made.in_flight.minimum >= 3900
    assert made.stages.gpu is not None
    assert made.stages.gpu.minimum >= 4000
    # How much of it the layers account for is exact on virtual time alone: a real sleep ends late, which no layer has.
    assert made.layers.sum_us >= 4000
    assert made.layers.gpu_us >= 4000
    assert 0 < made.layers.ratio <= 1.01


async def test_a_mock_that_computes_nothing_says_so() -> None:
    backend = MockBackend(compute=False, clock=VirtualClock(), duration_s=0.001)
    async with serving(backend) as engine:
        made = await profile(engine, X, **SHORT)
    backend.close()
    assert [(layer.name, layer.mean_us) for layer in made.layers.layers] == [("zeros, nothing computed", 1000.0)]


async def test_enqueued_requests_have_their_steps_too(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, cuda_graphs=False) as engine:
        made = await profile(engine, X, requests=10, concurrency=2)
    assert made.ways == {"lane": 10}
    for each in made.timeline:
        assert each.launched is not None
        assert each.completed is not None
        assert each.submitted <= each.launched <= each.completed <= each.resumed
    assert made.engine.cuda_graphs is False


async def test_through_a_batcher(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, lanes=2) as engine, trtx.DynamicBatcher(engine, max_batch_size=8) as batcher:
        made = await profile(batcher, {"x": rows(1)}, requests=60, concurrency=8, runs=2)
        assert batcher._launcher.on_batch is None
    assert made.batches
    assert made.batch_rows is not None
    assert made.queue is None
    assert sum(made.ways.values()) == 60
    assert made.items_per_s == pytest.approx(made.throughput_per_s)
    assert {batch.lane for batch in made.batches} <= {0, 1}
    for batch in made.batches:
        assert 1 <= batch.rows <= batch.size <= 8
        assert batch.launched <= batch.completed
    assert sum(batch.rows for batch in made.batches) <= 60
    assert made.layers.unavailable is None
    assert ProfileReport.from_json(made.to_json()) == made
    assert "batches" in made.to_text()


async def test_shape_tensors_have_no_slot_and_are_profiled(mock_backend: MockBackend) -> None:
    inputs = {"x": np.zeros(6, np.float32), "shape": np.array([2, 3])}
    async with serving(mock_backend, build(reshape_model(), [RESHAPE])) as engine:
        made = await profile(engine, inputs, **SHORT)
    assert made.stages.unavailable is None
    assert made.layers.unavailable is None


async def test_outputs_of_unknown_size_are_refused_by_name(mock_backend: MockBackend) -> None:
    async with serving(mock_backend, build(nonzero_model(), [NONZERO])) as engine:
        made = await profile(engine, {"x": np.ones(5, np.float32)}, **SHORT)
    for part in (made.stages, made.layers):
        assert part.unavailable is not None
        assert "the size of output 'where' depends on data" in part.unavailable
    assert made.latency.count == 4


async def test_a_plan_with_one_context(mock_backend: MockBackend) -> None:
    """The lanes give theirs up for the passes, and go on afterwards."""
    async with serving(mock_backend, affine_plan(sharing=False)) as engine:
        made = await profile(engine, X, **SHORT)
        assert made.stages.unavailable is None
        assert made.layers.unavailable is None
        assert (await engine.infer(X))["y"].shape == (2, 4)
        with engine.create_execution_context(), pytest.raises(trtx.BorrowedError):
            await profile(engine, X, **SHORT)


async def test_no_memory_for_the_passes_is_told_by_name(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine:
        await engine.infer(X)
        mock_backend.inject(fail("cuMemHostAlloc", error=2, nth=1, count=None))
        await engine.infer(X)
        made = await profile(engine, X, requests=2, warmup=0, runs=1)
        mock_backend.clear_faults()
    assert made.stages.unavailable is not None
    assert "OUT_OF_MEMORY" in made.stages.unavailable


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"requests": 0}, "requests"),
        ({"requests": 1.5}, "requests"),
        ({"warmup": -1}, "warmup"),
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": True}, "concurrency"),
        ({"runs": 0}, "runs"),
        ({"interval_s": 0}, "interval_s"),
        ({"plan": "x.plan"}, "plan is a str; expected a Plan"),
        ({"inputs": {}}, "'x'"),
        ({"inputs": {"x": rows(2), "z": rows(2)}}, "'z'"),
        ({"inputs": {"x": rows(9)}}, "outside|9"),
        ({"inputs": {"x": rows(2).astype(np.float64)}}, "float64|FLOAT"),
        ({"engine": 3}, "engine is a int; expected an Engine"),
    ],
)
async def test_wrong_arguments(mock_backend: MockBackend, changes: dict[str, Any], words: str) -> None:
    async with serving(mock_backend) as engine:
        arguments: dict[str, Any] = {"engine": engine, "inputs": X, **changes}
        with pytest.raises(trtx.InvalidArgumentError, match=words):
            await profile(arguments.pop("engine"), arguments.pop("inputs"), **arguments)
        assert engine.statistics().completed == 0


async def test_a_closed_engine(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine:
        pass
    with pytest.raises(trtx.ClosedError):
        await profile(engine, X)


async def test_the_source_is_closed_however_it_ends(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(mock_backend) as engine:
        monkeypatch.setitem(sys.modules, "nvtx", None)
        for inputs, nvtx, error in (
            ({"x": rows(9)}, False, trtx.ShapeError), (X, True, trtx.BackendUnavailableError)
        ):  # fmt: skip
            source = FakeSource()
            with pytest.raises(error):
                await profile(engine, inputs, **SHORT, source=source, nvtx=nvtx)
            assert source.closed == 1
        source = FakeSource()
        await profile(engine, X, **SHORT, source=source)
        assert source.closed == 1


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_fault_ends_the_run(mock_backend: MockBackend, concurrency: int) -> None:
    source = FakeSource()
    async with serving(mock_backend) as engine:
        mock_backend.inject(fail("cuGraphLaunch", nth=6))
        with pytest.raises(trtx.TrtxError):
            await profile(engine, X, requests=40, warmup=2, concurrency=concurrency, source=source)
        assert source.closed == 1
        np.testing.assert_allclose((await engine.infer(X))["y"], X["x"] * 2 + 1)


async def test_a_fault_in_the_passes_is_raised_and_leaves_nothing(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine:
        await engine.infer(X)
        mock_backend.inject(fail("cuEventElapsedTime", nth=5))
        with pytest.raises(trtx.CudaError):
            await profile(engine, X, **SHORT)
        assert [each.kind for each in trtx.live_objects() if each.kind in ("Stream", "Event", "ExecutionContext")] == []


@pytest.mark.parametrize("call", ["set_profiler", "report_to_profiler"])
async def test_a_profiler_that_is_refused_is_told_by_name(mock_backend: MockBackend, call: str) -> None:
    async with serving(mock_backend) as engine:
        mock_backend.inject(fail(call))
        made = await profile(engine, X, **SHORT)
    assert made.layers.unavailable is not None
    assert call in made.layers.unavailable
    assert made.stages.unavailable is None


async def _cancelled_at(engine: trtx.Engine, reached: Any, **arguments: Any) -> None:
    task = asyncio.create_task(profile(engine, X, **arguments))
    while not reached():
        await asyncio.sleep(0.001)
        assert not task.done(), "it ended before it could be cancelled"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_cancelled_in_the_measured_run(concurrency: int) -> None:
    backend = MockBackend(duration_s=0.002)
    source = FakeSource()
    async with serving(backend) as engine:
        await _cancelled_at(
            engine, lambda: engine.statistics().completed > 6,
            requests=100_000, warmup=2, concurrency=concurrency, source=source,
        )  # fmt: skip
        assert source.closed == 1
        assert (await engine.infer(X))["y"].shape == (2, 4)
    backend.assert_clean()
    backend.close()


@pytest.mark.parametrize("part", ["stages", "layers"])
async def test_cancelled_in_a_pass(part: str) -> None:
    backend = MockBackend(duration_s=0.002)
    async with serving(backend) as engine:
        other = {"stages": "layers", "layers": "stages"}[part]
        await _cancelled_at(
            engine,
            lambda: any(each.kind == "ExecutionContext" for each in trtx.live_objects()),
            requests=1, warmup=0, runs=100_000, **{other: False},
        )  # fmt: skip
        kinds = {each.kind for each in trtx.live_objects()}
        assert not kinds & {"ExecutionContext", "Stream", "Event", "DeviceBuffer", "PinnedBuffer"}
    backend.assert_clean()
    backend.close()


@pytest.mark.parametrize("call", ["cuEventElapsedTime", "report_to_profiler"])
async def test_the_loop_goes_on_meanwhile(call: str) -> None:
    """While the passes run on a thread, other tasks of the loop do: one that opens the gate, for instance."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with serving(backend) as engine:
        backend.inject(slow(call, count=1))  # of the pass over stages, or of that over layers
        task = asyncio.create_task(profile(engine, X, **SHORT))
        await clock.wait_reached()
        for _ in range(1000):
            await asyncio.sleep(0)
        assert not task.done()
        clock.open()
        made = await task
    backend.assert_clean()
    backend.close()
    assert made.stages.unavailable is None
    assert made.layers.unavailable is None


def test_on_trio() -> None:
    trio = pytest.importorskip("trio")
    backend = MockBackend()

    async def main() -> ProfileReport:
        async with serving(backend) as engine:
            return await profile(engine, X, requests=10, concurrency=2, runs=2)

    made: ProfileReport = trio.run(main)
    backend.close()
    assert made.ways == {"graph": 10}
    assert made.layers.unavailable is None


# NVTX


class FakeNvtx(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("nvtx")
        self.open: dict[int, str] = {}
        self.seen: list[str] = []

    def start_range(self, message: str, domain: str) -> int:
        assert domain == "trtx_py"
        self.seen.append(message)
        self.open[len(self.seen)] = message
        return len(self.seen)

    def end_range(self, number: int) -> None:
        del self.open[number]


async def test_nvtx_ranges(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvtx()
    monkeypatch.setitem(sys.modules, "nvtx", fake)
    async with serving(mock_backend) as engine:
        await profile(engine, X, **SHORT, nvtx=True)
        assert fake.seen == [
            "trtx warm-up", "trtx measured run", *["request"] * 4, "trtx stages", "trtx layers"
        ]  # fmt: skip
        mock_backend.inject(fail("cuGraphLaunch"))
        with pytest.raises(trtx.TrtxError):
            await profile(engine, X, **SHORT, nvtx=True)
        fake.seen.clear()
        await profile(engine, X, **SHORT)
    assert fake.open == {}
    assert fake.seen == []


async def test_nvtx_that_is_not_installed(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    async with serving(mock_backend) as engine:
        with pytest.raises(trtx.BackendUnavailableError, match=r"pip install 'trtx-py\[nvtx\]'"):
            await profile(engine, X, nvtx=True)


def test_importing_trtx_py_imports_no_profiler() -> None:
    code = (
        "import sys, trtx_py\n"
        "assert not [name for name in sys.modules if name.startswith(('trtx_py.profiling', 'plotly', 'pynvml'))]\n"
        "from trtx_py import profile\n"
        "assert profile is sys.modules['trtx_py.profiling'].profile is trtx_py.profile\n"
        "assert not [name for name in sys.modules if name.startswith(('plotly', 'pynvml', 'nvtx'))]\n"
        "try:\n    trtx_py.nothing\nexcept AttributeError as error:\n    assert 'nothing' in str(error)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
