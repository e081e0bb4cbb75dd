"""Only the type checkers run this: what a user writes must check, with the types that the documentation promises."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import trtx_py as trtx
from mock_backend import MockBackend, VirtualClock, fail


async def one_step(image: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
    async with trtx.open_engine(
        Path("model.onnx"), "mock", profiles=[{"x": ((1, 64), (8, 64), (256, 64))}], precision=None, lanes=2
    ) as engine:
        tensors: tuple[trtx.TensorInfo, ...] = engine.io_tensors
        shape: tuple[int, ...] = tensors[0].shape
        result: trtx.InferenceResult = await engine.infer_timed({"x": image})
        milliseconds: float = result.latency_ms + result.queue_ms + result.gpu_ms
        statistics: trtx.EngineStatistics = engine.statistics()
        print(shape, milliseconds, statistics.completed)
        return await engine.infer({"x": image})


async def by_hand(model: bytes) -> trtx.Plan:
    backend = MockBackend(compute=False, memory_bytes=1 << 20, faults=[fail("cuMemAlloc", nth=2)], clock=VirtualClock())
    with trtx.Logger(trtx.Severity.WARNING, logging.StreamHandler()) as logger:
        async with trtx.Builder(logger, backend=backend) as builder:
            network: trtx.Network = builder.create_network()
            network.parse_onnx(model)
            config: trtx.BuilderConfig = builder.create_config()
            config.workspace_bytes = 1 << 30
            with builder.create_optimization_profile() as profile:
                profile.set_shape("x", (1, 64), (8, 64), (256, 64))
                index: int = config.add_optimization_profile(profile)
            print(index)
            plan = await builder.build_serialized_network(network, config)
            return plan if plan else builder.build_serialized_network_sync(network, config)


async def cached(model: bytes) -> tuple[trtx.CacheEntry, ...]:
    cache = trtx.EngineCache(Path("engines"), max_bytes=1 << 30)
    plan: trtx.Plan = await cache.plan(model, "mock", compute_capabilities=("8.9",))
    report: trtx.CacheReport = cache.prune(older_than_s=3600)
    reasons: list[str] = list(report.removed.values())
    for choice in (cache, cache.root, Path("engines"), True):
        async with trtx.open_engine(model, "mock", cache=choice):
            print(len(plan), reasons)
    return cache.list()


async def bare_level(plan: trtx.Plan) -> npt.NDArray[Any]:
    async with trtx.Runtime(None, "mock", device=0, lean_library=None, allow_host_code=False) as runtime:
        engine: trtx.Engine = await runtime.deserialize(plan)
        context: trtx.ExecutionContext = engine.create_execution_context()
        stream: trtx.Stream = runtime.device.create_stream()
        memory: trtx.DeviceBuffer = runtime.device.allocate(4096)
        memory.copy_from_host(np.zeros((1, 64), np.float32), stream)
        context.set_input_shape("x", (1, 64))
        context.set_tensor_address("x", memory)
        context.set_tensor_address("y", memory.address)
        context.enqueue_v3(stream)
        await stream.wait_idle()
        return memory.copy_to_host((1, 10), np.float32, stream)


def open_objects() -> list[trtx.LiveObject]:
    return trtx.live_objects()
