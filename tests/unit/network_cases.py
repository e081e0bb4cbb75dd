"""Each layer once: how to add it, what to feed, and what numpy makes of that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import trtx_py as trtx

Array = Any
Build = Callable[[trtx.Network, dict[str, trtx.NetworkTensor]], Any]


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        build: adds layers to a network that has the inputs; returns a layer, or the tensors to be marked.
        feeds: inputs by name.
        expected: outputs, in order; None where only the backend knows the numbers.
        builds: empty, or for a layer that tensorrt-rtx 1.7 has and cannot build, what its log says.
    """

    name: str
    build: Build
    feeds: Mapping[str, Array]
    expected: tuple[Array, ...] | None
    builds: str = ""


_RNG = np.random.default_rng(5)
X = _RNG.standard_normal((2, 4, 6, 6)).astype(np.float32)
M = _RNG.standard_normal((2, 3, 4)).astype(np.float32)
V = np.abs(M) / 4 + np.float32(0.1)
K = _RNG.standard_normal((8, 4, 3, 3)).astype(np.float32)
B = _RNG.standard_normal(8).astype(np.float32)
INTS = np.array([[7, -7, 6], [5, -5, 0]], np.int32)
DIVISORS = np.array([[2, 2, 3], [-3, 3, 4]], np.int32)
TRUTH = np.array([[True, False, True], [False, False, True]])


def conv(x: Array, w: Array, b: Array | None, stride: int = 1, pad: int = 0, groups: int = 1) -> Array:
    n, _, h, width = x.shape
    maps, depth, kh, kw = w.shape
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    rows, columns = (h + 2 * pad - kh) // stride + 1, (width + 2 * pad - kw) // stride + 1
    y = np.zeros((n, maps, rows, columns), np.float64)
    for m in range(maps):
        first = m // (maps // groups) * depth
        for i in range(rows):
            for j in range(columns):
                part = padded[:, first : first + depth, i * stride : i * stride + kh, j * stride : j * stride + kw]
                y[:, m, i, j] = (part * w[m]).sum((1, 2, 3))
    return (y if b is None else y + b[None, :, None, None]).astype(np.float32)


def pool(x: Array, size: int, stride: int, how: Callable[..., Array]) -> Array:
    rows = (x.shape[2] - size) // stride + 1
    y = np.zeros((*x.shape[:2], rows, rows), np.float32)
    for i in range(rows):
        for j in range(rows):
            y[:, :, i, j] = how(x[:, :, i * stride : i * stride + size, j * stride : j * stride + size], axis=(2, 3))
    return y


def softmax(x: Array, axis: int = -1) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


_erf = np.vectorize(math.erf, otypes=[np.float32])


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def normalized(x: Array, axes: tuple[int, ...], epsilon: float = 1e-5) -> Array:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)


ACTIVATIONS: dict[str, tuple[dict[str, float], Callable[[Array], Array]]] = {
    "relu": ({}, lambda x: np.maximum(x, 0)),
    "sigmoid": ({}, sigmoid),
    "tanh": ({}, np.tanh),
    "leaky_relu": ({"alpha": 0.2}, lambda x: np.where(x > 0, x, 0.2 * x)),
    "elu": ({"alpha": 0.5}, lambda x: np.where(x > 0, x, 0.5 * (np.exp(x) - 1))),
    "selu": ({"alpha": 1.5, "beta": 1.1}, lambda x: 1.1 * np.where(x > 0, x, 1.5 * (np.exp(x) - 1))),
    "softsign": ({}, lambda x: x / (1 + np.abs(x))),
    "softplus": ({"alpha": 2.0, "beta": 0.5}, lambda x: 2 * np.log(1 + np.exp(0.5 * x))),
    "clip": ({"alpha": -0.5, "beta": 0.25}, lambda x: np.clip(x, -0.5, 0.25)),
    "hard_sigmoid": ({"alpha": 0.3, "beta": 0.4}, lambda x: np.clip(0.3 * x + 0.4, 0, 1)),
    "scaled_tanh": ({"alpha": 2.0, "beta": 0.5}, lambda x: 2 * np.tanh(0.5 * x)),
    "thresholded_relu": ({"alpha": 0.4}, lambda x: np.where(x > 0.4, x, 0)),
    "gelu_erf": ({}, lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2)))),
    "gelu_tanh": ({}, lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
}
UNARY: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "recip": lambda x: 1 / x, "abs": np.abs, "neg": np.negative,
    "sin": np.sin, "cos": np.cos, "tan": np.tan, "sinh": np.sinh, "cosh": np.cosh, "asin": np.arcsin,
    "acos": np.arccos, "atan": np.arctan, "asinh": np.arcsinh, "acosh": lambda x: np.arccosh(x), "atanh": np.arctanh,
    "ceil": np.ceil, "floor": np.floor, "erf": _erf, "sign": np.sign, "round": np.round, "isinf": np.isinf,
    "isnan": np.isnan,
}  # fmt: skip
ELEMENTWISE: dict[str, Callable[[Array, Array], Array]] = {
    "sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum, "sub": np.subtract, "div": np.divide,
    "pow": np.power, "floor_div": np.floor_divide, "equal": np.equal, "greater": np.greater, "less": np.less,
}  # fmt: skip


def _activation(kind: str) -> Case:
    given, expected = ACTIVATIONS[kind]
    alpha, beta = given.get("alpha"), given.get("beta")
    return Case(
        f"activation_{kind}", lambda n, t: n.add_activation(t["x"], kind, alpha, beta), {"x": M},
        (expected(M).astype(np.float32),),
    )  # fmt: skip


def _unary(kind: str) -> Case:
    x = V + 1 if kind == "acosh" else V
    return Case(f"unary_{kind}", lambda n, t: n.add_unary(t["x"], kind), {"x": x}, (UNARY[kind](x),))


def _elementwise(kind: str) -> Case:
    other = V[:, :1]
    expected = ELEMENTWISE[kind](V, other)
    return Case(
        f"elementwise_{kind}", lambda n, t: n.add_elementwise(t["a"], t["b"], kind), {"a": V, "b": other}, (expected,)
    )


def _boxes(n: trtx.Network, t: dict[str, trtx.NetworkTensor]) -> Any:
    return n.add_nms(t["boxes"], t["scores"], 2, iou_threshold=0.5, score_threshold=0.1)


def _quantized(n: trtx.Network, t: dict[str, trtx.NetworkTensor]) -> Any:
    scale = n.add_constant(np.array([0.02, 0.03, 0.04], np.float32)).output
    narrow = n.add_quantize(t["x"], scale, "int8", axis=1).output
    return n.add_dequantize(narrow, scale, axis=1)


def _block_weights(n: trtx.Network, t: dict[str, trtx.NetworkTensor]) -> Any:
    """INT4 weights with a scale for each block of two rows."""
    import ml_dtypes

    weights = n.add_constant(np.arange(-8, 8).reshape(4, 4).astype(ml_dtypes.int4)).output
    scale = n.add_constant(np.array([[0.5] * 4, [0.25] * 4], np.float32)).output
    return n.add_dequantize(weights, scale)


def _attention_mask(keep: Array) -> Array:
    return softmax(np.where(keep, Q @ Q.swapaxes(2, 3), -np.inf)) @ Q


Q = _RNG.standard_normal((1, 2, 5, 8)).astype(np.float32)
_DECAY = np.tril(np.ones((5, 5), bool))
_BOXES = np.array([[[0, 0, 1, 1], [0, 0, 1, 0.9], [0, 2, 1, 3], [4, 4, 5, 5]]], np.float32)
_SCORES = np.array([[[0.9], [0.8], [0.7], [0.05]]], np.float32)

CASES = [
    *map(_activation, ACTIVATIONS),
    *map(_unary, UNARY),
    *map(_elementwise, ELEMENTWISE),
    Case("unary_not", lambda n, t: n.add_unary(t["x"], "not"), {"x": TRUTH}, (~TRUTH,)),
    *(
        Case(f"elementwise_{kind}", lambda n, t, kind=kind: n.add_elementwise(t["a"], t["b"], kind),  # type: ignore[misc]
             {"a": TRUTH, "b": TRUTH[::-1].copy()}, (how(TRUTH, TRUTH[::-1]),))
        for kind, how in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor))
    ),
    Case("elementwise_floor_div_of_integers", lambda n, t: n.add_elementwise(t["a"], t["b"], "floor_div"),
         {"a": INTS, "b": DIVISORS}, (INTS // DIVISORS,)),
    Case("scale_channel", lambda n, t: n.add_scale(t["x"], "channel", B[:4], np.abs(B[:4])), {"x": X},
         (X * np.abs(B[:4])[:, None, None] + B[:4, None, None],)),
    Case("scale_uniform_power", lambda n, t: n.add_scale(t["x"], "uniform", [0.0], [2.0], [2.0]), {"x": X},
         ((X * 2) ** 2,)),
    Case("select", lambda n, t: n.add_select(t["c"], t["a"], t["b"]), {"c": TRUTH, "a": INTS, "b": DIVISORS},
         (np.where(TRUTH, INTS, DIVISORS),)),
    Case("parametric_relu",
         lambda n, t: n.add_parametric_relu(t["x"], n.add_constant(B[:4].reshape(1, 1, 4)).output), {"x": M},
         (np.where(M > 0, M, M * B[:4]),)),
    Case("cast", lambda n, t: n.add_cast(t["x"], "int32"), {"x": M * 9}, ((M * 9).astype(np.int32),)),
    Case("identity", lambda n, t: n.add_identity(t["x"]), {"x": M}, (M,)),
    Case("constant", lambda n, t: n.add_elementwise(t["x"], n.add_constant(B[:4].reshape(1, 1, 4)).output, "sum"),
         {"x": M}, (M + B[:4],)),
    Case("fill_linspace",
         lambda n, t: n.add_elementwise(t["x"], n.add_fill((5,), "linspace", 1.0, 0.5).output, "sum"),
         {"x": np.zeros(5, np.float32)}, (1 + 0.5 * np.arange(5, dtype=np.float32),)),
    Case("fill_random",
         lambda n, t: n.add_elementwise(t["x"], n.add_fill((3, 5), "random_uniform", 2, 3).output, "sum"),
         {"x": np.zeros((3, 5), np.float32)}, None),
    Case("convolution_nd", lambda n, t: n.add_convolution_nd(t["x"], 8, 3, K, B, stride=2, padding=1), {"x": X},
         (conv(X, K, B, 2, 1),)),
    Case("convolution_grouped", lambda n, t: n.add_convolution_nd(t["x"], 8, (3, 3), K[:, :2], num_groups=2),
         {"x": X}, (conv(X, K[:, :2], None, groups=2),)),
    Case("convolution_same", lambda n, t: n.add_convolution_nd(t["x"], 8, 3, K, padding_mode="same_upper"), {"x": X},
         (conv(X, K, None, 1, 1),)),
    Case("convolution_of_tensor_kernel",
         lambda n, t: n.add_convolution_nd(t["x"], 8, 3, n.add_constant(K).output), {"x": X}, (conv(X, K, None),)),
    Case("deconvolution_nd", lambda n, t: n.add_deconvolution_nd(t["x"], 3, 1, K[0, :, 0, :], stride=2), {"x": X},
         (np.einsum("nchw,cm->nmhw", X, K[0, :, 0, :]).repeat(2, 2).repeat(2, 3)[:, :, :11, :11]
          * (np.add.outer(np.arange(11) % 2, np.arange(11) % 2) == 0),)),
    Case("pooling_max", lambda n, t: n.add_pooling_nd(t["x"], "max", 2, stride=2), {"x": X}, (pool(X, 2, 2, np.max),)),
    Case("pooling_average", lambda n, t: n.add_pooling_nd(t["x"], "average", (3, 3)), {"x": X},
         (pool(X, 3, 1, np.mean),)),
    Case("pooling_blend", lambda n, t: n.add_pooling_nd(t["x"], "max_average_blend", 2, blend_factor=0.25), {"x": X},
         (0.75 * pool(X, 2, 1, np.max) + 0.25 * pool(X, 2, 1, np.mean),)),
    Case("matrix_multiply", lambda n, t: n.add_matrix_multiply(t["x"], "none", t["x"], "transpose"), {"x": M},
         (M @ M.swapaxes(1, 2),)),
    Case("matrix_multiply_vector", lambda n, t: n.add_matrix_multiply(t["x"], "none", t["v"], "vector"),
         {"x": M, "v": M[:, 0].copy()}, (np.einsum("bij,bj->bi", M, M[:, 0]),)),
    Case("einsum", lambda n, t: n.add_einsum([t["x"], t["x"]], "bij,bkj->bik"), {"x": M}, (M @ M.swapaxes(1, 2),)),
    Case("attention", lambda n, t: n.add_attention(t["q"], t["q"], t["q"]), {"q": Q},
         (softmax(Q @ Q.swapaxes(2, 3)) @ Q,)),
    Case("attention_causal", lambda n, t: n.add_attention(t["q"], t["q"], t["q"], causal="upper_left"), {"q": Q},
         (_attention_mask(_DECAY),)),
    Case("attention_mask",
         lambda n, t: n.add_attention(t["q"], t["q"], t["q"], mask=n.add_constant(_DECAY[None, None]).output),
         {"q": Q}, (_attention_mask(_DECAY),)),
    Case("reduce_avg", lambda n, t: n.add_reduce(t["x"], "avg", (2, -1), keep_dims=True), {"x": X},
         (X.mean((2, 3), keepdims=True),)),
    Case("reduce_max", lambda n, t: n.add_reduce(t["x"], "max", [1], keep_dims=False), {"x": X}, (X.max(1),)),
    Case("softmax", lambda n, t: n.add_softmax(t["x"], 1), {"x": M}, (softmax(M, 1),)),
    Case("ragged_softmax", lambda n, t: n.add_ragged_softmax(t["x"], t["bounds"]),
         {"x": M[:1], "bounds": np.array([[[4], [2], [1]]], np.int32)},
         (np.stack([np.r_[softmax(M[0, i, :k]), np.zeros(4 - k)] for i, k in enumerate((4, 2, 1))])[None]
          .astype(np.float32),)),
    Case("topk", lambda n, t: n.add_topk(t["x"], "max", 2, axis=-1), {"x": M},
         (-np.sort(-M, -1)[..., :2], np.argsort(-M, -1)[..., :2].astype(np.int32))),
    Case("normalization",
         lambda n, t: n.add_normalization(t["x"], n.add_constant(B[:4].reshape(1, 4, 1, 1)).output,
                                          n.add_constant(B[4:].reshape(1, 4, 1, 1)).output, (2, 3)),
         {"x": X}, (normalized(X, (2, 3)) * B[:4, None, None] + B[4:, None, None],)),
    Case("normalization_in_groups",
         lambda n, t: n.add_normalization(t["x"], n.add_constant(B[:4].reshape(1, 4, 1, 1)).output,
                                          n.add_constant(B[4:].reshape(1, 4, 1, 1)).output, (2, 3), num_groups=2),
         {"x": X},
         (normalized(X.reshape(2, 2, -1), (2,)).reshape(X.shape) * B[:4, None, None] + B[4:, None, None],)),
    Case("lrn", lambda n, t: n.add_lrn(t["x"], 3, 0.3, 0.75, 1.0), {"x": X},
         (X / (1 + 0.3 / 3 * np.stack([(X[:, max(c - 1, 0) : c + 2] ** 2).sum(1) for c in range(4)], 1)) ** 0.75,)),
    Case("cumulative", lambda n, t: n.add_cumulative(t["x"], 1, exclusive=True), {"x": M}, (M.cumsum(1) - M,)),
    Case("shuffle",
         lambda n, t: n.add_shuffle(t["x"], first_transpose=(0, 2, 3, 1), reshape=(0, -1, 2),
                                    second_transpose=(0, 2, 1)),
         {"x": X}, (X.transpose(0, 2, 3, 1).reshape(2, -1, 2).transpose(0, 2, 1),)),
    Case("concatenation", lambda n, t: n.add_concatenation([t["a"], t["b"]], axis=-1), {"a": M, "b": V},
         (np.concatenate([M, V], -1),)),
    Case("slice", lambda n, t: n.add_slice(t["x"], (0, 2, 1), (2, 3, 2), (1, -1, 2)), {"x": M},
         (M[:, ::-1, 1::2],)),
    *(
        Case(f"slice_{mode}", lambda n, t, mode=mode: n.add_slice(t["x"], (0, 0, -2), (2, 3, 8), (1, 1, 1), mode=mode),  # type: ignore[misc]
             {"x": M}, (np.pad(M, ((0, 0), (0, 0), (2, 2)), how),))  # type: ignore[call-overload]
        for mode, how in (("wrap", "wrap"), ("clamp", "edge"), ("reflect", "reflect"), ("fill", "constant"))
    ),
    Case("gather", lambda n, t: n.add_gather(t["x"], n.add_constant(np.array([2, 0], np.int32)).output, 1), {"x": M},
         (M[:, [2, 0]],)),
    Case("gather_element", lambda n, t: n.add_gather(t["x"], t["i"], 1, mode="element"),
         {"x": M[0], "i": np.array([[3, 0], [1, 1], [2, 0]], np.int32)},
         (np.take_along_axis(M[0], np.array([[3, 0], [1, 1], [2, 0]]), 1),)),
    Case("gather_nd", lambda n, t: n.add_gather(t["x"], t["i"], mode="nd"),
         {"x": M, "i": np.array([[0, 1], [1, 2]], np.int32)}, (M[[0, 1], [1, 2]],)),
    Case("scatter", lambda n, t: n.add_scatter(t["x"], t["i"], t["u"], "nd"),
         {"x": M, "i": np.array([[1]], np.int32), "u": V[:1].copy()}, (np.stack([M[0], V[0]]),)),
    Case("resize", lambda n, t: n.add_resize(t["x"], scales=(1, 1, 2, 2)), {"x": X},
         (X.repeat(2, 2).repeat(2, 3),)),
    Case("resize_linear",
         lambda n, t: n.add_resize(t["x"], shape=(2, 4, 11, 6), mode="linear",
                                   coordinate_transformation="align_corners"),
         {"x": X}, (np.stack([X[:, :, i // 2] if i % 2 == 0 else (X[:, :, i // 2] + X[:, :, i // 2 + 1]) / 2
                              for i in range(11)], 2),)),
    Case("padding", lambda n, t: n.add_padding(t["x"], (1, 0), (0, -2)), {"x": X},
         (np.pad(X, ((0, 0), (0, 0), (1, 0), (0, 0)))[..., :-2],)),
    Case("squeeze", lambda n, t: n.add_squeeze(t["x"], (0, -1)), {"x": M[:1, :, :1].copy()}, (M[0, :, 0],)),
    Case("unsqueeze", lambda n, t: n.add_unsqueeze(t["x"], (1,)), {"x": M}, (M[:, None],)),
    Case("shape", lambda n, t: n.add_shape(t["x"]), {"x": M}, (np.array([2, 3, 4], np.int64),)),
    Case("reverse_sequence", lambda n, t: n.add_reverse_sequence(t["x"], t["n"], batch_axis=0, sequence_axis=1),
         {"x": M, "n": np.array([2, 3], np.int32)}, (np.stack([M[0, [1, 0, 2]], M[1, ::-1]]),)),
    Case("grid_sample", lambda n, t: n.add_grid_sample(t["x"], t["g"], mode="nearest", align_corners=True),
         {"x": X, "g": np.array([[[[-1, -1], [1, 1]]]] * 2, np.float32)},
         (np.stack([X[:, :, 0, 0], X[:, :, 5, 5]], -1)[:, :, None],)),
    Case("one_hot",
         lambda n, t: n.add_one_hot(t["i"], n.add_constant(np.array([0, 1], np.float32)).output,
                                    n.add_constant(np.array(3, np.int32)).output, -1),
         {"i": np.array([2, 0], np.int32)}, (np.eye(3, dtype=np.float32)[[2, 0]],)),
    Case("non_zero", lambda n, t: n.add_non_zero(t["x"]), {"x": TRUTH},
         (np.stack(np.nonzero(TRUTH)).astype(np.int32),), builds="no runners that implement it"),
    Case("nms", _boxes, {"boxes": _BOXES, "scores": _SCORES},
         (np.array([[0, 0, 0], [0, 0, 2]], np.int32), np.array(2, np.int32)), builds="no runners that implement it"),
    Case("quantize", _quantized, {"x": M},
         (np.clip(np.round(M / np.array([[0.02], [0.03], [0.04]])), -128, 127).astype(np.float32)
          * np.array([[0.02], [0.03], [0.04]], np.float32),)),
    Case("dequantize_in_blocks",
         lambda n, t: n.add_matrix_multiply(t["x"], "none", _block_weights(n, t).output, "none"),
         {"x": M[0]},
         (M[0] @ (np.arange(-8, 8).reshape(4, 4) * np.array([0.5, 0.5, 0.25, 0.25])[:, None]).astype(np.float32),)),
]  # fmt: skip


def fill(network: trtx.Network, case: Case) -> list[str]:
    """Inputs, layers and outputs of a case; the names of the outputs."""
    tensors = {name: network.add_input(name, array.dtype, array.shape) for name, array in case.feeds.items()}
    made = case.build(network, tensors)
    names = []
    for index, tensor in enumerate(made.outputs):
        names.append(f"out{index}")
        network.mark_output(tensor, names[-1])
    return names
