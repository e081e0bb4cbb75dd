"""One engine of the mock that takes batches, and what people put in front of it; each is asked row by row."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

import trtx_py as trtx
from mock_backend import MockBackend, slow

from .samples import CpuMeter, Samples, compare, compare_rates

MAX_BATCH = 64
MAX_DELAY_S = 0.002
WIDTH = 64
_PATIENCE_S = 120.0
Ask = Callable[[np.ndarray], Awaitable[Mapping[str, np.ndarray]]]


@dataclass(frozen=True)
class Kind:
    """What the engine does with a batch.

    Attributes:
        name: for the report.
        batch_s: how long each batch takes, whatever its size.
        compute: whether the numbers are right; without, they are zeros.
        lanes: how many batches may run at once.
        clients: how many ask at once: enough to fill two batches of each lane.
    """

    name: str
    batch_s: float
    compute: bool
    lanes: int
    clients: int


KINDS = (
    Kind("1 ms a batch", 0.001, False, 1, 256),
    Kind("5 ms a batch, 8 lanes", 0.005, False, 8, 1024),
    Kind("computing", 0.0, True, 1, 256),
)


def _plan(backend: MockBackend) -> trtx.Plan:
    """y = x + x, (n, 64) float32 with n from 1 to 64."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    model: Any = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    with (
        trtx.Builder(backend=backend) as builder,
        builder.create_network() as network,
        builder.create_config() as config,
        builder.create_optimization_profile() as profile,
    ):
        network.parse_onnx(bytes(model.SerializeToString()))
        profile.set_shape("x", (1, WIDTH), (MAX_BATCH, WIDTH), (MAX_BATCH, WIDTH))
        config.add_optimization_profile(profile)
        return builder.build_serialized_network_sync(network, config)


@contextlib.asynccontextmanager
async def engine_of(kind: Kind) -> AsyncIterator[trtx.Engine]:
    """An engine of the mock whose shapes are captured."""
    backend = MockBackend(compute=kind.compute)
    async with (
        trtx.Runtime(backend=backend) as runtime,
        await runtime.deserialize(_plan(backend), lanes=kind.lanes, max_graphs=MAX_BATCH) as engine,
    ):
        await engine.warmup(3)
        if kind.batch_s:
            backend.inject(slow(seconds=kind.batch_s))
        yield engine


class QueueBatcher:
    """As people write it: a queue, a task that collects a batch and awaits it, np.concatenate, split."""

    def __init__(self, engine: trtx.Engine) -> None:
        self._engine = engine
        self._queue: asyncio.Queue[tuple[np.ndarray, asyncio.Future[dict[str, np.ndarray]]]] = asyncio.Queue()
        self._task = asyncio.create_task(self._serve())

    async def infer(self, x: np.ndarray) -> dict[str, np.ndarray]:
        answer: asyncio.Future[dict[str, np.ndarray]] = asyncio.get_running_loop().create_future()
        await self._queue.put((x, answer))
        return await answer

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            end = loop.time() + MAX_DELAY_S
            while len(batch) < MAX_BATCH:
                if self._queue.empty():
                    try:
                        batch.append(await asyncio.wait_for(self._queue.get(), end - loop.time()))
                    except (TimeoutError, asyncio.TimeoutError):
                        break
                else:
                    batch.append(self._queue.get_nowait())
            await self._run(batch)

    async def _run(self, batch: list[tuple[np.ndarray, asyncio.Future[dict[str, np.ndarray]]]]) -> None:
        try:
            outputs = await self._engine.infer({"x": np.concatenate([x for x, _ in batch])})
        except Exception as error:
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
            return
        row = 0
        for x, answer in batch:
            if not answer.done():
                answer.set_result({name: array[row : row + len(x)] for name, array in outputs.items()})
            row += len(x)

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


@contextlib.asynccontextmanager
async def contenders(engine: trtx.Engine) -> AsyncIterator[dict[str, Ask]]:
    """Ours and the queue's, on the running loop."""
    queue = QueueBatcher(engine)
    async with trtx.DynamicBatcher(engine, max_batch_size=MAX_BATCH, max_delay_s=MAX_DELAY_S) as batcher:
        yield {"DynamicBatcher": lambda x: batcher.infer({"x": x}), "queue and concatenate": queue.infer}
        await queue.aclose()


async def check(name: str, ask: Ask, clients: int, compute: bool) -> None:
    """All clients at once, twice, each with its own numbers. Raises AssertionError for an answer that is not theirs."""

    async def client(number: int) -> None:
        for turn in range(2):
            x = np.full((1, WIDTH), number + 1000 * turn, np.float32)
            found = (await ask(x))["y"]
            if found.shape != x.shape or not np.array_equal(found, 2 * x if compute else 0 * x):
                raise AssertionError(f"{name}: client {number} was given {found.flat[0]} for {x.flat[0]}")

    await _all(client, clients)


async def _all(client: Callable[[int], Coroutine[Any, Any, None]], clients: int) -> None:
    """Run all clients. A request that is never answered is a failure, and no benchmark without an end."""
    await asyncio.wait_for(asyncio.gather(*map(client, range(clients))), _PATIENCE_S)


async def closed_loop(ask: Ask, clients: int, requests: int) -> tuple[float, list[int]]:
    """Requests per second of clients that each ask again when they are answered, and how long each request took, ns."""
    times: list[int] = []
    now = time.perf_counter_ns

    async def client(number: int) -> None:
        x = np.full((1, WIDTH), number, np.float32)
        for _ in range(requests // clients):
            begun = now()
            await ask(x)
            times.append(now() - begun)

    begun = now()
    await _all(client, clients)
    return len(times) / (now() - begun) * 1e9, times


async def measured(ways: Mapping[str, Ask], clients: int, requests: int, rounds: int) -> dict[str, Any]:
    """All ways in turn, round by round; and the first of them over each of the others."""
    rates: dict[str, list[float]] = {way: [] for way in ways}
    samples = {way: Samples() for way in ways}
    order = list(ways)
    for way in order:
        await closed_loop(ways[way], clients, requests)
    for number in range(rounds):
        turn = number % len(order)
        for way in order[turn:] + order[:turn]:
            meter = CpuMeter()
            rate, times = await closed_loop(ways[way], clients, requests)
            rates[way].append(rate)
            samples[way].add(meter.round(times))
    return compared(rates, samples, clients, requests)


def compared(
    rates: Mapping[str, list[float]], samples: Mapping[str, Samples], clients: int, requests: int
) -> dict[str, Any]:
    """For the JSON; the first way is ours."""
    ours, *others = rates
    found: dict[str, Any] = {"clients": clients, "requests_each_round": requests, "ways": {}, "over": {}}
    for way in rates:
        found["ways"][way] = {"requests_per_s": float(np.median(rates[way])), "rates": list(map(round, rates[way]))}
        found["ways"][way] |= samples[way].summary()
    for other in others:
        found["over"][other] = compare_rates(rates[ours], rates[other]) | compare(samples[ours], samples[other])
    return found
