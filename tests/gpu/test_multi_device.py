"""MultiDevice with real plans: on two GPUs where there are two, and on the mock's two devices."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import device_lost, process_lost
from tests.gpu.kit import MockSide, Side, pool_options, run

_LIMIT_S = 240.0


def require_devices(side: Side, count: int) -> None:
    there = trtx.device_count(pool_options(side)["backend"])
    if there < count:
        pytest.skip(f"needs {count} devices, and there are {there}")


def test_every_device_is_described(side: Side) -> None:
    backend = pool_options(side)["backend"]
    count = trtx.device_count(backend)
    assert count >= 1
    found = [trtx.device_properties(device, backend) for device in range(count)]
    assert len({each.uuid for each in found}) == len({each.pci_bus_id for each in found}) == count
    for each in found:
        uuid.UUID(each.uuid.removeprefix("GPU-"))
        with trtx.Device(each.ordinal, backend=_object(side)) as device:
            assert (device.name, device.compute_capability) == (each.name, each.compute_capability)
            assert device.total_bytes == each.total_bytes
    if not isinstance(side, MockSide):
        query = ["nvidia-smi", "--query-gpu=uuid,pci.bus_id", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.lower()
        for each in found:
            assert each.uuid.lower() in listed
            assert each.pci_bus_id.lower() in listed


def _object(side: Side) -> Any:
    return pool_options(side)["backend"]


@pytest.mark.parametrize("strategy", ["round_robin", "least_loaded"])
@pytest.mark.parametrize("engine", ["mlp.fp32.vcx", "mnist_cnn.fp16.vcx"])
def test_two_devices_give_what_one_gives(side: Side, engine: str, strategy: str) -> None:
    require_devices(side, 2)
    case = side.kit.case(engine)
    inputs = side.kit.inputs(case)

    async def main() -> None:
        opening = trtx.MultiDevice.open(side.plan(engine), [0, 1], strategy=strategy, lanes=2, **pool_options(side))
        async with await opening as pool:
            await pool.warmup(2)
            for outputs in await asyncio.gather(*(pool.infer(inputs) for _ in range(64))):
                side.kit.check(case, outputs)
            assert all(device.completed > 0 for device in pool.statistics().devices)

    run(main())


def test_rows_come_back_in_order(side: Side) -> None:
    require_devices(side, 2)
    rows = np.random.default_rng(5).standard_normal((1000, 64)).astype(np.float32)

    async def main() -> None:
        plan = side.plan("mlp.fp32.vcx")
        async with await trtx.MultiDevice.open(plan, [0, 1], lanes=2, **pool_options(side)) as pool:
            together = await pool.infer_many({"x": rows}, chunk_rows=24)
            assert min(device.completed for device in pool.statistics().devices) > 0
        async with await trtx.MultiDevice.open(plan, [1], **pool_options(side)) as alone:
            one = await alone.infer_many({"x": rows}, chunk_rows=250)
        for name, array in one.items():
            error = np.linalg.norm(together[name] - array) / np.linalg.norm(array)
            assert error < 0.005, f"{name}: {error:.2e}"

    run(main())


def test_batched_on_two_devices(side: Side) -> None:
    require_devices(side, 2)
    rows = np.random.default_rng(6).standard_normal((200, 64)).astype(np.float32)

    async def main() -> None:
        plan = side.plan("mlp.fp32.vcx")
        opening = trtx.MultiDevice.open(plan, [0, 1], batching={"batch_axis": 0}, **pool_options(side))
        async with await opening as pool:
            answers = await asyncio.gather(*(pool.infer({"x": rows[n : n + 1]}) for n in range(len(rows))))
            whole = await pool.infer_many({"x": rows})
        for name, array in whole.items():
            each = np.concatenate([answer[name] for answer in answers])
            assert np.linalg.norm(each - array) / np.linalg.norm(array) < 0.005

    run(main())


def test_a_kernel_that_faults_breaks_the_process(side: Side, record: Callable[..., None]) -> None:
    """In a process of its own. Every device is refused then, at once and typed, and closing still works."""
    require_devices(side, 2)
    if isinstance(side, MockSide):
        run(_lose_on_mock(side))
        return
    arguments = [sys.executable, "-m", "tests.gpu.lost_device"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=_LIMIT_S)
    print(done.stdout, done.stderr[-4000:])
    found = json.loads(done.stdout.splitlines()[-1])
    record("a kernel that faults", **found)
    assert done.returncode == 0
    assert found["status"] == 700
    assert found["answered"] + found["refused"] == 8
    if found["answered"]:  # a driver that contains it
        assert found["outcome"][0] == "serving"
    else:
        assert found["outcome"] == ["lost", "lost"]
        assert "700" in found["error"]


async def _lose_on_mock(side: MockSide) -> None:
    """The same, and a device that fails alone, which comes back."""
    case = side.kit.case("mlp.fp32.vcx")
    inputs = side.kit.inputs(case)
    policy = trtx.RecoveryPolicy(initial_s=0.0, attempts=1)
    opening = trtx.MultiDevice.open(
        side.plan("mlp.fp32.vcx"), [0, 1], strategy="round_robin", recovery=policy, **pool_options(side)
    )
    async with await opening as pool:
        await pool.warmup(2)
        side.backend.inject(device_lost(call="cuGraphLaunch", device=1))
        for _ in range(8):
            side.kit.check(case, await pool.infer(inputs))
        while pool.statistics().devices[1].state != "serving":  # noqa: ASYNC110 - nothing tells when
            await asyncio.sleep(0.001)
        await pool.warmup(2)
        side.backend.inject(process_lost(device=1))
        outcomes = [await asyncio.gather(pool.infer(inputs), return_exceptions=True) for _ in range(8)]
        kinds = [type(outcome) for (outcome,) in outcomes]
        assert kinds.count(trtx.DeviceLostError) <= 2  # what ran on each device
        assert kinds[-1] is trtx.NoDeviceError
        while [device.state for device in pool.statistics().devices] != ["lost", "lost"]:  # noqa: ASYNC110 - nothing tells when
            await asyncio.sleep(0.001)
