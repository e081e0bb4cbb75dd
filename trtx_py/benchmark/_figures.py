"""From samples to figures with intervals."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ._load import Block
from ._result import CURVE, Measurement, Ratio
from ._stats import Bootstrap, Floats, Ints

_QUANTILES = (50, 90, 95, 99)


@dataclass
class Samples:
    """What the complete rounds of one contender took.

    Attributes:
        times_ns, late_ns: of each request, by round.
        elapsed_ns, cpu_ns: by round.
    """

    times_ns: list[Ints] = field(default_factory=list)
    late_ns: list[Ints] = field(default_factory=list)
    elapsed_ns: list[int] = field(default_factory=list)
    cpu_ns: list[int] = field(default_factory=list)

    def add(self, block: Block) -> None:
        """One round more."""
        self.times_ns.append(block.times_ns)
        self.late_ns.append(block.late_ns)
        self.elapsed_ns.append(max(block.elapsed_ns, 1))
        self.cpu_ns.append(block.cpu_ns)

    def clear(self) -> None:
        """Nothing of it counts."""
        self.times_ns.clear()
        self.late_ns.clear()
        self.elapsed_ns.clear()
        self.cpu_ns.clear()

    @property
    def rates(self) -> list[float]:
        """Requests a second, by round."""
        return [len(times) * 1e9 / took for times, took in zip(self.times_ns, self.elapsed_ns, strict=True)]


class Figures:
    """The figures of one contender; what was resampled is kept, so that ratios draw the same rounds.

    Args:
        batch: rows of one request.
    """

    def __init__(self, samples: Samples, batch: int, bootstrap: Bootstrap) -> None:
        self._samples, self._batch, self._bootstrap = samples, batch, bootstrap
        self._drawn: Floats = bootstrap.percentiles(samples.times_ns, _QUANTILES) / 1e3
        times = np.concatenate(samples.times_ns) / 1e3
        self._values = [float(value) for value in np.percentile(times, _QUANTILES)]
        self._rates = np.asarray(samples.rates) * batch
        self._drawn_rates: Floats = bootstrap.medians(list(self._rates))
        self._times = times

    def measurement(self) -> Measurement:
        """All but comparisons."""
        samples, bootstrap, times = self._samples, self._bootstrap, self._times
        p50, p90, p95, p99 = (
            bootstrap.interval(value, drawn) for value, drawn in zip(self._values, self._drawn, strict=True)
        )
        late = np.concatenate(samples.late_ns)
        rate = float(np.median(self._rates))
        return Measurement(
            rounds=len(samples.times_ns),
            requests=len(times),
            p50_us=p50,
            p90_us=p90,
            p95_us=p95,
            p99_us=p99,
            mean_us=float(times.mean()),
            min_us=float(times.min()),
            max_us=float(times.max()),
            requests_per_s=bootstrap.interval(rate / self._batch, self._drawn_rates / self._batch),
            rows_per_s=bootstrap.interval(rate, self._drawn_rates),
            round_p50_us=tuple(round(float(np.median(each)) / 1e3, 3) for each in samples.times_ns),
            round_rows_per_s=tuple(round(float(each), 3) for each in self._rates),
            curve_us=tuple(round(float(each), 3) for each in np.quantile(times, np.linspace(0, 1, CURVE))),
            cpu_us=float(np.median([c / len(t) for c, t in zip(samples.cpu_ns, samples.times_ns, strict=True)])) / 1e3,
            late_p99_us=float(np.percentile(late, 99)) / 1e3 if late.size else None,
        )

    def over(self, other: Figures, name: str) -> Ratio:
        """This over another of the same run, which had as many rounds; both draw the same ones."""
        p50, _, _, p99 = (
            self._bootstrap.interval(mine / theirs, drawn / others)
            for mine, theirs, drawn, others in zip(self._values, other._values, self._drawn, other._drawn, strict=True)
        )
        rate = float(np.median(self._rates) / np.median(other._rates))
        return Ratio(name, p50, p99, self._bootstrap.interval(rate, self._drawn_rates / other._drawn_rates))
