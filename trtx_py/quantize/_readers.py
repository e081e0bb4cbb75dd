"""Calibration data: arrays, files of numbers and folders of images, cut into batches for one model."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .._arguments import checked_path, checked_shape
from .._errors import BackendUnavailableError, CalibrationError, DTypeError, InvalidArgumentError, ShapeError
from .._types import Array, Shape, TensorInfo

Batch = Mapping[str, Array]

NUMBER_SUFFIXES = (".npy", ".bin", ".raw")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")


class CalibrationReader(Protocol):
    """Calibration data of your own: any object that gives its batches, from the start each time it is iterated.

    A batch is what one inference takes: an array for each input of the model, by name, with the input's dtype and a
    shape that it admits. The arrays are not kept or changed.
    """

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class ImageFolder:
    """Images as calibration data: all files of one folder, in the order of their names. Needs Pillow.

    Each is converted to as many channels as the input has (1, 3 or 4), resized (bilinear) to its height and width, and
    becomes ``(pixel * scale - mean) / std`` in float32.

    Attributes:
        folder: where they lie.
        scale: 1/255 for a model that takes 0 to 1.
        mean, std: one number for all channels, or one for each.
        layout: "NCHW" or "NHWC".
        size: (height, width), for a model whose own are dynamic.
    """

    folder: str | os.PathLike[str]
    scale: float = 1 / 255
    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0
    layout: str = "NCHW"
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.layout not in ("NCHW", "NHWC"):
            raise InvalidArgumentError(f"layout is {self.layout!r}; expected 'NCHW' or 'NHWC'")
        scale, mean, std = (_numbers(getattr(self, name), name) for name in ("scale", "mean", "std"))
        if scale.ndim or scale == 0:
            raise InvalidArgumentError(f"scale is {self.scale!r}; expected one number other than 0, such as 1 / 255")
        for name, found in (("mean", mean), ("std", std)):
            if found.ndim > 1 or found.size not in (1, 3, 4):
                raise InvalidArgumentError(
                    f"{name} is {getattr(self, name)!r}; expected one number, or one for each of 1, 3 or 4 channels"
                )
        if not np.all(std > 0):
            raise InvalidArgumentError(f"std is {self.std!r}; expected positive numbers")
        if self.size is not None:
            size = checked_shape(self.size, "size of the images", minimum=1)
            if len(size) != 2:
                raise InvalidArgumentError(f"size is {self.size!r}; expected (height, width)")
            object.__setattr__(self, "size", size)


def _numbers(value: Any, name: str) -> Array:
    try:
        found: Array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        found = np.asarray(np.nan)
    if not np.isfinite(found).all():
        raise InvalidArgumentError(f"{name} of the images is {value!r}; expected finite numbers")
    return found


def batches_of(
    data: Any, inputs: Sequence[TensorInfo], *, batch_size: int, limit: int | None, shape: Shape | None
) -> Iterable[Batch]:
    """Batches for a model with these inputs; every one checked. The result can be iterated again.

    Args:
        data: a mapping of arrays or one array, with the samples along the first axis; a file or folder of .npy, .bin,
            .raw or image files, or a list of such files; an ImageFolder; or any iterable of batches.
        batch_size: samples in a batch, where the model leaves that open.
        limit: most batches to use.
        shape: of one sample, where the model leaves that open.
    Raises:
        InvalidArgumentError, DTypeError, ShapeError: the data are not such as the model takes; says what it takes.
        CalibrationError: there are no data.
    """
    source: Iterable[Batch]
    if isinstance(data, ImageFolder):
        source = _Images(data, _only(inputs, "images"), batch_size)
    elif isinstance(data, Mapping):
        source = _Arrays({name: np.asarray(array) for name, array in data.items()}, inputs, batch_size)
    elif isinstance(data, np.ndarray):
        source = _Arrays({_only(inputs, "one array").name: data}, inputs, batch_size)
    elif isinstance(data, (str, os.PathLike)) or _is_list_of_paths(data):
        source = _from_files(data, inputs, batch_size, shape)
    elif isinstance(data, Iterable):
        source = data
    else:
        more = "; collect what it gives in a list first" if hasattr(data, "__aiter__") else ""
        raise InvalidArgumentError(
            f"calibration data are {type(data).__name__}; expected arrays by input name, an array, a path, an "
            f"ImageFolder, or an iterable of batches{more}"
        )
    return _Checked(source, inputs, limit)


class _Checked:
    def __init__(self, source: Iterable[Batch], inputs: Sequence[TensorInfo], limit: int | None) -> None:
        self._source = source
        self._inputs = {tensor.name: tensor for tensor in inputs}
        self._limit = limit

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        for count, batch in enumerate(islice(self._source, self._limit), start=1):
            yield self._check(batch, count - 1)
        if not count:
            raise CalibrationError("there are no calibration data: the source gave no batch")

    def _check(self, given: Any, number: int) -> Batch:
        batch = _mapping(given, number)
        if batch.keys() != self._inputs.keys():
            raise InvalidArgumentError(
                f"calibration batch {number} has {', '.join(map(str, batch)) or 'no arrays'}; the model's inputs are "
                f"{', '.join(self._inputs)}"
            )
        checked = {}
        for name, tensor in self._inputs.items():
            array = np.asarray(batch[name])
            if array.dtype != tensor.dtype.numpy:
                raise DTypeError(
                    f"calibration batch {number}: input {name!r} is {array.dtype}, expected {tensor.dtype.value}"
                )
            if not _admits(tensor.shape, array.shape):
                raise ShapeError(
                    f"calibration batch {number}: input {name!r} has shape {list(array.shape)}, expected "
                    f"{list(tensor.shape)} with any number in place of -1"
                )
            checked[name] = np.asarray(array, order="C")  # ascontiguousarray() would give a scalar an axis
        return checked


def _mapping(batch: Any, number: int) -> Batch:
    if not isinstance(batch, Mapping):
        raise InvalidArgumentError(
            f"calibration batch {number} is {type(batch).__name__}; expected arrays by input name"
        )
    return batch


def copied(batch: Any) -> Any:
    """A batch with arrays of its own: whoever gives it may fill the same ones again for the next."""
    return {name: np.array(array) for name, array in batch.items()} if isinstance(batch, Mapping) else batch


def _admits(wanted: Shape, found: Shape) -> bool:
    return len(wanted) == len(found) and all(w in (-1, f) for w, f in zip(wanted, found, strict=True))


def _only(inputs: Sequence[TensorInfo], what: str) -> TensorInfo:
    if len(inputs) != 1:
        raise InvalidArgumentError(
            f"{what} can be given to a model with one input; this one has {', '.join(t.name for t in inputs)}: give "
            "arrays by input name, or an iterable of batches"
        )
    return inputs[0]


class _Arrays:
    """Slices of arrays that are in memory. Of a last batch that the model cannot take whole, nothing."""

    def __init__(self, arrays: Mapping[str, Array], inputs: Sequence[TensorInfo], batch_size: int) -> None:
        if not arrays:
            raise InvalidArgumentError(
                f"there are no calibration arrays; the model's inputs are {', '.join(t.name for t in inputs)}"
            )
        lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ShapeError(
                f"calibration arrays have different numbers of samples: {lengths}; expected as many of each input"
            )
        self._arrays = arrays
        self._count = next(iter(lengths.values()))
        fixed = [t.shape[0] for t in inputs if t.shape and t.shape[0] != -1]
        self._fixed = bool(fixed)
        self._size = fixed[0] if fixed else batch_size
        if self._fixed and 0 < self._count < self._size:
            raise _too_few(self._count, self._size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self._count, self._size):
            if not self._fixed or start + self._size <= self._count:
                yield {name: array[start : start + self._size] for name, array in self._arrays.items()}


def _too_few(count: int, size: int) -> ShapeError:
    return ShapeError(f"there are {count} calibration samples, and the model takes {size} at a time; give more of them")


def _is_list_of_paths(data: Any) -> bool:
    return isinstance(data, (list, tuple)) and bool(data) and all(isinstance(p, (str, os.PathLike)) for p in data)


def add_to_digest(digest: hashlib._Hash, data: Any, limit: int | None) -> None:
    """Take in whatever ``batches_of`` takes. Raises InvalidArgumentError for what cannot be read."""
    if isinstance(data, ImageFolder):
        options = (data.scale, np.asarray(data.mean).tolist(), np.asarray(data.std).tolist(), data.layout, data.size)
        digest.update(repr(options).encode())
        data = data.folder
    if isinstance(data, Mapping):
        _add_batch(digest, data)
    elif isinstance(data, np.ndarray):
        _add_array(digest, "", data)
    elif isinstance(data, (str, os.PathLike)) or _is_list_of_paths(data):
        for path in _files_at(data):
            try:
                content = path.read_bytes()
            except OSError as error:
                raise InvalidArgumentError(f"calibration file {str(path)!r} cannot be read: {error}") from error
            digest.update(f"|{path.suffix.lower()}|{len(content)}|".encode())
            digest.update(content)
    elif isinstance(data, Iterable):
        for number, batch in enumerate(islice(data, limit)):
            _add_batch(digest, _mapping(batch, number))


def _add_batch(digest: hashlib._Hash, batch: Batch) -> None:
    for name in sorted(batch, key=str):
        _add_array(digest, name, np.asarray(batch[name]))


def _add_array(digest: hashlib._Hash, name: str, array: Array) -> None:
    digest.update(f"|{name}|{array.dtype}|{array.shape}|".encode())
    digest.update(np.ascontiguousarray(array).tobytes())


def _files_at(data: Any) -> list[Path]:
    paths = [Path(checked_path(p, "calibration file")) for p in (data if isinstance(data, (list, tuple)) else [data])]
    known = NUMBER_SUFFIXES + IMAGE_SUFFIXES
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += _files_in(path, known)
        elif path.is_file():
            files.append(path)
        else:
            raise InvalidArgumentError(f"calibration data {str(path)!r} do not exist; expected a file or a folder")
    return files


def _files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    except OSError as error:
        raise InvalidArgumentError(f"calibration folder {str(folder)!r} cannot be read: {error.strerror}") from error


def _from_files(data: Any, inputs: Sequence[TensorInfo], batch_size: int, shape: Shape | None) -> Iterable[Batch]:
    files = _files_at(data)
    known = NUMBER_SUFFIXES + IMAGE_SUFFIXES
    suffixes = {path.suffix.lower() for path in files}
    place = data if isinstance(data, (str, os.PathLike)) else ", ".join(map(str, data[:3]))
    if not files or suffixes - set(known):
        found = f"files ending in {', '.join(sorted(suffixes - set(known)))}" if files else "no such files"
        raise InvalidArgumentError(f"calibration data at {place}: {found}; expected {', '.join(known)}")
    if suffixes <= set(IMAGE_SUFFIXES):
        tensor = _only(inputs, "images")
        size = (shape[-2], shape[-1]) if shape is not None and len(shape) >= 2 else None
        return _Images(ImageFolder(files[0].parent, size=size), tensor, batch_size, files)
    if suffixes & set(IMAGE_SUFFIXES):
        raise InvalidArgumentError(f"calibration data at {place} mix images and files of numbers; expected one kind")
    return _Numbers(files, _only(inputs, "files"), batch_size, shape)


class _Numbers:
    """.npy files, of one sample or several; .bin and .raw files, which are samples one after the other."""

    def __init__(self, files: list[Path], tensor: TensorInfo, batch_size: int, shape: Shape | None) -> None:
        self._files = files
        self._tensor = tensor
        sample = tuple(shape) if shape is not None else tensor.shape[1:]
        self._sample = sample
        fixed = tensor.shape[0] if tensor.shape else 1
        self._size, self._whole = (batch_size, False) if fixed == -1 else (fixed, True)
        if any(n < 0 for n in sample) and any(path.suffix.lower() != ".npy" for path in files):
            raise InvalidArgumentError(
                f"input {tensor.name!r} has shape {list(tensor.shape)}, so the size of a sample in a .bin or .raw file "
                "is not known; give shape= (of one sample, without the batch)"
            )
        if 0 in sample:
            raise InvalidArgumentError(
                f"a sample of input {tensor.name!r} has shape {list(sample)}, so there is nothing in it to read"
            )

    def __iter__(self) -> Iterator[Batch]:
        waiting: list[Array] = []
        count = 0
        for path in self._files:
            for sample in self._samples(path):
                count += 1
                if waiting and waiting[0].shape != sample.shape:
                    yield from self._flush(waiting)
                    waiting = []
                waiting.append(sample)
                if len(waiting) == self._size:
                    yield from self._flush(waiting)
                    waiting = []
        if self._whole and 0 < count < self._size:
            raise _too_few(count, self._size)
        yield from self._flush(waiting)

    def _flush(self, waiting: list[Array]) -> Iterator[Batch]:
        if waiting and (not self._whole or len(waiting) == self._size):
            yield {self._tensor.name: np.stack(waiting)}

    def _samples(self, path: Path) -> Iterable[Array]:
        dtype = self._tensor.dtype.numpy
        array: Array
        try:
            if path.suffix.lower() == ".npy":
                with path.open("rb") as file:
                    array = np.lib.format.read_array(file, allow_pickle=False)
            else:
                array = np.frombuffer(path.read_bytes(), np.uint8)
        except Exception as error:  # a damaged header raises what Python's parser does, or MemoryError
            raise InvalidArgumentError(f"calibration file {str(path)!r} cannot be read: {error}") from error
        if path.suffix.lower() != ".npy":
            each = dtype.itemsize * int(np.prod(self._sample, dtype=np.int64))
            if not array.size or array.size % each:
                raise ShapeError(
                    f"calibration file {str(path)!r} has {array.size} bytes, expected a multiple of {each}: "
                    f"{list(self._sample)} of {dtype}"
                )
            samples: Array = array.view(dtype).reshape(-1, *self._sample)
            return samples
        if array.dtype != dtype:
            raise DTypeError(f"calibration file {str(path)!r} is {array.dtype}, expected {dtype}")
        rank = len(self._tensor.shape)
        if array.ndim not in (rank, rank - 1):
            raise ShapeError(
                f"calibration file {str(path)!r} has shape {list(array.shape)}, expected {list(self._sample)} for one "
                f"sample, or {list(self._tensor.shape)} for several"
            )
        return array if array.ndim == rank else array[None]


class _Images:
    def __init__(
        self, folder: ImageFolder, tensor: TensorInfo, batch_size: int, files: list[Path] | None = None
    ) -> None:
        self._options = folder
        self._tensor = tensor
        if len(tensor.shape) != 4 or tensor.dtype.numpy != np.float32:
            raise InvalidArgumentError(f"images need an input of float32 with four axes; the model has {tensor}")
        first = folder.layout == "NCHW"
        channels, height, width = tensor.shape[1:] if first else (tensor.shape[3], *tensor.shape[1:3])
        if folder.size is not None:
            height, width = folder.size
        if channels not in (1, 3, 4) or height < 1 or width < 1:
            raise InvalidArgumentError(
                f"{tensor} as {folder.layout} has {channels} channels and size {height} by {width}; expected 1, 3 or 4 "
                "channels and a known size: give ImageFolder the right layout, or size="
            )
        for name in ("mean", "std"):
            count = np.size(getattr(folder, name))
            if count not in (1, channels):
                raise InvalidArgumentError(
                    f"ImageFolder.{name} has {count} numbers, and {tensor} as {folder.layout} has {channels} channels; "
                    "give one number, or one for each channel"
                )
        self._channels, self._size = channels, (height, width)
        self._batch = batch_size if tensor.shape[0] == -1 else tensor.shape[0]
        self._whole = tensor.shape[0] != -1
        if files is None:
            path = Path(checked_path(folder.folder, "image folder"))
            if not path.is_dir():
                problem = "is a file, not a folder" if path.exists() else "does not exist"
                raise InvalidArgumentError(f"image folder {str(path)!r} {problem}")
            files = _files_in(path, IMAGE_SUFFIXES)
            if not files:
                raise InvalidArgumentError(
                    f"image folder {str(path)!r} has no images; expected files ending in {', '.join(IMAGE_SUFFIXES)}"
                )
        if self._whole and len(files) < self._batch:
            raise _too_few(len(files), self._batch)
        self._files = files

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._files), self._batch):
            paths = self._files[start : start + self._batch]
            if not self._whole or len(paths) == self._batch:
                yield {self._tensor.name: np.stack([self._load(path) for path in paths])}

    def _load(self, path: Path) -> Array:
        try:
            image_module: Any = importlib.import_module("PIL.Image")
        except ImportError as error:
            raise BackendUnavailableError("reading images needs Pillow; pip install pillow") from error
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[self._channels]
        height, width = self._size
        try:
            with image_module.open(path) as image:
                eight = _eight_bits(image, image_module)
                resized = eight.convert(mode).resize((width, height), image_module.Resampling.BILINEAR)
        except Exception as error:  # of a damaged file Pillow raises OSError, SyntaxError, its own, and more
            raise InvalidArgumentError(f"calibration image {str(path)!r} cannot be read: {error}") from error
        options = self._options
        pixels = np.asarray(resized, np.float32).reshape(height, width, self._channels)
        mean, std = np.asarray(options.mean, np.float32), np.asarray(options.std, np.float32)
        values: Array = ((pixels * np.float32(options.scale) - mean) / std).astype(np.float32)
        return values if options.layout == "NHWC" else np.ascontiguousarray(values.transpose(2, 0, 1))


def _eight_bits(image: Any, image_module: Any) -> Any:
    """An image of 16 bits with the upper 8 of each pixel: Pillow's convert() makes 255 of all that is more."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # before Pillow 11.3 "I"
        upper = np.asarray(image).astype(np.int64) >> 8
        return image_module.fromarray(np.clip(upper, 0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers (mode {image.mode!r}) of no known range; save it with 8 bits, or as .npy"
        )
    return image
