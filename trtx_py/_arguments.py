"""Checks of arguments that several modules share; each failure names the argument, what was found and what would do."""

from __future__ import annotations

import contextlib
import numbers
import operator
import os
import secrets
import threading
from collections.abc import Iterable
from typing import Any

from ._errors import InvalidArgumentError, ShapeError
from ._types import Shape

MAX_DIM = 2**31 - 1  # nvinfer1::Dims held 32-bit dimensions until version 10, and no real tensor needs more
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
        if not minimum <= number <= MAX_DIM:
            raise ShapeError(f"{what} is {dims}: dimension {index} is {number}; expected {minimum} to {MAX_DIM}")
        shape.append(number)
    if len(shape) > _MAX_RANK:
        raise ShapeError(f"{what} has {len(shape)} dimensions; TensorRT allows {_MAX_RANK}")
    return tuple(shape)


def checked_path(value: Any, what: str, expected: str = "a path") -> str:
    """``value`` as the text of a path; that it exists is not checked."""
    try:
        path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    except Exception as error:  # __fspath__ is the caller's code
        raise InvalidArgumentError(f"{what} is a {type(value).__name__} that gives no path: {error}") from error
    if not isinstance(path, str):
        found = type(value).__name__ + ("" if path is None else f" of {type(path).__name__}")
        raise InvalidArgumentError(f"{what} is {found}; expected {expected} (a string or a Path)")
    if "\0" in path:
        raise InvalidArgumentError(f"{what} {path!r} contains a null character; no file can have that name")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"{what} {path!r} cannot be the name of a file: {error.reason}") from error
    return path


def replace_file(path: str, content: bytes, what: str) -> None:
    """Write ``content`` to ``path`` in one step: a reader sees the old file or the whole new one.

    Raises InvalidArgumentError if that cannot be done; no file is left then.
    """
    target = os.path.abspath(path)
    temporary = os.path.join(os.path.dirname(target), f".trtx-{secrets.token_hex(8)}")
    try:
        # Not tempfile: the file is to have the permissions that the umask gives a new one.
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise InvalidArgumentError(
            f"{what} cannot be saved to {target!r}: {error.strerror}; nothing was written there"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it is there only if something failed
            os.unlink(temporary)


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` was probably meant to be."""
    import difflib  # slow to import, and only errors need it

    found = difflib.get_close_matches(name, list(known), n=1)
    return found[0] if found else None


def checked_timeout(value: Any, what: str = "timeout_s") -> float | None:
    """``value`` as seconds that a thread can wait, None for no limit."""
    if value is None:
        return None
    expected = f"expected None (no limit) or seconds from 0 to {threading.TIMEOUT_MAX:.0f}"
    try:
        seconds = None if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)
    except OverflowError:  # an int beyond every float
        seconds = None
    if seconds is None or not 0 <= seconds <= threading.TIMEOUT_MAX:  # NaN fails both comparisons
        raise InvalidArgumentError(f"{what} is {value!r:.40}; {expected}")
    return seconds
