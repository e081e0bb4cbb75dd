"""What a caller hands in is checked before anything is launched: names, dtypes, shapes, contiguity, profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from ._arguments import closest
from ._errors import DTypeError, InvalidArgumentError, ShapeError
from ._interop import DeviceView
from ._types import Array, DataType, Shape, TensorInfo, TensorLocation, TensorMode

Arrays = dict[str, Array]
#: What a request brings: arrays on the host, and memory on the device that others own.
Given = dict[str, "Array | DeviceView"]


_NO_VIEWS: Mapping[str, DeviceView] = {}


class InputCheck:
    """Checks the inputs of one engine. Stateless after construction, so any thread may use it."""

    def __init__(self, tensors: Sequence[TensorInfo], num_profiles: int, *, copy_noncontiguous: bool) -> None:
        self._inputs = tuple(tensor for tensor in tensors if tensor.mode is TensorMode.INPUT)
        self._names = frozenset(tensor.name for tensor in self._inputs)
        self._profiles = range(num_profiles)
        self._copy = copy_noncontiguous
        self._dtypes = {tensor.name: tensor.dtype.numpy for tensor in self._inputs}

    def __call__(
        self, inputs: Mapping[str, Any], views: Mapping[str, DeviceView] = _NO_VIEWS
    ) -> tuple[Given, list[int]]:
        """The arrays by name, and the profiles that admit them in order.

        Args:
            views: those of the inputs that lie in device memory.
        Raises InvalidArgumentError, DTypeError or ShapeError, naming the tensor, what was found and what was expected.
        """
        arrays = self.arrays(inputs, views)
        return arrays, self._admitting(arrays)

    def arrays(self, inputs: Mapping[str, Any], views: Mapping[str, DeviceView] = _NO_VIEWS) -> Given:
        """As the call, but for the profiles: for what is going to be part of something larger."""
        if not isinstance(inputs, Mapping):
            raise InvalidArgumentError(
                f"inputs is {type(inputs).__name__}; expected a mapping of tensor name to array: {self._expected()}"
            )
        try:
            if inputs.keys() != self._names:
                self._refuse_names(inputs)
            given = {tensor.name: inputs[tensor.name] for tensor in self._inputs}
        except InvalidArgumentError:
            raise
        except Exception as error:  # a mapping of the caller's own may raise anything
            raise InvalidArgumentError(
                f"inputs, a {type(inputs).__name__}, cannot be read ({type(error).__name__}: {error}); "
                f"expected a mapping of tensor name to array: {self._expected()}"
            ) from error
        arrays: Given = {}
        for tensor in self._inputs:
            view = views.get(tensor.name)
            array = self._array(tensor, given[tensor.name]) if view is None else self._view(tensor, view)
            self._check_static(tensor, array.shape)
            arrays[tensor.name] = array
        return arrays

    def admitting(self, shapes: Mapping[str, Shape], values: Mapping[str, bytes]) -> list[int]:
        """The profiles that admit these shapes, and these values of shape tensors; empty if none does."""
        return [
            p
            for p in self._profiles
            if all(
                not t.ranges
                or t.ranges[p].admits(
                    tuple(int(n) for n in np.frombuffer(values[t.name], self._dtypes[t.name]))
                    if t.is_shape_tensor
                    else shapes[t.name]
                )
                for t in self._inputs
            )
        ]

    def require_profiles(self, shapes: Mapping[str, Shape], values: Mapping[str, bytes]) -> list[int]:
        """As ``admitting``. Raises ShapeError, naming shapes and ranges, if there is none."""
        found = self.admitting(shapes, values)
        if not found:
            self._refuse_profiles({name: shape for name, shape in shapes.items() if name not in values})
        return found

    def _expected(self) -> str:
        return "; ".join(str(tensor) for tensor in self._inputs) or "no inputs"

    def _refuse_names(self, inputs: Mapping[str, Any]) -> None:
        problems = [f"{name!r} is missing" for name in sorted(self._names - inputs.keys())]
        for name in inputs.keys() - self._names:
            close = closest(str(name), self._names)
            problems.append(f"there is no input {name!r}" + (f" (did you mean {close!r}?)" if close else ""))
        raise InvalidArgumentError(f"inputs do not fit the engine: {', '.join(problems)}; expected {self._expected()}")

    def _array(self, tensor: TensorInfo, value: Any) -> Array:
        wanted = self._dtypes[tensor.name]
        if isinstance(value, np.ma.MaskedArray):
            raise InvalidArgumentError(f"input {tensor.name!r} is a masked array; TensorRT has no masks: fill it first")
        if isinstance(value, (bool, int, float, list, tuple)) and not isinstance(value, np.generic):
            array = self._from_python(tensor, value, wanted)
        else:
            try:
                array = np.asarray(value)
            except Exception as error:  # __array__ of a foreign object may raise anything (torch: CUDA tensors)
                raise InvalidArgumentError(
                    f"input {tensor.name!r} is a {type(value).__name__} that cannot be read as a host array: {error}"
                ) from error
            if array.dtype.kind == "O" and not isinstance(value, np.ndarray):
                # numpy wraps what it does not know, such as device memory, into an array of one object.
                raise InvalidArgumentError(
                    f"input {tensor.name!r} is a {type(value).__name__}, not a host array; copy device memory to the "
                    "host first, or use context.set_tensor_address"
                )
        self._check_dtype(tensor, array.dtype)
        if not self._copy and not array.flags.c_contiguous:
            raise InvalidArgumentError(
                f"input {tensor.name!r} is not C-contiguous (strides {array.strides}) and the engine was opened with "
                'noncontiguous="refuse"; pass np.ascontiguousarray(array)'
            )
        return array

    def _check_dtype(self, tensor: TensorInfo, dtype: np.dtype[Any]) -> None:
        wanted = self._dtypes[tensor.name]
        if dtype != wanted:
            order = " in the other byte order" if dtype.newbyteorder("=") == wanted else ""
            raise DTypeError(
                f"input {tensor.name!r} has dtype {dtype.name}{order}; expected {wanted.name}: "
                f"convert it with .astype({wanted.name!r})"
            )

    def _view(self, tensor: TensorInfo, view: DeviceView) -> DeviceView:
        if tensor.location is TensorLocation.HOST:
            raise InvalidArgumentError(
                f"input {tensor.name!r} is in device memory, and TensorRT reads this one on the host: copy it there"
            )
        self._check_dtype(tensor, view.dtype)
        return view

    @staticmethod
    def _from_python(tensor: TensorInfo, value: Any, wanted: np.dtype[Any]) -> Array:
        """Numbers and lists carry no dtype: they are converted as far as nothing but precision is lost."""
        if isinstance(value, (list, tuple)) and any(isinstance(part, np.ma.MaskedArray) for part in value):
            raise InvalidArgumentError(f"input {tensor.name!r} holds a masked array; TensorRT has no masks: fill it")
        try:
            array = np.asarray(value)
        except Exception as error:  # ragged lists; __array__ of foreign objects in them may raise anything
            raise InvalidArgumentError(f"input {tensor.name!r} cannot be made an array: {error}") from error
        if array.dtype.kind not in "biuf" or (array.size and _rank(array.dtype) > _rank(wanted)):
            return array
        with np.errstate(all="ignore"):
            converted = array.astype(wanted)
            if _rank(wanted) == _FLOATING:  # ml_dtypes has neither isnan nor isfinite for all of its types
                before, after = array.astype(np.float64), converted.astype(np.float64)
                kept = bool((np.isnan(before) == np.isnan(after)).all() and (np.isinf(before) == np.isinf(after)).all())
            else:
                kept = np.array_equal(converted, array)
        if not kept:
            raise DTypeError(f"input {tensor.name!r} has values that {wanted.name} cannot represent")
        return converted

    def _check_static(self, tensor: TensorInfo, shape: Shape) -> None:
        fits = len(shape) == len(tensor.shape) and all(
            want in (-1, have) for want, have in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            raise ShapeError(
                f"input {tensor.name!r} has shape {shape}; expected {tensor.shape} (-1: what the profiles allow)"
            )

    def _admitting(self, arrays: Given) -> list[int]:
        found = [p for p in self._profiles if all(_admits(t, p, arrays[t.name]) for t in self._inputs)]
        if found:
            return found
        self._refuse_profiles({t.name: _bounded(t, arrays[t.name]) for t in self._inputs})

    def _refuse_profiles(self, bounded: Mapping[str, Shape]) -> NoReturn:
        lines = []
        for tensor in self._inputs:
            if tensor.ranges and tensor.name in bounded:
                have = bounded[tensor.name]
                what = "values" if tensor.is_shape_tensor else "shape"
                ranges = ", ".join(f"profile {p}: {limits}" for p, limits in enumerate(tensor.ranges))
                lines.append(f"  {tensor.name!r} has {what} {have}; {ranges}")
        raise ShapeError(
            "inputs lie in no optimization profile:\n" + "\n".join(lines)
            + "\nUse shapes within one profile, or build the engine with a profile that admits these."
        )  # fmt: skip


_FLOATING = 2


def _rank(dtype: np.dtype[Any]) -> int:
    """Kinds that hold each other, in this order: booleans, integers, floats (numpy calls those of ml_dtypes void)."""
    return {"b": 0, "i": 1, "u": 1}.get(dtype.kind, _FLOATING)


def _bounded(tensor: TensorInfo, array: Array | DeviceView) -> Shape:
    """What the profile bounds: the shape, or for a shape tensor the values."""
    if tensor.is_shape_tensor and isinstance(array, np.ndarray):
        return tuple(int(n) for n in array.reshape(-1))
    return array.shape


def _admits(tensor: TensorInfo, profile: int, array: Array | DeviceView) -> bool:
    return not tensor.ranges or tensor.ranges[profile].admits(_bounded(tensor, array))


def check_io_types(tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """The tensors that have no host representation here: packed 4-bit types, which TensorRT uses for weights only."""
    return [tensor for tensor in tensors if tensor.dtype in (DataType.INT4, DataType.FP4)]
