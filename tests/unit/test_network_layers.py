"""Every layer on the mock: its numbers, its shape and type, and the ONNX model that it amounts to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.network_cases import CASES, Case, M, fill
from trtx_py.network import TABLE


async def run(backend: MockBackend, builder: trtx.Builder, network: trtx.Network, feeds: Any) -> dict[str, Any]:
    with builder.create_config() as config:
        plan = await builder.build_serialized_network(network, config)
    async with trtx.Runtime(None, backend) as runtime, await runtime.deserialize(plan) as engine:
        return dict(await engine.infer(feeds))


def test_every_kind_has_a_case() -> None:
    used: set[str] = set()
    with trtx.Builder(None, MockBackend()) as builder:
        for case in CASES:
            with builder.create_network() as network:
                fill(network, case)
                used.update(layer._request.kind for layer in network.layers)
    assert TABLE.keys() - used == {"assertion"}  # which computes nothing: see below


def test_every_method_is_in_the_reference() -> None:
    methods = {name for name in dir(trtx.Network) if name.startswith("add_")}
    reference = (Path(__file__).parents[2] / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    assert [name for name in methods if f"`{name}`" not in reference] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_layer(case: Case, mock_backend: MockBackend) -> None:
    async with trtx.Builder(None, mock_backend) as builder, builder.create_network() as network:
        names = fill(network, case)
        found = await run(mock_backend, builder, network, case.feeds)
        model = network.to_onnx()
        declared = {tensor.name: tensor for tensor in network.outputs}
        drawn = {t.name: (t.dtype, t.shape) for layer in network.layers for t in layer.outputs}
    onnx.checker.check_model(model, full_check=True)
    if case.expected is None:
        assert names
        return
    twin = onnxruntime.InferenceSession(model).run(names, dict(case.feeds))
    for name, expected, from_twin in zip(names, case.expected, twin, strict=True):
        np.testing.assert_allclose(found[name], expected, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(from_twin, expected, rtol=2e-5, atol=2e-5)
        for dtype, shape in ((declared[name].dtype, declared[name].shape), drawn[name]):
            assert dtype.numpy == expected.dtype
            assert all(n in (-1, size) for n, size in zip(shape, expected.shape, strict=True))


async def test_random_fill_stays_in_its_limits(mock_backend: MockBackend) -> None:
    async with trtx.Builder(None, mock_backend) as builder, builder.create_network() as network:
        x = network.add_input("x", "float32", (1000,))
        noise = network.add_fill((1000,), "random_uniform", 2.0, 3.0).output
        network.mark_output(network.add_elementwise(x, noise, "sum").output, "y")
        found = np.asarray((await run(mock_backend, builder, network, {"x": np.zeros(1000, np.float32)}))["y"])
    assert 2 <= found.min() < 2.1
    assert 2.9 < found.max() <= 3


async def test_shapes_that_only_the_run_decides(mock_backend: MockBackend) -> None:
    """Flatten a dynamic batch by its own shape: the mock and ONNX follow the arithmetic of shapes across layers."""
    async with trtx.Builder(None, mock_backend) as builder, builder.create_network() as network:
        x = network.add_input("x", "float32", (-1, 3, 4))
        batch = network.add_slice(network.add_shape(x).output, (0,), (1,), (1,)).output
        rest = network.add_constant(np.array([12], np.int64)).output
        flat = network.add_shuffle(x, reshape=network.add_concatenation([batch, rest]).output).output
        assert flat.shape == (-1, 12)
        network.mark_output(flat, "y")
        with builder.create_config() as config, builder.create_optimization_profile() as profile:
            profile.set_shape("x", (1, 3, 4), (2, 3, 4), (8, 3, 4))
            config.add_optimization_profile(profile)
            plan = await builder.build_serialized_network(network, config)
    assert [tensor.shape for tensor in plan.header.io_tensors] == [(-1, 3, 4), (-1, 12)]
    async with trtx.Runtime(None, mock_backend) as runtime, await runtime.deserialize(plan) as engine:
        found = await engine.infer({"x": M})
    np.testing.assert_array_equal(found["y"], M.reshape(2, 12))


def test_assertion_is_left_out_of_onnx(mock_backend: MockBackend) -> None:
    with trtx.Builder(None, mock_backend) as builder, builder.create_network() as network:
        x = network.add_input("x", "float32", (2, 3))
        layer = network.add_assertion(network.add_constant(np.array([True])).output, "never")
        assert (layer.type, layer.outputs) == ("ASSERTION", ())
        network.mark_output(network.add_activation(x, "relu").output, "y")
        assert [node.op_type for node in onnx.load_from_string(network.to_onnx()).graph.node] == ["Relu"]


def test_parsed_model_is_given_back(mock_backend: MockBackend) -> None:
    from tests.unit.ownership import matmul_model

    with trtx.Builder(None, mock_backend) as builder, builder.create_network() as network:
        network.parse_onnx(matmul_model())
        assert network.to_onnx() == matmul_model()
        assert network.layers == ()


def test_precision_of_the_config_works_on_layers(mock_backend: MockBackend) -> None:
    """What converts parsed models converts networks of layers too."""
    with trtx.Builder(None, mock_backend) as builder, builder.create_network() as network:
        x = network.add_input("x", "float32", (2, 3, 4))
        w = network.add_constant(np.ones((1, 4, 5), np.float32)).output
        network.mark_output(network.add_matrix_multiply(x, "none", w, "none").output, "y")
        with builder.create_config() as config:
            config.precision = "fp16"
            plan = builder.build_serialized_network_sync(network, config)
    assert plan.header.precision == "fp16"
    assert [tensor.dtype for tensor in plan.header.io_tensors] == [trtx.DataType.FLOAT] * 2
