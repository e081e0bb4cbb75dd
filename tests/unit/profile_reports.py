"""A report with every part filled in, from numbers made by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

from trtx_py.profiling import (
    BatchTimes,
    DeviceReport,
    DeviceSample,
    Distribution,
    LayerTime,
    LayerTimes,
    MemoryUse,
    ProfiledEngine,
    ProfileReport,
    RequestTimes,
    StageTimes,
)

#: What nobody may take for markup, or for anything but a name.
WICKED = "</script><script>alert(1)</script><img src=x onerror=alert(2)>|`*\x1b[31m%{x}"


def report(**changes: Any) -> ProfileReport:
    """100 requests of 1 to 100 us, two layers, a hot GPU; ``changes`` replace fields."""
    steps = Distribution.of([float(n) for n in range(1, 101)])
    one = Distribution.of([10.0, 20.0, 30.0])
    samples = tuple(
        DeviceSample(0.1 * n, 0.5, 0.25, 2**30, 300.0 + n, 1700, 2600, 60 + n, ("thermal",) if n == 2 else (), 2**20)
        for n in range(4)
    )
    made = ProfileReport(
        schema=1,
        made="2026-01-02T03:04:05+00:00",
        trtx_py="0.1.0",
        engine=ProfiledEngine("net", "mock", "1.0", "Mock GPU 0", "8.9", 2, "balanced", True, 2, {"x": (2, 4)}),
        requests=100,
        warmup=10,
        concurrency=2,
        duration_s=0.5,
        throughput_per_s=200.0,
        items_per_s=400.0,
        latency=steps,
        queue=one,
        in_flight=one,
        wake_up=one,
        batch_rows=None,
        ways={"graph": 99, "lane": 1},
        stages=StageTimes(3, 3, one, one, one, one, 0.25, 0.5, 0.25, "Somehow", None),
        layers=LayerTimes(
            3, 2, (LayerTime("conv", 30.0, 0.75), LayerTime("relu", 10.0, 0.25)), 40.0, 41.0, 40 / 41, None
        ),
        device=DeviceReport(0.1, samples, ("thermal",), None),
        memory=MemoryUse(2**20, 2**21, 2**22, 1000, 2000, 10, 20, 512, None),
        timeline=(
            RequestTimes(0, "graph", 0.0, 1.0, 8.0, 9.0),
            RequestTimes(1, "graph", 0.5, 2.0, 9.5, 10.0),
            RequestTimes(0, "lane", 9.0, 11.0, 20.0, 22.0),
        ),
        batches=(),
    )
    return dataclasses.replace(made, **changes)


def batched() -> ProfileReport:
    """Through a batcher: the steps of a request are not known, those of its batch are."""
    return report(
        queue=None,
        wake_up=None,
        batch_rows=Distribution.of([2.0, 3.0]),
        ways={"batch": 99, "direct": 1},
        timeline=(RequestTimes(0, "batcher", 0.0, None, None, 9.0), RequestTimes(1, "batcher", 0.5, None, None, 9.5)),
        batches=(BatchTimes(0, 2, 4, 1.0, 8.0), BatchTimes(1, 3, 4, 2.0, 9.0), BatchTimes(0, 1, 1, 3.0, 12.0)),
    )


def wicked() -> ProfileReport:
    """Names that come from a model whose maker means no good."""
    made = report()
    engine = dataclasses.replace(made.engine, name=WICKED, inputs={WICKED: (1,)})
    layers = dataclasses.replace(made.layers, layers=(LayerTime(WICKED, 30.0, 0.75), LayerTime(WICKED, 10.0, 0.25)))
    device = dataclasses.replace(made.device, throttled=(WICKED,))
    return dataclasses.replace(made, engine=engine, layers=layers, device=device)
