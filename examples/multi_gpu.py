"""Several GPUs: one plan on all of them. Runs on the mock, which has two devices here.

With TRTX_BACKEND=tensorrt_rtx (or another) it uses the GPUs that are there.
"""

import asyncio
import os
from pathlib import Path

import numpy as np

import trtx_py as trtx
from mock_backend import MockBackend

MODEL = Path(__file__).parent / "digits" / "digits.onnx"


async def main(backend: "str | MockBackend") -> None:
    print(trtx.device_count(backend), "devices")
    async with trtx.Builder(backend=backend) as builder:
        network = builder.create_network()
        network.parse_onnx(MODEL)
        config = builder.create_config()
        profile = builder.create_optimization_profile()
        profile.set_shape("image", (1, 1, 8, 8), (32, 1, 8, 8), (32, 1, 8, 8))
        config.add_optimization_profile(profile)
        plan = await builder.build_serialized_network(network, config)

    async with await trtx.MultiDevice.open(plan, backend=backend, lanes=2) as pool:
        images = np.zeros((1000, 1, 8, 8), np.float32)
        outputs = await pool.infer_many({"image": images})  # each device takes what it can; the order stays
        print(outputs["probabilities"].shape[0], "answers")
        for device in pool.statistics().devices:
            print(f"device {device.device}: {device.state}, {device.completed} launches")


named = os.environ.get("TRTX_BACKEND", "mock")
if named == "mock":
    two = MockBackend(devices=2)
    asyncio.run(main(two))
    two.close()
else:
    asyncio.run(main(named))
