"""Copying large rows in threads, which numpy lets run beside the event loop."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from .._types import Array
from ._rows import RowLayout

#: What one thread copies at a time.
_PIECE_BYTES = 4 << 20
_MOST_THREADS = 4


class Copier:
    """Threads are started when there is something to copy."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None

    def copy(
        self,
        layout: RowLayout,
        target: Sequence[Array],
        offset: int,
        arrays: Sequence[Array],
        rows: int,
        nbytes: int,
        done: Callable[[Exception | None], None],
    ) -> int:
        """Write ``rows`` rows in pieces; ``done`` is called once for each, in any thread. Returns how many."""
        if self._threads is None:
            workers = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0))))
            self._threads = ThreadPoolExecutor(workers, thread_name_prefix="trtx_py-rows")
        pieces = list(_pieces(rows, nbytes))
        for start, stop in pieces:
            part = layout.part(arrays, start, stop)
            write = functools.partial(_write, layout, target, offset + start, part, stop - start, done)
            once = functools.partial(_unless_begun, threading.Lock(), write)
            try:
                self._threads.submit(once)
            except RuntimeError:  # no more threads. It is queued all the same, and one that is at work may get to it
                once()
        return len(pieces)

    def close(self) -> None:
        """Wait until nothing is copied any more, also of requests that nobody waits for; then threads end. Idempotent.

        The memory goes after this.
        """
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown()


def _pieces(rows: int, nbytes: int) -> Iterator[tuple[int, int]]:
    count = max(1, min(rows, -(-nbytes // _PIECE_BYTES)))
    each = -(-rows // count)
    for start in range(0, rows, each):
        yield start, min(start + each, rows)


def _unless_begun(begun: threading.Lock, write: Callable[[], None]) -> None:
    if begun.acquire(blocking=False):
        write()


def _write(
    layout: RowLayout,
    target: Sequence[Array],
    start: int,
    part: Sequence[Array],
    rows: int,
    done: Callable[[Exception | None], None],
) -> None:
    error: Exception | None = None
    try:
        layout.write(target, start, part, rows)
    except Exception as failure:  # an array of the caller's own making
        error = failure
    done(error)
