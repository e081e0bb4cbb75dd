"""Checks that stand between callers and C++: what TensorRT would crash on or accept without a word."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

from ..._errors import ClosedError, EngineError, InvalidArgumentError, ShapeError
from ..._types import DataType, Shape, TensorLocation
from ._log_router import Operation

T = TypeVar("T")

#: TensorRT's dimensions are 32 bits wide up to 8.6 and 64 since 10; larger ones would be cut off.
MAX_DIMENSION = 2**31 - 1

_warning_filters = threading.RLock()


def alive(handle: T | None, what: str) -> T:
    """The native object, or ClosedError where it has been destroyed."""
    if handle is None:
        raise ClosedError(f"the {what} is destroyed; nothing can be asked of it any more")
    return handle


@contextlib.contextmanager
def deprecated_calls() -> Iterator[None]:
    """Around a deprecated call that is the only one an older library behind a newer binding answers.

    One thread at a time: two that overlap would leave each other's warning filters behind.
    """
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def created(handle: Any, operation: Operation) -> bool:
    """Whether a vendor's constructor made something, going by the log too.

    Where createInferRuntime or createInferBuilder fail, the bindings wrap a null pointer in an object that looks alive
    and ends the process on its first use, destruction included (10.16 without a driver, measured). Such an object is
    therefore never freed.
    """
    if operation.errors == 0:
        return bool(handle)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(handle))
    return False


def checked_shape(name: str, shape: Shape) -> Shape:
    """A complete shape of plain integers. Raises ShapeError."""
    try:
        dims = tuple(int(n) for n in shape)
    except (TypeError, ValueError) as error:
        raise ShapeError(f"tensor {name!r}: {shape!r} is not a shape; expected a sequence of integers") from error
    if any(not 0 <= n <= MAX_DIMENSION for n in dims):
        raise ShapeError(
            f"tensor {name!r}: shape {list(dims)} is not complete; every dimension must be 0 to {MAX_DIMENSION}"
        )
    return dims


def data_type(name: str, vendor_type: Any) -> DataType:
    """A vendor's DataType by its name. Raises EngineError for one that came after this package."""
    try:
        return DataType[vendor_type.name]
    except KeyError:
        known = ", ".join(member.name for member in DataType)
        raise EngineError(f"tensor {name!r} has the element type {vendor_type}; trtx_py knows {known}") from None


def location(vendor_location: Any) -> TensorLocation:
    """A vendor's TensorLocation by its name."""
    return TensorLocation.HOST if vendor_location.name == "HOST" else TensorLocation.DEVICE


def unknown_tensor(name: str, known: object, what: str) -> NoReturn:
    """Raise InvalidArgumentError for a tensor name that the engine or network does not have."""
    names = ", ".join(repr(one) for one in known) if isinstance(known, (tuple, list, dict)) else repr(known)
    raise InvalidArgumentError(f"there is no {what} named {name!r}; there are {names or 'none'}")
