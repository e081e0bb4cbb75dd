"""Runs the probes, several at once, and makes of a crash or a hang what it is: an answer."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ._probe import MARK

#: What a probe answers, by its subject.
Probe = Callable[[str], dict[str, Any]]

TIMEOUT_S = 60.0
# Without the facade, which takes longer than most probes.
_CODE = """
import sys
from trtx_launch._defer import reserve
reserve()
from trtx_py.diagnostics._probe import main
main(sys.argv[1])
"""


def is_installed(bindings: Iterable[str]) -> bool:
    """Whether one of these modules is here; none is imported."""
    for name in bindings:
        try:
            if importlib.util.find_spec(name) is not None:
                return True
        except (ImportError, ValueError):  # half of it is gone, or something hides it
            continue
    return False


def run_probe(subject: str, *, timeout_s: float = TIMEOUT_S, code: str = _CODE) -> dict[str, Any]:
    """What the probe of ``subject`` answers; ``{"ended": ..., "problem": ...}`` if it did not come to that."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, subject], env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"ended": "hung", "problem": f"loading it did not end within {timeout_s:g} s"}
    except OSError as error:
        return {"ended": "crashed", "problem": f"{sys.executable} cannot be started: {error.strerror}"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            answer: dict[str, Any] = json.loads(line[len(MARK) :])
            return answer
    last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    return {"ended": "crashed", "problem": f"loading it ends the process ({_ending(done.returncode)}): {last[:300]}"}


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def ask_all(subjects: Iterable[str], probe: Probe) -> dict[str, dict[str, Any]]:
    """Ask about several subjects at once: each starts an interpreter."""
    names = list(subjects)
    with ThreadPoolExecutor(max_workers=min(len(names), os.cpu_count() or 1) or 1) as pool:
        return dict(zip(names, pool.map(probe, names), strict=True))
