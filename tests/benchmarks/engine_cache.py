"""What a second process waits for a plan that a first one built: ResNet-50 of the GPU kit, built by TensorRT-RTX.

Needs no GPU. Each figure is of a process of its own and contains all that it takes to have the plan: importing TensorRT
and onnx where they are needed, hashing the model, building or reading and verifying. Interpreter start and the import
of trtx_py, the same for both, are told apart.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .rig import Settings, SetupError

_ROOT = Path(__file__).parents[2]
_KIT = Path(os.environ.get("TRTX_GPU_KIT") or _ROOT.parent / "shared" / "gpu-kit")

_CHILD = """
import asyncio, json, sys, time
begun = time.perf_counter()
import trtx_py as trtx
imported = time.perf_counter()
model, root, backend = sys.argv[1:]
target = {"compute_capabilities": ("8.9",)} if backend == "tensorrt_rtx" else {}
cache = trtx.EngineCache(root)
before = len(cache.list())

async def main():
    started = time.perf_counter()
    plan = await cache.plan(model, backend, **target)
    return plan, time.perf_counter() - started

plan, plan_s = asyncio.run(main())
print(json.dumps({
    "plan_s": plan_s, "import_s": imported - begun, "sha256": plan.sha256, "plan_bytes": len(plan),
    "added": len(cache.list()) - before,
}))
"""


def run_engine_cache(settings: Settings, backend: str = "tensorrt_rtx", name: str = "resnet50") -> dict[str, Any]:
    """Medians over pairs of processes, each pair with an empty cache. ``ratio`` is second over first, pair by pair.

    Args:
        name: a function of the kit's models.py.
    """
    if backend == "tensorrt_rtx" and importlib.util.find_spec("tensorrt_rtx") is None:
        raise SetupError("tensorrt-rtx is not installed (extra: rtx)")
    if not (_KIT / "models.py").is_file():
        raise SetupError(f"there is no models.py in {_KIT}; name the GPU kit's folder with TRTX_GPU_KIT")
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = save_kit_model(name, Path(folder))
        for number in range(settings.count(7, 3) + 1):
            root = os.path.join(folder, f"cache{number}")
            first, second = _child(model, root, backend), _child(model, root, backend)
            if (first["added"], second["added"]) != (1, 0) or first["sha256"] != second["sha256"]:
                raise RuntimeError(f"the second process did not find the plan of the first: {first}, {second}")
            if number:  # the first pair brings files into the page cache
                pairs.append((first, second))
        size = os.path.getsize(model)
    ratios = [second["plan_s"] / first["plan_s"] for first, second in pairs]
    return {
        "backend": backend,
        "pairs": len(pairs),
        "model_bytes": size,
        "plan_bytes": pairs[0][0]["plan_bytes"],
        "first_s": float(np.median([first["plan_s"] for first, _ in pairs])),
        "second_s": float(np.median([second["plan_s"] for _, second in pairs])),
        "import_s": float(np.median([child["import_s"] for pair in pairs for child in pair])),
        "ratio": float(np.median(ratios)),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def save_kit_model(name: str, folder: Path) -> str:
    """Write a model of the kit into ``folder``; its path."""
    sys.path.insert(0, str(_KIT))
    try:
        model = getattr(importlib.import_module("models"), name)()
    finally:
        sys.path.remove(str(_KIT))
    path = folder / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    return str(path)


def _child(model: str, root: str, backend: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, model, root, backend], cwd=_ROOT, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"a process with the engine cache ended with {done.returncode}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
