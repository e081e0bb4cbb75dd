"""Dynamic batching: a thousand tasks with one image each, and few launches. Runs on the mock."""

import asyncio
import os
from pathlib import Path

import numpy as np

import trtx_py as trtx

MODEL = Path(__file__).parent / "digits" / "digits.onnx"
BACKEND = os.environ.get("TRTX_BACKEND", "mock")
PROFILE = {"image": ((1, 1, 8, 8), (32, 1, 8, 8), (32, 1, 8, 8))}


async def main() -> None:
    images = np.random.default_rng(0).integers(0, 17, (1000, 1, 1, 8, 8)).astype(np.float32)
    async with (
        trtx.open_engine(MODEL, backend=BACKEND, profiles=[PROFILE], lanes=2) as engine,
        trtx.DynamicBatcher(engine, max_batch_size=32, max_delay_s=0.002) as batcher,
    ):
        # Each caller has its own row back, and none knows of the others.
        answers = await asyncio.gather(*(batcher.infer({"image": image}, deadline_s=30) for image in images))
        statistics = batcher.statistics()
    digits = [int(answer["probabilities"].argmax()) for answer in answers]
    print("digits:", *digits[:20], "...")
    print(f"{statistics.completed} requests in {statistics.batches} batches of {statistics.batch_rows.mean:.1f} rows, "
          f"{statistics.bypassed} went to the idle engine directly")  # fmt: skip


asyncio.run(main())
