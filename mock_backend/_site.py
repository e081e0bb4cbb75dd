"""Where the caller is: kept with everything that is made, so that a leak says who made it."""

from __future__ import annotations

import pathlib
import sys
from types import FrameType

__all__ = ["call_site"]

_PACKAGE = str(pathlib.Path(__file__).parent) + "/"


def call_site() -> str:
    """``file:line in function`` of the nearest caller outside this package."""
    # walking the frames by hand reads no source files, which matters: every allocation comes here
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(_PACKAGE) or filename.endswith("conformance.py"):
            return f"{filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "inside mock_backend"
