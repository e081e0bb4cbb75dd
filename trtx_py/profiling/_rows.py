"""A report as titled tables of text, which the text, markdown and HTML forms share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ._device import DeviceReport
from ._distribution import Distribution
from ._report import LayerTimes, MemoryUse, ProfileReport, StageTimes


@dataclass(frozen=True)
class Block:
    """One section: a title, sentences, and a table whose first column names the row.

    Attributes:
        columns: of the table; empty for none.
        rows: as many texts as columns, each.
        notes: sentences below.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def blocks(report: ProfileReport, *, top: int) -> list[Block]:
    """All sections; ``top`` of the layers, the slowest first."""
    return [
        Block("Load", ("", ""), tuple(_load(report)), _warnings(report)),
        _latency(report),
        _stages(report.stages),
        _layers(report.layers, top),
        _device(report.device),
        Block("Memory", ("", "now", "peak"), tuple(_memory(report.memory))),
    ]


def headline(report: ProfileReport) -> str:
    """The report in one line."""
    latency = report.latency
    return f"p50 {duration(latency.p50)}, p99 {duration(latency.p99)}, {_rate(report)}"


def _rate(report: ProfileReport) -> str:
    rate = f"{number(report.throughput_per_s)} requests/s"
    return rate if report.items_per_s is None else f"{rate}, {number(report.items_per_s)} rows/s"


def name_of(report: ProfileReport) -> str:
    """What was profiled, for titles."""
    return report.engine.name or "unnamed engine"


def _load(report: ProfileReport) -> Iterator[tuple[str, str]]:
    engine = report.engine
    yield "engine", f"{name_of(report)}, {engine.layers} layers"
    yield "backend", f"{engine.backend} {engine.version}"
    yield "device", f"{engine.device}, compute capability {engine.compute_capability}"
    for name, shape in engine.inputs.items():
        yield f"input {name}", " x ".join(map(str, shape)) or "one number"
    yield (
        "serving",
        (f"lanes {engine.lanes}, completion {engine.completion}, CUDA graphs {'on' if engine.cuda_graphs else 'off'}"),
    )
    yield "requests", f"{report.requests} after {report.warmup} that do not count, {report.concurrency} at once"
    yield "went through", ", ".join(f"{count} by {_WAYS.get(way, way)}" for way, count in report.ways.items())
    yield "took", f"{report.duration_s:.3f} s"
    yield "throughput", _rate(report)
    yield "made", f"{report.made}, trtx_py {report.trtx_py}"


_WAYS = {
    "graph": "captured graphs",
    "lane": "a lane's thread",
    "batch": "batches",
    "direct": "the way past the batcher",
}


def _warnings(report: ProfileReport) -> tuple[str, ...]:
    found = []
    if report.device.throttled:
        found.append(
            f"The GPU slowed down during the run ({', '.join(report.device.throttled)}): figures of another run differ."
        )
    if report.device.clocks_set_by_hand:
        found.append("Clocks were set by hand.")
    if report.requests < 100:
        found.append(f"p99 of {report.requests} requests is little more than the slowest of them.")
    return tuple(found)


def _latency(report: ProfileReport) -> Block:
    return Block(
        "Latency",
        ("", "p50", "p90", "p95", "p99", "mean", "max"),
        tuple((name, *_figures(each)) for name, each in parts_of(report).items()),
        (
            "From before infer's first step until the awaiting task runs again. Until the launch: inputs are checked "
            "and copied, and a slot is waited for. In flight: until somebody saw that the GPU was done. Wake-up: until "
            "the task ran, with the outputs copied.",
            *((f"{report.batch_rows.mean:.1f} rows in a batch on average.",) if report.batch_rows is not None else ()),
        ),
    )


def parts_of(report: ProfileReport) -> dict[str, Distribution]:
    """The latency and what it is made of, as far as it is known."""
    flight = "in flight" if report.batch_rows is None else "in flight, batches"
    found = {
        "latency": report.latency, "until the launch": report.queue, flight: report.in_flight, "wake-up": report.wake_up
    }  # fmt: skip
    return {name: each for name, each in found.items() if each is not None}


def _figures(each: Distribution) -> tuple[str, ...]:
    return tuple(duration(value) for value in (each.p50, each.p90, each.p95, each.p99, each.mean, each.maximum))


def _stages(stages: StageTimes) -> Block:
    title = "Parts of one inference"
    h2d, gpu, d2h, enqueue = stages.h2d, stages.gpu, stages.d2h, stages.enqueue
    if h2d is None or gpu is None or d2h is None or enqueue is None:
        return Block(title, (), (), (f"Not measured: {stages.unavailable}.",))
    shares = (stages.h2d_share, stages.gpu_share, stages.d2h_share)
    return Block(
        title,
        ("", "share", "p50", "p90", "p95", "p99", "mean", "max"),
        (
            *(
                (name, percent(share), *_figures(each))
                for name, share, each in zip(
                    ("copies in (H2D)", "TensorRT on the GPU", "copies out (D2H)"), shares, (h2d, gpu, d2h), strict=True
                )
            ),
            ("enqueue, CPU", "", *_figures(enqueue)),
        ),
        (f"{stages.runs} inferences. {stages.how}.", *_behind(stages)),
    )


def _layers(layers: LayerTimes, top: int) -> Block:
    if layers.unavailable is not None:
        return Block("Layers", (), (), (f"Not measured: {layers.unavailable}.",))
    slowest = sorted(layers.layers, key=lambda each: -each.mean_us)
    rows = [(each.name, duration(each.mean_us), percent(each.share)) for each in slowest[:top]]
    rest = slowest[top:]
    if rest:
        mean, share = sum(each.mean_us for each in rest), sum(each.share for each in rest)
        rows.append((f"{len(rest)} others", duration(mean), percent(share)))
    return Block(
        "Layers",
        ("layer", "mean", "share"),
        tuple(rows),
        (
            f"Sum of {len(layers.layers)} layers {duration(layers.sum_us)}, GPU time of the same {layers.runs} "
            f"inferences {duration(layers.gpu_us)}: ratio {layers.ratio:.3f}. Timing layers slows an inference down: "
            "compare them with each other, not with the latency.",
            *_behind(layers),
        ),
    )


def _behind(found: StageTimes | LayerTimes) -> tuple[str, ...]:
    late = found.runs - found.ahead
    return (
        (f"In {late} of {found.runs} inferences the GPU waited for the CPU: their times contain that.",) if late else ()
    )


_FIELDS = (
    ("GPU utilization", "gpu_utilization", 100.0, "%"), ("memory utilization", "memory_utilization", 100.0, "%"),
    ("device memory, all processes", "memory_bytes", 1e-6, "MB"), ("power", "power_w", 1.0, "W"),
    ("SM clock", "sm_clock_mhz", 1.0, "MHz"), ("memory clock", "memory_clock_mhz", 1.0, "MHz"),
    ("temperature", "temperature_c", 1.0, "C"),
)  # fmt: skip


#: NVML's utilization is that of its own last sampling period, which may last that long.
_AVERAGED_S = 1.0


def _device(device: DeviceReport) -> Block:
    rows = []
    for label, field, scale, unit in _FIELDS:
        found = device.extremes(field)
        if found is not None:
            rows.append((label, *(f"{number(value * scale)} {unit}" for value in found)))
    if device.unavailable is not None:
        note = f"Not known: {device.unavailable}."
    else:
        slow = f"throttled: {', '.join(device.throttled)}" if device.throttled else "no throttling was seen"
        note = f"{len(device.samples)} samples by NVML, {device.interval_s:g} s apart; {slow}."
    notes = [note]
    if device.extremes("gpu_utilization") is not None and device.samples[-1].at_s < _AVERAGED_S:
        notes.append("NVML averages utilization over up to a second, and this run was shorter: what was before counts.")
    return Block("Device", ("", "least", "mean", "most") if rows else (), tuple(rows), tuple(notes))


def _memory(memory: MemoryUse) -> Iterator[tuple[str, str, str]]:
    yield "host, resident", nbytes(memory.host_rss), nbytes(memory.host_peak)
    yield "host, since the process began", "", nbytes(memory.host_process_peak)
    yield "device, this runtime", nbytes(memory.device), nbytes(memory.device_peak)
    yield "pinned, this runtime", nbytes(memory.pinned), nbytes(memory.pinned_peak)
    yield "activations of one context", nbytes(memory.context), ""
    if memory.budget is not None:
        yield "budget of device memory", nbytes(memory.budget), ""


def duration(us: float) -> str:
    """Microseconds in the unit that reads best."""
    if abs(us) >= 1e6:
        return f"{us / 1e6:.3f} s"
    if abs(us) >= 1e3:
        return f"{us / 1e3:.3f} ms"
    return f"{us:.1f} us"


def number(value: float) -> str:
    """Three digits or more, with commas."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share of 0 to 1."""
    return f"{share * 100:.1f} %"


def nbytes(value: int | None) -> str:
    """Bytes in the unit that reads best."""
    if value is None:
        return "not known"
    size = float(value)
    for unit in ("bytes", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Of each column, in characters."""
    return [max(map(len, each)) for each in zip(columns, *rows, strict=True)]
