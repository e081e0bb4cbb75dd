"""The goals, held against what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .serving_contenders import KINDS
from .workloads import BATCHED, CAPI, LARGE, LONE, WORKLOADS, Workload

#: Engines that take at least this long are judged by ratio to C0.
_LONG_US = 300.0
_OVER_C0 = {"asyncio": 1.03, "uvloop": 1.02}
#: By model and first size; everything else: below 1.
_OVER_P0 = {
    "mlp.fp32 b1": 0.90,
    "mnist_cnn.fp16 b1": 0.92,
    "bert_small.fp16 1x128": 0.84,
    "resnet50.fp16 b1": 0.95,
    "resnet50.int8 b1": 0.95,
}
_MIB = 1 << 20
_LOCK_BURNT = "trtxpy_dispatch while Python burns its lock over without, p50"


@dataclass(frozen=True)
class Goal:
    """One figure that was asked for.

    Attributes:
        goal: what it is about.
        where: engine, loop and mode.
        limit: with its comparison, such as "<= 1.02".
        measured, interval: None where it was not measured.
        reached: by the measured figure itself; None where there is none.
        note: why there is none, or what to keep in mind.
    """

    goal: str
    where: str
    limit: str
    measured: float | None = None
    interval: tuple[float, float] | None = None
    reached: bool | None = None
    note: str = ""


_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda value, limit: value <= limit,
    "<": lambda value, limit: value < limit,
    ">=": lambda value, limit: value >= limit,
}


def _judged(goal: str, where: str, limit: str, value: float, interval: Any = None, note: str = "") -> Goal:
    sign, number = limit.split()
    reached = _COMPARISONS[sign](value, float(number))
    return Goal(goal, where, limit, value, tuple(interval) if interval else None, reached, note)


class _Sections:
    """What sections found; a missing path is a goal that was not measured, not an error."""

    def __init__(self, sections: Mapping[str, Any]) -> None:
        self._sections = sections

    def data(self, name: str) -> dict[str, Any] | None:
        section = self._sections.get(name)
        return section["data"] if section and section["status"] == "ok" else None

    def judged(self, section: str, goal: str, where: str, limit: str, path: tuple[str, ...], note: str = "") -> Goal:
        """The value at ``path``, with the interval beside it."""
        found: Any = self.data(section)
        if found is None:
            state = self._sections.get(section, {}).get("status", "not run")
            return Goal(goal, where, limit, note=f"{section}: {state}")
        for step in path[:-1]:
            found = found.get(step) if isinstance(found, dict) else None
        if not isinstance(found, dict) or path[-1] not in found:
            return Goal(goal, where, limit, note=f"{section} has no {' / '.join(path)}")
        return _judged(goal, where, limit, found[path[-1]], _interval(found, path[-1]), note)


def _interval(found: Mapping[str, Any], name: str) -> Any:
    stem = name.removesuffix("_us")
    return found.get(f"{name}_ci") or found.get(f"{stem}_ci_us")


def section_of(kind: str, workload: Workload) -> str:
    """Name of a section."""
    return f"{kind}/{workload.name}"


def _one_request(sections: _Sections, workload: Workload) -> Iterator[Goal]:
    name = section_of("latency", workload)
    found = sections.data(name)
    for loop, limit in _OVER_C0.items():
        contender = ("contenders", f"slot latency {loop}")
        where = f"{workload.name}, {loop}"
        long = not workload.small
        if found and "contenders" in found:
            long = found["contenders"][found["c0"]]["p50_us"] >= _LONG_US
        if long:
            yield sections.judged(
                name, "p50 over C0, 300 us and more", where, f"<= {limit}", (*contender, "over_c0", "p50_ratio")
            )
        if workload.model == "mlp":
            yield sections.judged(
                name, "added to C0, p50, us, latency", where, "<= 5", (*contender, "over_c0", "p50_added_us")
            )
            yield sections.judged(
                name, "added to C0, p99, us, latency", where, "<= 15", (*contender, "over_c0", "p99_added_us")
            )
            yield sections.judged(
                name, "added to C0, p50, us, efficient", where, "<= 25",
                ("contenders", f"slot efficient {loop}", "over_c0", "p50_added_us"),
            )  # fmt: skip
        below = f"<= {_OVER_P0[workload.name]}" if workload.name in _OVER_P0 else "< 1.0"
        yield sections.judged(name, "p50 over P0", where, below, (*contender, "over_p0", "p50_ratio"))
        if workload.small:
            yield sections.judged(
                name, "CUDA graph over enqueue", where, "<= 0.85", (*contender, "over_enqueue_spin", "p50_ratio")
            )


def _several_devices(sections: _Sections) -> Iterator[Goal]:
    for devices, limit in ((2, 1.97), (4, 3.90)):
        for way in ("infer_many", "slots"):
            yield sections.judged(
                "multi_device", f"{devices} GPUs over 1, data parallel", f"resnet50.fp16 b64, {way}", f">= {limit:.2f}",
                ("contenders", f"{way}, {devices} devices", "over_one", "ratio"),
            )  # fmt: skip


def _loop_held(sections: _Sections) -> Iterator[Goal]:
    for mode in ("latency", "balanced", "efficient"):
        path = ("modes", mode)
        yield sections.judged(
            "loop_hold", "loop held at submit beyond the launch, p99, us", mode, "<= 10",
            (*path, "submit_beyond_launch", "p99_us"), "the launch's own median in C is taken off",
        )  # fmt: skip
        yield sections.judged(
            "loop_hold", "loop held, 32 completions at once, longest callback, p99, us", mode, "<= 60",
            (*path, "at_once", "longest_callback", "p99_us"),
        )  # fmt: skip
    yield sections.judged(
        "loop_hold", "loop held by a spin, each turn, p99, us", "latency", "<= 5",
        ("modes", "latency", "callbacks", "turn", "p99_us"), "the event loop's own callback included",
    )  # fmt: skip


def _foreign_caller(sections: _Sections, workload: Workload) -> Iterator[Goal]:
    """1.01 of C0 or 1 us more, whichever is met."""
    name, contender = section_of("capi", workload), ("contenders", "trtxpy_dispatch in place", "over_c0")
    ratio = sections.judged(
        name, "trtxpy_dispatch in place over C0, p50", workload.name, "<= 1.01", (*contender, "p50_ratio")
    )
    added = sections.judged(
        name, "trtxpy_dispatch in place added to C0, p50, us", workload.name, "<= 1", (*contender, "p50_added_us")
    )
    yield ratio if ratio.reached or not added.reached else added
    yield sections.judged(name, _LOCK_BURNT, workload.name, "<= 1.02", ("burnt_over_plain", "p50_ratio"))


def evaluate(sections: Mapping[str, Any], *, gpu: bool, mock: bool) -> list[dict[str, Any]]:
    """All goals of the parts that were to run."""
    found = _Sections(sections)
    goals: list[Goal] = []
    if gpu:
        for workload in WORKLOADS:
            goals += _one_request(found, workload)
        for workload in LARGE:
            for loop in _OVER_C0:
                goals.append(
                    found.judged(
                        section_of("split", workload),
                        "one large request over C0",
                        f"{workload.name}, {loop}",
                        "< 1.0",
                        ("contenders", f"slot latency {loop} in place split", "over_c0", "p50_ratio"),
                    )
                )
        for mode in ("latency", "balanced"):
            for loop in _OVER_C0:
                goals.append(
                    found.judged(
                        "lanes",
                        "three lanes over a C loop",
                        f"{mode}, {loop}",
                        ">= 0.97",
                        ("contenders", f"ours {mode} {loop}", "over_c0", "ratio"),
                        "over the faster of both C loops: one and two in flight a lane",
                    )
                )
        goals += [goal for loop in _OVER_C0 for goal in _batched(found, loop)]
        goals += _several_devices(found)
        goals += _loop_held(found)
        goals += [goal for workload in CAPI for goal in _foreign_caller(found, workload)]
        goals += _memory_and_load(found)
    if mock:
        goals += _on_the_mock(found)
    return [asdict(goal) for goal in goals]


def _batched(sections: _Sections, loop: str) -> Iterator[Goal]:
    """The batcher before an engine, on one event loop."""
    note = "over the faster of both C loops: one and two in flight a lane"
    limits = {"resnet50": {"alloc_rows(1)": 0.97, "infer_many": 0.99}, "mlp": {"infer_many": 0.90}}
    for workload in BATCHED:
        for way, limit in limits[workload.model].items():
            yield sections.judged(
                section_of("batcher", workload), f"saturated batcher, {way}, over bare lanes in C",
                f"{workload.name}, {loop}", f">= {limit}", ("contenders", f"{way} {loop}", "over_c0", "ratio"), note,
            )  # fmt: skip
    arrivals, asked = section_of("batcher_arrivals", BATCHED[0]), ("arrivals", f"a task for each request {loop}")
    where = f"{BATCHED[0].name}, {loop}"
    yield sections.judged(
        arrivals, "p99 of Poisson arrivals at 0.85 of the saturated rate, over one full batch in C", where, "<= 3",
        (*asked, "p99_over_batch", "ratio"), "single rows that callers fill, from when each was due",
    )  # fmt: skip
    yield sections.judged(arrivals, "requests without an answer", where, "<= 0", (*asked, "lost"))
    for workload in LONE:
        section, path = section_of("batcher_lone", workload), ("contenders", f"batcher {loop}", "over_direct")
        where = f"{workload.name}, {loop}"
        if workload.small:
            yield sections.judged(
                section, "lone client of the batcher, added to direct infer, p50, us", where, "<= 3",
                (*path, "p50_added_us"),
            )  # fmt: skip
        else:
            yield sections.judged(
                section, "lone client of the batcher over direct infer, p50", where, "<= 1.02", (*path, "p50_ratio")
            )


def _memory_and_load(found: _Sections) -> Iterator[Goal]:
    for name in ("memory/resnet50.fp16 b32", "memory/bert_small.fp16 8x128"):
        where = name.split("/", 1)[1]
        yield found.judged(name, "device memory over bare, one context", where, "<= 1.02", ("one_lane_ratio",))
        yield found.judged(
            name, "device memory over bare, three lanes (weights once)", where, "<= 1.02", ("lanes_ratio",)
        )
    load = found.data("load")
    ready = not load or load["contexts_when_ready"] > 0
    yield found.judged(
        "load", "load to ready over bare", "resnet50.fp16", "<= 1.03", ("ready" if ready else "first_result", "ratio"),
        "" if ready else "to the first result: no context exists when deserialize() returns",
    )  # fmt: skip


def _many_clients(found: _Sections) -> Iterator[Goal]:
    """The batcher beside what people write, and the HTTP application beside its framework."""
    queue, ray = "queue and concatenate", "@serve.batch"
    compared = [("serving_clients", f"{kind.name}, {loop}", queue) for kind in KINDS for loop in _OVER_C0]
    for kind in KINDS:
        compared += [("serving_clients/ray", f"{kind.name}, inside a replica", other) for other in (queue, ray)]
    compared.append(("serving_clients/ray", f"{KINDS[0].name}, through a handle", f"Ray Serve {ray}"))
    for section, where, other in compared:
        yield found.judged(section, f"requests/s over {other}", where, ">= 5", (where, "over", other, "ratio"))
        yield found.judged(section, f"p99 over {other}", where, "<= 1.0", (where, "over", other, "p99_ratio"))
    yield found.judged(
        "serving_clients/http", "share of the Open Inference Protocol application in p50", "one client", "< 0.1",
        ("share_of_p50",), "beside a bare Starlette endpoint, both without inference",
    )  # fmt: skip


def _on_the_mock(found: _Sections) -> Iterator[Goal]:
    for loop in _OVER_C0:
        for way in ("slots latency", "arrays latency"):
            yield found.judged(
                "clients", "requests/s over bare futures, 16 clients, mock", f"{way}, {loop}", ">= 0.45",
                (loop, "ways", way, "over_bare_futures", "ratio"),
            )  # fmt: skip
    yield found.judged(
        "policy", "rows/s of the batching policy core", "one core, tickets made in that time", ">= 1000000",
        ("kinds", "alike", "rows_per_s"), "of CPU time of the process",
    )  # fmt: skip
    yield from _many_clients(found)
    yield found.judged("capi", _LOCK_BURNT, "mock without numbers", "<= 1.02", ("burnt_over_plain", "p50_ratio"))
    yield found.judged("steady_state", "new allocations in steady state", "mock", "<= 0", ("new_allocations",))
    yield found.judged(
        "steady_state", "RSS drift, bytes per million requests", "mock", f"< {_MIB}", ("rss_drift_bytes_per_million",)
    )
    yield found.judged(
        "engine_cache",
        "finding a plan in a new process over building it",
        "ResNet-50, tensorrt-rtx",
        "<= 0.3",
        ("ratio",),
    )
    for measure, what, limit in (
        ("time_ratio", "building over the bare API, time beside hashing", "<= 1.02"),
        ("memory_ratio", "building over the bare API, peak memory", "<= 1.05"),
    ):
        yield found.judged("build_overhead", what, "ResNet-50 built by tensorrt-rtx", limit, (measure,))
    yield found.judged("imports", "import beyond numpy and asyncio, ms", "", "<= 30", ("beyond_ms",))
    imports = found.data("imports")
    if imports is not None:
        names = imports["vendor_modules_imported"]
        yield _judged("vendor modules imported by import trtx_py", "", "<= 0", float(len(names)), note=", ".join(names))
