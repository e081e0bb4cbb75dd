"""The Prometheus collector: its text, parsed by Prometheus's own parser, says what statistics() say."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.serving import affine_plan, rows, serving
from trtx_py.integrations.prometheus import register
from trtx_py.serving._metrics import Histogram

Labels = frozenset[tuple[str, str]]
Samples = dict[tuple[str, Labels], float]
X = rows(2)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def scrape(registry: CollectorRegistry) -> Samples:
    """All samples by name and labels; checks what promtool would."""
    text = generate_latest(registry).decode()
    types = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    assert len({name for name, _ in types}) == len(types), "a metric comes in two pieces"
    assert all(name.endswith("_total") for name, kind in types if kind == "counter")
    assert all(re.fullmatch(r"trtx_[a-z0-9_]+", name) for name, _ in types)
    assert not [name for name, _ in types if name.endswith(("_s", "_ms"))], "units are spelled out"
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def of(samples: Samples, metric: str, /, **labels: str) -> float:
    return samples[metric, frozenset(labels.items())]


def check_histogram(samples: Samples, metric: str, snapshot: trtx.HistogramSnapshot, /, **labels: str) -> None:
    assert of(samples, f"{metric}_count", **labels) == snapshot.count
    assert of(samples, f"{metric}_sum", **labels) == pytest.approx(snapshot.sum)
    buckets = {
        float(dict(key)["le"]): value
        for (name, key), value in samples.items()
        if name == f"{metric}_bucket" and labels.items() <= dict(key).items()
    }
    assert sorted(buckets) == [*snapshot.bounds, float("inf")]
    assert [buckets[bound] for bound in sorted(buckets)] == list(np.cumsum(snapshot.counts))


async def test_engine(mock_backend: MockBackend, registry: CollectorRegistry) -> None:
    async with serving(mock_backend) as engine:
        register(engine, registry=registry)
        async with engine.alloc_inputs({"x": X.shape}):
            pass  # captured now, and not beside what is compared below
        for _ in range(3):
            await engine.infer({"x": X})
        with pytest.raises(trtx.ShapeError):
            await engine.infer({"x": rows(9)})
        samples, statistics, labels = scrape(registry), engine.statistics(), {"name": "small", "device": "0"}
        assert statistics.completed == 3
        assert of(samples, "trtx_engine_requests_completed_total", **labels) == 3
        for name in ("failed", "cancelled"):
            assert of(samples, f"trtx_engine_requests_{name}_total", **labels) == getattr(statistics, name)
        for name in ("waiting", "running"):
            assert of(samples, f"trtx_engine_requests_{name}", **labels) == getattr(statistics, name)
        assert of(samples, "trtx_engine_lanes", **labels) == statistics.lanes > 0
        assert of(samples, "trtx_engine_graphs_hits_total", **labels) == statistics.graphs.hits
        assert of(samples, "trtx_engine_graphs_captured", **labels) == statistics.graphs.captured
        seconds = of(samples, "trtx_engine_graphs_capture_seconds_total", **labels)
        assert seconds == pytest.approx(statistics.graphs.capture_ms / 1000)
        memory = of(samples, "trtx_engine_device_memory_current_bytes", **labels)
        assert memory == statistics.device_memory.current_bytes > 0
        # Nothing is forgotten: one sample for each number that is there.
        flat = [value for value in _numbers(dataclasses.asdict(statistics)) if value is not None]
        assert len(samples) == len(flat)


def _numbers(values: dict[str, Any]) -> Iterator[Any]:
    for value in values.values():
        if isinstance(value, dict):
            yield from _numbers(value)
        else:
            yield value


async def test_batcher(mock_backend: MockBackend, registry: CollectorRegistry) -> None:
    async with serving(mock_backend) as engine, trtx.DynamicBatcher(engine) as batcher:
        register(batcher, name="digits", registry=registry)
        for _ in range(5):
            await batcher.infer({"x": rows(1)})
        samples, statistics, labels = scrape(registry), batcher.statistics(), {"name": "digits", "device": "0"}
        assert of(samples, "trtx_batcher_requests_completed_total", **labels) == statistics.completed == 5
        assert of(samples, "trtx_batcher_rows_completed_total", **labels) == 5
        assert of(samples, "trtx_batcher_waiting_rows", **labels) == 0
        for name in ("queue", "gpu", "completion"):
            check_histogram(samples, f"trtx_batcher_{name}_seconds", getattr(statistics, f"{name}_s"), **labels)
        check_histogram(samples, "trtx_batcher_batch_rows", statistics.batch_rows, **labels)
        assert statistics.completion_s.count == 5
        helps = [line for line in generate_latest(registry).decode().splitlines() if line.startswith("# HELP")]
        for name in ("queue", "completion"):  # which are not a request's there
            (text,) = (line for line in helps if f"trtx_batcher_{name}_seconds " in line)
            assert "For ``infer_many`` for each of its batches or pieces" in text


async def test_ensemble(mock_backend: MockBackend, registry: CollectorRegistry) -> None:
    async with serving(mock_backend) as engine:
        graph = trtx.Ensemble(
            inputs=("x",),
            outputs=("z",),
            steps=[
                trtx.Step(engine, {"x": "x"}, {"y": "y"}, name="first"),
                trtx.Step(engine, {"x": "y"}, {"y": "z"}, name="second"),
            ],
        )
        register(graph, registry=registry)
        for _ in range(2):
            await graph.infer({"x": X})
        samples, statistics = scrape(registry), graph.statistics()
        assert of(samples, "trtx_ensemble_requests_completed_total", name="Ensemble") == 2
        check_histogram(samples, "trtx_ensemble_completion_seconds", statistics.completion_s, name="Ensemble")
        for step in ("first", "second"):
            histogram = statistics.step_s[step]
            check_histogram(samples, "trtx_ensemble_step_seconds", histogram, name="Ensemble", step=step)


async def test_several_devices(mock_backend_factory: Any, registry: CollectorRegistry) -> None:
    backend = mock_backend_factory(devices=2)
    async with await trtx.MultiDevice.open(affine_plan(), devices=[0, 1], backend=backend, batching={}) as pool:
        register(pool, name="pool", registry=registry)
        for _ in range(6):
            await pool.infer({"x": rows(1)})
        samples, statistics = scrape(registry), pool.statistics()
        assert of(samples, "trtx_multi_device_requests_completed_total", name="pool") == statistics.completed == 6
        assert of(samples, "trtx_multi_device_requests_outstanding", name="pool") == 0
        for one in statistics.devices:
            labels, prefix = {"name": "pool", "device": str(one.device)}, "trtx_multi_device_device"
            assert of(samples, f"{prefix}_requests_completed_total", **labels) == one.completed
            assert of(samples, f"{prefix}_outstanding_rows", **labels) == 0
            assert of(samples, f"{prefix}_state", **labels, state="serving") == 1
            completed = of(samples, f"{prefix}_engine_requests_completed_total", **labels)
            assert completed == one.engine.completed
            assert one.batcher
            check_histogram(samples, f"{prefix}_batcher_queue_seconds", one.batcher.queue_s, **labels)
    assert scrape(registry) == {}


@dataclass(frozen=True)
class DeviceStatistics:
    """One of several.

    Attributes:
        completed: requests that it has served, of all
            that there were.
        queue_s: how long.
    """

    device: int
    completed: int
    outstanding_rows: int
    healthy: bool
    cause: str | None
    busy_ms: float
    queue_s: trtx.HistogramSnapshot


@dataclass(frozen=True)
class PoolOfDevicesStatistics:
    devices: tuple[DeviceStatistics, ...]
    moved: int


@dataclass
class Pool:
    closed: bool = False
    asked: int = field(default=0)

    def statistics(self) -> PoolOfDevicesStatistics:
        self.asked += 1
        histogram = Histogram((0.5, 1))
        histogram.observe(0.7, 3)
        one = DeviceStatistics(4, 10, 3, True, None, 1500.0, histogram.snapshot())
        return PoolOfDevicesStatistics((one, dataclasses.replace(one, device=6, healthy=False, cause="lost")), 7)


def test_statistics_that_it_has_never_heard_of(registry: CollectorRegistry) -> None:
    pool = Pool()
    register(pool, registry=registry)
    samples = scrape(registry)
    assert of(samples, "trtx_pool_of_devices_requests_moved_total", name="Pool") == 7
    prefix = "trtx_pool_of_devices_device"
    for device, healthy in (("4", 1), ("6", 0)):
        labels = {"name": "Pool", "device": device}
        assert of(samples, f"{prefix}_requests_completed_total", **labels) == 10
        assert of(samples, f"{prefix}_outstanding_rows", **labels) == 3
        assert of(samples, f"{prefix}_healthy", **labels) == healthy
        assert of(samples, f"{prefix}_busy_seconds_total", **labels) == 1.5
        check_histogram(samples, f"{prefix}_queue_seconds", pool.statistics().devices[0].queue_s, **labels)
    text = generate_latest(registry).decode()
    assert f"# HELP {prefix}_requests_completed_total requests that it has served, of all that there were." in text


def test_it_asks_at_scrape_time_only(registry: CollectorRegistry) -> None:
    pool = Pool()
    register(pool, registry=registry)
    assert pool.asked == 0
    scrape(registry)
    assert pool.asked == 1
    pool.closed = True
    assert scrape(registry) == {}
    assert pool.asked == 1


async def test_a_closed_source_disappears(mock_backend: MockBackend, registry: CollectorRegistry) -> None:
    async with serving(mock_backend) as engine:
        register(engine, registry=registry)
        async with trtx.DynamicBatcher(engine) as batcher:
            register(batcher, registry=registry)
            assert {name.split("_")[1] for name, _ in scrape(registry)} == {"engine", "batcher"}
        assert {name.split("_")[1] for name, _ in scrape(registry)} == {"engine"}
    assert scrape(registry) == {}
    with pytest.raises(trtx.ClosedError, match="nothing to export"):
        register(engine, registry=registry)


def test_a_source_is_not_kept_alive(registry: CollectorRegistry) -> None:
    pool = Pool()
    register(pool, registry=registry)
    del pool
    gc.collect()
    assert scrape(registry) == {}


def test_a_source_that_closes_during_the_scrape_is_left_out(registry: CollectorRegistry) -> None:
    class Closing(Pool):
        def statistics(self) -> PoolOfDevicesStatistics:
            raise trtx.ClosedError("closed meanwhile")

    closing, pool = Closing(), Pool()
    register(closing, registry=registry)
    register(pool, registry=registry)
    assert {dict(labels)["name"] for _, labels in scrape(registry)} == {"Pool"}


async def test_several_sources_of_a_kind(mock_backend: MockBackend, registry: CollectorRegistry) -> None:
    async with (
        trtx.Runtime(None, mock_backend) as runtime,
        await runtime.deserialize(affine_plan()) as one,
        await runtime.deserialize(affine_plan()) as two,
    ):
        assert register(one, registry=registry).name == "small"
        second = register(two, registry=registry)
        assert second.name == "small-2"
        await two.infer({"x": X})
        samples = scrape(registry)
        completed = "trtx_engine_requests_completed_total"
        assert of(samples, completed, name="small", device="0") == 0
        assert of(samples, completed, name="small-2", device="0") == 1
        with pytest.raises(trtx.InvalidArgumentError, match="registered as 'small-2' already"):
            register(one, name="small-2", registry=registry)
        second.unregister()
        second.unregister()
        assert "small-2" not in {dict(labels)["name"] for _, labels in scrape(registry)}
        register(two, name="small-2", registry=registry)  # free again


def test_the_default_registry_asks_nothing_when_a_source_is_registered() -> None:
    pool = Pool()
    registration = register(pool, name="default")
    assert pool.asked == 0  # it would ask a collector that has no describe()
    try:
        assert of(_default_samples(), "trtx_pool_of_devices_requests_moved_total", name="default") == 7
    finally:
        registration.unregister()


def _default_samples() -> Samples:
    text = generate_latest(prometheus_client.REGISTRY).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_has_no_statistics_is_refused(registry: CollectorRegistry) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="source is a dict; expected an Engine"):
        register({}, registry=registry)  # type: ignore[arg-type]


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "trtx_py.integrations.prometheus")
    monkeypatch.setitem(sys.modules, "prometheus_client.core", None)
    with pytest.raises(ImportError, match=r"pip install 'trtx-py\[prometheus\]'"):
        importlib.import_module("trtx_py.integrations.prometheus")
