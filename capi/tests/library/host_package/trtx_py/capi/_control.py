"""What the host imports: enough to look at the interpreter from inside."""

import atexit
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.trtxpy_imports = getattr(sys, "trtxpy_imports", 0) + 1
calls = 0


def interpreter():
    """Everything that the start promises, as text: one fact a line."""
    main = threading.main_thread()
    facts = {
        "imports": sys.trtxpy_imports,
        "version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "prefix": sys.prefix,
        "executable": sys.executable,
        "isolated": sys.flags.isolated,
        "environment": int(not sys.flags.ignore_environment),
        "user_site": int(not sys.flags.no_user_site),
        "utf8": sys.flags.utf8_mode,
        "encoding": sys.getfilesystemencoding(),
        "sigint": signal.getsignal(signal.SIGINT) is signal.SIG_DFL,
        "main": main.native_id != os.getpid(),
        "name": Path(f"/proc/self/task/{main.native_id}/comm").read_text().strip(),
        "deep": deep(900),
        "pythonpath": "/trtxpy-poison" in sys.path,
        "argv": sys.argv,
        "masked": masked(main.native_id),
    }
    return "".join(f"{name}={value}\n" for name, value in facts.items())


def masked(native_id):
    for line in Path(f"/proc/self/task/{native_id}/status").read_text().splitlines():
        if line.startswith("SigBlk"):
            return int(line.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1
    return -1


def deep(n):
    return n and 1 + deep(n - 1)


def count():
    global calls
    calls += 1
    time.sleep(0)
    return calls


def mark_exit():
    """Python's own atexit handlers run when it is finalised: leave a mark that the test can see."""
    atexit.register(os.write, 1, b"python finalised\n")


def non_daemon():
    """A thread that Python waits for at its end, for ever."""
    threading.Thread(target=threading.Event().wait, daemon=False).start()


def leave():
    """exit() of C, called by Python code."""
    import ctypes

    ctypes.CDLL(None).exit(7)
