"""What the mock's parser accepts, refuses and says."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from trtx_py._errors import BuilderError, ParserError
from trtx_py._types import DataType, Severity, TensorLocation


def issues_of(rig, model):
    with pytest.raises(ParserError) as caught:
        rig.parse(model)
    return caught.value.issues


def test_description(rig, models):
    network = rig.parse(models.relu())
    (x,), (y,) = network.inputs, network.outputs
    assert (x.name, x.dtype, x.shape, x.location) == ("x", DataType.FLOAT, (-1, 4), TensorLocation.DEVICE)
    assert (y.name, y.shape) == ("y", (-1, 4))
    assert network.num_layers == 1


def test_output_shapes_come_from_the_graph_not_from_its_declaration(rig, models):
    node = helper.make_node("Concat", ["x", "x"], ["y"], axis=1)
    network = rig.parse(models.make([node], [("x", "FLOAT", ["N", 3])], [("y", "FLOAT", ["a", "b"])]))
    assert network.outputs[0].shape == (-1, 6)


def test_garbage(rig):
    for data in (b"garbage", b"", onnx.ModelProto().SerializeToString()):
        (issue,) = issues_of(rig, data)
        assert issue.code == "MODEL_DESERIALIZE_FAILED"
    assert any(severity is Severity.ERROR for severity, _ in rig.lines)


@pytest.mark.parametrize("elem", ["STRING", "UINT16", "COMPLEX64", "UINT64"])
def test_io_types_without_a_tensorrt_type(rig, models, elem):
    node = helper.make_node("Identity", ["x"], ["y"])
    issues = issues_of(rig, models.make([node], [("x", elem, [2])], [("y", elem, [2])]))
    assert [f"{role} '{name}' has ONNX type {elem}" in issue.reason for (role, name), issue in
            zip([("input", "x"), ("output", "y")], issues, strict=True)] == [True, True]  # fmt: skip


def test_double_is_read_as_float(rig, models):
    network = rig.parse(models.relu(elem="DOUBLE"))
    assert network.inputs[0].dtype is DataType.FLOAT
    assert any("DOUBLE" in text for _, text in rig.lines)


def test_sequence_io(rig):
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [2]))
    node = helper.make_node("Identity", ["s"], ["t"])
    graph = helper.make_graph([node], "g", [helper.make_value_info("s", kind)], [helper.make_value_info("t", kind)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    assert ["sequence" in issue.reason for issue in issues_of(rig, model.SerializeToString())] == [True, True]


def test_every_unsupported_operator_is_listed(rig, models):
    nodes = [
        helper.make_node("Det", ["x"], ["a"], name="first"),
        helper.make_node("Relu", ["x"], ["b"]),
        helper.make_node("Det", ["b"], ["c"], name="second"),
    ]
    model = models.make(nodes, [("x", "FLOAT", [2, 2])], [("a", "FLOAT", []), ("c", "FLOAT", [])])
    issues = issues_of(rig, model)
    assert [(i.node, i.operator, i.code) for i in issues] == [
        ("first", "Det", "UNSUPPORTED_NODE"),
        ("second", "Det", "UNSUPPORTED_NODE"),
    ]


def test_operators_in_branches_are_found(rig, models):
    def branch(name, operator):
        node = helper.make_node(operator, ["x"], [f"{name}_out"], name=f"{name}_node")
        return helper.make_graph(
            [node], name, [], [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)]
        )

    node = helper.make_node("If", ["c"], ["y"], then_branch=branch("a", "Relu"), else_branch=branch("b", "Det"))
    model = models.make([node], [("x", "FLOAT", [2, 2]), ("c", "BOOL", [])], [("y", "FLOAT", None)])
    assert [i.node for i in issues_of(rig, model)] == ["b_node"]


def test_any_operators(rig_with, models):
    rig = rig_with(operators="any")
    node = helper.make_node("Det", ["x"], ["y"])
    context = rig.ready(models.make([node], [("x", "FLOAT", [2, 2])], [("y", "FLOAT", [])]))
    assert rig.run(context, x=np.array([[2, 0], [0, 3]], np.float32))["y"] == 6


def test_custom_domains(rig, models):
    io = [("x", "FLOAT", [2])], [("y", "FLOAT", [2])]
    foreign = helper.make_node("Foo", ["x"], ["y"], domain="my.domain", name="mine")
    (issue,) = issues_of(rig, models.make([foreign], *io, domains=["my.domain"]))
    assert (issue.node, issue.operator) == ("mine", "Foo")
    assert "Plugin not found" in issue.reason
    # the real parser goes by the name alone
    known = helper.make_node("Relu", ["x"], ["y"], domain="my.domain")
    context = rig.ready(models.make([known], *io, domains=["my.domain"]))
    assert rig.run(context, x=np.array([-1, 1], np.float32))["y"].tolist() == [0, 1]


def test_mixed_types_name_the_node(rig, models):
    node = helper.make_node("Add", ["x", "w"], ["y"], name="adder")
    model = models.make([node], [("x", "FLOAT", [2]), ("w", "FLOAT16", [2])], [("y", "FLOAT", [2])])
    (issue,) = issues_of(rig, model)
    assert (issue.node, issue.operator, issue.code) == ("adder", "Add", "INVALID_NODE")


def test_broken_graph(rig, models):
    node = helper.make_node("Relu", ["nowhere"], ["y"])
    (issue,) = issues_of(rig, models.make([node], [("x", "FLOAT", [2])], [("y", "FLOAT", [2])]))
    assert "nowhere" in issue.reason


def test_input_without_rank(rig, models):
    node = helper.make_node("Relu", ["x"], ["y"])
    (issue,) = issues_of(rig, models.make([node], [("x", "FLOAT", None)], [("y", "FLOAT", None)]))
    assert "no rank" in issue.reason


def hosts(network):
    return {t.name for t in network.inputs if t.is_shape_tensor and t.location is TensorLocation.HOST}


@pytest.mark.parametrize(
    ("operator", "inputs", "expected"),
    [
        ("Reshape", [("x", "FLOAT", [4]), ("s", "INT64", [2])], {"s"}),
        ("Expand", [("x", "FLOAT", [1, 4]), ("s", "INT64", [2])], {"s"}),
        ("Slice", [("x", "FLOAT", [8]), ("a", "INT64", [1]), ("b", "INT64", [1])], {"a", "b"}),
        ("Tile", [("x", "FLOAT", [8]), ("s", "INT64", [1])], {"s"}),
        ("Range", [("a", "INT64", []), ("b", "INT64", []), ("c", "INT64", [])], {"a", "b", "c"}),
        ("ConstantOfShape", [("s", "INT64", [2])], {"s"}),
        ("Pad", [("x", "FLOAT", [8]), ("s", "INT64", [2])], {"s"}),
        ("Gather", [("x", "FLOAT", [8]), ("i", "INT64", [2])], set()),
    ],
)
def test_shape_tensors(rig, models, operator, inputs, expected):
    node = helper.make_node(operator, [name for name, _, _ in inputs], ["y"])
    elem = "INT64" if operator == "Range" else "FLOAT"
    rank = {"Reshape": 2, "Expand": 2, "ConstantOfShape": 2}.get(operator, 1)
    network = rig.parse(models.make([node], inputs, [("y", elem, [f"d{i}" for i in range(rank)])]))
    assert hosts(network) == expected


def test_shape_tensor_through_other_nodes_and_not_through_shape(rig, models):
    nodes = [
        helper.make_node("Cast", ["s"], ["s64"], to=TensorProto.INT64),
        helper.make_node("Shape", ["z"], ["zs"]),
        helper.make_node("Mul", ["s64", "zs"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["y"]),
    ]
    model = models.make(nodes, [("s", "INT32", [2]), ("z", "FLOAT", ["a", "b"])], [("y", "FLOAT", ["c", "d"])])
    assert hosts(rig.parse(model)) == {"s"}


def test_axes_must_be_constant(rig, models):
    nodes = [
        helper.make_node("ReduceSum", ["x", "axes"], ["a"], name="sum"),
        helper.make_node("ReduceSum", ["x", "fixed"], ["b"]),
    ]
    model = models.make(
        nodes, [("x", "FLOAT", [2, 2]), ("axes", "INT64", [1])], [("a", "FLOAT", [1, "n"]), ("b", "FLOAT", [1, 2])],
        weights={"fixed": np.array([0], np.int64)},
    )  # fmt: skip
    (issue,) = issues_of(rig, model)
    assert (issue.node, "'axes' must resolve to a build-time constant" in issue.reason) == ("sum", True)


def test_strict_inference_does_not_reject_functions(rig, models):
    node = helper.make_node("MeanVarianceNormalization", ["x"], ["y"])
    context = rig.ready(models.make([node], [("x", "FLOAT", [1, 1, 2, 2])], [("y", "FLOAT", [1, 1, 2, 2])]))
    y = rig.run(context, x=np.array([1, 2, 3, 4], np.float32).reshape(1, 1, 2, 2))["y"]
    np.testing.assert_allclose(y.mean(), 0, atol=1e-6)


def test_float_shape_tensor_is_refused(rig, models):
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"])
    model = models.make(
        [node], [("x", "FLOAT", [1, 1, 8, 8]), ("scales", "FLOAT", [4])], [("y", "FLOAT", [1, 1, "a", "b"])]
    )
    (issue,) = issues_of(rig, model)
    assert "scales is a shape tensor and must have type Int32 or Int64" in issue.reason


def test_external_weights(rig, models, tmp_path):
    node = helper.make_node("Add", ["x", "w"], ["y"])
    data = models.make(
        [node], [("x", "FLOAT", [4])], [("y", "FLOAT", [4])], weights={"w": np.arange(4, dtype=np.float32)}
    )
    model = onnx.load_from_string(data)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    stored = (tmp_path / "m.onnx").read_bytes()
    (issue,) = issues_of(rig, stored)
    assert "no directory was given" in issue.reason
    assert rig.parse(stored, str(tmp_path)).num_layers == 1
    (tmp_path / "m.bin").unlink()
    with pytest.raises(ParserError, match="external weights"):
        rig.parse(stored, str(tmp_path))


def test_one_network_one_model(rig, models):
    network = rig.parse(models.relu())
    with pytest.raises(ParserError, match="create another"):
        network.parse_onnx(models.relu(), None)


def test_an_empty_network_cannot_be_built(rig):
    from trtx_py._types import BuildOptions

    builder = rig.backend.create_builder(rig.log)
    network = builder.create_network()
    with pytest.raises(BuilderError, match="empty"):
        builder.build_serialized_network(network, BuildOptions(), None)
    network.destroy()
    builder.destroy()
