"""A report as trace events, which Perfetto and Chrome draw."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ._report import LayerTimes, ProfileReport, RequestTimes, StageTimes

_HOST, _GPU, _PASS, _DEVICE = 1, 2, 3, 4
_PASS_STREAM, _PASS_LAYERS = 1, 2


def as_trace(report: ProfileReport) -> str:
    """JSON in the trace event format: complete events (X), counters (C) and names (M); times in microseconds.

    Four processes: requests by caller; requests and batches on the lanes, until their completion was seen; one mean
    inference of the separate passes with its layers, drawn after the run; and what NVML said.
    """
    events = [
        *_requests(report.timeline),
        *_flights(report),
        *_passes(report.stages, report.layers, report.duration_s * 1e6),
        *_counters(report),
    ]
    return json.dumps(
        {
            "traceEvents": events,
            "displayTimeUnit": "ns",
            "otherData": {
                "engine": report.engine.name,
                "device": report.engine.device,
                "made": report.made,
                "requests": report.requests,
                "requests_drawn": len(report.timeline),
            },
        },
        allow_nan=False,
    )


def _requests(timeline: Sequence[RequestTimes]) -> Iterator[dict[str, Any]]:
    yield _process(_HOST, "requests, by caller")
    for worker in sorted({each.worker for each in timeline}):
        yield _thread(_HOST, worker + 1, f"caller {worker}")
    for number, each in enumerate(timeline):
        tid = each.worker + 1
        yield _slice(_HOST, tid, f"request {number}", each.submitted, each.resumed, "request", way=each.way)
        if each.launched is not None:
            for part, start, end in steps_of(each):
                yield _slice(_HOST, tid, part, start, end, "step")


def steps_of(each: RequestTimes) -> list[tuple[str, float, float]]:
    """Name, start and end of what is known of a request, one after another."""
    if each.launched is None or each.completed is None:
        return [("waiting and in flight", each.submitted, each.resumed)]
    return [
        ("until the launch", each.submitted, each.launched),
        ("in flight", each.launched, each.completed),
        ("wake-up", each.completed, each.resumed),
    ]


def _flights(report: ProfileReport) -> Iterator[dict[str, Any]]:
    """What was launched and not yet seen to be done: batches by lane; requests of one lane, or of all together."""
    lanes = report.engine.lanes
    group = 0 if lanes == 1 else None
    flights = [(each.lane, f"batch {n}", each.launched, each.completed, {"rows": each.rows, "size": each.size})
               for n, each in enumerate(report.batches)] + [
        (group, f"request {n}", each.launched, each.completed, {"way": each.way})
        for n, each in enumerate(report.timeline) if each.launched is not None and each.completed is not None
    ]  # fmt: skip
    if not flights:
        return
    yield _process(_GPU, f"launched and not seen to be done, {lanes} lane{'s' if lanes > 1 else ''}")
    rows: list[tuple[int | None, float]] = []  # of which lane, and until when it is taken
    for lane, name, start, end, args in sorted(flights, key=lambda each: each[2]):
        row = next((n for n, (owner, at) in enumerate(rows) if owner == lane and at <= start), len(rows))
        if row == len(rows):
            rows.append((lane, 0.0))
            yield _thread(_GPU, row + 1, "some lane" if lane is None else f"lane {lane}")
        rows[row] = lane, end
        yield _slice(_GPU, row + 1, name, start, end, "gpu", **args)


def _passes(stages: StageTimes, layers: LayerTimes, after: float) -> Iterator[dict[str, Any]]:
    yield _process(_PASS, "one mean inference of the passes of their own")
    start = after
    if stages.h2d is not None and stages.gpu is not None and stages.d2h is not None:
        yield _thread(_PASS, _PASS_STREAM, "stream: copies and TensorRT")
        at = start
        for name, part in (("H2D", stages.h2d), ("TensorRT", stages.gpu), ("D2H", stages.d2h)):
            yield _slice(_PASS, _PASS_STREAM, name, at, at + part.mean, "stage", runs=stages.runs)
            at += part.mean
    if layers.layers:
        yield _thread(_PASS, _PASS_LAYERS, "layers, end to end (times with a profiler)")
        at = start + (stages.h2d.mean if stages.h2d is not None else 0.0)
        for layer in layers.layers:
            yield _slice(_PASS, _PASS_LAYERS, layer.name, at, at + layer.mean_us, "layer", share=layer.share)
            at += layer.mean_us


def _counters(report: ProfileReport) -> Iterator[dict[str, Any]]:
    yield _process(_DEVICE, "device and host, sampled")
    fields = {
        "GPU utilization %": ("gpu_utilization", 100.0), "power W": ("power_w", 1.0),
        "SM clock MHz": ("sm_clock_mhz", 1.0), "memory clock MHz": ("memory_clock_mhz", 1.0),
        "temperature C": ("temperature_c", 1.0), "device memory MB": ("memory_bytes", 1e-6),
        "host memory MB": ("host_rss", 1e-6),
    }  # fmt: skip
    for sample in report.device.samples:
        for name, (field, scale) in fields.items():
            value = getattr(sample, field)
            if value is not None:
                at = max(sample.at_s * 1e6, 0.0)
                yield {"ph": "C", "pid": _DEVICE, "ts": at, "name": name, "args": {name: value * scale}}


def _slice(pid: int, tid: int, name: str, start: float, end: float, category: str, **args: Any) -> dict[str, Any]:
    return {
        "ph": "X", "pid": pid, "tid": tid, "name": name, "cat": category, "ts": start, "dur": max(end - start, 0.0),
        "args": args,
    }  # fmt: skip


def _process(pid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": 0, "ts": 0, "name": "process_name", "args": {"name": name}}


def _thread(pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "ts": 0, "name": "thread_name", "args": {"name": name}}
