"""Calibration data that are damaged, hostile or odd: refused by name, or read as they are meant."""

from __future__ import annotations

import io
import os
import pickle
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from tests.quantize_models import images
from trtx_py._types import DataType, TensorInfo, TensorMode
from trtx_py.quantize import Calibration


def tensor(*shape: int) -> TensorInfo:
    return TensorInfo("image", TensorMode.INPUT, DataType.FLOAT, shape)


IMAGE = tensor(-1, 1, 8, 8)
COLOUR = tensor(-1, 3, 8, 8)


def rows(data: Any, info: TensorInfo = IMAGE, **options: Any) -> Any:
    return np.concatenate([batch["image"] for batch in Calibration(data, **options).batches_for([info])])


def npy(array: Any) -> bytes:
    with io.BytesIO() as file:
        np.save(file, array, allow_pickle=True)
        return file.getvalue()


def archive() -> bytes:
    with io.BytesIO() as file:
        np.savez(file, image=images(2))
        return file.getvalue()


def with_header(text: str) -> bytes:
    header = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(256)


# Numbers


class MakesFolder:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for content in (npy(np.array([MakesFolder(trap)], dtype=object)), pickle.dumps(MakesFolder(trap))):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(trtx.InvalidArgumentError, match=r"a\.npy' cannot be read"):
            rows(tmp_path / "a.npy")
    assert not trap.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"", npy(images(2))[:60], npy(images(2))[:-8], archive(),
        with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999, 1, 8, 8), }"),
        with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 8, 8), "),
        with_header("(\"\"\""),
    ],
    ids=["empty", "half a header", "truncated", "npz", "terabytes", "open brace", "open string"],
)  # fmt: skip
def test_damaged_npy_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(trtx.InvalidArgumentError, match=r"calibration file .*a\.npy' cannot be read"):
        rows(tmp_path / "a.npy")


def test_a_sample_without_elements_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(8))
    with pytest.raises(trtx.InvalidArgumentError, match="nothing in it to read"):
        rows(tmp_path / "a.bin", tensor(-1, 0))


def test_fewer_samples_than_a_fixed_batch_holds(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", images(3))
    with pytest.raises(trtx.ShapeError, match="there are 3 calibration samples, and the model takes 4"):
        rows(tmp_path / "a.npy", tensor(4, 1, 8, 8))
    save(tmp_path / "images", np.zeros((8, 8), np.uint8))
    with pytest.raises(trtx.ShapeError, match="there are 1 calibration samples, and the model takes 4"):
        rows(tmp_path / "images", tensor(4, 1, 8, 8))


def test_a_scalar_input_keeps_its_shape() -> None:
    scalar = TensorInfo("flag", TensorMode.INPUT, DataType.BOOL, ())
    (batch,) = Calibration([{"flag": np.array(True)}]).batches_for([scalar])
    assert batch["flag"].shape == ()


def test_a_generator_may_fill_one_array_again_and_again() -> None:
    def reused() -> Iterator[dict[str, Any]]:
        buffer = np.empty((8, 1, 8, 8), np.float32)
        for part in np.split(images(), 3):
            buffer[:] = part
            yield {"image": buffer}

    assert np.array_equal(rows(reused()), images())


async def later() -> AsyncIterator[Any]:
    yield {"image": images()}


@pytest.mark.parametrize(
    ("data", "says"),
    [([images()], "batch 0 is ndarray; expected arrays by input name"), ([3], "batch 0 is int"),
     ([{1: images(), "a": images()}], "batch 0 has 1, a; the model's inputs are image"),
     ({}, "no calibration arrays; the model's inputs are image"),
     (later(), "async_generator; .* collect what it gives in a list first")],
    ids=["arrays", "numbers", "names that are no text", "nothing", "async"],
)  # fmt: skip
def test_batches_that_are_none(data: Any, says: str) -> None:
    given = Calibration(data)
    with pytest.raises(trtx.InvalidArgumentError, match=says):
        list(given.batches_for([IMAGE]))


@pytest.mark.parametrize("data", [[images()], [3]], ids=["arrays", "numbers"])
def test_the_key_of_batches_that_are_none_fails_alike(data: Any) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="expected arrays by input name"):
        Calibration(data).key()


# Images


def save(folder: Path, pixels: Any, name: str = "a.png", mode: str | None = None) -> Path:
    image_module = pytest.importorskip("PIL.Image")
    folder.mkdir(exist_ok=True)
    image = image_module.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("pixels", "mode", "wanted"),
    [
        (np.full((30, 12, 3), 200, np.uint8), None, 200), (np.full((5, 5), 100, np.uint8), None, 100),
        (np.full((8, 8, 4), 128, np.uint8), None, 128), (np.full((8, 8, 3), 51, np.uint8), "P", 51),
        (np.full((8, 8), 77, np.uint8), "LA", 77), (np.full((8, 8), 255, np.uint8), "1", 255),
        (np.full((8, 8), 0x8000, np.uint16), None, 128),
    ],
    ids=["another size", "grey", "alpha", "palette", "grey with alpha", "bits", "16 bits"],
)  # fmt: skip
def test_every_kind_of_pixel_becomes_0_to_1(tmp_path: Path, pixels: Any, mode: str | None, wanted: int) -> None:
    folder = save(tmp_path / "images", pixels, mode=mode)
    for info in (IMAGE, COLOUR):
        found = rows(folder, info)
        assert found.shape == (1, *info.shape[1:])
        assert np.allclose(found, wanted / 255, atol=1e-6)


def test_pixels_of_no_known_range_are_refused(tmp_path: Path) -> None:
    for pixels in (np.zeros((8, 8), np.float32), np.zeros((8, 8), np.int32)):
        save(tmp_path / "images", pixels, "a.tiff")
        with pytest.raises(trtx.InvalidArgumentError, match=r"a\.tiff' cannot be read: its pixels are 32-bit numbers"):
            rows(tmp_path / "images")


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def test_damaged_and_gigantic_images_are_named(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    whole = (save(tmp_path / "images", pixels) / "a.png").read_bytes()
    size = (100_000).to_bytes(4, "big")
    bomb = whole[:8] + chunk(b"IHDR", size + size + bytes([8, 2, 0, 0, 0])) + whole[33:]
    middle = len(whole) // 2
    split = whole[:33] + chunk(b"IDAT", whole[41:middle]) + b"\0\0\0\x08\x00\x05\xd5l" + whole[middle:]
    for content in (b"", whole[:200], bomb, split):  # Pillow: OSError, OSError, one of its own, SyntaxError
        (tmp_path / "images" / "a.png").write_bytes(content)
        with pytest.raises(trtx.InvalidArgumentError, match=r"calibration image .*a\.png' cannot be read"):
            rows(tmp_path / "images", COLOUR)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scale": "x"}, "scale of the images is 'x'"), ({"scale": float("nan")}, "scale of the images"),
        ({"scale": 0}, "scale is 0"), ({"mean": None}, "mean of the images is None"),
        ({"mean": [[1, 2], [3]]}, "mean of the images"), ({"mean": [1, 2]}, "one for each of 1, 3 or 4 channels"),
        ({"std": "x"}, "std of the images"), ({"size": (8, 8, 8)}, r"expected \(height, width\)"),
        ({"size": (0, 8)}, "size of the images"), ({"size": 3}, "size of the images"),
    ],
)  # fmt: skip
def test_image_options_of_a_wrong_kind(options: Any, says: str) -> None:
    with pytest.raises(trtx.TrtxError, match=says):
        trtx.ImageFolder("x", **options)


def test_a_mean_for_channels_that_the_model_has_not(tmp_path: Path) -> None:
    folder = save(tmp_path / "images", np.zeros((8, 8), np.uint8))
    with pytest.raises(trtx.InvalidArgumentError, match=r"ImageFolder\.mean has 3 numbers, .* has 1 channels"):
        rows(trtx.ImageFolder(folder, mean=[0.1, 0.2, 0.3]))
    with pytest.raises(trtx.InvalidArgumentError, match="is a file, not a folder"):
        rows(trtx.ImageFolder(folder / "a.png"))
