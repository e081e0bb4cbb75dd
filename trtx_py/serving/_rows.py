"""Requests as rows: where the batch axis is, which requests may share a batch, and what an engine can take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .._arguments import checked_int
from .._errors import InvalidArgumentError, ShapeError
from .._inputs import InputCheck
from .._types import Array, Shape, TensorInfo, TensorLocation, TensorMode

#: What the caller's padding function gets and gives: one request's inputs.
Pad = Callable[[Mapping[str, Any]], Mapping[str, Any]]
#: What the caller's cropping function gets: one request's outputs, and its inputs before they were padded.
Crop = Callable[[dict[str, Array], Mapping[str, Any]], dict[str, Array]]
#: Shapes of one row, an entry for each input: which requests may share a batch.
Group = tuple[Shape, ...]


class Rows(NamedTuple):
    """One request, checked: ``arrays`` in the order of the engine's inputs."""

    rows: int
    group: Group
    arrays: tuple[Array, ...]
    nbytes: int


class RowLayout:
    """How an engine's tensors are made of rows.

    Args:
        axes: the batch axis of every tensor, or of tensors by name (0 for the others).

    Raises InvalidArgumentError: a tensor has no such axis, or one that is fixed and differs from the others'.
    """

    def __init__(self, tensors: Sequence[TensorInfo], check: InputCheck, axes: int | Mapping[str, int] | None) -> None:
        self.inputs = tuple(t for t in tensors if t.mode is TensorMode.INPUT)
        self.outputs = tuple(t for t in tensors if t.mode is TensorMode.OUTPUT)
        self._axes = _axes(tensors, axes)
        self._profiles = check
        # A request may have fewer rows than the engine takes: the batch is padded.
        free = [replace(t, shape=_with(t.shape, self._axes[t.name], -1)) for t in self.inputs]
        self._check = InputCheck(free, 0, copy_noncontiguous=True)
        fixed = {t.shape[self._axes[t.name]] for t in self.inputs} - {-1}
        self._fixed = next(iter(fixed)) if fixed else None
        self.input_axes = tuple(self._axes[t.name] for t in self.inputs)
        self.output_axes = {t.name: self._axes[t.name] for t in self.outputs}
        self.leading = not any(self._axes.values())
        self._names = tuple(t.name for t in self.inputs)
        self._dtypes = tuple(t.dtype.numpy for t in self.inputs)
        self._only: tuple[str, np.dtype[Any], int] | None = None
        if len(self.inputs) == 1 and self.leading:
            (tensor,) = self.inputs
            self._only = tensor.name, tensor.dtype.numpy, len(tensor.shape)
        self._known: dict[Shape, Group] = {}
        self._row_bytes: dict[Group, int] = {}
        rows = tuple(without(t.shape, axis) for t, axis in zip(self.inputs, self.input_axes, strict=True))
        self._only_group = None if any(-1 in row for row in rows) else rows
        #: Letters of the buffer protocol; None if a type has none.
        self.formats = _formats(self._dtypes)
        self.output_formats = _formats([t.dtype.numpy for t in self.outputs])

    def read(self, inputs: Mapping[str, Any]) -> Rows:
        """One request's rows. Raises InvalidArgumentError, DTypeError, ShapeError, naming the tensor."""
        if self._only is not None and type(inputs) is dict and len(inputs) == 1:
            name, dtype, rank = self._only
            array = inputs.get(name)
            if type(array) is np.ndarray and array.dtype is dtype and array.ndim == rank:
                shape = array.shape
                group = self._known.get(shape[1:])
                if group is not None and shape[0]:
                    return Rows(shape[0], group, (array,), array.nbytes)
        return self._read(inputs)

    def _read(self, inputs: Mapping[str, Any]) -> Rows:
        given = self._check.arrays(inputs)  # the profile is a matter of the whole batch
        arrays = tuple(np.asarray(given[name]) for name in self._names)
        count = -1
        for tensor, axis, array in zip(self.inputs, self.input_axes, arrays, strict=True):
            rows = array.shape[axis]
            if count == -1:
                count = rows
            elif rows != count:
                raise ShapeError(
                    f"input {tensor.name!r} has {rows} rows (axis {axis} of {array.shape}); "
                    f"{self._names[0]!r} has {count}: expected as many in every input"
                )
        if count < 1:
            raise ShapeError(f"input {self._names[0]!r} of shape {arrays[0].shape} has no rows; expected at least one")
        group = tuple(without(array.shape, axis) for array, axis in zip(arrays, self.input_axes, strict=True))
        if self._only is not None and len(self._known) < 4096:
            self._known.setdefault(group[0], group)
        return Rows(count, group, arrays, sum(array.nbytes for array in arrays))

    def has_at_most(self, inputs: Mapping[str, Any], rows: int) -> bool:
        """An array with so many rows at most, by its first input; False: more, or it does not say."""
        array = inputs.get(self._names[0]) if type(inputs) is dict else None
        shape = array.shape if type(array) is np.ndarray else ()
        axis = self.input_axes[0]
        return len(shape) > axis and shape[axis] <= rows

    @property
    def only_group(self) -> Group | None:
        """The one that there is if nothing but the rows is dynamic."""
        return self._only_group

    def row_bytes(self, group: Group) -> int:
        """Bytes of one row of all inputs."""
        found = self._row_bytes.get(group)
        if found is None:
            found = sum(t.dtype.nbytes(row) for t, row in zip(self.inputs, group, strict=True))
            if len(self._row_bytes) < 4096:
                self._row_bytes[group] = found
        return found

    def shapes(self, group: Group, rows: int) -> dict[str, Shape]:
        """Input shapes of a batch."""
        return {
            name: (*row[:axis], rows, *row[axis:])
            for name, row, axis in zip(self._names, group, self.input_axes, strict=True)
        }

    def blank(self, group: Group, rows: int) -> tuple[Array, ...]:
        """New arrays of zeros for the inputs."""
        shapes = self.shapes(group, rows)
        return tuple(np.zeros(shapes[tensor.name], tensor.dtype.numpy) for tensor in self.inputs)

    def sizes(self, group: Group, wanted: Sequence[int]) -> list[int]:
        """Those of these numbers of rows that an optimization profile admits. Raises ShapeError if none is."""
        if self._fixed is not None:
            return [self._fixed]
        found = [rows for rows in wanted if self._profiles.admitting(self.shapes(group, rows), {})]
        if not found:
            self._profiles.require_profiles(self.shapes(group, wanted[-1]), {})
        return found

    def largest(self) -> int | None:
        """The most rows that any profile admits; None: without bound, as far as is known."""
        bounds = []
        for tensor, axis in zip(self.inputs, self.input_axes, strict=True):
            if tensor.shape[axis] != -1:
                bounds.append(tensor.shape[axis])
            elif tensor.ranges:
                bounds.append(max(limits.max[axis] for limits in tensor.ranges))
        return min(bounds, default=None)

    def cut(self, outputs: Mapping[str, Array], start: int, stop: int) -> dict[str, Array]:
        """New arrays with some of the rows."""
        if self.leading:
            return {name: array[start:stop].copy() for name, array in outputs.items()}
        return {
            name: array[_index(self.output_axes[name], start, stop)].copy(order="C") for name, array in outputs.items()
        }

    def count(self, outputs: Mapping[str, Array]) -> int:
        """Rows of these outputs."""
        name, axis = next(iter(self.output_axes.items()))
        return int(outputs[name].shape[axis])

    def write(self, target: Sequence[Array], start: int, arrays: Sequence[Array], count: int) -> None:
        """Copy ``count`` rows in."""
        if self.leading:
            for view, array in zip(target, arrays, strict=True):
                view[start : start + count] = array
            return
        for view, array, axis in zip(target, arrays, self.input_axes, strict=True):
            view[_index(axis, start, start + count)] = array

    def part(self, arrays: Sequence[Array], start: int, stop: int) -> tuple[Array, ...]:
        """Views of some rows of inputs."""
        return tuple(a[_index(axis, start, stop)] for a, axis in zip(arrays, self.input_axes, strict=True))

    def check_outputs(self, outputs: Mapping[str, Array], rows: int) -> None:
        """Raises InvalidArgumentError: an output does not have a row for each input row."""
        for name, axis in self.output_axes.items():
            shape = outputs[name].shape
            if len(shape) <= axis or shape[axis] != rows:
                raise InvalidArgumentError(
                    f"output {name!r} has shape {shape} for {rows} rows: there is no batch axis {axis}, so requests "
                    "cannot share a batch; use the engine itself"
                )


def _formats(dtypes: Sequence[np.dtype[Any]]) -> tuple[str, ...] | None:
    try:
        letters = [memoryview(np.empty(0, dtype)).format for dtype in dtypes]  # type: ignore[arg-type]
    except (ValueError, NotImplementedError):  # the types of ml_dtypes
        return None
    return tuple(letters)


def _with(shape: Shape, axis: int, rows: int) -> Shape:
    return (*shape[:axis], rows, *shape[axis + 1 :])


def without(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :])


def _index(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, slice(start, stop))


def _axes(tensors: Sequence[TensorInfo], given: int | Mapping[str, int] | None) -> dict[str, int]:
    names = {tensor.name for tensor in tensors}
    by_name: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    default = 0 if given is None or isinstance(given, Mapping) else checked_int(given, "batch_axis", minimum=0)
    for name in by_name:
        if name not in names:
            raise InvalidArgumentError(f"batch_axis names {name!r}; the engine has {', '.join(sorted(names))}")
    axes: dict[str, int] = {}
    for tensor in tensors:
        axis = checked_int(by_name.get(tensor.name, default), f"batch_axis of {tensor.name!r}", minimum=0)
        if tensor.location is TensorLocation.HOST:
            raise InvalidArgumentError(
                f"{tensor} lies on the host and has no rows: requests of this engine cannot share a batch"
            )
        if axis >= len(tensor.shape):
            raise InvalidArgumentError(f"{tensor} has no axis {axis}; declare batch_axis, or use the engine itself")
        axes[tensor.name] = axis
    fixed = {t.name: t.shape[axes[t.name]] for t in tensors if t.shape[axes[t.name]] != -1}
    if len(set(fixed.values())) > 1:
        raise InvalidArgumentError(
            f"the tensors have different fixed numbers of rows ({fixed}); declare batch_axis, or use the engine itself"
        )
    return axes


def ladder(largest: int) -> list[int]:
    """Numbers of rows to have graphs for: powers of two, and the largest."""
    sizes = [1 << power for power in range(largest.bit_length()) if 1 << power < largest]
    return [*sizes, largest]


def pad_axis(axis: int, multiple: int = 1, *, sizes: Sequence[int] = (), value: float = 0) -> Pad:
    """A padding function for requests of unequal length: one axis of every input that has it is filled up.

    Args:
        axis: of the inputs, the batch axis counted; 1 for (rows, length, ...).
        multiple: fill up to a multiple of this.
        sizes: or to the next of these; longer ones are refused.
        value: what to fill with.
    """
    checked_int(axis, "axis", minimum=0)
    checked_int(multiple, "multiple", minimum=1)
    ascending = sorted(checked_int(size, "sizes", minimum=1) for size in sizes)

    def pad(inputs: Mapping[str, Any]) -> dict[str, Array]:
        padded: dict[str, Array] = {}
        for name, given in inputs.items():
            array = np.asarray(given)
            if array.ndim <= axis:
                padded[name] = array
                continue
            length = array.shape[axis]
            wanted = (
                next((size for size in ascending if size >= length), -1)
                if ascending
                else -(-length // multiple) * multiple
            )
            if wanted < 0:
                raise ShapeError(f"input {name!r} is {length} long on axis {axis}; expected at most {ascending[-1]}")
            if wanted != length:
                widths = [(0, 0)] * array.ndim
                widths[axis] = (0, wanted - length)
                array = np.pad(array, widths, constant_values=value)
            padded[name] = array
        return padded

    return pad
