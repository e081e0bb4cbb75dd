"""The same as ``serving_clients`` beside Ray Serve's ``@serve.batch``: inside one replica, and through handles to one.

Inside the replica everything is in one process, on its event loop, around the same engine: what is compared is
batching. Through a handle each request crosses to the replica's process, as it does for users of Ray Serve; ours
without Ray is beside it. Ray runs in processes of its own: ``python -m tests.benchmarks.serving_ray FILE ROUNDS
REQUESTS``.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .rig import SetupError
from .serving_clients import counts
from .serving_contenders import KINDS, MAX_BATCH, MAX_DELAY_S, Ask, Kind, check, contenders, engine_of, measured

ROOT = Path(__file__).parents[2]
_HANDLE_CLIENTS = 256


def ray_batched(engine: Any, kind: Kind) -> Ask:
    """``@serve.batch`` around the engine; works inside a replica only."""
    from ray import serve

    async def infer(rows: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        outputs = await engine.infer({"x": np.concatenate(rows)})
        return [{"y": outputs["y"][number : number + 1]} for number in range(len(rows))]

    decorate: Any = serve.batch(
        max_batch_size=MAX_BATCH, batch_wait_timeout_s=MAX_DELAY_S, max_concurrent_batches=kind.lanes
    )
    batched: Ask = decorate(infer)
    return batched


class Replica:
    """Measures inside itself, and answers through a handle."""

    async def __init__(self) -> None:  # type: ignore[misc]
        self._opened = contextlib.AsyncExitStack()
        engine = await self._opened.enter_async_context(engine_of(KINDS[0]))
        ways = await self._opened.enter_async_context(contenders(engine))
        self._ways = {**ways, "@serve.batch": ray_batched(engine, KINDS[0])}

    async def measure(self, number: int, rounds: int, requests: int) -> dict[str, Any]:
        kind = KINDS[number]
        async with engine_of(kind) as engine, contenders(engine) as given:
            ways = {**given, "@serve.batch": ray_batched(engine, kind)}
            for way, ask in ways.items():
                await check(way, ask, kind.clients, kind.compute)
            return await measured(ways, kind.clients, requests, rounds)

    async def __call__(self, way: str, x: Any) -> Any:
        return dict(await self._ways[way](x))

    async def __del__(self) -> None:
        await self._opened.aclose()


async def _through_handle(handle: Any, rounds: int, requests: int) -> dict[str, Any]:
    kind = KINDS[0]
    async with engine_of(kind) as engine, contenders(engine) as here:
        ways: dict[str, Ask] = {
            "DynamicBatcher": here["DynamicBatcher"],
            "Ray Serve @serve.batch": lambda x: handle.remote("@serve.batch", x),
            "DynamicBatcher in the replica": lambda x: handle.remote("DynamicBatcher", x),
        }
        for way, ask in ways.items():
            await check(way, ask, _HANDLE_CLIENTS, kind.compute)
        return await measured(ways, _HANDLE_CLIENTS, requests, rounds)


def measure_with_ray(rounds: int, requests: int) -> dict[str, Any]:
    """Starts a Ray of one replica on this machine, and ends it."""
    import ray
    from ray import serve

    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, _temp_dir=folder,
            logging_level=logging.WARNING, log_to_driver=False,
        )  # fmt: skip
        try:
            serve.start(proxy_location="Disabled")
            deployment: Any = serve.deployment(name="Bench", num_replicas=1, max_ongoing_requests=10_000)(Replica)
            handle = serve.run(deployment.bind())

            async def ask() -> dict[str, Any]:
                found = {
                    f"{kind.name}, inside a replica": await handle.measure.remote(number, rounds, requests)
                    for number, kind in enumerate(KINDS)
                }
                through = await _through_handle(handle, min(rounds, 4), 2 * _HANDLE_CLIENTS)
                return {**found, f"{KINDS[0].name}, through a handle": through}

            return asyncio.run(ask())
        finally:
            serve.shutdown()
            ray.shutdown()


def run_serving_ray(quick: bool, scale: float) -> dict[str, Any]:
    """In a process of its own. Raises SetupError where there is no Ray."""
    if importlib.util.find_spec("ray") is None:
        raise SetupError("ray is not installed: pip install 'trtx-py[ray]'")
    rounds, requests = counts(quick, scale)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "found.json")
        arguments = [sys.executable, "-m", "tests.benchmarks.serving_ray", str(path), str(rounds), str(requests)]
        result = subprocess.run(
            arguments,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        if result.returncode:
            raise RuntimeError(f"Ray's side ended with {result.returncode}:\n{result.stderr[-4000:]}")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measure_with_ray(int(sys.argv[2]), int(sys.argv[3]))), encoding="utf-8")
