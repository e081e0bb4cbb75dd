"""Models as callers give them: whole, in pieces, broken, or reaching for files that are none of their business."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, numpy_helper

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.ownership import SAMPLE, WEIGHTS, matmul_model
from trtx_py import _onnx_source as source_module
from trtx_py._onnx_source import OnnxSource, load_onnx, onnx_sha256

STATIC = matmul_model(2)


def external_model(location: str = "weights.bin", offset: int | None = 0, length: int | None = 48) -> bytes:
    """``y = x @ w`` with w in external data."""
    model = onnx.ModelProto()
    model.ParseFromString(STATIC)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    data: bytes = model.SerializeToString()
    return data


def weights_of(model: bytes) -> Any:
    proto = onnx.ModelProto()
    proto.ParseFromString(model)
    return numpy_helper.to_array(proto.graph.initializer[0])


def infer(source: Any, weights: Any = None) -> Any:
    backend = MockBackend()
    with (
        trtx.Builder(None, backend) as builder,
        builder.create_network() as network,
        builder.create_config() as config,
    ):
        network.parse_onnx(source, weights)
        plan = builder.build_serialized_network_sync(network, config)
    with trtx.Runtime(None, backend) as runtime, runtime.deserialize_sync(plan) as engine:
        out = engine.infer_sync({"x": SAMPLE})["y"]
    backend.assert_clean()
    return out


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_weights_inside(kind: Any, tmp_path: Path) -> None:
    assert load_onnx(kind(STATIC), None).model == STATIC
    path = tmp_path / "m.onnx"
    path.write_bytes(STATIC)
    for source in (path, str(path)):
        assert load_onnx(source, None).sha256 == load_onnx(STATIC, None).sha256
    with pytest.raises(trtx.InvalidArgumentError, match="leave out the weights"):
        load_onnx(STATIC, b"x")


def test_external_data_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    path = tmp_path / "m.onnx"
    for location, offset in (("weights.bin", 0), ("sub/weights.bin", 0), ("weights.bin", 8)):
        path.write_bytes(external_model(location, offset))
        (tmp_path / location).write_bytes(bytes(offset) + WEIGHTS.tobytes())
        np.testing.assert_allclose(infer(path), SAMPLE @ WEIGHTS, rtol=1e-5)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_allclose(infer("m.onnx"), SAMPLE @ WEIGHTS, rtol=1e-5)
    loaded = load_onnx(path, None)
    assert loaded.directory is None
    np.testing.assert_array_equal(weights_of(loaded.model), WEIGHTS)


def test_written_by_the_onnx_package(tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.ParseFromString(STATIC)
    external_data_helper.convert_model_to_external_data(model, location="w.data", size_threshold=0)
    onnx.save_model(model, str(tmp_path / "m.onnx"))
    np.testing.assert_allclose(infer(tmp_path / "m.onnx"), SAMPLE @ WEIGHTS, rtol=1e-5)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, "path"])
def test_weights_blob(kind: Any, tmp_path: Path) -> None:
    blob: Any = WEIGHTS.tobytes()
    if kind == "path":
        (tmp_path / "w.bin").write_bytes(blob)
        blob = tmp_path / "w.bin"
    else:
        blob = kind(blob)
    np.testing.assert_allclose(infer(external_model("elsewhere.bin"), blob), SAMPLE @ WEIGHTS, rtol=1e-5)


def test_length_and_offset_may_be_left_out() -> None:
    loaded = load_onnx(external_model(offset=None, length=None), WEIGHTS.tobytes())
    np.testing.assert_array_equal(weights_of(loaded.model), WEIGHTS)


def test_hash_covers_the_weights() -> None:
    one, two = (load_onnx(external_model(), (WEIGHTS + n).tobytes()).sha256 for n in (0, 1))
    assert one != two


@pytest.mark.parametrize("size", [0, 47])
def test_too_short_data(size: int, tmp_path: Path) -> None:
    with pytest.raises(trtx.ParserError, match=f"'w' needs bytes 0 to 48 .* has {size}"):
        load_onnx(external_model(), bytes(size))
    path = tmp_path / "m.onnx"
    path.write_bytes(external_model())
    (tmp_path / "weights.bin").write_bytes(bytes(size))
    with pytest.raises(trtx.ParserError, match="too short"):
        load_onnx(path, None)


@pytest.mark.parametrize(
    "entry", [{"offset": -1}, {"length": -1}, {"offset": "x"}, {"length": "1e3"}, {"offset": 9**30}]
)
def test_broken_entries(entry: dict[str, Any]) -> None:
    with pytest.raises(trtx.ParserError, match="'w'"):
        load_onnx(external_model(**entry), WEIGHTS.tobytes())


def test_files_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(WEIGHTS.tobytes())
    (inside / "link.bin").symlink_to(secret)
    (tmp_path / "inside2").mkdir()
    (tmp_path / "inside2" / "w.bin").write_bytes(WEIGHTS.tobytes())
    for location in ("../secret.bin", str(secret), "link.bin", "x/../../secret.bin", "../inside2/w.bin", ""):
        (inside / "m.onnx").write_bytes(external_model(location))
        with pytest.raises(trtx.ParserError, match="outside the model's folder"):
            load_onnx(inside / "m.onnx", None)


def test_names_no_file_can_have(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(external_model("nul\0byte"))
    with pytest.raises(trtx.ParserError, match="'w'"):
        load_onnx(tmp_path / "m.onnx", None)


def test_missing_data(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(external_model())
    with pytest.raises(trtx.ParserError, match=r"'weights\.bin' .* is not beside the model"):
        load_onnx(tmp_path / "m.onnx", None)
    with pytest.raises(trtx.ParserError, match="give the path of the model file, or the data as weights="):
        load_onnx(external_model(), None)
    with pytest.raises(trtx.InvalidArgumentError, match="weights file"):
        load_onnx(external_model(), tmp_path / "missing.bin")


def test_external_data_inside_a_subgraph(tmp_path: Path) -> None:
    """Tensors hide in attributes of nodes, too."""
    tensor = numpy_helper.from_array(WEIGHTS, "c")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")
    node = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    graph = onnx.helper.make_graph([node], "g", [], [onnx.helper.make_tensor_value_info("c", 1, [4, 3])])
    outer = onnx.helper.make_node("If", ["q"], ["y"], then_branch=graph, else_branch=graph)
    model = onnx.helper.make_model(onnx.helper.make_graph([outer], "o", [], []))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(trtx.ParserError, match="outside the model's folder"):
        load_onnx(tmp_path / "m.onnx", None)


@pytest.mark.parametrize(
    "blob", [b"", b"not a model", b"\x00" * 64, os.urandom(0) + b"TRTXPLAN" + bytes(100), STATIC[:20], STATIC[:-30]]
)
def test_what_is_no_model(blob: bytes, tmp_path: Path, mock_backend: MockBackend) -> None:
    with pytest.raises(trtx.ParserError):
        load_onnx(blob, None)
    path = tmp_path / "m.onnx"
    path.write_bytes(blob)
    builder = trtx.Builder(None, mock_backend)
    with builder, builder.create_network() as network, pytest.raises(trtx.ParserError, match=r"m\.onnx"):
        network.parse_onnx(path)


def test_every_truncation_is_a_typed_error() -> None:
    for length in range(len(STATIC)):
        try:
            load_onnx(STATIC[:length], None)
        except trtx.ParserError:
            continue
        raise AssertionError(f"a model cut to {length} of {len(STATIC)} bytes was taken for a model")


@pytest.mark.parametrize("source", [None, 5, ["x"], STATIC.decode("latin-1")[:0] + "/missing/m.onnx", "nul\0byte"])
def test_sources_that_cannot_be(source: Any) -> None:
    with pytest.raises(trtx.InvalidArgumentError):
        load_onnx(source, None)


def _relu() -> onnx.ModelProto:
    value = onnx.helper.make_tensor_value_info
    relu = onnx.helper.make_node("Relu", ["x"], ["y"], name="act")
    graph = onnx.helper.make_graph([relu], "g", [value("x", 1, [1, 4])], [value("y", 1, [1, 4])])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)


def _flips(blob: bytes) -> Iterator[bytes]:
    for bit in range(8 * len(blob)):
        flipped = bytearray(blob)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def test_every_flipped_bit_is_a_model_or_a_typed_error() -> None:
    for base in (_relu().SerializeToString(), STATIC):
        outcomes: set[type] = set()
        for blob in _flips(base):
            try:
                outcomes.add(type(load_onnx(blob, None)))
            except trtx.ParserError as error:
                outcomes.add(type(error))
        assert outcomes == {OnnxSource, trtx.ParserError}


_REAL_PARSER = """
import sys, tensorrt_rtx as trt
log = trt.Logger(trt.Logger.INTERNAL_ERROR)
builder = trt.Builder(log)
for line in sys.stdin:
    network = builder.create_network(0)
    trt.OnnxParser(network, log).parse(bytes.fromhex(line))
"""


def test_what_passes_does_not_end_the_real_parser() -> None:
    """It ends the process over nodes without outputs or without an operator."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    passed = []
    for blob in _flips(_relu().SerializeToString()):
        with contextlib.suppress(trtx.ParserError):
            passed.append(load_onnx(blob, None).model.hex())
    result = subprocess.run(
        [sys.executable, "-c", _REAL_PARSER], input="\n".join(passed), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]


def _nested(node: onnx.NodeProto, attribute: str = "then_branch") -> onnx.ModelProto:
    model = _relu()
    inner = onnx.helper.make_graph([node], "inner", [], [])
    graphs: Any = {attribute: inner if attribute == "then_branch" else [inner]}
    model.graph.node.append(onnx.helper.make_node("If", ["x"], ["z"], **graphs))
    return model


def _in_function(node: onnx.NodeProto) -> onnx.ModelProto:
    model = _relu()
    model.functions.append(onnx.helper.make_function("d", "f", ["a"], ["b"], [node], []))
    return model


def _at_the_top(node: onnx.NodeProto) -> onnx.ModelProto:
    model = _relu()
    model.graph.node.append(node)
    return model


@pytest.mark.parametrize(
    "place", [_at_the_top, _nested, lambda node: _nested(node, "bodies"), _in_function],
    ids=["graph", "subgraph", "subgraphs", "function"],
)  # fmt: skip
def test_nodes_that_do_nothing(place: Any) -> None:
    make = onnx.helper.make_node
    load_onnx(place(make("Relu", ["x"], ["", "b"], name="fine")).SerializeToString(), None)
    for node, reason in (
        (make("Relu", ["x"], [], name="culprit"), "has no outputs"),
        (make("Relu", ["x"], [""], name="culprit"), "has no outputs"),
        (make("", ["x"], ["b"], name="culprit"), "has no op_type"),
    ):
        with pytest.raises(trtx.ParserError, match=f"'culprit'.*{reason}"):
            load_onnx(place(node).SerializeToString(), None)


@pytest.mark.parametrize("text", ["act", "g", "x", "Relu"])
def test_text_that_is_not_utf8(text: str) -> None:
    blob = _relu().SerializeToString()
    field = bytes([len(text)]) + text.encode()
    assert field in blob
    with pytest.raises(trtx.ParserError, match="is not UTF-8 text"):
        load_onnx(blob.replace(field, field[:1] + b"\xff" + field[2:]), None)


@pytest.mark.parametrize("place", ["initializer", "attribute", "input", "output", "value_info"])
@pytest.mark.parametrize("element", [0, 99, -1])
def test_element_types_that_are_none(place: str, element: int) -> None:
    model = _relu()
    tensor = numpy_helper.from_array(WEIGHTS, "c")
    tensor.data_type = element
    if place == "initializer":
        model.graph.initializer.append(tensor)
    elif place == "attribute":
        model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=tensor))
    else:
        values = getattr(model.graph, place)
        if not values:
            values.add(name="t")
        values[0].type.tensor_type.elem_type = element
    if (place, element) == ("value_info", 0):  # exporters leave open what can be inferred
        load_onnx(model.SerializeToString(), None)
        return
    with pytest.raises(trtx.ParserError, match=f"element type {element}; expected one of"):
        load_onnx(model.SerializeToString(), None)


@pytest.mark.parametrize("dim", [2**31, 2**40, 2**63 - 1])
def test_dimensions_that_tensorrt_cannot_hold(dim: int) -> None:
    """Its parser makes 4 of 2**40 + 4."""
    model = _relu()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = dim
    with pytest.raises(trtx.ParserError, match=f"dimension of {dim}; expected at most {2**31 - 1}"):
        load_onnx(model.SerializeToString(), None)
    for wrong in (dim, -1):
        model = _relu()
        model.graph.initializer.append(numpy_helper.from_array(WEIGHTS, "c"))
        model.graph.initializer[0].dims[0] = wrong
        with pytest.raises(trtx.ParserError, match=f"tensor 'c' .*dimension of {wrong}"):
            load_onnx(model.SerializeToString(), None)


class _BytesPath:
    def __fspath__(self) -> bytes:
        return b"m.onnx"


def test_weights_and_paths_of_other_kinds() -> None:
    twice = bytes(byte for byte in WEIGHTS.tobytes() for _ in range(2))
    loaded = load_onnx(external_model(), memoryview(twice)[::2])  # every other byte, which is no contiguous memory
    np.testing.assert_array_equal(weights_of(loaded.model), WEIGHTS)
    wrong: Any
    for wrong in (5, ["w.bin"], _BytesPath()):
        with pytest.raises(trtx.InvalidArgumentError, match=r"weights is .*expected a path or bytes"):
            load_onnx(external_model(), wrong)
    with pytest.raises(trtx.InvalidArgumentError, match="ONNX source is _BytesPath of bytes"):
        load_onnx(_BytesPath(), None)  # type: ignore[arg-type]


def test_a_file_beyond_what_a_model_can_be_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.touch()
    os.truncate(path, 3 << 30)
    for read in (load_onnx, onnx_sha256):
        with pytest.raises(trtx.ParserError, match="ends at 2147483648"):
            read(path, None)
    path.unlink()
    os.mkfifo(path)
    for read in (load_onnx, onnx_sha256):
        with pytest.raises(trtx.InvalidArgumentError, match="give the bytes"):
            read(path, None)


@pytest.mark.parametrize("stays_outside", [False, True])
@pytest.mark.parametrize("one_file", [False, True])
def test_of_external_data_only_the_weights_are_read_and_those_in_pieces(
    stays_outside: bool, one_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.onnx").write_bytes(external_model(offset=1 << 20))
    data = tmp_path / "weights.bin"
    with open(data, "wb") as file:
        file.truncate(96 << 20)
        file.seek(1 << 20)
        file.write(WEIGHTS.tobytes())
    if stays_outside:
        monkeypatch.setattr(source_module, "_MAX_INLINE", 0)
        (tmp_path / "m.onnx").write_bytes(external_model(offset=1 << 20, length=64 << 20))
    weights = data if one_file and not stays_outside else None
    tracemalloc.start()
    try:
        loaded = load_onnx(tmp_path / "m.onnx", weights)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert (loaded.directory is not None) is stays_outside
    assert loaded.sha256 == onnx_sha256(tmp_path / "m.onnx", weights)
    if not stays_outside:
        np.testing.assert_array_equal(weights_of(loaded.model), WEIGHTS)
