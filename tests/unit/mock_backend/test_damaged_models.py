"""Models that the real parser refuses, and damaged ones: always a ParserError, never what onnx happened to raise."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import trtx_py as trtx
from mock_backend import PlanPayload
from mock_backend._network import MockNetwork

ONES = np.ones((1, 4), np.float32)


def model_of(
    nodes: Any = None, *, shape: Any = (1, 4), out: str = "FLOAT", weights: Any = (), outputs: Any = None
) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes or [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, shape)],
        outputs or [value("y", getattr(TensorProto, out), shape)],
        list(weights),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def parse(rig: Any, model: onnx.ModelProto | bytes) -> MockNetwork:
    return rig.parse(model if isinstance(model, bytes) else model.SerializeToString())


ADD = [helper.make_node("Add", ["x", "c"], ["y"])]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (model_of(shape=(1,) * 9), "'x' has 9 dimensions"),
        (model_of(weights=[numpy_helper.from_array(np.ones((1,) * 9, np.float32), "c")]), "'c' has 9 dimensions"),
        (
            model_of(
                [
                    helper.make_node("Unsqueeze", ["x", "axes"], ["u"]),
                    helper.make_node("Squeeze", ["u", "axes"], ["y"]),
                ],
                weights=[numpy_helper.from_array(np.arange(7), "axes")],
                shape=(1, 4),
            ),
            "'u' has 9 dimensions",
        ),
        (model_of(shape=(2**20, 2**21)), "elements"),
        (model_of(shape=(2**40, 4)), "a dimension of 1099511627776"),
        (
            model_of(ADD, weights=[numpy_helper.from_array(ONES, "c"), numpy_helper.from_array(2 * ONES, "c")]),
            "duplicate tensor name: c",
        ),
        (
            model_of(outputs=[helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 4)) for n in ("y", "x")]),
            "'x' is more than one of the inputs and outputs",
        ),
        (model_of(out="INT32"), "declared INT32, but the nodes make FLOAT"),
    ],
    ids=[
        "rank",
        "rank of weights",
        "rank inside",
        "elements",
        "dimension",
        "duplicate weights",
        "input is output",
        "declared type",
    ],
)
def test_what_tensorrt_refuses_or_changes(rig: Any, model: onnx.ModelProto, reason: str) -> None:
    with pytest.raises(trtx.ParserError, match=reason):
        parse(rig, model)


@pytest.mark.parametrize("shape", [(1,) * 8, (2**31 - 1,), (2**20, 2**20), (0, 2**31 - 1, 2**31 - 1)])
def test_what_is_just_within_the_limits(rig: Any, shape: tuple[int, ...]) -> None:
    assert parse(rig, model_of(shape=shape)).inputs[0].shape == shape


def unknown_type() -> onnx.ModelProto:
    weight = numpy_helper.from_array(ONES, "c")
    weight.data_type = 99
    return model_of(ADD, weights=[weight])


def unknown_input_type() -> onnx.ModelProto:
    model = model_of()
    model.graph.input[0].type.tensor_type.elem_type = 99
    return model


def unknown_cast() -> onnx.ModelProto:
    return model_of([helper.make_node("Cast", ["x"], ["y"], to=99)])


def not_utf8(name: bytes) -> bytes:
    """A model one of whose names starts with a byte that UTF-8 never has."""
    model = model_of([helper.make_node("Add", ["input_name", "c_name"], ["output_name"], name="node_name")])
    model.graph.input[0].name, model.graph.output[0].name = "input_name", "output_name"
    model.graph.initializer.append(numpy_helper.from_array(ONES, "c_name"))
    data: bytes = model.SerializeToString()
    assert name in data
    return data.replace(name, b"\xff" + name[1:])


@pytest.mark.parametrize(
    "model",
    [
        unknown_type().SerializeToString(),
        unknown_input_type().SerializeToString(),
        unknown_cast().SerializeToString(),
        *(not_utf8(name) for name in (b"input_name", b"c_name", b"output_name", b"node_name", b"Add")),
    ],
    ids=["weight type", "input type", "cast type", "input", "weight", "output", "node", "operator"],
)
@pytest.mark.parametrize("operators", ["tensorrt", "any"])
def test_damage_is_a_parser_error(rig_with: Any, model: bytes, operators: str) -> None:
    with pytest.raises(trtx.ParserError) as caught:
        parse(rig_with(operators=operators), model)
    assert caught.value.issues
    str(caught.value).encode()  # and the message can be printed


def test_a_plan_whose_model_is_damaged(rig: Any) -> None:
    """A plan is checked as bytes; what it carries may come from a parser of another version."""
    plan = rig.build(model_of(ADD, weights=[numpy_helper.from_array(ONES, "c")]).SerializeToString())
    payload = PlanPayload.from_bytes(plan)
    object.__setattr__(payload, "model", unknown_type().SerializeToString())
    runtime = rig.backend.create_runtime(rig.log, device=0, lean_library=None, allow_host_code=False)
    rig.stack.callback(runtime.destroy)
    with pytest.raises(trtx.EngineError, match="is damaged"):
        runtime.deserialize(payload.to_bytes())
