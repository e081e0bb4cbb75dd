"""Reports: the numbers in them, and their forms as text, markdown, JSON, trace and page."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from tests.unit.profile_reports import WICKED, batched, report, wicked
from trtx_py.profiling import Distribution, LayerTimes, ProfileReport, RequestTimes, StageTimes, _page

FILLED = [report(), batched()]


# Distributions


def test_distribution_is_numpys() -> None:
    values = np.random.default_rng(1).exponential(100.0, 1000)
    found = Distribution.of(values.tolist())
    assert (found.count, found.minimum, found.maximum) == (1000, values.min(), values.max())
    assert found.mean == pytest.approx(values.mean())
    wanted = np.percentile(values, [50, 90, 95, 99])
    assert [found.p50, found.p90, found.p95, found.p99] == pytest.approx(wanted)
    assert len(found.quantiles) == 101
    assert list(found.quantiles) == sorted(found.quantiles)
    assert sum(found.counts) == 1000
    assert len(found.edges) == len(found.counts) + 1
    assert all(a < b for a, b in pairwise(found.edges))
    assert (found.edges[0], found.edges[-1]) == (values.min(), values.max())


def test_one_outlier_does_not_squeeze_the_histogram() -> None:
    found = Distribution.of([*(float(n) for n in range(1000)), 1e6])
    assert found.counts[-1] == 1
    assert max(found.counts) < 60
    assert found.maximum == 1e6


@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0, 5.0], [0.0, 0.0]])
def test_distribution_of_equal_values(values: list[float]) -> None:
    found = Distribution.of(values)
    assert (found.p50, found.p99, sum(found.counts)) == (values[0], values[0], len(values))
    assert found.edges[0] < found.edges[-1]


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")]])
def test_distribution_of_no_numbers_is_refused(values: list[float]) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="at least one, all of them finite"):
        Distribution.of(values)


# JSON


@pytest.mark.parametrize("made", FILLED)
def test_json_and_back(made: ProfileReport) -> None:
    assert ProfileReport.from_json(made.to_json()) == made
    assert ProfileReport.from_json(made.to_json(indent=None).encode()) == made
    assert json.loads(made.to_json())["schema"] == 1


def broken(**changes: Any) -> str:
    return json.dumps({**json.loads(report().to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "a JSON list; expected an object"),
        ("{}", "schema None; this version of trtx_py reads 1"),
        (broken(schema=2), "schema 2"),
        (broken(schema=True), "schema True"),
        (broken(extra=1), "has 'extra'"),
        (broken(requests="many"), "profile report.requests is 'many'; expected a value of type int"),
        (broken(requests=True), "requests is True"),
        (broken(latency=None), "latency is None; expected an object"),
        (broken(latency=[1]), "latency is"),
        (broken(timeline=[{"worker": 1}]), r"timeline\[0\] lacks 'way', 'submitted'"),
        (broken(timeline=3), "expected a list"),
        (broken(ways={"graph": "x"}), "ways.graph is 'x'"),
        (broken(queue=3), "queue is 3"),
    ],
)
def test_what_is_no_report_is_refused_by_name(text: str | bytes, words: str) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=words):
        ProfileReport.from_json(text)


def test_json_lacking_a_field_is_refused() -> None:
    data = json.loads(report().to_json())
    del data["latency"]
    with pytest.raises(trtx.InvalidArgumentError, match="lacks 'latency'"):
        ProfileReport.from_json(json.dumps(data))


def test_nan_is_not_written() -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="cannot be written as JSON"):
        report(duration_s=float("nan")).to_json()


# Text and markdown


@pytest.mark.parametrize("made", [*FILLED, wicked()])
def test_text_is_plain_and_narrow(made: ProfileReport) -> None:
    text = made.to_text()
    assert max(map(len, text.splitlines())) <= 100
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert str(made) == text


def test_text_says_what_matters() -> None:
    text = report().to_text()
    for words in (
        "Profile of net: p50 50.5 us, p99 99.0 us, 200 requests/s, 400 rows/s",
        "99 by captured graphs, 1 by a lane's thread",
        "conv   30.0 us  75.0 %",
        "ratio 0.976",
        "In 1 of 3 inferences the GPU waited for the CPU",
        "throttled: thermal",
        "The GPU slowed down during the run (thermal)",
    ):
        assert words in text
    assert re.search(r"host, resident +1\.0 MiB +2\.0 MiB\n", text)
    assert "rows in a batch" not in text
    assert "2.5 rows in a batch on average" in batched().to_text()


def test_what_was_not_measured_is_named() -> None:
    layers = LayerTimes(0, 0, (), 0.0, 0.0, 0.0, "no profiler here")
    stages = StageTimes(0, 0, None, None, None, None, 0.0, 0.0, 0.0, "", "sizes depend on data")
    device = dataclasses.replace(report().device, samples=(), unavailable="no NVML", throttled=())
    made = report(layers=layers, stages=stages, device=device)
    for text in (made.to_text(), made.to_markdown()):
        assert "Not measured: no profiler here." in text
        assert "Not measured: sizes depend on data." in text
        assert "Not known: no NVML." in text
    assert "no NVML" in made.to_html()
    assert ProfileReport.from_json(made.to_json()) == made


def test_layers_beyond_the_top_are_summed() -> None:
    text = report().to_text(top=1)
    assert "1 others" in text
    assert "relu" not in text


def test_markdown_is_not_broken_by_names() -> None:
    text = wicked().to_markdown()
    assert "<script" not in text
    assert "<img" not in text
    rows = [line for line in text.splitlines() if line.startswith("|") and "75.0 %" in line]
    assert len(rows) == 1
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 4


# Trace


def slices(trace: dict[str, Any]) -> dict[tuple[int, int], list[tuple[float, float]]]:
    found: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    return found


@pytest.mark.parametrize("made", [*FILLED, wicked()])
def test_trace_keeps_to_the_format(made: ProfileReport) -> None:
    trace = json.loads(made.to_trace())
    named = set()
    for event in trace["traceEvents"]:
        assert event["ph"] in "XCM"
        assert isinstance(event["pid"], int)
        assert event["name"]
        assert event["ts"] >= 0
        if event["ph"] == "M":
            named.add((event["name"], event["pid"], event["tid"]))
        elif event["ph"] == "X":
            assert event["dur"] >= 0
        else:
            assert all(isinstance(value, (int, float)) for value in event["args"].values())
    for (pid, tid), spans in slices(trace).items():
        assert ("process_name", pid, 0) in named
        assert ("thread_name", pid, tid) in named
        for start, end in spans:  # slices of one thread lie beside each other or one within the other
            for other_start, other_end in spans:
                apart = end <= other_start or other_end <= start
                within = (start <= other_start and other_end <= end) or (other_start <= start and end <= other_end)
                assert apart or within


def test_trace_shows_batches_on_their_lanes() -> None:
    events = json.loads(batched().to_trace())["traceEvents"]
    rows = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    lanes = {e["name"]: rows[e["pid"], e["tid"]] for e in events if e["name"].startswith("batch ")}
    assert lanes == {"batch 0": "lane 0", "batch 1": "lane 1", "batch 2": "lane 0"}
    assert [e["args"]["rows"] for e in events if e["name"].startswith("batch ")] == [2, 3, 1]


def test_layers_of_a_trace_lie_end_to_end() -> None:
    events = [e for e in json.loads(report().to_trace())["traceEvents"] if e.get("cat") == "layer"]
    assert [e["name"] for e in events] == ["conv", "relu"]
    assert events[0]["ts"] + events[0]["dur"] == pytest.approx(events[1]["ts"])


# Files


def test_files_are_replaced_as_a_whole(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    made = report()
    for name, write, text in (
        ("r.json", made.write_json, made.to_json()),
        ("t.json", made.write_trace, made.to_trace()),
        ("p.html", made.write_html, made.to_html()),
    ):
        (tmp_path / name).write_text("old")
        write(tmp_path / name)
        assert (tmp_path / name).read_text(encoding="utf-8") == text
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=r"trace cannot be saved to .*no/t.json"):
        report().write_trace(tmp_path / "no" / "t.json")
    with pytest.raises(trtx.InvalidArgumentError, match="path"):
        report().write_json(3)  # type: ignore[arg-type]


# Page


class Parsed(HTMLParser):
    """Which elements a page has, and what is text in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "link"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self._open[-1:] != ["style"]:
            self.text += data


@pytest.fixture
def plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of 5 MB of script."""
    monkeypatch.setattr(_page, "plotly_js", lambda: "/*plotly*/")


@pytest.mark.usefixtures("plotly")
@pytest.mark.parametrize("made", [*FILLED, wicked()])
def test_page_is_one_file_and_names_are_text(made: ProfileReport) -> None:
    page = made.to_html()
    parsed = Parsed(page)
    assert parsed._open == []
    assert parsed.tags.count("script") == 3
    assert "img" not in parsed.tags
    assert not re.search(r"https?://", page)
    fetched = [value for _, name, value in parsed.attributes if name in ("src", "href", "srcset", "action")]
    assert fetched == ["data:,"]
    assert not any(name.startswith("on") for _, name, _ in parsed.attributes)
    figures = json.loads(parsed.scripts[0])
    places = [int(value or "") for _, name, value in parsed.attributes if name == "data-figure"]
    assert places == list(range(len(figures)))
    assert all(figure["data"] for figure in figures)
    assert "<" not in json.dumps(figures).replace("<extra></extra>", "")
    if made.engine.name == WICKED:
        assert WICKED in parsed.text


@pytest.mark.usefixtures("plotly")
def test_page_has_the_plots_of_a_report() -> None:
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", report().to_html())
    assert titles == [
        "Latency of 100 requests",
        "Share of requests that took no longer",
        "The first 3 requests, by caller",
        "Mean of each part on the GPU",
        "Share of the layers&#x27; time",
        "GPU utilization, at most 50 %",
        "Power, at most 303 W",
        "SM clock, at most 1,700 MHz",
        "Temperature, at most 63 C",
    ]


@pytest.mark.usefixtures("plotly")
def test_pages_of_other_reports() -> None:
    sweep = _page.lines("Throughput", "batch", "rows/s", {"a<b": ([1, 8], [3.0, 4.0]), "c": ([1], [2.0])}, x_log=True)
    bars = _page.bars("Latency", "us", ["ours", "theirs" * 20], [1.0, 2.0], errors=[(0.5, 1.5), (1.0, 3.0)])
    table = _page.Table(("", "p50"), (("a<b", "1"),))
    page = _page.Page("T & U", "sub", (_page.Section("S", ("words < words", table, sweep, bars)),))
    parsed = Parsed(_page.render(page))
    assert "words < words" in parsed.text
    assert "a<b" in parsed.text
    figures = json.loads(parsed.scripts[0])
    assert [len(figure["data"]) for figure in figures] == [2, 1]
    assert figures[1]["data"][0]["error_x"]["arrayminus"] == [0.5, 1.0]
    assert figures[0]["layout"]["xaxis"]["type"] == "log"


def test_a_page_without_figures_needs_no_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert "<script" not in _page.render(_page.Page("T", "", (_page.Section("S", ("words",)),)))
    _page.plotly_js.cache_clear()
    with pytest.raises(trtx.BackendUnavailableError, match=r"pip install 'trtx-py\[report\]'"):
        report().to_html()


def test_infinite_figures_are_refused() -> None:
    figure = _page.bars("T", "us", ["a"], [float("inf")])
    with pytest.raises(ValueError, match="not JSON compliant"):
        _page.render(_page.Page("T", "", (_page.Section("S", (figure,)),)))


@pytest.mark.usefixtures("plotly")
def test_logarithmic_axes_have_few_labels() -> None:
    def axis(*values: float) -> dict[str, Any]:
        found: dict[str, Any] = _page.lines("T", "x", "y", {"a": (values, values)}, x_log=True).layout["xaxis"]
        return found

    assert axis(600, 4000)["ticktext"] == ["100", "200", "500", "1,000", "2,000", "5,000", "10,000", "20,000", "50,000"]
    assert axis(600, 900)["type"] == "linear"
    assert axis(-1, 0)["type"] == "linear"
    assert axis()["type"] == "linear"
    assert len(axis(1e-9, 1e12)["ticktext"]) < 10


@pytest.mark.usefixtures("plotly")
def test_a_timeline_of_one_caller_is_no_solid_block() -> None:
    made = dataclasses.replace(report(), timeline=tuple(
        RequestTimes(0, "graph", 100.0 * n, 100.0 * n + 1, 100.0 * n + 80, 100.0 * n + 90) for n in range(400)
    ))  # fmt: skip
    assert "The first 12 requests, by caller" in made.to_html()


@pytest.mark.usefixtures("plotly")
def test_half_a_character_in_a_name_is_replaced() -> None:
    page = _page.render(_page.Page("T\ud800", "s\ud800", (_page.Section("S", ("words \ud800",)),)))
    assert page.encode().count(b"?") >= 3


@pytest.mark.parametrize(("value", "words"), [("NaN", "a finite number"), ("1" + "0" * 400, "fits into a float")])
def test_numbers_that_are_none_are_refused_by_name(value: str, words: str) -> None:
    text = report().to_json().replace(json.dumps(report().throughput_per_s), value, 1)
    with pytest.raises(trtx.InvalidArgumentError, match=words):
        ProfileReport.from_json(text)
