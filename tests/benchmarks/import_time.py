"""What ``import trtx_py`` costs beyond ``import numpy, asyncio``, and what it does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

_ROOT = Path(__file__).parents[2]
_VENDORS = ("tensorrt", "cuda", "torch", "cupy", "onnx", "onnxruntime", "mock_backend")

_CHILD = """
import json, sys, time
begun = time.perf_counter()
import numpy, asyncio
middle = time.perf_counter()
{statement}
ended = time.perf_counter()
tops = sorted({{name.split(".")[0] for name in sys.modules}})
print(json.dumps([middle - begun, ended - middle, ended - begun, tops]))
"""


def run_import_time(runs: int = 15) -> dict[str, Any]:
    """Medians over fresh processes, with and without in turn; compiled files are there from a first run."""
    with tempfile.TemporaryDirectory() as folder:
        # As where it is installed: compiled files exist, whatever the environment says about writing them here.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        return _run(runs, environment)


def _run(runs: int, environment: dict[str, str]) -> dict[str, Any]:
    children = {"with": _CHILD.format(statement="import trtx_py"), "without": _CHILD.format(statement="")}
    found: dict[str, list[list[Any]]] = {name: [] for name in children}
    for number in range(runs + 1):
        for name, code in children.items() if number % 2 else reversed(children.items()):
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=_ROOT,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            if done.returncode:
                raise RuntimeError(f"a process that imports ended with {done.returncode}:\n{done.stderr}")
            if number:
                found[name].append(json.loads(done.stdout))
    beyond = [float(run[1]) * 1e3 for run in found["with"]]
    total = {name: float(np.median([run[2] for run in rows])) * 1e3 for name, rows in found.items()}
    vendors = sorted(top for top in found["with"][0][3] if top.startswith(_VENDORS[0]) or top in _VENDORS)
    return {
        "runs": runs,
        "beyond_ms": float(np.median(beyond)),
        "beyond_min_ms": min(beyond),
        "beyond_all_ms": [round(value, 2) for value in beyond],
        "numpy_and_asyncio_ms": total["without"],
        "all_ms": total["with"],
        "difference_of_medians_ms": total["with"] - total["without"],
        "vendor_modules_imported": vendors,
    }
