"""How a C program finds libtrtxpy in a checkout, and what the library needs and exports. The wheel:
tests/integration/test_capi_wheel.py."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trtx_py
from tests.unit.capi.programs import LIBRARY, ROOT, execute, flags, run, tool

HEADER = ROOT / "capi" / "include" / "trtxpy.h"
PROGRAM = r"""
#include <stdio.h>
#include "trtxpy.h"
int main(void) {
    unsigned abi = trtxpy_abi_version();
    printf("%s %u.%u\n", trtxpy_version(), abi >> 16, abi & 0xffff);
    return 0;
}
"""


def ask(*options: str) -> str:
    flags("--path")  # skips where the library is not built
    return run([sys.executable, "-m", "trtx_py.capi", *options])


def abi_version() -> str:
    text = HEADER.read_text(encoding="utf-8")
    return ".".join(re.findall(r"#define TRTXPY_ABI_(?:MAJOR|MINOR) (\d+)", text))


EXPECTED = f"{trtx_py.__version__} {abi_version()}\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "program.c"
    path.write_text(PROGRAM)
    return path


# python -m trtx_py.capi


def test_the_flags_are_enough(source: Path, tmp_path: Path) -> None:
    program = tmp_path / "program"
    run([tool("gcc"), str(source), "-o", str(program), *flags("--cflags", "--libs")])
    assert execute(program, cwd=tmp_path) == EXPECTED


def test_the_flags_are_for_a_shell(tmp_path: Path) -> None:
    """A path with a space and a quote arrives whole."""
    flags("--path")
    package = tmp_path / "it's a folder" / "trtx_py"
    package.parent.mkdir()
    shutil.copytree(ROOT / "trtx_py", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "capi" / "include").mkdir()
    for header in HEADER.parent.iterdir():
        shutil.copy(header, package / "capi" / "include")
    (tmp_path / "program.c").write_text(PROGRAM)
    line = run(
        [sys.executable, "-m", "trtx_py.capi", "--cflags", "--libs"], cwd=package.parent, PYTHONPATH=str(package.parent)
    )
    run(["sh", "-c", f"{tool('gcc')} program.c -o program {line}"], cwd=tmp_path)
    assert execute(tmp_path / "program", PYTHONPATH=str(package.parent)) == EXPECTED


def test_a_comma_in_the_path_does_not_split_the_linkers_option(monkeypatch: pytest.MonkeyPatch) -> None:
    from trtx_py.capi import __main__, _paths

    monkeypatch.setattr(_paths, "library", lambda: "/a,b/libtrtxpy.so")
    assert shlex.split(__main__._libs())[2:] == ["-Xlinker", "-rpath", "-Xlinker", "/a,b"]


def test_each_answer() -> None:
    assert Path(ask("--path").strip()) == LIBRARY
    assert ask("--version").strip() == trtx_py.__version__
    assert (Path(ask("--pkgconfigdir").strip()) / "trtxpy.pc").is_file()
    assert (Path(ask("--cmakedir").strip()) / "trtxpy-config.cmake").is_file()
    assert ask("--cflags", "--libs") == f"{ask('--cflags').strip()} {ask('--libs').strip()}\n"


def test_no_question_is_a_mistake() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trtx_py.capi"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "--cflags, --libs" in done.stderr


def test_a_library_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from trtx_py.capi import __main__, _paths

    monkeypatch.setattr(_paths, "library", lambda: "/nowhere/libtrtxpy.so")
    assert __main__.main(["--libs"]) == 1
    assert "/nowhere/libtrtxpy.so: in a checkout run `bash scripts/build-native`" in capsys.readouterr().err


def test_asking_imports_nothing_heavy() -> None:
    heavy = ("tensorrt", "tensorrt_rtx", "cuda", "onnx", "onnxruntime", "torch", "mock_backend")
    code = (
        "import runpy, sys; sys.argv = ['capi', '--libs']\n"
        "try: runpy.run_module('trtx_py.capi', run_name='__main__')\n"
        f"finally: print([name for name in {heavy!r} if name in sys.modules])"
    )
    flags("--path")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines()[1] == "[]", done.stderr


# pkg-config and CMake


def test_pkg_config(source: Path, tmp_path: Path) -> None:
    environment = {"PKG_CONFIG_PATH": ask("--pkgconfigdir").strip()}
    found = run([tool("pkg-config"), "--cflags", "--libs", "trtxpy"], environment)
    program = tmp_path / "program"
    run([tool("gcc"), str(source), "-o", str(program), *shlex.split(found)])
    assert execute(program) == EXPECTED
    assert run(["pkg-config", "--modversion", "trtxpy"], environment).strip() == abi_version()
    assert run(["pkg-config", "--variable=release", "trtxpy"], environment).strip() == trtx_py.__version__


CMAKE = """
cmake_minimum_required(VERSION 3.18)
project(consumer LANGUAGES C CXX)
find_package(trtxpy {version} REQUIRED)
find_package(trtxpy REQUIRED) # a second time does nothing
add_executable(program program.c)
target_link_libraries(program PRIVATE trtxpy::trtxpy)
"""


def configure(folder: Path, version: str) -> subprocess.CompletedProcess[str]:
    (folder / "CMakeLists.txt").write_text(CMAKE.format(version=version))
    return subprocess.run(
        [tool("cmake"), "-S", str(folder), "-B", str(folder / "build"), f"-Dtrtxpy_DIR={ask('--cmakedir').strip()}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_cmake(source: Path, tmp_path: Path) -> None:
    configured = configure(tmp_path, abi_version())
    assert configured.returncode == 0, configured.stdout + configured.stderr
    run(["cmake", "--build", str(tmp_path / "build")])
    assert execute(tmp_path / "build" / "program") == EXPECTED


@pytest.mark.parametrize("version", ["0.9", "1.99", "2.0"])
def test_cmake_refuses_another_abi(source: Path, tmp_path: Path, version: str) -> None:
    configured = configure(tmp_path, version)
    assert configured.returncode != 0
    assert f"version: {abi_version()}" in configured.stderr


# The library


def dynamic() -> str:
    flags("--path")
    return run([tool("readelf"), "--dynamic", "--wide", str(LIBRARY)])


def test_it_needs_the_c_library_alone() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic())
    assert [name for name in needed if not re.match(r"(libc|libdl|libpthread|ld-linux.*|ld64)\.so\.\d", name)] == []
    assert "libc.so.6" in needed


def test_it_stays_loaded_and_has_its_plain_name() -> None:
    assert re.search(r"\(SONAME\).*\[libtrtxpy\.so\]", dynamic())
    assert re.search(r"\(FLAGS_1\).*NODELETE", dynamic())
    assert not re.search(r"\((RPATH|RUNPATH|TEXTREL)\)", dynamic())


def test_its_stack_is_not_executable() -> None:
    flags("--path")
    segments = run([tool("readelf"), "--program-headers", "--wide", str(LIBRARY)])
    (stack,) = [line for line in segments.splitlines() if "GNU_STACK" in line]
    assert "RWE" not in stack


def test_a_program_for_another_major_version_does_not_start(source: Path, tmp_path: Path) -> None:
    """The soname has no number: the version of the symbols stops it, and says so."""
    tool("gcc")
    (tmp_path / "other").mkdir()
    (tmp_path / "other.c").write_text(
        'const char *trtxpy_version(void) { return "9"; }\nunsigned trtxpy_abi_version(void) { return 9u << 16; }\n'
    )
    (tmp_path / "other.map").write_text("TRTXPY_9 { global: trtxpy_*; local: *; };\n")
    script = f"-Wl,--version-script={tmp_path / 'other.map'}"
    library = tmp_path / "other" / "libtrtxpy.so"
    run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libtrtxpy.so", script, str(tmp_path / "other.c"), "-o", str(library)])
    program = tmp_path / "program"
    run(["gcc", str(source), "-o", str(program), *flags("--cflags"), f"-L{library.parent}", "-ltrtxpy"])
    assert run([str(program)], LD_LIBRARY_PATH=str(library.parent)).startswith("9 9.")
    with pytest.raises(AssertionError, match=r"version `TRTXPY_9' not found"):
        run([str(program)], LD_LIBRARY_PATH=str(LIBRARY.parent))


def test_a_symbol_that_is_not_defined_stops_the_build(tmp_path: Path) -> None:
    """scripts/build-native links with -z defs and --no-undefined-version: half a library is none."""
    script = (ROOT / "scripts" / "build-native").read_text(encoding="utf-8")
    (options,) = re.findall(r'local link="(.*)"', script)
    (tmp_path / "half.c").write_text("int trtxpy_init(void) { return 0; }\n")
    version_map = f"-Wl,--version-script={ROOT / 'capi' / 'library' / 'trtxpy.map'}"
    with pytest.raises(AssertionError, match="trtxpy_submit"):
        run(
            [
                tool("gcc"),
                "-fPIC",
                *shlex.split(options),
                version_map,
                str(tmp_path / "half.c"),
                "-o",
                str(tmp_path / "half"),
            ]
        )


def test_cmake_and_the_script_link_alike() -> None:
    script = (ROOT / "scripts" / "build-native").read_text(encoding="utf-8")
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    (options,) = re.findall(r'local link="(.*)"', script)
    for option in shlex.split(options):
        assert option in cmake or option in ("-shared", "-pthread", "-Wl,-soname,libtrtxpy.so"), option
