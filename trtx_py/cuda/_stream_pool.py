"""The streams of a device, for everything inside trtx_py that needs one for a while."""

from __future__ import annotations

import logging
import threading
from collections import deque

from .._errors import ClosedError, InvalidArgumentError
from ..backends.protocols import CU_STREAM_NON_BLOCKING, CudaDriver

_log = logging.getLogger("trtx_py")

#: Streams that may be out at once before it is said that this is unusual.
SOFT_LIMIT = 32


class StreamPool:
    """Lends streams, makes more when all are out, and keeps what comes back. Thread-safe; the device must be current.

    A stream may be given back with work on it: streams are in-order queues, so the next taker's work only starts
    later. It must not be given back while it is being captured.

    Args:
        name: of the device, for messages.
        soft_limit: more streams out at once than this are logged as a warning, and again whenever they have doubled.
    """

    def __init__(self, driver: CudaDriver, name: str = "", soft_limit: int = SOFT_LIMIT) -> None:
        self._driver = driver
        self._name = name
        self._soft_limit = self._warn_above = soft_limit
        self._lock = threading.RLock()
        self._idle: deque[int] = deque()
        self._out: set[int] = set()
        self._closed = False

    @property
    def out(self) -> int:
        """Streams that are lent now."""
        return len(self._out)

    @property
    def idle(self) -> int:
        """Streams that the next takers get."""
        return len(self._idle)

    def take(self) -> int:
        """A stream that nobody else has, to be given back; one that waited longest, else a new one.

        It does not wait for the legacy default stream. Raises CudaError. Source: cuStreamCreate
        """
        with self._lock:
            if self._closed:
                raise ClosedError(f"{self._name or 'the device'} was closed, and its streams with it")
            stream = self._idle.popleft() if self._idle else self._driver.cuStreamCreate(CU_STREAM_NON_BLOCKING)
            self._out.add(stream)
            out = len(self._out)
            unusual = out > self._warn_above
            if unusual:
                self._warn_above *= 2
        if unusual:
            _log.warning(
                "%d streams of %s are in use at once, more than the %d that are usual; every lane takes some, for "
                "itself, its auxiliary streams and its captures: open engines with fewer lanes, or close some of them",
                out, self._name or "the device", self._soft_limit,
            )  # fmt: skip
        return stream

    def give(self, stream: int) -> None:
        """Give back what ``take`` returned, once. Raises InvalidArgumentError for anything else."""
        with self._lock:
            if stream not in self._out:
                raise InvalidArgumentError(
                    f"stream {stream:#x} is not lent by the pool of {self._name or 'the device'}; "
                    "give back what take() returned, once"
                )
            self._out.remove(stream)
            if not self._closed:  # else it is too late to destroy it: it went with the device's context
                self._idle.append(stream)

    def close(self) -> tuple[int, ...]:
        """Lend no more. Returns the idle streams for the caller to destroy; those still out go with the context."""
        with self._lock:
            self._closed = True
            streams = tuple(self._idle)
            self._idle.clear()
        return streams
