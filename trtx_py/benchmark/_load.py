"""Load on a contender: a closed loop of clients, or Poisson arrivals, each for coroutines and for functions that block.

Times are those a client sees: from its arrays to arrays that it owns. In an open loop they count from the moment at
which the request should have arrived, so that a contender that stalls answers for all who had to wait, also for those
whom the load itself could not submit in time (no coordinated omission).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .._aio import run_shielded
from .._arguments import checked_int
from .._errors import InvalidArgumentError
from .._types import Array
from ._warmup import positive

Inputs = Mapping[str, Array]
Outputs = Mapping[str, Array]
Infer = Callable[[Inputs], Awaitable[Outputs]]
BlockingInfer = Callable[[Inputs], Outputs]

_clock = time.perf_counter_ns
#: The clients of a block begin together, that long after the block.
_LEAD_NS = 1_000_000
#: An event loop's sleep is good to about a millisecond; the rest is turned away.
_NAP_NS = 2_000_000


@dataclass(frozen=True)
class ClosedLoop:
    """``clients`` callers, each of which sends its next request once it has the answer to the last.

    What blocks (``sync``, ``bare``, ``onnxruntime``, ``torch``) gets a thread for each client.
    """

    clients: int = 1

    def __post_init__(self) -> None:
        checked_int(self.clients, "clients", minimum=1, maximum=65_536)

    def __str__(self) -> str:
        return f"closed, {self.clients} client{'s' if self.clients > 1 else ''}"


@dataclass(frozen=True)
class OpenLoop:
    """Requests that arrive at random, whether earlier ones are answered or not (a Poisson process).

    Attributes:
        rate_per_s: requests a second on average, 0.01 to 1e9.
        threads: for a contender that blocks: threads that serve the arrivals, first come, first served.
    """

    rate_per_s: float
    threads: int = 1

    def __post_init__(self) -> None:
        if not 0.01 <= positive(self.rate_per_s, "rate_per_s") <= 1e9:
            raise InvalidArgumentError(f"rate_per_s is {self.rate_per_s!r}; expected 0.01 to 1e9 requests a second")
        checked_int(self.threads, "threads", minimum=1, maximum=1024)

    def __str__(self) -> str:
        return f"open, {self.rate_per_s:g}/s"


Load = ClosedLoop | OpenLoop


def poisson_arrivals(rate_per_s: float, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Moments of ``count`` arrivals in nanoseconds from the start, ascending; gaps are exponential."""
    return np.cumsum(rng.exponential(1e9 / rate_per_s, count)).astype(np.int64)


@dataclass(frozen=True)
class Work:
    """The requests of one block.

    Attributes:
        sets: inputs to choose from.
        order: for each request the number of its inputs; neighbours differ, so that a stale answer is a wrong one.
        keep: numbers of the requests whose outputs are kept, to be checked after the block.
        arrivals: in an open loop, when each request arrives, in nanoseconds from the start.
    """

    sets: Sequence[Inputs]
    order: Sequence[int]
    keep: frozenset[int] = frozenset()
    arrivals: npt.NDArray[np.int64] | None = None


@dataclass
class Block:
    """What one block of requests took.

    Attributes:
        times_ns: of each request, in an open loop from its intended arrival.
        elapsed_ns: from the first request to the last answer.
        cpu_ns: CPU time of the whole process meanwhile.
        late_ns: in an open loop, how much later than intended each was submitted.
        kept: number of the inputs, and outputs, of those that were to be kept.
    """

    times_ns: npt.NDArray[np.int64]
    elapsed_ns: int = 0
    cpu_ns: int = 0
    late_ns: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    kept: list[tuple[int, Outputs]] = field(default_factory=list)

    @classmethod
    def for_requests(cls, count: int, *, late: bool) -> Block:
        """One for ``count`` requests, empty still."""
        return cls(np.zeros(count, np.int64), late_ns=np.zeros(count if late else 0, np.int64))


async def run_closed(infer: Infer, work: Work, clients: int) -> Block:
    """A closed loop of coroutines. Cancellation: all clients are cancelled and awaited."""
    count = len(work.order)
    block = Block.for_requests(count, late=False)
    times = [0] * count  # a list is written faster than an array
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:  # shared: whoever is free takes the next
            which = work.order[number]
            given = work.sets[which]
            begun = _clock()
            outputs = await infer(given)
            times[number] = _clock() - begun
            if number in work.keep:
                block.kept.append((which, outputs))

    begun = _clock()
    if clients == 1:
        await client()
    else:
        await _all_of([client() for _ in range(min(clients, count))])
    block.elapsed_ns = _clock() - begun
    block.times_ns[:] = times
    return block


async def run_open(infer: Infer, work: Work) -> Block:
    """Poisson arrivals on coroutines. Cancellation: all requests are cancelled and awaited."""
    assert work.arrivals is not None
    block = Block.for_requests(len(work.order), late=True)
    origin = _clock() + _LEAD_NS
    ends = [origin]

    async def request(number: int, due: int) -> None:
        which = work.order[number]
        block.late_ns[number] = _clock() - due
        outputs = await infer(work.sets[which])
        ended = _clock()
        block.times_ns[number] = ended - due
        ends[0] = max(ends[0], ended)
        if number in work.keep:
            block.kept.append((which, outputs))

    tasks: list[asyncio.Task[None]] = []
    try:
        for number, offset in enumerate(work.arrivals.tolist()):
            await _until(origin + offset)
            tasks.append(asyncio.create_task(request(number, origin + offset)))
    except BaseException:
        await _cancel(tasks)
        raise
    await _together(tasks)
    block.elapsed_ns = ends[0] - origin
    return block


async def run_in_threads(calls: Sequence[BlockingInfer], work: Work) -> Block:
    """A closed loop of one thread for each of ``calls``, or, with arrivals, threads that serve them in their order.

    The event loop is not blocked. Cancellation: delivered once the requests in flight have ended.
    """
    stop = threading.Event()
    return await run_shielded(lambda: _in_threads(calls, work, stop), stop.set)


def _in_threads(calls: Sequence[BlockingInfer], work: Work, stop: threading.Event) -> Block:
    count = len(work.order)
    block = Block.for_requests(count, late=work.arrivals is not None)
    arrivals = None if work.arrivals is None else work.arrivals.tolist()
    numbers, taking = iter(range(count)), threading.Lock()
    errors: list[BaseException] = []
    begins, ends = [0] * len(calls), [0] * len(calls)
    origin = _clock() + _LEAD_NS

    def client(seat: int, call: BlockingInfer) -> None:
        _sleep_until(origin)
        begins[seat] = ends[seat] = _clock()
        while not stop.is_set():
            with taking:
                number = next(numbers, None)
            if number is None:
                return
            which = work.order[number]
            given = work.sets[which]
            begun = due = _clock()
            if arrivals is not None:
                due = origin + arrivals[number]
                _sleep_until(due)
                begun = _clock()
                block.late_ns[number] = begun - due
            outputs = call(given)
            ends[seat] = _clock()
            block.times_ns[number] = ends[seat] - due
            if number in work.keep:
                block.kept.append((which, outputs))

    def guarded(seat: int, call: BlockingInfer) -> None:
        try:
            client(seat, call)
        except BaseException as error:  # handed to the caller, whatever it is; the other clients need not go on
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=guarded, args=each, name="trtx_py-benchmark") for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    block.elapsed_ns = max(ends) - (min(begins) if arrivals is None else origin)
    return block


def _sleep_until(due: int) -> None:
    remaining = due - _clock()
    while remaining > 0:
        # Short rests are spun away: waking up takes 50 microseconds, as much as a small request.
        if remaining > 200_000:
            time.sleep((remaining - 150_000) / 1e9)
        remaining = due - _clock()


async def _until(due: int) -> None:
    remaining = due - _clock()
    while remaining > 0:
        await asyncio.sleep((remaining - _NAP_NS / 2) / 1e9 if remaining > _NAP_NS else 0)
        remaining = due - _clock()


async def _all_of(coroutines: Sequence[Coroutine[Any, Any, None]]) -> None:
    await _together([asyncio.create_task(each) for each in coroutines])


async def _together(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Await all; the first error, or a cancellation, ends the others."""
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        await _cancel(tasks)
        raise


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
