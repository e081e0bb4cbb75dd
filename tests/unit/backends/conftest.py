from __future__ import annotations

import os
import pathlib

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
