"""The headers compile everywhere without a warning: each language standard, gcc and clang."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.unit.capi.programs import ROOT, STRICT, run, tool

INCLUDE = ROOT / "capi" / "include"
SOURCES = ROOT / "capi" / "tests" / "library" / "headers"
C = ("c99", "c11", "c17", "c2x")
CPP = ("c++11", "c++14", "c++17", "c++20", "c++2b")


def compile_as(compiler: str, standard: str, source: Path) -> None:
    """Without a warning, also of what -Wall and -Wextra leave out and a project may have switched on."""
    more = ["-Wshadow", "-Wconversion", "-Wundef", "-Wcast-qual"]
    if source.suffix == ".c":
        more += ["-Wstrict-prototypes", "-Wmissing-prototypes"]
    else:
        more += ["-Wnon-virtual-dtor", "-Woverloaded-virtual"]
    run([tool(compiler), f"-std={standard}", *STRICT, *more, "-fsyntax-only", f"-I{INCLUDE}", str(source)])


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("standard", C)
def test_c(compiler: str, standard: str) -> None:
    compile_as(compiler, standard, SOURCES / "alone.c")


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("standard", CPP)
def test_cpp(compiler: str, standard: str) -> None:
    compile_as(compiler, standard, SOURCES / "alone.cpp")


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("standard", CPP)
def test_the_cpp_header(compiler: str, standard: str) -> None:
    compile_as(compiler, standard, SOURCES / "alone_hpp.cpp")


def test_a_warning_would_fail(tmp_path: Path) -> None:
    (tmp_path / "warning.c").write_text('#include "trtxpy.h"\nint f(int unused) { return TRTXPY_OK; }\n')
    with pytest.raises(AssertionError, match="unused"):
        compile_as("gcc", "c11", tmp_path / "warning.c")


def test_every_option_struct_has_an_init_macro_that_sets_its_size(tmp_path: Path) -> None:
    text = (INCLUDE / "trtxpy.h").read_text(encoding="utf-8")
    structs = [
        part.split("{")[0].strip() for part in text.split("typedef struct ")[1:] if "size_t struct_size;" in part
    ]
    structs = [name for name in structs if name.isidentifier() and f"#define {name.upper()}_INIT" in text]
    assert "trtxpy_submit_options" in structs
    checks = "".join(
        f"    {{ {name} value = {name.upper()}_INIT; if (value.struct_size != sizeof value) return 1; }}\n"
        for name in structs
    )
    (tmp_path / "init.c").write_text(f'#include "trtxpy.h"\nint main(void) {{\n{checks}    return 0;\n}}\n')
    run([tool("gcc"), *STRICT, f"-I{INCLUDE}", str(tmp_path / "init.c"), "-o", str(tmp_path / "init")])
    run([str(tmp_path / "init")])


def test_the_standard_library_is_all_that_the_headers_include() -> None:
    listed = subprocess.run(
        ["grep", "-h", "#include", str(INCLUDE / "trtxpy.h"), str(INCLUDE / "trtxpy.hpp")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    assert [line for line in listed if line and "<" not in line] == ['#include "trtxpy.h"']
