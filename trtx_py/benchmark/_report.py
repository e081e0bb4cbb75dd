"""Results for people: text and markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..profiling._text import printable
from ._result import BenchmarkResult, ContenderResult
from ._spec import SHARING
from ._stats import number

HEADINGS = ("contender", "batch", "load", "p50, us", "p90", "p95", "p99", "rows/s", "CPU, us", "max error")
RATIO_HEADINGS = ("contender", "over", "p50", "p99", "rows/s")
ENGINE_HEADINGS = (
    "engine of", "device memory at most, MiB", "at the end", "pinned memory at most, MiB", "graph replays", "enqueued"
)  # fmt: skip
NOT_MEANINGFUL = "MOCK BACKEND: these figures say nothing about speed."


def row(result: ContenderResult) -> list[str]:
    """One line of the main table, for a contender that was measured."""
    found = result.measurement
    assert found is not None
    return [
        result.name,
        str(result.batch),
        result.load,
        str(found.p50_us),
        number(found.p90_us.value),
        number(found.p95_us.value),
        str(found.p99_us),
        str(found.rows_per_s),
        "" if found.cpu_us is None else number(found.cpu_us),
        "" if result.max_error is None else f"{result.max_error:.1e}",
    ]


def ratio_rows(result: BenchmarkResult) -> list[list[str]]:
    """Contender, what it is compared with, and the ratios."""
    return [
        [each.name, each.ratio.versus, *map(str, (each.ratio.p50, each.ratio.p99, each.ratio.rows_per_s))]
        for each in result.contenders
        if each.ratio is not None
    ]


def engine_rows(result: BenchmarkResult) -> list[list[str]]:
    """Contenders that share an engine, its memory, and what became of its requests: of all of them together."""
    rows: dict[object, list[str]] = {}
    for each in measured(result):
        if each.device_bytes is None:
            continue
        sizes = [_mib(size) for size in (each.device_bytes, each.device_now_bytes, each.pinned_bytes)]
        found = [each.name, *sizes, f"{each.graph_hits or 0:,}", f"{each.graph_misses or 0:,}"]
        shared = each.kind in SHARING
        key = (each.precision, *sorted(each.options.items()), *found[1:]) if shared else each.name
        if key in rows:
            rows[key][0] += f", {each.name}"
        else:
            rows[key] = found
    return list(rows.values())


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.2f}"


def tables(result: BenchmarkResult) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Title, headings and rows of all tables that have rows."""
    found: list[tuple[str, Sequence[str], list[list[str]]]] = [
        ("Results", HEADINGS, [row(each) for each in measured(result)]),
        ("Ratios", RATIO_HEADINGS, ratio_rows(result)),
        ("Accuracy", ACCURACY_HEADINGS, accuracy_rows(result)),
        ("Engines", ENGINE_HEADINGS, engine_rows(result)),
    ]
    return [each for each in found if each[2]]


def measured(result: BenchmarkResult) -> list[ContenderResult]:
    """Contenders that have figures."""
    return [each for each in result.contenders if each.measurement is not None]


def heading(result: BenchmarkResult) -> list[str]:
    """What was measured on what, a line each."""
    environment = result.environment
    lines = [
        f"{result.source}: {result.rounds} rounds of {result.requests} requests, {result.confidence:.0%} intervals, "
        f"seed {result.seed}, {result.seconds:.0f} s",
        f"{environment.gpu}, driver {environment.driver}, {environment.backend} (TensorRT {environment.tensorrt}), "
        f"{environment.python}, {environment.event_loop}, {environment.cpus} CPUs "
        f"({environment.cpu}), {environment.date}",
        f"command: {environment.command_line}",
        f"outputs were compared with {result.reference}",
    ]
    state = environment.gpu_state
    if state is not None:
        low, high = state.sm_clock_mhz
        lines.append(
            f"GPU clocks {low} to {high} MHz of {state.max_sm_clock_mhz}, at most {state.temperature_c} C, "
            f"{state.power_w} W"
        )
    if not result.complete:
        lines.insert(0, f"NOT COMPLETE: {result.reason}")
    if not result.meaningful:
        lines.insert(0, NOT_MEANINGFUL)
    return lines


def left_out(result: BenchmarkResult) -> list[str]:
    """Contenders without figures, with the reason."""
    return [f"{each.name}: {each.status}: {each.reason}" for each in result.contenders if each.measurement is None]


def accuracy_rows(result: BenchmarkResult) -> list[list[str]]:
    """Contender, output, relative error, SNR, top-1 agreement, and why there is none."""
    rows = []
    for each in result.contenders:
        for one in each.accuracy:
            snr = "no difference" if one.snr_db is None else f"{one.snr_db:.1f} dB"
            top = "" if one.top1 is None else f"{one.top1:.2%} of {one.rows}"
            rows.append([each.name, one.output, f"{one.relative:.3g}", snr, top])
        if each.no_accuracy:
            rows.append([each.name, "", f"not available: {each.no_accuracy}", "", ""])
    return rows


ACCURACY_HEADINGS = ("contender", "output", "relative error", "SNR", "top-1 agrees")


def as_text(result: BenchmarkResult) -> str:
    """For a terminal."""
    parts = heading(result)
    for _, headings, rows in tables(result):
        parts += ["", *_aligned([list(headings), *rows])]
    if left_out(result):
        parts += ["", *left_out(result)]
    parts += [f"warning: {warning}" for warning in result.environment.warnings]
    return "\n".join(map(printable, parts)) + "\n"


def as_markdown(result: BenchmarkResult) -> str:
    """Tables for a page."""
    parts = [f"- {plain(line)}" for line in heading(result)]
    parts += [f"- warning: {plain(warning)}" for warning in result.environment.warnings]
    for _, headings, rows in tables(result):
        parts += ["", *markdown_table(headings, rows)]
    if left_out(result):
        parts += ["", "Not measured:", "", *(f"- {plain(line)}" for line in left_out(result))]
    return "\n".join(parts) + "\n"


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; texts cannot break out of their cells."""
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(plain(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def plain(text: str) -> str:
    """On one line, and neither HTML nor a link, an image or code of markdown."""
    text = printable(" ".join(text.split()))
    for mark in "\\`[]":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("<", "&lt;")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
