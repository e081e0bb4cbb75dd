"""Ranges from values: against numpy, and against a computation of the entropy that is not ours."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trtx_py as trtx
from trtx_py.quantize import (
    EntropyCollector,
    MinMaxCollector,
    PercentileCollector,
    entropy_threshold,
    percentile_threshold,
)
from trtx_py.quantize._collectors import BINS, Histogram

LEVELS = 128
STRIDE = 8


def independent_threshold(counts: Any, width: float) -> float:
    """The definition, spelled out bin by bin, with scipy's relative entropy."""
    rel_entr = pytest.importorskip("scipy.special").rel_entr
    end = int(np.flatnonzero(counts)[-1]) + 1
    counts = counts.tolist()
    best = (np.inf, end)
    for stop in [*range(LEVELS, end, STRIDE), end]:
        p = [float(c) for c in counts[:stop]]
        p[-1] += float(sum(counts[stop:]))
        q = [0.0] * stop
        for level in range(LEVELS):
            low, high = level * stop // LEVELS, (level + 1) * stop // LEVELS
            filled = [i for i in range(low, high) if counts[i]]
            for i in filled:
                q[i] = float(sum(counts[low:high])) / len(filled)
        if q[-1] == 0 < p[-1]:
            q[-1] = 1e-4
        if sum(counts[:stop]):
            divergence = rel_entr(np.array(p) / sum(p), np.array(q) / sum(q)).sum()
            best = min(best, (float(divergence), stop))
    return best[1] * width


def histogram(kind: str) -> Any:
    rng = np.random.default_rng(5)
    values = {
        "normal": rng.standard_normal(20000),
        "laplace": rng.laplace(size=20000),
        "uniform": rng.uniform(0, 1, 20000),
        "outlier": np.append(rng.standard_normal(20000), 60.0),
        "two humps": np.append(rng.normal(1, 0.1, 9000), rng.normal(9, 0.1, 50)),
    }[kind]
    return np.histogram(np.abs(values), bins=1024, range=(0, np.abs(values).max()))[0]


@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform", "outlier", "two humps"])
def test_entropy_threshold_is_that_of_scipy(kind: str) -> None:
    counts = histogram(kind)
    assert entropy_threshold(counts, 0.25) == pytest.approx(independent_threshold(counts, 0.25), abs=1e-12)


def test_entropy_clips_an_outlier_and_keeps_what_is_even() -> None:
    assert entropy_threshold(histogram("outlier"), 1.0) < 512
    assert entropy_threshold(histogram("uniform"), 1.0) == 1024


def test_entropy_of_few_bins_and_of_none() -> None:
    counts = np.zeros(1024, np.int64)
    assert entropy_threshold(counts, 0.5) == 0
    counts[:40] = 3
    assert entropy_threshold(counts, 0.5) == 20


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 50), min_size=130, max_size=400).filter(any), st.floats(1e-3, 1e3))
def test_a_threshold_lies_within_the_histogram(counts: list[int], width: float) -> None:
    array = np.array(counts)
    end = (np.flatnonzero(array)[-1] + 1) * width
    assert 0 < entropy_threshold(array, width) <= end * (1 + 1e-12)
    half, all_of_it = (percentile_threshold(array, width, percent) for percent in (50.0, 100.0))
    assert 0 < half <= all_of_it <= end * (1 + 1e-12)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=1, max_size=40), min_size=1, max_size=6
    )
)
def test_a_histogram_loses_no_value_and_grows(batches: list[list[float]]) -> None:
    found = Histogram()
    for batch in batches:
        found.add(np.array(batch, np.float32))
    values = np.abs(np.concatenate([np.array(b, np.float32) for b in batches])).astype(np.float64)
    assert found.zeros == int((values == 0).sum())
    assert int(found.counts.sum()) + found.zeros == values.size
    if found.width:
        assert values.max() <= found.width * BINS * (1 + 1e-12)
        # Bins are halves of halves of the last one's width, so every value is where one pass would have put it.
        places = np.minimum((values[values > 0] / found.width).astype(int), BINS - 1)
        difference = np.abs(np.cumsum(np.bincount(places, minlength=BINS)) - np.cumsum(found.counts))
        assert difference.max() <= np.sum(np.abs(values / found.width - np.rint(values / found.width)) < 1e-6)


def test_min_max_is_the_largest_magnitude() -> None:
    collector = MinMaxCollector()
    for batch in ([1.0, -3.5], [2.0], [0.0]):
        collector.collect(np.array(batch, np.float32))
    assert collector.threshold() == 3.5


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0, 99.9, 100.0])
def test_percentile_is_numpys_within_a_bin(percent: float) -> None:
    values = np.random.default_rng(2).standard_normal(50000).astype(np.float32)
    values[:5000] = 0
    collector = PercentileCollector(percent)
    for batch in np.split(values, 10):
        collector.collect(batch)
    width = collector._histogram.width
    rank = math.ceil(percent * values.size / 100)
    wanted = np.sort(np.abs(values))[rank - 1]
    assert wanted - 1e-6 <= collector.threshold() <= wanted + 2 * width


def test_collectors_of_zeros_say_zero() -> None:
    for collector in (MinMaxCollector(), EntropyCollector(), PercentileCollector()):
        collector.collect(np.zeros(10, np.float32))
        assert collector.threshold() == 0


@pytest.mark.parametrize("percent", [0, -1, 101, "99", True, None])
def test_a_percentile_out_of_range_is_refused(percent: Any) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="above 0 and up to 100"):
        PercentileCollector(percent)
