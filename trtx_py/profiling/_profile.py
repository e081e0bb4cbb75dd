"""``profile``: a measured run, and passes of their own for what a measured run cannot tell."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

import anyio
import numpy as np

from .._aio import run_shielded
from .._arguments import checked_int
from .._engine import Engine
from .._errors import BackendUnavailableError, InvalidArgumentError
from .._plan import Plan
from .._types import Array
from ..serving._batcher import DynamicBatcher
from ._device import DeviceReport, DeviceSampler, DeviceSource, NvmlSource, checked_interval
from ._distribution import Distribution
from ._host import host_memory
from ._load import Load, batches_of, requests_of
from ._nvtx import NoRanges, NvtxRanges, Ranges
from ._passes import measure_layers, measure_stages, no_layers, no_stages
from ._probe import refusal
from ._report import SCHEMA, MemoryUse, ProfiledEngine, ProfileReport, RequestTimes

#: Requests that the report keeps one by one; a trace of more is no easier to read.
_TIMELINE = 500


async def profile(
    engine: Engine | DynamicBatcher,
    inputs: Mapping[str, Any],
    *,
    requests: int = 200,
    warmup: int = 20,
    concurrency: int = 1,
    stages: bool = True,
    layers: bool = True,
    runs: int = 20,
    plan: Plan | None = None,
    interval_s: float = 0.1,
    source: DeviceSource | None = None,
    nvtx: bool = False,
) -> ProfileReport:
    """Measure how an engine serves one kind of request, and where the time goes.

    First ``warmup`` requests, then the measured run of ``requests``, both by ``engine.infer``'s own steps, with the GPU
    watched beside; then, on a context that serves nobody, inferences with CUDA events between their parts, and
    inferences with a profiler. The engine may serve others meanwhile, which will show in the figures. A plan that does
    not share optimization profiles has one context: its lanes give up theirs for these passes and capture again later.

    Args:
        engine: stays open. Of a batcher, requests go through ``batcher.infer`` and the passes go past it; their inputs
            are one request's.
        inputs: host arrays as ``engine.infer`` takes them; the same for every request.
        requests: measured requests, at least 1; p99 wants a hundred or more.
        warmup: requests before them that do not count; the shape is captured on every lane after the first.
        concurrency: callers at once, each of which waits for its result before it sends the next request.
        stages: measure copies and TensorRT's part with CUDA events.
        layers: time layers with TensorRT's IProfiler.
        runs: inferences of each of these two passes.
        plan: what ``engine`` was made of. Only where nobody knows whether a profiler lives through the libraries at
            hand: then it is tried in a process of its own, which loads the plan.
        interval_s: seconds between two looks at the GPU.
        source: what to ask about the GPU; None: NVML, if it is there. Closed at the end in any case.
        nvtx: mark phases and requests for Nsight Systems, through the ``nvtx`` package; costs nothing when off.
    Returns:
        A report. What could not be measured here says so in it: no NVML, no profiler in this flavour, an output whose
        size depends on data.
    Raises:
        InvalidArgumentError, DTypeError, ShapeError: an argument or an input is wrong; nothing ran.
        BackendUnavailableError: ``nvtx=True`` and there is no such package.
        ExecutionError, CudaError, ClosedError: as ``engine.infer``; the first failure ends the run.
    Cancellation: delivered once nothing of it runs any more, with everything it had opened closed.
    Source: nvinfer1::IProfiler, cuEventElapsedTime, NVML
    """
    given: Any = source
    if given is not None and not (callable(getattr(given, "look", None)) and callable(getattr(given, "close", None))):
        raise InvalidArgumentError(f"source is a {type(given).__name__}; expected one with look(at_s) and close()")
    try:
        setup = _Setup(engine, inputs, requests, warmup, concurrency, runs, interval_s, plan)
        own = setup.engine
        ranges: Ranges = NvtxRanges() if nvtx else NoRanges()
        sampler = await run_shielded(lambda: _sampler(own, interval_s, source))
    except BaseException:
        if source is not None:
            source.close()
        raise
    try:
        with ranges.span("trtx warm-up"):
            if setup.warmup:
                await Load(engine, setup.arrays, 1, NoRanges()).run(1)
                await setup.capture()
                await Load(engine, setup.arrays, setup.warmup - 1, NoRanges()).run(setup.concurrency)
        await run_shielded(sampler.start)
        load = Load(engine, setup.arrays, setup.requests, ranges)
        bypassed = setup.bypassed()
        began_ns = time.perf_counter_ns()
        with ranges.span("trtx measured run"):
            await load.run(setup.concurrency)
        duration_s = (time.perf_counter_ns() - began_ns) / 1e9
        bypassed = setup.bypassed() - bypassed
    finally:
        with anyio.CancelScope(shield=True):
            await run_shielded(sampler.stop)
    memory = _memory(own, sampler.report())
    stage_times, layer_times = no_stages(), no_layers()
    stop = threading.Event()
    if stages:
        with ranges.span("trtx stages"):
            stage_times = await run_shielded(lambda: measure_stages(own, setup.arrays, setup.runs, stop), stop.set)
    if layers:
        refused = await refusal(own, plan, setup.arrays)
        if refused is not None:
            layer_times = no_layers(refused)
        else:
            with ranges.span("trtx layers"):
                layer_times = await run_shielded(lambda: measure_layers(own, setup.arrays, setup.runs, stop), stop.set)
    times, batches = requests_of(load, began_ns), batches_of(load, began_ns)
    throughput = setup.requests / duration_s
    rows = setup.rows()
    return ProfileReport(
        schema=SCHEMA,
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        trtx_py=_version(),
        engine=setup.described(),
        requests=setup.requests,
        warmup=setup.warmup,
        concurrency=setup.concurrency,
        duration_s=duration_s,
        throughput_per_s=throughput,
        items_per_s=None if rows is None else throughput * rows,
        latency=Distribution.of([each.resumed - each.submitted for each in times]),
        queue=_over(each.launched - each.submitted for each in times if each.launched is not None),
        in_flight=_over(
            each.completed - each.launched
            for each in (batches if setup.batcher is not None else times)
            if each.launched is not None and each.completed is not None
        ),
        wake_up=_over(each.resumed - each.completed for each in times if each.completed is not None),
        batch_rows=_over(float(each.rows) for each in batches),
        ways=_ways(times) if setup.batcher is None else _batched(setup.requests, bypassed),
        stages=stage_times,
        layers=layer_times,
        device=sampler.report(),
        memory=memory,
        timeline=tuple(times[:_TIMELINE]),
        batches=tuple(batches[:_TIMELINE]),
    )


class _Setup:
    """The checked arguments."""

    def __init__(
        self,
        target: Engine | DynamicBatcher,
        inputs: Mapping[str, Any],
        requests: int,
        warmup: int,
        concurrency: int,
        runs: int,
        interval_s: float,
        plan: Plan | None,
    ) -> None:
        if not isinstance(target, (Engine, DynamicBatcher)):
            raise InvalidArgumentError(
                f"engine is a {type(target).__name__}; expected an Engine, as trtx.open_engine(path) gives, or a "
                "DynamicBatcher"
            )
        target._handle.require_open()
        self.batcher = target if isinstance(target, DynamicBatcher) else None
        engine = target.engine if isinstance(target, DynamicBatcher) else target
        self.requests = checked_int(requests, "requests", minimum=1)
        self.warmup = checked_int(warmup, "warmup", minimum=0)
        self.concurrency = checked_int(concurrency, "concurrency", minimum=1, maximum=10_000)
        self.runs = checked_int(runs, "runs", minimum=1)
        checked_interval(interval_s)
        if plan is not None and not isinstance(plan, Plan):
            raise InvalidArgumentError(
                f"plan is a {type(plan).__name__}; expected a Plan, as trtx.Plan.load(path) gives"
            )
        self.engine = engine
        self.arrays: dict[str, Array] = {}
        for name, array in engine._front.checked(inputs)[0].items():
            if not isinstance(array, np.ndarray):
                raise InvalidArgumentError(f"input {name!r} lies on a device; profile takes host arrays")
            self.arrays[name] = np.array(array)  # a copy: it is read for as long as this takes

    async def capture(self) -> None:
        """The shape on every lane, so that no capture falls into the measured run."""
        if self.batcher is not None:
            await self.batcher.warmup()
        else:
            await self.engine._front.capture(self.arrays)

    def bypassed(self) -> int:
        """Requests that met an idle engine, so far."""
        return 0 if self.batcher is None else self.batcher.statistics().bypassed

    def rows(self) -> int | None:
        """Rows of one request, where it is declared which axis counts them, or the batcher counts the first."""
        axis = self.engine._options.batch_axis if self.batcher is None else 0
        sizes = {array.shape[axis] for array in self.arrays.values() if array.ndim} if axis is not None else set()
        return int(next(iter(sizes))) if len(sizes) == 1 else None

    def described(self) -> ProfiledEngine:
        """The engine, as the report names it."""
        engine, runtime = self.engine, self.engine.runtime
        options = engine._options
        return ProfiledEngine(
            name=engine.name,
            backend=runtime.backend.name,
            version=runtime.version,
            device=runtime.device.name,
            compute_capability=runtime.device.compute_capability,
            lanes=options.lanes,
            completion=options.completion,
            cuda_graphs=options.cuda_graphs,
            layers=engine.num_layers,
            inputs={name: tuple(int(size) for size in array.shape) for name, array in self.arrays.items()},
        )


def _over(values: Iterable[float]) -> Distribution | None:
    found = list(values)
    return Distribution.of(found) if found else None


def _batched(requests: int, bypassed: int) -> dict[str, int]:
    return {name: count for name, count in (("batch", requests - bypassed), ("direct", bypassed)) if count > 0}


def _sampler(engine: Engine, interval_s: float, source: DeviceSource | None) -> DeviceSampler:
    if source is not None:
        return DeviceSampler(source, interval_s)
    try:
        return DeviceSampler(NvmlSource(engine.runtime.device), interval_s)
    except BackendUnavailableError as error:
        return DeviceSampler(None, interval_s, unavailable=error.message)


def _memory(engine: Engine, seen: DeviceReport) -> MemoryUse:
    device = engine.runtime.device
    on_device, pinned, host = device.memory_statistics(), device.pinned_statistics(), host_memory()
    peaks = [sample.host_rss for sample in seen.samples if sample.host_rss is not None]
    return MemoryUse(
        host_rss=None if host is None else host[0],
        host_peak=None if host is None else max([*peaks, host[0]]),
        host_process_peak=None if host is None else host[1],
        device=on_device.current_bytes,
        device_peak=on_device.peak_bytes,
        pinned=pinned.current_bytes,
        pinned_peak=pinned.peak_bytes,
        context=engine.device_memory_bytes(),
        budget=on_device.budget_bytes,
    )


def _ways(times: list[RequestTimes]) -> dict[str, int]:
    return dict(sorted(Counter(each.way for each in times).items()))


def _version() -> str:
    import trtx_py

    return trtx_py.__version__
