from __future__ import annotations

import pathlib
import struct
import sys

import numpy as np
import pytest

from tests.unit.backends.fake_vendor import make_plan
from trtx_py._errors import PlanError
from trtx_py.backends._raw_plan import find_host_code, read_raw_plan_header


@pytest.mark.parametrize(
    ("magic", "flavour"),
    [(b"ftrt", "tensorrt"), (b"ptrt", "tensorrt"), (b"vtrt", "tensorrt_rtx"), (b"mtrt", "mock")],
)
def test_reads_header(magic: bytes, flavour: str) -> None:
    plan = make_plan(magic, (10, 3, 0, 26), b"body")
    header = read_raw_plan_header(memoryview(plan))
    assert (header.magic, header.flavour, header.version, header.length) == (magic, flavour, "10.3.0.26", 36)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "0 bytes"),
        (make_plan()[:31], "31 bytes"),
        (make_plan(body=b"0123456789")[:-1], "cut off: 41 bytes are here, its header says 42"),
        (make_plan() + b"\n", "1 bytes follow"),
        (make_plan(b"Ftrt"), "no TensorRT plan"),
        (b"\x08\x08\x12\x07pytorch" + bytes(64), "ONNX model"),
        (b"PK\x03\x04" + bytes(64), "zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (make_plan()[:16] + struct.pack("<Q", 3) + make_plan()[24:], "length of 3 bytes"),
    ],
)
def test_refuses_what_is_no_whole_plan(data: bytes, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        read_raw_plan_header(data)


def elf(machine: int, *, data: int = 1) -> bytes:
    order = "<" if data == 1 else ">"
    return b"\x7fELF\x02" + bytes([data, 1]) + bytes(9) + struct.pack(order + "HHI", 3, machine, 1) + bytes(64)


def pe(machine: int) -> bytes:
    return b"MZ" + bytes(58) + struct.pack("<I", 128) + bytes(64) + b"PE\0\0" + struct.pack("<H", machine) + bytes(32)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (elf(62), "x86-64"),
        (elf(183), "AArch64"),
        (elf(183, data=2), "AArch64"),
        (elf(190), None),
        (elf(190) + elf(62), "x86-64"),
        (pe(0x8664), "x86-64"),
        (pe(0x1234), None),
        (b"MZ" + bytes(80), None),
        (b"\x7fELF", None),
        (b"MZ", None),
    ],
)
def test_find_host_code(image: bytes, found: str | None) -> None:
    data = make_plan(body=b"weights" * 5 + image)
    answer = find_host_code(memoryview(data))
    assert (answer is None) if found is None else (answer is not None and found in answer)


def test_names_the_place() -> None:
    assert find_host_code(b"12345" + elf(62)) == "an ELF image for x86-64 at byte 5"


def test_random_weights_are_not_code() -> None:
    assert find_host_code(np.random.default_rng(0).bytes(20_000_000)) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the interpreter is an ELF file on Linux")
def test_finds_a_real_program() -> None:
    assert find_host_code(pathlib.Path(sys.executable).resolve().read_bytes()) is not None


@pytest.mark.models
def test_real_plans(kit_plans: list[pathlib.Path]) -> None:
    for path in kit_plans:
        content = path.read_bytes()
        header = read_raw_plan_header(content)
        assert (header.flavour, header.version, header.length) == ("tensorrt", "8.6.0.12", path.stat().st_size)
        assert find_host_code(content) is None
        with pytest.raises(PlanError, match="cut off"):
            read_raw_plan_header(content[: len(content) // 2])
