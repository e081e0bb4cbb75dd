"""Runtime: which plans become engines, and what happens to the others."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest

import trtx_py as trtx
from mock_backend import MockBackend, fail, out_of_memory
from tests.unit.ownership import SAMPLE, build_plan, matmul_model, shared_plan


async def test_all_forms_of_a_plan(mock_backend: MockBackend, tmp_path: Path) -> None:
    plan = shared_plan()
    plan.save(tmp_path / "m.plan")
    with trtx.Runtime(None, mock_backend) as runtime:
        in_memory: list[Any] = [plan, bytes(plan), bytearray(plan), memoryview(plan), bytes(plan.serialized)]
        for form in (*in_memory, tmp_path / "m.plan", str(tmp_path / "m.plan")):
            async with await runtime.deserialize(form) as engine:
                assert (await engine.infer({"x": SAMPLE}))["y"].shape == (2, 3)
        assert runtime.version == "1.0.0.0"
        assert runtime.backend.name == "mock"
        assert runtime.device.name == "Mock GPU 0"


def test_plans_that_do_not_fit(mock_backend: MockBackend) -> None:
    with trtx.Runtime(None, mock_backend) as runtime:
        cases = [
            (MockBackend(version="2.0.0.0"), "mock 2.0.0.0", "mock 1.0.0.0"),
            (MockBackend(flavour="other"), "other 1.0.0.0", "mock 1.0.0.0"),
            (MockBackend(compute_capability="9.0"), "compute capability 9.0", "compute capability 8.9"),
        ]
        for backend, built, here in cases:
            with pytest.raises(trtx.VersionMismatchError) as caught:
                runtime.deserialize_sync(build_plan(backend))
            assert (caught.value.plan, caught.value.runtime) == (built, here)
        assert mock_backend.calls["deserialize"] == 0  # TensorRT never saw any of them


def test_what_never_reaches_tensorrt(mock_backend: MockBackend, tmp_path: Path) -> None:
    plan = shared_plan()
    damaged = bytearray(plan)
    damaged[len(damaged) // 2] ^= 1
    with trtx.Runtime(None, mock_backend) as runtime:
        for thing in (b"", b"x" * 100, matmul_model(), plan[:-1], bytes(plan) + b"\0", damaged, plan.serialized[:-5]):
            with pytest.raises(trtx.PlanError):
                runtime.deserialize_sync(thing)
        for path in (tmp_path / "missing", tmp_path):
            with pytest.raises(trtx.InvalidArgumentError):
                runtime.deserialize_sync(path)
        nothing: Any
        for nothing in (None, 5, object()):
            with pytest.raises(trtx.InvalidArgumentError):
                runtime.deserialize_sync(nothing)
    assert mock_backend.calls["deserialize"] == 0


def test_host_code_must_be_allowed(mock_backend: MockBackend) -> None:
    plan = shared_plan()
    carrying = trtx.Plan.seal(plan.serialized, dataclasses.replace(plan.header, host_code=True))
    with trtx.Runtime(None, mock_backend) as runtime, pytest.raises(trtx.PlanError, match="allow_host_code=True"):
        runtime.deserialize_sync(carrying)
    with trtx.Runtime(None, mock_backend, allow_host_code=True) as runtime:
        runtime.deserialize_sync(carrying).close()


@pytest.mark.parametrize("options", [{"lanes": 0}, {"lanes": 65}, {"lanes": 1.5}, {"noncontiguous": "ignore"}])
async def test_bad_options(options: dict[str, Any], mock_backend: MockBackend) -> None:
    with trtx.Runtime(None, mock_backend) as runtime:
        with pytest.raises(trtx.InvalidArgumentError):
            runtime.deserialize_sync(shared_plan(), **options)
        with pytest.raises(trtx.InvalidArgumentError):
            await runtime.deserialize(shared_plan(), **options)


@pytest.mark.parametrize("fault", [fail("deserialize"), fail("cuCtxPushCurrent", 2)])
def test_failed_deserialize_leaves_nothing(fault: Any) -> None:
    backend = MockBackend(faults=[fault])
    with trtx.Runtime(None, backend) as runtime:
        with pytest.raises(trtx.TrtxError):
            runtime.deserialize_sync(shared_plan())
        assert [item.kind for item in trtx.live_objects()] == ["Runtime", "Device"]
    backend.assert_clean()


def test_weights_that_do_not_fit_the_device() -> None:
    backend = MockBackend(memory_bytes=128)
    with trtx.Runtime(None, backend) as runtime:
        with pytest.raises(trtx.EngineError) as caught:
            runtime.deserialize_sync(shared_plan())
        assert "256 bytes" in str(caught.value)
        assert len(trtx.live_objects()) == 2
    backend.assert_clean()


async def test_cancelled_deserialize_leaves_nothing(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    with trtx.Runtime(None, mock_backend) as runtime:
        entered, go_on = threading.Event(), threading.Event()
        deserialize = runtime._native.deserialize

        def held(plan: Any) -> Any:
            entered.set()
            assert go_on.wait(30)
            return deserialize(plan)

        monkeypatch.setattr(runtime._native, "deserialize", held)
        task = asyncio.create_task(runtime.deserialize(shared_plan()))
        assert await asyncio.to_thread(entered.wait, 30)
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        with pytest.raises(trtx.BorrowedError, match="deserialize"):
            runtime.close()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [item.kind for item in trtx.live_objects()] == ["Runtime", "Device"]


def test_several_runtimes_and_engines_side_by_side(mock_backend_factory: Any) -> None:
    backend = mock_backend_factory(devices=2)
    one, two = (trtx.Runtime(None, backend, device=number) for number in range(2))
    with one, two:  # noqa: SIM117 - two levels, two lines
        with one.deserialize_sync(shared_plan()) as a, two.deserialize_sync(shared_plan()) as b:
            first, second = a.infer_sync({"x": SAMPLE}), b.infer_sync({"x": SAMPLE})
            assert (first["y"] == second["y"]).all()
            assert a.runtime is one
            with pytest.raises(trtx.BorrowedError):
                one.close()


def test_lean_library_is_refused_by_what_has_none(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(trtx.BackendUnavailableError, match="lean"):
        trtx.Runtime(None, mock_backend, lean_library="/lib/lean.so")
    monkeypatch.setenv("TRTX_LEAN_LIBRARY", "/lib/other.so")
    trtx.Runtime(None, mock_backend).close()  # the variable is for flavours that load one
    assert trtx.live_objects() == []


def test_out_of_memory_for_buffers_is_typed() -> None:
    backend = MockBackend(faults=[out_of_memory()])
    with trtx.Runtime(None, backend) as runtime, runtime.deserialize_sync(shared_plan()) as engine:
        with pytest.raises(trtx.CudaError) as caught:
            engine.infer_sync({"x": SAMPLE})
        assert caught.value.name == "CUDA_ERROR_OUT_OF_MEMORY"
        engine.infer_sync({"x": SAMPLE})  # the next one finds memory
    backend.assert_clean()
