"""Looks at a lean library before TensorRT loads it: a wrong one ends the process instead of raising."""

from __future__ import annotations

import ctypes
import os

from ..._errors import EngineError

_ELF_MAGIC = b"\x7fELF"
_SHARED_OBJECT = 3


def lean_library_version(path: str) -> str:
    """Version of the lean runtime in a shared library, such as "8.6.0".

    The library is loaded into the process to ask it, as ``load_runtime`` would.

    Raises:
        EngineError: no such file, not readable, not a shared library, or not a lean runtime.
    Source: getInferLibVersion
    """
    _check_file(path)
    try:
        library = ctypes.CDLL(os.path.abspath(path))
    except OSError as error:
        raise EngineError(
            f"the lean library {path} cannot be loaded: {error}; install what it depends on (CUDA libraries of the "
            f"version it was made for), or pass another"
        ) from error
    try:
        version_of = library.getInferLibVersion
    except AttributeError:
        raise EngineError(
            f"{path} is a shared library but no TensorRT lean runtime: it exports no getInferLibVersion; "
            f"pass libnvinfer_lean.so of the version that built the plan"
        ) from None
    version_of.restype = ctypes.c_int32
    version_of.argtypes = []
    return decode_version(int(version_of()))


def decode_version(number: int) -> str:
    """``getInferLibVersion`` as text: 8600 is "8.6.0", 101601 is "10.16.1"."""
    # Versions before 10 were major * 1000 + minor * 100 + patch, those since major * 10000 + minor * 100 + patch.
    unit = 10000 if number >= 100000 else 1000
    major, rest = divmod(number, unit)
    return f"{major}.{rest // 100}.{rest % 100}"


def _check_file(path: str) -> None:
    if not os.path.isfile(path):
        found = "is a directory" if os.path.isdir(path) else "does not exist"
        raise EngineError(
            f"the lean library {path} {found}; pass the path of libnvinfer_lean.so (lean_library= or TRTX_LEAN_LIBRARY)"
        )
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise EngineError(f"the lean library {path} cannot be read: {error}") from error
    is_elf_library = start[:4] == _ELF_MAGIC and len(start) >= 20 and start[16] == _SHARED_OBJECT
    if not is_elf_library and start[:2] != b"MZ":
        raise EngineError(
            f"{path} is not a shared library (it begins with {start[:4]!r}); unpack it if it is compressed, and pass "
            f"libnvinfer_lean.so itself"
        )
