"""Requests per second of 16 clients on the mock, over as many clients that await bare futures, in turn in one run."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

import trtx_py as trtx

from .loops import Loops
from .mock_engine import SHAPE, inputs, serving
from .ours import statistics_of
from .samples import compare_rates

_CLIENTS = 16


async def _gather_rate(requests: int, clients: list[Callable[[], Awaitable[Any]]]) -> float:
    """Requests per second of clients that each ask again as soon as they are answered."""

    async def client(ask: Callable[[], Awaitable[Any]]) -> None:
        for _ in range(requests // len(clients)):
            await ask()

    begun = time.perf_counter()
    await asyncio.gather(*map(client, clients))
    return requests // len(clients) * len(clients) / (time.perf_counter() - begun)


async def _bare(requests: int) -> float:
    loop = asyncio.get_running_loop()

    async def client() -> None:
        for _ in range(requests // _CLIENTS):
            future = loop.create_future()
            loop.call_soon(future.set_result, None)
            await future

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(_CLIENTS)))
    return requests // _CLIENTS * _CLIENTS / (time.perf_counter() - begun)


async def _arrays(engine: trtx.Engine, requests: int) -> float:
    given = inputs()
    return await _gather_rate(requests, [lambda: engine.infer(given)] * _CLIENTS)


async def _slots(engine: trtx.Engine, requests: int) -> float:
    async with contextlib.AsyncExitStack() as undo:
        slots = [await undo.enter_async_context(engine.alloc_inputs({"x": SHAPE})) for _ in range(_CLIENTS)]
        for slot in slots:
            slot["x"][...] = inputs()["x"]
        return await _gather_rate(requests, [slot.infer for slot in slots])


def check_outputs(loops: Loops) -> None:
    """With compute=True, 16 clients at once each get the result of their own inputs, twice."""

    async def client(engine: trtx.Engine, number: int) -> None:
        for turn in range(4):
            x = np.full(SHAPE, number + 100 * turn, np.float32)
            found = (await engine.infer({"x": x}))["y"]
            async with engine.alloc_inputs({"x": SHAPE}) as slot:
                slot["x"][...] = -x
                beside = (await slot.infer())["y"]
            if not (np.array_equal(found, 2 * x) and np.array_equal(beside, -2 * x)):
                raise AssertionError(f"client {number}: {found.flat[0]} and {beside.flat[0]} for {x.flat[0]}")

    async def all_clients(engine: trtx.Engine) -> None:
        await asyncio.gather(*(client(engine, number) for number in range(_CLIENTS)))

    for name in loops.names:
        with serving(compute=True, slots=_CLIENTS) as engine:
            loops.run(name, all_clients(engine))


def run_clients(quick: bool) -> dict[str, Any]:
    """On asyncio and uvloop, in two modes, through slots and through arrays."""
    rounds, requests = (8, 8_000) if quick else (20, 32_000)
    loops = Loops()
    try:
        check_outputs(loops)
        return {name: _on_loop(loops, name, rounds, requests) for name in loops.names}
    finally:
        loops.close()


def _on_loop(loops: Loops, name: str, rounds: int, requests: int) -> dict[str, Any]:
    with contextlib.ExitStack() as undo:
        engines = {
            mode: undo.enter_context(serving(completion=mode, slots=_CLIENTS)) for mode in ("latency", "balanced")
        }
        ways: dict[str, Callable[[], float]] = {"bare futures": lambda: loops.run(name, _bare(requests))}
        for mode, engine in engines.items():
            ways[f"slots {mode}"] = lambda engine=engine: loops.run(name, _slots(engine, requests))  # type: ignore[misc]
            ways[f"arrays {mode}"] = lambda engine=engine: loops.run(name, _arrays(engine, requests))  # type: ignore[misc]
        rates: dict[str, list[float]] = {way: [] for way in ways}
        order = list(ways)
        for way in order:
            ways[way]()
        for number in range(rounds):
            turn = number % len(order)
            for way in order[turn:] + order[:turn]:
                rates[way].append(ways[way]())
        statistics = {mode: statistics_of(engine) for mode, engine in engines.items()}
    return {
        "clients": _CLIENTS,
        "requests_each_round": requests,
        "ways": {
            way: {
                "requests_per_s": float(np.median(values)),
                "rounds": [round(value) for value in values],
                "over_bare_futures": compare_rates(values, rates["bare futures"]),
            }
            for way, values in rates.items()
        },
        "statistics": statistics,
    }
