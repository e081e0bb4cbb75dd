"""The pages about the C ABI: every block of C and C++ compiles, programs run on the mock, shell lines work, and no
function or status is left out."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.unit.capi.programs import DIGITS, LIBRARY, ROOT, STRICT, build, execute, flags, run, tool

HEADER = (ROOT / "capi" / "include" / "trtxpy.h").read_text(encoding="utf-8")
HOW_TO = ROOT / "docs" / "how-to" / "call-from-c.md"
REFERENCE = ROOT / "docs" / "reference" / "c-abi"
PAGES = sorted(
    [HOW_TO, ROOT / "docs" / "how-to" / "call-from-rust.md", REFERENCE.with_suffix(".md"), *REFERENCE.glob("*.md")]
)

#: What a part of a program may use without having made it.
PRELUDE = """
#include <stdio.h>
#include <stdlib.h>
#include <trtxpy.h>
void complete(trtxpy_status, const char *, const trtxpy_result *, void *);
void part(trtxpy_context, trtxpy_graph, trtxpy_tensor, trtxpy_request, const trtxpy_binding *, const trtxpy_binding *);
void part(trtxpy_context context, trtxpy_graph graph, trtxpy_tensor tensor, trtxpy_request request,
          const trtxpy_binding *inputs, const trtxpy_binding *outputs) {
"""


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str

    @property
    def is_program(self) -> bool:
        return "int main(" in self.text

    @property
    def is_function(self) -> bool:
        return not self.is_program and re.search(r"^static \w+ \w+\(", self.text, re.MULTILINE) is not None

    def __str__(self) -> str:
        return f"{self.page.stem}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(page, text[: match.start(2)].count("\n") + 1, match[1], match[2]) for match in found]


ALL = [block for page in PAGES for block in blocks(page)]
CODE = [block for block in ALL if block.language in ("c", "cpp")]


def test_there_are_blocks_of_each_kind() -> None:
    assert len([block for block in CODE if block.is_program]) >= 6
    assert [block for block in CODE if block.is_function]
    assert [block for block in CODE if not block.is_program and not block.is_function]
    assert {block.language for block in ALL} <= {"c", "cpp", "sh", "cmake"}


@pytest.mark.parametrize("block", [block for block in CODE if not block.is_program], ids=str)
def test_part_of_a_program_compiles(block: Block, tmp_path: Path) -> None:
    around = ("#include <stdio.h>\n#include <trtxpy.h>\n", "") if block.is_function else (PRELUDE, "}\n")
    source = tmp_path / "part.c"
    source.write_text(f'{around[0]}#line {block.line} "{block.page.name}"\n{block.text}{around[1]}')
    unused = ["-Wno-unused-parameter", "-Wno-unused-but-set-variable", "-Wno-unused-variable", "-Wno-unused-function"]
    run([tool("gcc"), *STRICT, *unused, "-std=c11", "-fsyntax-only", *flags("--cflags"), str(source)])


@pytest.mark.parametrize("block", [block for block in CODE if block.is_program], ids=str)
def test_program_runs(block: Block, tmp_path: Path) -> None:
    cpp = block.language == "cpp"
    source = tmp_path / ("program.cpp" if cpp else "program.c")
    source.write_text(f'#line {block.line} "{block.page.name}"\n{block.text}')
    program = build(source, tmp_path / "program", "-std=c++11" if cpp else "-std=c11", compiler="g++" if cpp else "gcc")
    model = tmp_path / "examples" / "digits"
    model.mkdir(parents=True)
    (model / "digits.onnx").symlink_to(DIGITS)
    (tmp_path / "digits.onnx").symlink_to(DIGITS)
    execute(program, cwd=tmp_path, TRTXPY_LIBRARY=str(LIBRARY))


def test_the_shell_lines_of_the_how_to_work(tmp_path: Path) -> None:
    """In the order of the page: its C program is hello.c, its CMake lines CMakeLists.txt, its C++ program hello.cpp."""
    flags("--path")
    for name in ("cc", "c++", "pkg-config", "cmake"):
        tool(name)
    here = blocks(HOW_TO)
    (tmp_path / "hello.c").write_text(next(block.text for block in here if block.is_program))
    (cmake,) = (block.text for block in here if block.language == "cmake")
    (tmp_path / "CMakeLists.txt").write_text(cmake)
    (cpp,) = (block.text for block in here if block.language == "cpp" and block.is_program)
    (tmp_path / "hello.cpp").write_text(cpp)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = tmp_path / "bin"
    path.mkdir()
    (path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (path / "python").chmod(0o755)
    script = "set -eu\n" + "".join(block.text for block in here if block.language == "sh")
    printed = run(["sh", "-c", script], cwd=tmp_path, PATH=f"{path}{os.pathsep}{os.environ['PATH']}")
    probabilities = re.findall(r"^(\d) (0\.\d{3})$", printed, re.MULTILINE)
    assert [digit for digit, _ in probabilities] == list("0123456789")
    assert sum(float(value) for _, value in probabilities) == pytest.approx(1, abs=0.01)
    assert (tmp_path / "build" / "hello").is_file()


# Nothing is left out


def test_every_function_is_in_the_reference() -> None:
    page = REFERENCE.with_suffix(".md").read_text(encoding="utf-8")
    functions = re.findall(r"^TRTXPY_API[^;(]*?(trtxpy_\w+)\(", HEADER, re.MULTILINE)
    assert len(functions) > 40
    assert [name for name in functions if f"`{name}`" not in page] == []


def test_every_status_has_its_cause_and_cure() -> None:
    page = (REFERENCE / "errors.md").read_text(encoding="utf-8")
    (body,) = re.findall(r"enum \{\s*(TRTXPY_OK.*?)\n\};", HEADER, re.DOTALL)
    statuses = re.findall(r"(TRTXPY_\w+) = \d+", body)
    assert len(statuses) > 20
    assert re.findall(r"^\| `(TRTXPY_\w+)` \|", page, re.MULTILINE) == statuses


def test_every_type_has_its_number() -> None:
    page = (REFERENCE / "data-types.md").read_text(encoding="utf-8")
    (body,) = re.findall(r"enum \{\s*(TRTXPY_FLOAT32.*?)\n\};", HEADER, re.DOTALL)
    types = [(number, name) for name, number in re.findall(r"(TRTXPY_\w+) = (\d+)", body)]
    assert re.findall(r"^\| (\d+) \| `(TRTXPY_\w+)` \|", page, re.MULTILINE) == types


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_name_on_the_page_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    known = set(re.findall(r"\b(?:trtxpy|TRTXPY)_\w+", HEADER)) | {
        "TRTXPY_PYTHON",
        "TRTXPY_LIBRARY",
        "TRTXPY_1",
        "TRTXPY_UNKNOWN",
    }
    assert {name for name in re.findall(r"\b(?:trtxpy|TRTXPY)_\w+", text) if name not in known} == set()
