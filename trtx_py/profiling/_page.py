"""One HTML page that opens anywhere: headings, sentences, tables and plots, nothing fetched from a network.

What reports of several kinds share; it knows nothing of any of them. Make a ``Page`` of ``Section``s, whose parts are
sentences (str), ``Table``s and ``Figure``s, and ``render`` it. All text is text: none of it is taken for markup. Plots
are drawn by plotly.js, which the page holds (5 MB); each has its numbers in words too, for those who cannot see it.

    page = Page("Results", "mlp, batch 1", (Section("Latency", ("One lane.", table, histogram("Latency", ...))),))
    path.write_text(render(page))
"""

from __future__ import annotations

import functools
import html
import importlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._errors import BackendUnavailableError

#: Colours that people of every kind of colour vision tell apart (Okabe and Ito), the ones that show on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


@dataclass(frozen=True)
class Table:
    """Rows of texts; the first column names the row, the others are figures.

    Attributes:
        columns: headings, one for each column; all empty for a table without.
        rows: each as long as ``columns``.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """One plot.

    Attributes:
        title: above it.
        alt: what it shows, in a sentence, for those who cannot see it.
        traces: plotly's, as plain data.
        layout: plotly's, laid over the page's own.
        height: in pixels; the width is the page's.
    """

    title: str
    alt: str
    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    height: int = 320


Part = str | Table | Figure


@dataclass(frozen=True)
class Section:
    """A heading and what is below it: sentences, tables and figures, in order."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """A whole page."""

    title: str
    subtitle: str
    sections: Sequence[Section]


def render(page: Page) -> str:
    """The page as HTML.

    Raises:
        BackendUnavailableError: plotly is not installed; only for a page with figures.
        ValueError: a number in a figure is not finite.
    """
    figures: list[Figure] = []
    body = "".join(_section(section, figures) for section in page.sections)
    title = html.escape(page.title)
    scripts = ""
    if figures:
        specs = [_spec(figure) for figure in figures]
        scripts = (
            f'<script type="application/json" id="figures">{_json(specs)}</script>\n'
            f"<script>{plotly_js()}</script>\n<script>{_DRAW}</script>\n"
        )
    # A name from a file of JSON may hold half of a surrogate pair, which is no character.
    title, subtitle, body = (
        each.encode(errors="replace").decode() for each in (title, html.escape(page.subtitle), body)
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n'
        f"<h1>{title}</h1>\n<p class=subtitle>{subtitle}</p>\n{body}</main>\n{scripts}"
        "</body>\n</html>\n"
    )


@functools.cache
def plotly_js() -> str:
    """The library that draws, 5 MB. Raises BackendUnavailableError: plotly is not installed."""
    try:
        script: str = importlib.import_module("plotly.offline").get_plotlyjs()
    except ImportError as error:
        raise BackendUnavailableError(
            "a page with plots needs plotly, which is not installed: pip install 'trtx-py[report]', or take text, "
            "markdown or JSON"
        ) from error
    return script.replace("</script", "<\\/script")


# What follows makes figures of numbers.


def histogram(
    title: str, unit: str, edges: Sequence[float], counts: Sequence[int], marks: Mapping[str, float]
) -> Figure:
    """Bars over ``edges``, one more than ``counts``; the last bar may be wider. ``marks`` are lines, by label."""
    centres = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    spans = [high - low for low, high in itertools.pairwise(edges)]
    bars = {
        "type": "bar", "x": centres, "y": list(counts), "width": spans, "marker": {"color": COLOURS[0]},
        "customdata": [[low, high] for low, high in itertools.pairwise(edges)],
        "hovertemplate": f"%{{customdata[0]:.4g}} to %{{customdata[1]:.4g}} {_text(unit)}: %{{y}}<extra></extra>",
    }  # fmt: skip
    wide = len(spans) > 1 and spans[-1] > 1.5 * spans[0]
    shown = edges[-2] if wide else edges[-1]  # the long tail is there when one zooms out
    return Figure(
        title,
        f"Histogram of {sum(counts)} values from {edges[0]:.4g} to {edges[-1]:.4g} {unit}; "
        + ", ".join(f"{label} {value:.4g}" for label, value in marks.items()),
        [bars],
        {
            "xaxis": {"title": {"text": _text(unit)}, "range": [edges[0] - spans[0], shown + spans[0]]},
            "yaxis": {"title": {"text": "count"}},
            "shapes": [_mark(value) for value in marks.values()],
            "annotations": [
                {
                    "x": value, "y": 1 - 0.09 * index, "yref": "paper", "text": _text(label), "showarrow": False,
                    "xanchor": "left", "yanchor": "top", "font": {"size": 11},
                }
                for index, (label, value) in enumerate(marks.items())
            ],
        },
    )  # fmt: skip


def _mark(value: float) -> dict[str, Any]:
    return {
        "type": "line", "x0": value, "x1": value, "y0": 0, "y1": 1, "yref": "paper",
        "line": {"color": COLOURS[1], "width": 1, "dash": "dot"},
    }  # fmt: skip


def lines(
    title: str,
    x_title: str,
    y_title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    markers: bool = False,
    x_log: bool = False,
    y_log: bool = False,
    y_from_zero: bool = True,
) -> Figure:
    """One line for each of ``series``: its name, x and y. For example throughput over batch size."""
    traces = [
        {
            "type": "scatter", "mode": "lines+markers" if markers else "lines", "name": _text(name),
            "x": list(x), "y": list(y), "line": {"color": COLOURS[index % len(COLOURS)]},
        }
        for index, (name, (x, y)) in enumerate(series.items())
    ]  # fmt: skip
    many = len(series) > 1
    x_axis = _axis(x_log, itertools.chain.from_iterable(x for x, _ in series.values()))
    y_axis = _axis(y_log, itertools.chain.from_iterable(y for _, y in series.values()))
    return Figure(
        title,
        f"{y_title} over {x_title}: "
        + "; ".join(f"{name} from {_span(x)}, {_span(y)}" for name, (x, y) in series.items() if len(x)),
        traces,
        {
            "xaxis": {"title": {"text": _text(x_title)}, **x_axis},
            "yaxis": {
                "title": {"text": _text(y_title)}, **y_axis,
                **({"rangemode": "tozero"} if y_from_zero and not y_log else {}),
            },
            "showlegend": many,
        },
        height=380 if many else 320,
    )  # fmt: skip


def _axis(log: bool, values: Iterable[float]) -> dict[str, Any]:
    """A logarithmic axis where that is wished for and shows more than a linear one, with labels that have room."""
    positive = [value for value in values if value > 0] if log else []
    if not positive or max(positive) < 5 * min(positive):
        return {"type": "linear"}
    first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    every = max(1, math.ceil((last - first) / 6))
    ticks = [step * 10.0**power for power in range(first, last + 1, every) for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": list(map(_tick, ticks)), "tickangle": 0}


def _tick(value: float) -> str:
    return f"{value:,.0f}" if 1 <= value < 1e7 else f"{value:g}"


def bars(
    title: str, unit: str, names: Sequence[str], values: Sequence[float], *, errors: Sequence[tuple[float, float]] = ()
) -> Figure:
    """Horizontal bars, the first one on top; ``errors`` are the lower and upper end of an interval around each."""
    trace: dict[str, Any] = {
        "type": "bar", "orientation": "h", "x": list(values), "y": list(range(len(names))),
        "marker": {"color": COLOURS[0]}, "text": [_text(name) for name in names], "textposition": "none",
        "hovertemplate": f"%{{text}}: %{{x:.4g}} {_text(unit)}<extra></extra>",
    }  # fmt: skip
    if errors:
        trace["error_x"] = {
            "type": "data", "symmetric": False,
            "array": [high - value for value, (_, high) in zip(values, errors, strict=True)],
            "arrayminus": [value - low for value, (low, _) in zip(values, errors, strict=True)],
        }  # fmt: skip
    return Figure(
        title,
        f"{title}, in {unit}: " + ", ".join(f"{name} {value:.4g}" for name, value in zip(names, values, strict=True)),
        [trace],
        {
            "xaxis": {"title": {"text": _text(unit)}, "rangemode": "tozero"},
            "yaxis": {
                "autorange": "reversed", "tickvals": list(range(len(names))),
                "ticktext": [_text(_short(name)) for name in names], "automargin": True,
            },
        },
        height=110 + 24 * max(len(names), 1),
    )  # fmt: skip


def stacked(title: str, unit: str, names: Sequence[str], parts: Mapping[str, Sequence[float]]) -> Figure:
    """Horizontal bars made of parts: ``parts`` has a value for each of ``names``, by the part's name."""
    traces = [
        {
            "type": "bar", "orientation": "h", "name": _text(part), "x": list(values),
            "y": [_text(_short(name)) for name in names], "marker": {"color": COLOURS[index % len(COLOURS)]},
        }
        for index, (part, values) in enumerate(parts.items())
    ]  # fmt: skip
    return Figure(
        title,
        f"{title}, in {unit}: "
        + "; ".join(f"{part} {', '.join(f'{value:.4g}' for value in values)}" for part, values in parts.items()),
        traces,
        {
            "barmode": "stack",
            "xaxis": {"title": {"text": _text(unit)}},
            "yaxis": {"autorange": "reversed", "automargin": True},
            "showlegend": True,
        },
        height=170 + 34 * max(len(names), 1),
    )


def spans(
    title: str, unit: str, rows: Sequence[str], parts: Mapping[str, Sequence[tuple[int, float, float, str]]]
) -> Figure:
    """A timeline: each part has spans of (index of the row, start, end, what a reader sees over it)."""
    traces = [
        {
            "type": "bar", "orientation": "h", "name": _text(part), "marker": {"color": COLOURS[index % len(COLOURS)]},
            "y": [row for row, *_ in found], "base": [start for _, start, _, _ in found],
            "x": [end - start for _, start, end, _ in found], "text": [_text(label) for *_, label in found],
            "textposition": "none",
            "hovertemplate": f"%{{text}}, {_text(part)}: %{{x:.4g}} {_text(unit)}<extra></extra>",
        }
        for index, (part, found) in enumerate(parts.items())
    ]  # fmt: skip
    return Figure(
        title,
        f"Timeline of {sum(map(len, parts.values()))} spans in {len(rows)} rows",
        traces,
        {
            "barmode": "overlay", "bargap": 0.25,
            "xaxis": {"title": {"text": _text(unit)}},
            "yaxis": {
                "autorange": "reversed", "tickvals": list(range(len(rows))),
                "ticktext": [_text(_short(row)) for row in rows], "automargin": True,
            },
            "showlegend": True,
        },
        height=170 + 30 * max(len(rows), 1),
    )  # fmt: skip


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.4g} to {max(values):.4g}"


def _short(name: str) -> str:
    """For an axis, on a narrow page too; what is in front and at the end tells names apart best."""
    return name if len(name) <= 28 else f"{name[:14]}...{name[-11:]}"


def _text(text: str) -> str:
    """For plotly, which takes some tags, entities and its own ``%{...}`` in texts for markup."""
    return html.escape(text, quote=False).replace("%{", "%&#123;")


def _spec(figure: Figure) -> dict[str, Any]:
    return {"data": list(figure.traces), "layout": {**figure.layout, "height": figure.height}}


def _json(value: Any) -> str:
    """For a script element: nothing in it can end the element, or open a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _section(section: Section, figures: list[Figure]) -> str:
    return f"<section>\n<h2>{html.escape(section.title)}</h2>\n{''.join(_parts(section.parts, figures))}</section>\n"


def _parts(parts: Sequence[Part], figures: list[Figure]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, str):
            yield f"<p>{html.escape(part)}</p>\n"
        elif isinstance(part, Table):
            yield _table(part)
        else:
            yield (
                f"<figure>\n<figcaption>{html.escape(part.title)}</figcaption>\n"
                f'<div class=plot data-figure="{len(figures)}" role="img" aria-label="{html.escape(part.alt)}" '
                f'style="height:{part.height}px"></div>\n</figure>\n'
            )
            figures.append(part)


def _table(table: Table) -> str:
    head = ""
    if any(table.columns):
        head = f"<thead><tr>{''.join(f'<th scope=col>{html.escape(each)}</th>' for each in table.columns)}</tr></thead>"
    rows = "".join(
        f"<tr><th scope=row>{html.escape(first)}</th>{''.join(f'<td>{html.escape(each)}</td>' for each in rest)}</tr>\n"
        for first, *rest in table.rows
    )
    names = "" if head else " class=names"
    return f"<div class=table tabindex=0><table{names}>{head}<tbody>\n{rows}</tbody></table></div>\n"


#: Nothing is fetched: a page that tried would show an error on its console.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

_STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:#1a1a1a;font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1240px;margin:0 auto;padding:1rem clamp(.75rem,3vw,2rem) 3rem}
h1{font-size:clamp(1.35rem,4vw,2rem);line-height:1.2;margin:.5rem 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 .5rem;border-bottom:1px solid #ddd;padding-bottom:.25rem}
p{margin:.5rem 0;max-width:75ch;overflow-wrap:anywhere}
.subtitle{font-size:1.05rem;color:#444}
.table{overflow-x:auto;margin:.75rem 0;background:
linear-gradient(to right,#fff 1rem,#fff0) left/2rem 100% no-repeat local,
linear-gradient(to left,#fff 1rem,#fff0) right/2rem 100% no-repeat local,
linear-gradient(to right,#0003,#0000) left/.6rem 100% no-repeat scroll,
linear-gradient(to left,#0003,#0000) right/.6rem 100% no-repeat scroll}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
th,td{padding:.25rem .75rem .25rem 0;border-bottom:1px solid #eee;text-align:right;white-space:nowrap}
th,td{vertical-align:top}
th[scope=row],thead th:first-child{text-align:left;font-weight:500;white-space:normal;min-width:7rem}
th[scope=row]{overflow-wrap:anywhere}
tbody th[scope=row],thead th:first-child{position:sticky;left:0;background:#fff;max-width:min(28rem,50vw)}
.names td{text-align:left;white-space:normal;overflow-wrap:anywhere}
thead th{color:#555;font-weight:600}
figure{margin:1rem 0 1.5rem}
figcaption{font-weight:600;margin-bottom:.25rem}
.plot{width:100%;min-width:0}
@media print{section{break-inside:avoid}}
"""

_DRAW = """
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const base = {
    margin: {l: 56, r: 12, t: 10, b: 48}, font: {family: "system-ui, sans-serif", size: 12}, showlegend: false,
    legend: {orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal"},
    paper_bgcolor: "#fff", plot_bgcolor: "#fff", hovermode: "closest",
  };
  const axis = {gridcolor: "#e5e5e5", zeroline: false, linecolor: "#999", ticks: "outside", tickcolor: "#999",
    exponentformat: "none", separatethousands: true, automargin: true};
  for (const place of document.querySelectorAll("[data-figure]")) {
    const figure = figures[Number(place.dataset.figure)];
    const layout = {...base, ...figure.layout};
    layout.xaxis = {...axis, ...figure.layout.xaxis};
    layout.yaxis = {...axis, ...figure.layout.yaxis};
    Plotly.newPlot(place, figure.data, layout, {responsive: true, displaylogo: false, displayModeBar: false});
  }
})();
"""
