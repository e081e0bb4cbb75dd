"""The examples that convert, with the real frameworks; see test_convert_torch.py and test_convert_tensorflow.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = os.environ.get("TRTX_TORCH_PYTHON") or sys.executable
TENSORFLOW = os.environ.get("TRTX_TENSORFLOW_PYTHON") or sys.executable

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("example", "python", "modules"),
    [
        ("from_pytorch/serve.py", TORCH, "torch, onnxscript"),
        ("from_tensorflow.py", TENSORFLOW, "tensorflow, tf2onnx"),
    ],
    ids=["pytorch", "tensorflow"],
)
def test_converts_and_serves(example: str, python: str, modules: str, tmp_path: Path) -> None:
    if subprocess.run([python, "-c", f"import {modules}"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} has no {modules}")
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / example), "--python", python]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRTX_CACHE_DIR": str(tmp_path), "TRTX_BACKEND": "mock"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    assert "differs from its source by" in result.stdout
    assert ", 10)}" in result.stdout.splitlines()[-1]
