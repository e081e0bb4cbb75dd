"""Where the caller was when an object was made."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_inherited = threading.local()


def caller() -> str:
    """File, line and function of the nearest frame outside this package, also from a worker thread of ours."""
    inherited: str | None = getattr(_inherited, "origin", None)
    if inherited is not None:
        return inherited
    frame = sys._getframe(1)
    while frame.f_back is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(_PACKAGE) and not filename.endswith("contextlib.py"):
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def with_origin(function: Callable[[], T]) -> Callable[[], T]:
    """``function``, to be run on another thread, where ``caller()`` gives the place that it would give here."""
    origin = caller()

    def run() -> T:
        _inherited.origin = origin
        try:
            return function()
        finally:
            _inherited.origin = None

    return run
