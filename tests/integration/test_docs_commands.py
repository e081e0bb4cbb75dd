"""The shell blocks of the documentation: run where that can be, on the mock, with the Python of their page.

What is not run is listed, with the reason. The pages about C have a test of their own (unit/capi/test_docs_c.py).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.unit.test_project import DOCS, ROOT, named

INSTALLS = "installs packages; test_wheel.py installs the wheel, and the extras named are checked here"
SETS_UP = "makes an environment, or runs all tests; CI does nothing else"
SERVER = "asks a server that another command started"
MACHINE = "changes the settings of a machine, or asks its GPU"
DOCKER = "needs Docker's daemon"

#: By page and first line.
NOT_RUN = {
    ("README.md", "bash scripts/demo "): SETS_UP,
    ("CONTRIBUTING.md", "bash scripts/demo "): SETS_UP,
    (
        "docs/benchmarks.md",
        "bash tests/benchmarks/run.sh ",
    ): "shows options; tests/unit runs the benchmarks on the mock",
    ("docs/benchmarks.md", "python -m tests.benchmarks.runner "): "needs a GPU; tests/benchmarks rehearses it",
    ("docs/benchmarks.md", "python -m tests.benchmarks.agreement "): "needs a GPU; tests/benchmarks rehearses it",
    ("docs/how-to/convert-models.md", "python -m venv exporting"): INSTALLS,
    ("docs/how-to/deploy.md", "nvidia-smi "): MACHINE,
    ("docs/how-to/deploy.md", "sudo systemctl "): MACHINE,
    ("docs/how-to/docker.md", "docker build "): DOCKER,
    ("docs/how-to/fastapi.md", "pip install "): INSTALLS,
    ("docs/how-to/ray-serve.md", "pip install "): INSTALLS + "; test_ray_serve.py runs the example",
    ("docs/how-to/serve-over-http.md", "curl "): SERVER + "; test_open_inference.py does",
    ("docs/how-to/serve-over-http.md", "pip install "): INSTALLS,
    ("docs/reference/gpu-runs.md", "bash tests/gpu/run.sh"): "needs a GPU",
    (
        "docs/reference/trtexec.md",
        "trtexec ",
    ): "needs trtexec; tests of the command line run the options that it shares",
    ("docs/tutorial/first-engine.md", ".venv/bin/pip install "): INSTALLS,
    ("docs/tutorial/first-engine.md", "bash scripts/demo"): SETS_UP,
    ("examples/README.md", ".venv/bin/python "): "test_project.py runs all examples",
}


class Block(NamedTuple):
    page: str
    language: str
    text: str

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        found = [why for (page, start), why in NOT_RUN.items() if page == self.page and self.text.startswith(start)]
        return found[0] if found else None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(named(page), match[1], match[2]) for match in found]


ALL = [block for page in DOCS for block in blocks(page)]
SHELL = [block for block in ALL if block.language in ("bash", "console", "shell", "sh", "zsh")]
SHELL = [block for block in SHELL if not re.search(r"call-from-(c|rust)\.md|c-abi", block.page)]


def test_shell_blocks_are_bash() -> None:
    assert len(SHELL) > 10
    assert {block.language for block in SHELL} == {"bash"}


def test_what_is_not_run_is_there() -> None:
    unknown = [key for key in NOT_RUN if not any((b.page, True) == (key[0], b.text.startswith(key[1])) for b in SHELL)]
    assert unknown == []


@pytest.mark.parametrize("block", SHELL, ids=lambda block: f"{block.page}-{block.text.split(chr(10))[0][:40]}")
def test_shell_block_is_valid(block: Block) -> None:
    shown = re.sub(r"\[[\w-]+( \w+)?(\.\.\.)?\]", "", block.text)  # options in a synopsis
    subprocess.run(["bash", "-n", "-c", shown], check=True, timeout=30)


@pytest.mark.parametrize("page", sorted({block.page for block in SHELL if block.reason is None}))
def test_commands_of_page_run(page: str, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("python", ""), ("trtx", "-m trtx_py"), ("pytest", "-m pytest")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (programs / name).chmod(0o755)
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    runner = folder / "run_page.py"
    runner.write_text(
        "import subprocess\n"
        "namespace = {'__name__': '__main__'}\n"
        f"for language, text in {[(b.language, b.text) for b in ALL if b.page == page and b.reason is None]!r}:\n"
        "    if language == 'python':\n"
        f"        exec(compile(text, {page!r}, 'exec'), namespace)\n"
        "    elif language == 'bash':\n"
        "        subprocess.run(['bash', '-euo', 'pipefail', '-c', text], check=True)\n"
    )
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TRTX_BACKEND": "mock",
        "TRTX_CACHE_DIR": str(tmp_path / "cache"),
    }
    result = subprocess.run(
        [sys.executable, str(runner)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


@pytest.mark.parametrize("page", sorted({block.page for block in ALL if block.language == "py"}))
def test_python_that_needs_what_is_not_here_is_valid(page: str) -> None:
    """Marked ``py``, not ``python``: torch, other runtimes, parts of an example. It is only compiled."""
    for block in ALL:
        if (block.page, block.language) == (page, "py"):
            body = textwrap.indent(textwrap.dedent(block.text), "    ")
            compile(f"async def part():\n{body}", page, "exec")


def test_every_kind_of_block_is_known() -> None:
    """Run, compiled or at least read by a test; data and text are shown as they are."""
    checked = {"python", "py", "bash", "c", "cpp", "sh", "cmake", "ini"}
    shown = {"text", "yaml", "json", "html"}
    assert {block.language for block in ALL} - checked - shown == set()


def test_every_extra_that_is_named_exists() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, re.DOTALL | re.MULTILINE)
    extras = {*re.findall(r"^([\w-]+) = \[", table, re.MULTILINE)}
    files = [*DOCS, ROOT / "Dockerfile", *(ROOT / "examples").rglob("*.py"), *(ROOT / "trtx_py").rglob("*.py")]
    for file in files:
        content = file.read_text(encoding="utf-8")
        for found in re.findall(r"(?:trtx[-_]py|install ['\"]?\.)\[([a-z0-9,-]+)\]|EXTRAS=([a-z0-9,-]+)", content):
            assert {*",".join(filter(None, found)).split(",")} <= extras, f"{named(file)}: {found}"
