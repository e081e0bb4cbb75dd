"""Captured graphs, slots and device tensors on every case of the kit: the same bodies on the mock and on a GPU."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from tests.gpu.kit import GpuSide, Side, load_kit, run
from trtx_py import TensorLocation, TensorMode

_KIT = load_kit()
_CASES = [] if _KIT is None else _KIT.cases
_IDS = [f"{case['engine']}-{'x'.join(map(str, case['inputs'][0]['shape']))}" for case in _CASES]


#: TensorRT says so itself: these contain loops whose length depends on data.
NOT_CAPTURABLE = ("silero_seq.fp32.vcx",)


def _has_host_inputs(engine: trtx.Engine) -> bool:
    return any(t.mode is TensorMode.INPUT and t.location is TensorLocation.HOST for t in engine.io_tensors)


@pytest.mark.parametrize("case", _CASES, ids=_IDS)
def test_case_through_graphs(side: Side, case: dict[str, Any], record: Callable[..., None]) -> None:
    """Enqueued, captured, replayed with other inputs and with the case's own again: never stale."""
    inputs = side.kit.inputs(case)
    zeros = {name: np.zeros_like(array) for name, array in inputs.items()}

    async def body() -> None:
        async with side.runtime() as runtime, await runtime.deserialize(side.plan(case["engine"])) as engine:
            errors = [side.kit.check(case, await engine.infer(inputs))]
            if side.name == "gpu" and case["engine"] in NOT_CAPTURABLE:
                with pytest.raises(trtx.ExecutionError, match="not stream capturable"):
                    await engine.alloc_inputs({name: array.shape for name, array in inputs.items()}).__aenter__()
                for _ in range(4):
                    errors.append(side.kit.check(case, await engine.infer(inputs)))
                assert engine.statistics().graphs.failures == 1
                record(f"{case['engine']} is not capturable", error=max(errors), result="pass")
                return
            if _has_host_inputs(engine):
                for _ in range(4):
                    errors.append(side.kit.check(case, await engine.infer(inputs)))
            else:
                async with engine.alloc_inputs({name: array.shape for name, array in inputs.items()}) as slot:
                    outputs: dict[str, Any] = {}
                    for fill in (inputs, zeros, inputs):
                        for name, array in fill.items():
                            slot[name][...] = array
                        outputs = await slot.infer()
                    errors.append(side.kit.check(case, outputs))
                    await engine.infer(zeros)
                    errors.append(side.kit.check(case, await engine.infer(inputs)))
            graphs = engine.statistics().graphs
            assert (graphs.captured, graphs.failures) == (1, 0), graphs
            assert graphs.hits >= 2
        record(f"{case['engine']} through a graph", error=max(errors), capture_ms=graphs.capture_ms, result="pass")

    run(body())


@pytest.mark.parametrize("completion", ["latency", "balanced", "efficient"])
def test_many_callers_on_lanes(side: Side, completion: str, record: Callable[..., None]) -> None:
    case = side.kit.case("mlp.fp32.vcx", 0)
    inputs = side.kit.inputs(case)
    others = {name: array * 0.5 for name, array in inputs.items()}

    async def body() -> None:
        async with (
            side.runtime() as runtime,
            await runtime.deserialize(side.plan("mlp.fp32.vcx"), lanes=3, completion=completion) as engine,
        ):
            await engine.warmup(1)
            async with engine.alloc_inputs({name: array.shape for name, array in inputs.items()}):
                pass
            expected = await engine.infer(others)

            async def one(number: int) -> None:
                for _ in range(20):
                    outputs = await engine.infer(others if number % 2 else inputs)
                    if number % 2:
                        assert all(np.array_equal(outputs[name], array) for name, array in expected.items())
                    else:
                        side.kit.check(case, outputs)

            await asyncio.gather(*(one(number) for number in range(64)))
            statistics = engine.statistics()
            assert statistics.failed == 0
            assert statistics.graphs.hits >= 64 * 20
        record(f"64 callers, 3 lanes, {completion}", result="pass")

    run(body())


def test_split_along_the_batch_axis(side: Side, record: Callable[..., None]) -> None:
    """scale_big at 16 rows: parts whose copies overlap give what the whole gives."""
    x = np.random.default_rng(0).random((16, 1 << 20), np.float32)

    async def body() -> None:
        async with side.runtime() as runtime:
            found, contexts = [], 0
            for options in ({}, {"batch_axis": 0}):
                async with (
                    await runtime.deserialize(side.plan("scale_big.fp32.vcx"), **options) as engine,
                    engine.alloc_inputs({"x": x.shape}) as slot,
                ):
                    slot["x"][...] = x
                    found.append(await slot.infer())
                    contexts = engine.statistics().contexts
            for name, array in found[0].items():
                assert np.array_equal(found[1][name], array)
        record("scale_big, 16 rows, split", parts=contexts, result="pass")

    run(body())


def test_a_budget_is_kept(side: Side) -> None:
    async def body() -> None:
        async with trtx.Runtime(backend=_backend(side), max_device_bytes=128 << 20) as runtime:
            engine = await runtime.deserialize(side.plan("resnet50.fp16.vcx"))
            with pytest.raises(trtx.MemoryBudgetError, match="activations"):
                await engine.infer({"image": np.zeros((64, 3, 224, 224), np.float32)})
            await engine.aclose()
            async with await runtime.deserialize(side.plan("mlp.fp32.vcx")) as small:
                await small.infer({"x": np.zeros((1, 64), np.float32)})

    run(body())


def _backend(side: Side) -> Any:
    return getattr(side, "backend", None) or "tensorrt_dispatch"


def test_device_arrays_come_back_as_inputs(side: Side) -> None:
    case = side.kit.case("mlp.fp32.vcx", 1)
    inputs = side.kit.inputs(case)

    async def body() -> None:
        async with side.runtime() as runtime, await runtime.deserialize(side.plan("mlp.fp32.vcx")) as engine:
            stream = runtime.device.create_stream()
            on_device = trtx.DeviceArray.from_host(runtime.device, inputs["x"], stream)
            outputs = await engine.infer_on_device({"x": on_device})
            side.kit.check(case, {name: await array.to_host() for name, array in outputs.items()})
            side.kit.check(case, await engine.infer({"x": on_device}))

    run(body())


@pytest.mark.gpu
def test_torch_tensors(record: Callable[..., None]) -> None:
    """Written on a stream of torch's own just before, read without a host copy, and back as torch tensors."""
    torch = pytest.importorskip("torch")
    kit = load_kit()
    assert kit is not None
    side = GpuSide(kit)
    case = kit.case("mlp.fp32.vcx", 1)
    x = kit.inputs(case)["x"]

    async def body() -> None:
        async with side.runtime() as runtime, await runtime.deserialize(side.plan("mlp.fp32.vcx")) as engine:
            for _ in range(20):
                stream = torch.cuda.Stream()
                with torch.cuda.stream(stream):
                    busy = torch.rand(4096, 4096, device="cuda")
                    for _ in range(3):
                        busy = busy @ busy / 4096
                    tensor = torch.from_numpy(x).to("cuda", non_blocking=True) + (busy * 0).sum()
                    host = await engine.infer({"x": tensor})
                    kept = await engine.infer_on_device({"x": tensor})
                kit.check(case, host)
                back = {name: torch.from_dlpack(array) for name, array in kept.items()}
                kit.check(case, {name: t.cpu().numpy() for name, t in back.items()})
        record("torch tensors in and out", result="pass")

    run(body())


@pytest.mark.gpu
def test_cupy_arrays() -> None:
    cupy = pytest.importorskip("cupy")
    kit = load_kit()
    assert kit is not None
    side = GpuSide(kit)
    case = kit.case("mlp.fp32.vcx", 1)
    x = kit.inputs(case)["x"]

    async def body() -> None:
        async with side.runtime() as runtime, await runtime.deserialize(side.plan("mlp.fp32.vcx")) as engine:
            with cupy.cuda.Stream(non_blocking=True):
                array = cupy.asarray(x) * 1
                kit.check(case, await engine.infer({"x": array}))
                kept = await engine.infer_on_device({"x": array})
                kit.check(case, {name: cupy.asnumpy(cupy.from_dlpack(a)) for name, a in kept.items()})

    run(body())
