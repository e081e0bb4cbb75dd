"""From TensorFlow: a Keras model becomes ONNX in a process of its own, is compared with its source, and served.

    python examples/from_tensorflow.py                                # tensorflow and tf2onnx beside trtx_py
    python examples/from_tensorflow.py --python exporting/bin/python  # or in another environment
    python examples/from_tensorflow.py --model my.keras               # a model of yours

Serving runs on the mock, or where TRTX_BACKEND says.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import trtx_py as trtx

BACKEND = os.environ.get("TRTX_BACKEND", "mock")

#: Run by the interpreter that has TensorFlow.
SAVE = """
import sys, keras
keras.utils.set_random_seed(0)
keras.Sequential([
    keras.Input((8, 8, 1), name="image"), keras.layers.Conv2D(8, 3, activation="relu"),
    keras.layers.Flatten(), keras.layers.Dense(10, activation="softmax"),
]).save(sys.argv[1])
"""


def small_model(python: str, folder: str) -> Path:
    """A Keras model to convert, saved in the folder."""
    path = Path(folder) / "small.keras"
    said = subprocess.run([python, "-c", SAVE, str(path)], capture_output=True, text=True, check=False)
    if said.returncode:
        last = (said.stderr.strip().splitlines() or ["no message"])[-1]
        sys.exit(f"{python} cannot make a Keras model ({last}): name one that has tensorflow and tf2onnx with --python")
    return path


async def main(python: str, model: Path) -> None:
    made = await trtx.convert(model, python=python, timeout_s=600)
    report = made.report
    assert report.comparison is not None
    worst = max(output.max_abs_error for output in report.comparison.outputs)
    print(f"{report.format}, {report.producer}: ONNX opset {report.opset}, differs from its source by {worst:.1e}")
    async with trtx.open_engine(made.source, backend=BACKEND) as engine:
        given = [tensor for tensor in engine.io_tensors if tensor.ranges]
        shapes = {tensor.name: tuple(2 if size < 0 else size for size in tensor.shape) for tensor in given}
        outputs = await engine.infer({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
        print({name: values.shape for name, values in outputs.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has tensorflow and tf2onnx")
    parser.add_argument("--model", type=Path, help="a model to convert; without it a small one is made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or small_model(arguments.python, folder)
        asyncio.run(main(arguments.python, model))
