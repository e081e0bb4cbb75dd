"""Nothing is allocated per request: allocation counts and the process's memory over many requests on the mock."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

import trtx_py as trtx

from .loops import Loops
from .mock_engine import SHAPE, inputs, serving
from .ours import statistics_of

_CLIENTS, _POINTS = 8, 20
_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """RSS of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * _PAGE


def allocations_of(statistics: dict[str, Any]) -> dict[str, int]:
    """Every count of allocations in an engine's statistics, by its path."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, int]]:
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from walk(inner, f"{path}.{name}" if path else str(name))
        elif path.endswith(("allocations", "live", "current_bytes")):
            yield path, int(value)

    found = dict(walk(statistics, ""))
    if not found:
        raise LookupError("engine.statistics() counts no allocations; expected device_memory and pinned_memory")
    return found


async def _serve(engine: trtx.Engine, requests: int) -> None:
    """Half through slots, half through arrays."""
    given = inputs()

    async def by_arrays() -> None:
        for _ in range(requests // _CLIENTS):
            await engine.infer(given)

    async def by_slot() -> None:
        async with engine.alloc_inputs({"x": SHAPE}) as slot:
            slot["x"][...] = given["x"]
            for _ in range(requests // _CLIENTS):
                await slot.infer()

    await asyncio.gather(*(by_slot() if number % 2 else by_arrays() for number in range(_CLIENTS)))


def run_steady_state(requests: int) -> dict[str, Any]:
    """Memory is read at ``_POINTS`` points; a tenth of the requests goes before, so that free lists are full."""
    loops = Loops()
    each = max(_CLIENTS, requests // _POINTS)
    try:
        with serving(completion="latency", slots=_CLIENTS) as engine:
            loops.run("asyncio", _serve(engine, max(4 * _CLIENTS, requests // 10)))
            gc.collect()
            before, sizes, begun = allocations_of(statistics_of(engine)), [resident_bytes()], time.perf_counter()
            for _ in range(_POINTS):
                loops.run("asyncio", _serve(engine, each))
                gc.collect()
                sizes.append(resident_bytes())
            elapsed = time.perf_counter() - begun
            after = allocations_of(statistics_of(engine))
    finally:
        loops.close()
    slope = float(np.polyfit(np.arange(len(sizes)) * each, sizes, 1)[0])
    served = each * _POINTS
    return {
        "requests": served,
        "requests_per_s": served / elapsed,
        "allocations_before": before,
        "allocations_after": after,
        "new_allocations": sum(after[name] - before[name] for name in after if name.endswith("allocations")),
        "rss_kib": [size // 1024 for size in sizes],
        "rss_drift_bytes_per_million": slope * 1e6,
        "rss_grown_bytes": sizes[-1] - sizes[0],
    }
