"""What ``profile`` found, as data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .._arguments import checked_path, replace_file
from ._codec import dumps, loads
from ._device import DeviceReport
from ._distribution import Distribution

#: Version of the JSON form; one more whenever a field changes its meaning, comes or goes.
SCHEMA = 1


@dataclass(frozen=True)
class ProfiledEngine:
    """What was profiled.

    Attributes:
        name: of the network; may be empty.
        backend, version: which TensorRT ran it.
        device, compute_capability: on which GPU.
        lanes, completion, cuda_graphs: how it serves, see EngineOptions.
        layers: layers after optimization, as the engine counts them.
        inputs: shape of each input, by name.
    """

    name: str
    backend: str
    version: str
    device: str
    compute_capability: str
    lanes: int
    completion: str
    cuda_graphs: bool
    layers: int
    inputs: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class RequestTimes:
    """One request of the measured run; microseconds since the run began.

    Attributes:
        worker: which of the ``concurrency`` callers sent it, from 0.
        way: "graph": a captured graph, launched by the caller; "lane": a lane's thread, which enqueues, replays a
            graph for large inputs, or captures; "batcher": with others, or past them.
        submitted: before ``infer``'s first step.
        launched: when the launch began ("graph"), or a lane's thread took it ("lane"); None where its batch knows.
        completed: when somebody saw that the GPU was done ("graph"), or the outputs were there ("lane"); likewise.
        resumed: when the awaiting task ran again, with the outputs.
    """

    worker: int
    way: str
    submitted: float
    launched: float | None
    completed: float | None
    resumed: float


@dataclass(frozen=True)
class BatchTimes:
    """One launch of a batcher's in the measured run; microseconds since the run began.

    Attributes:
        lane: which of the lanes, counted from 0 in the order that they were first seen.
        rows: that were wanted of it.
        size: rows that were computed, padding included.
        launched: when the launch began.
        completed: when somebody saw that the GPU was done.
    """

    lane: int
    rows: int
    size: int
    launched: float
    completed: float


@dataclass(frozen=True)
class StageTimes:
    """Parts of one inference, in microseconds, measured with CUDA events on a context and a stream of their own.

    Not what a request of the measured run took: there, one graph holds all of it, and nothing can be put between its
    parts. Here TensorRT enqueues kernel by kernel, while the GPU is kept busy, so that it does not wait for the CPU.

    Attributes:
        runs: how many inferences were measured.
        ahead: in how many of them all was enqueued before the GPU began; times of others contain waiting for the CPU.
        enqueue: CPU time of the call of enqueueV3.
        h2d: all inputs from pinned memory to the device.
        gpu: TensorRT's part.
        d2h: all outputs back to pinned memory.
        h2d_share, gpu_share, d2h_share: of the three means together, 0 to 1.
        how: the measurement, in a sentence.
        unavailable: why nothing was measured; the distributions are None then.
    """

    runs: int
    ahead: int
    enqueue: Distribution | None
    h2d: Distribution | None
    gpu: Distribution | None
    d2h: Distribution | None
    h2d_share: float
    gpu_share: float
    d2h_share: float
    how: str
    unavailable: str | None


@dataclass(frozen=True)
class LayerTime:
    """One layer, by the name that TensorRT gives it.

    Attributes:
        name: several layers may have been fused into it.
        mean_us: microseconds for each inference.
        share: of the sum over all layers, 0 to 1.
    """

    name: str
    mean_us: float
    share: float


@dataclass(frozen=True)
class LayerTimes:
    """Layer times by TensorRT's IProfiler, from a pass of its own: timing layers makes them slower.

    Attributes:
        runs: inferences of the pass.
        ahead: as in StageTimes.
        layers: in the order they ran.
        sum_us: of all layers, mean of the runs.
        gpu_us: TensorRT's part of the same inferences, between two CUDA events around each; mean.
        ratio: ``sum_us`` / ``gpu_us``; 1 when the layers account for all of it. 0 without a GPU time.
        unavailable: why there are none, None if there are.
    """

    runs: int
    ahead: int
    layers: tuple[LayerTime, ...]
    sum_us: float
    gpu_us: float
    ratio: float
    unavailable: str | None


@dataclass(frozen=True)
class MemoryUse:
    """Bytes. Peaks of device and pinned memory are since the device was opened; None where it is not known.

    Attributes:
        host_rss: resident memory of this process after the measured run.
        host_peak: the most that any sample of the run saw, beside ``host_rss``.
        host_process_peak: the most since the process began.
        device, device_peak: allocated through the engine's runtime; with TensorRT's own as far as it tells.
        pinned, pinned_peak: page-locked host memory, likewise.
        context: activation memory of one execution context.
        budget: of device memory; None without one.
    """

    host_rss: int | None
    host_peak: int | None
    host_process_peak: int | None
    device: int
    device_peak: int
    pinned: int
    pinned_peak: int
    context: int
    budget: int | None


@dataclass(frozen=True)
class ProfileReport:
    """What ``await profile(engine, inputs)`` found.

    Attributes:
        schema: version of this form in JSON.
        made: when, UTC, ISO 8601.
        trtx_py: version that made it.
        engine: what was profiled.
        requests, warmup, concurrency: the load: requests that were measured and that were not, and callers at once,
            each of which sends its next request when it has its result.
        duration_s: of the measured run.
        throughput_per_s: requests over ``duration_s``.
        items_per_s: the same times the rows of one request; None unless the engine declares its ``batch_axis``.
        latency: microseconds from before ``infer``'s first step until the awaiting task runs again.
        queue: microseconds until the launch began: checking and copying the inputs, and waiting for a slot. None
            through a batcher.
        in_flight: microseconds from the launch until somebody saw that it was done. Through a batcher: of batches;
            None if there were none.
        wake_up: microseconds from there until the awaiting task ran again, with copies of the outputs. None through a
            batcher.
        batch_rows: rows that were wanted of each batch; None without batches.
        ways: how many requests went which way, see RequestTimes; through a batcher "batch" and, for those that met an
            idle engine, "direct".
        stages: parts of one inference.
        layers: TensorRT's layers.
        device: what the GPU did meanwhile, by NVML.
        memory: what was taken.
        timeline: the first requests of the measured run, for the trace.
        batches: the first batches of the measured run, likewise.
    """

    schema: int
    made: str
    trtx_py: str
    engine: ProfiledEngine
    requests: int
    warmup: int
    concurrency: int
    duration_s: float
    throughput_per_s: float
    items_per_s: float | None
    latency: Distribution
    queue: Distribution | None
    in_flight: Distribution | None
    wake_up: Distribution | None
    batch_rows: Distribution | None
    ways: Mapping[str, int]
    stages: StageTimes
    layers: LayerTimes
    device: DeviceReport
    memory: MemoryUse
    timeline: tuple[RequestTimes, ...]
    batches: tuple[BatchTimes, ...]

    def to_json(self, *, indent: int | None = 1) -> str:
        """All of it; ``from_json`` reads it."""
        return dumps(self, indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> ProfileReport:
        """A report from ``to_json``'s text. Raises InvalidArgumentError: not JSON, another schema, a field is wrong."""
        return loads(cls, text, "profile report", SCHEMA)

    def to_text(self, *, top: int = 20) -> str:
        """For a terminal, at most 100 columns wide; the ``top`` slowest layers."""
        from ._text import as_text

        return as_text(self, top=top)

    def to_markdown(self, *, top: int = 20) -> str:
        """For a page or an issue; the ``top`` slowest layers."""
        from ._text import as_markdown

        return as_markdown(self, top=top)

    def to_html(self) -> str:
        """One page with plots that opens without a network. Raises BackendUnavailableError without plotly.

        Takes tenths of a second and holds 5 MB: in a coroutine use ``asyncio.to_thread``.
        """
        from ._html import as_html

        return as_html(self)

    def to_trace(self) -> str:
        """The timeline for Perfetto and Chrome's ``about:tracing``: JSON of trace events."""
        from ._trace import as_trace

        return as_trace(self)

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_json()``; the file is replaced as a whole. Raises InvalidArgumentError if it cannot be."""
        _write(path, self.to_json(), "profile report")

    def write_html(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_html()``; likewise."""
        _write(path, self.to_html(), "page")

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_trace()``; likewise. Open it at ui.perfetto.dev, which reads it in the browser."""
        _write(path, self.to_trace(), "trace")

    def __str__(self) -> str:
        return self.to_text()


def _write(path: str | os.PathLike[str], text: str, what: str) -> None:
    replace_file(checked_path(path, "path"), text.encode(), what)
