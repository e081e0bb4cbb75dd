"""The real TensorRT-RTX on a machine without a GPU: parse and build for SM 8.9 what others made.

What it refuses is a typed error that gives its reason; which models those are is written in tests/model_zoo.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import trtx_py as trtx
from tests.model_zoo import Model, as_parameters

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed (extra: rtx)"
)


@pytest.fixture(scope="module")
def builder() -> Iterator[trtx.Builder]:
    with trtx.Builder(backend="tensorrt_rtx") as made:
        yield made


@pytest.fixture(autouse=True)
def _nothing_left_open(builder: trtx.Builder) -> Iterator[None]:
    """In place of the shared one: the module's builder stays open."""
    yield
    left = [item for item in trtx.live_objects() if item.kind not in ("Builder", "Device", "Logger")]
    assert not left, "left open:\n" + "\n".join(map(str, left))


async def build(builder: trtx.Builder, model: bytes, profile: dict) -> trtx.Plan:
    with builder.create_network() as network, builder.create_config() as config:
        await network.parse_onnx_async(model)
        config.compute_capabilities = ("8.9",)
        with builder.create_optimization_profile() as ranges:
            for name, limits in profile.items():
                ranges.set_shape(name, *limits)
            if profile:
                config.add_optimization_profile(ranges)
        return await builder.build_serialized_network(network, config)


@pytest.mark.parametrize("model", as_parameters())
async def test_parse_and_build(builder: trtx.Builder, model: Model) -> None:
    source = model.source()
    if model.rtx is not None:
        with pytest.raises(trtx.BuilderError) as caught:
            await build(builder, source, dict(model.profile))
        assert type(caught.value).__name__ == model.rtx.error
        if isinstance(caught.value, trtx.ParserError):
            issue = caught.value.issues[0]
            assert (issue.node, issue.operator) == (model.rtx.node, model.rtx.operator)
            assert model.rtx.reason in issue.reason
        else:
            assert any(model.rtx.reason in line for line in caught.value.tensorrt_log), str(caught.value)
        return
    plan = await build(builder, source, dict(model.profile))
    header = plan.header
    assert (header.flavour, header.compute_capabilities) == ("tensorrt_rtx", ("8.9",))
    assert header.host_code is False
    parsed = onnx.load_from_string(source)
    weights = {tensor.name for tensor in parsed.graph.initializer}
    wanted = [v.name for v in parsed.graph.input if v.name not in weights] + [v.name for v in parsed.graph.output]
    assert [tensor.name for tensor in header.io_tensors] == wanted
    for tensor in header.io_tensors:
        if tensor.name in model.profile:
            assert [(r.min, r.opt, r.max) for r in tensor.ranges] == [model.profile[tensor.name]]
    assert trtx.Plan(bytes(plan)).header == header


def one_node(operator: str, *, inputs: int = 1, elem: int = TensorProto.FLOAT, **attributes: Any) -> bytes:
    names = [f"x{i}" for i in range(inputs)]
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["y"], name="the_node", **attributes)],
        "one_node",
        [helper.make_tensor_value_info(name, elem, [1, 4, 8, 8]) for name in names],
        [helper.make_tensor_value_info("y", elem, None)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


#: Model, and what must be in the first issue: node, operator, part of the reason.
REFUSED = {
    "an operator it has not": (one_node("Det"), "the_node", "Det", "does not import this operator (checkDet"),
    "bits": (
        one_node("BitShift", inputs=2, elem=TensorProto.UINT8, direction="LEFT"),
        "the_node",
        "BitShift",
        "does not import",
    ),
    "a type it has not": (one_node("Relu", elem=TensorProto.COMPLEX64), "", "", "Failed to convert"),
}


@pytest.mark.parametrize(("model", "node", "operator", "reason"), REFUSED.values(), ids=REFUSED)
async def test_refusals_name_node_operator_and_reason(
    builder: trtx.Builder, model: bytes, node: str, operator: str, reason: str
) -> None:
    with pytest.raises(trtx.ParserError) as caught:
        await build(builder, model, {})
    issue = caught.value.issues[0]
    assert (issue.node, issue.operator) == (node, operator)
    assert reason in issue.reason
    assert str(issue) in str(caught.value)


async def test_error_deep_in_a_subgraph_is_found(builder: trtx.Builder) -> None:
    """The branches of an If hold the operator that it has not."""
    inner = helper.make_graph(
        [helper.make_node("Det", ["x"], ["z"], name="deep")], "inner", [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], name="outer", then_branch=inner, else_branch=inner)],
        "branches",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, []),
         helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(trtx.ParserError) as caught:
        await build(builder, model.SerializeToString(), {})
    assert ("deep", "Det") in {(issue.node, issue.operator) for issue in caught.value.issues}


async def test_plan_for_other_gpus_is_refused_here(builder: trtx.Builder) -> None:
    """Its architecture is in the header, so no TensorRT is needed to see that it does not fit."""
    weights = helper.make_tensor("w", TensorProto.FLOAT, [4], np.ones(4, np.float32))
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "add",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])], [weights],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    plan = await build(builder, model.SerializeToString(), {})
    with trtx.Runtime(backend="mock") as runtime, pytest.raises(trtx.VersionMismatchError) as caught:
        await runtime.deserialize(plan)
    assert "tensorrt_rtx" in caught.value.plan
    assert "mock" in caught.value.runtime
