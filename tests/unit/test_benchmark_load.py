"""Load: who sends what when, and from which moment a request counts. On a clock that tests turn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from trtx_py.benchmark import ClosedLoop, OpenLoop, _load
from trtx_py.benchmark._load import Work, poisson_arrivals, run_closed, run_in_threads, run_open

SETS = [{"x": np.full(1, value)} for value in range(3)]


def work(count: int, keep: Any = (), arrivals: list[int] | None = None) -> Work:
    order = [number % len(SETS) for number in range(count)]
    return Work(SETS, order, frozenset(keep), None if arrivals is None else np.array(arrivals, np.int64))


class Clock:
    """Stands still but where somebody waits or works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0
        monkeypatch.setattr(_load, "_clock", lambda: self.now)
        monkeypatch.setattr(_load, "_sleep_until", self.jump)
        monkeypatch.setattr(_load, "_until", self.ajump)

    def jump(self, due: int) -> None:
        self.now = max(self.now, due)

    async def ajump(self, due: int) -> None:
        await asyncio.sleep(0)  # who is there gets its turn
        self.jump(due)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_arrivals_are_poisson() -> None:
    arrivals = poisson_arrivals(1000.0, 50_000, np.random.default_rng(3))
    gaps = np.diff(arrivals) / 1e6
    assert arrivals.dtype == np.int64
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1.0, rel=0.02)
    assert gaps.std() == pytest.approx(1.0, rel=0.03)  # exponential: as large as the mean
    counts = np.bincount((arrivals // 10_000_000).astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, rel=0.1)  # Poisson: variance is the mean


async def test_a_stall_is_counted_for_all_who_waited(clock: Clock) -> None:
    """One thread serves arrivals every 10 ns, needs 1 ns for each, and stalls once for 100 ns: from the moments at
    which it took them up, only one would have been slow."""
    durations = iter([1, 100, *[1] * 12])

    def serve(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        clock.now += next(durations)
        return inputs

    block = await run_in_threads([serve], work(14, arrivals=[10 * n for n in range(14)]))
    behind = [max(1, 110 - 10 * n + (n - 1)) for n in range(2, 14)]
    assert block.times_ns.tolist() == [1, 100, *behind]
    assert block.late_ns.tolist() == [0, 0, *[each - 1 for each in behind]]
    assert block.elapsed_ns == 131


async def test_what_the_event_loop_submits_late_counts_from_its_intended_arrival(clock: Clock) -> None:
    """The first request blocks the loop, so that the others cannot even be submitted."""
    first = True

    async def infer(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        nonlocal first
        clock.now += 1000 if first else 5
        first = False
        return inputs

    block = await run_open(infer, work(4, arrivals=[0, 100, 200, 5000]))
    assert block.times_ns[0] == 1000
    assert block.times_ns[1] == 1000 - 100 + 5
    assert block.times_ns[2] >= 1000 - 200 + 5
    assert block.times_ns[3] == 5
    assert block.late_ns[1] == 900
    assert block.elapsed_ns == 5005


async def test_closed_loop_sends_everything_once(clock: Clock) -> None:
    seen = []

    async def infer(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        seen.append(int(inputs["x"][0]))
        clock.now += 7
        await asyncio.sleep(0)
        return inputs

    for clients in (1, 3, 50):
        seen.clear()
        block = await run_closed(infer, work(20, keep=(0, 19)), clients)
        assert sorted(seen) == sorted(n % 3 for n in range(20))
        assert len(block.times_ns) == 20
        assert (block.times_ns >= 7).all()
        assert block.elapsed_ns == 140
        assert sorted(which for which, _ in block.kept) == [0, 1]
        assert all(outputs["x"][0] == which for which, outputs in block.kept)


async def test_threads_share_the_requests() -> None:
    used: set[int] = set()
    together = threading.Barrier(4)

    def call(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        if threading.get_ident() not in used:
            used.add(threading.get_ident())
            together.wait(10)
        return inputs

    block = await run_in_threads([call] * 4, work(40, keep=range(40)))
    assert len(used) == 4
    assert sorted(which for which, _ in block.kept) == sorted(n % 3 for n in range(40))
    assert (block.times_ns > 0).all()


async def test_the_first_error_ends_all_clients() -> None:
    left = 0

    async def infer(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        nonlocal left
        if inputs["x"][0] == 2:
            raise trtx.ExecutionError("no")
        try:
            await asyncio.sleep(60)
        finally:
            left += 1
        return inputs

    with pytest.raises(trtx.ExecutionError):
        await run_closed(infer, work(3), 3)
    assert left == 2
    with pytest.raises(trtx.ExecutionError):
        await run_open(infer, work(3, arrivals=[0, 0, 0]))
    assert left == 4

    def blocking(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        raise trtx.ExecutionError("no")

    with pytest.raises(trtx.ExecutionError):
        await run_in_threads([blocking] * 2, work(10))


async def test_cancellation_waits_for_what_is_in_flight() -> None:
    began, release, ended = threading.Event(), threading.Event(), []

    def call(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        began.set()
        release.wait(10)
        ended.append(inputs)
        return inputs

    task = asyncio.create_task(run_in_threads([call], work(1000)))
    await asyncio.to_thread(began.wait, 10)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(ended) == 1  # no further one was begun

    both, begun = asyncio.Event(), 0

    async def infer(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        nonlocal begun
        begun += 1
        if begun == 2:
            both.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(inputs)
        return inputs

    task = asyncio.create_task(run_open(infer, work(3, arrivals=[0, 0, 10**12])))
    await both.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(ended) == 3


@pytest.mark.parametrize("make", [
    (ClosedLoop, 0), (ClosedLoop, 1.5), (OpenLoop, 0), (OpenLoop, float("inf")), (OpenLoop, "9"), (OpenLoop, True),
])  # fmt: skip
def test_loads_that_cannot_be(make: Any) -> None:
    kind, number = make
    with pytest.raises(trtx.InvalidArgumentError):
        kind(number)
    with pytest.raises(trtx.InvalidArgumentError):
        OpenLoop(9, threads=0)


def test_loads_in_words() -> None:
    assert str(ClosedLoop()) == "closed, 1 client"
    assert str(ClosedLoop(8)) == "closed, 8 clients"
    assert str(OpenLoop(2500.0)) == "open, 2500/s"
