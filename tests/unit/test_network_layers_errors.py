"""Networks of layers: whose tensors they are, what is refused, and what is left of a closed one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, fail
from tests.unit.network_cases import CASES, Case, fill
from tests.unit.ownership import matmul_model

Net = trtx.Network
Tensor = trtx.NetworkTensor


@pytest.fixture
def builder(mock_backend: MockBackend) -> Iterator[trtx.Builder]:
    with trtx.Builder(None, mock_backend) as made:
        yield made


@pytest.fixture
def network(builder: trtx.Builder) -> Iterator[Net]:
    with builder.create_network() as made:
        yield made


@pytest.fixture
def x(network: Net) -> Tensor:
    return network.add_input("x", "float32", (2, 4, 6, 6))


def test_tensors_and_layers_belong_to_their_network(network: Net, x: Tensor) -> None:
    layer = network.add_activation(x, "RELU", name="rectified")
    y = layer.output
    network.mark_output(y, "result")
    assert (layer.name, layer.type, layer.inputs, layer.outputs) == ("rectified", "ACTIVATION", (x,), (y,))
    assert layer.settings == {"type": "RELU", "alpha": None, "beta": None}
    assert (y.name, y.dtype, y.shape, y.network) == ("result", trtx.DataType.FLOAT, (2, 4, 6, 6), network)
    assert network.layers[0].output == y
    assert y in {layer.output}
    assert y != x
    assert [tensor.name for tensor in network.inputs + network.outputs] == ["x", "result"]
    network.unmark_output(y)
    assert y.name == "rectified"
    network.mark_output(y)
    assert [tensor.name for tensor in network.outputs] == ["rectified"]
    for kind in (trtx.NetworkTensor, trtx.Layer):
        with pytest.raises(TypeError, match="made by their network"):
            kind()


def test_names_are_given_where_none_are(network: Net, x: Tensor) -> None:
    first = network.add_topk(x, "max", 2, -1)
    second = network.add_topk(x, "min", 2, -1)
    assert [tensor.name for tensor in (*first.outputs, *second.outputs)] == [
        "topk_1.0", "topk_1.1", "topk_2.0", "topk_2.1",
    ]  # fmt: skip
    network.add_identity(x, name="unary_1")
    assert network.add_unary(x, "abs").name == "unary_2"


def test_names_of_outputs_are_taken_too(network: Net, x: Tensor) -> None:
    network.add_identity(x, name="topk_1.1")
    network.mark_output(network.add_identity(x).output, "sorted.0")
    assert network.add_topk(x, "max", 2, 1).name == "topk_2"
    with pytest.raises(trtx.InvalidArgumentError, match=r"would be named 'sorted\.0', which is taken"):
        network.add_topk(x, "max", 2, 1, name="sorted")
    assert network.add_topk(x, "max", 2, 1, name="ordered").outputs[1].name == "ordered.1"


def test_dims_that_only_the_run_decides(network: Net) -> None:
    x = network.add_input("x", "float32", (-1, 4, -1, 6))
    assert [y.shape for y in network.add_topk(x, "max", 2, 2).outputs] == [(-1, 4, 2, 6)] * 2
    assert network.add_shuffle(x, reshape=(0, -1)).output.shape == (-1, -1)
    assert network.add_unsqueeze(x, (axis for axis in (0, 1))).output.shape == (1, 1, -1, 4, -1, 6)


def test_use_after_close(builder: trtx.Builder) -> None:
    network = builder.create_network()
    x = network.add_input("x", "float32", (2,))
    layer = network.add_activation(x, "relu")
    network.close()
    uses: list[Callable[[], object]] = [
        lambda: x.name, lambda: x.dtype, lambda: x.shape, lambda: layer.name, lambda: layer.type, lambda: layer.inputs,
        lambda: layer.outputs, lambda: layer.output, lambda: layer.settings, lambda: network.layers,
        lambda: network.add_identity(x), lambda: network.mark_output(x), lambda: network.to_onnx(),
        lambda: layer.set_precision(trtx.DataType.HALF),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(trtx.ClosedError, match=r"Network#\d+ is closed"):
            use()
    assert "Network#" in repr(x)
    assert "ACTIVATION" in repr(layer)


def test_tensor_of_another_network(builder: trtx.Builder, network: Net, x: Tensor) -> None:
    with builder.create_network() as other:
        theirs = other.add_input("x", "float32", (2, 4, 6, 6))
        assert theirs != x
        for attempt in (
            lambda: network.add_elementwise(x, theirs, "sum"),
            lambda: network.mark_output(theirs),
            lambda: network.unmark_output(theirs),
        ):
            with pytest.raises(trtx.InvalidArgumentError, match=r"expected a tensor of Network#\d+"):
                attempt()
    with pytest.raises(trtx.InvalidArgumentError, match=r"pass layer\.output"):
        network.add_identity(network.add_identity(x))  # type: ignore[arg-type]
    network.mark_output(network.add_identity(x).output)  # nothing of all that has harmed it


WRONG: list[tuple[str, type[trtx.TrtxError], Callable[[Net, Tensor], Any], str]] = [
    ("no tensor", trtx.InvalidArgumentError, lambda n, x: n.add_identity(3), "input is int; expected a NetworkTensor"),  # type: ignore[arg-type]
    ("unknown enumerator", trtx.InvalidArgumentError, lambda n, x: n.add_activation(x, "rleu"), "did you mean RELU"),
    ("no enumerator", trtx.InvalidArgumentError, lambda n, x: n.add_unary(x, 3), "op is 3; expected one of EXP"),  # type: ignore[arg-type]
    ("parameter that is none", trtx.InvalidArgumentError, lambda n, x: n.add_activation(x, "relu", 1), "has no alpha"),
    ("parameter missing", trtx.InvalidArgumentError, lambda n, x: n.add_activation(x, "clip", 1.0), "CLIP needs beta"),
    ("ranks", trtx.ShapeError, lambda n, x: n.add_elementwise(x, n.add_constant([1.0]).output, "sum"), "add_shuffle"),
    ("kernel size", trtx.ShapeError, lambda n, x: n.add_convolution_nd(x, 2, 3, np.ones(5, "f4")), "5 elements.*72"),
    ("kernel type", trtx.DTypeError, lambda n, x: n.add_convolution_nd(x, 2, 1, np.ones(8, "f2")), "expected float32"),
    ("float64", trtx.DTypeError, lambda n, x: n.add_constant(np.ones(3)), "no element type for float64.*astype"),
    ("groups", trtx.ShapeError, lambda n, x: n.add_convolution_nd(x, 3, 1, np.ones(6, "f4"), num_groups=2), "divisor"),
    ("bit mask", trtx.InvalidArgumentError, lambda n, x: n.add_reduce(x, "sum", 3, True), r"expected axes such as"),
    ("axis", trtx.ShapeError, lambda n, x: n.add_softmax(x, 4), "axis is 4; expected -4 to 3"),
    ("axis twice", trtx.ShapeError, lambda n, x: n.add_reduce(x, "sum", (1, -3), True), "expected each once"),
    ("slice", trtx.ShapeError, lambda n, x: n.add_slice(x, (0,) * 4, (3, 4, 6, 6), (1,) * 4), "axis 0 from 0 to 2"),
    ("k", trtx.ShapeError, lambda n, x: n.add_topk(x, "max", 9, 1), "k is 9; axis 1 of 'x' has 4"),
    ("reshape", trtx.ShapeError, lambda n, x: n.add_shuffle(x, reshape=(-1, -1)), "expected -1 once"),
    ("permutation", trtx.ShapeError, lambda n, x: n.add_shuffle(x, first_transpose=(0, 1, 1, 2)), "each of 0 to 3"),
    ("equation", trtx.InvalidArgumentError, lambda n, x: n.add_einsum([x], "i,j->ij"), "is about 2 tensors; found 1"),
    ("no tensors", trtx.InvalidArgumentError, lambda n, x: n.add_concatenation([]), "inputs is empty"),
    ("one tensor", trtx.InvalidArgumentError, lambda n, x: n.add_concatenation(x), "expected a sequence"),
    ("both paddings", trtx.InvalidArgumentError,
     lambda n, x: n.add_pooling_nd(x, "max", 2, padding=1, pre_padding=1), "give either"),
    ("resize", trtx.InvalidArgumentError, lambda n, x: n.add_resize(x), "expected either shape"),
    ("squeeze", trtx.ShapeError, lambda n, x: n.add_squeeze(x, (1,)), "expected 1 at axis 1"),
    ("matrices", trtx.ShapeError,
     lambda n, x: n.add_matrix_multiply(x, "none", n.add_constant([[1.0]]).output, "none"), "2 dimensions in front"),
    ("taken name", trtx.InvalidArgumentError, lambda n, x: n.add_identity(x, name="x"), "name 'x' is taken"),
    ("name", trtx.InvalidArgumentError, lambda n, x: n.add_identity(x, name="a//b"), "expected text"),
    ("input as output", trtx.InvalidArgumentError, lambda n, x: n.mark_output(x), "put add_identity between"),
    ("no output", trtx.InvalidArgumentError, lambda n, x: n.unmark_output(x), "is not marked as an output"),
    ("type of an input", trtx.DTypeError, lambda n, x: n.add_input("z", "float64", (1,)), "no element type"),
    ("shape of an input", trtx.ShapeError, lambda n, x: n.add_input("z", "float32", (-2,)), "expected -1 to"),
    ("quantized type", trtx.DTypeError,
     lambda n, x: n.add_quantize(x, n.add_constant(np.float32(1)).output, "int32"), "expected int8 or"),
    ("scale", trtx.ShapeError,
     lambda n, x: n.add_quantize(x, n.add_constant([1.0, 2.0, 3.0]).output, axis=1), "one for each index of axis 1"),
    ("mask and causal", trtx.InvalidArgumentError,
     lambda n, x: n.add_attention(x, x, x, causal="upper_left", mask=x), "give either it or mask"),
    ("another volume", trtx.ShapeError, lambda n, x: n.add_shuffle(x, reshape=(2, 7)), "has 288 elements"),
    ("no multiple", trtx.ShapeError, lambda n, x: n.add_shuffle(x, reshape=(7, -1)), "a multiple of 7"),
    ("placeholder", trtx.ShapeError, lambda n, x: n.add_shuffle(x, reshape=(2, 4, 6, 6, 0)), "the 0 at 4 keeps"),
    ("rank 9", trtx.ShapeError, lambda n, x: n.add_unsqueeze(x, range(5)), "would have 9 dimensions"),
    ("types", trtx.DTypeError,
     lambda n, x: n.add_concatenation([x, n.add_cast(x, "int32").output]), "is float32 and 'cast_1' int32"),
    ("types of two", trtx.DTypeError,
     lambda n, x: n.add_elementwise(x, n.add_cast(x, "int32").output, "pow"), "expected one type"),
    ("type of integers", trtx.DTypeError,
     lambda n, x: n.add_padding(n.add_cast(x, "int32").output, 1, 1), "is int32; expected float32"),
    ("condition", trtx.DTypeError, lambda n, x: n.add_select(x, x, x), "expected bool"),
    ("uint8", trtx.DTypeError,
     lambda n, x: n.add_reduce(n.add_input("u", "uint8", (2, 3)), "sum", (1,), True), "put add_cast before it"),
    ("constant of uint8", trtx.DTypeError, lambda n, x: n.add_constant(np.ones(3, "u1")), "put add_cast behind it"),
    ("matrices of integers", trtx.DTypeError,
     lambda n, x: n.add_matrix_multiply(i := n.add_cast(x, "int32").output, "none", i, "none"), "is int32; expected"),
    ("one dimension", trtx.ShapeError,
     lambda n, x: n.add_softmax(n.add_constant([1.0]).output, 0), "expected 2 dimensions at least"),
    ("topk of one dimension", trtx.ShapeError,
     lambda n, x: n.add_topk(n.add_constant([1.0]).output, "max", 1, 0), "expected 2 dimensions at least"),
    ("one spatial dimension", trtx.ShapeError,
     lambda n, x: n.add_pooling_nd(n.add_constant(np.ones((1, 2, 3), "f4")).output, "max", 2), "4 dimensions at least"),
    ("large k", trtx.InvalidArgumentError, lambda n, x: n.add_topk(x, "max", 4000, 1), "1 to 3840"),
    ("window", trtx.ShapeError, lambda n, x: n.add_pooling_nd(x, "max", 7), "reaches over 7 elements of axis 2"),
    ("kernel", trtx.ShapeError,
     lambda n, x: n.add_convolution_nd(x, 1, 3, np.ones(36, "f4"), dilation=3), "reaches over 7 elements of axis 2"),
    ("mean of padding", trtx.ShapeError,
     lambda n, x: n.add_pooling_nd(x, "average", 2, padding=2), "of padding alone has no mean"),
    ("parameter of lrn", trtx.InvalidArgumentError, lambda n, x: n.add_lrn(x, 3, 1, 0, 1), "beta is 0.0; expected"),
    ("slopes", trtx.ShapeError,
     lambda n, x: n.add_parametric_relu(x, n.add_constant(np.ones((1, 3, 1, 1), "f4")).output), "one element for all"),
    ("normalization", trtx.ShapeError,
     lambda n, x: n.add_normalization(x, n.add_constant(np.ones((1, 3, 1, 1), "f4")).output, x, (2, 3)),
     "scale 'constant_1' has shape"),
    ("indices", trtx.DTypeError, lambda n, x: n.add_gather(x, x), "indices 'x' is float32; expected int32 or int64"),
    ("updates", trtx.ShapeError,
     lambda n, x: n.add_scatter(x, n.add_constant([[1]]).output, x, "nd"), r"indices.shape\[:-1\]"),
    ("updates of elements", trtx.ShapeError,
     lambda n, x: n.add_scatter(x, n.add_constant([[1]]).output, x, "element"), "in data's rank"),
    ("lengths", trtx.ShapeError, lambda n, x: n.add_reverse_sequence(x, x), "sequence_lens 'x' is float32"),
    ("scales", trtx.InvalidArgumentError, lambda n, x: n.add_resize(x, scales=2), "a number for each of 4"),
    ("endless scales", trtx.ShapeError, lambda n, x: n.add_resize(x, scales=[1, 1, 1, float("inf")]), "above 0"),
    ("huge number", trtx.InvalidArgumentError,
     lambda n, x: n.add_activation(x, "elu", 10**400), "expected a number that a float holds"),
    ("equation's rank", trtx.ShapeError, lambda n, x: n.add_einsum([x], "ij->ji"), "has 2 indices for 'x'"),
    ("equation's sizes", trtx.ShapeError, lambda n, x: n.add_einsum([x], "abbc->a"), "'b' is 4 in one place and 6"),
    ("capitals", trtx.InvalidArgumentError, lambda n, x: n.add_einsum([x], "ABCD->A"), "small letters"),
    ("depth", trtx.DTypeError,
     lambda n, x: n.add_one_hot(x, n.add_constant([0.0, 1.0]).output, n.add_constant(3).output, 0), "indices 'x'"),
    ("scale of another type", trtx.DTypeError,
     lambda n, x: n.add_quantize(x, n.add_constant(np.float16(1)).output), "expected one type"),
    ("blocks", trtx.ShapeError,
     lambda n, x: n.add_quantize(x, n.add_constant(np.ones((2, 4, 6, 6), "f4")).output), "blocks along one axis"),
    ("no assertion", trtx.DTypeError, lambda n, x: n.add_assertion(x, "text"), "expected bool"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "attempt", "says"), [one[1:] for one in WRONG], ids=[one[0] for one in WRONG])
def test_wrong_arguments_change_nothing(
    network: Net, x: Tensor, error: type[trtx.TrtxError], attempt: Callable[[Net, Tensor], Any], says: str
) -> None:
    with pytest.raises(error, match=says):
        attempt(network, x)
    network.mark_output(network.add_activation(x, "relu").output, "y")
    assert network.outputs[0].name == "y"


def test_marking_twice(network: Net, x: Tensor) -> None:
    y = network.add_identity(x).output
    network.mark_output(y, "y")
    with pytest.raises(trtx.InvalidArgumentError, match="is an output already, named 'y'"):
        network.mark_output(y)
    with pytest.raises(trtx.InvalidArgumentError, match="name 'y' is taken"):
        network.mark_output(network.add_identity(x).output, "y")


REFUSED = ("loop", "if_conditional", "rotary_embedding", "kv_cache_update", "dynamic_quantize", "moe",
           "dist_collective", "plugin_v3")  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_layers_that_are_not_covered_say_what_to_do(network: Net, x: Tensor, kind: str) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=rf"add_{kind} of Network#\d+: .* not covered; "):
        getattr(network, f"add_{kind}")(x)
    network.mark_output(network.add_identity(x).output)


def test_layer_that_does_not_fit_breaks_the_network(network: Net, x: Tensor) -> None:
    other = network.add_constant(np.ones((2, 4, 5, 6), np.float32)).output
    with pytest.raises(trtx.BuilderError, match=r"layer 'elementwise_1' \(add_elementwise\) does not fit"):
        network.add_elementwise(x, other, "sum")
    for attempt in (lambda: network.add_identity(x), lambda: network.to_onnx()):
        with pytest.raises(trtx.InvalidArgumentError, match="create another network"):
            attempt()


@pytest.mark.parametrize(
    "attempt",
    [
        lambda n, x: n.add_slice(x, (0,) * 4, (2, 4, 6, 2**31 - 1), (1,) * 4, mode="wrap"),
        lambda n, x: n.add_fill((2**31 - 1,), "linspace", 0, 1),
    ],
    ids=["slice", "fill"],
)
def test_huge_numbers_are_refused_before_they_take_memory(
    network: Net, x: Tensor, attempt: Callable[[Net, Tensor], Any]
) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="would all be in the model"):
        attempt(network, x)


def test_fault_in_the_backend_breaks_the_network(network: Net, x: Tensor, mock_backend: MockBackend) -> None:
    mock_backend.inject(fail("add_layer"))
    with pytest.raises(trtx.BuilderError):
        network.add_identity(x)
    with pytest.raises(trtx.InvalidArgumentError, match="has failed before"):
        network.add_identity(x)


def test_parsing_and_layers_do_not_mix(builder: trtx.Builder, network: Net, x: Tensor) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="has layers of its own"):
        network.parse_onnx(matmul_model())
    with builder.create_network() as parsed:
        parsed.parse_onnx(matmul_model())
        with pytest.raises(trtx.InvalidArgumentError, match=r"add_input\(\): .* has parsed a model"):
            parsed.add_input("z", "float32", (1,))


def test_network_without_outputs(builder: trtx.Builder, network: Net, x: Tensor) -> None:
    network.add_identity(x)
    assert network.outputs == ()
    with builder.create_config() as config:
        for attempt in (network.to_onnx, lambda: builder.build_serialized_network_sync(network, config)):
            with pytest.raises(trtx.InvalidArgumentError, match="call mark_output first"):
                attempt()


def test_network_is_not_changed_while_it_is_built(builder: trtx.Builder, network: Net, x: Tensor) -> None:
    network.mark_output(network.add_identity(x).output)
    reached, go_on = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        reached.set()
        assert go_on.wait(30)

    with builder.create_config() as config:
        thread = threading.Thread(
            target=lambda: builder.build_serialized_network_sync(network, config, on_progress=hold)
        )
        thread.start()
        assert reached.wait(30)
        with pytest.raises(trtx.BorrowedError, match="in use"):
            network.add_identity(x)
        go_on.set()
        thread.join(30)
        network.add_identity(x)


def test_types_are_not_set_where_typing_is_strong(network: Net, x: Tensor) -> None:
    layer = network.add_identity(x)
    with pytest.raises(trtx.BuilderError, match=r"strongly typed: the type of layer 'identity_1'.*add_cast"):
        layer.set_precision(trtx.DataType.HALF)
    with pytest.raises(trtx.InvalidArgumentError, match="has 1 outputs; there is no number 1"):
        layer.set_output_type(1, trtx.DataType.HALF)


def test_weights_are_copied(network: Net, x: Tensor) -> None:
    kernel = np.ones((1, 4, 1, 1), np.float32)
    network.mark_output(network.add_convolution_nd(x, 1, 1, kernel).output)
    before = network.to_onnx()
    kernel[:] = 7
    assert network.to_onnx() == before


def _case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_real_network_that_only_the_mock_cannot_take(mock_backend: MockBackend) -> None:
    """tensorrt_rtx+mock asks both halves, and takes types and shapes from the real one."""
    pytest.importorskip("tensorrt_rtx")
    with trtx.Builder(None, "tensorrt_rtx+mock") as builder, builder.create_network() as network:
        fill(network, _case("convolution_nd"))
        with builder.create_config() as config:
            config.compute_capabilities = ("8.9",)
            plan = builder.build_serialized_network_sync(network, config)
        assert plan.header.io_tensors[1].shape == (2, 8, 3, 3)
