"""Trains the digit classifier of the demo and writes it as ONNX.

    python examples/digits/train.py

Real training on real data: 1,347 of scikit-learn's 1,797 handwritten digits, each also shifted by one pixel in four
directions. The other 450 are looked at once, at the end. Needs scikit-learn and onnxruntime.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import digits_data as data
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

MODEL = Path(__file__).with_name("digits.onnx")
WANTED_ACCURACY = 0.97
MAX_BYTES = 200_000

Floats = npt.NDArray[np.float32]


def shifted(images: Floats, down: int, right: int) -> Floats:
    """The same strokes one pixel further; what leaves the image is lost, what enters is background."""
    padded: Floats = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    return padded[:, :, 1 - down : 9 - down, 1 - right : 9 - right]


def features(images: Floats) -> Floats:
    """What the ONNX model does to raw pixels before its first layer."""
    return (images.reshape(len(images), 64) / 16).astype(np.float32)


def train(digits: data.Digits) -> MLPClassifier:
    moves = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]
    images = np.concatenate([shifted(digits.images, *move) for move in moves])
    labels = np.tile(digits.labels, len(moves))
    classifier = MLPClassifier(
        hidden_layer_sizes=(128, 64),
        alpha=1e-3,
        max_iter=120,  # chosen on a validation split of the training images
        n_iter_no_change=120,
        random_state=data.SEED,
    )
    with warnings.catch_warnings():
        # The number of passes is fixed, so that the result is; scikit-learn warns that it has not converged.
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(features(images), labels)
    return classifier


def to_onnx(classifier: MLPClassifier, metadata: dict[str, str]) -> onnx.ModelProto:
    """image float32 [batch, 1, 8, 8], 0 to 16 -> probabilities float32 [batch, 10]."""
    initializers = [numpy_helper.from_array(np.array(1 / 16, dtype=np.float32), "scale")]
    nodes = [
        helper.make_node("Mul", ["image", "scale"], ["scaled"], name="normalise"),
        helper.make_node("Flatten", ["scaled"], ["hidden0"], name="flatten", axis=1),
    ]
    layers = list(zip(classifier.coefs_, classifier.intercepts_, strict=True))
    for number, (weights, bias) in enumerate(layers):
        last = number == len(layers) - 1
        initializers.append(numpy_helper.from_array(weights.astype(np.float32), f"weights{number}"))
        initializers.append(numpy_helper.from_array(bias.astype(np.float32), f"bias{number}"))
        total = "logits" if last else f"total{number}"
        names = [f"hidden{number}", f"weights{number}", f"bias{number}"]
        nodes.append(helper.make_node("Gemm", names, [total], name=f"layer{number}"))
        if not last:
            nodes.append(helper.make_node("Relu", [total], [f"hidden{number + 1}"], name=f"relu{number}"))
    nodes.append(helper.make_node("Softmax", ["logits"], ["probabilities"], name="softmax", axis=1))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="trtx_py examples")
    model.ir_version = 8  # what opset 17 came with, so that older readers take it
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> None:
    training, held_out = data.load()
    classifier = train(training)
    indices = data.held_out_indices(len(training) + len(held_out))
    metadata = {"data": "sklearn.datasets.load_digits", "held_out": data.fingerprint(indices)}
    serialized = to_onnx(classifier, metadata).SerializeToString()

    session = onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    probabilities = np.asarray(session.run(["probabilities"], {"image": held_out.images})[0])
    expected = classifier.predict_proba(features(held_out.images))
    difference = float(np.abs(probabilities - expected).max())
    accuracy = float((probabilities.argmax(axis=1) == held_out.labels).mean())
    print(f"accuracy {accuracy:.4f} on {len(held_out)} held-out digits; ONNX is off scikit-learn by {difference:.1e}")
    if difference > 1e-4:
        raise SystemExit("the ONNX model does not compute what scikit-learn's does")
    if accuracy < WANTED_ACCURACY:
        raise SystemExit(f"accuracy below {WANTED_ACCURACY}: the model is not written")
    if len(serialized) > MAX_BYTES:
        raise SystemExit(f"{len(serialized)} bytes are more than {MAX_BYTES}: the model is not written")
    MODEL.write_bytes(serialized)
    print(f"wrote {MODEL} ({len(serialized):,} bytes)")


if __name__ == "__main__":
    main()
