"""Requests per second of many clients with one row each: our batcher, and what people write, around the same engine.

All of it in one process and on one event loop, in turn, on the mock. ``serving_ray`` adds Ray Serve.
"""

from __future__ import annotations

from typing import Any

from .loops import Loops
from .serving_contenders import KINDS, Kind, check, contenders, engine_of, measured


def counts(quick: bool, scale: float) -> tuple[int, int]:
    """Rounds, and requests of each."""
    rounds, requests = (4, 8_192) if quick else (8, 16_384)
    return rounds, max(2048, int(requests * scale) // 1024 * 1024)


async def _kind(kind: Kind, rounds: int, requests: int) -> dict[str, Any]:
    async with engine_of(kind) as engine, contenders(engine) as ways:
        for way, ask in ways.items():
            await check(way, ask, kind.clients, kind.compute)
        return await measured(ways, kind.clients, requests, rounds)


def run_serving_clients(quick: bool, scale: float) -> dict[str, Any]:
    """On asyncio and uvloop, over each kind of engine."""
    rounds, requests = counts(quick, scale)
    loops = Loops()
    try:
        return {
            f"{kind.name}, {name}": loops.run(name, _kind(kind, rounds, requests))
            for kind in KINDS
            for name in loops.names
        }
    finally:
        loops.close()
