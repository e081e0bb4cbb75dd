"""Layers that multiply and add up: convolutions, matrix products, attention; and pooling, which slides like them."""

from __future__ import annotations

import math
from typing import Any

from .._arguments import checked_int
from .._errors import DTypeError, InvalidArgumentError, ShapeError
from .._types import Array, DataType, Shape
from . import _checks as check
from ._checks import Enumerator, LayerMethods, Weights, opened
from ._definition import LayerDefinition, LayerRequest, VendorNetwork
from ._onnx_graph import OnnxGraph
from ._tensors import Layer, NetworkTensor

_SAME = {"SAME_UPPER": "SAME_UPPER", "SAME_LOWER": "SAME_LOWER"}
_PADDING_MODES = ("EXPLICIT_ROUND_DOWN", *_SAME)
_POOLING_MODES = ("EXPLICIT_ROUND_DOWN", "EXPLICIT_ROUND_UP", *_SAME)
_POOLING = ("MAX", "AVERAGE", "MAX_AVERAGE_BLEND")
_MATRICES = ("NONE", "TRANSPOSE", "VECTOR")
_CAUSAL = ("NONE", "UPPER_LEFT", "LOWER_RIGHT")


def _window(r: LayerRequest) -> dict[str, Any]:
    """Stride and padding as ONNX has them."""
    if r["padding_mode"] in _SAME:
        return {"strides": r["stride"], "auto_pad": r["padding_mode"]}
    return {"strides": r["stride"], "pads": [*r["pre_padding"], *r["post_padding"]]}


def _slide(v: VendorNetwork, layer: Any, r: LayerRequest) -> None:
    v.set(layer, "stride_nd", r["stride"])
    v.set(layer, "pre_padding", r["pre_padding"])
    v.set(layer, "post_padding", r["post_padding"])
    v.set(layer, "padding_mode", v.member("PaddingMode", r["padding_mode"]))


def _lower_convolution(operator: str) -> Any:
    def lower(g: OnnxGraph, r: LayerRequest) -> None:
        given = {role: g.constant(array, r.weights_name(role)) for role, array in r.weights.items()}
        kernel = r.inputs["kernel"].name if "kernel" in r.inputs else given["kernel"]
        bias = [given["bias"]] if "bias" in given else []
        g.node(
            operator, [r.input.name, kernel, *bias], r.outputs, kernel_shape=r["kernel_shape"],
            dilations=r["dilation"], group=r["num_groups"], **_window(r),
        )  # fmt: skip

    return lower


def _call_convolution(method: str) -> Any:
    def call(v: VendorNetwork, r: LayerRequest) -> Any:
        dtype = r.input.dtype
        kernel, bias = (v.weights(r.weights.get(role), dtype) for role in ("kernel", "bias"))
        layer = v.add(method, v.tensor(r.input), r["num_output_maps"], r["kernel_shape"], kernel, bias)
        if "kernel" in r.inputs:
            layer.set_input(1, v.tensor(r.inputs["kernel"]))
        _slide(v, layer, r)
        v.set(layer, "dilation_nd", r["dilation"])
        v.set(layer, "num_groups", r["num_groups"])
        return layer

    return call


def _lower_pooling(g: OnnxGraph, r: LayerRequest) -> None:
    window = {"kernel_shape": r["window_size"], **_window(r)}
    if r["padding_mode"] == "EXPLICIT_ROUND_UP":
        window["ceil_mode"] = 1
    padded = 0 if r["average_count_excludes_padding"] else 1
    kind, x = r["type"], r.input.name
    if kind == "MAX":
        g.node("MaxPool", [x], r.outputs, **window)
    elif kind == "AVERAGE":
        g.node("AveragePool", [x], r.outputs, count_include_pad=padded, **window)
    else:
        most, mean = g.node("MaxPool", [x], **window), g.node("AveragePool", [x], count_include_pad=padded, **window)
        share, dtype = r["blend_factor"], r.input.dtype
        parts = [g.node("Mul", [part, g.scalar(w, dtype)]) for part, w in ((most, 1 - share), (mean, share))]
        g.node("Add", parts, r.outputs)


def _call_pooling(v: VendorNetwork, r: LayerRequest) -> Any:
    layer = v.add("add_pooling_nd", v.tensor(r.input), v.member("PoolingType", r["type"]), r["window_size"])
    _slide(v, layer, r)
    v.set(layer, "average_count_excludes_padding", r["average_count_excludes_padding"])
    if r["type"] == "MAX_AVERAGE_BLEND":
        v.set(layer, "blend_factor", r["blend_factor"])
    return layer


def _swap_last(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


def _lower_matrix_multiply(g: OnnxGraph, r: LayerRequest) -> None:
    operands, vectors = [], []
    for role, op, missing in (("input0", r["op0"], -2), ("input1", r["op1"], -1)):
        facts = r.inputs[role]
        name = facts.name
        if op == "TRANSPOSE":
            name = g.node("Transpose", [name], perm=_swap_last(facts.rank))
        elif op == "VECTOR":
            name = g.node("Unsqueeze", [name, g.ints([missing])])
            vectors.append(missing)
        operands.append(name)
    if not vectors:
        g.node("MatMul", operands, r.outputs)
    else:
        g.node("Squeeze", [g.node("MatMul", operands), g.ints(vectors)], r.outputs)


def _call_matrix_multiply(v: VendorNetwork, r: LayerRequest) -> Any:
    ops = [v.member("MatrixOperation", r[op]) for op in ("op0", "op1")]
    return v.add("add_matrix_multiply", v.tensor(r.inputs["input0"]), ops[0], v.tensor(r.inputs["input1"]), ops[1])


def _lower_einsum(g: OnnxGraph, r: LayerRequest) -> None:
    g.node("Einsum", [facts.name for facts in r.inputs.values()], r.outputs, equation=r["equation"])


def _call_einsum(v: VendorNetwork, r: LayerRequest) -> Any:
    return v.add("add_einsum", [v.tensor(facts) for facts in r.inputs.values()], r["equation"])


#: What is added to scores that must not count: far from overflow in each type.
_MASKED = {DataType.FLOAT: -1e30, DataType.HALF: -6e4, DataType.BF16: -1e30}


def _lower_attention(g: OnnxGraph, r: LayerRequest) -> None:
    query, key, value = (r.inputs[role] for role in ("query", "key", "value"))
    scores = g.node("MatMul", [query.name, g.node("Transpose", [key.name], perm=[0, 1, 3, 2])])
    keep = ""
    if "mask" in r.inputs:
        mask = r.inputs["mask"]
        if mask.dtype is DataType.BOOL:
            keep = mask.name
        else:
            scores = g.node("Add", [scores, mask.name])
    elif r["causal"] != "NONE":
        keep = _causal_mask(g, query.name, key.name, r["causal"])
    if r["norm_op"] == "SOFTMAX":
        if keep:
            scores = g.node("Where", [keep, scores, g.scalar(_MASKED[query.dtype], query.dtype)])
        scores = g.node("Softmax", [scores], axis=-1)
    elif keep:
        scores = g.node("Where", [keep, scores, g.scalar(0, query.dtype)])
    g.node("MatMul", [scores, value.name], r.outputs)


def _causal_mask(g: OnnxGraph, query: str, key: str, kind: str) -> str:
    """Row i may look at column j if j <= i, counted from the upper left or the lower right corner."""
    import onnx

    rows, columns = (g.node("Shape", [name], start=2, end=3) for name in (query, key))
    zero, one, none = g.scalar(0, DataType.INT64), g.scalar(1, DataType.INT64), g.ints([0])
    first, second = (g.node("Range", [zero, g.node("Squeeze", [n, none]), one]) for n in (rows, columns))
    row = g.node("Unsqueeze", [first, g.ints([1])])
    if kind == "LOWER_RIGHT":
        row = g.node("Add", [row, g.node("Sub", [columns, rows])])
    later = g.node("Less", [row, g.node("Unsqueeze", [second, none])])
    return g.node("Cast", [g.node("Not", [later])], to=onnx.TensorProto.BOOL)


def _call_attention(v: VendorNetwork, r: LayerRequest) -> Any:
    tensors = [v.tensor(r.inputs[role]) for role in ("query", "key", "value")]
    norm = v.member("AttentionNormalizationOp", r["norm_op"])
    if v.has("add_attention_v2") or r["causal"] == "LOWER_RIGHT":
        layer = v.add("add_attention_v2", *tensors, norm, v.member("CausalMaskKind", r["causal"]))
    else:
        layer = v.add("add_attention", *tensors, norm, r["causal"] != "NONE")
    if "mask" in r.inputs:
        v.set(layer, "mask", v.tensor(r.inputs["mask"]))
    v.set(layer, "decomposable", r["decomposable"])
    return layer


TABLE = {
    "convolution_nd": LayerDefinition(
        "CONVOLUTION", _lower_convolution("Conv"), _call_convolution("add_convolution_nd")
    ),
    "deconvolution_nd": LayerDefinition(
        "DECONVOLUTION", _lower_convolution("ConvTranspose"), _call_convolution("add_deconvolution_nd")
    ),
    "pooling_nd": LayerDefinition("POOLING", _lower_pooling, _call_pooling),
    "matrix_multiply": LayerDefinition("MATRIX_MULTIPLY", _lower_matrix_multiply, _call_matrix_multiply),
    "einsum": LayerDefinition("EINSUM", _lower_einsum, _call_einsum),
    "attention": LayerDefinition("ATTENTION_OUTPUT", _lower_attention, _call_attention),
}


def _windowed(
    value: NetworkTensor, window: Any, what: str, stride: Any, padding: Any, pre: Any, post: Any, mode: Any, modes: Any
) -> tuple[Shape, dict[str, Any]]:
    """The window's size, and stride and padding as settings."""
    rank = check.rank_at_least(value, 4, "input") - 2
    if rank > 3:
        raise ShapeError(
            f"input {value.name!r} has shape {list(value.shape)}; expected two or three spatial dimensions"
        )
    size = check.spatial(window, rank, what, minimum=1)
    if padding != 0 and (pre is not None or post is not None):
        raise InvalidArgumentError("padding stands for pre_padding and post_padding both; give either it or those")
    both = check.spatial(padding, rank, "padding", minimum=0)
    kind = check.member(mode, "padding_mode", modes)
    before = both if pre is None else check.spatial(pre, rank, "pre_padding", minimum=0)
    after = both if post is None else check.spatial(post, rank, "post_padding", minimum=0)
    if kind in _SAME and any((*before, *after)):
        raise InvalidArgumentError(f"padding_mode {kind} works the padding out itself; leave padding at 0")
    return size, {
        "stride": check.spatial(stride, rank, "stride", minimum=1), "pre_padding": before, "post_padding": after,
        "padding_mode": kind,
    }  # fmt: skip


def _check_equation(equation: str, tensors: list[NetworkTensor]) -> None:
    """Each index has one size. Checked as far as sizes are known, and no index stands for several ("...")."""
    sizes: dict[str, int] = {}
    for term, one in zip(equation.split("->")[0].replace(" ", "").split(","), tensors, strict=True):
        if any(letter.isupper() for letter in term):
            raise InvalidArgumentError(f"equation {equation!r} has capitals; expected indices of small letters")
        if "." in term:
            continue
        if len(term) != len(one.shape):
            raise ShapeError(
                f"equation {equation!r} has {len(term)} indices for {one.name!r}, which has shape {list(one.shape)}"
            )
        for letter, size in zip(term, one.shape, strict=True):
            if size >= 0 and sizes.setdefault(letter, size) != size:
                raise ShapeError(
                    f"equation {equation!r}: index {letter!r} is {sizes[letter]} in one place and {size} in "
                    f"{one.name!r} {list(one.shape)}; expected one size"
                )


def _check_reach(value: NetworkTensor, window: Shape, slide: dict[str, Any], what: str) -> None:
    """A window lies inside its input with the padding. Checked where the size is known."""
    if slide["padding_mode"] != "EXPLICIT_ROUND_DOWN":  # the others let the last window be cut off, or pad it
        return
    sizes = zip(value.shape[2:], window, slide["pre_padding"], slide["post_padding"], strict=True)
    for axis, (size, reach, before, after) in enumerate(sizes, start=2):
        if 0 <= size < reach - before - after:
            raise ShapeError(
                f"the {what} reaches over {reach} elements of axis {axis}, and {value.name!r} {list(value.shape)} has "
                f"{size + before + after} there with its padding; expected a smaller {what} or more padding"
            )


class ProductLayers(LayerMethods):
    """The methods for these layers. All raise ClosedError after close, BuilderError where TensorRT refuses."""

    @opened
    def add_convolution_nd(
        self,
        input: NetworkTensor,
        num_output_maps: int,
        kernel_shape: Any,
        kernel: Weights | NetworkTensor,
        bias: Weights | None = None,
        *,
        stride: Any = 1,
        padding: Any = 0,
        pre_padding: Any = None,
        post_padding: Any = None,
        padding_mode: Enumerator = "EXPLICIT_ROUND_DOWN",
        dilation: Any = 1,
        num_groups: int = 1,
        name: str | None = None,
    ) -> Layer:
        """A convolution in two or three spatial dimensions; for one, add another with add_unsqueeze.

        Args:
            input: [batch, channels, spatial...]; the number of channels must be known.
            kernel_shape, stride, padding, pre_padding, post_padding, dilation: a number for each spatial dimension,
                or one for all.
            kernel: weights of the input's type, [num_output_maps, channels / num_groups, *kernel_shape], or a tensor.
            bias: ``num_output_maps`` weights of the input's type.
            padding_mode: EXPLICIT_ROUND_DOWN, or SAME_UPPER and SAME_LOWER, which pad until the output has the
                input's size divided by the stride.
        Raises ShapeError for weights of another count, DTypeError for another type.
        Source: nvinfer1::INetworkDefinition::addConvolutionNd
        """
        return self._convolve(
            "convolution_nd", name, input, num_output_maps, kernel_shape, kernel, bias, stride, padding, pre_padding,
            post_padding, padding_mode, dilation, num_groups,
        )  # fmt: skip

    @opened
    def add_deconvolution_nd(
        self,
        input: NetworkTensor,
        num_output_maps: int,
        kernel_shape: Any,
        kernel: Weights | NetworkTensor,
        bias: Weights | None = None,
        *,
        stride: Any = 1,
        padding: Any = 0,
        pre_padding: Any = None,
        post_padding: Any = None,
        padding_mode: Enumerator = "EXPLICIT_ROUND_DOWN",
        dilation: Any = 1,
        num_groups: int = 1,
        name: str | None = None,
    ) -> Layer:
        """A transposed convolution; padding is cut off from the output.

        Args: as ``add_convolution_nd``; ``kernel`` is [channels, num_output_maps / num_groups, *kernel_shape].
        Source: nvinfer1::INetworkDefinition::addDeconvolutionNd
        """
        return self._convolve(
            "deconvolution_nd", name, input, num_output_maps, kernel_shape, kernel, bias, stride, padding, pre_padding,
            post_padding, padding_mode, dilation, num_groups,
        )  # fmt: skip

    def _convolve(
        self, kind: str, name: str | None, input: Any, maps: Any, kernel_shape: Any, kernel: Any, bias: Any,
        stride: Any, padding: Any, pre: Any, post: Any, mode: Any, dilation: Any, groups: Any,
    ) -> Layer:  # fmt: skip
        value = check.tensor(input)
        size, slide = _windowed(value, kernel_shape, "kernel_shape", stride, padding, pre, post, mode, _PADDING_MODES)
        count = checked_int(maps, "num_output_maps", minimum=1)
        group, depth = checked_int(groups, "num_groups", minimum=1), check.channels(value)
        if depth % group or count % group:
            raise ShapeError(
                f"num_groups is {group}; expected a divisor of the {depth} channels of {value.name!r} and of the "
                f"{count} output maps"
            )
        spread = check.spatial(dilation, len(size), "dilation", minimum=1)
        if kind == "convolution_nd":
            _check_reach(
                value, tuple((n - 1) * step + 1 for n, step in zip(size, spread, strict=True)), slide, "kernel"
            )
        layout = (count, depth // group, *size) if kind == "convolution_nd" else (depth, count // group, *size)
        tensors: dict[str, NetworkTensor | None] = {"input": value}
        weights: dict[str, Array] = {}
        if isinstance(kernel, NetworkTensor):
            if kernel.shape != layout:
                raise ShapeError(f"kernel {kernel.name!r} has shape {list(kernel.shape)}; expected {list(layout)}")
            tensors["kernel"] = kernel
        else:
            weights["kernel"] = check.array(kernel, "kernel", value.dtype, math.prod(layout)).reshape(layout)
        if bias is not None:
            weights["bias"] = check.array(bias, "bias", value.dtype, count).reshape(-1)
        return self._add(
            kind, name, tensors, weights, num_output_maps=count, kernel_shape=size, num_groups=group,
            dilation=spread, **slide,
        )  # fmt: skip

    @opened
    def add_pooling_nd(
        self,
        input: NetworkTensor,
        type: Enumerator,
        window_size: Any,
        *,
        stride: Any = 1,
        padding: Any = 0,
        pre_padding: Any = None,
        post_padding: Any = None,
        padding_mode: Enumerator = "EXPLICIT_ROUND_DOWN",
        average_count_excludes_padding: bool = True,
        blend_factor: float = 0.0,
        name: str | None = None,
    ) -> Layer:
        """The largest or the mean element of a window that slides over the spatial dimensions.

        Args:
            input: [batch, channels, spatial...], two or three spatial dimensions.
            type: MAX, AVERAGE or MAX_AVERAGE_BLEND: ``(1 - blend_factor) * max + blend_factor * average``.
            window_size, stride, padding, pre_padding, post_padding: as in ``add_convolution_nd``.
            padding_mode: that of ``add_convolution_nd``, and EXPLICIT_ROUND_UP, which lets the last window be cut off.
        Source: nvinfer1::INetworkDefinition::addPoolingNd
        """
        value = check.tensor(input)
        kind = check.member(type, "type", _POOLING)
        size, slide = _windowed(
            value, window_size, "window_size", stride, padding, pre_padding, post_padding, padding_mode, _POOLING_MODES
        )
        share = check.number(blend_factor, "blend_factor")
        if not 0 <= share <= 1:
            raise InvalidArgumentError(f"blend_factor is {share}; expected 0 to 1")
        excludes = check.flag(average_count_excludes_padding, "average_count_excludes_padding")
        _check_reach(value, size, slide, "window")
        paddings = zip(size, slide["pre_padding"], slide["post_padding"], strict=True)
        if excludes and kind != "MAX" and any(max(before, after) >= n for n, before, after in paddings):
            raise ShapeError(
                f"padding is {slide['pre_padding']} and {slide['post_padding']}, window_size {size}: a window "
                "of padding alone has no mean; expected less padding, or average_count_excludes_padding=False"
            )
        return self._add(
            "pooling_nd", name, {"input": value}, type=kind, window_size=size, blend_factor=share,
            average_count_excludes_padding=excludes, **slide,
        )  # fmt: skip

    @opened
    def add_matrix_multiply(
        self,
        input0: NetworkTensor,
        op0: Enumerator,
        input1: NetworkTensor,
        op1: Enumerator,
        *,
        name: str | None = None,
    ) -> Layer:
        """The matrix product of the last two dimensions; leading ones are broadcast.

        Args:
            op0, op1: NONE, TRANSPOSE (the last two dimensions change places) or VECTOR (the last dimension is one
                vector for each index of the others).
        Raises ShapeError for numbers of leading dimensions that differ.
        Source: nvinfer1::INetworkDefinition::addMatrixMultiply
        """
        first, second = check.tensor(input0, "input0"), check.tensor(input1, "input1")
        kinds = [check.member(op, what, _MATRICES) for op, what in ((op0, "op0"), (op1, "op1"))]
        leading = []
        for value, kind, what in ((first, kinds[0], "input0"), (second, kinds[1], "input1")):
            inner = 1 if kind == "VECTOR" else 2
            leading.append(check.rank_at_least(value, inner, what) - inner)
        if leading[0] != leading[1]:
            raise ShapeError(
                f"add_matrix_multiply: {first.name!r} {list(first.shape)} ({kinds[0]}) has {leading[0]} dimensions in "
                f"front of its matrices, {second.name!r} {list(second.shape)} ({kinds[1]}) has {leading[1]}; add ones "
                "with add_shuffle"
            )
        check.same_type("add_matrix_multiply", first, second)
        check.typed(first, "input0", check.REALS)
        return self._add("matrix_multiply", name, {"input0": first, "input1": second}, op0=kinds[0], op1=kinds[1])

    @opened
    def add_einsum(self, inputs: Any, equation: str, *, name: str | None = None) -> Layer:
        """Products summed over indices, in Einstein's notation, such as "bij,bjk->bik".

        Source: nvinfer1::INetworkDefinition::addEinsum
        """
        text: object = equation
        if not isinstance(text, str) or not text.strip():
            raise InvalidArgumentError(f'equation is {equation!r}; expected text such as "bij,bjk->bik"')
        given = equation.split("->")[0].count(",") + 1
        tensors = sequence(inputs)
        if len(tensors) != given:
            raise InvalidArgumentError(f"equation {equation!r} is about {given} tensors; found {len(tensors)}")
        for role, one in tensors.items():
            assert one is not None
            check.typed(one, f"input {role}", check.REALS)
        _check_equation(equation, [one for one in tensors.values() if one is not None])
        return self._add("einsum", name, tensors, equation=equation)

    @opened
    def add_attention(
        self,
        query: NetworkTensor,
        key: NetworkTensor,
        value: NetworkTensor,
        *,
        norm_op: Enumerator = "SOFTMAX",
        causal: Enumerator = "NONE",
        mask: NetworkTensor | None = None,
        decomposable: bool = True,
        name: str | None = None,
    ) -> Layer:
        """``softmax(query @ transpose(key) + mask) @ value`` for each head; scale the query or the key before.

        Args:
            query: [batch, heads, queries, size]; float32, float16 or bfloat16.
            key, value: [batch, heads, keys, size].
            norm_op: SOFTMAX or NONE.
            causal: NONE, UPPER_LEFT (query i sees keys 0 to i) or LOWER_RIGHT (the last query sees all keys).
            mask: [batch or 1, heads or 1, queries, keys]: BOOL, True where a query sees a key, or of the query's type,
                added to the scores. Not together with ``causal``.
            decomposable: TensorRT may compute it in parts where no fused kernel fits; else the build fails there.
        Source: nvinfer1::INetworkDefinition::addAttentionV2, addAttention
        """
        tensors: dict[str, NetworkTensor | None] = {}
        for what, given in (("query", query), ("key", key), ("value", value), ("mask", mask)):
            if what == "mask" and given is None:
                continue
            tensors[what] = found = check.tensor(given, what)
            if len(found.shape) != 4:
                raise ShapeError(f"{what} {found.name!r} has shape {list(found.shape)}; expected four dimensions")
        if query.dtype not in _MASKED:
            raise DTypeError(f"query {query.name!r} is {query.dtype.value}; expected float32, float16 or bfloat16")
        kind = check.member(causal, "causal", _CAUSAL)
        if kind != "NONE" and mask is not None:
            raise InvalidArgumentError("causal makes a mask of its own; give either it or mask")
        if mask is not None and mask.dtype not in (DataType.BOOL, query.dtype):
            raise DTypeError(f"mask {mask.name!r} is {mask.dtype.value}; expected bool or {query.dtype.value}")
        return self._add(
            "attention", name, tensors, norm_op=check.member(norm_op, "norm_op", ("NONE", "SOFTMAX")), causal=kind,
            decomposable=check.flag(decomposable, "decomposable"),
        )  # fmt: skip


def sequence(inputs: Any) -> dict[str, NetworkTensor | None]:
    """Tensors of a layer that takes any number of them, by role."""
    if isinstance(inputs, (NetworkTensor, Layer, str)) or not hasattr(inputs, "__iter__"):
        raise InvalidArgumentError(f"inputs is {inputs!r}; expected a sequence of tensors")
    tensors: dict[str, NetworkTensor | None] = {
        str(index): check.tensor(one, f"input {index}") for index, one in enumerate(inputs)
    }
    if not tensors:
        raise InvalidArgumentError("inputs is empty; expected one tensor at least")
    return tensors
