"""What a benchmark found: frozen values that go to a file and come back the same."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ._stats import Interval

Status = Literal["measured", "not available", "refused", "failed", "not measured"]

#: Quantiles of a distribution curve, from the smallest to the largest sample.
CURVE = 101


@dataclass(frozen=True)
class WarmUpResult:
    """How a contender warmed up.

    Attributes:
        stable: the last windows agreed; False: the time limit came first.
        requests: that were sent.
        seconds: that took.
        medians_us: the median of each window.
    """

    stable: bool
    requests: int
    seconds: float
    medians_us: tuple[float, ...]


@dataclass(frozen=True)
class Measurement:
    """The figures of one contender. Times in microseconds, from the caller's arrays to arrays that the caller owns;
    under an open loop from the intended arrival.

    Attributes:
        rounds, requests: how many, without warm-up.
        p50_us, p90_us, p95_us, p99_us: of all requests.
        mean_us, min_us, max_us: of all requests.
        requests_per_s, rows_per_s: medians over the rounds.
        round_p50_us, round_rows_per_s: one figure for each round, in the order in which they ran.
        curve_us: 101 quantiles from 0 to 1.
        cpu_us: CPU time of the whole process for each request, all threads together; median over the rounds. None in
            files that have none.
        late_p99_us: under an open loop, how late the load itself submitted requests; it is part of their times. None
            under a closed loop.
    """

    rounds: int
    requests: int
    p50_us: Interval
    p90_us: Interval
    p95_us: Interval
    p99_us: Interval
    mean_us: float
    min_us: float
    max_us: float
    requests_per_s: Interval
    rows_per_s: Interval
    round_p50_us: tuple[float, ...]
    round_rows_per_s: tuple[float, ...]
    curve_us: tuple[float, ...]
    late_p99_us: float | None = None
    cpu_us: float | None = None


@dataclass(frozen=True)
class Ratio:
    """One contender over another of the same run; below 1 is better for times, above 1 for throughput.

    Attributes:
        versus: the other's name.
        p50, p99: of times.
        rows_per_s: of throughput.
    """

    versus: str
    p50: Interval
    p99: Interval
    rows_per_s: Interval


@dataclass(frozen=True)
class Accuracy:
    """One output compared with the FP32 model by ``trtx_py.compare``.

    Attributes:
        output: its name.
        max_abs, relative: as in OutputError.
        snr_db: as there; None for no difference at all.
        top1: share of rows with the same largest entry; None where that means nothing.
        rows: how many were compared.
    """

    output: str
    max_abs: float
    relative: float
    snr_db: float | None
    top1: float | None
    rows: int


@dataclass(frozen=True)
class ContenderResult:
    """One contender.

    Attributes:
        name, kind, batch, precision: as in Contender.
        load: in words.
        options: serving and build options that were given, as texts.
        status: "measured"; "not available" (it cannot run here); "refused" (its outputs are wrong); "failed" (it
            raised); "not measured" (the run ended before).
        reason: why it is not measured; empty if it is.
        checked: how many answers were compared with the reference.
        max_error: the largest relative error among them; None if none was.
        tolerance: what was allowed.
        warmup, measurement, ratio: None where there is none.
        accuracy: for each output; empty where it was not asked for or not possible.
        no_accuracy: why there is none; empty where there is, or where nobody asked.
        device_bytes, pinned_bytes: the most memory that its engine had at a time; contenders with the same options
            share one. While a lane captures a graph, a second context's activations exist beside the first's. None
            without an engine.
        device_now_bytes: what the engine had of the device at the end of the run. None likewise, and in files that
            have none.
        graph_hits, graph_misses: requests that its engine served by replaying a CUDA graph, and those that it enqueued
            although they could have been captured; warm-up included.
    """

    name: str
    kind: str
    batch: int
    precision: str | None
    load: str
    options: Mapping[str, str]
    status: Status
    reason: str = ""
    checked: int = 0
    max_error: float | None = None
    tolerance: float | None = None
    warmup: WarmUpResult | None = None
    measurement: Measurement | None = None
    ratio: Ratio | None = None
    accuracy: tuple[Accuracy, ...] = ()
    no_accuracy: str = ""
    device_bytes: int | None = None
    pinned_bytes: int | None = None
    graph_hits: int | None = None
    graph_misses: int | None = None
    device_now_bytes: int | None = None


@dataclass(frozen=True)
class GpuState:
    """What NVML said during the run.

    Attributes:
        sm_clock_mhz: smallest and largest clock of the multiprocessors that was seen after a turn.
        max_sm_clock_mhz: what the GPU allows.
        temperature_c: the highest.
        power_w: the highest.
        throttled: reasons for lower clocks that were seen, such as "sw power cap".
    """

    sm_clock_mhz: tuple[int, int]
    max_sm_clock_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    throttled: tuple[str, ...]


@dataclass(frozen=True)
class Environment:
    """What the figures were taken on.

    Attributes:
        date: when it began, in UTC, by ISO 8601.
        command_line: of this process.
        python, platform, cpu, cpus: of this machine; ``cpus`` are those that this process may use.
        event_loop: the asyncio loop that the run was on, such as "asyncio" or "uvloop".
        load_average: of the last 1, 5 and 15 minutes, before the run.
        versions: of packages, by name; those that are not installed are left out.
        backend, tensorrt: which one ran, and the version that the plan was made for.
        gpu: name of the device.
        driver: the NVIDIA driver's version where NVML tells, else the CUDA version that it supports.
        gpu_state: None without NVML, and on the mock.
        warnings: what makes the figures less trustworthy.
    """

    date: str
    command_line: str
    python: str
    platform: str
    cpu: str
    cpus: int
    load_average: tuple[float, ...]
    versions: Mapping[str, str]
    backend: str
    tensorrt: str
    gpu: str
    driver: str
    event_loop: str = "asyncio"
    gpu_state: GpuState | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchmarkResult:
    """All of one run.

    Attributes:
        complete: all rounds were run.
        reason: why not, if not.
        meaningful: False on the mock, whose figures say nothing about speed.
        source: what was measured: a path, or a description of bytes.
        reference: what outputs were compared with.
        rounds: complete rounds.
        requests: of each contender in a round; more under many clients.
        seed, confidence: as in the spec.
        seconds: that the whole took.
        contenders: in the order of the spec.
        environment: what it ran on.
    """

    complete: bool
    reason: str
    meaningful: bool
    source: str
    reference: str
    rounds: int
    requests: int
    seed: int
    confidence: float
    seconds: float
    contenders: tuple[ContenderResult, ...]
    environment: Environment = field(repr=False)

    def contender(self, name: str) -> ContenderResult:
        """By name. Raises KeyError."""
        for each in self.contenders:
            if each.name == name:
                return each
        raise KeyError(name)

    def to_json(self) -> str:
        """As ``load_result`` reads it."""
        from ._files import to_json

        return to_json(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON in one step: a reader sees the old file or the whole new one. Raises InvalidArgumentError."""
        from ._files import save_result

        save_result(self, path)

    def text(self) -> str:
        """For a terminal."""
        from ._report import as_text

        return as_text(self)

    def markdown(self) -> str:
        """Tables for a page."""
        from ._report import as_markdown

        return as_markdown(self)

    def html(self) -> str:
        """One page with plots, which opens without a network. Raises BackendUnavailableError: plotly is missing."""
        from ._html import as_html

        return as_html(self)
