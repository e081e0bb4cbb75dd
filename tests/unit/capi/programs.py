"""C and C++ programs: compiled with the flags that the package gives, and run on the mock as a process of their own."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LIBRARY = ROOT / "trtx_py" / "capi" / "libtrtxpy.so"
DIGITS = ROOT / "examples" / "digits" / "digits.onnx"
STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")


def run(
    command: list[str],
    given: Mapping[str, str] | None = None,
    *,
    cwd: Path | None = None,
    timeout: float = 120,
    **environment: str,
) -> str:
    """Standard output; the rest is in the failure. ``given`` and the keywords are of the environment."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(given or {}), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tool(name: str) -> str:
    """A program that a machine may lack; scripts/test says which tests were left out for it."""
    if shutil.which(name) is None:
        pytest.skip(f"no {name} on this machine")
    return name


def flags(*which: str) -> list[str]:
    """What ``python -m trtx_py.capi`` prints, as arguments."""
    if not LIBRARY.is_file():
        pytest.skip("libtrtxpy is not built: scripts/build-native")
    return shlex.split(run([sys.executable, "-m", "trtx_py.capi", *which]))


def build(source: Path, program: Path, *options: str, compiler: str = "gcc") -> Path:
    """Compile and link one file with libtrtxpy."""
    link = flags("--cflags", "--libs")
    run([tool(compiler), *STRICT, *options, str(source), "-o", str(program), *link, "-pthread"])
    return program


def execute(program: Path, *arguments: str, cwd: Path | None = None, **environment: str) -> str:
    """Run a program with this interpreter as its Python."""
    own = {"TRTX_BACKEND": "mock", "TRTXPY_PYTHON": sys.executable}
    return run([str(program), *arguments], {**own, **environment}, cwd=cwd)
