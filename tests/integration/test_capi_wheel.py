"""The wheel carries libtrtxpy with its headers, pkg-config and CMake files, and works wherever it is unpacked."""

from __future__ import annotations

import shlex
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

import trtx_py
from tests.unit.capi.programs import DIGITS, ROOT, execute, run, tool
from tests.unit.capi.test_abi import abi

pytestmark = pytest.mark.slow  # it needs a package index, for scikit-build-core


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy without what scripts/build-native leaves in a checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    leave_out = shutil.ignore_patterns(".*", "build", "*.so", "__pycache__", "shared", "target")
    shutil.copytree(ROOT, folder / "copy", ignore=leave_out)
    for stale in ("cmake", "pkgconfig"):
        shutil.rmtree(folder / "copy" / "trtx_py" / "capi" / stale, ignore_errors=True)
    shutil.copy(ROOT / ".gitignore", folder / "copy")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps"]
    run([*command, str(folder / "copy"), "--wheel-dir", str(folder)], timeout=600)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture
def site(wheel: Path, tmp_path: Path) -> Path:
    """Unpacked somewhere, then moved: nothing in it may know where it was."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "first")
    return (tmp_path / "first").rename(tmp_path / "a site")


def ask(site: Path, *options: str) -> str:
    return run([sys.executable, "-m", "trtx_py.capi", *options], cwd=site.parent, PYTHONPATH=str(site)).strip()


def test_what_it_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("trtx_py/capi/") and not name.endswith(".py")}
    assert names == {
        "trtx_py/capi/cmake/trtxpy-config-version.cmake",
        "trtx_py/capi/cmake/trtxpy-config.cmake",
        "trtx_py/capi/include/trtxpy.h",
        "trtx_py/capi/include/trtxpy.hpp",
        "trtx_py/capi/libtrtxpy.so",
        "trtx_py/capi/pkgconfig/trtxpy.pc",
    }


def test_the_library_is_the_one_of_a_checkout(site: Path) -> None:
    library = site / "trtx_py" / "capi" / "libtrtxpy.so"
    assert Path(ask(site, "--path")) == library
    assert abi.library_faults(abi.read(), library) == []
    dynamic = run(["readelf", "--dynamic", "--wide", str(library)])
    for expected in ("[libtrtxpy.so]", "NODELETE"):
        assert expected in dynamic
    for forbidden in ("RPATH", "RUNPATH", "libpython", "libcuda", "libm.so"):
        assert forbidden not in dynamic


def build_and_run(site: Path, *found: str) -> None:
    program = site.parent / "classify"
    run([tool("gcc"), str(ROOT / "examples" / "c" / "classify.c"), "-o", str(program), *found, "-pthread"])
    assert "dispatch: 0" in execute(program, str(DIGITS), cwd=site.parent, PYTHONPATH=str(site))


def test_by_its_own_flags(site: Path) -> None:
    found = shlex.split(ask(site, "--cflags", "--libs"))
    assert found[0] == f"-I{site / 'trtx_py' / 'capi' / 'include'}"
    build_and_run(site, *found)


def test_by_pkg_config(site: Path) -> None:
    folder = ask(site, "--pkgconfigdir")
    found = run([tool("pkg-config"), "--cflags", "--libs", "trtxpy"], PKG_CONFIG_PATH=folder)
    assert run(["pkg-config", "--variable=release", "trtxpy"], PKG_CONFIG_PATH=folder).strip() == trtx_py.__version__
    build_and_run(site, *shlex.split(found))


def test_by_cmake(site: Path, tmp_path: Path) -> None:
    consumer = tmp_path / "consumer"
    consumer.mkdir()
    (consumer / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\n"
        "project(consumer LANGUAGES CXX)\n"
        "find_package(trtxpy 1.0 REQUIRED)\n"
        "set(THREADS_PREFER_PTHREAD_FLAG ON)\n"
        "find_package(Threads REQUIRED)\n"
        f"add_executable(classify {ROOT / 'examples' / 'c' / 'classify.cpp'})\n"
        "target_link_libraries(classify PRIVATE trtxpy::trtxpy Threads::Threads)\n"
    )
    folder = ask(site, "--cmakedir")
    run([tool("cmake"), "-S", str(consumer), "-B", str(consumer / "build"), f"-DCMAKE_PREFIX_PATH={folder}"])
    run(["cmake", "--build", str(consumer / "build")])
    printed = execute(consumer / "build" / "classify", str(DIGITS), cwd=tmp_path, PYTHONPATH=str(site))
    assert "future: 0" in printed
