"""CUDA graphs: a shape that recurs is captured, and then launched by native code. Runs on the mock.

With TRTX_BACKEND=tensorrt_rtx (or another) it runs on a GPU, and says what a request takes.
"""

import asyncio
import os
import time
from pathlib import Path

import numpy as np

import trtx_py as trtx

MODEL = Path(__file__).parent / "digits" / "digits.onnx"
BACKEND = os.environ.get("TRTX_BACKEND", "mock")
IMAGE = {"image": np.zeros((1, 1, 8, 8), np.float32)}
REQUESTS = 200


async def serve(cuda_graphs: bool) -> None:
    async with trtx.open_engine(MODEL, backend=BACKEND, cuda_graphs=cuda_graphs) as engine:
        await engine.warmup(10)  # captures the shapes of the profile
        start = time.perf_counter()
        for _ in range(REQUESTS):
            await engine.infer(IMAGE)
        each_us = (time.perf_counter() - start) / REQUESTS * 1e6
        graphs = engine.statistics().graphs
        print(f"cuda_graphs={cuda_graphs}: {graphs.captured} shapes captured, {graphs.hits} requests replayed one")
        if BACKEND != "mock":  # whose time is a CPU's, and says nothing of graphs
            print(f"{each_us:.1f} us a request")


async def main() -> None:
    await serve(True)
    await serve(False)


asyncio.run(main())
