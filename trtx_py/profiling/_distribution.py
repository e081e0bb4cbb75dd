"""Many measured values as the few numbers that a report keeps of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .._errors import InvalidArgumentError

_BINS = 40
#: What lies beyond goes into one last bin: a single outlier must not squeeze all others into the first.
_CUT = 99.0


@dataclass(frozen=True)
class Distribution:
    """What a set of values looks like, all in one unit, which the owner's docstring names.

    Percentiles are interpolated linearly between the two nearest values, as numpy does.

    Attributes:
        count: how many values there were, at least one.
        mean, minimum, maximum, p50, p90, p95, p99: of the values.
        quantiles: 101 values: 0 %, 1 %, ... 100 %; the curve of the cumulative distribution.
        edges: of the histogram's bins, ascending, one more than ``counts``. Bins are equally wide but for the last,
            which reaches from a little above p99 to the maximum.
        counts: values in each bin.
    """

    count: int
    mean: float
    minimum: float
    maximum: float
    p50: float
    p90: float
    p95: float
    p99: float
    quantiles: tuple[float, ...]
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution:
        """Summarize ``values``.

        Raises:
            InvalidArgumentError: there are none, or one of them is not finite.
        """
        data = np.sort(np.asarray(values, np.float64))
        if data.ndim != 1 or not data.size or not np.isfinite(data).all():
            raise InvalidArgumentError(
                f"a distribution of {data.size} values cannot be made: expected at least one, all of them finite"
            )
        quantiles = np.percentile(data, np.arange(101))
        edges = _edges(float(data[0]), float(np.percentile(data, _CUT)), float(data[-1]))
        counts = np.histogram(data, edges)[0]
        return cls(
            count=int(data.size),
            mean=math.fsum(data) / data.size,
            minimum=float(data[0]),
            maximum=float(data[-1]),
            p50=float(quantiles[50]),
            p90=float(quantiles[90]),
            p95=float(quantiles[95]),
            p99=float(quantiles[99]),
            quantiles=tuple(quantiles.tolist()),
            edges=tuple(edges),
            counts=tuple(counts.tolist()),
        )


def _edges(low: float, cut: float, high: float) -> list[float]:
    if high <= low:
        return [low, low + max(abs(low) * 1e-6, 1e-9)]
    upper = cut + (cut - low) * 0.1
    if not low < upper < high:
        return [float(edge) for edge in np.linspace(low, high, _BINS + 1)]
    return [*(float(edge) for edge in np.linspace(low, upper, _BINS + 1)), high]
