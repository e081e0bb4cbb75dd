"""From PyTorch: a module becomes ONNX in a process of its own, is compared with its source, and served.

    python examples/from_pytorch/serve.py                                # torch and onnxscript beside trtx_py
    python examples/from_pytorch/serve.py --python exporting/bin/python  # or in another environment

Serving runs on the mock, or where TRTX_BACKEND says.
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path

import numpy as np

import trtx_py as trtx

BACKEND = os.environ.get("TRTX_BACKEND", "mock")


async def main(python: str) -> int:
    try:
        made = await trtx.convert(
            "net:classifier",
            import_path=Path(__file__).parent,
            python=python,
            inputs={"input": (1, 1, 8, 8)},
            dynamic_axes={"input": {0: "batch"}},
            timeout_s=600,
        )
    except trtx.ConversionError as error:
        print(error, file=sys.stderr)
        if error.cause != "missing":
            raise
        print("name an interpreter that has torch and onnxscript with --python", file=sys.stderr)
        return 1
    report = made.report
    assert report.comparison is not None
    worst = max(output.max_abs_error for output in report.comparison.outputs)
    print(f"{report.format}, {report.producer}: ONNX opset {report.opset}, differs from its source by {worst:.1e}")
    async with trtx.open_engine(made.source, backend=BACKEND) as engine:
        outputs = await engine.infer({engine.io_tensors[0].name: np.zeros((3, 1, 8, 8), np.float32)})
        print({name: values.shape for name, values in outputs.items()})
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has torch and onnxscript")
    sys.exit(asyncio.run(main(parser.parse_args().python)))
