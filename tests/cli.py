"""Runs commands of ``trtx`` in this process and in others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trtx_py.cli import main

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "examples" / "digits" / "digits.onnx")


@dataclass(frozen=True)
class Ran:
    """One command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))

    def failed(self, code: int, *words: str) -> Ran:
        """It says one line that has these words, no traceback, and ended with this code."""
        assert self.code == code, self
        assert len(self.err.strip().splitlines()) == 1, self.err
        assert self.err.lstrip("\n").startswith("trtx: error: ")  # behind the terminal's ^C goes a line break
        assert "Traceback" not in self.err + self.out
        for word in words:
            assert word in self.err, self.err
        return self

    def succeeded(self) -> Ran:
        assert self.code == 0, self
        return self


Run = Callable[..., Ran]


def runner(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(each) for each in arguments])
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run


#: As the installed `trtx` does it.
LAUNCH = [sys.executable, "-c", "from trtx_launch import main; main()"]


def environment(**more: str) -> dict[str, str]:
    """For a command in another process."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def start(*arguments: object, program: list[str] = LAUNCH, **options: Any) -> subprocess.Popen[str]:
    """A command in a process of its own."""
    options.setdefault("env", environment())
    options.setdefault("stdout", subprocess.PIPE)
    options.setdefault("stderr", subprocess.PIPE)
    return subprocess.Popen([*program, *map(str, arguments)], text=True, **options)


def spawn(*arguments: object, program: list[str] = LAUNCH, **options: Any) -> Ran:
    """Runs a command in a process of its own, to its end."""
    with start(*arguments, program=program, **options) as process:
        out, err = process.communicate(timeout=120)
    return Ran(process.returncode, out or "", err or "")
