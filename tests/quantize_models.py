"""Small models and data for the tests of precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]


def make(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Sequence[int | str]],
    outputs: dict[str, Sequence[int | str]],
    weights: dict[str, Array] | None = None,
    opset: int = 17,
) -> onnx.ModelProto:
    """A float32 model; checked."""
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in row.items()]
        for row in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(list(nodes), "graph", values[0], values[1], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def cnn(seed: int = 0, opset: int = 17) -> onnx.ModelProto:
    """image [N, 1, 8, 8] -> probabilities [N, 4]: two convolutions, a pool, a Gemm, a Softmax."""
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> Array:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    node = helper.make_node
    return make(
        [
            node("Conv", ["image", "w1", "b1"], ["c1"], name="first", pads=[1, 1, 1, 1]),
            node("Relu", ["c1"], ["r1"], name="relu1"),
            node("Conv", ["r1", "w2"], ["c2"], name="second", pads=[1, 1, 1, 1]),
            node("MaxPool", ["c2"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
            node("Flatten", ["p"], ["f"], name="flatten", axis=1),
            node("Gemm", ["f", "w3", "b3"], ["logits"], name="dense", transB=1),
            node("Softmax", ["logits"], ["probabilities"], name="softmax", axis=1),
        ],
        {"image": ["N", 1, 8, 8]},
        {"probabilities": ["N", 4]},
        {"w1": weight(6, 1, 3, 3), "b1": weight(6, 1)[:, 0], "w2": weight(4, 6, 3, 3), "w3": weight(4, 64),
         "b3": np.zeros(4, np.float32)},
        opset,
    )  # fmt: skip


def images(count: int = 24, seed: int = 1) -> Array:
    """Inputs of ``cnn``."""
    return np.random.default_rng(seed).standard_normal((count, 1, 8, 8)).astype(np.float32)


def attention() -> onnx.ModelProto:
    """x [N, S, 16] -> y: matrix products of activations, a softmax and a normalization, with casts of its own."""
    rng = np.random.default_rng(3)
    weights = {
        name: (rng.standard_normal((16, 16)) / 4).astype(np.float32) for name in ("wq", "wk", "wv")
    } | {"scale": np.float32(0.25), "ones": np.ones(16, np.float32), "zeros": np.zeros(16, np.float32)}  # fmt: skip
    node = helper.make_node
    return make(
        [
            node("MatMul", ["x", "wq"], ["q"], name="q"),
            node("MatMul", ["x", "wk"], ["k"], name="k"),
            node("MatMul", ["x", "wv"], ["v"], name="v"),
            node("Transpose", ["k"], ["kt"], name="kt", perm=[0, 2, 1]),
            node("MatMul", ["q", "kt"], ["s"], name="scores"),
            node("Mul", ["s", "scale"], ["scaled"], name="scaled"),
            node("Greater", ["scaled", "scale"], ["large"], name="large"),
            node("Cast", ["large"], ["mask"], name="mask", to=TensorProto.FLOAT),
            node("Add", ["scaled", "mask"], ["masked"], name="masked"),
            node("Softmax", ["masked"], ["p"], name="softmax", axis=-1),
            node("MatMul", ["p", "v"], ["o"], name="mixed"),
            node("Add", ["o", "x"], ["sum"], name="residual"),
            node("LayerNormalization", ["sum", "ones", "zeros"], ["y"], name="norm", axis=-1),
        ],
        {"x": ["N", "S", 16]},
        {"y": ["N", "S", 16]},
        weights,
    )


def recurrent() -> onnx.ModelProto:
    """x [2, 6, 32] -> y [6, 2, 5]: two products, a change of layout, an LSTM, a product."""
    rng = np.random.default_rng(6)

    def weight(*shape: int) -> Array:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    node = helper.make_node
    return make(
        [
            node("MatMul", ["x", "w1"], ["a"], name="product"),
            node("MatMul", ["a", "w2"], ["b"], name="feeds"),
            node("Transpose", ["b"], ["c"], name="swap", perm=[1, 0, 2]),
            node("LSTM", ["c", "wi", "wh"], ["h"], name="lstm", hidden_size=4),
            node("Squeeze", ["h", "one"], ["s"], name="squeeze"),
            node("MatMul", ["s", "w3"], ["y"], name="last"),
        ],
        {"x": [2, 6, 32]},
        {"y": [6, 2, 5]},
        {"w1": weight(32, 32), "w2": weight(32, 32), "wi": weight(1, 16, 32), "wh": weight(1, 16, 4),
         "w3": weight(4, 5), "one": np.array([1])},
    )  # fmt: skip
