"""What the figures were taken on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

_PACKAGES = (
    "trtx-py", "numpy", "anyio", "uvloop", "cuda-bindings", "tensorrt_dispatch_cu13", "torch", "torchvision", "onnx",
    "onnxruntime",
)  # fmt: skip
_QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.limit"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def machine_facts() -> dict[str, Any]:
    """GPU, driver, CPU, versions, date."""
    root = Path(__file__).parents[2]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": _output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": list(os.getloadavg()),
        "kernel": platform.release(),
        "python": sys.version.split()[0],
        "compiler": (_output("gcc", "--version") or "none").splitlines()[0],
        "commit": _output("git", "-C", str(root), "rev-parse", "HEAD"),
        "versions": {name: _version(name) for name in _PACKAGES},
    }
