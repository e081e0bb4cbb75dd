"""What a batcher counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from ._metrics import ROWS, SECONDS, Histogram, HistogramSnapshot


@dataclass(frozen=True)
class BatcherStatistics:
    """A snapshot of ``batcher.statistics()``; counts since it was made.

    Every accepted request ends in one of completed, failed, cancelled, shed, late and dropped.

    Attributes:
        accepted: requests that were taken in, if only to wait for room.
        completed: requests whose result was delivered.
        failed: requests that ended with an error.
        cancelled: requests that nobody waited for any more.
        rejected: requests that were refused for lack of room.
        shed: requests that were given up for later ones.
        late: requests whose deadline passed before the launch.
        dropped: requests that ``aclose`` gave up, at its timeout or because it was not to drain.
        rows_completed: rows of the completed requests; of ``infer_many`` batch by batch.
        padding_rows: rows that were computed for nobody.
        batches: launches out of a batch's memory.
        bypassed: requests that met an idle engine and went to it directly.
        waiting, waiting_rows: requests, and their rows, that have been let in and are not launched.
        running_batches: launched and not finished, requests that bypassed included.
        bytes_in_flight: of inputs that are accepted and not answered; batches' inputs that came the short way excluded.
        queue_s: seconds until the launch, for each request that did not bypass: from its arrival on. For ``infer_many``
            for each of its batches or pieces: from when that one got in line, or a native thread began to copy it.
        batch_rows: rows that were wanted of each launch, without padding.
        gpu_s: from each launch until its result was seen, in seconds.
        completion_s: seconds until the result, for each request that has one: from its arrival on. For ``infer_many``
            for each of its batches or pieces, counted as for ``queue_s``: then its count is not that of ``completed``.
    """

    accepted: int
    completed: int
    failed: int
    cancelled: int
    rejected: int
    shed: int
    late: int
    dropped: int
    rows_completed: int
    padding_rows: int
    batches: int
    bypassed: int
    waiting: int
    waiting_rows: int
    running_batches: int
    bytes_in_flight: int
    queue_s: HistogramSnapshot
    batch_rows: HistogramSnapshot
    gpu_s: HistogramSnapshot
    completion_s: HistogramSnapshot


def _seconds() -> Histogram:
    return Histogram(SECONDS)


def _rows() -> Histogram:
    return Histogram(ROWS)


@dataclass
class Histograms:
    """The histograms of BatcherStatistics."""

    queue_s: Histogram = field(default_factory=_seconds)
    batch_rows: Histogram = field(default_factory=_rows)
    gpu_s: Histogram = field(default_factory=_seconds)
    completion_s: Histogram = field(default_factory=_seconds)


@dataclass
class Counts:
    """The counters of BatcherStatistics."""

    accepted: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    rejected: int = 0
    shed: int = 0
    late: int = 0
    dropped: int = 0
    rows_completed: int = 0
    padding_rows: int = 0
    batches: int = 0
    bypassed: int = 0

    def end(self, account: Account, how: str) -> bool:
        """Count how a request ended, once; False if it is counted already."""
        if account.counted:
            return False
        account.counted = True
        setattr(self, how, getattr(self, how) + 1)
        return True


class Account:
    """One request, as far as counting goes."""

    __slots__ = ("accepted", "counted")

    def __init__(self) -> None:
        self.accepted = self.counted = False

    def admit(self) -> bool:
        """It was taken in; False if it was before."""
        before, self.accepted = self.accepted, True
        return not before
