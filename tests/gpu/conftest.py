"""One body, two sides: every test that takes ``side`` runs on the mock, and on a GPU with ``-m gpu``.

What is measured is collected by ``record``, printed as a table, and written to $OUT/gpu-run.json where OUT is set.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.kit import BACKEND, GpuSide, MockSide, Side, load_kit

_rows = pytest.StashKey[list[dict[str, Any]]]()
_facts = pytest.StashKey[dict[str, Any]]()


@pytest.fixture(params=[pytest.param("gpu", marks=pytest.mark.gpu), "mock"])
def side(request: pytest.FixtureRequest) -> Iterator[Side]:
    kit = load_kit()
    if kit is None:
        pytest.skip("no GPU kit here: neither TRTX_GPU_KIT nor ../shared/gpu-kit")
    if request.param == "gpu":
        gpu = GpuSide(kit)
        facts = request.config.stash.setdefault(_facts, {})
        if not facts:
            facts.update(_machine(gpu))
        yield gpu
        return
    mock = MockSide(kit)
    yield mock
    mock.backend.assert_clean()
    mock.backend.close()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``record(case, error=..., ...)``: one row of the table; on the mock nothing is kept."""
    on_gpu = request.node.get_closest_marker("gpu") is not None
    rows = request.config.stash.setdefault(_rows, [])

    def add(case: str, **figures: Any) -> None:
        if on_gpu:
            rows.append({"test": request.node.name, "case": case, **figures})

    return add


def _machine(side: GpuSide) -> dict[str, Any]:
    with side.runtime() as runtime:
        device = runtime.device
        return {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "gpu": device.name,
            "compute_capability": device.compute_capability,
            "memory_bytes": device.total_bytes,
            "driver": _driver_version(),
            "backend": f"{BACKEND} {runtime.backend.version}",
            "plans": f"lean library {runtime.version}",
            "python": platform.python_version(),
        }


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows, facts = config.stash.get(_rows, []), config.stash.get(_facts, {})
    if not facts:
        return
    terminalreporter.section("GPU run")
    for name, value in facts.items():
        terminalreporter.write_line(f"{name:20s} {value}")
    for row in rows:
        figures = "  ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.items()
            if name not in ("case", "test")
        )
        terminalreporter.write_line(f"{row['case']:44s} {figures}")
    counts = {
        status: len(terminalreporter.stats.get(status, [])) for status in ("passed", "failed", "error", "skipped")
    }
    if os.environ.get("OUT"):
        target = Path(os.environ["OUT"]) / "gpu-run.json"
        target.write_text(json.dumps({**facts, "tests": counts, "rows": rows}, indent=1) + "\n")
        terminalreporter.write_line(f"written to {target}")
