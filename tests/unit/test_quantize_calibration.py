"""Calibration data in all their forms, own collectors, and the cache."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from tests.quantize_models import cnn, images
from trtx_py._types import DataType, TensorInfo, TensorMode
from trtx_py.quantize import PercentileCollector, convert
from trtx_py.quantize._calibration import Calibration

IMAGE = TensorInfo("image", TensorMode.INPUT, DataType.FLOAT, (-1, 1, 8, 8))
FIXED = TensorInfo("image", TensorMode.INPUT, DataType.FLOAT, (4, 1, 8, 8))
MODEL = cnn().SerializeToString()


def rows(calibration: Calibration, tensor: TensorInfo = IMAGE) -> np.ndarray[Any, Any]:
    batches = [batch[tensor.name] for batch in calibration.batches_for([tensor])]
    again = [batch[tensor.name] for batch in calibration.batches_for([tensor])]
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    return np.concatenate(batches)


class Reader:
    def __iter__(self) -> Iterator[dict[str, Any]]:
        for part in np.split(images(), 3):
            yield {"image": part}


def files(folder: Path, kind: str) -> Path:
    for number, image in enumerate(images()):
        path = folder / f"{number:03}.{kind}"
        if kind == "npy":
            np.save(path, image)
        else:
            path.write_bytes(image.tobytes())
    return folder


def test_every_form_gives_the_same_data(tmp_path: Path) -> None:
    wanted = images()
    forms: list[Any] = [wanted, {"image": wanted}, Reader(), iter(Reader())]
    for kind in ("npy", "bin", "raw"):
        folder = tmp_path / kind
        folder.mkdir()
        forms += [files(folder, kind), sorted(folder.iterdir())]
    np.save(tmp_path / "all.npy", wanted)
    (tmp_path / "all.bin").write_bytes(wanted.tobytes())
    forms += [tmp_path / "all.npy", str(tmp_path / "all.bin")]
    for form in forms:
        assert np.array_equal(rows(Calibration(form)), wanted), form


def test_batches() -> None:
    given = Calibration(images(10), batch_size=4)
    assert [len(b["image"]) for b in given.batches_for([IMAGE])] == [4, 4, 2]
    assert [len(b["image"]) for b in given.batches_for([FIXED])] == [4, 4]  # what a fixed batch cannot hold is left out
    assert len(rows(Calibration(images(10), batch_size=4, batches=2))) == 8
    with pytest.raises(trtx.ShapeError, match="there are 3 calibration samples, and the model takes 4"):
        rows(Calibration(images(3)), FIXED)


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        ([], trtx.CalibrationError, "no calibration data"),
        (np.zeros((0, 1, 8, 8), np.float32), trtx.CalibrationError, "no calibration data"),
        ([{"x": images()}], trtx.InvalidArgumentError, "has x; the model's inputs are image"),
        ([images()], trtx.InvalidArgumentError, "batch 0 is ndarray; expected arrays by input name"),
        ({"image": images(4), "more": images(3)}, trtx.ShapeError, "different numbers of samples"),
        (17, trtx.InvalidArgumentError, "calibration data are int"),
        ("/no/such/folder", trtx.InvalidArgumentError, "do not exist"),
    ],
)
def test_data_that_cannot_be_used(data: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        rows(Calibration(data))


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="no such files"):
        rows(Calibration(tmp_path))
    (tmp_path / "short.bin").write_bytes(b"abc")
    with pytest.raises(trtx.ShapeError, match=r"has 3 bytes, expected a multiple of 256"):
        rows(Calibration(tmp_path))
    np.save(tmp_path / "wide.npy", np.zeros((1, 8, 8)))
    with pytest.raises(trtx.DTypeError, match="float64, expected float32"):
        rows(Calibration(tmp_path / "wide.npy"))
    (tmp_path / "broken.npy").write_bytes(b"no numpy")
    with pytest.raises(trtx.InvalidArgumentError, match="cannot be read"):
        rows(Calibration(tmp_path / "broken.npy"))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(trtx.InvalidArgumentError, match=r"files ending in \.txt"):
        rows(Calibration([tmp_path / "a.txt"]))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(trtx.InvalidArgumentError, match="mix images and files of numbers"):
        rows(Calibration(tmp_path))
    open_size = TensorInfo("image", TensorMode.INPUT, DataType.FLOAT, (-1, 1, -1, -1))
    with pytest.raises(trtx.InvalidArgumentError, match="give shape="):
        rows(Calibration(tmp_path / "short.bin"), open_size)
    (tmp_path / "short.bin").write_bytes(bytes(4 * 4 * 4))
    assert rows(Calibration(tmp_path / "short.bin", shape=(1, 4, 4)), open_size).shape == (1, 1, 4, 4)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_images(tmp_path: Path, channels: int, mode: str, layout: str) -> None:
    image_module = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, channels)).astype(np.uint8)
    for number, array in enumerate(pixels):
        image_module.fromarray(array.squeeze() if channels == 1 else array, mode).save(tmp_path / f"{number}.png")
    shape = (-1, channels, 8, 8) if layout == "NCHW" else (-1, 8, 8, channels)
    tensor = TensorInfo("image", TensorMode.INPUT, DataType.FLOAT, shape)
    found = rows(Calibration(trtx.ImageFolder(tmp_path, mean=0.5, std=0.25, layout=layout)), tensor)
    wanted = (pixels.astype(np.float32) / 255 - 0.5) / 0.25
    assert np.allclose(found, wanted if layout == "NHWC" else wanted.transpose(0, 3, 1, 2), atol=1e-5)
    if layout == "NCHW":
        assert np.allclose(rows(Calibration(tmp_path), tensor), pixels.transpose(0, 3, 1, 2) / 255, atol=1e-6)
    (tmp_path / "3.png").write_bytes(b"no image")
    with pytest.raises(trtx.InvalidArgumentError, match="cannot be read"):
        rows(Calibration(trtx.ImageFolder(tmp_path, layout=layout)), tensor)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"layout": "CHW"}, "'NCHW' or 'NHWC'"), ({"std": 0}, "std is 0")],
)
def test_bad_image_options(options: Any, says: str) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=says):
        trtx.ImageFolder("x", **options)


def test_images_need_an_input_for_them(tmp_path: Path) -> None:
    vector = TensorInfo("x", TensorMode.INPUT, DataType.FLOAT, (-1, 8))
    with pytest.raises(trtx.InvalidArgumentError, match="images need an input"):
        rows(Calibration(trtx.ImageFolder(tmp_path)), vector)
    with pytest.raises(trtx.InvalidArgumentError, match="has no images"):
        rows(Calibration(trtx.ImageFolder(tmp_path)))


@pytest.mark.parametrize(
    ("options", "says"),
    [({"method": "magic"}, "calibration method is 'magic'"), ({"batches": 0}, "batches"),
     ({"batch_size": 0}, "batch_size"),
     ({"percentile": 0}, "percentile"), ({"cache": 3}, "calibration cache"), ({"shape": ("a",)}, "shape")],
)  # fmt: skip
def test_bad_options(options: Any, says: str) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=says):
        Calibration(images(), **options)


# Own collectors


class Half:
    """A collector: half of the largest magnitude."""

    def __init__(self) -> None:
        self.largest = 0.0

    def collect(self, values: Any) -> None:
        self.largest = max(self.largest, float(np.abs(values).max()))

    def threshold(self) -> float:
        return self.largest / 2


class Silent(Half):
    def threshold(self) -> Any:
        return float("nan")


class Boundless(Half):
    def threshold(self) -> Any:
        return 1e300


def test_a_collector_of_the_users_own() -> None:
    found = convert(MODEL, "int8", calibration=Calibration(images(), method=Half))
    assert found.ranges["image"] == pytest.approx(np.abs(images()).max() / 2)
    with pytest.raises(trtx.CalibrationError, match="Silent gave the threshold nan for tensor 'image'"):
        convert(MODEL, "int8", calibration=Calibration(images(), method=Silent))
    with pytest.raises(trtx.CalibrationError, match=r"Boundless gave the threshold 1e\+300 for tensor 'image'"):
        convert(MODEL, "int8", calibration=Calibration(images(), method=Boundless))


@pytest.mark.parametrize(
    ("method", "says"),
    [(lambda: 3, "made 3; expected a Collector"), (np.mean, "cannot be called without arguments")],
)
def test_a_method_that_makes_no_collector(method: Any, says: str) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=says):
        convert(MODEL, "int8", calibration=Calibration(images(), method=method))


# The cache


def test_the_cache_is_keyed_by_model_data_and_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    import trtx_py.quantize._calibration as module

    measure = module._measure

    def counting(*args: Any) -> dict[str, float]:
        runs.append(1)
        return measure(*args)

    monkeypatch.setattr(module, "_measure", counting)
    cache = tmp_path / "ranges.json"

    def ranges(data: Any = None, model: bytes = MODEL, **options: Any) -> Any:
        given = Calibration(images() if data is None else data, cache=cache, **options)
        return convert(model, "int8", calibration=given).ranges

    first = ranges()
    assert ranges() == first
    assert len(runs) == 1
    ranges(images(seed=2))
    ranges(method="minmax")
    ranges(batches=1)
    ranges(model=cnn(seed=9).SerializeToString())
    assert len(runs) == 5
    assert ranges() == first
    assert len(runs) == 5
    assert len(json.loads(cache.read_text())["entries"]) == 5


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        "not json",
        "[" * 100_000,
        '{"format": "trtx_py calibration cache", "version": 9, "entries": {}}',
    ],
)
def test_a_file_that_is_no_cache_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.json"
    path.write_text(content)
    with pytest.raises(trtx.CalibrationError, match="is no calibration cache, or a damaged one"):
        convert(MODEL, "int8", calibration=Calibration(images(), cache=path))
    assert path.read_text() == content


def test_damaged_ranges_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    given = Calibration(images(), cache=path)
    convert(MODEL, "int8", calibration=given)
    content = json.loads(path.read_text())
    (entry,) = content["entries"].values()
    entry["image"] = -1
    path.write_text(json.dumps(content))
    with pytest.raises(trtx.CalibrationError, match="no positive numbers"):
        convert(MODEL, "int8", calibration=given)


def test_a_cache_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="calibration cache cannot be saved"):
        convert(MODEL, "int8", calibration=Calibration(images(), cache=tmp_path / "no" / "ranges.json"))


@pytest.mark.parametrize("value", ["Infinity", "1" + "0" * 400, "NaN", '"x"', "true"])
def test_ranges_that_float32_cannot_hold_are_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "ranges.json"
    given = Calibration(images(), cache=path, method="minmax")
    convert(MODEL, "int8", calibration=given)
    content = json.loads(path.read_text())
    (entry,) = content["entries"].values()
    path.write_text(json.dumps(content).replace(f'"image": {entry["image"]}', f'"image": {value}'))
    with pytest.raises(trtx.CalibrationError, match="ranges that are no positive numbers"):
        convert(MODEL, "int8", calibration=given)


def test_a_method_without_a_name_of_its_own_has_no_cache(tmp_path: Path) -> None:
    class Inner(Half):
        pass

    for method in (Inner, lambda: PercentileCollector(50), partial(PercentileCollector, 99.0)):
        convert(MODEL, "int8", calibration=Calibration(images(8), method=method))
        with pytest.raises(trtx.InvalidArgumentError, match="cache cannot tell from others"):
            Calibration(images(), method=method, cache=tmp_path / "ranges.json")


def test_the_cache_notices_a_method_that_was_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for divisor in (2, 3):
        module = tmp_path / str(divisor) / "own_collector.py"
        module.parent.mkdir()
        module.write_text(f"class Own:\n    def threshold(self):\n        return 1 / {divisor}\n")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(module.parent))
            keys.append(Calibration(images(), method=importlib.import_module("own_collector").Own).key())
            del sys.modules["own_collector"]
    assert keys[0] != keys[1]
