"""Models that one-shot calls keep: by content, the least recently used one goes first."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ._graph import Graph
from ._status import Status, StatusError, failure


@dataclass
class _Entry:
    making: threading.Lock = field(default_factory=threading.Lock)
    graph: Graph | None = None
    failed: tuple[int, str] | None = None
    users: int = 0


class ModelCache:
    """Thread-safe. What is in use is not closed; while all are, there may be more than ``most``."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._hits = self._misses = 0

    @contextlib.contextmanager
    def using(self, key: str, make: Callable[[], Graph]) -> Iterator[Graph]:
        """The graph of ``key``, made by the first who asks; others wait, and share its failure."""
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
            entry.users += 1
        try:
            yield self._made(key, entry, make)
        finally:
            self._let_go(entry)

    def _made(self, key: str, entry: _Entry, make: Callable[[], Graph]) -> Graph:
        with entry.making:
            if entry.failed is not None:
                status, text = entry.failed
                raise StatusError(Status(status), text)
            with self._lock:
                self._hits += entry.graph is not None
                self._misses += entry.graph is None
            if entry.graph is None:
                try:
                    entry.graph = make()
                except BaseException as error:
                    with self._lock:  # who comes later tries again
                        self._forget(key, entry)
                    entry.failed = failure(error)
                    raise
            return entry.graph

    def _forget(self, key: str, entry: _Entry) -> None:
        if self._entries.get(key) is entry:
            del self._entries[key]

    def _let_go(self, entry: _Entry) -> None:
        with self._lock:
            entry.users -= 1
            surplus = []
            while len(self._entries) > self._most:
                oldest = next((key for key, each in self._entries.items() if not each.users), None)
                if oldest is None:
                    break
                surplus.append(self._entries.pop(oldest))
        _close(surplus)

    def statistics(self) -> tuple[int, int, int]:
        """Models, hits, misses."""
        with self._lock:
            return sum(entry.graph is not None for entry in self._entries.values()), self._hits, self._misses

    def close(self) -> None:
        """Nobody uses one any more."""
        with self._lock:
            entries = list(self._entries.values())
            self._entries.clear()
        _close(entries)


def _close(entries: list[_Entry]) -> None:
    with contextlib.ExitStack() as closing:  # whatever one of them raises, the others are closed
        for entry in entries:
            if entry.graph is not None:
                closing.callback(entry.graph.close)
