"""libtrtxpy in a process whose Python is not its own: its exit, and a package of another version."""

from __future__ import annotations

import sys
import textwrap

import pytest

import trtx_py as trtx
from tests.unit.capi.programs import DIGITS, LIBRARY, run

if not LIBRARY.is_file():
    pytest.skip("libtrtxpy is not built: scripts/build-native", allow_module_level=True)

HEAD = f"""
import ctypes, os, sys, threading, time
library = ctypes.CDLL({str(LIBRARY)!r})
library.trtxpy_last_error.restype = ctypes.c_char_p
class Shape(ctypes.Structure):
    _fields_ = [("rank", ctypes.c_int32), ("reserved", ctypes.c_int32), ("dims", ctypes.c_int64 * 8)]
def good(status):
    assert status == 0, (status, library.trtxpy_last_error())
"""

#: As trtxpy.h has them. Requests without captured graphs, each 0.3 s, of which four run at a time.
BACKLOG = """
class ContextOptions(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("backend", ctypes.c_char_p), ("device", ctypes.c_int32),
                ("completion", ctypes.c_int32), ("max_device_bytes", ctypes.c_uint64),
                ("lean_library", ctypes.c_char_p),
                ("max_cached_models", ctypes.c_uint32), ("allow_host_code", ctypes.c_uint32)]
class GraphOptions(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("ranges", ctypes.c_void_p), ("range_count", ctypes.c_size_t),
                ("precision", ctypes.c_char_p), ("optimization_level", ctypes.c_int32), ("lanes", ctypes.c_uint32),
                ("slots", ctypes.c_uint32), ("max_graphs", ctypes.c_uint32), ("no_cuda_graphs", ctypes.c_uint32),
                ("reserved", ctypes.c_uint32)]
class Desc(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("dtype", ctypes.c_int32), ("location", ctypes.c_int32),
                ("shape", Shape)]
class Binding(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("tensor", ctypes.c_void_p)]
Callback = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p)
class SubmitOptions(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("callback", Callback), ("userdata", ctypes.c_void_p),
                ("queue", ctypes.c_void_p), ("token", ctypes.c_uint64), ("resize_outputs", ctypes.c_uint32),
                ("reserved", ctypes.c_uint32)]

def of(struct, **members):
    return struct(struct_size=ctypes.sizeof(struct), **members)
def tensor(*dims):
    made = ctypes.c_void_p()
    shape = Shape(len(dims), 0, (ctypes.c_int64 * 8)(*dims))
    good(library.trtxpy_tensor_create(context, ctypes.byref(of(Desc, shape=shape)), ctypes.byref(made)))
    return made

context, graph = ctypes.c_void_p(), ctypes.c_void_p()
good(library.trtxpy_context_create(
    ctypes.byref(of(ContextOptions, backend=b"mock:duration_s=0.3")), ctypes.byref(context)))
options = of(GraphOptions, optimization_level=-1, no_cuda_graphs=1)
good(library.trtxpy_graph_from_file(context, sys.argv[1].encode(), ctypes.byref(options), ctypes.byref(graph)))

@Callback
def tell(status, message, result, userdata):
    os.write(1, b"%d %.3f\\n" % (status, time.monotonic()))
    first.set()

first, how = threading.Event(), of(SubmitOptions, callback=tell)
image = Binding(b"image", tensor(1, 1, 8, 8))
for _ in range(60):
    output = Binding(b"probabilities", tensor(1, 10))
    good(library.trtxpy_submit(
        graph, ctypes.byref(image), 1, ctypes.byref(output), 1, ctypes.byref(how), None))
first.wait(30)  # the next ones have begun
os.write(1, b"exit %.3f\\n" % time.monotonic())
"""


def test_the_exit_of_python_cancels_what_has_not_begun() -> None:
    lines = run([sys.executable, "-c", HEAD + BACKLOG, str(DIGITS)], timeout=60).splitlines()
    told = [line.split() for line in lines]
    begun = next(float(at) for what, at in told if what == "exit")
    outcomes = [(int(what), float(at)) for what, at in told if what != "exit"]
    statuses = [status for status, _ in outcomes]
    assert len(statuses) == 60  # each of them is heard of, once
    assert set(statuses) == {0, 18}  # TRTXPY_OK, TRTXPY_CANCELLED
    assert [status for status, at in outcomes if at > begun].count(0) <= 8  # what had begun


MISMATCH = """
import trtx_py
trtx_py.__version__ = "9.8.7"
assert library.trtxpy_init(None) == 15
text = library.trtxpy_last_error().decode()
for word in ("9.8.7", "libtrtxpy {version}", trtx_py.__file__, "scripts/build-native"):
    assert word in text, text
del trtx_py.__version__
assert library.trtxpy_init(None) == 15
assert "of no known version" in library.trtxpy_last_error().decode()
trtx_py.__version__ = "{version}"
good(library.trtxpy_init(None))  # and what was refused may be tried again
good(library.trtxpy_shutdown())
"""


def test_a_package_of_another_version_is_refused() -> None:
    run([sys.executable, "-c", HEAD + textwrap.dedent(MISMATCH).replace("{version}", trtx.__version__)])
