"""What the tests of the batcher share: models of rows, a held lane, and a loop whose time can be moved."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
from onnx import TensorProto, helper

import trtx_py as trtx
from mock_backend import MockBackend, slow
from tests.unit.serving import PATIENCE_S, GateClock, affine, build, make_model, rows, serving

F32 = TensorProto.FLOAT
#: One batch at a time and nothing behind it: what is offered while it is held waits.
ALONE = trtx.BatchPolicy(depth=1)
NEVER_S = 1000.0


@functools.cache
def two_plan() -> trtx.Plan:
    """total = left + right and double = 2 left; (N, 2) and (N, 3) are summed over their own axes."""
    return build(
        make_model(
            [
                helper.make_node("Add", ["left", "right"], ["total"]),
                helper.make_node("Add", ["left", "left"], ["double"]),
            ],
            [("left", F32, ["N", 2]), ("right", F32, ["N", 2])],
            [("total", F32, ["N", 2]), ("double", F32, ["N", 2])],
        ),
        [dict.fromkeys(("left", "right"), ((1, 2), (4, 2), (8, 2)))],
    )


@functools.cache
def length_plan() -> trtx.Plan:
    """y = 2 x + 1 with x of shape (N, L): rows of 1 to 32 numbers, up to 8 of them."""
    return build(
        make_model(
            [helper.make_node("Mul", ["x", "two"], ["t"]), helper.make_node("Add", ["t", "one"], ["y"])],
            [("x", F32, ["N", "L"])],
            [("y", F32, ["N", "L"])],
            {"two": np.float32(2).reshape(1), "one": np.float32(1).reshape(1)},
        ),
        [{"x": ((1, 1), (4, 4), (8, 32))}],
    )


@functools.cache
def wide_plan() -> trtx.Plan:
    """y = 2 x + 1 with rows of 128 KiB."""
    return build(
        make_model(
            [helper.make_node("Mul", ["x", "two"], ["t"]), helper.make_node("Add", ["t", "one"], ["y"])],
            [("x", F32, ["N", 32768])],
            [("y", F32, ["N", 32768])],
            {"two": np.float32(2).reshape(1), "one": np.float32(1).reshape(1)},
        ),
        [{"x": ((1, 32768), (2, 32768), (8, 32768))}],
    )


@contextlib.asynccontextmanager
async def batching(
    backend: MockBackend, plan: trtx.Plan | None = None, *, engine: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[trtx.DynamicBatcher]:
    """A batcher of an engine of its own (y = 2 x + 1 for up to 8 rows of 4 by default), with its graphs."""
    async with serving(backend, plan, **(engine or {})) as own, trtx.DynamicBatcher(own, **options) as batcher:
        yield batcher


async def until(condition: Callable[[], object]) -> None:
    """What happens beside the requests has no event to wait for."""
    with anyio.fail_after(PATIENCE_S):
        while not condition():
            await anyio.lowlevel.checkpoint()


async def turns(count: int = 20) -> None:
    """Let the loop turn: whatever can happen without the device has happened then."""
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


def start(call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.create_task(call)


async def ask(batcher: trtx.DynamicBatcher, count: int = 1, seed: int = 0, **options: Any) -> None:
    """One request of ``count`` rows, whose answer must be its own."""
    x = rows(count, seed)
    found = await batcher.infer({"x": x}, **options)
    assert np.array_equal(found["y"], affine(x))


async def ask_many(batcher: trtx.DynamicBatcher, count: int, seed: int = 0, **options: Any) -> None:
    x = rows(count, seed)
    found = await batcher.infer_many({"x": x}, **options)
    assert np.array_equal(found["y"], affine(x))


async def ask_filled(batcher: trtx.DynamicBatcher, count: int = 1, seed: int = 0, **options: Any) -> None:
    x = rows(count, seed)
    async with batcher.alloc_rows(count, **options) as own:
        own["x"][...] = x
        found = await own.infer()
    assert np.array_equal(found["y"], affine(x))


@contextlib.asynccontextmanager
async def held(
    backend: MockBackend, clock: GateClock, batcher: trtx.DynamicBatcher, count: int = 2
) -> AsyncIterator[asyncio.Task[Any]]:
    """While this is open, a request of so many rows (the task) keeps a lane; ``clock.open()`` lets go of it."""
    await batcher.warmup()
    backend.inject(slow(count=1))
    task = start(ask(batcher, count, 99))
    await until(lambda: task.done() or clock.reached.acquire(blocking=False))
    assert not task.done(), "it never reached the device"
    try:
        yield task
    finally:
        clock.open()
        await asyncio.gather(task, return_exceptions=True)


class Skip:
    """The running loop's clock, which ``by`` moves: what is due in an hour is due now."""

    def __init__(self) -> None:
        loop: Any = asyncio.get_running_loop()
        real = loop.time
        self._offset = 0.0
        loop.time = lambda: real() + self._offset

    async def by(self, seconds: float) -> None:
        self._offset += seconds
        await turns()


def answered(statistics: trtx.BatcherStatistics) -> int:
    """Requests that ended in one of the ways there are."""
    s = statistics
    return s.completed + s.failed + s.cancelled + s.shed + s.late + s.dropped


async def assert_settled(batcher: trtx.DynamicBatcher) -> None:
    """Everything accepted was answered once, and nothing is under way."""
    await until(lambda: not batcher.statistics().running_batches)
    s = batcher.statistics()
    assert (s.waiting_rows, s.running_batches, s.bytes_in_flight) == (0, 0, 0), s
    assert s.accepted == answered(s), s
