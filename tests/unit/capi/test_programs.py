"""Programs that are not in Python, on the mock: the examples, and what the C++ header promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.capi.programs import DIGITS, ROOT, build, execute

EXAMPLES = ROOT / "examples" / "c"
RAII = ROOT / "capi" / "tests" / "library" / "headers" / "raii.cpp"


def test_the_c_example(tmp_path: Path) -> None:
    program = build(EXAMPLES / "classify.c", tmp_path / "classify", "-std=c99")
    assert execute(program, str(DIGITS)).splitlines() == [
        "backend: mock",
        "dispatch: 0 (100.0%)",
        "submit: 1 (99.9%)",
    ]


def test_the_cpp_example(tmp_path: Path) -> None:
    program = build(EXAMPLES / "classify.cpp", tmp_path / "classify", "-std=c++11", compiler="g++")
    assert execute(program, str(DIGITS)).splitlines() == ["backend: mock", "future: 0 (100.0%)"]


def test_an_example_says_what_is_wrong(tmp_path: Path) -> None:
    program = build(EXAMPLES / "classify.c", tmp_path / "classify")
    with pytest.raises(AssertionError, match=r"trtxpy_graph_from_file.*TRTXPY_NOT_FOUND.*no\.onnx"):
        execute(program, str(tmp_path / "no.onnx"))


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_the_cpp_header_owns(tmp_path: Path, compiler: str) -> None:
    program = build(RAII, tmp_path / "raii", "-std=c++11", "-O1", compiler=compiler)
    assert execute(program, str(DIGITS)) == "0 failures\n"
