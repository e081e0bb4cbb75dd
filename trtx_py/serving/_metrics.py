"""Histograms that cost next to nothing to fill, and what is read from them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .._errors import InvalidArgumentError

SECONDS: tuple[float, ...] = (*(float(f"{step}e{power}") for power in range(-6, 2) for step in (1, 2, 5)), 100.0)
"""Upper bounds for durations: 1 us to 100 s in steps of 1, 2, 5."""

ROWS: tuple[float, ...] = tuple(float(1 << power) for power in range(13))
"""Upper bounds for rows in a batch: 1, 2, 4, ..., 4096."""


@dataclass(frozen=True)
class HistogramSnapshot:
    """A histogram at one moment.

    Attributes:
        bounds: upper bounds of all buckets but the last, ascending; a value equal to a bound belongs to its bucket. The
            last bucket has no bound.
        counts: how many values each bucket holds, one more than ``bounds``; not cumulative.
        sum: of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """How many values were observed."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Sum over count; nan when empty."""
        count = self.count
        return self.sum / count if count else math.nan

    def quantile(self, q: float) -> float:
        """The value that a share ``q`` of all values does not exceed, interpolated linearly within its bucket.

        Values above the last bound count as the last bound; below the first one the bucket begins at 0, or at the
        bound itself where that is negative. nan when empty.

        Raises:
            InvalidArgumentError: ``q`` lies outside 0 to 1.
        """
        if not 0 <= q <= 1:
            raise InvalidArgumentError(f"q is {q!r}; expected a share from 0 to 1, for example 0.99")
        rank, seen = q * self.count, 0
        for index, count in enumerate(self.counts):
            if count and seen + count >= rank:
                if index == len(self.bounds):
                    return self.bounds[-1]
                upper = self.bounds[index]
                lower = self.bounds[index - 1] if index else min(0.0, upper)
                return lower + (upper - lower) * (rank - seen) / count
            seen += count
        return math.nan


class Histogram:
    """Counts values by bucket. ``observe`` is one bisection and two additions.

    It has no lock: one thread at a time may observe, or the owner's lock is held. Another thread may take a snapshot
    meanwhile; its sum and counts can then be one observation apart.
    """

    __slots__ = ("_array", "_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """``bounds``: finite and strictly ascending upper bounds, at least one; the bucket above the last is implied.

        Raises:
            InvalidArgumentError: they are not.
        """
        self._bounds = tuple(map(float, bounds))
        finite = all(map(math.isfinite, self._bounds))
        if not self._bounds or not finite or any(a >= b for a, b in zip(self._bounds, self._bounds[1:], strict=False)):
            raise InvalidArgumentError(
                f"bounds are {tuple(bounds)!r}; expected at least one, all finite, each above the one before"
            )
        self._array = np.array(self._bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count ``value``, ``count`` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def observe_all(self, values: NDArray[np.float64]) -> None:
        """Count each of ``values``."""
        for index in self._array.searchsorted(values).tolist():
            self._counts[index] += 1
        self._sum += float(values.sum())

    def snapshot(self) -> HistogramSnapshot:
        """What has been observed so far."""
        return HistogramSnapshot(self._bounds, tuple(self._counts), self._sum)
