"""The files around the package: container, unit of systemd, citation, wheels. What cannot run here is read."""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import trtx_py

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
UNIT = ROOT / "examples" / "deploy" / "trtx-digits.service"


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    pairs = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, rest in pairs]


def copied() -> list[str]:
    """What the image takes from the checkout."""
    lines = [shlex.split(rest) for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    return [source for words in lines for source in words[:-1]]


def ignored(path: str) -> bool:
    """By .dockerignore: the last line that matches counts."""
    result = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            whole = path == pattern or path.startswith(f"{pattern}/") or pattern == "*"
            if whole or fnmatch.fnmatch(path.rpartition("/")[2], pattern):
                result = not line.startswith("!")
    return result


def test_image_is_made_of_what_is_there() -> None:
    assert [path for path in copied() if not (ROOT / path).exists() or ignored(path)] == []
    (packages,) = re.findall(r"^wheel.packages = (\[.+\])$", PYPROJECT, re.MULTILINE)
    assert {*re.findall(r'"(\w+)"', packages)} <= {*copied()}
    assert ignored(".git/config")
    assert ignored(".venv/bin/python")
    assert ignored("trtx_py/_native.cpython-311-x86_64-linux-gnu.so")
    assert not ignored("trtx_py/_engine.py")
    assert not ignored("capi/src/lane.c")


def test_image_has_two_stages_and_a_user_without_rights() -> None:
    names = [name for name, _ in instructions()]
    assert {*names} <= {"ARG", "COPY", "CMD", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "STOPSIGNAL",
                        "USER", "VOLUME", "WORKDIR"}  # fmt: skip
    assert names.count("FROM") == 2
    last = instructions()[len(names) - 1 - names[::-1].index("FROM") :]
    assert ("USER", "trtx") in last
    assert not [rest for name, rest in last if name == "RUN" and re.search(r"gcc|pip|apt", rest)]
    assert [rest for name, rest in last if name == "HEALTHCHECK"]
    order = [name for name, _ in last]
    assert order.index("USER") < order.index("ENTRYPOINT")


def test_unit_is_valid() -> None:
    text = UNIT.read_text(encoding="utf-8")
    limits = {name: int(value) for name, value in re.findall(r"(TimeoutStopSec=|--drain-s )(\d+)", text)}
    assert limits["TimeoutStopSec="] > limits["--drain-s "]
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here; what it would verify was only read")
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(UNIT)], capture_output=True, text=True, timeout=60, check=False
    )
    said = [line for line in result.stderr.splitlines() if UNIT.name in line and "is not executable" not in line]
    assert said == []


def test_page_shows_the_unit() -> None:
    page = (ROOT / "docs" / "how-to" / "deploy.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```ini\n(.*?)```", page, re.DOTALL)
    assert [line for line in shown.splitlines() if line not in UNIT.read_text(encoding="utf-8").splitlines()] == []


def test_citation_has_the_version() -> None:
    yaml = pytest.importorskip("yaml", reason="the extra docs is not installed")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= {*citation}
    assert (citation["version"], citation["license"]) == (trtx_py.__version__, "Apache-2.0")


def test_wheels_are_for_the_interpreters_that_are_claimed() -> None:
    (table,) = re.findall(
        r"^\[tool.cibuildwheel\]\n(.*?)^\[tool\.(?!cibuildwheel)", PYPROJECT, re.DOTALL | re.MULTILINE
    )
    built = re.findall(r'"cp3(\d+)-\*"', table)
    claimed = re.findall(r"Python :: 3\.(\d+)", PYPROJECT)
    assert built == claimed
    (command,) = re.findall(r'^test-command = "(.+)"$', table, re.MULTILINE)
    for path in re.findall(r"\{project\}/(\S+)", command):
        assert (ROOT / path).is_file()
