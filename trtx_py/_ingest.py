"""Device tensors of callers: taken over on the caller's thread, used on a lane's stream."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from ._interop import DeviceView, EventCache, device_view
from .cuda._device import DeviceAccess, Releases

_ON_HOST = (np.ndarray, np.generic, bool, int, float, list, tuple)


def _may_be_on_device(value: Any) -> bool:
    """Properties run code of the producer's; what that raises, ``device_view`` turns into an error with a name."""
    try:
        return hasattr(value, "__dlpack_device__") or hasattr(value, "__cuda_array_interface__")
    except Exception:
        return True


class Ingest:
    """One stream that waits for the producers of device tensors, so that a lane has one stream to wait for.

    Producers such as torch order behind the stream that is current on the thread that asks them: they must be asked
    where the caller is, and that is before it is known which lane will serve the request. Thread-safe.
    """

    def __init__(self, access: DeviceAccess, ordinal: int) -> None:
        self._access, self._ordinal = access, ordinal
        self._lock = threading.Lock()
        self._stream = 0
        self._events = EventCache(access)

    def views(self, inputs: Mapping[str, Any]) -> dict[str, DeviceView]:
        """Those of the inputs that lie in device memory. Raises InvalidArgumentError, DTypeError, CudaError."""
        found: dict[str, DeviceView] = {}
        for name, value in inputs.items():
            if isinstance(value, _ON_HOST) or not _may_be_on_device(value):
                continue
            view = device_view(
                value, self._access, self._ordinal, self._opened(), name=f"input {name!r}", events=self._events
            )
            if view is not None:
                found[name] = view
        return found

    def _opened(self) -> int:
        with self._lock:
            if not self._stream:
                with self._access.current:
                    self._stream = self._access.streams.take()
            return self._stream

    def order(self, stream: int) -> None:
        """What is enqueued on ``stream`` from now on waits for all producers so far."""
        if self._stream:
            self._events.order(self._stream, stream)

    def release(self) -> None:
        """Give the stream and the events back. Nothing is running."""
        stream, self._stream = self._stream, 0
        releases = Releases(self._access)
        if stream:
            releases.add(lambda: self._access.streams.give(stream))
        releases.add(self._events.close)
        releases()
