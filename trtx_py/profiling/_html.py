"""A report as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from . import _page
from ._device import DeviceReport
from ._page import Figure, Page, Part, Section, Table
from ._report import BatchTimes, ProfileReport, RequestTimes
from ._rows import blocks, headline, name_of, number, parts_of
from ._trace import steps_of

_TOP = 20
_DRAWN, _DRAWN_EACH = 120, 12  # requests, of all callers and of each: a timeline of more is a solid block


def as_html(report: ProfileReport) -> str:
    """The page. Raises BackendUnavailableError without plotly."""
    figures = {
        "Latency": _latency(report), "Parts of one inference": _stages(report), "Layers": _layers(report),
        "Device": _device(report.device),
    }  # fmt: skip
    sections = []
    for block in blocks(report, top=_TOP):
        parts: list[Part] = list(block.notes)
        if block.columns:
            parts.insert(0, Table(block.columns, block.rows))
        sections.append(Section(block.title, [*figures.get(block.title, ()), *parts]))
    if report.timeline:
        sections.insert(2, Section("Timeline", _timeline(report.timeline, report.batches)))
    return _page.render(Page(f"Profile of {name_of(report)}", headline(report), sections))


def _latency(report: ProfileReport) -> Sequence[Figure]:
    latency = report.latency
    scale, unit = (1e-3, "ms") if latency.p50 >= 1e3 else (1.0, "us")
    marks = {name: getattr(latency, name) * scale for name in ("p50", "p90", "p99")}
    shares = [float(percent) for percent in range(101)]
    return (
        _page.histogram(
            f"Latency of {latency.count} requests", unit, [edge * scale for edge in latency.edges], latency.counts,
            marks,
        ),
        _page.lines(
            "Share of requests that took no longer", unit, "% of requests",
            {name: ([value * scale for value in each.quantiles], shares) for name, each in parts_of(report).items()},
        ),
    )  # fmt: skip


def _stages(report: ProfileReport) -> Sequence[Figure]:
    stages = report.stages
    if stages.h2d is None or stages.gpu is None or stages.d2h is None:
        return ()
    found = {"copies in": stages.h2d.mean, "TensorRT": stages.gpu.mean, "copies out": stages.d2h.mean}
    return (
        _page.stacked(
            "Mean of each part on the GPU", "us", ["inference"], {name: [mean] for name, mean in found.items()}
        ),
    )


def _layers(report: ProfileReport) -> Sequence[Figure]:
    layers = sorted(report.layers.layers, key=lambda each: -each.mean_us)
    if not layers:
        return ()
    names = [f"{rank}. {each.name}" for rank, each in enumerate(layers[:_TOP], 1)]
    values = [each.share * 100 for each in layers[:_TOP]]
    if layers[_TOP:]:
        names.append(f"{len(layers) - _TOP} others")
        values.append(sum(each.share for each in layers[_TOP:]) * 100)
    return (_page.bars("Share of the layers' time", "%", names, values),)


def _timeline(timeline: Sequence[RequestTimes], batches: Sequence[BatchTimes]) -> Sequence[Part]:
    drawn = timeline[: min(_DRAWN, _DRAWN_EACH * len({each.worker for each in timeline}))]
    workers = sorted({each.worker for each in drawn})
    row = {worker: index for index, worker in enumerate(workers)}
    rows = [f"caller {worker}" for worker in workers]
    parts: dict[str, list[tuple[int, float, float, str]]] = {}
    for index, each in enumerate(drawn):
        for part, start, end in steps_of(each):
            parts.setdefault(part, []).append((row[each.worker], start / 1e3, end / 1e3, f"request {index}"))
    until = max(each.resumed for each in drawn)
    for number_, batch in enumerate(each for each in batches if each.launched <= until):
        lane = f"lane {batch.lane}"
        if lane not in rows:
            rows.append(lane)
        label = f"batch {number_}, {batch.rows} rows"
        parts.setdefault("batch", []).append((rows.index(lane), batch.launched / 1e3, batch.completed / 1e3, label))
    figure = _page.spans(f"The first {len(drawn)} requests, by caller", "ms", rows, parts)
    return (figure, "write_trace() has more of them, for Perfetto.")


def _device(device: DeviceReport) -> Sequence[Figure]:
    found = []
    for title, field, scale, unit in (
        ("GPU utilization", "gpu_utilization", 100.0, "%"), ("Power", "power_w", 1.0, "W"),
        ("SM clock", "sm_clock_mhz", 1.0, "MHz"), ("Temperature", "temperature_c", 1.0, "C"),
    ):  # fmt: skip
        points = [(each.at_s, value * scale) for each in device.samples if (value := getattr(each, field)) is not None]
        if len(points) > 1:
            xs, ys = zip(*points, strict=True)
            top = max(ys)
            figure = _page.lines(f"{title}, at most {number(top)} {unit}", "s", unit, {title: (xs, ys)}, markers=True)
            found.append(figure)
    return found
