"""Runs a Rust extension in this process, on several threads that hold Python's lock: inside.py HOST MODEL."""

import ctypes
import sys
import threading
import time
from pathlib import Path

host = ctypes.PyDLL(sys.argv[1])
model = Path(sys.argv[2]).read_bytes()
host.host_model.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
host.host_model.restype = None
host.host_model(model, len(model))
assert host.host_open() == 0
failures: list[int] = []


def work() -> None:
    for _ in range(10):
        status = host.host_round()
        if status:
            failures.append(status)


threads = [threading.Thread(target=work) for _ in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
deadline = time.monotonic() + 60
while host.host_called() < 60 and time.monotonic() < deadline:
    time.sleep(0.001)
assert host.host_called() == 60, host.host_called()
print("all rounds")
