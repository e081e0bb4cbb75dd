"""Who holds which optimization profile of an engine.

On a plan that shares profiles any number of contexts may hold one. On others (8.6 without PROFILE_SHARING_0806, with
dynamic shapes) a profile serves one context at a time, which TensorRT tells only when it refuses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from ._errors import BorrowedError, EngineError
from .backends.protocols import BackendContext


class Holder(Protocol):
    """Whoever owns an execution context."""

    @property
    def key(self) -> Hashable: ...
    def describe(self) -> str: ...


class ProfileLedger:
    """Thread-safe. One for each engine."""

    def __init__(self, num_profiles: int) -> None:
        self._lock = threading.RLock()
        self._holders: list[dict[Hashable, Holder]] = [{} for _ in range(num_profiles)]
        self.exclusive = False
        self.switches = 0

    def create(self, holder: Holder, make: Callable[[], BackendContext]) -> BackendContext:
        """Make a context and note which profile TensorRT gave it: 0, or none if that is taken.

        Under the lock: between TensorRT's giving the profile and our knowing it, another context must not ask for it.
        """
        with self._lock:
            context = make()
            active = context.active_profile
            if active < 0:
                self.exclusive = True
            else:
                self._holders[active][holder.key] = holder
            return context

    def left(self, holder: Holder) -> None:
        """The context is gone."""
        with self._lock:
            for holders in self._holders:
                holders.pop(holder.key, None)

    def has_free_profile(self) -> bool:
        with self._lock:
            return not self.exclusive or any(not holders for holders in self._holders)

    def others(self, holder: Holder, profiles: Sequence[int] | None = None) -> list[Holder]:
        """Who else holds one of ``profiles`` (all of them for None)."""
        with self._lock:
            chosen = range(len(self._holders)) if profiles is None else profiles
            found = {key: other for p in chosen for key, other in self._holders[p].items() if key != holder.key}
            return list(found.values())

    def select(self, holder: Holder, context: BackendContext, candidates: Sequence[int], stream: int) -> bool:
        """Bring ``context`` into one of the candidate profiles; True if it changed and the stream must be synchronized.

        Raises BorrowedError naming the contexts that hold all of them.
        """
        active = context.active_profile
        if active in candidates:
            return False  # without the lock, which another lane may hold while it makes its context
        with self._lock:
            for profile in candidates:
                if self.exclusive and self._holders[profile]:
                    continue
                try:
                    context.set_profile(profile, stream)
                except EngineError:
                    if not self._holders[profile]:
                        raise
                    self.exclusive = True
                    continue
                self.left(holder)
                self._holders[profile][holder.key] = holder
                self.switches += active >= 0
                return True
            names = [other.describe() for other in self.others(holder, candidates)]
        raise BorrowedError(
            f"{holder} cannot have an optimization profile that admits these shapes: this plan lets one context at a "
            f"time use a profile, and {' and '.join(names)} holds it; close that first, or build the plan with profile "
            "sharing",
            borrowers=names,
        )
