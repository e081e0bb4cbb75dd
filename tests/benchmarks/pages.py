"""``python -m tests.benchmarks.pages [--plots]``: the part of docs/benchmarks.md that ``trtx bench``'s results give.

The results of ``python -m tests.benchmarks.runner`` lie in docs/assets/benchmarks as they came from the GPU; a test
compares the page with them. With --plots the pictures beside them are drawn again, which needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trtx_py.benchmark import BenchmarkResult, ContenderResult, Interval, Measurement, load_result

_DOCS = Path(__file__).parents[2] / "docs"
PAGE, RESULTS = _DOCS / "benchmarks.md", _DOCS / "assets" / "benchmarks"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"

MODELS = ("mlp", "mnist_cnn", "bert_small", "resnet50")
_TITLES = {
    "mlp": "mlp fp32",
    "mnist_cnn": "mnist_cnn fp16",
    "bert_small": "bert_small fp16 1x128",
    "resnet50": "resnet50 fp16",
}
#: Contenders that answer one request at a time, in the order of the table.
LADDER = (
    "bare loop", "slot latency", "latency", "balanced", "efficient", "sync", "to_thread", "graphs off b1",
    "graphs on b1", "ONNX Runtime CPU", "PyTorch",
)  # fmt: skip


def result(name: str) -> BenchmarkResult:
    return load_result(RESULTS / f"{name}.json")


def measured(found: BenchmarkResult) -> list[tuple[ContenderResult, Measurement]]:
    return [(each, each.measurement) for each in found.contenders if each.measurement is not None]


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def ends(value: Interval) -> tuple[float, float]:
    """What twenty rounds always have."""
    assert value.low is not None
    assert value.high is not None
    return value.low, value.high


def interval(value: Interval) -> str:
    low, high = ends(value)
    return f"{number(value.value)} ({number(low)} to {number(high)})"


def mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield from (f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
    yield ""


def picture(name: str, text: str) -> Iterator[str]:
    yield from (f"![{text}](assets/benchmarks/{name}.svg)", "")


def ladder() -> Iterator[str]:
    """One request after another, each model's contenders."""
    p50 = {model: {each.name: found.p50_us for each, found in measured(result(model))} for model in MODELS}
    yield from table(
        ["p50, us, batch 1, one client", *(_TITLES[model] for model in MODELS)],
        [[name, *(interval(p50[model][name]) if name in p50[model] else "" for model in MODELS)] for name in LADDER],
    )
    yield from picture("ladder", "p50 of one request over that of a bare loop, by model and way of asking")


def sweep() -> Iterator[str]:
    """Throughput by batch size."""
    for model in MODELS:
        found = measured(result(f"{model}_batches"))
        yield from table(
            [_TITLES[model].removesuffix(" 1x128"), *(f"batch {each.batch}" for each, _ in found)],
            [
                ["rows/s", *(number(each.rows_per_s.value) for _, each in found)],
                ["p50, us", *(number(each.p50_us.value) for _, each in found)],
                ["p99, us", *(number(each.p99_us.value) for _, each in found)],
            ],
        )
    yield from picture("batches", "Rows a second over batch size, by model")


def precisions() -> Iterator[str]:
    """INT8 beside FP16, with what it costs in accuracy."""
    rows = []
    for each, found in measured(result("resnet50_int8")):
        over = "" if each.ratio is None else interval(each.ratio.p50)
        accuracy = each.accuracy[0] if each.accuracy else None
        top1 = "" if accuracy is None or accuracy.top1 is None else f"{accuracy.top1:.0%} of {accuracy.rows}"
        rows.append(
            [each.name, interval(found.p50_us), over, number(found.rows_per_s.value), f"{each.max_error:.1e}", top1]
        )
    yield from table(["resnet50", "p50, us", "over fp16", "rows/s", "largest relative error", "top-1 as FP32"], rows)


def lanes() -> Iterator[str]:
    found = measured(result("resnet50_lanes"))
    yield from table(
        ["resnet50 fp16, batch 8, 16 clients", *(each.name.split()[1] for each, _ in found)],
        [
            ["images/s", *(number(each.rows_per_s.value) for _, each in found)],
            ["p99, us", *(number(each.p99_us.value) for _, each in found)],
            ["device memory, MiB at most", *(mebibytes(each.device_bytes) for each, _ in found)],
        ],
    )
    yield from picture("lanes", "Images a second over the number of lanes")


def batcher() -> Iterator[str]:
    rows = []
    for name in ("mlp_batcher", "resnet50_batcher", "resnet50_arrivals"):
        for each, found in measured(result(name)):
            title = f"{name.split('_', 1)[0]}: {each.name.split(' at ')[0]}"
            rows.append([title, each.load, interval(found.p50_us), interval(found.p99_us), interval(found.rows_per_s)])
    yield from table(["one row a request, two lanes", "load", "p50, us", "p99, us", "rows/s"], rows)


def memory() -> Iterator[str]:
    """What engines allocated at most, by way of asking."""
    rows = []
    for model in MODELS:
        for each, _ in measured(result(model)):
            if each.name in ("latency", "slot latency", "graphs off b1"):
                rows.append(
                    [f"{_TITLES[model]}: {each.name}", mebibytes(each.device_bytes), mebibytes(each.pinned_bytes)]
                )
    yield from table(["memory, MiB at most", "device", "pinned"], rows)


def agreement() -> Iterator[str]:
    """The runner's medians beside those of loops that know nothing of it."""
    found: dict[str, Any] = json.loads((RESULTS / "agreement.json").read_text(encoding="utf-8"))
    rows = []
    for model, values in found.items():
        for name in ("latency", "bare loop"):
            one = values[name]
            medians = (
                f"{number(statistics.median(each))} ({number(min(each))} to {number(max(each))})"
                for each in (one["runner_p50_us"], one["outside_p50_us"])
            )
            apart = f"{one['ratio']:.3f} ({one['low']:.3f} to {one['high']:.3f})"
            rows.append([f"{_TITLES[model]}: {name}", *medians, apart])
    yield from table(["p50, us, median of all (least to most)", "ten runs", "loops outside", "ratio (95%)"], rows)


def environment() -> Iterator[str]:
    found = result("resnet50")
    where = found.environment
    yield f"{where.gpu}, driver {where.driver}, {where.backend} with plans of {where.tensorrt.split()[-1]},"
    yield f"{where.python}, {where.event_loop}, {where.date[:10]}; {found.rounds} rounds of"
    yield f"{found.requests} requests, {found.confidence:.0%} intervals; outputs compared with {found.reference}."
    yield ""


_PARTS: tuple[tuple[str, str, Callable[[], Iterator[str]]], ...] = (
    ("", "", environment),
    ("One request at a time", "mlp mnist_cnn bert_small resnet50", ladder),
    ("Batch sweep", "mlp_batches mnist_cnn_batches bert_small_batches resnet50_batches", sweep),
    ("INT8", "resnet50_int8", precisions),
    ("Lanes", "resnet50_lanes", lanes),
    ("Batcher against direct", "mlp_batcher resnet50_batcher resnet50_arrivals", batcher),
    ("Memory", "mlp mnist_cnn bert_small resnet50", memory),
)


def text() -> str:
    """The generated part of the page."""
    lines: list[str] = []
    for title, sections, part in _PARTS:
        if title:
            lines += [f"### {title}", ""]
            lines += ["```bash", f"python -m tests.benchmarks.runner --out DIR --only {sections}", "```", ""]
        lines += part()
    lines += [
        "### Agreement with loops outside",
        "",
        "```bash",
        "python -m tests.benchmarks.agreement --out DIR",
        "```",
        "",
    ]
    lines += agreement()
    return "\n".join(lines)


def with_results(page: str) -> str:
    """The page with its generated part as the results give it."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + text() + END + rest.split(END)[1]


def plots() -> None:
    """Draw the pictures anew."""
    import matplotlib as mpl  # type: ignore[import-not-found, unused-ignore]

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "trtx_py", "font.size": 11, "axes.grid": True, "grid.alpha": 0.3})
    from matplotlib import pyplot  # type: ignore[import-not-found, unused-ignore]

    def save(name: str) -> None:
        pyplot.savefig(RESULTS / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        pyplot.close()

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    shown = [name for name in LADDER if name not in ("bare loop", "ONNX Runtime CPU", "PyTorch", "graphs on b1")]
    for at, model in enumerate(MODELS):
        p50 = {each.name: found.p50_us.value for each, found in measured(result(model))}
        axes.bar(
            [place + 0.2 * (at - 1.5) for place in range(len(shown))], [p50[name] / p50["bare loop"] for name in shown],
            0.2, label=_TITLES[model],
        )  # fmt: skip
    axes.set_xticks(range(len(shown)), [name.removesuffix(" b1") for name in shown])
    axes.axhline(1, color="black", linewidth=1)
    axes.set_ylabel("p50 over that of a bare loop")
    axes.legend()
    figure.autofmt_xdate(rotation=20)
    save("ladder")

    _, axes = pyplot.subplots(figsize=(8, 4.5))
    for model in MODELS:
        found = measured(result(f"{model}_batches"))
        rows = [each.rows_per_s for _, each in found]
        axes.errorbar(
            [each.batch for each, _ in found], [each.value for each in rows],
            yerr=[[each.value - ends(each)[0] for each in rows], [ends(each)[1] - each.value for each in rows]],
            marker="o", capsize=3, label=_TITLES[model].removesuffix(" 1x128"),
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("batch size")
    axes.set_ylabel("rows a second, one client")
    axes.legend()
    save("batches")

    _, axes = pyplot.subplots(figsize=(8, 3.5))
    found = measured(result("resnet50_lanes"))
    axes.plot([int(each.name.split()[1]) for each, _ in found], [one.rows_per_s.value for _, one in found], marker="o")
    axes.set_xlabel("lanes")
    axes.set_ylabel("images a second")
    axes.set_ylim(bottom=0)
    save("lanes")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.pages", description=__doc__)
    parser.add_argument("--plots", action="store_true", help="draw the pictures again")
    given = parser.parse_args(arguments)
    PAGE.write_text(with_results(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    if given.plots:
        plots()
    return 0


if __name__ == "__main__":
    sys.exit(main())
