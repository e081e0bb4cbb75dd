"""Where libtrtxpy and what C programs find it by lie: beside this file, but for a checkout's headers."""

from __future__ import annotations

import os

_HERE = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(os.path.dirname(_HERE))


def library() -> str:
    """The library's file."""
    return os.path.join(_HERE, "libtrtxpy.so")


def include() -> str:
    """The folder of trtxpy.h and trtxpy.hpp."""
    installed = os.path.join(_HERE, "include")
    return installed if os.path.isdir(installed) else os.path.join(_ROOT, "capi", "include")


def pkgconfig() -> str:
    """The folder of trtxpy.pc, for PKG_CONFIG_PATH."""
    return os.path.join(_HERE, "pkgconfig")


def cmake() -> str:
    """The folder of trtxpy-config.cmake, for CMake's trtxpy_DIR."""
    return os.path.join(_HERE, "cmake")
