"""``statistics()`` of engines, batchers, ensembles and pools of devices as Prometheus metrics. Extra: ``prometheus``.

    register(engine)
    register(batcher, name="digits")
    prometheus_client.start_http_server(9100)

Statistics are read when Prometheus scrapes: requests cost nothing more than before.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import REGISTRY, Collector, CollectorRegistry
    from prometheus_client.utils import floatToGoString
except ImportError as error:
    raise ImportError(
        f"trtx_py.integrations.prometheus needs prometheus-client ({error}); install it with: "
        "pip install 'trtx-py[prometheus]'"
    ) from error

import trtx_py as trtx

__all__ = ["Registration", "Source", "register"]

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

_go_string: Callable[[float], str] = floatToGoString

#: Numbers that go down again, by field; all others count up.
_GAUGES = frozenset(
    {
        "budget_bytes", "bytes_in_flight", "captured", "contexts", "current_bytes", "lanes", "live",
        "next_attempt_s", "outstanding", "outstanding_bytes", "outstanding_requests", "outstanding_rows",
        "outstanding_s", "peak_bytes", "running", "running_batches", "utilisation", "waiting", "waiting_rows",
    }
)  # fmt: skip
#: Fields that count requests and do not say so.
_REQUESTS = frozenset(
    {
        "accepted", "bypassed", "cancelled", "completed", "dropped", "failed", "late", "moved", "outstanding",
        "rejected", "running", "shed", "waiting",
    }
)  # fmt: skip
_UNITS = {"_s": ("_seconds", 1.0), "_ms": ("_seconds", 1e-3)}


class Source(Protocol):
    """What can be registered: an Engine, DynamicBatcher, MultiDevice, Ensemble, or anything that has statistics."""

    def statistics(self) -> Any:
        """A dataclass of numbers, HistogramSnapshots, and mappings and dataclasses of these."""
        ...


class Registration:
    """A source that is being exported. Made by ``register``."""

    def __init__(self, source: Source, name: str) -> None:
        self._source = weakref.ref(source)
        self._name = name
        self._active = True

    @property
    def name(self) -> str:
        """Value of the label ``name``."""
        return self._name

    def unregister(self) -> None:
        """Export it no more. Idempotent; a source that is closed or garbage collected needs none."""
        self._active = False

    def _present(self) -> Source | None:
        source = self._source() if self._active else None
        return None if source is None or getattr(source, "closed", False) is True else source


def register(source: Source, *, name: str | None = None, registry: CollectorRegistry | None = None) -> Registration:
    """Export ``source.statistics()`` from now on, for as long as it lives and is open.

    The metrics are called ``trtx_engine_...``, ``trtx_batcher_...``, ``trtx_multi_device_...``, ``trtx_ensemble_...``
    after the statistics' type; times are in seconds. Labels: ``name``; ``device``, the number of the GPU; ``step`` of
    an ensemble; ``state`` of a device of a MultiDevice.

    Args:
        name: value of the label ``name``; None: the engine's name or the object's type, made unique by a number.
        registry: None: prometheus_client's default one.
    Raises:
        InvalidArgumentError: it has no ``statistics()``, or another open source of its kind has that name.
        ClosedError: it is closed.
    """
    if not callable(getattr(source, "statistics", None)):
        raise trtx.InvalidArgumentError(
            f"source is a {type(source).__name__}; expected an Engine, DynamicBatcher, MultiDevice or Ensemble"
        )
    if getattr(source, "closed", False) is True:
        raise trtx.ClosedError(f"{source!r} is closed: there is nothing to export; register it while it is open")
    return _collector_of(REGISTRY if registry is None else registry).add(source, name)


_lock = threading.Lock()
_collectors: weakref.WeakKeyDictionary[CollectorRegistry, _Collector] = weakref.WeakKeyDictionary()


def _collector_of(registry: CollectorRegistry) -> _Collector:
    """One for each registry: a metric of several sources must come in one piece."""
    with _lock:
        found = _collectors.get(registry)
        if found is None:
            found = _Collector()
            registry.register(found)
            _collectors[registry] = found
        return found


class _Collector(Collector):
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._registrations: list[Registration] = []

    def add(self, source: Source, name: str | None) -> Registration:
        with self._lock:
            self._registrations = [one for one in self._registrations if one._present() is not None]
            taken = {one.name for one in self._registrations if type(one._present()) is type(source)}
            if name is not None and name in taken:
                raise trtx.InvalidArgumentError(
                    f"a {type(source).__name__} is registered as {name!r} already; expected a name of its own"
                )
            base = chosen = _name_of(source) if name is None else name
            number = 1
            while chosen in taken:
                number += 1
                chosen = f"{base}-{number}"
            registration = Registration(source, chosen)
            self._registrations.append(registration)
            return registration

    def describe(self) -> Iterable[Family]:
        """Nothing is known before there are sources. Without this the registry would collect instead."""
        return ()

    def collect(self) -> Iterator[Family]:
        families: dict[str, Family] = {}
        with self._lock:
            self._registrations = [one for one in self._registrations if one._present() is not None]
            registrations = list(self._registrations)
        for registration in registrations:
            source = registration._present()
            if source is None:
                continue
            try:
                statistics = source.statistics()
            except trtx.ClosedError:  # closed meanwhile, or of the process that this one was forked from
                continue
            labels = {"name": registration.name, **_device_of(source)}
            for sample in _samples(statistics, f"trtx_{_snake(type(statistics).__name__)}", labels):
                _add(families, sample)
        yield from families.values()


def _name_of(source: Source) -> str:
    engine: Any = getattr(source, "engine", None)
    name = getattr(source, "name", None) or getattr(engine, "name", None)
    return name if isinstance(name, str) else type(source).__name__


def _device_of(source: Source) -> dict[str, str]:
    engine = source if isinstance(source, trtx.Engine) else getattr(source, "engine", None)
    return {"device": str(engine.runtime.device.ordinal)} if isinstance(engine, trtx.Engine) else {}


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.removesuffix("Statistics")).lower()


# From dataclasses to samples


@dataclass(frozen=True)
class _Sample:
    name: str
    help: str
    labels: Mapping[str, str]
    value: float | trtx.HistogramSnapshot
    gauge: bool = False


def _samples(statistics: object, prefix: str, labels: Mapping[str, str]) -> Iterator[_Sample]:
    """All numbers and histograms of a dataclass; those of dataclasses in it have the field's name before theirs."""
    if not dataclasses.is_dataclass(statistics):
        return
    helps = _helps(type(statistics)) if not isinstance(statistics, type) else {}
    for field in dataclasses.fields(statistics):
        name = f"requests_{field.name}" if field.name in _REQUESTS else field.name
        text = helps.get(field.name, name.replace("_", " "))
        yield from _of_value(getattr(statistics, field.name), field.name, f"{prefix}_{name}", text, labels)


def _of_value(value: object, field: str, name: str, text: str, labels: Mapping[str, str]) -> Iterator[_Sample]:
    if isinstance(value, trtx.HistogramSnapshot):
        yield _Sample(_in_seconds(name)[0], text, labels, value)
    elif isinstance(value, (int, float)):
        unit, factor = _in_seconds(name)
        yield _Sample(unit, text, labels, value * factor, field in _GAUGES or isinstance(value, bool))
    elif isinstance(value, str):
        if field == "state":  # one of a few; other texts would be a time series each
            yield _Sample(name, text, {**labels, "state": value}, 1, True)
    elif isinstance(value, Mapping):
        label = re.sub(r"(_m?s|s)$", "", field)  # step_s, devices
        for key, item in value.items():
            inner = {**labels, label: str(key)}
            if dataclasses.is_dataclass(item) and not isinstance(item, trtx.HistogramSnapshot):
                yield from _samples(item, name.removesuffix("s"), inner)
            else:
                yield from _of_value(item, field, name, text, inner)
    elif isinstance(value, tuple):
        numbered = {getattr(item, "device", index): item for index, item in enumerate(value)}
        yield from _of_value(numbered, field, name, text, labels)
    else:
        yield from _samples(value, name, labels)  # graphs, device_memory; nothing of what is no dataclass


def _in_seconds(name: str) -> tuple[str, float]:
    for suffix, (unit, factor) in _UNITS.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix) + unit, factor
    return name, 1.0


@functools.cache
def _helps(kind: Hashable) -> Mapping[str, str]:
    """What the docstring says of each attribute."""
    # As cleandoc has it: from Python 3.13 on the compiler takes the indentation off, and before it does not.
    _, _, attributes = inspect.cleandoc(getattr(kind, "__doc__", None) or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    for names, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE):
        for name in names.split(", "):
            found[name] = " ".join(text.split())
    return found


# From samples to metric families


def _add(families: dict[str, Family], sample: _Sample) -> None:
    family = families.get(sample.name)
    if family is None:
        family = families[sample.name] = _new_family(sample)
    values = list(sample.labels.values())
    if isinstance(family, HistogramMetricFamily):
        assert isinstance(sample.value, trtx.HistogramSnapshot)
        family.add_metric(values, _buckets(sample.value), sample.value.sum)
    else:
        assert not isinstance(sample.value, trtx.HistogramSnapshot)
        family.add_metric(values, sample.value)


def _new_family(sample: _Sample) -> Family:
    labels = list(sample.labels)
    if isinstance(sample.value, trtx.HistogramSnapshot):
        return HistogramMetricFamily(sample.name, sample.help, labels=labels)
    if sample.gauge:
        return GaugeMetricFamily(sample.name, sample.help, labels=labels)
    return CounterMetricFamily(sample.name, sample.help, labels=labels)


def _buckets(histogram: trtx.HistogramSnapshot) -> list[tuple[str, float]]:
    """Prometheus counts each value in every bucket whose bound it does not exceed."""
    total, buckets = 0, []
    for bound, count in zip((*histogram.bounds, math.inf), histogram.counts, strict=True):
        total += count
        buckets.append((_go_string(bound), float(total)))
    return buckets
