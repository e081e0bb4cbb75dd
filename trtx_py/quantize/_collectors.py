"""From the values that a tensor takes to the range that it is quantized with."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .._errors import CalibrationError, InvalidArgumentError
from .._types import Array

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]

#: A histogram's bins; after the range has grown, half of them at least are in use.
BINS = 4096
#: Thresholds that the entropy method tries: every so many bins.
_STRIDE = 8
#: Counts that an empty last bin is given.
_SMOOTH = 1e-4


class Collector(Protocol):
    """Chooses the ranges of activations. Bring your own: ``Calibration(data, method=MyCollector)``.

    One object for each tensor, made without arguments; it sees the tensor's values batch by batch, in order.
    """

    def collect(self, values: Floats, /) -> None:
        """Take in one batch: finite float32 values of any shape, not to be kept or changed."""
        ...

    def threshold(self) -> float:
        """The magnitude that the largest number of the type stands for; larger values are clipped to it.

        Asked once, after all batches: positive, or 0 for a tensor that was always 0.
        """
        ...


class MinMaxCollector:
    """The largest magnitude: nothing is clipped. TensorRT's choice for transformers (IInt8MinMaxCalibrator)."""

    def __init__(self) -> None:
        self._largest = 0.0

    def collect(self, values: Floats, /) -> None:
        """See Collector."""
        self._largest = max(self._largest, float(np.abs(values).max(initial=0.0)))

    def threshold(self) -> float:
        """See Collector."""
        return self._largest


class Histogram:
    """Counts of magnitudes in BINS equal bins from 0, whose range doubles when a larger value comes.

    Attributes:
        counts: int64 [BINS]; values that are exactly 0 are in ``zeros`` instead, since every grid has a 0.
        width: of one bin.
    """

    def __init__(self) -> None:
        self.counts: Counts = np.zeros(BINS, np.int64)
        self.width = 0.0
        self.zeros = 0

    def add(self, values: Floats) -> None:
        """Count the values of one batch."""
        magnitudes = np.abs(values).reshape(-1).astype(np.float64)
        magnitudes = magnitudes[magnitudes > 0]
        self.zeros += values.size - magnitudes.size
        if not magnitudes.size:
            return
        largest = float(magnitudes.max())
        if not self.width:
            self.width = max(largest / BINS, float(np.finfo(np.float32).tiny))
        while largest > self.width * BINS:
            # Two neighbours become one bin, so that no count moves to a wrong place.
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.width *= 2
        places = np.minimum((magnitudes / self.width).astype(np.int64), BINS - 1)
        self.counts += np.bincount(places, minlength=BINS)


class EntropyCollector:
    """The range whose quantized distribution loses least information: the smallest Kullback-Leibler divergence.

    Source: the method of IInt8EntropyCalibrator2
    """

    def __init__(self) -> None:
        self._histogram = Histogram()

    def collect(self, values: Floats, /) -> None:
        """See Collector."""
        self._histogram.add(values)

    def threshold(self) -> float:
        """See Collector."""
        return entropy_threshold(self._histogram.counts, self._histogram.width)


class PercentileCollector:
    """The magnitude below which ``percent`` of the values lie, 99.99 unless told."""

    def __init__(self, percent: float = 99.99) -> None:
        self._percent = checked_percent(percent)
        self._histogram = Histogram()

    def collect(self, values: Floats, /) -> None:
        """See Collector."""
        self._histogram.add(values)

    def threshold(self) -> float:
        """See Collector."""
        histogram = self._histogram
        return percentile_threshold(histogram.counts, histogram.width, self._percent, zeros=histogram.zeros)


def checked_percent(value: Any) -> float:
    """``value`` as a percentage above 0 and up to 100. Raises InvalidArgumentError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 100:
        raise InvalidArgumentError(f"percentile is {value!r}; expected a number above 0 and up to 100, such as 99.99")
    return float(value)


def percentile_threshold(counts: Array, width: float, percent: float, *, zeros: int = 0) -> float:
    """The upper edge of the first bin at which ``percent`` of all values, ``zeros`` more of them at 0, are reached."""
    total = int(counts.sum()) + zeros
    if not counts.sum():
        return 0.0
    wanted = total * percent / 100 - zeros
    place = int(np.searchsorted(np.cumsum(counts), wanted, side="left"))
    return float(min(place, int(np.flatnonzero(counts)[-1])) + 1) * width


def entropy_threshold(counts: Array, width: float, *, levels: int = 128) -> float:
    """The threshold with the smallest divergence between a histogram and what ``levels`` levels can say of it.

    For each candidate, a multiple of _STRIDE bins from ``levels`` bins up to the last that is in use: the reference is
    the histogram up to there, all that lies beyond added to its last bin; the other side is the histogram up to there
    in ``levels`` groups of neighbouring bins, each group's count spread evenly over those of its bins that are not
    empty; if the last bin is, it gets _SMOOTH. Of equal candidates the first.

    Args:
        counts: of magnitudes, in equal bins from 0.
        width: of one bin.
        levels: positive levels of the type; INT8 has 128 with its zero.
    Returns:
        The upper edge of the last bin that is kept; 0 for an empty histogram.
    """
    used = np.flatnonzero(counts)
    if not used.size:
        return 0.0
    end = int(used[-1]) + 1
    if end <= levels:
        return end * width
    candidates = [*range(levels, end, _STRIDE), end]
    reference = np.asarray(counts, np.float64)
    best, best_divergence = end, np.inf
    for stop in candidates:
        divergence = _divergence(reference, stop, levels)
        if divergence < best_divergence:
            best, best_divergence = stop, divergence
    return best * width


def _divergence(counts: npt.NDArray[np.float64], stop: int, levels: int) -> float:
    inside = counts[:stop]
    reference = inside.copy()
    reference[-1] += counts[stop:].sum()
    starts = np.arange(levels) * stop // levels
    groups = np.diff(np.append(starts, stop))
    filled = inside > 0
    sums = np.add.reduceat(inside, starts)
    members = np.add.reduceat(filled.astype(np.float64), starts)
    even = np.divide(sums, members, out=np.zeros(levels), where=members > 0)
    spread = np.where(filled, np.repeat(even, groups), 0.0)
    if reference[-1]:
        # Outliers were put where the quantized distribution may have nothing; a divergence needs something there.
        spread[-1] = max(spread[-1], _SMOOTH)
    total = spread.sum()
    if total <= _SMOOTH:
        return float("inf")  # there are outliers alone
    taken = reference > 0
    p, q = reference[taken] / reference.sum(), spread[taken] / total
    return float(np.sum(p * np.log(p / q)))


def checked_values(name: str, values: Array) -> Floats:
    """A batch of a tensor, finite and float32. Raises CalibrationError."""
    flat: Floats = np.asarray(values, np.float32)
    if not np.isfinite(flat).all():
        raise CalibrationError(
            f"tensor {name!r} has values that are not finite with this calibration data, so it has no range; look for "
            "bad inputs, or keep the nodes that read it in FP32 (PrecisionPolicy.keep)"
        )
    return flat
