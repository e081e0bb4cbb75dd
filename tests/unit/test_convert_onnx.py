"""ONNX models made ready: axes, order, shapes, simplification, comparison, weights outside; and what is refused."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import trtx_py as trtx
from tests.unit.fake_converters import scale_model
from trtx_py.convert import _pipeline

PLAIN: dict[str, Any] = {"simplify": False, "check_operators": False}

value = helper.make_tensor_value_info
node = helper.make_node


def model_of(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: Any = (), opset: int = 17) -> Any:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def convert(model: Any, **options: Any) -> tuple[Any, Any]:
    """The result as a ModelProto, and the report."""
    made = trtx.convert.sync(model if isinstance(model, bytes) else model.SerializeToString(), **{**PLAIN, **options})
    assert made.model is not None
    return onnx.load_from_string(made.model), made.report


def axes_of(model: Any) -> dict[str, list[Any]]:
    return {
        one.name: [dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim]
        for one in [*model.graph.input, *model.graph.output]
    }


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


# What is put right


def test_axes_that_share_a_name_by_accident() -> None:
    relu = [node("Relu", ["x"], ["y"]), node("Relu", ["z"], ["w"]), node("Add", ["a", "b"], ["c"])]
    inputs = [
        value("x", 1, ["?", 3, "?", "?"]), value("z", 1, ["n", "n"]), value("a", 1, ["batch", ""]),
        value("b", 1, ["batch", None]),
    ]  # fmt: skip
    outputs = [value("y", 1, ["?", 3, "?", "?"]), value("w", 1, ["n", "n"]), value("c", 1, ["batch", "?"])]
    made, report = convert(model_of(relu, inputs, outputs), inputs={"z": (3, 3)})
    found = axes_of(made)
    assert found["x"] == ["x_axis0", 3, "x_axis2", "x_axis3"]
    assert found["z"] == ["n", "z_axis1"]
    assert (found["a"][0], found["b"][0]) == ("batch", "batch")
    assert len({found["a"][1], found["b"][1]} | set(found["x"])) == 6
    assert found["y"] == found["x"]
    assert report.renamed_axes["x, axis 2"] == "x_axis2"
    assert "z, axis 0" not in report.renamed_axes


def test_good_names_stay() -> None:
    model = scale_model(2)
    made, report = convert(model)
    assert axes_of(made) == {"x": ["n", 4], "y": ["n", 4]}
    assert report.renamed_axes == {}


def test_nodes_out_of_order_are_sorted() -> None:
    model = model_of(
        [node("Relu", ["b"], ["y"]), node("Neg", ["a"], ["b"]), node("Abs", ["x"], ["a"])],
        [value("x", 1, [3])], [value("y", 1, [3])],
    )  # fmt: skip
    made, report = convert(model, compare=False)
    assert [one.op_type for one in made.graph.node] == ["Abs", "Neg", "Relu"]
    assert any("sorted" in note for note in report.notes)


def test_shapes_are_inferred() -> None:
    model = model_of(
        [node("Transpose", ["x"], ["t"], perm=[1, 0]), node("Relu", ["t"], ["y"])],
        [value("x", 1, ["n", 4])], [value("y", 1, None)],
    )  # fmt: skip
    made, _report = convert(model)
    assert axes_of(made)["y"] == [4, "n"]


def test_another_opset() -> None:
    made, report = convert(scale_model(2), opset=19)
    assert report.opset == 19
    assert made.opset_import[0].version == 19
    with pytest.raises(trtx.ConversionError, match="opset is 999"):
        convert(scale_model(2), opset=999)


def foldable() -> Any:
    """``y = x * (2 + 3)`` through an Identity and a Reshape to a constant shape."""
    weights = [numpy_helper.from_array(np.array(n, np.float32), name) for n, name in ((2, "two"), (3, "three"))]
    return model_of(
        [
            node("Add", ["two", "three"], ["five"]), node("Identity", ["x"], ["i"]), node("Mul", ["i", "five"], ["m"]),
            node("Identity", ["m"], ["y"]),
        ],
        [value("x", 1, ["n", 4])], [value("y", 1, ["n", 4])], weights,
    )  # fmt: skip


def test_simplification() -> None:
    pytest.importorskip("onnxslim")
    made, report = convert(foldable(), simplify=True)
    done = report.simplification
    assert done.used
    assert done.tool.startswith("onnxslim ")
    assert (done.nodes_before, done.nodes_after) == (4, 1)
    assert [one.op_type for one in made.graph.node] == ["Mul"]
    assert report.comparison.outputs[0].max_abs_error <= 1e-5
    _made, report = convert(foldable())
    assert not report.simplification.used


def fake_slim(folder: Path, body: str) -> Path:
    (folder / "onnxslim.py").write_text(f"__version__ = '0'\ndef slim(model):\n    {body}\n")
    return folder


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("model.graph.initializer[0].float_data[0] = 7; return model", "does not compute"),
        ("raise KeyError('lost')", "onnxslim failed: KeyError"),
        ("model.graph.output[0].name = 'z'; model.graph.node[0].output[0] = 'z'; return model", "changed the outputs"),
        ("model.graph.node[0].op_type = 'Foo'; return model", "ONNX Runtime cannot run"),
    ],
)
def test_what_simplifying_breaks_is_undone(body: str, text: str, tmp_path: Path) -> None:
    model = model_of(
        [node("Mul", ["x", "k"], ["y"])], [value("x", 1, ["n", 4])], [value("y", 1, ["n", 4])],
        [helper.make_tensor("k", 1, [], [2.0])],
    )  # fmt: skip
    made, report = convert(model, simplify=True, import_path=fake_slim(tmp_path, body))
    assert not report.simplification.used
    assert text in report.simplification.note
    assert any(text in note for note in report.notes)
    assert made.graph.node[0].op_type == "Mul"
    assert made.graph.initializer[0].float_data[0] == 2
    assert report.comparison.outputs[0].max_abs_error == 0


def test_a_missing_simplifier_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "onnxslim.py").write_text("raise ModuleNotFoundError('gone', name='onnxslim')")
    with pytest.raises(trtx.ConversionError, match=r"trtx-py\[convert\]") as caught:
        convert(foldable(), simplify=True, import_path=tmp_path)
    assert caught.value.cause == "missing"


def test_operators_are_checked_before_a_build() -> None:
    model = model_of(
        [node("Relu", ["x"], ["a"]), node("Unique", ["a"], ["y"], name="odd")], [value("x", 1, [3])],
        [value("y", 1, ["k"])],
    )  # fmt: skip
    _made, report = convert(model, check_operators=True, target="mock")
    assert report.operators.target.startswith("mock ")
    assert not report.operators.supported
    assert [(issue.node, issue.operator) for issue in report.operators.issues] == [("odd", "Unique")]
    with pytest.raises(trtx.InvalidArgumentError, match="there is no backend"):
        convert(model, check_operators=True, target="tensorrrt")


def test_a_source_that_cannot_run_is_not_compared() -> None:
    graph = helper.make_graph([node("Own", ["x"], ["y"], domain="my.plugins")], "g", [value("x", 1, [3])],
                              [value("y", 1, [3])])  # fmt: skip
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("my.plugins", 1)], ir_version=9
    )
    _made, report = convert(model)
    assert report.comparison is None
    assert any("cannot run the source" in note for note in report.notes)


def test_paths_of_the_machine_that_exported_are_dropped() -> None:
    model = scale_model(2)
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value="/home/somebody/net.py")
    model.graph.node[0].metadata_props.add(key="namespace", value="net/layer")
    made, _report = convert(model)
    assert [entry.key for entry in made.graph.node[0].metadata_props] == ["namespace"]


# What is refused


def refused(model: Any, *texts: str, **options: Any) -> None:
    with pytest.raises(trtx.ConversionError) as caught:
        convert(model, **options)
    assert caught.value.cause == "damaged"
    assert [text for text in texts if text not in str(caught.value)] == []


def test_cycle() -> None:
    nodes = [node("Add", ["x", "c"], ["a"], name="first"), node("Relu", ["a"], ["b"], name="second"),
             node("Neg", ["b"], ["c"], name="third"), node("Abs", ["b"], ["y"])]  # fmt: skip
    refused(model_of(nodes, [value("x", 1, [3])], [value("y", 1, [3])]), "cycle", "'first'", "'second'", "'third'")


def test_a_node_that_reads_itself() -> None:
    refused(model_of([node("Relu", ["y"], ["y"], name="self")], [], [value("y", 1, [3])]), "cycle", "'self'")


def test_missing_weight() -> None:
    nodes = [node("MatMul", ["x", "w"], ["y"], name="fc")]
    refused(model_of(nodes, [value("x", 1, [3, 3])], [value("y", 1, [3, 3])]), "'fc'", "'w'", "weight is missing")


def test_missing_weight_inside_a_branch() -> None:
    then = helper.make_graph([node("Add", ["x", "gone"], ["t"], name="inner")], "then", [], [value("t", 1, [3])])
    other = helper.make_graph([node("Relu", ["x"], ["e"])], "else", [], [value("e", 1, [3])])
    nodes = [node("If", ["c"], ["y"], then_branch=then, else_branch=other)]
    model = model_of(nodes, [value("x", 1, [3]), value("c", TensorProto.BOOL, [])], [value("y", 1, [3])])
    refused(model, "'gone'", "missing")


@pytest.mark.parametrize("opset", [99, 0])
def test_wrong_opset(opset: int) -> None:
    model = scale_model(2)
    model.opset_import[0].version = opset
    refused(model, f"opset {opset}", "install a newer onnx")


def test_a_name_that_two_nodes_make() -> None:
    nodes = [node("Relu", ["x"], ["y"], name="a"), node("Abs", ["x"], ["y"], name="b")]
    model = model_of(nodes, [value("x", 1, [4])], [value("y", 1, [4])])
    refused(model, "'y' is an output of two nodes", "'a' (Relu)", "'b' (Abs)", validate=False)


def test_a_graph_without_outputs() -> None:
    refused(model_of([node("Relu", ["x"], ["y"])], [value("x", 1, [4])], []), "no outputs")


def test_what_the_checker_refuses() -> None:
    model = scale_model(2)
    model.graph.node[0].op_type = "Mull"
    refused(model, "checker", "Mull", compare=False)


def test_shapes_that_contradict() -> None:
    nodes = [node("MatMul", ["x", "w"], ["y"], name="fc")]
    weight = numpy_helper.from_array(np.ones((5, 2), np.float32), "w")
    model = model_of(nodes, [value("x", 1, [3, 4])], [value("y", 1, [3, 2])], [weight])
    _made, report = convert(model, compare=False)
    assert any("inconsistent" in note and "fc" in note for note in report.notes)


# External data


def external(folder: Path, *, location: str = "w.bin", length: int = 64, size: int = 64) -> Path:
    weight = numpy_helper.from_array(np.arange(16, dtype=np.float32).reshape(4, 4), "w")
    model = model_of(
        [node("MatMul", ["x", "w"], ["y"])], [value("x", 1, ["n", 4])], [value("y", 1, ["n", 4])], [weight]
    )
    tensor = model.graph.initializer[0]
    data, tensor.data_location = tensor.raw_data, TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    for key, text in (("location", location), ("offset", "0"), ("length", str(length))):
        tensor.external_data.add(key=key, value=text)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    (folder / "w.bin").write_bytes(data[:size])
    return path


def test_external_data_of_sparse_weights_is_looked_at_too(tmp_path: Path) -> None:
    model = model_of([node("Add", ["x", "s"], ["y"])], [value("x", 1, [4])], [value("y", 1, [4])])
    sparse = model.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(TensorProto(name="s", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL))
    sparse.values.external_data.add(key="location", value="../secret")
    sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64), "at"))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(trtx.ConversionError, match=r"'s' has its data at '\.\./secret', outside the model's folder"):
        trtx.convert.sync(path, validate=False, compare=False, **PLAIN)


def test_a_file_beyond_what_a_model_can_be(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with open(path, "wb") as file:
        file.write(b"\x3a\xfa\xff\xff\xff\x0b")  # a graph of 3 GiB - 6 bytes: zeros that take no room on the disk
        file.truncate(3 << 30)
    with pytest.raises(trtx.ConversionError, match="ends at 2147483648") as caught:
        trtx.convert.sync(path, **PLAIN)
    assert caught.value.cause == "damaged"


def test_small_external_data_goes_inside(tmp_path: Path) -> None:
    made = trtx.convert.sync(external(tmp_path), **PLAIN)
    assert made.model is not None
    loaded = onnx.load_from_string(made.model)
    np.testing.assert_array_equal(numpy_helper.to_array(loaded.graph.initializer[0]).ravel(), np.arange(16))
    assert made.report.comparison is not None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 60}, "needs bytes 0 to 64 of 'w.bin', which has 60"),
        ({"length": 1 << 40}, "too short"),
        ({"location": "../w.bin"}, "outside the model's folder"),
        ({"location": "/etc/passwd"}, "outside the model's folder"),
        ({"location": "none.bin"}, "is not beside the model"),
        ({"location": ""}, "outside the model's folder"),
    ],
)
def test_external_data_that_is_not_there(options: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(trtx.ConversionError, match=text) as caught:
        trtx.convert.sync(external(tmp_path, **options), output=tmp_path / "out.onnx", **PLAIN)
    assert caught.value.cause == "damaged"
    assert not (tmp_path / "out.onnx").exists()


def large_model(folder: Path, rows: int) -> Path:
    """A chain with two weights of zeros that take no room on the disk; the second has ones in its first row."""
    nbytes = rows * 4096 * 4
    model = model_of(
        [
            node("Gather", ["table", "i"], ["e"]), node("Identity", ["e"], ["f"]), node("Add", ["f", "bias"], ["g"]),
            node("Relu", ["g"], ["y"]),
        ],
        [value("i", TensorProto.INT64, ["n"])], [value("y", 1, ["n", 4096])],
        [numpy_helper.from_array(np.ones(4096, np.float32), "bias")],
    )  # fmt: skip
    tensor = TensorProto(name="table", data_type=1, dims=[rows, 4096], data_location=TensorProto.EXTERNAL)
    for key, text in (("location", "big.data"), ("offset", "4096"), ("length", str(nbytes))):
        tensor.external_data.add(key=key, value=text)
    model.graph.initializer.append(tensor)
    with open(folder / "big.data", "wb") as file:
        file.truncate(4096 + nbytes)
        file.seek(4096)
        file.write(np.full(4096, 5, np.float32).tobytes())
    path = folder / "big.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def check_large(folder: Path, rows: int, *, simplify: bool) -> None:
    source = large_model(folder, rows)
    (folder / "out").mkdir()
    out = folder / "out" / "m.onnx"
    indices = np.array([0, 1, rows - 1])
    made = trtx.convert.sync(source, output=out, inputs={"i": indices}, simplify=simplify, check_operators=False)
    assert made.path == str(out)
    assert made.report.comparison is not None
    assert made.report.comparison.outputs[0].max_abs_value == 6
    assert made.report.simplification.used is simplify
    model_name, data = sorted(os.listdir(folder / "out"))
    assert model_name == "m.onnx"
    assert data.startswith("m.onnx.")
    assert os.path.getsize(folder / "out" / data) >= rows * 4096 * 4
    assert out.stat().st_size < 1 << 20
    skeleton = onnx.load(out, load_external_data=False)
    assert [one.op_type for one in skeleton.graph.node] == (
        ["Gather", "Add", "Relu"] if simplify else ["Gather", "Identity", "Add", "Relu"]
    )
    assert [one.name for one in skeleton.graph.input] == ["i"]
    onnx.checker.check_model(str(out))
    with pytest.raises(trtx.ConversionError, match="give output="):
        trtx.convert.sync(source, compare=False, **PLAIN)


def test_what_exceeds_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pipeline, "INLINE_LIMIT", 1 << 18)
    check_large(tmp_path, 100, simplify=False)


def test_what_exceeds_one_message_is_simplified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxslim")
    monkeypatch.setattr(_pipeline, "INLINE_LIMIT", 1 << 18)
    check_large(tmp_path, 100, simplify=True)


@pytest.mark.slow
def test_more_than_two_gigabytes(tmp_path: Path) -> None:
    pytest.importorskip("onnxslim")
    check_large(tmp_path, 140_000, simplify=True)  # 2.29 GB


def test_a_short_data_file_of_three_gigabytes(tmp_path: Path) -> None:
    path = large_model(tmp_path, 190_000)
    os.truncate(tmp_path / "big.data", 3_000_000_000)
    with pytest.raises(trtx.ConversionError, match="which has 3000000000"):
        trtx.convert.sync(path, output=tmp_path / "out.onnx", **PLAIN)
    assert not (tmp_path / "out.onnx").exists()


# Writing


def test_output_replaces_an_older_file_in_one_step(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    out.write_bytes(b"older")
    with pytest.raises(trtx.ConversionError):
        trtx.convert.sync(b"\x08", output=out, **PLAIN)
    assert out.read_bytes() == b"older"
    trtx.convert.sync(scale_model(2).SerializeToString(), output=out, **PLAIN)
    onnx.checker.check_model(str(out))


def test_a_result_that_cannot_be_moved_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pipeline, "INLINE_LIMIT", 1 << 18)
    (tmp_path / "out").mkdir()
    replace, calls = os.replace, []

    def fail(source: Any, target: Any) -> None:
        calls.append(target)
        if str(target).endswith("m.onnx"):
            raise OSError(30, "Read-only file system")
        replace(source, target)

    source = large_model(tmp_path, 100)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(trtx.InvalidArgumentError, match="nothing was written there"):
        trtx.convert.sync(source, output=tmp_path / "out" / "m.onnx", compare=False, **PLAIN)
    assert len(calls) == 2
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_in_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    opened = builtins.open

    def full(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith("job.json"):
            raise OSError(28, "No space left on device")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(trtx.ConversionError, match="No space left") as caught:
        trtx.convert.sync(scale_model(2).SerializeToString(), **PLAIN)
    assert caught.value.cause == "disk"
