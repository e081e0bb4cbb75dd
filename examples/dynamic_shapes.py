"""Dynamic shapes: one engine with two optimization profiles, and what lies in none of them. Runs on the mock.

With TRTX_BACKEND=tensorrt_rtx (or another) it runs on a GPU.
"""

import asyncio
import os
from pathlib import Path

import numpy as np

import trtx_py as trtx

MODEL = Path(__file__).parent / "digits" / "digits.onnx"
BACKEND = os.environ.get("TRTX_BACKEND", "mock")

#: (smallest, the one to be fastest at, largest) for each input; a profile for each way in which the model is used.
ONE_BY_ONE = {"image": ((1, 1, 8, 8), (1, 1, 8, 8), (4, 1, 8, 8))}
IN_BULK = {"image": ((16, 1, 8, 8), (64, 1, 8, 8), (128, 1, 8, 8))}


async def main() -> None:
    async with trtx.open_engine(MODEL, backend=BACKEND, profiles=[ONE_BY_ONE, IN_BULK]) as engine:
        (image,) = (tensor for tensor in engine.io_tensors if tensor.name == "image")
        for number, shapes in enumerate(image.ranges):
            print(f"profile {number}: {shapes}")
        for rows in (1, 4, 16, 128):
            outputs = await engine.infer({"image": np.zeros((rows, 1, 8, 8), np.float32)})
            print(rows, "images:", outputs["probabilities"].shape)
        for rows in (8, 129):  # between the profiles, and beyond them
            try:
                await engine.infer({"image": np.zeros((rows, 1, 8, 8), np.float32)})
            except trtx.ShapeError as error:
                print(rows, "images are refused:", *str(error).split())


asyncio.run(main())
