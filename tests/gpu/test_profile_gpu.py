"""Profiles of the kit's engines: on a GPU the layers account for TensorRT's time, and latencies are those of a loop.

On a GPU the reports are written to $OUT, so that they can be looked at.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.gpu.kit import Side, run
from trtx_py.profiling import ProfileReport, profile

#: Sum of the layers over the GPU time of the same inferences.
LAYERS_WITHIN = 0.05
#: Percentiles of the report against those of a loop around ``infer``; recorded, because a shared machine is noisy.
LATENCY_WITHIN = 0.03
_ENGINES = ("resnet50.fp16.vcx", "resnet50.int8.vcx", "bert_small.fp16.vcx", "mlp.fp32.vcx")
_ON_MOCK = ("mlp.fp32.vcx",)


def _keep(report: ProfileReport, name: str) -> None:
    if os.environ.get("OUT"):
        report.write_json(Path(os.environ["OUT"]) / f"profile-{name}.json")
        report.write_trace(Path(os.environ["OUT"]) / f"trace-{name}.json")


@pytest.mark.parametrize("name", _ENGINES)
def test_layers_add_up(side: Side, name: str, record: Callable[..., None]) -> None:
    if side.name == "mock" and name not in _ON_MOCK:
        pytest.skip("takes minutes to compute on a CPU")
    inputs = side.kit.inputs(side.kit.case(name))
    plan = side.plan(name)

    async def body() -> ProfileReport:
        async with side.runtime() as runtime, await runtime.deserialize(plan) as engine:
            return await profile(engine, inputs, requests=200, warmup=50, runs=50, plan=plan)

    report = run(body())
    record(
        f"{name} layers", layers=len(report.layers.layers), sum_us=report.layers.sum_us, gpu_us=report.layers.gpu_us,
        ratio=report.layers.ratio, unavailable=report.layers.unavailable or "",
        runs=report.layers.runs, ahead=report.layers.ahead,
        stage_gpu_us=0.0 if report.stages.gpu is None else report.stages.gpu.p50,
        enqueue_us=0.0 if report.stages.enqueue is None else report.stages.enqueue.p50,
        nvml=report.device.unavailable or "yes",
    )  # fmt: skip
    if side.name == "gpu":
        _keep(report, name)
    assert report.layers.unavailable is None
    assert report.layers.layers
    assert report.stages.unavailable is None
    if side.name == "gpu" and not name.startswith("mlp"):  # three layers of some microseconds: gaps are most of it
        assert report.layers.ratio == pytest.approx(1, abs=LAYERS_WITHIN)


@pytest.mark.parametrize("name", _ENGINES)
def test_percentiles_are_those_of_a_loop(side: Side, name: str, record: Callable[..., None]) -> None:
    """Loop and profile in turns, each three times; the medians of both."""
    if side.name == "mock" and name not in _ON_MOCK:
        pytest.skip("takes minutes to compute on a CPU")
    inputs = side.kit.inputs(side.kit.case(name))
    count = 1000 if side.name == "gpu" else 50

    async def body() -> tuple[np.ndarray, np.ndarray]:
        ours, outside = [], []
        plan = side.plan(name)
        async with side.runtime() as runtime, await runtime.deserialize(plan, completion="latency") as engine:
            for _ in range(3):
                report = await profile(engine, inputs, requests=count, warmup=50, stages=False, layers=False)
                ours.append((report.latency.p50, report.latency.p90, report.latency.p95, report.latency.p99))
                times = []
                for _ in range(count):
                    start = time.perf_counter_ns()
                    await engine.infer(inputs)
                    times.append((time.perf_counter_ns() - start) / 1e3)
                outside.append(np.percentile(times, [50, 90, 95, 99]))
        return np.median(ours, axis=0), np.median(outside, axis=0)

    ours, outside = run(body())
    apart = np.abs(ours - outside) / outside
    record(
        f"{name} percentiles", p50_us=float(ours[0]), loop_p50_us=float(outside[0]),
        p99_us=float(ours[3]), loop_p99_us=float(outside[3]),
        **{f"p{p}_apart": float(value) for p, value in zip((50, 90, 95, 99), apart, strict=True)},
        result="within" if apart[0] <= LATENCY_WITHIN else "apart",
    )  # fmt: skip
    assert np.isfinite(apart).all()
    if side.name == "gpu":
        assert apart[0] < 0.25, f"p50 {ours[0]:.1f} us, a loop around infer {outside[0]:.1f} us"


def test_device_is_watched(side: Side, record: Callable[..., None]) -> None:
    """NVML's figures, where its bindings are installed: plausible ones, of the right GPU."""
    inputs = side.kit.inputs(side.kit.case("mlp.fp32.vcx"))

    async def body() -> ProfileReport:
        async with side.runtime() as runtime, await runtime.deserialize(side.plan("mlp.fp32.vcx")) as engine:
            return await profile(
                engine, inputs, requests=20_000 if side.name == "gpu" else 20, stages=False, layers=False,
                interval_s=0.05,
            )  # fmt: skip

    seen = run(body()).device
    if side.name == "mock":
        assert seen.unavailable is not None
        return
    if seen.unavailable is not None:
        assert "pip install 'trtx-py[nvml]'" in seen.unavailable
        record("NVML", result=seen.unavailable)
        return
    power, clock = seen.extremes("power_w"), seen.extremes("sm_clock_mhz")
    assert power is not None
    assert clock is not None
    assert 20 < power[2] < 2000
    assert 100 < clock[2] < 5000
    record("NVML", samples=len(seen.samples), power_w=power[1], sm_clock_mhz=clock[1], throttled=str(seen.throttled))
