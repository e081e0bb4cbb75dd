"""Warm-up: requests until the latency has settled, or a limit is reached; which of both is part of the result."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from .._arguments import checked_int
from .._errors import InvalidArgumentError


def positive(value: object, what: str) -> float:
    """``value`` as a finite number above 0."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
    if not good:
        raise InvalidArgumentError(f"{what} is {value!r}; expected a number above 0")
    assert isinstance(value, (int, float))
    return float(value)


@dataclass(frozen=True)
class WarmUp:
    """When a contender counts as warm: the medians of the last ``windows`` windows lie within ``agreement``.

    Attributes:
        window: requests in a window; at least two for each client of a closed loop are used.
        windows: how many consecutive windows have to agree.
        agreement: the largest of their medians may exceed the smallest by this share.
        time_limit_s: after so many seconds it is measured all the same, and marked as not stable.
    """

    window: int = 50
    windows: int = 4
    agreement: float = 0.05
    time_limit_s: float = 10.0

    def __post_init__(self) -> None:
        checked_int(self.window, "WarmUp.window", minimum=1)
        checked_int(self.windows, "WarmUp.windows", minimum=2)
        positive(self.agreement, "WarmUp.agreement")
        positive(self.time_limit_s, "WarmUp.time_limit_s")


class Stability:
    """Told the median of each window; says whether the last ones agree."""

    def __init__(self, warmup: WarmUp) -> None:
        self._agreement = warmup.agreement
        self._last: deque[float] = deque(maxlen=warmup.windows)

    def add(self, median: float) -> bool:
        """True once as many windows as are asked for were seen and the last of them agree."""
        self._last.append(median)
        if len(self._last) < (self._last.maxlen or 0):
            return False
        return max(self._last) <= min(self._last) * (1 + self._agreement)
