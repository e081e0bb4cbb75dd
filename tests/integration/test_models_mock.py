"""The same models on the mock, through the public API: its results against ONNX Runtime's on the same inputs.

Twice: parsed and built by the mock, and by the real TensorRT-RTX with the mock running the result.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import JoinedBackend
from tests.model_zoo import ALL, LIGHT, Model, as_parameters
from tests.onnx_suite import light_data
from trtx_py.backends.registry import resolve_backend

#: What TensorRT refuses for reasons that the mock shares is not run on it; nor is what only repeats another entry.
RUNNABLE = tuple(model for model in ALL if model.name != "ocr_cls-as-it-is")
JOINT = tuple(model for model in RUNNABLE if model.rtx is None)


def reference(source: bytes, inputs: dict[str, Any]) -> dict[str, Any]:
    """Straight from ONNX Runtime, without any of our code."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    wanted = {given.name for given in session.get_inputs()}
    feeds = {name: array for name, array in inputs.items() if name in wanted}
    return dict(zip(names, session.run(names, feeds), strict=True))


def relative_error(actual: Any, expected: Any) -> float:
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(a - e) / max(np.linalg.norm(e), 1e-12))


def assert_equal_to_reference(outputs: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert outputs.keys() == expected.keys()
    for name, want in expected.items():
        have = outputs[name]
        assert have.shape == want.shape, name
        assert have.dtype == want.dtype, name
        assert relative_error(have, want) <= tolerance, name


@pytest.mark.parametrize("model", as_parameters(RUNNABLE))
async def test_mock_computes_what_onnxruntime_computes(model: Model, mock_backend_factory: Any) -> None:
    # Silero's exports hold If branches whose rank the real builder cannot know; the mock is told to take them.
    backend = mock_backend_factory(operators="tensorrt" if model.rtx is None else "any")
    source, inputs = model.source(), model.inputs()
    async with trtx.open_engine(source, backend, profiles=model.profiles()) as engine:
        outputs = await engine.infer(inputs)
    assert_equal_to_reference(outputs, reference(source, inputs), model.tolerance)
    if model.origin == "light":
        # These come with outputs of their own, made with the same ramp.
        given, expected = light_data(model.path())
        np.testing.assert_array_equal(given[0], next(iter(inputs.values())))
        for have, want in zip(outputs.values(), expected, strict=True):
            np.testing.assert_allclose(have, want, rtol=2e-3, atol=1e-7)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
@pytest.mark.parametrize("model", as_parameters(JOINT))
async def test_built_by_tensorrt_rtx_and_run_by_the_mock(model: Model, mock_backend_factory: Any) -> None:
    mock = mock_backend_factory(operators="any")
    backend = JoinedBackend(resolve_backend("tensorrt_rtx", need="build"), mock)
    source, inputs = model.source(), model.inputs()
    async with trtx.open_engine(source, backend, profiles=model.profiles()) as engine:
        assert engine.plan_header.flavour == "tensorrt_rtx+mock"
        outputs = await engine.infer(inputs)
    assert_equal_to_reference(outputs, reference(source, inputs), model.tolerance)


@pytest.mark.models
@pytest.mark.parametrize("name", ["ocr_cls-as-it-is"])
async def test_mock_refuses_what_tensorrt_refuses(name: str, mock_backend_factory: Any) -> None:
    model = next(m for m in ALL if m.name == name)
    with pytest.raises(trtx.BuilderError, match=r"Dimensions with name \? must be equal"):
        async with trtx.open_engine(model.source(), mock_backend_factory(), profiles=model.profiles()):
            pass


async def test_by_the_names_of_backends(tmp_path: Path) -> None:
    """As a user writes it: names, a path, a plan that is saved and loaded."""
    model = LIGHT[-1]
    expected = reference(model.source(), model.inputs())
    for backend in ["mock", *(["tensorrt_rtx+mock"] if importlib.util.find_spec("tensorrt_rtx") else [])]:
        with (
            trtx.Builder(backend=backend) as builder,
            builder.create_network() as network,
            builder.create_config() as config,
        ):
            await network.parse_onnx_async(model.path())
            plan = await builder.build_serialized_network(network, config)
        plan.save(tmp_path / "zoo.plan")
        async with trtx.open_engine(tmp_path / "zoo.plan", backend) as engine:
            assert_equal_to_reference(await engine.infer(model.inputs()), expected, model.tolerance)
