"""A worker process: started in a group of its own, listened to, and never left behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .._errors import ConversionError, InvalidArgumentError

_TAIL = 16 << 10
#: More than a pipe holds, so what the dead have said is read, and who lives on in a session of its own cannot keep us.
_LAST_READS = 32
#: What the worker ends with if not even its error could be written.
DISK_FULL = 74  # EX_IOERR
_POLL_S = 0.05  # where the kernel has no pidfd
_WORKER = os.path.join(os.path.dirname(__file__), "_worker")

# The worker is loaded from its folder and not as part of trtx_py: another interpreter has no trtx_py of its own.
_START = """\
import importlib.util, os, sys
sys.path[:] = [entry for entry in sys.path if entry]
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "trtx_py_worker", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder])
module = importlib.util.module_from_spec(spec)
sys.modules["trtx_py_worker"] = module
spec.loader.exec_module(module)
from trtx_py_worker._main import main
main(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
"""

OnEvent = Callable[[Mapping[str, Any]], None]


class Cancelled(Exception):  # noqa: N818 - not an error: the caller's own cancellation is what is raised
    """The conversion was cancelled; the worker is gone."""


class Cancel:
    """The wish to stop, which another thread may express; wakes who waits for a worker."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self.wanted = False

    def set(self) -> None:
        """Idempotent."""
        if not self.wanted:
            self.wanted = True
            os.write(self._write, b"x")

    def fileno(self) -> int:
        return self._read

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


@dataclass(frozen=True)
class Deadline:
    """Until when a conversion may take; ``timeout_s`` None means for ever."""

    started: float
    timeout_s: float | None

    @classmethod
    def after(cls, timeout_s: float | None) -> Deadline:
        return cls(time.monotonic(), timeout_s)

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def remaining(self) -> float | None:
        return None if self.timeout_s is None else max(0.0, self.timeout_s - self.elapsed())


def interpreter(python: str | None) -> str:
    """The path of a Python interpreter. Raises InvalidArgumentError if it is none that can be run."""
    chosen = python or sys.executable
    if python is None and not os.path.basename(chosen or "").startswith("python"):
        raise InvalidArgumentError(
            f"this program ({chosen or 'unknown'}) is no Python interpreter that a worker could be started with; "
            "name one with python="
        )
    if not os.path.isfile(chosen) or not os.access(chosen, os.X_OK):
        raise InvalidArgumentError(f"python is {chosen!r}; expected the path of a Python interpreter that can be run")
    return chosen


def run_worker(
    python: str, job: Mapping[str, Any], folder: str, on_event: OnEvent, deadline: Deadline, cancel: Cancel
) -> dict[str, Any]:
    """Run one job and give its result. Blocks; whatever happens, the worker's whole process group is gone afterwards.

    Raises:
        ConversionError: the job failed, or the worker took too long, crashed or was killed.
        Cancelled: ``cancel`` was set.
    """
    job_path, result_path = os.path.join(folder, "job.json"), os.path.join(folder, "result.json")
    with open(job_path, "w", encoding="utf-8") as file:
        json.dump({**job, "result": result_path, "parent": os.getpid()}, file)
    worker = _Worker(python, job_path, on_event, str(job["format"]))
    try:
        worker.wait(deadline, cancel)
    finally:
        worker.end()
    return worker.result(result_path)


class _Worker:
    def __init__(self, python: str, job: str, on_event: OnEvent, format: str) -> None:
        self._python, self._on_event, self._format = python, on_event, format
        self._tail = bytearray()
        self._line = bytearray()
        self._step = "start"
        self._events, write = os.pipe()
        try:
            self._process = subprocess.Popen(
                [python, "-c", _START, _WORKER, job, str(write), str(DISK_FULL)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(write,),
                start_new_session=True,
                env=_environment(),
            )
        except OSError as error:
            os.close(self._events)
            raise InvalidArgumentError(
                f"python {python!r} cannot be started: {error.strerror}; expected a Python interpreter"
            ) from error
        finally:
            os.close(write)
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        for fd in (self._events, self._output):
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_NONBLOCK)

    def wait(self, deadline: Deadline, cancel: Cancel) -> None:
        """Until the worker has ended. What it started may still run, and may hold its output open."""
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
            readers = {self._events: self._read_events, self._output: self._read_output}
            for fd in readers:
                selector.register(fd, selectors.EVENT_READ)
            selector.register(cancel, selectors.EVENT_READ)
            watched = _watch(self._process.pid)
            if watched is not None:
                stack.callback(os.close, watched)
                selector.register(watched, selectors.EVENT_READ)
            while not self._ended():
                if cancel.wanted:
                    raise Cancelled
                remaining = deadline.remaining()
                if remaining == 0:
                    raise self._error(
                        f"took longer than {deadline.timeout_s:g} s and was ended; raise timeout_s", "timeout"
                    )
                if watched is None:
                    remaining = _POLL_S if remaining is None else min(remaining, _POLL_S)
                if remaining is not None:
                    remaining = min(remaining, 86_400.0)  # epoll takes some weeks at most; the loop goes on behind it
                for key, _ in selector.select(remaining):
                    read = readers.get(key.fd)
                    if read is not None and read() is False:
                        selector.unregister(key.fd)

    def _ended(self) -> bool:
        # Not reaped yet: its number cannot be another process group's before ours has been killed.
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end(self) -> None:
        """Kill what is left of the process group, and take what it said last."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        try:
            for read in (self._read_output, self._read_events):
                left = _LAST_READS
                while left and read():
                    left -= 1
        finally:
            os.close(self._events)
            assert self._process.stdout is not None
            self._process.stdout.close()

    def result(self, path: str) -> dict[str, Any]:
        """What the worker wrote. Raises ConversionError if that is an error, or nothing."""
        code = self._process.returncode
        if code < 0:
            cause = f"was ended by {_signal_name(-code)}"
            if -code == signal.SIGKILL:
                raise self._error(
                    f"{cause}: the kernel ends processes this way when memory runs out; convert on a machine or in a "
                    "container with more memory",
                    "killed",
                )
            raise self._error(f"{cause}: native code in it crashed; see the end of its output", "crashed")
        if code == DISK_FULL:
            raise self._error(
                f"could not write below {os.path.dirname(path)!r}: the disk or a quota is full; free some space, or "
                "set TMPDIR or output= to a disk with more",
                "disk",
            )
        try:
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError):
            raise self._error(
                f"ended with status {code} and without a result; {self._python!r} must be a CPython of at least 3.10",
                "crashed",
            ) from None
        if not isinstance(found, dict):
            raise self._error("wrote a result that is none", "crashed")
        failure = found.get("error")
        if failure is None:
            return found
        raise ConversionError(
            str(failure["message"]),
            format=self._format,
            step=str(failure["step"]),
            cause=failure["cause"],
            log_tail=self.log_tail,
            details=str(failure["traceback"]),
        )

    @property
    def log_tail(self) -> str:
        return self._tail.decode("utf-8", "replace")

    def _error(self, message: str, cause: Any) -> ConversionError:
        return ConversionError(
            f"converting {self._format}: the worker {message} (step {self._step})",
            format=self._format, step=self._step, cause=cause, log_tail=self.log_tail,
        )  # fmt: skip

    def _read_output(self) -> bool | None:
        alive = self._read_chunk(self._output, self._tail)
        del self._tail[:-_TAIL]
        return alive

    def _read_events(self) -> bool | None:
        alive = self._read_chunk(self._events, self._line)
        *lines, rest = bytes(self._line).split(b"\n")
        self._line[:] = rest[-_TAIL:]
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:  # something else in the worker wrote to this descriptor
                continue
            if isinstance(event, dict):
                self._step = str(event.get("step", self._step))
                self._on_event(event)
        return alive

    @staticmethod
    def _read_chunk(fd: int, into: bytearray) -> bool | None:
        """True if there was something, False at the end, None if there is nothing now."""
        try:
            chunk = os.read(fd, 1 << 16)
        except BlockingIOError:
            return None
        into += chunk
        return bool(chunk)


def _watch(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # not Linux, or a kernel before 5.3
        return None


def _environment() -> dict[str, str]:
    # ONNX Runtime writes into the user's home and reports to its vendor unless it is told not to.
    quiet = {"ORT_DISABLE_TELEMETRY": os.environ.get("ORT_DISABLE_TELEMETRY", "1")}
    # Conversion needs no GPU, and would take memory from the engines that do.
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONUNBUFFERED": "1", **quiet}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
