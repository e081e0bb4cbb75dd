"""Samples of one contender, round by round, and what may be said of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: Resamplings for a confidence interval of 95%.
_RESAMPLED = 400
_INTERVAL = (2.5, 97.5)
#: Samples of one round that are drawn from; of more than these every second, every third, ...
_MOST_RESAMPLED = 4000


@dataclass
class Round:
    """Times of some requests in nanoseconds, and the CPU time that all of them took together."""

    times_ns: Sequence[int] | np.ndarray
    loop_cpu_ns: int = 0
    process_cpu_ns: int = 0


class CpuMeter:
    """CPU time of this thread and of the process since it was made."""

    def __init__(self) -> None:
        self._process, self._thread = time.process_time_ns(), time.thread_time_ns()

    def round(self, times_ns: Sequence[int] | np.ndarray) -> Round:
        """A round that ends now."""
        return Round(times_ns, time.thread_time_ns() - self._thread, time.process_time_ns() - self._process)


@dataclass
class Samples:
    """Times in nanoseconds, one array for each round. Rounds are what is resampled: samples of one round are not
    independent, and drift between rounds is the larger uncertainty.

    Attributes:
        rounds: one array for each round.
        loop_cpu_ns, process_cpu_ns: CPU time of one request: of the thread that asked, of the whole process; one number
            for each round.
    """

    rounds: list[np.ndarray] = field(default_factory=list)
    loop_cpu_ns: list[float] = field(default_factory=list)
    process_cpu_ns: list[float] = field(default_factory=list)

    def add(self, done: Round) -> None:
        self.rounds.append(np.asarray(done.times_ns, np.float64))
        self.loop_cpu_ns.append(done.loop_cpu_ns / len(done.times_ns))
        self.process_cpu_ns.append(done.process_cpu_ns / len(done.times_ns))

    @property
    def all(self) -> np.ndarray:
        return np.concatenate(self.rounds)

    def percentile(self, q: float) -> float:
        """In nanoseconds, over all rounds."""
        return float(np.percentile(self.all, q))

    def resampled(self, picks: np.ndarray, q: Sequence[float]) -> np.ndarray:
        """Percentiles of each row of ``picks``, which are numbers of rounds; shape (len(q), len(picks))."""
        shortest = min(len(each) for each in self.rounds)
        every = -(-shortest // _MOST_RESAMPLED)
        table = np.stack([each[:shortest:every] for each in self.rounds])
        return np.percentile(table[picks].reshape(len(picks), -1), q, axis=1)

    def summary(self) -> dict[str, Any]:
        """For the JSON, in microseconds."""
        p50_ci, p99_ci = (_interval(row) for row in self.resampled(_picks(len(self.rounds)), (50, 99)))
        return {
            "samples": int(sum(len(each) for each in self.rounds)),
            "rounds": len(self.rounds),
            "p50_us": self.percentile(50) / 1e3,
            "p50_ci_us": [value / 1e3 for value in p50_ci],
            "p99_us": self.percentile(99) / 1e3,
            "p99_ci_us": [value / 1e3 for value in p99_ci],
            "mean_us": float(self.all.mean()) / 1e3,
            "min_us": float(self.all.min()) / 1e3,
            "loop_cpu_us": float(np.median(self.loop_cpu_ns)) / 1e3,
            "process_cpu_us": float(np.median(self.process_cpu_ns)) / 1e3,
            "round_p50_us": [round(float(np.median(each)) / 1e3, 3) for each in self.rounds],
        }


def _picks(rounds: int) -> np.ndarray:
    """Numbers of rounds, drawn with replacement; the same for all contenders of a run, which is what pairs them."""
    return np.random.default_rng(20).integers(0, rounds, (_RESAMPLED, rounds))


def _interval(values: np.ndarray) -> list[float]:
    low, high = np.percentile(values, _INTERVAL)
    return [float(low), float(high)]


def compare(ours: Samples, theirs: Samples) -> dict[str, Any]:
    """Ratio and difference of medians and of 99th percentiles; the intervals draw the same rounds for both."""
    picks = _picks(min(len(ours.rounds), len(theirs.rounds)))
    mine, other = ours.resampled(picks, (50, 99)), theirs.resampled(picks, (50, 99))
    result: dict[str, Any] = {}
    for number, q in enumerate((50, 99)):
        a, b = ours.percentile(q), theirs.percentile(q)
        result[f"p{q}_ratio"] = a / b
        result[f"p{q}_ratio_ci"] = _interval(mine[number] / other[number])
        result[f"p{q}_added_us"] = (a - b) / 1e3
        result[f"p{q}_added_ci_us"] = [value / 1e3 for value in _interval(mine[number] - other[number])]
    return result


def compare_rates(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Ratio of median rates, one number for each round on both sides; the interval draws the same rounds for both."""
    mine, other = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    picks = _picks(min(len(mine), len(other)))
    resampled = np.median(mine[picks], axis=1) / np.median(other[picks], axis=1)
    return {"ratio": float(np.median(mine) / np.median(other)), "ratio_ci": _interval(resampled)}


def compare_percentiles(ours: Samples, q: float, theirs: Samples, p: float) -> dict[str, Any]:
    """One percentile of ours over another of theirs; the intervals draw the same rounds for both."""
    picks = _picks(min(len(ours.rounds), len(theirs.rounds)))
    resampled = ours.resampled(picks, (q,))[0] / theirs.resampled(picks, (p,))[0]
    return {"ratio": ours.percentile(q) / theirs.percentile(p), "ratio_ci": _interval(resampled)}


def median_of(name: str, values: Sequence[float]) -> dict[str, Any]:
    """The median of one number for each round, and its interval under ``name`` with ``_ci``."""
    found = np.asarray(values, np.float64)
    return {name: float(np.median(found)), f"{name}_ci": _interval(np.median(found[_picks(len(found))], axis=1))}
