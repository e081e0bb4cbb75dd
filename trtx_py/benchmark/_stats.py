"""Medians, percentiles and rates with bootstrap confidence intervals; rounds are what is resampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .._arguments import checked_int
from .._errors import InvalidArgumentError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: Resamplings for one interval.
RESAMPLINGS = 600
#: Samples that one resampling draws at most, over all rounds; of more every second, every third, ... is taken.
_MOST_DRAWN = 10_000
#: Resamplings worked on at once, so that the table of drawn samples stays below about 20 MB.
_CHUNK = 200
#: Fewer rounds than that make intervals too narrow to be believed.
FEWEST_ROUNDS = 6


@dataclass(frozen=True)
class Interval:
    """A figure and how far it can be trusted.

    Attributes:
        value: measured.
        low, high: bounds of the confidence interval; None where one round, or none, was measured.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return number(self.value)
        return f"{number(self.value)} ({number(self.low)} to {number(self.high)})"


def number(value: float) -> str:
    """Four significant digits, thousands separated, no exponent for what a benchmark measures."""
    if value == 0 or not 1e-4 <= abs(value) < 1e9:
        return f"{value:.3g}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def checked_confidence(value: object, what: str = "confidence") -> float:
    """``value`` as a share between 0 and 1, both excluded."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise InvalidArgumentError(f"{what} is {value!r}; expected a number between 0 and 1, such as 0.95")
    return float(value)


class Bootstrap:
    """Draws rounds with replacement, the same for every contender of a run: that pairs them, so that drift, which
    meets all alike in interleaved rounds, cancels in their ratios.

    Samples of one round are not independent of each other, and what differs between rounds is the larger uncertainty;
    therefore whole rounds are drawn, not samples.

    Args:
        confidence: share of intervals that hold the true figure, such as 0.95.
        seed: the same gives the same intervals.
        resamplings: how often is drawn.
    """

    def __init__(self, *, confidence: float = 0.95, seed: int = 0, resamplings: int = RESAMPLINGS) -> None:
        self.confidence = checked_confidence(confidence)
        self._seed = checked_int(seed, "seed", minimum=0)
        self._count = checked_int(resamplings, "resamplings", minimum=10, maximum=100_000)

    def picks(self, rounds: int) -> Ints:
        """Numbers of rounds, (resamplings, rounds)."""
        picks: Ints = np.random.default_rng(self._seed).integers(0, rounds, (self._count, rounds))
        return picks

    def interval(self, value: float, resampled: Floats) -> Interval:
        """``value`` between the percentiles of what the resamplings gave."""
        if resampled.size == 0:
            return Interval(value)
        tail = (1 - self.confidence) / 2 * 100
        low, high = np.percentile(resampled, (tail, 100 - tail))
        return Interval(value, float(low), float(high))

    def percentiles(self, rounds: Sequence[npt.ArrayLike], q: Sequence[float]) -> Floats:
        """Percentiles ``q`` of every resampling, (len(q), resamplings); no columns for fewer than two rounds."""
        if len(rounds) < 2:
            return np.empty((len(q), 0))
        arrays = [np.asarray(each, np.float64) for each in rounds]
        shortest = min(len(each) for each in arrays)
        every = max(1, -(-shortest * len(arrays) // _MOST_DRAWN))
        table = np.stack([each[:shortest:every] for each in arrays])
        picks = self.picks(len(arrays))
        parts = [
            np.percentile(table[part].reshape(len(part), -1), q, axis=1)
            for part in (picks[start : start + _CHUNK] for start in range(0, len(picks), _CHUNK))
        ]
        return np.concatenate(parts, axis=1)

    def medians(self, values: Sequence[float]) -> Floats:
        """The median of one number for each round, of every resampling."""
        if len(values) < 2:
            return np.empty(0)
        found = np.asarray(values, np.float64)
        medians: Floats = np.median(found[self.picks(len(found))], axis=1)
        return medians

    def percentile(self, rounds: Sequence[npt.ArrayLike], q: float) -> Interval:
        """One percentile over all samples of all rounds."""
        return self.interval(_percentile(rounds, q), self.percentiles(rounds, (q,))[0])

    def rate(self, values: Sequence[float]) -> Interval:
        """The median of the rounds' rates."""
        return self.interval(float(np.median(np.asarray(values, np.float64))), self.medians(values))

    def ratio_of_percentiles(
        self, ours: Sequence[npt.ArrayLike], theirs: Sequence[npt.ArrayLike], q: float
    ) -> Interval:
        """The percentile of ours over that of theirs; both draw the same rounds.

        Rounds that only one side has are left out: they have no partner.
        """
        paired = min(len(ours), len(theirs))
        mine, other = ours[:paired], theirs[:paired]
        resampled = self.percentiles(mine, (q,))[0] / self.percentiles(other, (q,))[0]
        return self.interval(_percentile(mine, q) / _percentile(other, q), resampled)

    def ratio_of_rates(self, ours: Sequence[float], theirs: Sequence[float]) -> Interval:
        """Median rate of ours over that of theirs; both draw the same rounds."""
        paired = min(len(ours), len(theirs))
        mine, other = ours[:paired], theirs[:paired]
        return self.interval(float(np.median(mine) / np.median(other)), self.medians(mine) / self.medians(other))


def _percentile(rounds: Sequence[npt.ArrayLike], q: float) -> float:
    return float(np.percentile(np.concatenate([np.asarray(each, np.float64) for each in rounds]), q))
