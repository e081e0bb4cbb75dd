"""Inputs that change between requests: random ones, or rows of the caller's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zipfile import BadZipFile

import numpy as np

from .._arguments import checked_path, checked_shape
from .._errors import InvalidArgumentError, ShapeError
from .._types import Array, DataType, Shape, TensorInfo, TensorMode
from ._load import Inputs
from ._spec import BenchmarkSpec

_INTEGERS = frozenset({DataType.INT4, DataType.INT8, DataType.INT32, DataType.INT64, DataType.UINT8, DataType.BOOL})


@dataclass(frozen=True)
class InputSet:
    """One set of inputs.

    Attributes:
        arrays: by input name.
        samples: which samples of the caller's arrays they are; None for random ones.
    """

    arrays: Inputs
    samples: tuple[int, ...] | None = None


class InputMaker:
    """Makes inputs for the tensors of an engine.

    Raises:
        InvalidArgumentError, ShapeError: names, shapes, ranges or files of the spec do not fit these tensors.
    """

    def __init__(self, spec: BenchmarkSpec, tensors: Sequence[TensorInfo]) -> None:
        self._tensors = [tensor for tensor in tensors if tensor.mode is TensorMode.INPUT]
        self._seed = spec.seed
        names = [tensor.name for tensor in self._tensors]
        for what, given in (("shapes", spec.shapes), ("input_ranges", spec.input_ranges)):
            unknown = sorted(given.keys() - set(names))
            if unknown:
                raise InvalidArgumentError(
                    f"{what} name {', '.join(unknown)}; the model's inputs are {', '.join(names)}"
                )
        self._shapes = {name: checked_shape(shape, f"shapes[{name!r}]") for name, shape in spec.shapes.items()}
        self._ranges = {name: _checked_range(name, limits) for name, limits in spec.input_ranges.items()}
        self._given = None if spec.inputs is None else self._checked(arrays_of(spec.inputs, "inputs"))

    def shapes(self, batch: int) -> dict[str, Shape]:
        """The shapes of one request of that many rows."""
        found = {tensor.name: self._shape(tensor, batch) for tensor in self._tensors}
        dynamic = any(tensor.shape and tensor.shape[0] == -1 for tensor in self._tensors)
        if not dynamic and batch != 1 and any(shape[:1] not in ((), (batch,)) for shape in found.values()):
            raise InvalidArgumentError(
                f"batch is {batch}, and the model's inputs have a fixed first axis: "
                f"{', '.join(str(tensor) for tensor in self._tensors)}; leave batch at 1, or give a dynamic model"
            )
        return found

    def _shape(self, tensor: TensorInfo, batch: int) -> Shape:
        declared = tensor.shape
        given = self._shapes.get(tensor.name)
        if given is not None and (
            len(given) != len(declared)
            or any(w not in (-1, g) for w, g in zip(declared[1:], given[1:], strict=True))
        ):  # fmt: skip
            raise ShapeError(f"shapes[{tensor.name!r}] is {given}; the model declares {tensor}")
        if tensor.is_shape_tensor:
            return declared
        best = given or (tensor.ranges[0].opt if tensor.ranges else declared)
        return tuple(
            n if n != -1 else (batch if axis == 0 else best[axis]) for axis, n in enumerate(declared)
        )  # fmt: skip

    def sets(self, batch: int, count: int, *, fresh: bool = False) -> list[InputSet]:
        """``count`` different sets; with ``fresh`` others than without, for random ones."""
        shapes = self.shapes(batch)
        return [self._set(shapes, number + (count if fresh else 0), (batch, int(fresh))) for number in range(count)]

    def _set(self, shapes: Mapping[str, Shape], number: int, salt: tuple[int, int]) -> InputSet:
        if self._given is not None:
            rows = next((shape[0] for shape in shapes.values() if shape), 1)
            samples = (np.arange(rows) + number * rows) % len(next(iter(self._given.values())))
            arrays = {name: np.ascontiguousarray(array[samples]) for name, array in self._given.items()}
            return InputSet(arrays, tuple(samples.tolist()))
        rng = np.random.default_rng([self._seed, number, *salt])
        return InputSet({tensor.name: self._random(tensor, shapes[tensor.name], rng) for tensor in self._tensors})

    def _random(self, tensor: TensorInfo, shape: Shape, rng: np.random.Generator) -> Array:
        dtype: np.dtype[Any] = tensor.dtype.numpy
        if tensor.is_shape_tensor and tensor.ranges:
            return np.array(tensor.ranges[0].opt, dtype).reshape(shape)
        limits = self._ranges.get(tensor.name)
        if tensor.dtype in _INTEGERS:
            low, high = limits or (0, 1)
            return rng.integers(int(low), int(high), shape, endpoint=True).astype(dtype)
        values = rng.standard_normal(shape, np.float32) if limits is None else rng.uniform(*limits, shape)
        return np.asarray(values).astype(dtype)

    def _checked(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        names = {tensor.name for tensor in self._tensors}
        if arrays.keys() != names:
            raise InvalidArgumentError(
                f"inputs has {', '.join(sorted(arrays)) or 'no array'}; the model's are {', '.join(sorted(names))}"
            )
        counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
        if len(set(counts.values())) != 1 or min(counts.values()) < 2:
            raise InvalidArgumentError(
                f"inputs have {counts} samples along the first axis; expected the same number for all, at least 2, "
                "or stale outputs could not be told"
            )
        found = {}
        for tensor in self._tensors:
            array, declared = arrays[tensor.name], tensor.shape
            if array.ndim != len(declared) or any(
                w not in (-1, n) for w, n in zip(declared[1:], array.shape[1:], strict=True)
            ):  # fmt: skip
                raise ShapeError(f"inputs[{tensor.name!r}] has the shape {array.shape}; the model declares {tensor}")
            found[tensor.name] = array.astype(tensor.dtype.numpy)
        return found


def arrays_of(source: Mapping[str, Array] | str | os.PathLike[str], what: str) -> dict[str, Array]:
    """Arrays by name, of a mapping or an .npz file. Raises InvalidArgumentError."""
    if isinstance(source, Mapping):
        return {str(name): np.asarray(array) for name, array in source.items()}
    path = checked_path(source, what, "arrays by name, or the path of an .npz file")
    try:
        with open(path, "rb") as stream:  # opened here: numpy leaves a file open that is not what it should be
            file = np.load(stream, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise InvalidArgumentError(f"{what} {path!r} is a single array (.npy); expected an .npz with names")
            with file:
                return {name: file[name] for name in file.files}
    except OSError as error:
        raise InvalidArgumentError(f"{what} {path!r} cannot be read: {error.strerror or error}") from error
    except InvalidArgumentError:  # a ValueError too
        raise
    except (ValueError, EOFError, BadZipFile) as error:
        raise InvalidArgumentError(f"{what} {path!r} is not an .npz file of plain arrays: {error}") from error


def _checked_range(name: str, limits: object) -> tuple[float, float]:
    if isinstance(limits, Sequence) and not isinstance(limits, (str, bytes)) and len(limits) == 2:
        low, high = limits
        numbers = all(isinstance(n, (int, float)) and not isinstance(n, bool) and np.isfinite(n) for n in limits)
        if numbers and low < high:
            return low, high
    raise InvalidArgumentError(f"input_ranges[{name!r}] is {limits!r}; expected (low, high) with low below high")
