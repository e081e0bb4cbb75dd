"""Checks of arguments that several modules share; each failure names the argument, what was found and what would do."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from ._errors import InvalidArgumentError, ShapeError
from ._types import Shape

_MAX_DIM = 2**31 - 1  # nvinfer1::Dims held 32-bit dimensions until version 10, and no real tensor needs more
_MAX_RANK = 8  # nvinfer1::Dims::MAX_DIMS


def checked_int(value: Any, what: str, *, minimum: int | None = None, maximum: int | None = None) -> int:
    """``value`` as an int; booleans, floats and strings are refused."""
    if isinstance(value, bool):
        raise InvalidArgumentError(f"{what} is {value!r}; expected an integer")
    try:
        number = operator.index(value)
    except TypeError:
        raise InvalidArgumentError(f"{what} is {value!r}; expected an integer") from None
    if (minimum is not None and number < minimum) or (maximum is not None and number > maximum):
        limits = f"at least {minimum}" if maximum is None else f"{minimum} to {maximum}"
        raise InvalidArgumentError(f"{what} is {number}; expected {limits}")
    return number


def checked_shape(value: Any, what: str, *, minimum: int = 0) -> Shape:
    """``value`` as a tuple of non-negative ints. NaN, fractions, negative and absurd numbers are a ShapeError.

    Args:
        minimum: below 0 only for the values of a shape tensor, which may count from the end of an axis.
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ShapeError(f"{what} is {value!r}; expected a sequence of integers such as (1, 3, 224, 224)")
    dims = tuple(value)
    shape: list[int] = []
    for index, dim in enumerate(dims):
        try:
            if isinstance(dim, bool):
                raise TypeError
            number = operator.index(dim)
        except TypeError:
            raise ShapeError(f"{what} is {dims}: dimension {index} is {dim!r}; expected an integer") from None
        if not minimum <= number <= _MAX_DIM:
            raise ShapeError(f"{what} is {dims}: dimension {index} is {number}; expected {minimum} to {_MAX_DIM}")
        shape.append(number)
    if len(shape) > _MAX_RANK:
        raise ShapeError(f"{what} has {len(shape)} dimensions; TensorRT allows {_MAX_RANK}")
    return tuple(shape)
