"""16 bits on a CPU: every result is rounded as the type rounds, whatever ONNX Runtime would leave out."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import trtx_py as trtx
from tests.quantize_models import attention, cnn, images, make
from trtx_py.quantize import convert
from trtx_py.quantize._reference import Runner
from trtx_py.quantize._simulate import rounding_model

TYPES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def chain() -> onnx.ModelProto:
    node = helper.make_node
    return make(
        [
            node("Mul", ["x", "c"], ["a"], name="a"),
            node("Add", ["a", "c"], ["b"], name="b"),
            node("Mul", ["b", "b"], ["y"], name="y"),
        ],
        {"x": ["N"]},
        {"y": ["N"]},
        {"c": np.float32(0.1)},
    )


@pytest.mark.parametrize("word", ["fp16", "bf16"])
def test_each_step_is_rounded(word: str) -> None:
    def low(values: Any) -> Any:
        return np.asarray(values, np.float32).astype(TYPES[word]).astype(np.float32)

    x = (np.random.default_rng(0).standard_normal(1000) * 30).astype(np.float32)
    c = low(np.float32(0.1))
    b = low(low(low(x) * c) + c)
    model, _ = rounding_model(convert(chain().SerializeToString(), word).model)
    assert np.array_equal(Runner(model).run({"x": x})["y"], low(b * b))


@pytest.mark.parametrize("word", ["fp16", "bf16"])
async def test_the_mock_computes_in_the_precision(word: str, mock_backend: Any) -> None:
    x = (np.random.default_rng(0).standard_normal(64) * 30).astype(np.float32)
    wanted = Runner(rounding_model(convert(chain().SerializeToString(), word).model)[0]).run({"x": x})["y"]
    plain = Runner(chain()).run({"x": x})["y"]
    profiles = [{"x": ((1,), (64,), (64,))}]
    async with trtx.open_engine(chain().SerializeToString(), mock_backend, precision=word, profiles=profiles) as engine:
        found = (await engine.infer({"x": x}))["y"]
    assert np.array_equal(found, wanted)
    assert not np.array_equal(found, plain)


@pytest.mark.parametrize("elem", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_inputs_and_outputs_of_the_type_keep_it(elem: int) -> None:
    model = cnn(opset=22)
    converted = convert(model.SerializeToString(), "fp16" if elem == TensorProto.FLOAT16 else "bf16").model
    for value in (*converted.graph.input, *converted.graph.output):
        value.type.tensor_type.elem_type = elem
    before, after = converted.graph.input[0].name, converted.graph.output[0].name
    for node in converted.graph.node:
        if before in node.input and node.op_type == "Cast":
            node.op_type = "Identity"
            del node.attribute[:]
        if node.output[0] == after:
            node.output[0] = "inner"
    converted.graph.node.append(helper.make_node("Cast", ["inner"], [after], to=elem))
    onnx.checker.check_model(converted, full_check=True)
    found, wide = rounding_model(converted)
    onnx.checker.check_model(found, full_check=True)
    assert [v.type.tensor_type.elem_type for v in (*found.graph.input, *found.graph.output)] == [elem, elem]
    assert wide


def test_a_float32_model_is_left_alone() -> None:
    model = attention()
    assert rounding_model(model) == (model, {})


def test_the_runner_shows_inner_tensors_and_names_what_it_cannot_run() -> None:
    shown = Runner(cnn(), ["r1", "image"]).run({"image": images(2)})
    assert set(shown) == {"probabilities", "r1"}
    assert (shown["r1"] >= 0).all()
    with pytest.raises(trtx.CalibrationError, match=r"image \[2, 3, 8, 8\]"):
        Runner(cnn()).run({"image": np.zeros((2, 3, 8, 8), np.float32)})


def test_relu_before_fp8_is_not_lost() -> None:
    """ONNX Runtime 1.31 takes it away unless it is told not to."""
    node = helper.make_node
    model = make(
        [
            node("Relu", ["x"], ["r"], name="r"),
            node("MatMul", ["r", "w"], ["y"], name="m"),
        ],
        {"x": ["N", 8]},
        {"y": ["N", 8]},
        {"w": np.eye(8, dtype=np.float32)},
    )
    x = np.random.default_rng(1).standard_normal((16, 8)).astype(np.float32)
    converted = convert(model.SerializeToString(), "fp8", calibration=trtx.Calibration(x, method="minmax"))
    found = Runner(converted.model).run({"x": x})["y"]
    assert np.abs(found - np.maximum(x, 0)).max() < 0.07 * np.abs(x).max()
