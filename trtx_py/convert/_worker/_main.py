"""The worker's entry: one job, one result."""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from ._task import RefusedError, Task

_PR_SET_PDEATHSIG = 1
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def main(job_path: str, events: int, disk_full: int) -> None:
    """Run the job of ``job_path``; its result, or its error, is in the file that the job names.

    Where not even that can be written the exit status is ``disk_full``.
    """
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    _die_with(job["parent"])
    os.set_inheritable(events, False)
    task = Task(job, events)
    if job["import_path"] is None:
        # Behind all else: a file in the current folder must not pass for a package that it is named as.
        sys.path.append(job["folder_of_caller"])
    else:
        sys.path[:0] = job["import_path"]
    result: dict[str, Any]
    try:
        os.chdir(task.folder)
        _function(job["converter"])(task)
        result = task.result()
    except BaseException as error:  # the caller decides what each means
        result = {"error": {**_describe(error, task), "step": task.current_step, "traceback": traceback.format_exc()}}
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        _write(job["result"], result)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(disk_full)
    # Not sys.exit: threads and exit handlers of a framework can hang or crash after the work is done.
    os._exit(0)


def _write(path: str, result: dict[str, Any]) -> None:
    temporary = f"{path}.new"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(result, file)
    os.replace(temporary, path)


def _function(name: str) -> Callable[[Task], None]:
    module, _, attribute = name.partition(":")
    if module.startswith("."):
        loaded: Any = importlib.import_module(module, __package__)
    else:
        loaded = importlib.import_module(module)
    for part in attribute.split("."):
        loaded = getattr(loaded, part)
    function: Callable[[Task], None] = loaded
    return function


def _describe(error: BaseException, task: Task) -> dict[str, str]:
    text = _COLOUR.sub("", str(error)) or type(error).__name__
    label = f"{task.label}, step {task.current_step!r}"
    if isinstance(error, RefusedError):
        return {"cause": error.cause, "message": f"{label}: {text}"}
    if isinstance(error, MemoryError):
        return {"cause": "memory", "message": f"{label}: memory ran out; convert on a machine with more"}
    number = _errno_behind(error)
    if number is not None:
        return {
            "cause": "disk",
            "message": f"{label}: {os.strerror(number)} while writing below {task.folder}; free some space, or set "
            "TMPDIR or output= to a disk with more",
        }
    return {"cause": "failed", "message": f"{label}: {type(error).__name__}: {_shortened(text)}"}


def _errno_behind(error: BaseException | None) -> int | None:
    """The error number if a full disk is at the bottom of ``error``."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _shortened(text: str, limit: int = 4000) -> str:
    return text if len(text) <= limit else text[: limit // 2] + "\n...\n" + text[-limit // 2 :]


def _die_with(parent: int) -> None:
    """A parent that is killed cannot end us: ask the kernel to."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):  # not Linux
        return
    if os.getppid() != parent:
        os.killpg(0, signal.SIGKILL)
