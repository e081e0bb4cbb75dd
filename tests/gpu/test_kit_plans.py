"""Damaged plans, and plans of another version: refused before TensorRT sees a byte, on both sides."""

from __future__ import annotations

import pytest

import trtx_py as trtx
from tests.gpu.kit import GpuSide, MockSide, Side, load_kit, run


def flip(blob: bytes, position: int, bit: int = 0) -> bytes:
    changed = bytearray(blob)
    changed[position] ^= 1 << bit
    return bytes(changed)


def refuse(side: Side, blob: bytes) -> None:
    """As bytes, and as nothing that ever reached TensorRT (which on a GPU would end this process)."""
    with side.runtime() as runtime:
        with pytest.raises(trtx.PlanError):
            runtime.deserialize_sync(blob)
        if isinstance(side, MockSide):
            assert side.backend.calls["deserialize"] == 0


def test_bit_flips_anywhere(side: Side) -> None:
    blob = bytes(side.plan("mlp.fp32.vcx"))
    size = len(blob)
    for position in (0, 4, 9, 20, 40, 60, 100, size // 3, size // 2, size - 2, size - 1):
        for bit in (0, 7):
            refuse(side, flip(blob, position, bit))


def test_wrong_lengths(side: Side) -> None:
    blob = bytes(side.plan("mlp.fp32.vcx"))
    for wrong in (b"", blob[:1], blob[:16], blob[: len(blob) // 2], blob[:-1], blob + b"\0", blob + blob):
        refuse(side, wrong)


def test_raw_plans_of_wrong_length(side: Side) -> None:
    """Without our container: cut in half, deserializing would end the process."""
    raw = bytes(side.plan("mlp.fp32.vcx").serialized)
    for wrong in (raw[:8], raw[: len(raw) // 2], raw[:-1], raw + b"\0"):
        refuse(side, wrong)


def test_whole_raw_plan_runs(side: Side) -> None:
    case = side.kit.case("mlp.fp32.vcx")

    async def body() -> None:
        raw = bytes(side.plan("mlp.fp32.vcx").serialized)
        async with side.runtime() as runtime, await runtime.deserialize(raw) as engine:
            assert engine.plan_header.is_raw
            side.kit.check(case, await engine.infer(side.kit.inputs(case)))

    run(body())


@pytest.mark.parametrize("name", ["mlp.fp32.vcx", "static.fp32.vcx"])
def test_plan_of_another_version_names_both(side: Side, name: str) -> None:
    plan = side.plan(name)
    with side.foreign_runtime() as runtime:
        with pytest.raises(trtx.VersionMismatchError) as caught:
            runtime.deserialize_sync(plan)
        assert plan.header.version in f"{caught.value.plan} {caught.value}"
        assert runtime.version in f"{caught.value.runtime} {caught.value}"


@pytest.mark.gpu
def test_native_plan_needs_the_lean_library() -> None:
    """Not version-compatible: runs through the library of its own version, and nowhere else."""
    kit = load_kit()
    if kit is None:
        pytest.skip("no GPU kit here")
    side = GpuSide(kit)
    plan = side.plan("mlp.fp32.native")
    case = kit.case("mlp.fp32.vcx", 1)

    async def body() -> None:
        async with side.runtime() as runtime, await runtime.deserialize(plan) as engine:
            kit.check(case, await engine.infer(kit.inputs(case)))

    run(body())
    with side.foreign_runtime() as runtime, pytest.raises(trtx.VersionMismatchError) as caught:
        runtime.deserialize_sync(plan)
    assert "8.6" in caught.value.plan
    assert "10." in caught.value.runtime


def test_plans_need_no_host_code(side: Side) -> None:
    """Built without the lean runtime inside: allow_host_code stays off everywhere in these tests."""
    plan = side.plan("mlp.fp32.vcx")
    assert not plan.header.host_code
    with side.runtime() as runtime, runtime.deserialize_sync(plan) as engine:
        assert engine.num_layers > 0
        assert engine.device_memory_bytes() >= 0
