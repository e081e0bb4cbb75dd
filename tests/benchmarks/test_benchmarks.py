"""The benchmarks themselves: statistics, verdicts, guards, the C loops on the mock driver, and a rehearsal."""

from __future__ import annotations

import asyncio
import ctypes
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gpu.kit import load_kit

from .__main__ import main, run_sections
from .batcher_clients import SingleRows
from .build_overhead import run_build_overhead
from .checks import CheckError, Reference, relative_error
from .engine_cache import run_engine_cache
from .floor import LAUNCH, QUERY, WRITE, Api, Floor, FloorError, compile_library
from .goals import evaluate, section_of
from .mock_engine import serving
from .policy_rate import run_policy
from .report import markdown
from .rig import Settings, SetupError
from .samples import Round, Samples, compare, compare_percentiles, compare_rates
from .serving_clients import run_serving_clients
from .serving_contenders import check
from .serving_http import run_serving_http
from .serving_ray import run_serving_ray
from .steady_state import run_steady_state
from .throughput import check_all
from .workloads import BATCHED, LONE, WORKLOADS, Arrays

CAPI = Path(__file__).parents[2] / "capi"
needs_kit = pytest.mark.skipif(load_kit() is None, reason="needs the GPU kit's models: set TRTX_GPU_KIT")


# Statistics


def samples_around(centre: float, seed: int) -> Samples:
    rng, samples = np.random.default_rng(seed), Samples()
    for _ in range(20):
        samples.add(Round(rng.normal(centre, 1000, 100), 500, 900))
    return samples


def test_summary_is_in_microseconds_and_its_interval_holds_the_median() -> None:
    summary = samples_around(50_000, 1).summary()
    assert summary["samples"] == 2000
    assert summary["p50_us"] == pytest.approx(50, abs=0.2)
    assert summary["p50_ci_us"][0] < summary["p50_us"] < summary["p50_ci_us"][1]
    assert summary["p99_us"] == pytest.approx(52.3, abs=0.4)
    assert summary["process_cpu_us"] == pytest.approx(0.009)


def test_ratio_and_difference_of_two_contenders() -> None:
    found = compare(samples_around(55_000, 2), samples_around(50_000, 3))
    assert found["p50_ratio"] == pytest.approx(1.1, abs=0.01)
    assert found["p50_ratio_ci"][0] > 1.08
    assert found["p50_added_us"] == pytest.approx(5, abs=0.3)
    assert found["p50_added_ci_us"][0] < found["p50_added_us"] < found["p50_added_ci_us"][1]


def test_drift_that_meets_both_alike_does_not_widen_the_interval_of_the_ratio() -> None:
    ours, theirs = Samples(), Samples()
    for number in range(20):
        ours.add(Round(np.full(50, 1000.0 * (1 + number))))
        theirs.add(Round(np.full(50, 500.0 * (1 + number))))
    assert compare(ours, theirs)["p50_ratio_ci"] == pytest.approx([2, 2])
    assert compare_rates([2, 4, 6], [1, 2, 3])["ratio_ci"] == pytest.approx([2, 2])


def test_a_percentile_over_another_one() -> None:
    found = compare_percentiles(samples_around(100_000, 4), 99, samples_around(50_000, 5), 50)
    assert found["ratio"] == pytest.approx(2.046, abs=0.02)
    assert found["ratio_ci"][0] < found["ratio"] < found["ratio_ci"][1]


# Checks


@dataclass
class FakeInputs:
    first: Arrays
    second: Arrays
    tolerance: float = 0.01

    def error_of_known(self, outputs: Mapping[str, np.ndarray]) -> float | None:
        return None


class Doubling:
    name = "doubling"

    def __init__(self, *, stale: bool = False) -> None:
        self._stale = stale
        self._kept: Arrays = {}

    def round(self, count: int) -> Round:
        return Round([1] * count)

    def outputs(self, inputs: Arrays) -> Arrays:
        found = {"y": inputs["x"] * 2}
        if self._stale:
            self._kept = found = self._kept or found
        return found


def fake_inputs() -> FakeInputs:
    return FakeInputs({"x": np.ones(4, np.float32)}, {"x": np.arange(4, dtype=np.float32)})


def test_stale_outputs_are_found_by_the_changed_inputs() -> None:
    reference, contender = Reference(Doubling(), fake_inputs()), Doubling(stale=True)
    assert reference.check([contender], second=False) == {"doubling": 0}
    with pytest.raises(CheckError, match="doubling by"):
        reference.check([contender], second=True)


def test_inputs_that_give_like_outputs_are_refused() -> None:
    inputs = fake_inputs()
    with pytest.raises(CheckError, match="stale outputs would pass"):
        Reference(Doubling(), FakeInputs(inputs.first, inputs.first))


@pytest.mark.parametrize(
    "found", [{"y": np.full(3, np.nan)}, {"y": np.ones(4)}, {"z": np.ones(3)}, {}], ids=["nan", "shape", "name", "none"]
)
def test_wrong_outputs_are_infinitely_far_off(found: Arrays) -> None:
    assert relative_error(found, {"y": np.ones(3)}) == float("inf")


# Goals and guards


def test_goals_of_sections_that_did_not_run_are_not_measured() -> None:
    goals = evaluate({}, gpu=True, mock=True)
    assert len(goals) > 60
    assert {goal["reached"] for goal in goals} == {None}


def test_goals_are_judged_by_the_figure() -> None:
    ratio = {"p50_ratio": 1.025, "p50_ratio_ci": [1.02, 1.03]}
    contender = {"over_c0": ratio, "over_p0": {"p50_ratio": 0.9, "p50_ratio_ci": [0.8, 1.0]}}
    data = {
        "c0": "c0_event",
        "contenders": {
            "c0_event": {"p50_us": 400.0},
            "slot latency asyncio": contender,
            "slot latency uvloop": contender,
        },
    }
    workload = next(each for each in WORKLOADS if each.name == "resnet50.int8 b1")
    goals = evaluate({section_of("latency", workload): {"status": "ok", "data": data}}, gpu=True, mock=False)
    verdicts = {(goal["goal"], goal["where"]): goal["reached"] for goal in goals if workload.name in goal["where"]}
    assert verdicts == {
        ("p50 over C0, 300 us and more", "resnet50.int8 b1, asyncio"): True,
        ("p50 over C0, 300 us and more", "resnet50.int8 b1, uvloop"): False,
        ("p50 over P0", "resnet50.int8 b1, asyncio"): True,
        ("p50 over P0", "resnet50.int8 b1, uvloop"): True,
    }


def test_a_section_that_fails_is_reported_and_the_others_run() -> None:
    def broken() -> dict[str, int]:
        raise ZeroDivisionError("of all things")

    found = run_sections({"one": broken, "two": lambda: {"a": 1}, "other": lambda: {}}, ["one", "two"], 60)
    assert list(found) == ["one", "two"]
    assert found["one"]["status"] == "failed"
    assert "of all things" in found["one"]["traceback"]
    assert found["two"]["data"] == {"a": 1}
    page = markdown({"machine": {"versions": {}}, "settings": {}, "seconds": 1.0, "sections": found, "goals": []})
    assert "failed: ZeroDivisionError: of all things" in page


# The C loops


@pytest.fixture(scope="module")
def mock_library() -> ctypes.CDLL:
    sources = [str(path) for path in sorted((CAPI / "mock").glob("*.c"))]
    sources.append(str(CAPI / "src" / "cuda_api.c"))
    return compile_library(
        Path(__file__).with_name("c0_on_mock.c"), [f"-I{CAPI}/mock", f"-I{CAPI}/src", *sources, "-lm"]
    )


@pytest.fixture
def mock_floor(mock_library: ctypes.CDLL) -> Iterator[Floor]:
    table: Any = (ctypes.c_void_p * 4)()
    assert mock_library.c0_mock_open(table) == 0
    yield Floor(Api(LAUNCH(table[0]), LAUNCH(table[1]), QUERY(table[2]), WRITE()))
    mock_library.c0_mock_close()


def mock_lane(library: ctypes.CDLL, ns: int) -> tuple[int, int, int]:
    """Stream, event and graph."""
    handles = [ctypes.c_void_p() for _ in range(3)]
    assert library.c0_mock_lane(ctypes.c_uint64(ns), *map(ctypes.byref, handles)) == 0
    stream, event, graph = (handle.value or 0 for handle in handles)
    return stream, event, graph


def test_the_loop_waits_for_each_graph(mock_library: ctypes.CDLL, mock_floor: Floor) -> None:
    stream, event, graph = mock_lane(mock_library, 5_000_000)
    times = mock_floor.by_event(graph, stream, event, 20)
    assert mock_library.c0_mock_runs() == 20
    assert times.min() >= 5_000_000
    launches = mock_floor.launches(graph, stream, event, 20)
    assert mock_library.c0_mock_runs() == 20
    assert launches.min() < 5_000_000  # a wait for the graph would be in each of them; others may have lost their core


@pytest.mark.parametrize("requests", [1, 4, 25])
def test_lanes_run_exactly_what_was_asked(mock_library: ctypes.CDLL, mock_floor: Floor, requests: int) -> None:
    lanes = [[mock_lane(mock_library, 1000) for _ in range(2)] for _ in range(3)]
    elapsed = mock_floor.lanes(
        [[place[2] for place in lane] for lane in lanes],
        [lane[0][0] for lane in lanes],
        [[place[1] for place in lane] for lane in lanes],
        requests,
    )
    assert elapsed > 0
    assert mock_library.c0_mock_runs() == requests


def test_a_lost_device_is_an_error_of_the_loop(mock_library: ctypes.CDLL, mock_floor: Floor) -> None:
    stream, event, graph = mock_lane(mock_library, 0)
    assert mock_library.c0_mock_lose_device() == 0
    with pytest.raises(FloorError, match="c0_event failed with CUresult 719"):
        mock_floor.by_event(graph, stream, event, 3)


def test_a_loop_over_a_flag_needs_the_function_that_writes_it(mock_library: ctypes.CDLL, mock_floor: Floor) -> None:
    with pytest.raises(FloorError, match="500"):
        mock_floor.by_flag(1, 1, np.zeros(1, np.uint32).ctypes.data, 0, 1)


# Whole runs


def test_the_engine_without_time_gives_zeros_and_the_computing_one_does_not() -> None:
    x = np.ones((1, 64), np.float32)
    for compute in (False, True):
        with serving(compute=compute) as engine:
            assert np.all(engine.infer_sync({"x": x})["y"] == (2 if compute else 0))


def test_steady_state_and_imports_in_small(tmp_path: Path) -> None:
    arguments = ["--mock", "--quick", "--scale", "0.01", "--only", "steady_state", "--out", str(tmp_path)]
    assert main(arguments) == 0
    results = json.loads((tmp_path / "benchmarks.json").read_text())
    assert results["sections"]["steady_state"]["data"]["new_allocations"] == 0


def test_engine_cache_in_small() -> None:
    try:
        data = run_engine_cache(Settings(quick=True, scale=0.1), backend="mock", name="mlp")
    except SetupError as error:
        pytest.skip(str(error))
    assert data["pairs"] == 3
    assert len(data["ratios"]) == 3
    goals = evaluate({"engine_cache": {"status": "ok", "data": data, "seconds": 1.0}}, gpu=False, mock=True)
    (goal,) = [goal for goal in goals if goal["where"] == "ResNet-50, tensorrt-rtx"]
    assert goal["measured"] == data["ratio"]


def test_build_overhead_in_small() -> None:
    try:
        data = run_build_overhead(Settings(quick=True, scale=0.1), name="mlp")
    except SetupError as error:
        pytest.skip(str(error))
    assert data["pairs"] == 3
    assert 0 < data["memory_ratio"] < 2
    goals = evaluate({"build_overhead": {"status": "ok", "data": data, "seconds": 1.0}}, gpu=False, mock=True)
    measured = {goal["goal"]: goal["measured"] for goal in goals if "over the bare API" in goal["goal"]}
    assert list(measured.values()) == [data["time_ratio"], data["memory_ratio"]]


def judged_alone(name: str, data: Any) -> dict[str, int]:
    """Of the goals about many clients: how many were measured of each section; the page shows what was measured."""
    sections = {name: {"status": "ok", "data": data, "seconds": 1.0}}
    page = markdown({"machine": {"versions": {}}, "settings": {}, "seconds": 1.0, "sections": sections, "goals": []})
    assert "ours over it, requests/s" in page
    goals = evaluate(sections, gpu=False, mock=True)
    missing = [goal["note"] for goal in goals if goal["note"].startswith(f"{name} has no")]
    assert missing == []
    return Counter("measured" if goal["measured"] is not None else "not measured" for goal in goals)


def test_many_clients_in_small() -> None:
    data = run_serving_clients(True, 0.02)
    assert {found["clients"] for found in data.values()} == {256, 1024}
    assert judged_alone("serving_clients", data)["measured"] == 2 * len(data)


def test_http_applications_in_small() -> None:
    pytest.importorskip("tritonclient.http")
    data = run_serving_http(True, 0.05)
    assert judged_alone("serving_clients/http", data)["measured"] == 1
    for where in ("one client", "16 clients"):
        assert all(way["server_cpu_us"] > 0 for way in data[where]["ways"].values())


@pytest.mark.slow
def test_ray_serve_in_small() -> None:
    pytest.importorskip("ray")
    data = run_serving_ray(True, 0.02)
    assert judged_alone("serving_clients/ray", data)["measured"] == 14


def test_a_batcher_that_mixes_up_its_answers_is_found() -> None:
    async def mixed(x: np.ndarray) -> dict[str, np.ndarray]:
        return {"y": 2 * x + (x == 3)}

    with pytest.raises(AssertionError, match="mixed: client 3 was given 7"):
        asyncio.run(check("mixed", mixed, 8, True))


@needs_kit
def test_rehearsal_of_the_sections_for_a_gpu(tmp_path: Path) -> None:
    arguments = ["--rehearse", "--quick", "--scale", "0.02", "--out", str(tmp_path), "--only", "latency/m", "split"]
    assert main([*arguments, "loop_hold", "load"]) == 0
    sections = json.loads((tmp_path / "benchmarks.json").read_text())["sections"]
    assert {section["status"] for section in sections.values()} == {"ok"}
    contenders = sections["latency/mlp.fp32 b1"]["data"]["contenders"]
    assert {"c0_event", "c0_flag", "p0", "to_thread asyncio", "slot latency asyncio"} <= contenders.keys()
    assert (tmp_path / "benchmarks.md").read_text().startswith("# Benchmark run")


@needs_kit
def test_rehearsal_of_the_batcher(tmp_path: Path) -> None:
    arguments = ["--rehearse", "--quick", "--scale", "0.02", "--out", str(tmp_path), "--only", "batcher"]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "benchmarks.json").read_text())["sections"]
    assert {section["status"] for section in found.values()} == {"ok"}
    assert len(found) == 5
    for arrivals in found["batcher_arrivals/mnist_cnn.fp16 b8"]["data"]["arrivals"].values():
        assert arrivals["lost"] == 0
        assert arrivals["samples"] > 0
    page = (tmp_path / "benchmarks.md").read_text()
    samples = [section["data"]["sampled"]["samples"] for section in found.values() if "sampled" in section["data"]]
    assert samples
    heads = ["single rows", "p99 over one batch", "over direct infer, p50"]
    if any(samples):  # so short a run may be over before the first
        heads.append("in which function")
    for head in heads:
        assert f"| {head}" in page or f" {head} |" in page
    # The goals find what is measured, under the names that a GPU's sections have.
    there = [section_of("batcher", each) for each in BATCHED]
    there += [section_of("batcher_arrivals", BATCHED[0]), *(section_of("batcher_lone", each) for each in LONE)]
    goals = evaluate(dict(zip(there, found.values(), strict=True)), gpu=True, mock=False)
    measured = Counter(goal["where"].split(", ")[1] for goal in goals if goal["measured"] is not None)
    assert set(measured.values()) == {7}  # three rates, two of arrivals, two of a lone client; for each loop


class MixedUp(SingleRows):
    """Everybody gets somebody else's row."""

    def __init__(self) -> None:
        self.served: Any = FakeServed()
        self.name, self.step, self.callers = "mixed up", 1, 4
        self.shift = 0

    async def answer(self, number: int, inputs: Arrays) -> Arrays:
        return {"y": inputs["x"] * 2 + self.shift * (number == 3)}


class FakeServed:
    batch = 4

    def run(self, main: Any) -> Any:
        return asyncio.run(main)


def test_one_wrong_row_of_a_batch_is_found() -> None:
    contender, x = MixedUp(), {"x": np.arange(8, dtype=np.float32).reshape(4, 2)}
    assert len(contender.all_outputs(x)) == 2
    assert check_all([contender], lambda given: {"y": given["x"] * 2}, x) == {"mixed up": 0}
    contender.shift = 1
    with pytest.raises(CheckError, match="mixed up by"):
        check_all([contender], lambda given: {"y": given["x"] * 2}, x)


def test_the_policy_core_launches_what_came_in() -> None:
    data = run_policy(Settings(quick=True, scale=0.1))
    assert {found["rows_per_s"] > 0 for found in data["kinds"].values()} == {True}
    sections = {"policy": {"status": "ok", "data": data, "seconds": 1.0}}
    (goal,) = [goal for goal in evaluate(sections, gpu=False, mock=True) if goal["measured"] is not None]
    assert goal["measured"] == data["kinds"]["alike"]["rows_per_s"]
    page = markdown({"machine": {"versions": {}}, "settings": {}, "seconds": 1.0, "sections": sections, "goals": []})
    assert "| 3 priorities, 4 tenants |" in page


@needs_kit
def test_rehearsal_of_several_devices(tmp_path: Path) -> None:
    arguments = ["--rehearse", "--quick", "--scale", "0.02", "--out", str(tmp_path), "--only", "multi_device"]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "benchmarks.json").read_text())["sections"]
    data = found["multi_device"]["data"]
    assert len(data["devices"]) == 4
    assert data["contenders"].keys() == {f"{way}, {n} devices" for way in ("infer_many", "slots") for n in (1, 2, 4)}
    assert data["contenders"]["slots, 1 devices"]["over_one"]["ratio"] == 1.0
    goals = [goal for goal in evaluate(found, gpu=True, mock=False) if "data parallel" in goal["goal"]]
    assert [goal["limit"] for goal in goals] == [">= 1.97", ">= 1.97", ">= 3.90", ">= 3.90"]
    assert all(goal["measured"] is not None for goal in goals)
    assert "| over one device |" in (tmp_path / "benchmarks.md").read_text()


@needs_kit
def test_check_only_times_nothing(tmp_path: Path) -> None:
    assert main(["--rehearse", "--check-only", "--out", str(tmp_path), "--only", "latency/mlp"]) == 0
    data = json.loads((tmp_path / "benchmarks.json").read_text())["sections"]["latency/mlp.fp32 b1"]["data"]
    assert data["errors_to_p0_changed_inputs"]
    assert "contenders" not in data


def test_nothing_is_allocated_in_steady_state() -> None:
    """On the engine that takes no time; the drift is fitted over the run, so that caches that fill up do not count."""
    found = run_steady_state(200_000)
    assert found["new_allocations"] == 0
    assert found["rss_drift_bytes_per_million"] < 1 << 20
