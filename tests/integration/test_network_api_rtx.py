"""Networks built layer by layer, on the mock and on tensorrt-rtx, against the same networks written as ONNX."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.network_cases import CASES, Case, fill

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install tensorrt-rtx")

TARGET = ("8.9",)
_rng = np.random.default_rng(11)


def weights(*shape: int) -> Any:
    return (_rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)).astype(np.float32)


def test_networks_are_made_while_their_builder_builds() -> None:
    """In a process of its own: where such a network had the error recorder of the build, destroying it ended that."""
    script = """
import trtx_py as trtx
from tests.unit.ownership import PROFILE, matmul_model

options = trtx.BuilderOptions(compute_capabilities=("8.9",), profiles=[PROFILE])
with trtx.Builder(None, "tensorrt_rtx") as builder, builder.create_config(options) as config:
    def meanwhile(phase, step, steps):
        if step > 1:
            return
        with builder.create_network() as other:
            other.parse_onnx(matmul_model())
        with builder.create_network() as broken:
            try:
                broken.parse_onnx(b"no model")
            except trtx.ParserError:
                print("refused")

    with builder.create_network() as network:
        network.parse_onnx(matmul_model())
        print(len(builder.build_serialized_network_sync(network, config, on_progress=meanwhile)) > 1000)
"""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["refused", "True"]


def test_weights_have_the_names_that_they_have_as_onnx() -> None:
    with trtx.Builder(None, "tensorrt_rtx") as builder, builder.create_network() as network:
        x = network.add_input("x", "float32", (1, 2, 4, 4))
        y = network.add_convolution_nd(x, 2, 1, weights(2, 2, 1, 1), weights(2), name="conv").output
        y = network.add_scale(y, "channel", weights(2), name="scale").output
        y = network.add_elementwise(y, network.add_constant(weights(1, 2, 4, 4), name="c").output, "sum").output
        network.mark_output(y)
        names = [tensor.name for tensor in onnx.load_from_string(network.to_onnx()).graph.initializer]
        assert names == ["conv//kernel", "conv//bias", "scale//shift", "c"]
        native: Any = network._native
        assert all(native.native.mark_weights_refittable(name) for name in names)
        options = trtx.BuilderOptions(compute_capabilities=TARGET, refit="individual", refittable_weights=("conv",))
        says = r"tensorrt_rtx 1\.\d+.* has no weights 'conv' in this network"
        with builder.create_config(options) as config, pytest.raises(trtx.BuilderError, match=says):
            builder.build_serialized_network_sync(network, config)


def test_constant_without_elements() -> None:
    with trtx.Builder(None, "tensorrt_rtx") as builder, builder.create_network() as network:
        assert network.add_constant(np.zeros((0, 4), np.float32)).output.shape == (0, 4)


def test_refusal_says_what_tensorrt_said_first() -> None:
    with trtx.Builder(None, "tensorrt_rtx") as builder, builder.create_network() as network:
        x = network.add_input("x", "float32", (2, 3))
        with pytest.raises(trtx.BuilderError, match=r"'elementwise_1'.*AND requires boolean inputs"):
            network.add_elementwise(x, x, "and")


class Twin:
    """One network twice: by the API, and as ONNX by its own nodes."""

    shape: tuple[int, ...]

    def build(self, network: trtx.Network) -> None:
        raise NotImplementedError

    def as_onnx(self) -> onnx.ModelProto:
        raise NotImplementedError

    def model(self, nodes: list[onnx.NodeProto], tensors: dict[str, Any], out: list[int]) -> onnx.ModelProto:
        graph = helper.make_graph(
            nodes,
            "twin",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
            [numpy_helper.from_array(array, name) for name, array in tensors.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class LeNet(Twin):
    shape = (4, 1, 28, 28)

    def __init__(self) -> None:
        self.t = {
            "k1": weights(6, 1, 5, 5), "b1": weights(6), "k2": weights(16, 6, 5, 5), "b2": weights(16),
            "w1": weights(400, 120), "w2": weights(120, 84), "w3": weights(84, 10),
        }  # fmt: skip

    def build(self, network: trtx.Network) -> None:
        t, n = self.t, network
        x = n.add_input("x", "float32", self.shape)
        for kernel, bias, maps, padding in (("k1", "b1", 6, 2), ("k2", "b2", 16, 0)):
            x = n.add_convolution_nd(x, maps, 5, t[kernel], t[bias], padding=padding).output
            x = n.add_pooling_nd(n.add_activation(x, "tanh").output, "average", 2, stride=2).output
        x = n.add_shuffle(x, reshape=(0, -1)).output
        for name in ("w1", "w2", "w3"):
            x = n.add_matrix_multiply(x, "none", n.add_constant(t[name]).output, "none").output
            x = n.add_activation(x, "relu").output if name != "w3" else n.add_softmax(x, 1).output
        n.mark_output(x, "y")

    def as_onnx(self) -> onnx.ModelProto:
        node = helper.make_node
        nodes = [
            node("Conv", ["x", "k1", "b1"], ["c1"], pads=[2] * 4), node("Tanh", ["c1"], ["a1"]),
            node("AveragePool", ["a1"], ["p1"], kernel_shape=[2, 2], strides=[2, 2]),
            node("Conv", ["p1", "k2", "b2"], ["c2"]), node("Tanh", ["c2"], ["a2"]),
            node("AveragePool", ["a2"], ["p2"], kernel_shape=[2, 2], strides=[2, 2]),
            node("Flatten", ["p2"], ["f"]), node("MatMul", ["f", "w1"], ["m1"]), node("Relu", ["m1"], ["r1"]),
            node("MatMul", ["r1", "w2"], ["m2"]), node("Relu", ["m2"], ["r2"]), node("MatMul", ["r2", "w3"], ["m3"]),
            node("Softmax", ["m3"], ["y"], axis=1),
        ]  # fmt: skip
        return self.model(nodes, self.t, [4, 10])


class Residual(Twin):
    shape = (2, 8, 14, 14)

    def __init__(self) -> None:
        self.t = {"k1": weights(8, 8, 3, 3), "k2": weights(8, 8, 3, 3)}
        for norm in ("1", "2"):
            self.t |= {f"g{norm}": weights(8), f"o{norm}": weights(8)}

    def build(self, network: trtx.Network) -> None:
        t, n = self.t, network
        x = y = n.add_input("x", "float32", self.shape)
        for step in ("1", "2"):
            y = n.add_convolution_nd(y, 8, 3, t[f"k{step}"], padding=1).output
            scale, bias = (n.add_constant(t[f"{what}{step}"].reshape(1, 8, 1, 1)).output for what in "go")
            y = n.add_normalization(y, scale, bias, (2, 3)).output
            if step == "1":
                y = n.add_activation(y, "relu").output
        y = n.add_activation(n.add_elementwise(x, y, "sum").output, "relu").output
        n.mark_output(y, "y")

    def as_onnx(self) -> onnx.ModelProto:
        node = helper.make_node
        nodes = [
            node("Conv", ["x", "k1"], ["c1"], pads=[1] * 4),
            node("InstanceNormalization", ["c1", "g1", "o1"], ["n1"]),
            node("Relu", ["n1"], ["r1"]), node("Conv", ["r1", "k2"], ["c2"], pads=[1] * 4),
            node("InstanceNormalization", ["c2", "g2", "o2"], ["n2"]),
            node("Add", ["x", "n2"], ["s"]), node("Relu", ["s"], ["y"]),
        ]  # fmt: skip
        return self.model(nodes, self.t, list(self.shape))


class Attention(Twin):
    """Layer normalization, four heads, a projection and the residual."""

    shape = (2, 10, 32)

    def __init__(self) -> None:
        self.t = {name: weights(32, 32) for name in ("wq", "wk", "wv", "wo")} | {"g": weights(32), "o": weights(32)}

    def build(self, network: trtx.Network) -> None:
        n, t = network, self.t
        x = n.add_input("x", "float32", self.shape)
        gain, offset = (n.add_constant(t[name].reshape(1, 1, 32)).output for name in ("g", "o"))
        normal = n.add_normalization(x, gain, offset, (-1,)).output

        def product(value: trtx.NetworkTensor, name: str) -> trtx.NetworkTensor:
            return n.add_matrix_multiply(value, "none", n.add_constant(t[name][None]).output, "none").output

        def heads(name: str) -> trtx.NetworkTensor:
            return n.add_shuffle(product(normal, name), reshape=(0, 0, 4, 8), second_transpose=(0, 2, 1, 3)).output

        scaled = n.add_elementwise(
            heads("wq"), n.add_constant(np.full((1, 1, 1, 1), 8**-0.5, np.float32)).output, "prod"
        )
        mixed = n.add_attention(scaled.output, heads("wk"), heads("wv")).output
        joined = n.add_shuffle(mixed, first_transpose=(0, 2, 1, 3), reshape=(0, 0, 32)).output
        n.mark_output(n.add_elementwise(x, product(joined, "wo"), "sum").output, "y")

    def as_onnx(self) -> onnx.ModelProto:
        node, nodes = helper.make_node, [helper.make_node("LayerNormalization", ["x", "g", "o"], ["n"], axis=-1)]
        for name in ("q", "k", "v"):
            perm = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
            nodes += [
                node("MatMul", ["n", f"w{name}"], [f"{name}1"]), node("Reshape", [f"{name}1", "split"], [f"{name}2"]),
                node("Transpose", [f"{name}2"], [name], perm=perm),
            ]  # fmt: skip
        nodes += [
            node("MatMul", ["q", "k"], ["s1"]), node("Mul", ["s1", "scale"], ["s2"]), node("Softmax", ["s2"], ["p"]),
            node("MatMul", ["p", "v"], ["m1"]), node("Transpose", ["m1"], ["m2"], perm=[0, 2, 1, 3]),
            node("Reshape", ["m2", "join"], ["m3"]), node("MatMul", ["m3", "wo"], ["m4"]),
            node("Add", ["x", "m4"], ["y"]),
        ]  # fmt: skip
        more = {"split": np.array([0, 0, 4, 8]), "join": np.array([0, 0, 32]), "scale": np.float32(8**-0.5)}
        return self.model(nodes, self.t | {k: np.asarray(v) for k, v in more.items()}, list(self.shape))


TWINS: list[Callable[[], Twin]] = [LeNet, Residual, Attention]


@pytest.mark.parametrize("make", TWINS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("backend", ["mock", "tensorrt_rtx+mock"])
async def test_numbers_are_those_of_the_onnx_twin(make: Callable[[], Twin], backend: str) -> None:
    twin = make()
    x = np.random.default_rng(3).standard_normal(twin.shape).astype(np.float32)
    model = twin.as_onnx()
    onnx.checker.check_model(model, full_check=True)
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(["y"], {"x": x})
    async with trtx.Builder(None, backend) as builder, builder.create_network() as network:
        twin.build(network)
        written = network.to_onnx()
        async with builder.create_config() as config:
            config.compute_capabilities = TARGET
            plan = await builder.build_serialized_network(network, config)
    async with trtx.Runtime(None, backend) as runtime, await runtime.deserialize(plan) as engine:
        found = (await engine.infer({"x": x}))["y"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    (again,) = onnxruntime.InferenceSession(written).run(["y"], {"x": x})
    np.testing.assert_allclose(again, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", TWINS, ids=lambda kind: kind.__name__)
def test_rtx_builds_the_layers_and_what_they_are_written_back_as(make: Callable[[], Twin]) -> None:
    with trtx.Builder(None, "tensorrt_rtx") as builder, builder.create_config() as config:
        config.compute_capabilities = TARGET
        with builder.create_network() as network:
            make().build(network)
            by_layers = builder.build_serialized_network_sync(network, config)
            written = network.to_onnx()
        with builder.create_network() as parsed:
            parsed.parse_onnx(written)
            by_parser = builder.build_serialized_network_sync(parsed, config)
    assert by_layers.header.io_tensors == by_parser.header.io_tensors
    assert len(by_layers) > 1000


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rtx_has_every_layer_with_the_same_shapes(case: Case) -> None:
    with (
        trtx.Builder(None, "tensorrt_rtx") as builder, builder.create_network() as network,
        trtx.Builder(None, MockBackend()) as mock, mock.create_network() as shadow,
        builder.create_config() as config,
    ):  # fmt: skip
        fill(network, case)
        fill(shadow, case)
        for real, ours in zip(network.layers, shadow.layers, strict=True):
            assert (real.name, real.type) == (ours.name, ours.type)
            assert [tensor.dtype for tensor in real.outputs] == [tensor.dtype for tensor in ours.outputs]
            assert [len(tensor.shape) for tensor in real.outputs] == [len(tensor.shape) for tensor in ours.outputs]
        config.compute_capabilities = TARGET
        if case.builds:
            with pytest.raises(trtx.BuilderError, match=case.builds):
                builder.build_serialized_network_sync(network, config)
        else:
            assert builder.build_serialized_network_sync(network, config)


def test_rtx_refuses_a_layer_by_name_and_says_what_tensorrt_said() -> None:
    with trtx.Builder(None, "tensorrt_rtx") as builder, builder.create_network() as network:
        x = network.add_input("x", "float32", (2, 3))
        other = network.add_constant(np.ones((4, 5), np.float32)).output
        with pytest.raises(trtx.BuilderError, match=r"refused layer 'product' \(add_matrix_multiply\)") as caught:
            network.add_matrix_multiply(x, "none", other, "none", name="product")
        assert any("product" in line for line in caught.value.tensorrt_log)
        with pytest.raises(trtx.InvalidArgumentError, match="create another network"):
            network.add_identity(x)


def test_assertion_that_holds_and_one_that_does_not() -> None:
    def build(holds: bool) -> trtx.Plan:
        with (
            trtx.Builder(None, "tensorrt_rtx") as builder, builder.create_network() as network,
            builder.create_config() as config,
        ):  # fmt: skip
            x = network.add_input("x", "float32", (2, 3))
            network.add_assertion(network.add_constant(np.array([holds])).output, "the moon is full")
            network.mark_output(network.add_activation(x, "relu").output)
            config.compute_capabilities = TARGET
            return builder.build_serialized_network_sync(network, config)

    assert build(True)
    with pytest.raises(trtx.BuilderError, match="the moon is full"):
        build(False)
