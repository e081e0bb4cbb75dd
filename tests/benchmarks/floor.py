"""C0: the C loops of c0.c, compiled at run time. What they cost is the driver and the GPU, and nothing of Python."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = Path(__file__).with_name("c0.c")
_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")

LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
QUERY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
WRITE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)


class FloorError(RuntimeError):
    """A driver call of a C loop failed."""


class Api(ctypes.Structure):
    """c0_api: the driver functions that the loops call."""

    _fields_ = (("launch", LAUNCH), ("record", LAUNCH), ("query", QUERY), ("write", WRITE))


def compile_library(source: Path = SOURCE, extra: Sequence[str] = ()) -> ctypes.CDLL:
    """Compile a C file into a temporary shared library and load it; the file goes, the mapping stays."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise FloorError("C0 needs a C compiler: neither gcc nor cc is on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"{source.stem}.so"
        command = [compiler, *_FLAGS, str(source), "-o", str(target), *extra, "-ldl", "-pthread"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            raise FloorError(f"{' '.join(command)} failed:\n{done.stderr}")
        return ctypes.CDLL(str(target))


class Floor:
    """The loops, over the driver's functions or, in tests, over others.

    All handles are integers. The CUDA context must be current on the calling thread; the GIL is released.
    """

    def __init__(self, api: Api | None = None) -> None:
        self._library = compile_library()
        size, pointer, u64 = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint64
        self._library.c0_event.argtypes = [pointer, pointer, pointer, pointer, size, pointer]
        self._library.c0_launch.argtypes = [pointer, pointer, pointer, pointer, size, pointer]
        self._library.c0_flag.argtypes = [pointer, pointer, pointer, pointer, u64, size, pointer]
        self._library.c0_lanes.argtypes = [pointer, size, size, pointer, pointer, pointer, size, pointer]
        self._library.c0_load.argtypes = [pointer]
        if api is None:
            api = Api()
            self._check("dlopen of libcuda.so.1", self._library.c0_load(ctypes.byref(api)))
        self._api = api  # owns the callbacks
        self._address = ctypes.addressof(api)

    @staticmethod
    def _check(what: str, status: int) -> None:
        if status:
            raise FloorError(f"{what} failed with CUresult {status}")

    def by_event(self, execution: int, stream: int, event: int, count: int) -> np.ndarray:
        """Nanoseconds of ``count`` launches, each spun on through an event."""
        return self._samples("c0_event", execution, stream, event, count)

    def launches(self, execution: int, stream: int, event: int, count: int) -> np.ndarray:
        """Nanoseconds that cuGraphLaunch alone takes."""
        return self._samples("c0_launch", execution, stream, event, count)

    def _samples(self, function: str, execution: int, stream: int, event: int, count: int) -> np.ndarray:
        ns = np.zeros(count, np.uint64)
        call = getattr(self._library, function)
        self._check(function, call(self._address, execution, stream, event, count, ns.ctypes.data))
        return ns.astype(np.int64)

    def by_flag(self, execution: int, stream: int, flag: int, flag_device: int, count: int) -> np.ndarray:
        """As ``by_event``, through a number that the stream writes into pinned memory at ``flag``."""
        ns = np.zeros(count, np.uint64)
        status = self._library.c0_flag(self._address, execution, stream, flag, flag_device, count, ns.ctypes.data)
        self._check("c0_flag", status)
        return ns.astype(np.int64)

    def lanes(self, executions: Sequence[Sequence[int]], streams: Sequence[int], events: Any, requests: int) -> int:
        """Nanoseconds for ``requests`` launches over all lanes; executions and events: for each lane, as many as may
        be in flight there."""
        depth = len(executions[0])
        handles = [np.array(list(each), np.uint64).reshape(-1) for each in (executions, streams, events)]
        elapsed = np.zeros(1, np.uint64)
        pointers = [each.ctypes.data for each in handles]
        self._check(
            "c0_lanes",
            self._library.c0_lanes(self._address, len(streams), depth, *pointers, requests, elapsed.ctypes.data),
        )
        return int(elapsed[0])
