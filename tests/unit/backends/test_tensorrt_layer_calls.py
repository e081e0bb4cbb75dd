"""Layers with stand-ins for old and new networks: what is called with what, and what a version lacks."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import trtx_py as trtx
from tests.unit.backends.fake_vendor import FakeVendor, members
from trtx_py.backends.tensorrt import TensorRTFamilyBackend

V8, V10, V11 = "8.6.0", "10.3.0.26", "11.4.0.106"


class Weights:
    def __init__(self, dtype: Any, pointer: int = 0, count: int = 0) -> None:
        self.dtype, self.pointer, self.count = dtype, pointer, count

    def read(self, nbytes: int) -> bytes:
        return ctypes.string_at(self.pointer, nbytes)


class AnyLayer:
    """A layer that has every attribute, and one output like its first input."""

    precision = axes = axis = op = alpha = beta = mode = padding_mode = dilation_nd = None
    stride_nd = pre_padding = post_padding = num_groups = epsilon = reshape_dims = zero_is_placeholder = None

    def __init__(self, outputs: list[Any]) -> None:
        self.made, self.name = outputs, ""
        self.types: dict[int, Any] = {}
        self.inputs: dict[int, Any] = {}

    def get_output(self, index: int) -> Any:
        return self.made[index]

    def set_output_type(self, index: int, dtype: Any) -> None:
        self.types[index] = dtype

    def set_input(self, index: int, tensor: Any) -> None:
        self.inputs[index] = tensor


class Network86:
    """The methods of 8.6 that these tests use: no squeeze, no second normalization, no third argument of quantize."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.num_inputs = self.num_outputs = self.num_layers = 0
        self.marked: list[Any] = []
        self.answers = True

    def make(self, method: str, *arguments: Any) -> Any:
        self.calls.append((method, arguments))
        like = next((a for a in arguments if isinstance(a, SimpleNamespace)), None)
        shape = like.shape if like is not None else arguments[0]
        dtype = like.dtype if like is not None else arguments[1].dtype
        count = 2 if method == "add_topk" else 1
        outputs = [SimpleNamespace(name="", dtype=dtype, shape=shape) for _ in range(count)]
        return AnyLayer(outputs) if self.answers else None

    def add_input(self, name: str, dtype: Any, shape: Any) -> Any:
        return SimpleNamespace(name=name, dtype=dtype, shape=shape) if self.answers else None

    def mark_output(self, tensor: Any) -> None:
        self.marked.append(tensor)

    def unmark_output(self, tensor: Any) -> None:
        self.marked.remove(tensor)

    def add_activation(self, *a: Any) -> Any:
        return self.make("add_activation", *a)

    def add_constant(self, *a: Any) -> Any:
        return self.make("add_constant", *a)

    def add_convolution_nd(self, *a: Any) -> Any:
        return self.make("add_convolution_nd", *a)

    def add_normalization(self, *a: Any) -> Any:
        return self.make("add_normalization", *a)

    def add_quantize(self, input: Any, scale: Any) -> Any:
        return self.make("add_quantize", input, scale)

    def add_topk(self, *a: Any) -> Any:
        return self.make("add_topk", *a)


class Network10(Network86):
    def add_quantize(self, input: Any, scale: Any, output_type: Any) -> Any:  # type: ignore[override]
        return self.make("add_quantize", input, scale, output_type)

    def add_normalization_v2(self, *a: Any) -> Any:
        return self.make("add_normalization_v2", *a)

    def add_squeeze(self, *a: Any) -> Any:
        return self.make("add_squeeze", *a)


class Fixture:
    def __init__(self, version: str) -> None:
        self.vendor: Any = FakeVendor(version)
        vendor: Any = self.vendor
        vendor.Weights = Weights
        names = ("FLOAT", "HALF", "INT8", "INT32", "BOOL")
        vendor.DataType = members("DataType", *names, *(("INT64", "INT4") if version != V8 else ()))
        vendor.ActivationType = members("ActivationType", "RELU", "LEAKY_RELU")  # no GELU_ERF: that came with 10
        vendor.TopKOperation = members("TopKOperation", "MAX", "MIN")
        vendor.PaddingMode = members("PaddingMode", "EXPLICIT_ROUND_DOWN")
        self.native = Network86() if version == V8 else Network10()
        vendor.Builder.create_network = lambda builder, flags: self.native
        backend = TensorRTFamilyBackend("tensorrt", module=vendor)
        self.builder = backend.create_builder(lambda severity, line: None)
        self.owner = trtx.Builder(None, backend)
        self.network = self.owner.create_network()

    def input(self, shape: Any = (2, 4, 5, 5), dtype: Any = "float32") -> trtx.NetworkTensor:
        return self.network.add_input("x", dtype, shape)

    def called(self, method: str) -> tuple[Any, ...]:
        return next(arguments for name, arguments in self.native.calls if name == method)


@pytest.fixture
def make() -> Any:
    made: list[Fixture] = []

    def fixture(version: str) -> Fixture:
        made.append(Fixture(version))
        return made[-1]

    yield fixture
    for one in made:
        one.network.close()
        one.owner.close()


def test_weights_stay_where_tensorrt_reads_them(make: Any) -> None:
    fixture = make(V8)
    kernel = np.arange(8, dtype=np.float32)
    layer = fixture.network.add_convolution_nd(fixture.input(), 2, 1, kernel)
    _, maps, size, weights, bias = fixture.called("add_convolution_nd")
    expected = kernel.tobytes()
    kernel[:] = 0
    assert (maps, size, weights.count, bias.count) == (2, (1, 1), 8, 0)
    assert weights.read(32) == expected
    assert fixture.network._native._calls._layers[layer.name].stride_nd == (1, 1)


def test_names_reach_tensorrt_and_come_back(make: Any) -> None:
    fixture = make(V10)
    layer = fixture.network.add_topk(fixture.input(), "max", 2, 1, name="best")
    native = fixture.network._native._calls._layers["best"]
    assert (native.name, [tensor.name for tensor in native.made]) == ("best", ["best.0", "best.1"])
    assert fixture.called("add_topk")[2:] == (2, 0b10)
    fixture.network.mark_output(layer.outputs[0], "score")
    assert fixture.native.marked[0].name == "score"
    fixture.network.unmark_output(layer.outputs[0])
    assert fixture.native.marked == []
    assert native.made[0].name == "best.0"


def test_integers_of_64_bits_on_8_6(make: Any) -> None:
    fixture = make(V8)
    fixture.network.add_constant(np.array([7, -1], np.int64))
    _, weights = fixture.called("add_constant")
    assert (weights.dtype.name, weights.count, weights.read(8)) == ("INT32", 2, np.array([7, -1], np.int32).tobytes())
    with pytest.raises(trtx.BuilderError, match=r"tensorrt 8\.6\.0 has integers of 32 bits"):
        fixture.network.add_constant(np.array([2**40], np.int64))


def test_int4_is_packed_the_first_in_the_low_half(make: Any) -> None:
    fixture = make(V10)
    fixture.network.add_constant(np.array([1, -2, 7], np.int8).astype(ml_dtypes.int4))
    _, weights = fixture.called("add_constant")
    assert (weights.dtype.name, weights.count, weights.read(2)) == ("INT4", 3, bytes([0xE1, 0x07]))


@pytest.mark.parametrize(("version", "arguments"), [(V8, 2), (V10, 3)])
def test_quantize_has_a_third_argument_since_10(make: Any, version: str, arguments: int) -> None:
    fixture = make(version)
    scale = fixture.network.add_constant(np.float32(1)).output
    fixture.network.add_quantize(fixture.input(), scale)
    assert len(fixture.called("add_quantize")) == arguments


@pytest.mark.parametrize(("version", "method"), [(V8, "add_normalization"), (V10, "add_normalization_v2")])
def test_newer_normalization_is_used_where_there_is_one(make: Any, version: str, method: str) -> None:
    fixture = make(version)
    one = fixture.network.add_constant(np.ones((1, 4, 1, 1), np.float32)).output
    fixture.network.add_normalization(fixture.input(), one, one, (2, 3))
    assert fixture.called(method)[3] == 0b1100


LACKING: list[tuple[Any, str]] = [
    (lambda n, x: n.add_squeeze(x, (0,)), r"tensorrt 8\.6\.0 has no add_squeeze, which layer 'squeeze_1'"),
    (lambda n, x: n.add_activation(x, "gelu_erf"), r"tensorrt 8\.6\.0 has no ActivationType\.GELU_ERF.*RELU, LEAKY"),
    (lambda n, x: n.add_cast(x, "int64"), r"tensorrt 8\.6\.0 has no DataType\.INT64"),
    (lambda n, x: n.add_normalization(x, x, x, (2, 3), num_groups=2), r"has no add_normalization_v2"),
]


@pytest.mark.parametrize(("attempt", "says"), LACKING, ids=[says for _, says in LACKING])
def test_what_8_6_lacks_is_refused_by_name(make: Any, attempt: Any, says: str) -> None:
    fixture = make(V8)
    x = fixture.input((1, 4, 5, 5))
    with pytest.raises(trtx.BuilderError, match=says):
        attempt(fixture.network, x)


def test_attribute_that_a_layer_lacks(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = make(V8)
    x = fixture.input()
    monkeypatch.delattr(AnyLayer, "alpha")
    with pytest.raises(trtx.BuilderError, match=r"tensorrt 8\.6\.0 has no alpha in layer 'activation_1'"):
        fixture.network.add_activation(x, "leaky_relu")


def test_none_is_a_refusal(make: Any) -> None:
    fixture = make(V10)
    x = fixture.input()
    fixture.native.answers = False
    with pytest.raises(trtx.BuilderError, match=r"refused layer 'activation_1' \(add_activation\): .* gave no layer"):
        fixture.network.add_activation(x, "relu")
    with make(V10).owner.create_network() as other:
        other._native._calls._network.answers = False
        with pytest.raises(trtx.BuilderError, match=r"refused input 'x' float32 \[1\]"):
            other.add_input("x", "float32", (1,))


def test_types_are_set_where_typing_is_weak(make: Any) -> None:
    fixture = make(V8)
    layer = fixture.network.add_activation(fixture.input(), "relu")
    layer.set_precision(trtx.DataType.HALF)
    layer.set_output_type(0, trtx.DataType.FLOAT)
    native = fixture.network._native._calls._layers[layer.name]
    assert native.precision.name == "HALF"
    assert native.types[0].name == "FLOAT"
    strong = make(V11)
    with pytest.raises(trtx.BuilderError, match=r"tensorrt 11\.4\.0\.106 is strongly typed.*add_cast"):
        strong.network.add_activation(strong.input(), "relu").set_precision(trtx.DataType.HALF)
