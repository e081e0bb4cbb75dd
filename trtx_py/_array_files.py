"""Arrays in files, and inputs made of them: what ``trtx run`` reads and writes. Nothing here unpickles."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._arguments import replace_file
from ._errors import DTypeError, InvalidArgumentError, ShapeError
from ._types import Array, Shape, TensorInfo, TensorMode
from .quantize._readers import IMAGE_SUFFIXES, ImageFolder, batches_of

#: What numpy raises for files that are no arrays, or are cut off, or would have to be unpickled.
_UNREADABLE = (
    ValueError, EOFError, KeyError, OverflowError, NotImplementedError, RuntimeError, struct.error, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip


def _is_file(path: str) -> None:
    """A device has no end, and a pipe may have no writer."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise InvalidArgumentError(f"{path!r} cannot be read: it is a pipe or a device; give the path of a file")


def read_npz(path: str) -> dict[str, Array]:
    """Arrays by name. Raises InvalidArgumentError for a file that cannot be read; objects are never unpickled."""
    _is_file(path)
    try:
        with open(path, "rb") as file:  # numpy leaves it open when it is damaged
            found: Any = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                raise InvalidArgumentError(f"{path!r} is one array (.npy); expected arrays by name (.npz)")
            with found:
                return {name: found[name] for name in found.files}
    except InvalidArgumentError:  # which is a ValueError too
        raise
    except OSError as error:
        raise InvalidArgumentError(f"{path!r} cannot be read: {error.strerror or error}") from error
    except _UNREADABLE as error:
        raise InvalidArgumentError(f"{path!r} is no .npz file of arrays, or a damaged one: {error}") from error


def read_input(path: str, tensor: TensorInfo, shape: Shape, images: ImageFolder | None = None) -> Array:
    """One input from a file: .npy, an image, or the bare numbers (.bin, .raw, or any other name).

    Args:
        tensor: what the engine takes.
        shape: of the input, for files that do not tell.
        images: how pixels become numbers; its folder is not looked at.
    Raises:
        InvalidArgumentError, DTypeError, ShapeError: the file cannot be read, or is not such an input.
    """
    _is_file(path)
    low = path.lower()
    if low.endswith(".npy"):
        try:
            array: Array = np.load(path, allow_pickle=False)
        except OSError as error:
            raise InvalidArgumentError(f"{path!r} cannot be read: {error.strerror or error}") from error
        except _UNREADABLE as error:
            raise InvalidArgumentError(f"{path!r} is no .npy file of numbers, or a damaged one: {error}") from error
        return array
    if low.endswith(IMAGE_SUFFIXES):
        found = batches_of([path], [tensor], batch_size=1, limit=1, shape=shape[1:]) if images is None else None
        if found is None:
            assert images is not None
            found = _images([path], tensor, images)
        return np.asarray(next(iter(found))[tensor.name])
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise InvalidArgumentError(f"{path!r} cannot be read: {error.strerror}") from error
    dtype = tensor.dtype.numpy
    wanted = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(content) != wanted:
        raise ShapeError(
            f"{path!r} has {len(content)} bytes, and input {tensor.name!r} of {dtype} and shape {list(shape)} takes "
            f"{wanted}"
        )
    return np.frombuffer(content, dtype).reshape(shape)


def _images(paths: Sequence[str], tensor: TensorInfo, options: ImageFolder) -> Any:
    from pathlib import Path

    from .quantize._readers import _Images

    return _Images(options, tensor, len(paths), [Path(path) for path in paths])


def concrete_shapes(tensors: Sequence[TensorInfo], given: Mapping[str, Shape], profile: int = 0) -> dict[str, Shape]:
    """A shape for each input: as given, else the best of the profile, else as the model says.

    Raises:
        InvalidArgumentError: a name that is no input.
        ShapeError: an axis that nothing tells the size of.
    """
    inputs = {tensor.name: tensor for tensor in tensors if tensor.mode is TensorMode.INPUT}
    unknown = given.keys() - inputs.keys()
    if unknown:
        raise InvalidArgumentError(
            f"there is no input {', '.join(sorted(unknown))}; the inputs are {', '.join(inputs)}"
        )
    found: dict[str, Shape] = {}
    for name, tensor in inputs.items():
        shape = given.get(name)
        if shape is not None:
            _fits(tensor, tuple(shape))
        if shape is None and tensor.ranges and not tensor.is_shape_tensor:
            shape = tensor.ranges[profile].opt
        shape = tensor.shape if shape is None else tuple(shape)
        if any(n < 0 for n in shape):
            raise ShapeError(f"input {name!r} has shape {list(shape)}; say its size: {name}:1x...")
        found[name] = shape
    return found


def _fits(tensor: TensorInfo, shape: Shape) -> None:
    """Before memory is taken for it."""
    ranges = () if tensor.is_shape_tensor else tensor.ranges
    fits = len(shape) == len(tensor.shape) and all(m < 0 or n == m for n, m in zip(shape, tensor.shape, strict=True))
    if ranges:
        fits = any(
            len(shape) == len(each.min)
            and all(low <= n <= high for low, n, high in zip(each.min, shape, each.max, strict=True))
            for each in ranges
        )
    if fits:
        return
    raise ShapeError(
        f"input {tensor.name!r} cannot have shape {list(shape)}; it takes "
        + (" or ".join(f"{list(each.min)} to {list(each.max)}" for each in ranges) or f"{list(tensor.shape)}")
    )


def random_inputs(
    tensors: Sequence[TensorInfo],
    shapes: Mapping[str, Shape],
    *,
    seed: int = 0,
    limits: Mapping[str, tuple[float, float]] | None = None,
    profile: int = 0,
) -> dict[str, Array]:
    """Inputs that are the same for the same seed: floats normally distributed, integers 0 or 1, unless ``limits`` (low,
    high; high is not among them) say otherwise. Shape tensors get the best values of the profile."""
    generator = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for tensor in tensors:
        if tensor.mode is not TensorMode.INPUT:
            continue
        shape, dtype = shapes[tensor.name], tensor.dtype.numpy
        given = (limits or {}).get(tensor.name)
        try:
            made[tensor.name] = _random(tensor, shape, given, profile, generator)
        except (ValueError, OverflowError) as error:
            what = f"shape {list(shape)}" + ("" if given is None else f" and limits {given[0]:g}:{given[1]:g}")
            raise InvalidArgumentError(
                f"no random values of {dtype} can be made for input {tensor.name!r} with {what}: {error}"
            ) from error
    return made


def _random(
    tensor: TensorInfo, shape: Shape, limits: tuple[float, float] | None, profile: int, generator: np.random.Generator
) -> Array:
    dtype = tensor.dtype.numpy
    if tensor.is_shape_tensor and tensor.ranges and limits is None:
        return np.array(tensor.ranges[profile].opt, dtype).reshape(shape)
    if dtype.kind in "iub":
        low, high = (0, 2) if limits is None else (int(limits[0]), int(limits[1]))
        _holds(dtype, np.array([low, high - 1]))
        return generator.integers(low, high, shape).astype(dtype)
    if limits is None:
        return generator.standard_normal(shape).astype(dtype)
    _holds(dtype, np.array(limits))
    return generator.uniform(*limits, shape).astype(dtype)


def _holds(dtype: np.dtype[Any], limits: Array) -> None:
    """Fail if values would become infinite, or others, in that type."""
    with np.errstate(over="ignore", invalid="ignore"):
        became = limits.astype(dtype)
    same = np.array_equal(became, limits) if dtype.kind in "iub" else np.isfinite(became.astype(np.float64)).all()
    if not same:
        raise ValueError(f"they are more than {dtype} holds")


def save_arrays(path: str, arrays: Mapping[str, Array]) -> None:
    """Write arrays to a .npz, or to a .json as trtexec's --exportOutput does, in one step.

    Raises InvalidArgumentError if the file cannot be written, and leaves none then.
    """
    if path.lower().endswith(".json"):
        values = [
            {"name": name, "dimensions": "x".join(map(str, a.shape)) or "scalar", "dtype": str(a.dtype),
             "values": [_number(v) for v in a.ravel().tolist()]}
            for name, a in arrays.items()
        ]  # fmt: skip
        replace_file(path, json.dumps(values, allow_nan=False).encode(), "outputs")
        return
    buffer = io.BytesIO()
    # What numpy does not know by itself (bfloat16, 8-bit floats) would be pickled.
    plain: dict[str, Any] = {n: a if a.dtype.kind in "biufc" else a.astype(np.float32) for n, a in arrays.items()}
    np.savez(buffer, allow_pickle=False, **plain)
    replace_file(path, buffer.getvalue(), "outputs")


def _number(value: Any) -> Any:
    return value if not isinstance(value, float) or np.isfinite(value) else str(value)


@dataclass(frozen=True)
class ArrayDifference:
    """One output against what it should be.

    Attributes:
        name: of the output.
        max_abs: largest difference; infinite where one has a NaN and the other none.
        max_rel: largest difference divided by what it should be, where that is not 0.
        wrong: how many elements are farther off than allowed.
        elements: how many there are.
        within: none is.
    """

    name: str
    max_abs: float
    max_rel: float
    wrong: int
    elements: int
    within: bool


def differences(
    found: Mapping[str, Array], wanted: Mapping[str, Array], *, rtol: float = 1e-3, atol: float = 1e-5
) -> tuple[ArrayDifference, ...]:
    """Each output of ``wanted`` against the one found: ``|found - wanted| <= atol + rtol * |wanted|``.

    Raises:
        InvalidArgumentError: an output is missing.
        ShapeError, DTypeError: an output has another shape, or is no number.
    """
    missing = wanted.keys() - found.keys()
    if missing:
        raise InvalidArgumentError(
            f"the reference has {', '.join(sorted(missing))}, and the outputs are {', '.join(sorted(found))}"
        )
    result = []
    for name, right in wanted.items():
        array = found[name]
        if array.shape != right.shape:
            raise ShapeError(f"output {name!r} has shape {list(array.shape)}, and the reference {list(right.shape)}")
        try:
            a, b = array.astype(np.float64), right.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise DTypeError(f"output {name!r}: the reference is {right.dtype}, which is no number") from error
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            gap = np.where(same, 0.0, np.abs(a - b))
            gap = np.where(np.isnan(gap), np.inf, gap)
            relative = np.where(same | (b == 0), 0.0, gap / np.abs(b))
            wrong = int((gap > atol + rtol * np.where(np.isfinite(b), np.abs(b), 0.0)).sum())
        result.append(
            ArrayDifference(
                name, float(gap.max(initial=0.0)), float(np.nan_to_num(relative, nan=np.inf).max(initial=0.0)), wrong,
                int(a.size), wrong == 0,
            )
        )  # fmt: skip
    return tuple(result)


__all__ = [
    "ArrayDifference",
    "concrete_shapes",
    "differences",
    "random_inputs",
    "read_input",
    "read_npz",
    "save_arrays",
]
