"""Models as callers give them: whole, in pieces, broken, or reaching for files that are none of their business."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, numpy_helper

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.ownership import SAMPLE, WEIGHTS, matmul_model
from trtx_py._onnx_source import load_onnx

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
