"""One mock GPU: its memory and its primary context."""

from __future__ import annotations

import threading

from ._arena import Arena
from ._stream import DeviceFaultError, Event, Stream

__all__ = ["Device"]


class Device:
    """State of one device. ``lock`` guards the handles and the order in which work enters the streams.

    Attributes:
        context: handle of the primary context; the same each time it is retained, as with CUDA.
        retained: how many owners hold the primary context; its memory, streams and events live while it is positive.
        fault: the first device-side failure since the context was made; None while it is usable.
    """

    def __init__(self, ordinal: int, memory_bytes: int) -> None:
        self.ordinal = ordinal
        self.context = 0xC0DE_0000 + ordinal + 1
        self.lock = threading.RLock()
        self.arena = Arena(memory_bytes, ordinal)
        self.retained = 0
        self.fault: DeviceFaultError | None = None
        self.streams: dict[int, Stream] = {}
        self.events: dict[int, Event] = {}
        self.null_stream: Stream | None = None
        self._forgotten: list[str] = []

    def fail(self, fault: DeviceFaultError) -> None:
        """Make the context unusable; only the first fault counts."""
        with self.lock:
            if self.fault is None:
                self.fault = fault

    def end_streams(self) -> list[Stream]:
        """First half of the context's end: its handles are gone; returns the streams whose threads must end."""
        with self.lock:
            self._forgotten = self.open_handles()
            streams = list(self.streams.values())
            if self.null_stream is not None:
                streams.append(self.null_stream)
            self.streams.clear()
            self.events.clear()
            self.null_stream = None
            return streams

    def end_memory(self) -> list[str]:
        """Second half: frees all memory; returns what the owner left open, nothing if a fault kept it from closing."""
        with self.lock:
            lost = self._forgotten + self.arena.reset()
            self._forgotten = []
            return lost if self.fault is None else []

    def open_handles(self) -> list[str]:
        """Streams and events that were created and not destroyed, with the place where each was made."""
        with self.lock:
            found = [
                f"stream {s.handle:#x} on device {self.ordinal}, created at {s.site}" for s in self.streams.values()
            ]
            found += [
                f"event {e.handle:#x} on device {self.ordinal}, created at {e.site}" for e in self.events.values()
            ]
            return found
