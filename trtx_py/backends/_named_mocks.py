"""Mocks by name: what follows ``mock:`` is how the mock differs, for programs that cannot construct a MockBackend."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from .._errors import InvalidArgumentError
from .protocols import TensorRTBackend

_PREFIX = "mock:"
_KINDS: dict[str, Callable[[str], Any]] = {"duration_s": float, "memory_bytes": int, "threads": int, "devices": int}

_lock = threading.Lock()
_mocks: dict[str, TensorRTBackend] = {}


def named_mock(name: str) -> TensorRTBackend | None:
    """The mock of ``mock:OPTION,...``, one for the process by each name; None for any other name.

    Options: instant (computes nothing), duration_s=SECONDS of each kernel, memory_bytes=N of each device, threads=N,
    devices=N.

    Raises InvalidArgumentError for an option that there is none of.
    """
    if not name.startswith(_PREFIX):
        return None
    from mock_backend import MockBackend

    options: dict[str, Any] = {}
    for part in name[len(_PREFIX) :].split(","):
        key, _, value = part.partition("=")
        try:
            if part == "instant":
                options["compute"] = False
            else:
                options[key] = _KINDS[key](value)
        except (KeyError, ValueError):
            known = ", ".join(f"{each}=" for each in _KINDS)
            raise InvalidArgumentError(
                f"backend {name!r}: there is no option {part!r}; there are instant, {known}"
            ) from None
    with _lock:
        if name not in _mocks:
            _mocks[name] = MockBackend(**options)
        return _mocks[name]
