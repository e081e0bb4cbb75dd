"""Whether a profiler lives in a combination of TensorRT libraries, tried in a process that may die of it.

Run as ``python -m trtx_py.profiling._probe`` with a task of JSON on its standard input.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._aio import run_shielded
from .._engine import Engine
from .._errors import EngineError, TrtxError
from .._plan import Plan
from .._types import Array
from ._passes import measure_layers

_TIMEOUT_S = 300.0
#: What was found, by backend, its version, that of the lean library, and device: it does not change in a process.
_found: dict[tuple[str, str, str, int], str | None] = {}


def probe_command() -> Sequence[str]:
    """What is run."""
    return [sys.executable, "-m", "trtx_py.profiling._probe"]


async def refusal(engine: Engine, plan: Plan | None, inputs: Mapping[str, Array]) -> str | None:
    """Why no profiler may be set on a context of this engine; None if one may.

    Args:
        plan: what the other process loads; without one it cannot be tried.
        inputs: one inference of these shapes.
    Cancellation: the other process is killed.
    """
    doubt = engine._native.untried_profiler
    if doubt is None:
        return None
    runtime = engine.runtime
    key = (runtime.backend.name, runtime.backend.version, runtime.version, runtime.device.ordinal)
    if key not in _found:
        if plan is None:
            return f"{doubt}; pass plan= and it is tried in a process of its own first"
        _found[key] = await _try(engine, plan, inputs)
    return _found[key]


async def _try(engine: Engine, plan: Plan, inputs: Mapping[str, Array]) -> str | None:
    runtime = engine.runtime
    task = {
        "backend": runtime.backend.name,
        "device": runtime.device.ordinal,
        "lean_library": runtime._lean_library,
        "names": list(inputs),
    }
    trial = _Trial(task, plan, list(inputs.values()))
    what = f"IProfiler through {runtime.backend.name} {runtime.backend.version}, plans of {runtime.version}"
    status = await run_shielded(trial.run, trial.end)
    if status is None:
        return f"{what}: a process that tried it did not end within {_TIMEOUT_S:g} s"
    if status == 0:
        return None
    return f"{what}: a process that tried it {_end(status)}{_last_line(trial.said)}"


class _Trial:
    """The other process. ``run`` blocks; ``end`` may be called meanwhile, on another thread.

    Attributes:
        said: what it wrote to its standard error.
    """

    def __init__(self, task: dict[str, Any], plan: Plan, arrays: Sequence[Array]) -> None:
        self._task, self._plan, self._arrays = task, plan, arrays
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False
        self.said = b""

    def run(self) -> int | None:
        """Its status; None if it did not end in time."""
        with tempfile.TemporaryDirectory(prefix="trtx-probe-") as folder:
            files = {"plan": os.path.join(folder, "plan"), "inputs": os.path.join(folder, "inputs.npz")}
            self._plan.save(files["plan"])
            # By number: an input may be called as one of savez's own arguments.
            numbered: dict[str, Any] = {f"input{index}": array for index, array in enumerate(self._arrays)}
            np.savez(files["inputs"], **numbered)
            with self._lock:
                if self._ended:
                    return None
                self._process = subprocess.Popen(
                    list(probe_command()), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                )
            with self._process as process:
                try:
                    _, self.said = process.communicate(json.dumps({**self._task, **files}).encode(), _TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()
                    return None
            return process.returncode

    def end(self) -> None:
        """Kill it."""
        with self._lock:
            self._ended = True
            if self._process is not None:
                self._process.kill()


def _end(status: int) -> str:
    if status >= 0:
        return f"failed with status {status}"
    try:
        return f"died of {signal.Signals(-status).name}"
    except ValueError:
        return f"died of signal {-status}"


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return f": {lines[-1][:300]}" if lines else ""


def main() -> int:
    """One engine, three inferences with a profiler; 0 if they told of at least one layer."""
    from .._runtime import Runtime

    task = json.loads(sys.stdin.read())
    try:
        with np.load(task["inputs"]) as stored:
            inputs: dict[str, Array] = {name: stored[f"input{index}"] for index, name in enumerate(task["names"])}
        runtime = Runtime(backend=task["backend"], device=task["device"], lean_library=task["lean_library"])
        with runtime, runtime.deserialize_sync(task["plan"]) as engine:
            found = measure_layers(engine, inputs, 1, threading.Event())
        if found.unavailable is not None or not found.layers:
            raise EngineError(found.unavailable or "the profiler was told of no layer")
    except TrtxError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
