"""What the tests of the request path share: small models, engines on the mock, and a clock that holds calls."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import trtx_py as trtx
from mock_backend import MockBackend

Ranges = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
Tensor = tuple[str, Any, Sequence[Any]]  # name, TensorProto element type, shape

N4 = {"x": ((1, 4), (2, 4), (8, 4))}
PATIENCE_S = 30.0
_POOLS_SUPPORTED = 115  # CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED


def make_model(
    nodes: Sequence[Any],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    weights: Mapping[str, np.ndarray] | None = None,
    opset: int = 21,
) -> bytes:
    """A serialized model; tensors are (name, TensorProto element type, shape)."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info(*tensor) for tensor in inputs],
        [helper.make_tensor_value_info(*tensor) for tensor in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    data: bytes = model.SerializeToString()
    return data


@functools.cache
def affine_model() -> bytes:
    """y = 2 x + 1 with x of shape (N, 4)."""
    return make_model(
        [helper.make_node("Mul", ["x", "two"], ["t"]), helper.make_node("Add", ["t", "one"], ["y"])],
        [("x", TensorProto.FLOAT, ["N", 4])],
        [("y", TensorProto.FLOAT, ["N", 4])],
        {"two": np.float32(2).reshape(1), "one": np.float32(1).reshape(1)},
    )


@functools.cache
def pair_model() -> bytes:
    """total = left + right, both (N, 2), and a fixed 3-vector that only passes through."""
    return make_model(
        [helper.make_node("Add", ["left", "right"], ["total"]), helper.make_node("Identity", ["fixed"], ["same"])],
        [(name, TensorProto.FLOAT, ["N", 2]) for name in ("left", "right")] + [("fixed", TensorProto.INT32, [3])],
        [("total", TensorProto.FLOAT, ["N", 2]), ("same", TensorProto.INT32, [3])],
    )


PAIR = dict.fromkeys(("left", "right"), ((1, 2), (2, 2), (4, 2)))


@functools.cache
def reshape_model() -> bytes:
    """y = x reshaped to the values of the shape tensor ``shape``."""
    return make_model(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [("x", TensorProto.FLOAT, ["N"]), ("shape", TensorProto.INT64, [2])],
        [("y", TensorProto.FLOAT, ["A", "B"])],
    )


RESHAPE = {"x": ((1,), (6,), (24,)), "shape": ((1, 1), (2, 3), (12, 12))}


@functools.cache
def nonzero_model() -> bytes:
    """where = indices of what is not zero in x: as many as the data say."""
    return make_model(
        [helper.make_node("NonZero", ["x"], ["where"])],
        [("x", TensorProto.FLOAT, ["N"])],
        [("where", TensorProto.INT64, [1, "K"])],
    )


NONZERO = {"x": ((1,), (8,), (64,))}


@functools.cache
def identity_model(element: int, shape: tuple[int | str, ...]) -> bytes:
    """y = x."""
    return make_model([helper.make_node("Identity", ["x"], ["y"])], [("x", element, shape)], [("y", element, shape)])


def build(model: bytes, profiles: Sequence[Ranges] = (), *, sharing: bool = True) -> trtx.Plan:
    """A plan of ``model``, from a backend of its own."""
    backend = MockBackend()
    try:
        with (
            trtx.Builder(None, backend) as builder,
            builder.create_network() as network,
            builder.create_config() as config,
        ):
            network.parse_onnx(model)
            config.profile_sharing = sharing
            for ranges in profiles:
                with builder.create_optimization_profile() as profile:
                    for name, limits in ranges.items():
                        profile.set_shape(name, *limits)
                    config.add_optimization_profile(profile)
            return builder.build_serialized_network_sync(network, config)
    finally:
        backend.close()


@functools.cache
def affine_plan(sharing: bool = True) -> trtx.Plan:
    return build(affine_model(), [N4], sharing=sharing)


#: Shapes of 1 to 4 rows, and of 5 to 8.
SPLIT = ({"x": ((1, 4), (2, 4), (4, 4))}, {"x": ((5, 4), (6, 4), (8, 4))})


@functools.cache
def split_plan(sharing: bool = True) -> trtx.Plan:
    return build(affine_model(), SPLIT, sharing=sharing)


@contextlib.asynccontextmanager
async def serving(backend: MockBackend, plan: trtx.Plan | None = None, **options: Any) -> AsyncIterator[trtx.Engine]:
    """An engine of ``plan`` (y = 2 x + 1 by default); everything is closed at the end."""
    async with (
        trtx.Runtime(None, backend) as runtime,
        await runtime.deserialize(plan or affine_plan(), **options) as engine,
    ):
        yield engine


@contextlib.contextmanager
def serving_sync(backend: MockBackend, plan: trtx.Plan | None = None, **options: Any) -> Iterator[trtx.Engine]:
    """As ``serving``, without an event loop; closing waits for nothing, so requests must have ended."""
    with trtx.Runtime(None, backend) as runtime, runtime.deserialize_sync(plan or affine_plan(), **options) as engine:
        yield engine


def without_pools(backend: MockBackend, patch: pytest.MonkeyPatch) -> None:
    """From now on as on a device that has no memory pools."""
    ask = backend.driver.cuDeviceGetAttribute

    def answer(attribute: int, device: int) -> int:
        return 0 if attribute == _POOLS_SUPPORTED else ask(attribute, device)

    patch.setattr(backend.driver, "cuDeviceGetAttribute", answer)


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 4)).astype(np.float32)


def affine(x: np.ndarray) -> np.ndarray:
    """What the affine model computes, in its own precision."""
    return x * np.float32(2) + np.float32(1)


class GateClock:
    """Real time, except that every delay lasts until ``open()``: calls with a delay are held, and no test sleeps."""

    def __init__(self) -> None:
        self.reached = threading.Semaphore(0)
        self._gate = threading.Event()

    def now_ns(self) -> int:
        return time.perf_counter_ns()

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.reached.release()
            assert self._gate.wait(PATIENCE_S), "a test forgot to open its gate"

    def open(self) -> None:
        self._gate.set()

    def wait_reached_sync(self) -> None:
        assert self.reached.acquire(timeout=PATIENCE_S), "no call reached the gate"

    async def wait_reached(self) -> None:
        """Until one more call is held."""
        await asyncio.to_thread(self.wait_reached_sync)


class _Driver:
    """Awaits a coroutine and asks for the cancellation of its task at the ``cancel_at``-th suspension."""

    def __init__(self, coroutine: Any, cancel_at: int, task_box: list[asyncio.Task[Any]]) -> None:
        self._coroutine, self._cancel_at, self._box = coroutine, cancel_at, task_box

    def __await__(self) -> Any:
        suspensions = 0
        failure: BaseException | None = None
        while True:
            try:
                waited = self._coroutine.send(None) if failure is None else self._coroutine.throw(failure)
            except StopIteration as stop:
                return stop.value, suspensions
            suspensions += 1
            if suspensions == self._cancel_at:
                asyncio.get_running_loop().call_soon(self._box[0].cancel)
            failure = None
            try:
                yield waited
            except BaseException as error:
                failure = error


async def cancel_at(make: Callable[[], Any], suspension: int) -> tuple[str, Any, int]:
    """Run ``make()`` in a task that is cancelled at its ``suspension``-th suspension.

    Returns ("cancelled", None, 0) or ("finished", value, how often it was suspended).
    """
    box: list[asyncio.Task[Any]] = []

    async def body() -> Any:
        return await _Driver(make(), suspension, box)

    box.append(asyncio.create_task(body()))
    try:
        value, suspensions = await box[0]
    except asyncio.CancelledError:
        return "cancelled", None, 0
    return "finished", value, suspensions
