"""The host in a Python process: LIBRARY MODE. The library is loaded as an extension module would load it."""

import ctypes
import os
import signal
import sys
import threading
import time

library, mode = sys.argv[1:]
free = ctypes.CDLL(library)  # calls without Python's lock
held = ctypes.PyDLL(library)  # calls with it
free.trtxpy_last_error.restype = ctypes.c_char_p
free.inside_count.restype = held.inside_count.restype = ctypes.c_longlong


def error():
    return free.trtxpy_last_error().decode()


handlers = [signal.getsignal(n) for n in signal.valid_signals()]
if mode == "missing":
    for calls in (free, held):
        assert calls.trtxpy_host_start(None) == 11
        assert "No module named 'trtx_py'" in error(), error()
        assert sys.executable + " -m pip install trtx-py" in error(), error()
    import types

    for name in ("trtx_py", "trtx_py.capi", "trtx_py.capi._control"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["trtx_py.capi"]._control = sys.modules["trtx_py.capi._control"]
    assert held.trtxpy_host_start(None) == 0, error()
    sys.exit()

calls = held if mode == "held" else free
assert calls.inside_unlocks() == (mode == "held")
threads = [threading.Thread(target=calls.trtxpy_host_start, args=(None,)) for _ in range(64)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert calls.trtxpy_host_start(b"/nowhere") == 0, error()
assert sys.trtxpy_imports == 1
assert handlers == [signal.getsignal(n) for n in signal.valid_signals()]
before = calls.inside_count()
assert before >= 1
calls.inside_threads()
assert calls.inside_count() == before + 65
assert calls.inside_unlocks() == (mode == "held")
calls.inside_watch()

if hasattr(os, "fork"):
    child = os.fork()
    if child == 0:
        os._exit(calls.trtxpy_host_start(None) if free.trtxpy_host_forked() & 0xFF else 99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 23
    child = os.fork()
    if child == 0:
        sys.exit(3)  # with Python's end and C's
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3

assert calls.trtxpy_host_stop() == 0
assert not calls.trtxpy_host_python()
assert calls.trtxpy_host_start(None) == 0
assert calls.inside_count() > before


def forever():
    while True:
        free.trtxpy_host_start(None)
        free.inside_unlocks()


for _ in range(3):  # in the library while Python ends
    threading.Thread(target=forever, daemon=True).start()
time.sleep(0.05)
os.write(1, b"main ends\n")
