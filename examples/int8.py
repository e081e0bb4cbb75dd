"""INT8: calibrate with samples, build, and measure what it costs against the FP32 model. Runs on the mock.

The mock rounds as INT8 does, so the error is real; the speed is a GPU's matter.
"""

import asyncio
import os
from pathlib import Path

import numpy as np

import trtx_py as trtx

MODEL = Path(__file__).parent / "digits" / "digits.onnx"
BACKEND = os.environ.get("TRTX_BACKEND", "mock")


async def main() -> None:
    # Use some hundred real samples: ranges are taken from what the activations are for them.
    samples = np.random.default_rng(0).integers(0, 17, (256, 1, 8, 8)).astype(np.float32)
    calibration = trtx.Calibration(samples[:128], method="entropy")

    async with trtx.open_engine(MODEL, backend=BACKEND, precision="int8", calibration=calibration) as engine:
        print("layers:", engine.plan_header.build_options["layers_by_precision"])
        found = await trtx.compare(MODEL, engine, samples[128:], calibration=calibration)

    error = found.outputs["probabilities"]
    print(f"against FP32: {error.snr_db:.1f} dB, largest difference {error.max_abs:.3f}, same digit {error.top1:.1%}")
    print("adds most:", found.adds_most)


asyncio.run(main())
