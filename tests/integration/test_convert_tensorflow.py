"""Real TensorFlow: a small Keras model in every kind of file, converted, and run on the mock with the same numbers.

Needs an interpreter with TensorFlow, which is not among the packages of the tests. Make one and name it:

    python -m venv .venv-tensorflow
    .venv-tensorflow/bin/pip install tensorflow-cpu tf2onnx
    export TRTX_TENSORFLOW_PYTHON=.venv-tensorflow/bin/python
    python -m pytest -m slow tests/integration/test_convert_tensorflow.py

scripts/test-long does that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx

PYTHON = os.environ.get("TRTX_TENSORFLOW_PYTHON") or sys.executable
TOLERANCE = 1e-4

_MAKE = """
import os, sys, numpy as np
os.chdir(sys.argv[1])
import tensorflow as tf, keras
from keras import layers
keras.utils.set_random_seed(5)
def make(activation):
    image, size = keras.Input((28, 28, 1), name="image"), keras.Input((2,), name="size")
    x = layers.Conv2D(8, 3, activation="relu", padding="same")(image)
    x = layers.BatchNormalization()(x)
    x = layers.MaxPool2D()(x)
    x = layers.Conv2D(16, 3, strides=2, activation="relu")(x)
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), size])
    digit = layers.Dense(10, activation="softmax", name="digit")(layers.Dense(32, activation=activation)(x))
    return keras.Model([image, size], [digit, layers.Dense(1, name="score")(x)])
model, plain = make("gelu"), make("tanh")
plain.set_weights(model.get_weights())
rng = np.random.default_rng(1)
inputs = {"image": rng.random((4, 28, 28, 1), np.float32), "size": rng.random((4, 2), np.float32)}
wanted = model([inputs["image"], inputs["size"]], training=False)
lite = plain([inputs["image"], inputs["size"]], training=False)
np.savez("expected.npz", lite_digit=lite[0].numpy(), lite_score=lite[1].numpy(),
         digit=wanted[0].numpy(), score=wanted[1].numpy(), **inputs)
model.save("m.keras")
model.save("m.h5")
model.export("saved")
open("m.tflite", "wb").write(tf.lite.TFLiteConverter.from_keras_model(plain).convert())
open("gelu.tflite", "wb").write(tf.lite.TFLiteConverter.from_keras_model(model).convert())
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2
function = tf.function(lambda image, size: model([image, size], training=False), input_signature=[
    tf.TensorSpec((None, 28, 28, 1), tf.float32, name="image"), tf.TensorSpec((None, 2), tf.float32, name="size")])
frozen = convert_variables_to_constants_v2(function.get_concrete_function())
open("m.pb", "wb").write(frozen.graph.as_graph_def().SerializeToString())
code = keras.Sequential([keras.Input((4,)), layers.Lambda(lambda t: t * 2)])
code.save("code.keras")
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        subprocess.run([PYTHON, "-c", "import tensorflow, tf2onnx"], capture_output=True).returncode != 0,
        reason=f"{PYTHON} has no tensorflow and tf2onnx; see the top of this file",
    ),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensorflow")
    subprocess.run([PYTHON, "-c", _MAKE, str(folder)], check=True, timeout=300, cwd=folder)
    return folder


@pytest.mark.parametrize("name", ["m.keras", "m.h5", "saved", "m.tflite", "m.pb"])
async def test_keras_model(name: str, files: Path) -> None:
    made = await trtx.convert(files / name, python=PYTHON, target="mock", tolerance=TOLERANCE, timeout_s=600)
    report = made.report
    assert report.comparison is not None, report.notes
    assert report.comparison.samples >= 1
    assert report.operators is not None
    assert report.operators.supported, report.operators.issues
    for output in report.comparison.outputs:
        print(f"{report.format} {output.name}: {output.max_abs_error:.2e} of {output.max_abs_value:.3g}")
    assert "tensorflow" not in sys.modules or sys.executable == PYTHON
    with np.load(files / "expected.npz") as file:
        expected = dict(file)
    async with trtx.open_engine(made.source, backend="mock") as engine:
        names = [tensor.name for tensor in engine.io_tensors if tensor.mode is trtx.TensorMode.INPUT]
        given = {one: expected["image" if "image" in one else "size"] for one in names}
        found = {array.shape[-1]: array for array in (await engine.infer(given)).values()}
    kind = "lite_" if name == "m.tflite" else ""
    for columns, output_name in ((10, "digit"), (1, "score")):
        wanted = expected[kind + output_name]
        print(f"through open_engine: {float(np.max(np.abs(found[columns] - wanted))):.2e}")
        np.testing.assert_allclose(found[columns], wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "options", "cause", "text"),
    [
        ("code.keras", {}, "refused", "trust=True"),
        ("saved", {"options": {"signature": "training"}}, "refused", "serving_default"),
        ("saved", {"inputs": {"picture": (1, 2)}}, "refused", "the model's inputs are image, size"),
        ("m.pb", {"options": {"output_names": ["nowhere"]}}, "refused", "nowhere"),
        ("gelu.tflite", {}, "failed", "TFL_GELU"),
        ("m.keras", {"inputs": {"image": (1, 28)}}, "refused", "4 dimensions"),
    ],
)
async def test_what_is_refused(name: str, options: Any, cause: str, text: str, files: Path) -> None:
    with pytest.raises(trtx.ConversionError) as caught:
        await trtx.convert(files / name, python=PYTHON, target="mock", **options)
    assert caught.value.cause == cause, str(caught.value)
    assert text in str(caught.value)


@pytest.mark.parametrize("name", ["m.keras", "m.h5", "m.tflite"])
async def test_damaged_file(name: str, files: Path, tmp_path: Path) -> None:
    content = (files / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(trtx.ConversionError) as caught:
        await trtx.convert(path, python=PYTHON, target="mock")
    # TensorFlow Lite maps the file and trusts it: whether it notices, or crashes, depends on what is missing.
    allowed = ("damaged", "crashed") if name == "m.tflite" else ("damaged",)
    assert caught.value.cause in allowed, str(caught.value)
