"""The smallest program: one model, one answer. Run it with TRTX_BACKEND=mock where there is no GPU."""

import asyncio
from pathlib import Path

import numpy as np

import trtx_py as trtx

MODEL = Path(__file__).parent / "digits" / "digits.onnx"


async def main() -> None:
    async with trtx.open_engine(MODEL) as engine:
        outputs = await engine.infer({"image": np.zeros((1, 1, 8, 8), np.float32)})
        print(outputs["probabilities"].round(3))


asyncio.run(main())
