"""Streams and events: in-order queues on threads, with the order that events and the NULL stream impose."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ._clock import Clock

__all__ = ["DeviceFaultError", "Event", "KernelError", "Moment", "Stream"]


class DeviceFaultError(Exception):
    """Work on a stream failed on the device: the context is unusable from here on.

    Attributes:
        code: the CUresult that every later call in the context returns.
    """

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class KernelError(Exception):
    """A kernel cannot compute its outputs from the values it was given; stream and context stay usable."""


@dataclass(frozen=True)
class Moment:
    """A point in a stream's order: everything up to operation ``sequence`` of ``stream``."""

    stream: Stream
    sequence: int

    @property
    def reached(self) -> bool:
        return self.stream.completed >= self.sequence


@dataclass
class Event:
    """A CUDA event; ``record`` is the latest recording, which later waits and queries refer to.

    ``past`` of a recording is everything that is ordered before it, stream by stream.
    """

    @dataclass
    class Recording:
        moment: Moment
        past: Mapping[Stream, int]
        time_ns: int = 0

    handle: int
    owner: int
    timing: bool
    site: str
    record: Recording | None = None


@dataclass
class _Operation:
    sequence: int
    run: Callable[[], None]
    after: list[Moment] = field(default_factory=list)


class Stream:
    """One in-order queue. Operations run on a daemon thread that starts with the first of them.

    Args:
        on_fault: told of the first failure; later operations are dropped while ``failed()`` is true.
    """

    def __init__(
        self,
        handle: int,
        owner: int,
        *,
        blocking: bool,
        site: str,
        clock: Clock,
        on_fault: Callable[[DeviceFaultError], None],
        failed: Callable[[], bool],
    ) -> None:
        self.handle = handle
        self.owner = owner
        self.blocking = blocking
        self.site = site
        self.clock = clock
        self.completed = 0
        #: highest operation that the host has seen complete (by a synchronize or a successful query)
        self.observed = 0
        #: what this stream's next operation is ordered after, by stream
        self.past: dict[Stream, int] = {}
        self._on_fault = on_fault
        self._failed = failed
        self._enqueued = 0
        self._failures: list[tuple[int, str]] = []
        self._queue: deque[_Operation] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False

    @property
    def idle(self) -> bool:
        """True if everything enqueued so far is done."""
        with self._changed:
            return self.completed == self._enqueued

    @property
    def last(self) -> Moment:
        """The moment after everything enqueued so far."""
        with self._changed:
            return Moment(self, self._enqueued)

    def push(self, run: Callable[[], None]) -> Moment:
        """Append an operation that runs after everything in ``past`` and before whatever is pushed next."""
        with self._changed:
            self._enqueued += 1
            waits = [Moment(s, n) for s, n in self.past.items() if s is not self and s.completed < n]
            self._queue.append(_Operation(self._enqueued, run, waits))
            self.past[self] = self._enqueued
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"mock-stream-{self.handle:#x}", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            return Moment(self, self._enqueued)

    def order(self) -> dict[Stream, int]:
        """A copy of ``past``: what an operation that waits for this stream is ordered after."""
        with self._changed:
            return dict(self.past)

    def order_after(self, past: Mapping[Stream, int]) -> None:
        """Later operations run only after all of ``past``."""
        with self._changed:
            if len(self.past) > 64:  # streams come and go; what is done needs no remembering
                self.past = {s: n for s, n in self.past.items() if s is self or s.completed < n}
            for stream, sequence in past.items():
                if sequence > self.past.get(stream, 0):
                    self.past[stream] = sequence

    def wait(self, sequence: int) -> None:
        """Block the calling thread until operation ``sequence`` is done (or dropped after a fault)."""
        with self._changed:
            self._changed.wait_for(lambda: self.completed >= sequence)

    def failure(self, sequence: int, *, clear: bool) -> str | None:
        """What the first failed kernel up to operation ``sequence`` said, None if all went well.

        Args:
            clear: forget the failures up to there: they have been reported.
        """
        with self._changed:
            found = next((text for number, text in self._failures if number <= sequence), None)
            if clear:
                self._failures = [(number, text) for number, text in self._failures if number > sequence]
            return found

    def observe(self, sequence: int) -> None:
        """The host knows that operation ``sequence``, and with it all before, is done."""
        with self._changed:
            self.observed = max(self.observed, sequence)

    def close(self) -> None:
        """Let pending operations finish, then end the thread; returns at once, as cuStreamDestroy does."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until the thread has ended; only after close."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queue) or self._closing)
                if not self._queue:
                    return
                operation = self._queue.popleft()
            for moment in operation.after:
                moment.stream.wait(moment.sequence)
            try:
                if not self._failed():
                    operation.run()
            except DeviceFaultError as fault:
                self._on_fault(fault)
            except KernelError as error:
                with self._changed:
                    self._failures.append((operation.sequence, str(error)))
            except Exception as error:
                # a kernel that raises is a crashed kernel: 719 and an unusable context, never a dead queue thread
                self._on_fault(DeviceFaultError(719, f"{type(error).__name__}: {error}"))
            finally:
                with self._changed:
                    self.completed = operation.sequence
                    self._changed.notify_all()
