"""What a file is: by content, whatever its name, and what is said about one that is nothing."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path

import onnx
import pytest

import trtx_py as trtx
from tests.unit.fake_converters import scale_model
from trtx_py.convert import _formats

ONNX = scale_model(2).SerializeToString()


def archive(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return buffer.getvalue()


def safetensors() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


def field(number: int, payload: bytes) -> bytes:
    assert len(payload) < 128
    return bytes([number << 3 | 2, len(payload)]) + payload


CONTENT = {
    "onnx": ONNX,
    "plan": b"ftrt" + bytes(100),
    "tflite": b"\x1c\0\0\0TFL3" + bytes(60),
    "keras-h5": b"\x89HDF\r\n\x1a\n" + bytes(80),
    "keras": archive("metadata.json", "config.json", "model.weights.h5"),
    "torch-pickle": archive("net/data.pkl", "net/version", "net/data/0"),
    "torchscript": archive("net/data.pkl", "net/constants.pkl", "net/code/__torch__.py"),
    "torch-export": archive("net/models/model.json", "net/archive_format", "net/data/weights/w"),
    "safetensors": safetensors(),
    "tf-graph": field(1, field(1, b"node") + field(2, b"Placeholder")) * 3 + field(4, b"\x08\x1b"),
    "saved-model": b"\x08\x01" + field(2, field(1, b"\x22\x05serve")),
}
NAMES = {
    "onnx": ["m.onnx", "M.ONNX"],
    "plan": ["m.engine", "m.plan", "m.trt"],
    "tflite": ["m.tflite"],
    "keras-h5": ["m.h5", "m.hdf5"],
    "keras": ["m.keras"],
    "torch-pickle": ["m.pt", "m.pth"],
    "torchscript": ["m.torchscript", "m.pt"],
    "torch-export": ["m.pt2"],
    "safetensors": ["m.safetensors"],
    "tf-graph": ["m.pb"],
    "saved-model": ["saved_model.pb"],
}


@pytest.mark.parametrize(("format", "name"), [(f, n) for f, names in NAMES.items() for n in [*names, "m.bin", "m"]])
def test_content_tells(format: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(CONTENT[format])
    assert trtx.convert.detect_format(path) == format
    assert trtx.convert.detect_format(str(path)) == format


@pytest.mark.parametrize("format", CONTENT)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_tell_as_well(format: str, kind: type) -> None:
    assert trtx.convert.detect_format(kind(CONTENT[format])) == format


def test_older_files_of_torch() -> None:
    assert trtx.convert.detect_format(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + bytes(9)) == "torch-pickle"
    assert trtx.convert.detect_format(archive("serialized_exported_program.json", "version")) == "torch-export"


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(trtx.ConversionError, match=r"without saved_model\.pb") as caught:
        trtx.convert.detect_format(tmp_path)
    assert (caught.value.step, caught.value.cause) == ("detect", "damaged")
    (tmp_path / "saved_model.pb").write_bytes(CONTENT["saved-model"])
    assert trtx.convert.detect_format(tmp_path) == "saved-model"


@pytest.mark.parametrize("format", [f for f in CONTENT if f not in ("plan", "torch-pickle", "torchscript")])
def test_misnamed(format: str, tmp_path: Path) -> None:
    path = tmp_path / "m.plan"
    path.write_bytes(CONTENT[format])
    assert trtx.convert.detect_format(path) == format


@pytest.mark.parametrize("format", NAMES)
def test_damaged_under_its_own_name(format: str, tmp_path: Path) -> None:
    path = tmp_path / NAMES[format][0]
    path.write_bytes(b"<!DOCTYPE html><html>404</html>")
    with pytest.raises(trtx.ConversionError, match="named as") as caught:
        trtx.convert.detect_format(path)
    assert caught.value.cause == "damaged"
    assert "DOCTYPE" in str(caught.value)
    assert str(path) in str(caught.value)
    path.write_bytes(b"")
    with pytest.raises(trtx.ConversionError, match="is empty"):
        trtx.convert.detect_format(path)


@pytest.mark.parametrize("format", ["onnx", "tf-graph", "saved-model", "keras", "torchscript"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 1.0])
def test_cut_short(format: str, kept: float, tmp_path: Path) -> None:
    whole = CONTENT[format]
    path = tmp_path / NAMES[format][0]
    path.write_bytes(whole[: int(len(whole) * kept) - 1])
    with pytest.raises(trtx.ConversionError, match="cut short"):
        trtx.convert.detect_format(path)


def test_a_model_whose_producer_wrote_every_field() -> None:
    model = scale_model(1)
    model.producer_name, model.producer_version, model.domain, model.doc_string = "p", "1", "d", "text"
    model.model_version = 3
    model.metadata_props.add(key="a", value="b")
    model.functions.append(
        onnx.helper.make_function("own", "F", ["a"], ["b"], [onnx.helper.make_node("Relu", ["a"], ["b"])],
                                  [onnx.helper.make_opsetid("", 17)])
    )  # fmt: skip
    assert trtx.convert.detect_format(model.SerializeToString()) == "onnx"


def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "m.onnx"
    os.mkfifo(pipe)  # opening it would wait for somebody who writes
    for source in (pipe, "/dev/zero"):
        with pytest.raises(trtx.InvalidArgumentError, match="give the bytes"):
            trtx.convert.detect_format(source)


async def test_open_engine_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "m.onnx"
    os.mkfifo(pipe)
    with pytest.raises(trtx.InvalidArgumentError, match="give the bytes"):
        async with trtx.open_engine(pipe, backend="mock"):
            pass


def test_bytes_in_pieces() -> None:
    scattered = memoryview(bytes(byte for one in ONNX for byte in (one, 0)))[::2]
    assert trtx.convert.detect_format(scattered) == "onnx"
    assert trtx.convert.sync(scattered, simplify=False, compare=False, check_operators=False).model
    with pytest.raises(trtx.ConversionError, match="begins with b'aceg'"):
        trtx.convert.detect_format(memoryview(b"abcdefgh")[::2])


def test_a_file_of_countless_fields_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_formats, "_MAX_FIELDS", 5)
    assert trtx.convert.detect_format(CONTENT["tf-graph"][:-4] + CONTENT["tf-graph"] + b"\0") == "tf-graph"


def test_neither_file_nor_module(tmp_path: Path) -> None:
    assert trtx.convert.detect_format("package.module:factory") == "torch-module"
    for source in ("no-such.onnx", "C:/x.onnx", tmp_path / "m.pt", "a b:c", ":c", "m:"):
        with pytest.raises(trtx.InvalidArgumentError, match="cannot be read"):
            trtx.convert.detect_format(source)
    with pytest.raises(trtx.InvalidArgumentError, match="source is int"):
        trtx.convert.detect_format(7)  # type: ignore[arg-type]
    with pytest.raises(trtx.ConversionError, match="expected one of"):
        trtx.convert.detect_format(b"MZ\x90\0 an executable")
