"""A Ray Serve deployment: replicas on as many machines as you have, requests batched inside each of them.

    pip install ".[mock,ray]"                       # in a checkout of trtx_py
    serve run examples.ray_serve.deployment:app     # over HTTP, with Ray's own proxies
    python examples/ray_serve/deployment.py         # two replicas on this machine, asked 300 times, on the mock

Ray chooses a replica for each request; what makes large launches of small requests is the replica's DynamicBatcher,
which launches as soon as the engine is free. So let many requests into a replica at once (max_ongoing_requests), and
leave @serve.batch out: it would hold them back in front of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve

import trtx_py as trtx

MODEL = Path(__file__).parents[1] / "digits" / "digits.onnx"
PROFILE = {"image": ((1, 1, 8, 8), (16, 1, 8, 8), (32, 1, 8, 8))}


class Replica:
    """One engine on one GPU (or on the mock) and a batcher over it, in a replica's process.

    On GPUs: ``Digits.options(ray_actor_options={"num_gpus": 1})``. Ray shows each replica only its own, as device 0.
    """

    async def __init__(self, model: str, backend: str | None = None) -> None:  # type: ignore[misc]
        # Ray awaits this, and every request, on the same event loop.
        self._opened = contextlib.AsyncExitStack()
        engine = await self._opened.enter_async_context(trtx.open_engine(model, backend=backend, profiles=[PROFILE]))
        await engine.warmup(1)
        batcher = trtx.DynamicBatcher(engine, max_batch_size=32, max_delay_s=0.001)
        self._batcher = await self._opened.enter_async_context(batcher)

    async def __call__(self, images: Any) -> Any:
        """Probabilities, (n, 10), of images, (n, 1, 8, 8) float32 with values from 0 to 16."""
        outputs = await self._batcher.infer({"image": images})
        return outputs["probabilities"]

    async def served(self) -> tuple[int, int, int]:
        """This replica's process, and how many requests it has answered in how many launches."""
        counts = self._batcher.statistics()
        return os.getpid(), counts.completed, counts.batches + counts.bypassed

    async def __del__(self) -> None:
        # Ray awaits this when the replica is to end, behind its last request.
        await self._opened.aclose()


Digits: Any = serve.deployment(name="Digits", num_replicas=2, max_ongoing_requests=1024)(Replica)
app = Digits.bind(str(MODEL), os.environ.get("TRTX_BACKEND"))


async def ask(handle: Any, images: Any) -> tuple[Any, dict[int, tuple[int, int]]]:
    """The answers for images that 64 clients ask for one by one, and (requests, launches) by replica."""
    clients = asyncio.Semaphore(64)

    async def one(image: Any) -> Any:
        async with clients:
            return await handle.remote(image[None])

    answers = await asyncio.gather(*map(one, images))
    replicas: dict[int, tuple[int, int]] = {}
    for _ in range(50):
        # Which replica answers is Ray's choice; of many at once each gets some.
        for process, requests, launches in await asyncio.gather(*(handle.served.remote() for _ in range(32))):
            replicas[process] = (requests, launches)
        if sum(requests for requests, _ in replicas.values()) == len(images):
            break
    return np.concatenate(answers), replicas


def run_locally(images: Any, backend: str = "mock") -> tuple[Any, dict[int, tuple[int, int]]]:
    """A Ray of two replicas on this machine, for as long as it takes to ask for these images."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, _temp_dir=folder,
            logging_level=logging.WARNING, log_to_driver=False,
        )  # fmt: skip
        try:
            serve.start(proxy_location="Disabled")  # we ask through a handle, not over HTTP
            return asyncio.run(ask(serve.run(Digits.bind(str(MODEL), backend)), images))
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()


def main() -> None:
    images = np.random.default_rng(0).uniform(0, 16, (300, 1, 8, 8)).astype(np.float32)
    answers, replicas = run_locally(images)
    print("digits:", *answers[:10].argmax(axis=1))
    for process, (requests, launches) in replicas.items():
        print(f"replica {process}: {requests} requests in {launches} launches")


if __name__ == "__main__":
    main()
