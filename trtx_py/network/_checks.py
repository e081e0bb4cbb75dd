"""Checks of what layers are made with; each failure names the argument, what was found and what would do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from .._arguments import checked_int, checked_shape, closest
from .._errors import DTypeError, InvalidArgumentError, ShapeError
from .._types import Array, DataType, Shape
from ._tensors import Layer, NetworkTensor

if TYPE_CHECKING:
    from .._resource import Handle

P = ParamSpec("P")
T = TypeVar("T")


#: What shapes and places are counted in.
INTEGERS = (DataType.INT32, DataType.INT64)
MAX_RANK = 8  # nvinfer1::Dims::MAX_DIMS
REALS = (DataType.FLOAT, DataType.HALF, DataType.BF16)


class Named(Protocol):
    """An enumerator, ours or of a TensorRT module: only its name counts."""

    @property
    def name(self) -> str: ...


#: An enumerator of TensorRT by its name, in any case, such as "relu", or the vendor's own.
Enumerator = str | Named
Type = DataType | npt.DTypeLike
Weights = npt.ArrayLike


class LayerMethods:
    """What the groups of ``add_...`` methods are made of."""

    _handle: Handle

    def _add(
        self,
        kind: str,
        name: str | None,
        inputs: Mapping[str, NetworkTensor | None],
        weights: Mapping[str, Array | None] | None = None,
        **settings: Any,
    ) -> Layer:
        raise NotImplementedError


_M = TypeVar("_M", bound=LayerMethods)


def opened(method: Callable[Concatenate[_M, P], T]) -> Callable[Concatenate[_M, P], T]:
    """Nothing is asked of a closed network, whatever else is wrong with the call."""

    @functools.wraps(method)
    def checked(self: _M, /, *args: P.args, **kwargs: P.kwargs) -> T:
        self._handle.require_open()
        return method(self, *args, **kwargs)

    return checked


def tensor(value: Any, what: str = "input") -> NetworkTensor:
    """``value`` as a tensor of some network."""
    if isinstance(value, Layer):
        raise InvalidArgumentError(f"{what} is {value!r}; expected one of its outputs: pass layer.output")
    if not isinstance(value, NetworkTensor):
        raise InvalidArgumentError(
            f"{what} is {type(value).__name__}; expected a NetworkTensor; make one of an array with add_constant"
        )
    return value


def member(value: Any, what: str, known: Iterable[str]) -> str:
    """An enumerator's name in capitals."""
    names = tuple(known)
    text = value if isinstance(value, str) else getattr(value, "name", None)
    if not isinstance(text, str):
        raise InvalidArgumentError(f"{what} is {value!r}; expected one of {', '.join(names)}")
    name = text.upper()
    if name not in names:
        close = closest(name, names)
        hint = f"did you mean {close}?" if close else f"expected one of {', '.join(names)}"
        raise InvalidArgumentError(f"{what} is {text!r}; {hint}")
    return name


def data_type(value: Any, what: str, allowed: Iterable[DataType] | None = None) -> DataType:
    """A type that TensorRT has."""
    if isinstance(value, DataType):
        dtype = value
    else:
        try:
            dtype = DataType.from_numpy(value)
        except TypeError as error:
            raise DTypeError(f"{what} is {value!r}; expected a trtx.DataType or a numpy dtype: {error}") from None
    if allowed is not None and dtype not in tuple(allowed):
        raise DTypeError(f"{what} is {dtype.value}; expected {' or '.join(one.value for one in allowed)}")
    return dtype


def axis(value: Any, rank: int, what: str = "axis") -> int:
    """An axis counted from the front; negative ones count from the back."""
    number = checked_int(value, what)
    if not -rank <= number < rank:
        raise ShapeError(f"{what} is {number}; expected {-rank} to {rank - 1} for a tensor of {rank} dimensions")
    return number % rank


def axes(value: Any, rank: int, what: str = "axes") -> tuple[int, ...]:
    """Distinct axes counted from the front, in order."""
    if isinstance(value, (int, np.integer, str)) or not isinstance(value, Iterable):
        raise InvalidArgumentError(f"{what} is {value!r}; expected axes such as (2, 3), where TensorRT has a bit mask")
    found = sorted(axis(one, rank, f"one of {what}") for one in value)
    if not found or len(set(found)) != len(found):
        raise ShapeError(f"{what} is {tuple(value) if isinstance(value, (list, tuple)) else value}; expected each once")
    return tuple(found)


def mask(found: Iterable[int]) -> int:
    """Axes as TensorRT's bit mask."""
    return sum(1 << one for one in found)


def spatial(value: Any, rank: int, what: str, *, minimum: int) -> Shape:
    """A number for each spatial dimension; one number stands for all of them."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        value = (value,) * rank
    found = checked_shape(value, what, minimum=minimum)
    if len(found) != rank:
        raise ShapeError(f"{what} is {found}; expected {rank} numbers, one for each spatial dimension")
    return found


def number(value: Any, what: str) -> float:
    """A float; booleans and text are refused."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise InvalidArgumentError(f"{what} is {value!r}; expected a number")
    try:
        return float(value)
    except OverflowError:
        raise InvalidArgumentError(
            f"{what} has {int(value).bit_length()} bits; expected a number that a float holds"
        ) from None


def flag(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgumentError(f"{what} is {value!r}; expected True or False")
    return value


def array(value: Any, what: str, dtype: DataType | None = None, count: int | None = None) -> Array:
    """A read-only copy in C order, in a type that TensorRT has. Numbers that are no array become ``dtype``.

    Args:
        dtype: the only type that will do; None takes any, and float32 for Python's floats.
        count: how many elements there must be.
    """
    if isinstance(value, NetworkTensor):
        raise InvalidArgumentError(f"{what} is {value!r}; expected an array of weights")
    try:
        found = np.array(value, order="C")
        if not hasattr(value, "dtype") and found.dtype.kind in "fiu" and (dtype is not None or found.dtype.kind == "f"):
            found = found.astype((dtype or DataType.FLOAT).numpy)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{what} is no array: {error}") from error
    try:
        kind = DataType.from_numpy(found.dtype)
    except DTypeError as error:
        raise DTypeError(f"{what}: {error}; convert it, with array.astype(numpy.float32) for example") from None
    if dtype is not None and kind is not dtype:
        raise DTypeError(f"{what} is {kind.value}; expected {dtype.value}, the type of what it is used with")
    if count is not None and found.size != count:
        raise ShapeError(f"{what} has {found.size} elements (shape {found.shape}); expected {count}")
    found.flags.writeable = False
    return found


def same_rank(what: str, first: NetworkTensor, second: NetworkTensor) -> None:
    """TensorRT broadcasts dimensions of 1, and adds none."""
    if len(first.shape) != len(second.shape):
        raise ShapeError(
            f"{what}: {first.name!r} has shape {list(first.shape)} and {second.name!r} {list(second.shape)}; expected "
            "as many dimensions in both: add ones with add_shuffle"
        )


def typed(value: NetworkTensor, what: str, allowed: Iterable[DataType]) -> None:
    """Raises DTypeError for a tensor that TensorRT does not take there."""
    known = tuple(allowed)
    if value.dtype not in known:
        raise DTypeError(
            f"{what} {value.name!r} is {value.dtype.value}; expected {' or '.join(one.value for one in known)}: "
            "put add_cast before it"
        )


def same_type(what: str, first: NetworkTensor, second: NetworkTensor) -> None:
    """Raises DTypeError: TensorRT converts nothing by itself."""
    if first.dtype is not second.dtype:
        raise DTypeError(
            f"{what}: {first.name!r} is {first.dtype.value} and {second.name!r} {second.dtype.value}; expected one "
            "type: put add_cast before one of them"
        )


def broadcast_to(value: NetworkTensor, whole: NetworkTensor, what: str) -> None:
    """Raises ShapeError unless each dimension of ``value`` is 1 or that of ``whole``, as far as both are known."""
    if any(m not in (1, n) and -1 not in (m, n) for n, m in zip(whole.shape, value.shape, strict=True)):
        raise ShapeError(
            f"{what} {value.name!r} has shape {list(value.shape)}; expected that of {whole.name!r}, "
            f"{list(whole.shape)}, or 1 for one element for all"
        )


def rank_at_least(value: NetworkTensor, minimum: int, what: str) -> int:
    """The rank. Raises ShapeError below ``minimum``."""
    rank = len(value.shape)
    if rank < minimum:
        raise ShapeError(f"{what} {value.name!r} has shape {list(value.shape)}; expected {minimum} dimensions at least")
    return rank


def channels(value: NetworkTensor, at: int = 1) -> int:
    """Number of channels, which weights are laid out by."""
    found = value.shape[at]
    if found < 0:
        raise ShapeError(f"{value.name!r} has shape {list(value.shape)}; dimension {at}, the channels, must be known")
    return found


def vector(value: NetworkTensor, what: str, length: int | None = None) -> NetworkTensor:
    """A one-dimensional integer tensor, which shapes are computed with."""
    if value.dtype not in INTEGERS or len(value.shape) != 1 or length not in (None, value.shape[0]):
        wanted = "one dimension" if length is None else f"[{length}]"
        raise ShapeError(
            f"{what} {value.name!r} is {value.dtype.value} {list(value.shape)}; expected int32 or int64, {wanted}"
        )
    return value
