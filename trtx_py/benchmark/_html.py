"""Results as one HTML page with plots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..profiling._page import Figure, Page, Part, Section, Table, bars, lines, render
from ._report import heading, left_out, measured, tables
from ._result import BenchmarkResult, ContenderResult

#: Curves that one plot can hold before nobody can tell them apart.
_CURVES = 7


def as_html(result: BenchmarkResult) -> str:
    """The page. Raises BackendUnavailableError: plotly is not installed."""
    first, *rest = heading(result)
    found = measured(result)
    sections = [Section("Run", [*rest, *_warned(result)])]
    sections += [Section(title, [Table(headings, rows)]) for title, headings, rows in tables(result)]
    if found:
        sections.append(Section("Latency", _latency(found)))
        sections.append(Section("Throughput", _throughput(found)))
        sections.append(Section("Rounds", _rounds(found)))
    if left_out(result):
        sections.append(Section("Not measured", left_out(result)))
    versions = [[name, version] for name, version in result.environment.versions.items()]
    sections.append(Section("Versions", [Table(("", ""), versions)]))
    return render(Page("Benchmark", first, sections))


def _warned(result: BenchmarkResult) -> list[Part]:
    return [f"Warning: {warning}" for warning in result.environment.warnings]


def _latency(found: Sequence[ContenderResult]) -> list[Part]:
    names, values, bounds = [], [], []
    for each in found:
        assert each.measurement is not None
        p50 = each.measurement.p50_us
        names.append(each.name)
        values.append(p50.value)
        bounds.append((p50.value if p50.low is None else p50.low, p50.value if p50.high is None else p50.high))
    parts: list[Part] = [bars("Median latency", "us", names, values, errors=bounds)]
    percents = [float(each) for each in np.linspace(0, 100, 101)]
    for start in range(0, len(found), _CURVES):
        curves = {
            each.name: (list(each.measurement.curve_us), percents)
            for each in found[start : start + _CURVES]
            if each.measurement is not None
        }
        parts.append(lines("Share of requests that took no longer", "us", "% of requests", curves, x_log=True))
    return parts


def _throughput(found: Sequence[ContenderResult]) -> list[Part]:
    names, values, bounds = [], [], []
    by_batch: dict[str, list[tuple[float, float]]] = {}
    for each in found:
        assert each.measurement is not None
        rate = each.measurement.rows_per_s
        names.append(each.name)
        values.append(rate.value)
        bounds.append((rate.value if rate.low is None else rate.low, rate.value if rate.high is None else rate.high))
        label = " ".join(filter(None, (each.kind, each.precision, *(f"{k}={v}" for k, v in each.options.items()))))
        by_batch.setdefault(f"{label}, {each.load}", []).append((float(each.batch), rate.value))
    parts: list[Part] = [bars("Throughput", "rows/s", names, values, errors=bounds)]
    swept = {
        label: ([x for x, _ in sorted(points)], [y for _, y in sorted(points)])
        for label, points in by_batch.items()
        if len({x for x, _ in points}) > 1
    }
    if swept:
        parts.append(lines("Throughput over batch size", "rows of a request", "rows/s", swept, markers=True))
    return parts


def _rounds(found: Sequence[ContenderResult]) -> Sequence[Figure]:
    """Drift is seen here: rounds ran one after another."""
    figures = []
    for start in range(0, len(found), _CURVES):
        series = {
            each.name: (
                [float(number) for number in range(1, each.measurement.rounds + 1)],
                list(each.measurement.round_p50_us),
            )
            for each in found[start : start + _CURVES]
            if each.measurement is not None
        }
        figures.append(lines("Median latency of each round", "round", "us", series, y_log=True))
    return figures
