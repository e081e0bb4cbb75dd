"""Intervals hold what they say, windows that agree are found, and turns are balanced."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

import trtx_py as trtx
from trtx_py.benchmark import Interval, WarmUp
from trtx_py.benchmark._figures import Figures, Samples
from trtx_py.benchmark._load import Block
from trtx_py.benchmark._session import turn_orders
from trtx_py.benchmark._stats import Bootstrap
from trtx_py.benchmark._warmup import Stability


def rounds_of(rng: np.random.Generator, median: float, count: int = 20, samples: int = 30) -> list[np.ndarray]:
    """Rounds with a drift of their own each, and samples around that."""
    return [median * np.exp(rng.normal(0, 0.05) + rng.normal(0, 0.1, samples)) for _ in range(count)]


def test_intervals_of_a_median_hold_the_true_one_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for number in range(120):
        found = Bootstrap(seed=number, resamplings=200).percentile(rounds_of(rng, 100.0), 50)
        assert found.low is not None
        assert found.high is not None
        assert found.low <= found.value <= found.high
        held += found.low <= 100.0 <= found.high
    assert 0.87 <= held / 120 <= 1.0


def test_intervals_of_a_ratio_hold_the_true_one_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(6)
    held = 0
    for number in range(80):
        drift = np.exp(rng.normal(0, 0.3, 20))  # large, and the same for both: interleaved rounds share it
        ours = [each * by for each, by in zip(rounds_of(rng, 90.0), drift, strict=True)]
        theirs = [each * by for each, by in zip(rounds_of(rng, 100.0), drift, strict=True)]
        found = Bootstrap(seed=number, resamplings=200).ratio_of_percentiles(ours, theirs, 50)
        held += (found.low or 0) <= 0.9 <= (found.high or 0)
    assert held / 80 >= 0.87


def test_drift_that_both_share_cancels_in_their_ratio() -> None:
    rng = np.random.default_rng(7)
    drift = np.exp(rng.normal(0, 0.5, 30))
    theirs = [100.0 * by * np.ones(9) for by in drift]
    ratio = Bootstrap().ratio_of_percentiles([0.5 * each for each in theirs], theirs, 50)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))
    assert Bootstrap().ratio_of_rates([2 * by for by in drift], list(drift)).high == pytest.approx(2)


def test_the_seed_decides_the_interval() -> None:
    rounds = rounds_of(np.random.default_rng(8), 100.0)
    assert Bootstrap(seed=1).percentile(rounds, 99) == Bootstrap(seed=1).percentile(rounds, 99)
    assert Bootstrap(seed=1).percentile(rounds, 99) != Bootstrap(seed=2).percentile(rounds, 99)


def test_one_round_has_no_interval() -> None:
    assert Bootstrap().percentile([[1.0, 2.0, 3.0]], 50) == Interval(2.0)
    assert Bootstrap().rate([7.0]) == Interval(7.0)
    assert str(Interval(2.0)) == "2.000"
    assert str(Interval(2.0, 1.0, 3.5)) == "2.000 (1.000 to 3.500)"


def test_many_samples_are_thinned_and_not_truncated() -> None:
    rounds = [np.linspace(0, 100, 20_001) for _ in range(4)]
    assert Bootstrap(resamplings=20).percentile(rounds, 50).high == pytest.approx(50, abs=0.1)


@pytest.mark.parametrize("confidence", [0, 1, -0.5, 95, True, "0.95", None])
def test_confidence_is_a_share(confidence: object) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=r"between 0 and 1, such as 0\.95"):
        Bootstrap(confidence=confidence)  # type: ignore[arg-type]


def block(times: list[int], elapsed: int, late: list[int] | None = None) -> Block:
    return Block(np.array(times, np.int64), elapsed, 6000, np.array(late or [], np.int64))


def test_figures() -> None:
    samples = Samples()
    for _ in range(3):
        samples.add(block([1000, 2000, 3000], 10_000))
    figures = Figures(samples, 4, Bootstrap())
    found = figures.measurement()
    assert (found.rounds, found.requests) == (3, 9)
    assert found.p50_us == Interval(2.0, 2.0, 2.0)
    assert (found.min_us, found.mean_us, found.max_us) == (1.0, 2.0, 3.0)
    assert found.requests_per_s.value == pytest.approx(3e5)
    assert found.rows_per_s.value == pytest.approx(12e5)
    assert found.round_p50_us == (2.0, 2.0, 2.0)
    assert len(found.curve_us) == 101
    assert found.cpu_us == pytest.approx(2.0)
    assert found.late_p99_us is None
    half = Samples()
    for _ in range(3):
        half.add(block([2000, 4000, 6000], 20_000, late=[0, 0, 500]))
    slower = Figures(half, 4, Bootstrap())
    assert slower.measurement().late_p99_us == pytest.approx(0.5)
    ratio = figures.over(slower, "other")
    assert (ratio.versus, ratio.p50.value, ratio.p99.value, ratio.rows_per_s.value) == ("other", 0.5, 0.5, 2.0)
    assert ratio.p50.low == ratio.p50.high == 0.5


# ---- warm-up ----


def settled_after(medians: list[float], **options: float) -> int | None:
    stability = Stability(WarmUp(**{"windows": 3, "agreement": 0.05, **options}))  # type: ignore[arg-type]
    for number, median in enumerate(medians, 1):
        if stability.add(median):
            return number
    return None


def test_it_is_stable_once_the_last_windows_agree() -> None:
    assert settled_after([100, 50, 20, 10, 10.2, 9.9, 10]) == 6
    assert settled_after([10, 10, 10]) == 3
    assert settled_after([10, 10.4, 10.8, 11.2, 11.6, 12.0]) is None  # neighbours agree, and it drifts all the same
    assert settled_after([10, 20, 10, 20, 10, 20]) is None
    assert settled_after([10, 20, 10, 20], agreement=1.0) == 3


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"windows": 1}, {"agreement": 0}, {"time_limit_s": -1}, {"time_limit_s": float("nan")}]
)
def test_warm_ups_that_cannot_be(options: dict[str, float]) -> None:
    with pytest.raises(trtx.InvalidArgumentError):
        WarmUp(**options)  # type: ignore[arg-type]


# ---- turns ----


@pytest.mark.parametrize(("contenders", "rounds"), [(1, 3), (2, 7), (5, 20), (3, 2)])
def test_turns_are_balanced(contenders: int, rounds: int) -> None:
    orders = turn_orders(contenders, rounds, seed=3)
    assert orders.shape == (rounds, contenders)
    assert all(sorted(order) == list(range(contenders)) for order in orders.tolist())
    for start in range(0, rounds - contenders + 1, contenders):
        whole = orders[start : start + contenders]
        assert all(Counter(column) == Counter(range(contenders)) for column in whole.T.tolist())


def test_turns_follow_the_seed() -> None:
    assert (turn_orders(6, 12, 1) == turn_orders(6, 12, 1)).all()
    assert (turn_orders(6, 12, 1) != turn_orders(6, 12, 2)).any()
