"""Time as the mock sees it: kernel durations, event times and injected delays all go through one clock."""

from __future__ import annotations

import time
from typing import Protocol

from ._native import Time

__all__ = ["Clock", "RealClock", "VirtualClock"]


class Clock(Protocol):
    """What the mock asks of time. Implementations are thread-safe, and are called on the streams' threads too."""

    def now_ns(self) -> int:
        """Nanoseconds since an arbitrary, fixed moment; never runs backwards."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let ``seconds`` pass in the calling thread."""
        ...


class RealClock:
    """The machine's own clock (``time.perf_counter_ns``); sleeping really sleeps."""

    def now_ns(self) -> int:
        return time.perf_counter_ns()

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            time.sleep(seconds)


class VirtualClock:
    """A clock that only moves when told to: a delay of an hour takes no time and is exactly an hour long.

    Sleeping advances the clock by the time slept and returns at once, so tests of slow kernels and of
    ``cuEventElapsedTime`` are deterministic. Delays on two streams add up rather than overlap: there is one time line.
    """

    def __init__(self, start_ns: int = 0) -> None:
        #: The time line itself, which native code reads and moves too.
        self.time = Time(start_ns)

    def now_ns(self) -> int:
        return self.time.now()

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Move time forward by ``seconds``; a negative value raises ValueError."""
        if seconds < 0:
            raise ValueError(f"time cannot run backwards: advance({seconds})")
        self.time.advance(round(seconds * 1e9))
