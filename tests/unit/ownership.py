"""What the tests of ownership share: a small model, one of everything that can be open, a record of destruction."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import mock_backend._seam as mock_seam
import trtx_py as trtx
from mock_backend import MockBackend

PROFILE = {"x": ((1, 4), (2, 4), (8, 4))}
WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3) / 7
SAMPLE = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)


@functools.cache
def matmul_model(rows: int | str = "N") -> bytes:
    """y = x @ WEIGHTS, with ``rows`` rows (dynamic by default)."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, 3])],
        [numpy_helper.from_array(WEIGHTS, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def build_plan(backend: MockBackend | None = None, *, profiles: int = 1, sharing: bool = True) -> trtx.Plan:
    """A plan of ``matmul_model()``, built with ``backend`` or one made for it."""
    with (
        trtx.Builder(None, backend or MockBackend()) as builder,
        builder.create_network() as network,
        builder.create_config() as config,
    ):
        network.parse_onnx(matmul_model())
        config.profile_sharing = sharing
        for _ in range(profiles):
            with builder.create_optimization_profile() as profile:
                profile.set_shape("x", *PROFILE["x"])
                config.add_optimization_profile(profile)
        return builder.build_serialized_network_sync(network, config)


@functools.cache
def shared_plan() -> trtx.Plan:
    return build_plan()


@functools.cache
def exclusive_plan(profiles: int = 1) -> trtx.Plan:
    """A plan that lets one context at a time use a profile, as 8.6 does without PROFILE_SHARING_0806."""
    return build_plan(profiles=profiles, sharing=False)


@dataclass
class Tree:
    """One of everything, in order of creation: each object's owners come before it."""

    logger: trtx.Logger
    builder: trtx.Builder
    network: trtx.Network
    config: trtx.BuilderConfig
    profile: trtx.OptimizationProfile
    runtime: trtx.Runtime
    engine: trtx.Engine
    context: trtx.ExecutionContext
    device: trtx.Device
    stream: trtx.Stream
    event: trtx.Event
    buffer: trtx.DeviceBuffer
    pinned: trtx.PinnedBuffer

    def objects(self) -> dict[str, Any]:
        return dict(vars(self))

    def close(self) -> None:
        for item in reversed(list(self.objects().values())):
            item.close()


def grow_tree(backend: MockBackend) -> Tree:
    """Open one of everything; ``device`` is a root of its own."""
    logger = trtx.Logger()
    builder = trtx.Builder(logger, backend)
    network = builder.create_network()
    network.parse_onnx(matmul_model())
    profile = builder.create_optimization_profile()
    runtime = trtx.Runtime(logger, backend)
    engine = runtime.deserialize_sync(shared_plan())
    device = trtx.Device(0, backend=backend)
    return Tree(
        logger=logger,
        builder=builder,
        network=network,
        config=builder.create_config(),
        profile=profile,
        runtime=runtime,
        engine=engine,
        context=engine.create_execution_context(),
        device=device,
        stream=device.create_stream(),
        event=device.create_event(),
        buffer=device.allocate(64),
        pinned=device.allocate_pinned(64),
    )


def record_destruction(backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is destroyed natively from now on, in order: kinds of TensorRT objects, and names of driver calls.

    For objects that are made after this call.
    """
    shared_plan()
    log: list[str] = []
    destroy = mock_seam.LiveObject.destroy

    def recorded(self: mock_seam.LiveObject) -> None:
        destroy(self)
        log.append(self.kind)

    monkeypatch.setattr(mock_seam.LiveObject, "destroy", recorded)
    calls = "cuMemFree cuMemFreeHost cuStreamDestroy cuEventDestroy cuDevicePrimaryCtxRelease"
    for name in calls.split():
        monkeypatch.setattr(backend.driver, name, _logging(getattr(backend.driver, name), name, log))
    return log


def _logging(call: Callable[..., Any], name: str, log: list[str]) -> Callable[..., Any]:
    def logged(*args: Any) -> Any:
        result = call(*args)
        log.append(name)
        return result

    return logged


class Gate:
    """Holds a stream of the mock: nothing enqueued after it runs until ``open`` is called."""

    def __init__(self, backend: MockBackend, device: trtx.Device, stream: trtx.Stream) -> None:
        self._event = threading.Event()
        with device.current():
            backend.driver.launch(stream.handle, self._wait, "test gate")

    def _wait(self) -> None:
        assert self._event.wait(30), "a test forgot to open a gate"

    def open(self) -> None:
        self._event.set()


async def until(true: Callable[[], bool]) -> None:
    """Let the event loop run until something is so that a task in it brings about."""
    while not true():  # noqa: ASYNC110 - there is no event to wait for: the point is what others see meanwhile
        await asyncio.sleep(0)
