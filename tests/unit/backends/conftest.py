from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable

import pytest

KIT = pathlib.Path(os.environ.get("TRTX_GPU_KIT") or "no-kit")


@pytest.fixture(scope="session")
def kit_plans(tmp_path_factory: pytest.TempPathFactory) -> list[pathlib.Path]:
    """Small plans of the GPU kit, unpacked."""
    unpacked = KIT / "engines"
    if unpacked.is_dir():
        return sorted(unpacked.glob("*.engine"))
    archive = KIT / "engines.tar.xz"
    if not archive.is_file():
        pytest.skip("no GPU kit with plans; set TRTX_GPU_KIT")
    import tarfile

    target = tmp_path_factory.mktemp("engines")
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".engine") and member.size < 5_000_000:
                source = tar.extractfile(member)
                assert source is not None
                (target / pathlib.Path(member.name).name).write_bytes(source.read())
    return sorted(target.glob("*.engine"))


@pytest.fixture
def kit_model() -> object:
    """A function that reads a model of the GPU kit by name."""

    def read(name: str) -> bytes:
        path = KIT / "onnx" / f"{name}.onnx"
        if not path.is_file():
            pytest.skip(f"no GPU kit with the model {name}; set TRTX_GPU_KIT")
        return path.read_bytes()

    return read


@pytest.fixture(scope="session")
def make_lean(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A function that compiles a shared library that says it is a lean runtime of some version."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make a shared library with")
    folder = tmp_path_factory.mktemp("lean")

    def make(number: int, symbol: str = "getInferLibVersion") -> str:
        source, library = folder / f"{symbol}{number}.c", folder / f"lib{symbol}{number}.so"
        if not library.exists():
            source.write_text(f"int {symbol}(void) {{ return {number}; }}\n", encoding="ascii")
            subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
        return str(library)

    return make


@pytest.fixture
def lean_library(make_lean: Callable[..., str]) -> Callable[[str], str]:
    """A function that gives a library of the version, such as "8.6.0"."""

    def make(version: str) -> str:
        major, minor, patch = (int(n) for n in version.split("."))
        unit = 10000 if major >= 10 else 1000
        return make_lean(major * unit + minor * 100 + patch)

    return make
