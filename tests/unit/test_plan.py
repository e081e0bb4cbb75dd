"""Plans: a damaged file never becomes a plan, and a saved one is always whole."""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import msgpack
import pytest

import trtx_py as trtx
from tests.unit.ownership import build_plan, matmul_model, shared_plan
from trtx_py import _plan as plan_module

HEADER_AT = 56


@pytest.fixture(scope="module")
def plan() -> trtx.Plan:
    return shared_plan()


def repack(prefix_version: int = 1, header: bytes = b"\x80", body: bytes = b"body") -> bytes:
    """A container with any content and a checksum that is right."""
    prefix = struct.pack("<8sIIQ", b"TRTXPLAN", prefix_version, len(header), len(body))
    return prefix + hashlib.sha256(prefix + header + body).digest() + header + body


def header_map(plan: trtx.Plan) -> dict[str, Any]:
    length = struct.unpack_from("<I", plan, 12)[0]
    return msgpack.unpackb(plan[HEADER_AT : HEADER_AT + length])


def test_header_says_what_it_is(plan: trtx.Plan) -> None:
    header = plan.header
    assert (header.flavour, header.version, header.compute_capabilities) == ("mock", "1.0.0.0", ("8.9",))
    assert [(t.name, t.mode.value, t.shape) for t in header.io_tensors] == [
        ("x", "input", (-1, 4)), ("y", "output", (-1, 3)),
    ]  # fmt: skip
    assert header.io_tensors[0].ranges == (trtx.ShapeRange((1, 4), (2, 4), (8, 4)),)
    assert header.onnx_sha256 == hashlib.sha256(matmul_model()).hexdigest()
    assert header.build_options["profile_sharing"] is True
    assert not header.is_raw
    assert not plan.is_raw
    assert repr(plan) == f"Plan(mock 1.0.0.0, {len(plan.serialized)} bytes)"


def test_container_layout_is_as_documented(plan: trtx.Plan) -> None:
    magic, version, header_length, body_length, digest = struct.unpack_from("<8sIIQ32s", plan)
    assert (magic, version) == (b"TRTXPLAN", 1)
    assert len(plan) == HEADER_AT + header_length + body_length
    assert bytes(plan.serialized) == plan[HEADER_AT + header_length :]
    assert digest == hashlib.sha256(plan[:24] + plan[HEADER_AT:]).digest()
    assert plan.sha256 == digest.hex()


def test_bytes_likeness_and_copies(plan: trtx.Plan, tmp_path: Path) -> None:
    assert isinstance(plan, bytes)
    for twin in (
        trtx.Plan(bytes(plan)), trtx.Plan(bytearray(plan)), trtx.Plan(memoryview(plan)), trtx.Plan.load(bytes(plan)),
        pickle.loads(pickle.dumps(plan)), copy.copy(plan), copy.deepcopy(plan),
    ):  # fmt: skip
        assert type(twin) is trtx.Plan
        assert twin == plan
        assert hash(twin) == hash(plan)
        assert twin.header == plan.header
    assert trtx.Plan.load(plan) is plan
    path = tmp_path / "by-hand.plan"
    path.write_bytes(plan)
    assert trtx.Plan.load(path) == trtx.Plan.load(str(path)) == plan
    view = plan.serialized
    assert view.readonly


def test_every_bit_flip_in_prefix_and_header_is_refused(plan: trtx.Plan) -> None:
    end = HEADER_AT + struct.unpack_from("<I", plan, 12)[0]
    for position in range(end):
        damaged = bytearray(plan)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(trtx.PlanError):
            trtx.Plan(damaged)


def test_every_byte_of_the_plan_itself_is_covered(plan: trtx.Plan) -> None:
    start = HEADER_AT + struct.unpack_from("<I", plan, 12)[0]
    for position in range(start, len(plan)):
        damaged = bytearray(plan)
        damaged[position] ^= 0xFF
        with pytest.raises(trtx.PlanError, match="SHA-256 does not match"):
            trtx.Plan(damaged)


def test_truncation_and_trailing_bytes(plan: trtx.Plan) -> None:
    lengths = [*range(70), *random.Random(1).sample(range(70, len(plan)), 200), len(plan) - 1]
    for length in lengths:
        with pytest.raises(trtx.PlanError):
            trtx.Plan(plan[:length])
    for extra in (b"\0", b"x" * 1000, bytes(plan)):
        with pytest.raises(trtx.PlanError, match="followed by other bytes"):
            trtx.Plan(bytes(plan) + extra)
    with pytest.raises(trtx.PlanError, match="truncated"):
        trtx.Plan(plan[:-1])


def test_other_formats(plan: trtx.Plan) -> None:
    with pytest.raises(trtx.PlanError, match="format 2, this trtx_py reads format 1"):
        trtx.Plan(repack(2))
    huge = b"TRTXPLAN" + struct.pack("<IIQ32s", 1, (16 << 20) + 1, 0, bytes(32))
    with pytest.raises(trtx.PlanError, match="truncated"):
        trtx.Plan(huge)
    with pytest.raises(trtx.PlanError):
        trtx.Plan(huge + bytes((16 << 20) + 1))
    with pytest.raises(trtx.PlanError):
        trtx.Plan(b"TRTXPLAN" + struct.pack("<IIQ32s", 1, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, bytes(32)))


INSIDE_OUT = {
    "not msgpack": b"\xc1",
    "two objects": b"\x80\x80",
    "a list": msgpack.packb([1, 2]),
    "an empty map": b"\x80",
    "bytes as keys": msgpack.packb({b"flavour": 1}),
    "too deep": b"\x91" * 2000 + b"\x90",
    "not utf-8": b"\x81\xa1\xff\x01",
}


@pytest.mark.parametrize("header", INSIDE_OUT.values(), ids=INSIDE_OUT.keys())
def test_header_with_a_right_checksum_and_wrong_content(header: bytes) -> None:
    with pytest.raises(trtx.PlanError, match="cannot be understood"):
        trtx.Plan(repack(header=header))


def test_header_fields_of_wrong_types(plan: trtx.Plan) -> None:
    good = header_map(plan)
    tensor = good["io_tensors"][0]
    trtx.Plan(repack(header=msgpack.packb(good), body=b"x"))
    broken: list[Any] = [1, [1], [{}], None, "abc"]
    changes: list[dict[str, Any]] = [{"io_tensors": value} for value in broken]
    broken = [1, "abc", [1]]
    changes += [{"build_options": value} for value in broken]
    changes += [{"compute_capabilities": value} for value in (1, None)]
    wrong: dict[str, list[Any]] = {
        "mode": ["sideways", 1], "dtype": ["float63", None], "location": ["moon"],
        "shape": [1, ["a"], [float("inf")], [float("nan")], [None]],
        "ranges": [1, [1], [[1]], [[[1], [2]]], [[[1], [2], [float("inf")]]], [[[1]] * 4]],
    }  # fmt: skip
    for key, values in wrong.items():
        changes += [{"io_tensors": [{**tensor, key: value}]} for value in values]
    for change in changes:
        with pytest.raises(trtx.PlanError, match="cannot be understood"):
            trtx.Plan(repack(header=msgpack.packb({**good, **change})))
    for key in good:
        with pytest.raises(trtx.PlanError):
            trtx.Plan(repack(header=msgpack.packb({k: v for k, v in good.items() if k != key})))


def test_raw_plans(plan: trtx.Plan, tmp_path: Path) -> None:
    raw = bytes(plan.serialized)
    loaded = trtx.Plan(raw)
    assert loaded.is_raw
    assert loaded.header.flavour == "mock"
    assert bytes(loaded.serialized) == raw
    path = tmp_path / "raw.engine"
    path.write_bytes(raw)
    assert trtx.Plan.load(path) == loaded
    again = trtx.Plan(bytes(loaded))  # in its container it is verified from now on, and still known as raw
    assert again.is_raw
    for damaged in (raw[:-1], raw + b"\0", raw[:20]):
        with pytest.raises(trtx.PlanError):
            trtx.Plan(damaged)


@pytest.mark.parametrize("blob", [b"", b"x", b"\x08\x07\x12\x04onnx", b"PK\x03\x04" * 50, bytes(1000)])
def test_what_is_no_plan(blob: bytes, tmp_path: Path) -> None:
    path = tmp_path / "thing.plan"
    path.write_bytes(blob)
    with pytest.raises(trtx.PlanError):
        trtx.Plan(blob)
    with pytest.raises(trtx.PlanError, match=r"thing\.plan"):
        trtx.Plan.load(path)


@pytest.mark.parametrize("thing", [None, 5, "path.plan", ["x"]])
def test_what_is_not_even_bytes(thing: Any) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="expected bytes"):
        trtx.Plan(thing)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.plan", tmp_path):
        with pytest.raises(trtx.InvalidArgumentError, match="cannot be read"):
            trtx.Plan.load(path)
    for thing in (None, 5, "nul\0byte", "surrogate\ud800", ["x"]):
        with pytest.raises(trtx.InvalidArgumentError, match="path"):
            trtx.Plan.load(thing)  # type: ignore[arg-type]


def test_save_and_load(plan: trtx.Plan, tmp_path: Path) -> None:
    path = tmp_path / "model.plan"
    old = os.umask(0o077)
    try:
        plan.save(path)
        plan.save(str(path))  # replaces
    finally:
        os.umask(old)
    assert path.read_bytes() == plan
    assert path.stat().st_mode & 0o777 == 0o600  # as the umask says
    assert trtx.Plan.load(path).header == plan.header
    assert os.listdir(tmp_path) == ["model.plan"]


def test_save_where_it_cannot_be(plan: trtx.Plan, tmp_path: Path) -> None:
    taken = tmp_path / "folder"
    taken.mkdir()
    for path in (tmp_path / "missing" / "x.plan", taken, Path("/proc/x.plan")):
        with pytest.raises(trtx.InvalidArgumentError, match="nothing was written"):
            plan.save(path)
    assert os.listdir(tmp_path) == ["folder"]
    with pytest.raises(trtx.InvalidArgumentError, match="null character"):
        plan.save("nul\0byte")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_save_into_a_read_only_folder(plan: trtx.Plan, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(trtx.InvalidArgumentError, match="Permission denied"):
        plan.save(tmp_path / "x.plan")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_failure_in_the_middle_leaves_the_old_file(
    where: str, plan: trtx.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.plan"
    path.write_bytes(b"old")

    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, where, no_space)
    with pytest.raises(trtx.InvalidArgumentError, match="No space left on device"):
        plan.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.plan"]


def test_interrupted_save_leaves_nothing(plan: trtx.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        plan.save(tmp_path / "x.plan")
    assert os.listdir(tmp_path) == []


def test_looks_like_plan(plan: trtx.Plan) -> None:
    assert plan_module.looks_like_plan(plan[:16])
    assert plan_module.looks_like_plan(bytes(plan.serialized[:16]))
    assert not plan_module.looks_like_plan(matmul_model())
    assert not plan_module.looks_like_plan(b"")


def test_same_model_same_options_same_header() -> None:
    assert build_plan().header == build_plan().header


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("flavour", [None, 5]),
        ("version", ["x.y", None, 5, "", "9" * 5000, "1." + "2" * 5000, "1.2\n"]),
        ("compute_capabilities", [None, "8.9", [8.9], ["x"], ["8.9."], {}, [None]]),
        ("precision", [5, {"a": 1}, ["fp16"]]),
        ("onnx_sha256", [None, 5]),
        ("build_options", [None, 5, [1], [["a", 1]]]),
        ("version_compatible", ["x", 5]),
        ("host_code", ["x", []]),
        ("is_raw", ["x", None, 1]),
    ],
)
def test_forged_header(field: str, values: list[Any], plan: trtx.Plan) -> None:
    """The checksum proves that nothing was damaged, not who wrote it."""
    for value in values:
        with pytest.raises(trtx.PlanError, match="cannot be understood") as caught:
            trtx.Plan(repack(header=msgpack.packb({**header_map(plan), field: value})))
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("name", [None, 5, ["x"]]),
        ("is_shape_tensor", [0, "yes", None]),
        ("shape", [[1.5], [True], ["1"], [-2], [2**63]]),
        ("ranges", [[[[1], [1], [1.5]]], [[[1], [1], [1, 2]]], ["abc"], [[["1"], ["1"], ["1"]]]]),
    ],
)
def test_forged_tensor(field: str, values: list[Any], plan: trtx.Plan) -> None:
    good = header_map(plan)
    for value in values:
        tensors = [{**good["io_tensors"][0], field: value}]
        with pytest.raises(trtx.PlanError, match="cannot be understood"):
            trtx.Plan(repack(header=msgpack.packb({**good, "io_tensors": tensors})))


def test_header_is_a_value(plan: trtx.Plan) -> None:
    header = plan.header
    with pytest.raises(TypeError):
        header.build_options["workspace_bytes"] = 1  # type: ignore[index]
    assert len({header, trtx.Plan(bytes(plan)).header}) == 1
    for twin in (copy.copy(header), copy.deepcopy(header), pickle.loads(pickle.dumps(header))):
        assert twin == header
        assert hash(twin) == hash(header)
