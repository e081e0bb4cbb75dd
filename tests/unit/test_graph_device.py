"""What capturing and replaying ask of the device: nothing new once warm, and one clear answer when it goes away."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, device_lost
from tests.unit.serving import PATIENCE_S, affine, rows, serving

ROOT = Path(__file__).resolve().parents[2]
X3 = {"x": (3, 4)}
#: What asks something of the device, or of TensorRT on it.
CAPTURING = (
    "device_memory_bytes create_context set_device_memory set_input_shape set_tensor_address get_tensor_shape "
    "execute_async_v3 cuMemAlloc cuMemHostAlloc cuMemcpyHtoDAsync cuMemcpyDtoHAsync cuMemsetD8Async cuStreamCreate "
    "cuStreamSynchronize cuEventCreate cuStreamBeginCapture cuStreamEndCapture cuGraphInstantiate cuGraphGetNodes "
    "cuGraphLaunch cuGraphDestroy execute"
).split()
REPLAYING = ["cuGraphLaunch", "cuEventRecord", "cuEventQuery", "execute"]


async def by_slot(engine: trtx.Engine) -> None:
    async with engine.alloc_inputs(X3) as slot:
        await slot.infer()


async def by_infer(engine: trtx.Engine) -> None:
    await engine.infer({"x": rows(3)})


async def by_thread(engine: trtx.Engine) -> None:
    await asyncio.to_thread(engine.infer_sync, {"x": rows(3)}, timeout_s=PATIENCE_S)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


@pytest.mark.parametrize(
    ("call", "is_captured"), [*((call, False) for call in CAPTURING), *((call, True) for call in REPLAYING)]
)
async def test_the_device_may_go_away_in_any_call(call: str, is_captured: bool) -> None:
    backend = MockBackend(compute=False)
    async with serving(backend, slots=3) as engine:
        if is_captured:
            await by_slot(engine)
        backend.inject(device_lost(call=call))
        errors: list[trtx.TrtxError] = []
        for way in (by_slot, by_infer, by_thread, by_slot):
            with pytest.raises(trtx.TrtxError) as caught:
                await way(engine)
            errors.append(caught.value)
        assert all("is dead" in str(error) for error in errors[1:]), errors
        for error in errors if call.startswith("cu") else errors[1:]:  # TensorRT says only that it failed
            assert any(isinstance(e, trtx.CudaError) and e.code == 719 for e in chain(error)), error
    assert trtx.live_objects() == []
    assert backend.leaks() == []
    backend.close()


@pytest.mark.parametrize("completion", ["latency", "balanced", "efficient"])
@pytest.mark.parametrize("lanes", [1, 2])
async def test_after_warmup_nothing_is_allocated_or_created(
    mock_backend: MockBackend, lanes: int, completion: str
) -> None:
    async with serving(mock_backend, lanes=lanes, completion=completion) as engine:
        await engine.warmup(1)
        before, statistics = mock_backend.calls, engine.statistics()
        for seed in range(10):
            assert np.array_equal((await engine.infer({"x": rows(2, seed)}))["y"], affine(rows(2, seed)))
        for _ in range(5):
            engine.infer_sync({"x": rows(2)})
        results: list[Any] = await asyncio.gather(*[engine.infer({"x": rows(2, seed)}) for seed in range(50)])
        for seed, result in enumerate(results):
            assert np.array_equal(result["y"], affine(rows(2, seed)))
        used, after = mock_backend.calls - before, engine.statistics()
    looking = "cuCtxPushCurrent cuCtxPopCurrent cuCtxGetCurrent cuEventQuery cuThreadExchangeStreamCaptureMode"
    assert used.keys() <= {"cuGraphLaunch", "execute", "cuEventRecord", *looking.split()}
    assert used["cuGraphLaunch"] == used["execute"] == used["cuEventRecord"] == 65
    assert after.device_memory == statistics.device_memory
    assert after.pinned_memory == statistics.pinned_memory
    assert (after.graphs.hits - statistics.graphs.hits, after.contexts) == (65, statistics.contexts)


RECORD_FAILS = """
import asyncio
import numpy as np
import trtx_py as trtx
from mock_backend import MockBackend, fail
from tests.unit.serving import affine, rows, serving

async def main():
    backend = MockBackend()
    async with serving(backend) as engine:
        async with engine.alloc_inputs({"x": (3, 4)}) as slot:
            backend.inject(fail("cuEventRecord"))
            try:
                await slot.infer()
            except trtx.CudaError as error:
                print(error.code)
            slot["x"][...] = rows(3)
            assert np.array_equal((await slot.infer())["y"], affine(rows(3)))
    backend.assert_clean()

asyncio.run(main())
"""


def test_work_that_cannot_be_watched_does_not_hold_the_interpreter() -> None:
    """The event behind a graph cannot be recorded, so its end is waited for: other threads must run meanwhile."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", RECORD_FAILS], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pytest.fail("it waits for a kernel that needs the interpreter lock, and holds that lock")
    assert (done.stdout, done.stderr) == ("304\n", "")
