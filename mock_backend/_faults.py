"""Faults: make the n-th call of any seam method fail, hang for a while, or lose the device."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ._clock import Clock

__all__ = ["EXECUTE", "Fault", "FaultPlan", "Outcome", "device_lost", "fail", "out_of_memory", "slow"]

#: Name of the kernel itself, as it runs on its stream; ``execute_async_v3`` is the call that enqueues it.
EXECUTE = "execute"

_OPERATING_SYSTEM = 304
_OUT_OF_MEMORY = 2
_LAUNCH_FAILED = 719


@dataclass(frozen=True)
class Fault:
    """One planned fault.

    Attributes:
        call: a seam method's name ("cuMemAlloc", "deserialize", "set_input_shape", ...), or "execute" for the kernel.
        nth: which call it strikes, counted from 1 from the moment the fault is planned.
        error: the CUresult that a driver call or kernel reports; for a TensorRT call any number, which the typed
            error's text then carries. None without a delay means the call's usual failure; None with a delay means
            that the call is slow and succeeds.
        delay_s: seconds on the backend's clock before the call goes on or fails.
        count: how many calls in a row it strikes; None for every later one.
        lose_device: the device's context is unusable afterwards, until it is released and retained again.
    """

    call: str
    nth: int = 1
    error: int | None = field(default=None, kw_only=True)
    delay_s: float = field(default=0.0, kw_only=True)
    count: int | None = field(default=1, kw_only=True)
    lose_device: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.nth < 1:
            raise ValueError(f"Fault on {self.call}: nth is {self.nth}, and calls are counted from 1")
        if self.count is not None and self.count < 1:
            raise ValueError(f"Fault on {self.call}: count is {self.count}; use 1 or more, or None for all later calls")
        if self.delay_s < 0:
            raise ValueError(f"Fault on {self.call}: delay_s is {self.delay_s}, and must not be negative")

    @property
    def fails(self) -> bool:
        """False for a fault that only delays."""
        return self.error is not None or self.lose_device or self.delay_s == 0

    @property
    def code(self) -> int:
        """The CUresult it reports: ``error``, or the usual one for this call."""
        if self.error is not None:
            return self.error
        return _LAUNCH_FAILED if self.lose_device or self.call == EXECUTE else _OPERATING_SYSTEM

    def strikes(self, number: int) -> bool:
        """True if the ``number``-th call (from 1) is one that this fault is meant for."""
        return self.nth <= number and (self.count is None or number < self.nth + self.count)


def fail(call: str, nth: int = 1, *, error: int | None = None, count: int | None = 1) -> Fault:
    """The ``nth`` call of ``call`` fails and has no effect.

    A driver call raises CudaError with ``error`` (default 304, CUDA_ERROR_OPERATING_SYSTEM, which leaves the context
    usable); a kernel ("execute") fails with 719, which does not. A TensorRT call logs an error line and raises what
    the seam promises for it: EngineError, BuilderError, ParserError, ExecutionError or ShapeError.
    """
    return Fault(call, nth, error=error, count=count)


def out_of_memory(call: str = "cuMemAlloc", nth: int = 1, *, count: int | None = 1) -> Fault:
    """The ``nth`` call finds no memory (CUDA_ERROR_OUT_OF_MEMORY), however much the arena has left."""
    return Fault(call, nth, error=_OUT_OF_MEMORY, count=count)


def device_lost(nth: int = 1, *, call: str = EXECUTE, error: int = _LAUNCH_FAILED) -> Fault:
    """The device goes away in the ``nth`` call: this and every later call of its context return ``error``.

    In a kernel (the default) it surfaces at the next call, as any asynchronous error does.
    """
    return Fault(call, nth, error=error, lose_device=True)


def slow(call: str = EXECUTE, seconds: float = 0.02, *, nth: int = 1, count: int | None = None) -> Fault:
    """Calls take ``seconds`` longer on the backend's clock, and succeed; by default all of them from ``nth`` on."""
    return Fault(call, nth, delay_s=seconds, count=count)


@dataclass(frozen=True)
class Outcome:
    """What a fault does to the call at hand."""

    code: int
    lose_device: bool
    call: str
    number: int

    def __str__(self) -> str:
        return f"fault injected into call {self.number} of {self.call}"


class FaultPlan:
    """The faults of one backend and the number of calls of each name so far. Thread-safe."""

    def __init__(self, clock: Clock, faults: Iterable[Fault] = ()) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self._planned: list[tuple[Fault, int]] = [(fault, 0) for fault in faults]

    @property
    def calls(self) -> Counter[str]:
        """A copy of the counters, by call name."""
        with self._lock:
            return self._calls.copy()

    def add(self, fault: Fault) -> None:
        """Plan ``fault``; its ``nth`` counts from the next call."""
        with self._lock:
            self._planned.append((fault, self._calls[fault.call]))

    def clear(self) -> None:
        """Forget all planned faults; the counters stay."""
        with self._lock:
            self._planned.clear()

    def enter(self, call: str) -> Outcome | None:
        """Count one call and wait out its delays; the outcome is None if the call may go on."""
        with self._lock:
            self._calls[call] += 1
            total = self._calls[call]
            hits = [f for f, offset in self._planned if f.call == call and f.strikes(total - offset)]
        for fault in hits:
            self._clock.sleep(fault.delay_s)
        failing = [f for f in hits if f.fails]
        if not failing:
            return None
        return Outcome(failing[0].code, any(f.lose_device for f in failing), call, total)
