"""Numbers: against ONNX Runtime, for every element type, and on the models of the GPU kit."""

from __future__ import annotations

import importlib
import os
import pathlib
import sys
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from mock_backend._dtypes import from_bytes, to_bytes
from tests.gpu.kit import Kit
from trtx_py._types import DataType, ShapeRange

KIT = pathlib.Path(os.environ.get("TRTX_GPU_KIT", "/work/shared/gpu-kit"))

RANGES: dict[str, dict[str, Any]] = {
    "mlp": {"x": ((1, 64), (8, 64), (256, 64))},
    "mnist_cnn": {"image": ((1, 1, 28, 28), (8, 1, 28, 28), (64, 1, 28, 28))},
    "multi_io": dict.fromkeys("abc", ((1, 8), (4, 8), (32, 8))),
    "shape_input": {"shape": ((1, 4), (2, 4), (8, 4))},
    "superres": {"input": ((1, 1, 224, 224), (1, 1, 224, 224), (2, 1, 224, 224))},
    "silero_seq": {"input": ((1, 576), (5, 576), (16, 576))},
    "magika": {"bytes": ((1, 2048), (2, 2048), (4, 2048))},
    "ocr_cls": {"x": ((1, 3, 48, 192), (3, 3, 48, 192), (4, 3, 48, 192))},
}


def kit_cases():
    if not (KIT / "cases.json").exists():
        return []
    import json

    cases = json.loads((KIT / "cases.json").read_text())
    return [c for c in cases if (KIT / "onnx" / f"{c['model']}.onnx").exists()]


@pytest.mark.skipif(not kit_cases(), reason=f"the GPU kit is not at {KIT}; set TRTX_GPU_KIT")
@pytest.mark.parametrize("case", kit_cases(), ids=lambda case: case["expected"])
def test_kit(rig, case, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(KIT), *sys.path])
    kit: Any = importlib.import_module("cases")

    model = Kit(KIT).model(case["engine"])
    profile = {name: ShapeRange(*limits) for name, limits in RANGES.get(case["model"], {}).items()}
    context = rig.ready(model, *([profile] if profile else []))
    outputs = rig.run(context, **kit.make_inputs(case))
    expected = kit.expected_outputs(case)
    assert set(outputs) == set(expected)
    for name, array in outputs.items():
        assert array.shape == expected[name].shape
        assert array.dtype == expected[name].dtype
        assert kit.relative_error(array, expected[name]) <= 1e-5
    assert context.parent.numerics.engine == "onnxruntime"


def identity_like(models, elem, opset):
    """A model whose I/O has type ``elem`` and whose data passes a float32 computation or nothing."""
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    return models.make(nodes, [("x", elem, [5])], [("y", elem, [5])], opset=opset)


@pytest.mark.parametrize(
    ("elem", "array", "opset"),
    [
        ("FLOAT", np.arange(5, dtype=np.float32), 17),
        ("FLOAT16", np.arange(5, dtype=np.float16), 17),
        ("DOUBLE", np.arange(5, dtype=np.float32), 17),
        ("BFLOAT16", np.array([0, 1.5, -2, 3.25, 1e10], ml_dtypes.bfloat16), 17),
        ("INT8", np.array([-128, -1, 0, 1, 127], np.int8), 17),
        ("UINT8", np.array([0, 1, 2, 254, 255], np.uint8), 17),
        ("INT32", np.array([-(2**31), -1, 0, 1, 2**31 - 1], np.int32), 17),
        ("INT64", np.array([-(2**63), -1, 0, 1, 2**63 - 1], np.int64), 17),
        ("BOOL", np.array([True, False, True, True, False]), 17),
        ("FLOAT8E4M3FN", np.array([0, 1.5, -2, 448, 0.25], ml_dtypes.float8_e4m3fn), 21),
        ("INT4", np.array([-8, -1, 0, 1, 7], ml_dtypes.int4), 21),
        ("FLOAT4E2M1", np.array([0, 0.5, -1.5, 6, -6], ml_dtypes.float4_e2m1fn), 23),
    ],
)
def test_element_types_pass_unchanged(rig, models, elem, array, opset):
    y = rig.run(rig.ready(identity_like(models, elem, opset)), x=array)["y"]
    assert y.dtype == array.dtype
    assert y.tolist() == array.tolist()


def test_bfloat16_computes(rig, models):
    y = rig.run(rig.ready(models.relu([4], "BFLOAT16")), x=np.array([-1, 2, -3, 4.5], ml_dtypes.bfloat16))["y"]
    assert y.astype(np.float32).tolist() == [0, 2, 0, 4.5]


def test_reference_evaluator_takes_over(rig, models, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    context = rig.ready(models.relu(), models.N4)
    x = np.array([[-1, 2, -3, 4]], np.float32)
    np.testing.assert_array_equal(rig.run(context, x=x)["y"], np.maximum(x, 0))
    assert context.parent.numerics.engine == "onnx.reference"


def test_shape_that_inference_cannot_see_is_found_by_running(rig, models):
    # the value of a shape computed by Mod does not pass through ONNX's inference
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Mod", ["s", "three"], ["m"]),
        helper.make_node("ConstantOfShape", ["m"], ["y"]),
    ]
    weights = {"three": np.array([3], np.int64)}
    model = models.make(nodes, [("x", "FLOAT", ["N"])], [("y", "FLOAT", ["M"])], weights=weights)
    context = rig.ready(model, {"x": ShapeRange((1,), (4,), (8,))})
    assert context.get_tensor_shape("y") == (-1,)
    context.set_input_shape("x", (5,))
    assert context.get_tensor_shape("y") == (2,)
    assert rig.run(context, x=np.zeros(8, np.float32))["y"].shape == (2,)


@given(st.lists(st.integers(-8, 7), max_size=33))
def test_int4_packing(values):
    array = np.array(values, ml_dtypes.int4)
    raw = to_bytes(array, DataType.INT4)
    assert raw.nbytes == DataType.INT4.nbytes(array.shape)
    assert from_bytes(raw, DataType.INT4, array.shape).tolist() == values
    if len(values) >= 2:
        assert int(raw[0]) & 0x0F == values[0] & 0x0F  # low nibble first


@pytest.mark.parametrize("dtype", list(DataType))
def test_bytes_round_trip(dtype):
    array = np.ones((3, 5)).astype(dtype.numpy)
    raw = to_bytes(array, dtype)
    assert raw.nbytes == dtype.nbytes(array.shape)
    assert from_bytes(raw, dtype, array.shape).tolist() == array.tolist()


def test_importing_the_mock_imports_no_onnx():
    import subprocess

    code = "import mock_backend.pytest_plugin, sys; print(sorted({'onnx', 'onnxruntime'} & set(sys.modules)))"
    root = pathlib.Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_large_weights_leave_no_mark_on_shapes(rig, models):
    w = np.ones((300, 7), np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = models.make([node], [("x", "FLOAT", ["N", 300])], [("y", "FLOAT", ["N", "k"])], weights={"w": w})
    assert onnx.load_from_string(model).graph.initializer[0].data_type == TensorProto.FLOAT
    context = rig.ready(model, {"x": ShapeRange((1, 300), (1, 300), (4, 300))})
    context.set_input_shape("x", (2, 300))
    assert context.get_tensor_shape("y") == (2, 7)
