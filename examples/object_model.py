"""Every object by hand: what open_engine does, one owner at a time. Runs on the mock."""

import asyncio
from pathlib import Path

import numpy as np

import trtx_py as trtx

MODEL = Path(__file__).parent / "digits" / "digits.onnx"


async def build(logger: trtx.Logger) -> trtx.Plan:
    """ONNX in, plan out. Leaving each block closes what it opened, children first."""
    async with trtx.Builder(logger, backend="mock") as builder:
        network = builder.create_network()
        network.parse_onnx(MODEL)
        config = builder.create_config()
        config.workspace_bytes = 64 << 20
        profile = builder.create_optimization_profile()
        profile.set_shape("image", (1, 1, 8, 8), (8, 1, 8, 8), (32, 1, 8, 8))
        config.add_optimization_profile(profile)
        return await builder.build_serialized_network(network, config)


async def run(logger: trtx.Logger, plan: trtx.Plan) -> None:
    async with trtx.Runtime(logger, backend="mock") as runtime:
        engine = await runtime.deserialize(plan)
        for tensor in engine.io_tensors:
            print(tensor, "profiles:", [str(r) for r in tensor.ranges])

        context = engine.create_execution_context()
        outputs = await context.execute({"image": np.full((2, 1, 8, 8), 8, np.float32)})
        print("probabilities", outputs["probabilities"].shape, outputs["probabilities"].sum(axis=1).round(3))

        try:
            engine.close()
        except trtx.BorrowedError as error:  # the context is still open, and the error says which
            print("refused:", str(error).splitlines()[0])

        for live in trtx.live_objects():
            print("open:", live)


async def main() -> None:
    async with trtx.Logger(trtx.Severity.WARNING) as logger:
        plan = await build(logger)
        await run(logger, plan)
    print("left open:", trtx.live_objects())


asyncio.run(main())
