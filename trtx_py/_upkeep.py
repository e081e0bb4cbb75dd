"""What a lane owes beside its requests, and when: captures that were lost, and letting go of what is out of use.

Nothing tells a lane's thread that a graph goes idle, or that a shape recurs which other lanes serve: both happen in
native code. So the thread looks, but only while it owes something, and ever more rarely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ._capture import ShapeKey
from ._graphs import GraphCache
from ._request import Request

_SOON_S = 0.02
_SELDOM_S = 1.0
_BACK_OFF = 4  # the more often a capture has failed, the longer until the next attempt
_MOST_PATIENT = 6


@dataclass
class _Owed:
    """A capture that this lane lacks."""

    profiles: list[int]
    attempts: int
    due_s: float
    pause_s: float
    hits: int | None  # on the other lanes, when it was last looked at; None: they had none


class Upkeep:
    """Of one lane; under the lock of its Lanes, but for ``tidy``. Times are of one monotonic clock, in seconds.

    Args:
        graphs: the lane's captured shapes; None where there are none to look after.
    """

    def __init__(self, graphs: GraphCache | None) -> None:
        self._graphs = graphs
        self._owed: dict[ShapeKey, _Owed] = {}
        self._tidy_s: float | None = None
        self._tidy_pause_s = _SOON_S

    def lacks(self, key: ShapeKey) -> bool:
        """It could be captured here, and is not."""
        return self._graphs is not None and self._graphs.lacks(key)

    def hits(self, key: ShapeKey) -> int | None:
        """Replays of it on this lane; None if it is not captured here."""
        return self._graphs.hits(key) if self._graphs is not None else None

    def lost(self, capture: Request, now_s: float, hits: int | None) -> None:
        """A capture failed, or was cancelled before it was begun: it is made up for when its shape recurs.

        Args:
            hits: replays on the other lanes, up to now; None where none of them has it.
        """
        key = capture.capture
        if key is None or not self.lacks(key):
            return
        attempts = capture.attempts + 1
        pause_s = _SOON_S * _BACK_OFF ** min(attempts - 1, _MOST_PATIENT)
        self._owed[key] = _Owed(capture.profiles, attempts, now_s + pause_s, _SOON_S, hits)

    def want(self, key: ShapeKey, profiles: list[int], now_s: float) -> None:
        """Somebody waits for a slot of it: at once, unless an attempt has just failed."""
        if self.lacks(key) and key not in self._owed:
            self._owed[key] = _Owed(profiles, 0, now_s, _SOON_S, None)

    def due_captures(self, now_s: float, elsewhere: Callable[[ShapeKey], int | None], wanted: bool) -> list[Request]:
        """What is to be captured now.

        Args:
            elsewhere: replays on the other lanes; None where none of them has the shape, or is about to.
            wanted: requests wait for slots.
        """
        due: list[Request] = []
        for key in [key for key, owed in self._owed.items() if owed.due_s <= now_s]:
            owed, hits = self._owed[key], elsewhere(key)
            if hits is None or not self.lacks(key):
                # Where no lane has it, its requests come to the lanes' threads, which see themselves that it recurs.
                del self._owed[key]
            elif wanted or (owed.hits is not None and hits > owed.hits):
                del self._owed[key]
                due.append(self._request(key, owed))
            else:
                owed.hits = hits
                owed.due_s, owed.pause_s = now_s + owed.pause_s, min(2 * owed.pause_s, _SELDOM_S)
        return due

    @staticmethod
    def _request(key: ShapeKey, owed: _Owed) -> Request:
        request = Request({}, owed.profiles, capture=key, background=True)
        request.attempts = owed.attempts
        return request

    def tidying_is_due(self, now_s: float) -> bool:
        """It is time for ``tidy``."""
        if self._graphs is None or not self._graphs.untidy:
            self._tidy_s, self._tidy_pause_s = None, _SOON_S
            return False
        if self._tidy_s is None:
            self._tidy_s = now_s + self._tidy_pause_s
        if now_s < self._tidy_s:
            return False
        self._tidy_pause_s = min(2 * self._tidy_pause_s, _SELDOM_S)
        self._tidy_s = now_s + self._tidy_pause_s
        return True

    def tidy(self) -> None:
        """Let go of what is out of use. On the lane's thread, without the lock. Raises as GraphCache.tidy."""
        if self._graphs is not None:
            self._graphs.tidy()

    def pause_s(self, now_s: float) -> float | None:
        """How long there is nothing to do; None: until something happens."""
        times: Sequence[float] = [owed.due_s for owed in self._owed.values()]
        if self._tidy_s is not None:
            times = [*times, self._tidy_s]
        return max(0.0, min(times) - now_s) if times else None
