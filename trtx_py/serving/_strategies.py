"""Which device of a MultiDevice gets the next request, and how the work on each is estimated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .._arguments import closest
from .._errors import InvalidArgumentError

#: What a request is taken to cost where nothing was measured yet: something, and something for each byte.
_FIRST_S, _FIRST_S_PER_BYTE = 1e-4, 1e-9
#: A measured cost follows new samples, downwards faster: what is slow once (a first launch) is not slow for ever.
_DOWN, _UP, _MOST_UP = 0.5, 0.05, 4.0
#: However slow a device seems, it is tried once the others are this much busier; else nothing would correct it.
_SLOWEST = 4.0


@dataclass(frozen=True)
class DeviceLoad:
    """One device as a strategy of the caller's own sees it.

    Attributes:
        device: ordinal.
        outstanding_requests, outstanding_rows, outstanding_bytes: given to it and not answered; bytes are of inputs.
        outstanding_s: how long that is expected to keep it busy, from what was measured, in seconds.
        request_s: how long the request at hand is expected to, in seconds.
        utilisation: share of time in which its GPU was busy, for whomever, 0 to 1; None unless NVML is sampled.
    """

    device: int
    outstanding_requests: int
    outstanding_rows: int
    outstanding_bytes: int
    outstanding_s: float
    request_s: float
    utilisation: float | None


@dataclass(frozen=True)
class RequestInfo:
    """The request that a strategy finds a device for.

    Attributes:
        rows: along axis 0; 1 where the inputs have no axis of rows.
        nbytes: of its inputs, as far as they are arrays.
        priority, deadline_s, tenant: as the caller gave them.
    """

    rows: int
    nbytes: int
    priority: int = 0
    deadline_s: float | None = None
    tenant: str = ""


#: A strategy of the caller's own: gives the index into the candidates. Called in the event loop for each request.
Strategy = Callable[[Sequence[DeviceLoad], RequestInfo], int]


class Load:
    """Work on one device. Used in the pool's event loop alone.

    The cost of a request is learned by its size (by powers of two): the time from the later of its own beginning and
    the end of the one before it until its end. In a queue that is its service time, and with several lanes its share.

    Args:
        common: what requests cost on any of the devices, which share it: where this one has no figure of its own.
    """

    __slots__ = ("_common", "_costs", "_last_end_s", "device", "nbytes", "requests", "rows", "seconds", "utilisation")

    def __init__(self, device: int, common: dict[int, float] | None = None) -> None:
        self.device = device
        self._common: dict[int, float] = {} if common is None else common
        self.utilisation: float | None = None
        self._costs: dict[int, float] = {}
        self.reset()

    def reset(self) -> None:
        """Nothing is outstanding: another engine took the place of a broken one. What was learned stays."""
        self.requests = self.rows = self.nbytes = 0
        self.seconds = self._last_end_s = 0.0

    def cost(self, nbytes: int) -> float:
        """How long a request of this size is expected to keep the device busy, in seconds."""
        size = nbytes.bit_length()
        known = self._costs.get(size)
        if known is None:
            known = self._common.get(size)
        return known if known is not None else _FIRST_S + _FIRST_S_PER_BYTE * nbytes

    def begin(self, rows: int, nbytes: int) -> float:
        """A request is given to the device; returns what it is expected to cost, for ``end``."""
        cost = self.cost(nbytes)
        self.requests += 1
        self.rows += rows
        self.nbytes += nbytes
        self.seconds += cost
        return cost

    def end(self, rows: int, nbytes: int, cost: float, begun_s: float | None, now_s: float) -> None:
        """It has ended. ``begun_s``: when it was given to the device; None if its time says nothing."""
        self.requests -= 1
        self.rows -= rows
        self.nbytes -= nbytes
        self.seconds = self.seconds - cost if self.requests else 0.0  # no rounding is left over
        if begun_s is not None:
            size, sample_s = nbytes.bit_length(), now_s - max(begun_s, self._last_end_s)
            _learn(self._costs, size, sample_s)
            _learn(self._common, size, sample_s)
            self._last_end_s = now_s

    def snapshot(self, nbytes: int) -> DeviceLoad:
        """For a strategy of the caller's own, or for statistics."""
        return DeviceLoad(
            self.device, self.requests, self.rows, self.nbytes, self.seconds, self.cost(nbytes), self.utilisation
        )


def _learn(costs: dict[int, float], size: int, sample_s: float) -> None:
    known = costs.get(size)
    if known is None:
        costs[size] = sample_s
    elif sample_s < known:
        costs[size] = known + _DOWN * (sample_s - known)
    else:
        costs[size] = known + _UP * (min(sample_s, _MOST_UP * known) - known)


class Chooser(Protocol):
    """Picks one of ``loads``, of which there are two at least."""

    def __call__(self, loads: Sequence[Load], request: RequestInfo) -> int: ...


class RoundRobin:
    """Each in turn."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self, loads: Sequence[Load], request: RequestInfo) -> int:
        self._next += 1
        return (self._next - 1) % len(loads)


class LeastLoaded:
    """Where this request is expected to be done first. Of several that are alike, each in turn."""

    def __init__(self) -> None:
        self._turn = 0

    def __call__(self, loads: Sequence[Load], request: RequestInfo) -> int:
        nbytes = request.nbytes
        costs = [load.cost(nbytes) for load in loads]
        most = _SLOWEST * min(costs)
        count = len(loads)
        self._turn = turn = (self._turn + 1) % count
        best, least = turn, float("inf")
        for step in range(count):
            index = turn + step if turn + step < count else turn + step - count
            cost = costs[index]
            expected = loads[index].seconds + (cost if cost < most else most)
            if expected < least:
                best, least = index, expected
        return best


class LeastUtilised:
    """Where the GPU was least busy when NVML was last looked at, counting in what was sent there since.

    Args:
        interval_s: between two looks: the unit in which outstanding work is added to the utilisation.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._otherwise = LeastLoaded()

    def __call__(self, loads: Sequence[Load], request: RequestInfo) -> int:
        if any(load.utilisation is None for load in loads):
            return self._otherwise(loads, request)  # not looked at yet, or NVML does not tell
        best, least = 0, float("inf")
        for index, load in enumerate(loads):
            busy = (load.utilisation or 0.0) + load.seconds / self._interval_s
            if busy < least:
                best, least = index, busy
        return best


class OfCaller:
    """A callable of the caller's own."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._name = getattr(strategy, "__qualname__", None) or repr(strategy)

    def __call__(self, loads: Sequence[Load], request: RequestInfo) -> int:
        candidates = [load.snapshot(request.nbytes) for load in loads]
        try:
            index = self._strategy(candidates, request)
        except Exception as error:
            raise InvalidArgumentError(
                f"the strategy {self._name} failed ({type(error).__name__}: {error}); nothing was launched"
            ) from error
        if type(index) is not int or not 0 <= index < len(loads):
            raise InvalidArgumentError(
                f"the strategy {self._name} answered {index!r}; expected an index into its {len(loads)} candidates, "
                f"0 to {len(loads) - 1}"
            )
        return index


def make_chooser(strategy: Any, interval_s: float) -> Chooser:
    """What ``strategy`` names. Raises InvalidArgumentError."""
    if strategy == "round_robin":
        return RoundRobin()
    if strategy == "least_loaded":
        return LeastLoaded()
    if strategy == "utilisation":
        return LeastUtilised(interval_s)
    given: Any = strategy
    if callable(strategy):
        return OfCaller(given)
    names = ("round_robin", "least_loaded", "utilisation")
    close = closest(strategy, names) if isinstance(strategy, str) else None
    hint = f"; did you mean {close!r}?" if close else ""
    raise InvalidArgumentError(
        f"strategy is {strategy!r}; expected one of {', '.join(map(repr, names))}, or a callable "
        f"(candidates, request) -> index{hint}"
    )
