"""Histograms: what falls where, and what quantiles say of it."""

from __future__ import annotations

import math

import pytest

from trtx_py import InvalidArgumentError
from trtx_py.serving._metrics import ROWS, SECONDS, Histogram, HistogramSnapshot


def test_default_bounds():
    assert SECONDS[:4] == (1e-6, 2e-6, 5e-6, 1e-5)
    assert SECONDS[-4:] == (10.0, 20.0, 50.0, 100.0)
    assert len(SECONDS) == 25
    assert tuple(float(2**power) for power in range(13)) == ROWS
    for bounds in (SECONDS, ROWS):
        assert Histogram(bounds).snapshot().bounds == bounds  # accepted: they ascend


def test_a_value_on_a_bound_belongs_to_its_bucket_and_the_last_bucket_is_open():
    histogram = Histogram((1, 2, 4))
    for value in (-1, 0, 1, 1.5, 2, 2.1, 4, 4.1, 1e9):
        histogram.observe(value)
    snapshot = histogram.snapshot()
    assert snapshot.counts == (3, 2, 2, 2)
    assert snapshot.count == 9
    assert snapshot.sum == pytest.approx(-1 + 0 + 1 + 1.5 + 2 + 2.1 + 4 + 4.1 + 1e9)


def test_many_of_one_value_count_as_many_and_a_snapshot_does_not_change_any_more():
    histogram = Histogram((1, 2))
    histogram.observe(1.5, 10)
    before = histogram.snapshot()
    histogram.observe(0.5)
    assert before == HistogramSnapshot((1.0, 2.0), (0, 10, 0), 15.0)
    assert histogram.snapshot() == HistogramSnapshot((1.0, 2.0), (1, 10, 0), 15.5)
    assert histogram.snapshot().mean == pytest.approx(15.5 / 11)


def test_quantiles_are_interpolated_within_a_bucket():
    snapshot = HistogramSnapshot((10.0, 20.0, 40.0), (10, 10, 0, 0), 0.0)
    assert snapshot.quantile(0) == 0
    assert snapshot.quantile(0.25) == pytest.approx(5)
    assert snapshot.quantile(0.5) == pytest.approx(10)
    assert snapshot.quantile(0.75) == pytest.approx(15)
    assert snapshot.quantile(1) == pytest.approx(20)


def test_quantiles_skip_empty_buckets_and_stop_at_the_last_bound():
    assert HistogramSnapshot((1.0, 2.0, 3.0), (0, 0, 4, 0), 0.0).quantile(0) == 2
    assert HistogramSnapshot((1.0, 2.0), (1, 0, 9), 0.0).quantile(0.99) == 2
    assert HistogramSnapshot((-4.0, 2.0), (1, 0, 0), 0.0).quantile(0.5) == -4


def test_a_quantile_is_within_its_bucket_of_the_exact_one():
    histogram, values = Histogram(SECONDS), [1.1e-6 * 1.07**n for n in range(200)]
    for value in values:
        histogram.observe(value)
    for q in (0.01, 0.3, 0.5, 0.9, 0.99):
        exact = values[math.ceil(q * len(values)) - 1]
        upper = next(bound for bound in SECONDS if bound >= exact)
        assert (
            max((bound for bound in SECONDS if bound < upper), default=0) <= histogram.snapshot().quantile(q) <= upper
        )


def test_nothing_observed_has_no_quantile_and_no_mean():
    snapshot = Histogram(ROWS).snapshot()
    assert (snapshot.count, snapshot.sum) == (0, 0.0)
    assert math.isnan(snapshot.quantile(0.5))
    assert math.isnan(snapshot.mean)


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan])
def test_a_share_outside_0_to_1_is_refused(q: float):
    with pytest.raises(InvalidArgumentError, match=r"q is .*; expected a share from 0 to 1"):
        HistogramSnapshot((1.0,), (1, 0), 1.0).quantile(q)


@pytest.mark.parametrize("bounds", [(), (1, 1), (2, 1), (1, math.inf), (math.nan,)])
def test_bounds_that_do_not_ascend_are_refused(bounds: tuple[float, ...]):
    with pytest.raises(InvalidArgumentError, match="each above the one before"):
        Histogram(bounds)
