"""Several streams: each lane of an engine has a stream, contexts and buffers of its own. Runs on the mock.

Requests on different lanes overlap on the GPU: the copies of one with the kernels of another.
"""

import asyncio
import os
import time
from pathlib import Path

import numpy as np

import trtx_py as trtx

MODEL = Path(__file__).parent / "digits" / "digits.onnx"
BACKEND = os.environ.get("TRTX_BACKEND", "mock")
PROFILE = {"image": ((1, 1, 8, 8), (32, 1, 8, 8), (32, 1, 8, 8))}
IMAGES = {"image": np.zeros((32, 1, 8, 8), np.float32)}
REQUESTS = 200


async def serve(lanes: int) -> None:
    async with trtx.open_engine(MODEL, backend=BACKEND, profiles=[PROFILE], lanes=lanes) as engine:
        await engine.warmup(5)
        start = time.perf_counter()
        await asyncio.gather(*(engine.infer(IMAGES) for _ in range(REQUESTS)))
        rate = REQUESTS / (time.perf_counter() - start)
        statistics = engine.statistics()
        print(f"lanes={lanes}: {rate:,.0f} requests a second, {statistics.lanes} lanes started, "
              f"{statistics.device_memory.current_bytes / 1e6:.1f} MB on the device")  # fmt: skip


async def main() -> None:
    for lanes in (1, 2, 4):
        await serve(lanes)


asyncio.run(main())
