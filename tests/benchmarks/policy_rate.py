"""How many rows the batcher's scheduling core decides about in a second of one core: no device, no event loop."""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from trtx_py import BatchPolicy
from trtx_py.serving._policy import Batch, Scheduler, Ticket

from .rig import Settings
from .samples import median_of

_BATCH, _LANES = 64, 3
Making = Callable[[int], Ticket]


class SteadyState:
    """A scheduler whose lanes are full: each turn one batch ends, as many rows come in as it had, and one is launched.

    Time is a number that the turns add to; what a batcher asks in one turn of its loop is asked here, in its order.
    """

    def __init__(self, make: Making, batch: int = _BATCH) -> None:
        self._make, self._batch, self._now = make, batch, 0.0
        depth = BatchPolicy().depth
        self._scheduler = Scheduler(BatchPolicy(), max_rows=4096, max_delay_s=0.002, lanes=_LANES)
        self._running: deque[Batch] = deque()
        self.launched_rows = 0
        for _ in range(_LANES * depth):
            self._turn(ends=False)

    def _turn(self, *, ends: bool) -> None:
        scheduler, running, make = self._scheduler, self._running, self._make
        self._now = now = self._now + 0.001
        if ends:
            scheduler.done(running.popleft())
        offer = scheduler.offer
        for number in range(self._batch):
            offer(make(number), now)
        scheduler.late(now)
        progress = True
        while progress:
            progress = bool(scheduler.admit())
            scheduler.empty()
            while (found := scheduler.next_group(now)) is not None:
                scheduler.open(found[0], self._batch, now)
                progress = True
            while (due := scheduler.due(now)) is not None:
                self.launched_rows += len(scheduler.launched(due))  # of one row each
                running.append(due)
                progress = True
        scheduler.wake_at(now)

    def rate(self, rows: int) -> float:
        """Rows per second of this process' CPU time. Raises AssertionError if other numbers of rows were launched."""
        turns, before = max(1, rows // self._batch), self.launched_rows
        begun = time.process_time_ns()
        for _ in range(turns):
            self._turn(ends=True)
        elapsed = time.process_time_ns() - begun
        launched = self.launched_rows - before
        if launched != turns * self._batch:
            raise AssertionError(f"{turns * self._batch} rows came in, and {launched} were launched")
        return launched / max(elapsed, 1) * 1e9


def _alike(_number: int) -> Ticket:
    return Ticket(1, "rows")


class MadeBefore:
    """Tickets that exist already, taken again in turn: more of them than are ever under way."""

    def __init__(self, count: int = 64 * _BATCH) -> None:
        self._next = itertools.cycle([Ticket(1, "rows") for _ in range(count)]).__next__

    def __call__(self, _number: int) -> Ticket:
        return self._next()


def _mixed(number: int) -> Ticket:
    return Ticket(1, "rows", number % 3, f"tenant {number % 4}")


def _with_deadlines(number: int, clock: list[float]) -> Ticket:
    clock[0] += 0.001 / _BATCH
    return Ticket(1, "rows", deadline=clock[0] + 0.05)


def scheduling_rate(batch: int, rows: int) -> float:
    """Rows per second of requests of one row that are all alike."""
    return SteadyState(_alike, batch).rate(rows)


def run_policy(settings: Settings) -> dict[str, Any]:
    """Requests of one row, in batches of 64; where nothing else is said, making their tickets counts."""
    kinds: dict[str, Making] = {
        "alike": _alike,
        "alike, tickets made before": MadeBefore(),
        "3 priorities, 4 tenants": _mixed,
        "deadlines": functools.partial(_with_deadlines, clock=[0.0]),
    }
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    states = {kind: SteadyState(make) for kind, make in kinds.items()}
    rounds, rows = settings.count(20, 10), max(64 * _BATCH, round(64_000 * settings.scale))
    order = list(kinds)
    for kind in order:
        states[kind].rate(rows // 4)
    for number in range(rounds):
        turn = number % len(order)
        for kind in order[turn:] + order[:turn]:
            rates[kind].append(states[kind].rate(rows))
    return {
        "clock": "CPU time of the process: others who use the machine do not count",
        "batch": _BATCH,
        "rows_each_round": rows,
        "kinds": {
            kind: {
                **median_of("rows_per_s", values),
                "ns_per_row": 1e9 / float(np.median(values)),
                "rounds": [round(value) for value in values],
            }
            for kind, values in rates.items()
        },
    }
