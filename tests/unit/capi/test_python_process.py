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

#: As trtxpy.h has them.
STRUCTS = """
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
def shape_of(*dims):
    return Shape(len(dims), 0, (ctypes.c_int64 * 8)(*dims))
def tensor(*dims, location=0):
    made, desc = ctypes.c_void_p(), of(Desc, shape=shape_of(*dims), location=location)
    good(library.trtxpy_tensor_create(context, ctypes.byref(desc), ctypes.byref(made)))
    return made
"""

#: Requests without captured graphs, each 0.3 s, of which four run at a time.
BACKLOG = """
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
    lines = run([sys.executable, "-c", HEAD + STRUCTS + BACKLOG, str(DIGITS)], timeout=60).splitlines()
    told = [line.split() for line in lines]
    begun = next(float(at) for what, at in told if what == "exit")
    outcomes = [(int(what), float(at)) for what, at in told if what != "exit"]
    statuses = [status for status, _ in outcomes]
    assert len(statuses) == 60  # each of them is heard of, once
    assert set(statuses) == {0, 18}  # TRTXPY_OK, TRTXPY_CANCELLED
    assert [status for status, at in outcomes if at > begun].count(0) <= 8  # what had begun


#: Requests whose kernel is held until the gate is opened.
HELD = """
import atexit
from mock_backend import MockBackend, slow
from tests.unit.serving import GateClock, PATIENCE_S
from trtx_py.capi import _context, _control

BORROWED, CANCELLED, TIMEOUT, BUSY, CLOSED, NOT_READY = 3, 18, 19, 20, 21, 24
ONE = ctypes.c_size_t(1)

class DispatchOptions(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("timeout_ns", ctypes.c_uint64),
                ("resize_outputs", ctypes.c_uint32), ("reserved", ctypes.c_uint32)]
class GraphStatistics(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t)] + [(name, ctypes.c_uint64) for name in (
        "submitted", "completed", "failed", "cancelled", "captured", "uncaptured", "zero_copy", "in_flight", "queued",
        "shapes", "slots")]
class NamedShape(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("shape", Shape)]

clock = GateClock()
backend = MockBackend(clock=clock)
_context.named_mock = lambda name: backend  # by no name could it have this clock
# Behind the library's own end: what is registered first is called last.
atexit.register(lambda: print("behind the end:", backend.damage() + backend.leaks()))
context, graph, request = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
good(library.trtxpy_context_create(ctypes.byref(of(ContextOptions, backend=b"mock")), ctypes.byref(context)))
good(library.trtxpy_graph_from_file(
    context, sys.argv[1].encode(), ctypes.byref(of(GraphOptions, optimization_level=-1)), ctypes.byref(graph)))

how = sys.argv[2]
if how == "own":
    x, y = ctypes.c_void_p(), ctypes.c_void_p()
    shape = NamedShape(b"image", shape_of(1, 1, 8, 8))
    good(library.trtxpy_graph_create_tensors(
        graph, ctypes.byref(shape), ONE, ctypes.byref(x), ONE, ctypes.byref(y), ONE))
else:
    x, y = (tensor(*dims, location=how == "device") for dims in ((1, 1, 8, 8), (1, 10)))
bound = graph, ctypes.byref(Binding(b"image", x)), ONE, ctypes.byref(Binding(b"probabilities", y)), ONE
good(library.trtxpy_dispatch(*bound, None))  # what can be captured is, from here on

def allocations():
    device = next(iter(_control._contexts.values())).device
    return device.memory_statistics().live, device.pinned_statistics().live
def statistics():
    found = of(GraphStatistics)
    good(library.trtxpy_graph_get_statistics(graph, ctypes.byref(found)))
    return found
before = allocations()
backend.inject(slow(seconds=1))
"""

GIVEN_UP = """
if how == "timeout":  # what is captured is launched before the time begins to run
    brief = of(DispatchOptions, timeout_ns=1_000_000)
    assert library.trtxpy_dispatch(*bound, ctypes.byref(brief)) == TIMEOUT
    clock.wait_reached_sync()
else:
    good(library.trtxpy_submit(*bound, None, ctypes.byref(request)))
    clock.wait_reached_sync()
    good(library.trtxpy_request_cancel(request))
"""

DESTROYED = """
content, outcome = (ctypes.c_float * 64)(), ctypes.c_int32()
for _ in range(2):  # a refusal changes nothing
    assert library.trtxpy_tensor_destroy(x) == BORROWED
    assert library.trtxpy_tensor_destroy(y) == BORROWED
    assert library.trtxpy_tensor_write(x, content, ctypes.c_size_t(256)) == BUSY
    assert library.trtxpy_tensor_read(y, content, ctypes.c_size_t(40)) == BUSY
    assert library.trtxpy_dispatch(*bound, None) == BUSY
    assert library.trtxpy_graph_destroy(graph) == BORROWED
    assert library.trtxpy_context_destroy(context) == BORROWED
    assert library.trtxpy_shutdown() == BORROWED
assert all(now >= then for now, then in zip(allocations(), before)), (allocations(), before)
assert (statistics().in_flight, backend.damage()) == (1, [])
if request:
    assert library.trtxpy_request_wait(request, ctypes.c_uint64(0), ctypes.byref(outcome)) == NOT_READY
clock.open()
if request:
    good(library.trtxpy_request_wait(request, ctypes.c_uint64(2**64 - 1), ctypes.byref(outcome)))
    assert outcome.value == CANCELLED
    good(library.trtxpy_request_destroy(request))
deadline = time.monotonic() + PATIENCE_S
def destroy(function, handle):
    while (status := function(handle)) == BORROWED and time.monotonic() < deadline:
        time.sleep(0.001)  # nobody is told of the end of what timed out
    good(status)
destroy(library.trtxpy_tensor_destroy, y)
destroy(library.trtxpy_tensor_destroy, x)
destroy(library.trtxpy_graph_destroy, graph)
good(library.trtxpy_context_destroy(context))
"""


@pytest.mark.parametrize("how", ["copied", "own", "device", "timeout"])
def test_nothing_of_a_cancelled_request_goes_before_the_gpu_is_done(how: str) -> None:
    script = HEAD + STRUCTS + HELD + GIVEN_UP + DESTROYED
    assert run([sys.executable, "-c", script, str(DIGITS), how]) == "behind the end: []\n"


DISPATCHED = """
threading.Thread(target=lambda: library.trtxpy_dispatch(*bound, None), daemon=True).start()
clock.wait_reached_sync()
"""

#: The gate opens once the library has begun to end: it takes no request any more.
EXIT = """
stopping, stop = threading.Event(), _control.stop
def watched_stop():
    print("in flight at the end:", statistics().in_flight)
    stopping.set()
    return stop()
_control.stop = watched_stop

def open_gate():
    while library.trtxpy_submit(graph, None, ctypes.c_size_t(0), None, ctypes.c_size_t(0), None, None) != CLOSED:
        time.sleep(0.001)
    stopping.wait(0.2)  # a library that waits for the GPU does not get there
    clock.open()
threading.Thread(target=open_gate, daemon=True).start()
"""


@pytest.mark.parametrize("how", ["copied", "own", "device"])
@pytest.mark.parametrize("begun", [GIVEN_UP, DISPATCHED], ids=["cancelled", "dispatched by another thread"])
def test_the_exit_of_python_waits_for_what_runs(begun: str, how: str) -> None:
    told = run([sys.executable, "-c", HEAD + STRUCTS + HELD + begun + EXIT, str(DIGITS), how])
    assert told == "in flight at the end: 0\nbehind the end: []\n"


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
