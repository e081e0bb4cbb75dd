"""Faults: make the n-th call of any seam method fail, hang for a while, or lose the device."""

from __future__ import annotations

import difflib
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ._clock import Clock
from ._native import CALLS, Mock

__all__ = ["EXECUTE", "Fault", "FaultPlan", "Outcome", "device_lost", "fail", "out_of_memory", "process_lost", "slow"]

#: Name of the kernel itself, as it runs on its stream; ``execute_async_v3`` is the call that enqueues it.
EXECUTE = "execute"

_NATIVE = frozenset(name for name in CALLS if name.startswith("cu") or name == EXECUTE)
#: TensorRT's part of the seam: what ``Seam.enter`` is told.
_TENSORRT = frozenset(
    {
        "add_input", "add_layer", "build_serialized_network", "create_builder", "create_context", "create_network",
        "create_runtime", "deserialize", "destroy", "device_memory_bytes", "execute_async_v3", "get_tensor_shape",
        "mark_output", "parse_onnx", "refit", "report_to_profiler", "set_aux_streams", "set_device_memory",
        "set_input_shape", "set_output_allocator", "set_profile", "set_profiler", "set_tensor_address", "unmark_output",
    }
)  # fmt: skip
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
        lose_process: so are those of all devices, for good: what a faulting kernel does to a process. Only for driver
            calls and kernels.
        device: only calls on this device count and are struck: those with its context current, or with it as argument.
            None: calls on any.
    """

    call: str
    nth: int = 1
    error: int | None = field(default=None, kw_only=True)
    delay_s: float = field(default=0.0, kw_only=True)
    count: int | None = field(default=1, kw_only=True)
    lose_device: bool = field(default=False, kw_only=True)
    lose_process: bool = field(default=False, kw_only=True)
    device: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_call(self.call)
        if self.nth < 1:
            raise ValueError(f"Fault on {self.call}: nth is {self.nth}, and calls are counted from 1")
        if self.count is not None and self.count < 1:
            raise ValueError(f"Fault on {self.call}: count is {self.count}; use 1 or more, or None for all later calls")
        if self.lose_process and self.call not in _NATIVE:
            raise ValueError(f"Fault on {self.call}: lose_process is for driver calls and {EXECUTE!r}")
        if self.delay_s < 0:
            raise ValueError(f"Fault on {self.call}: delay_s is {self.delay_s}, and must not be negative")

    @property
    def fails(self) -> bool:
        """False for a fault that only delays."""
        return self.error is not None or self.lose_device or self.lose_process or self.delay_s == 0

    @property
    def code(self) -> int:
        """The CUresult it reports: ``error``, or the usual one for this call."""
        if self.error is not None:
            return self.error
        lost = self.lose_device or self.lose_process
        return _LAUNCH_FAILED if lost or self.call == EXECUTE else _OPERATING_SYSTEM

    def strikes(self, number: int) -> bool:
        """True if the ``number``-th call (from 1) is one that this fault is meant for."""
        return self.nth <= number and (self.count is None or number < self.nth + self.count)


def _check_call(call: object) -> None:
    """A fault in a call that there is none of would never strike, and the test pass. Raises TypeError, ValueError."""
    if not isinstance(call, str):
        raise TypeError(
            f"Fault on {call!r}: call is a {type(call).__name__}; expected the name of a call, such as 'cuMemAlloc'"
        )
    known = _NATIVE | _TENSORRT
    if call not in known:
        close = difflib.get_close_matches(call, sorted(known))
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are {', '.join(sorted(known))}"
        raise ValueError(f"Fault on {call!r}: no call of the seam has that name; {hint}")


def fail(
    call: str, nth: int = 1, *, error: int | None = None, count: int | None = 1, device: int | None = None
) -> Fault:
    """The ``nth`` call of ``call`` fails and has no effect.

    A driver call raises CudaError with ``error`` (default 304, CUDA_ERROR_OPERATING_SYSTEM, which leaves the context
    usable); a kernel ("execute") fails with 719, which does not. A TensorRT call logs an error line and raises what
    the seam promises for it: EngineError, BuilderError, ParserError, ExecutionError or ShapeError.
    """
    return Fault(call, nth, error=error, count=count, device=device)


def out_of_memory(call: str = "cuMemAlloc", nth: int = 1, *, count: int | None = 1, device: int | None = None) -> Fault:
    """The ``nth`` call finds no memory (CUDA_ERROR_OUT_OF_MEMORY), however much the arena has left."""
    return Fault(call, nth, error=_OUT_OF_MEMORY, count=count, device=device)


def device_lost(nth: int = 1, *, call: str = EXECUTE, error: int = _LAUNCH_FAILED, device: int | None = None) -> Fault:
    """The device goes away in the ``nth`` call: this and every later call of its context return ``error``.

    In a kernel (the default) it surfaces at the next call, as any asynchronous error does.
    """
    return Fault(call, nth, error=error, lose_device=True, device=device)


def process_lost(nth: int = 1, *, call: str = EXECUTE, error: int = 700, device: int | None = None) -> Fault:
    """Every context of the process is unusable, as a kernel that faults (700, 716, 719) leaves a real driver.

    On all devices, and none can be retained anew: only another process helps. ``device_lost`` is one device's failure.
    """
    return Fault(call, nth, error=error, lose_process=True, device=device)


def slow(
    call: str = EXECUTE,
    seconds: float = 0.02,
    *,
    nth: int = 1,
    count: int | None = None,
    device: int | None = None,
) -> Fault:
    """Calls take ``seconds`` longer on the backend's clock, and succeed; by default all of them from ``nth`` on."""
    return Fault(call, nth, delay_s=seconds, count=count, device=device)


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
    """The faults of one backend and the number of calls of each name so far. Thread-safe.

    Those of driver calls and kernels are kept by the C mock, since native code makes such calls too.
    """

    def __init__(self, clock: Clock, mock: Mock, faults: Iterable[Fault] = ()) -> None:
        self._clock = clock
        self._mock = mock
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self._calls_on: Counter[tuple[str, int]] = Counter()
        self._planned: list[tuple[Fault, int]] = []
        for fault in faults:
            self.add(fault)

    @property
    def calls(self) -> Counter[str]:
        """A copy of the counters, by call name."""
        native = {name: count for name, count in self._mock.calls().items() if name in _NATIVE}
        with self._lock:
            return self._calls + Counter(native)

    def add(self, fault: Fault) -> None:
        """Plan ``fault``; its ``nth`` counts from the next call."""
        if fault.call in _NATIVE:
            error = fault.code if fault.fails else 0
            delay_ns = round(fault.delay_s * 1e9)
            device = -1 if fault.device is None else fault.device
            lost = 2 if fault.lose_process else int(fault.lose_device)
            self._mock.inject(fault.call, fault.nth, fault.count or 0, error, delay_ns, lost, device)
            return
        with self._lock:
            self._planned.append((fault, self._so_far(fault)))

    def clear(self) -> None:
        """Forget all planned faults; the counters stay."""
        self._mock.clear_faults()
        with self._lock:
            self._planned.clear()

    def _so_far(self, fault: Fault) -> int:
        """Under the lock: the calls that count for it."""
        return self._calls[fault.call] if fault.device is None else self._calls_on[fault.call, fault.device]

    def enter(self, call: str) -> Outcome | None:
        """Count one call of TensorRT's and wait out its delays; the outcome is None if the call may go on."""
        device = self._mock.current()[1]  # -1: none is current
        with self._lock:
            self._calls[call] += 1
            self._calls_on[call, device] += 1
            total = self._calls[call]
            hits = [
                f
                for f, offset in self._planned
                if f.call == call and f.device in (None, device) and f.strikes(self._so_far(f) - offset)
            ]
        for fault in hits:
            self._clock.sleep(fault.delay_s)
        failing = [f for f in hits if f.fails]
        if not failing:
            return None
        return Outcome(failing[0].code, any(f.lose_device for f in failing), call, total)
