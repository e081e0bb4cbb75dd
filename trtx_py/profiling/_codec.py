"""Frozen dataclasses to JSON and back, checked: what a file lacks or has of another type is named."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from .._errors import InvalidArgumentError

T = TypeVar("T")


def encoded(value: Any) -> Any:
    """``value`` as JSON has it: dataclasses become objects, tuples lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encoded(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encoded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encoded(item) for item in value]
    return value


def dumps(value: Any, *, indent: int | None = 1) -> str:
    """``value`` as text of JSON. Raises InvalidArgumentError for NaN and infinity, which JSON does not have."""
    try:
        return json.dumps(encoded(value), indent=indent, allow_nan=False)
    except ValueError as error:
        raise InvalidArgumentError(f"{type(value).__name__} cannot be written as JSON: {error}") from error


def loads(kind: type[T], text: str | bytes, what: str, schema: int) -> T:
    """A ``kind`` from what ``dumps`` made of one, whose field ``schema`` is ``schema``.

    Args:
        what: what the text is, for errors: "profile report", "result file".
    Raises:
        InvalidArgumentError: not JSON, of another schema, or not as the fields of ``kind`` want it; names the field.
    """
    try:
        data = json.loads(text)
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgumentError(f"this {what} is not JSON: {error}; give a file that trtx_py wrote") from error
    if not isinstance(data, dict):
        raise InvalidArgumentError(f"this {what} is a JSON {type(data).__name__}; expected an object")
    found = data.get("schema")
    if found != schema or isinstance(found, bool):
        raise InvalidArgumentError(
            f"this {what} has schema {found!r:.40}; this version of trtx_py reads {schema}: make it again, or read it "
            "with the version that wrote it"
        )
    return _object(kind, data, what)


def _object(kind: type[T], data: Any, where: str) -> T:
    if not isinstance(data, dict):
        raise _wrong(where, "an object", data)
    # A facade may have given the class its own module's name: annotations mean what they do where it was defined.
    hints = get_type_hints(kind, globalns=vars(kind)["__init__"].__globals__)
    names = [field.name for field in dataclasses.fields(typing.cast(Any, kind))]
    missing = [name for name in names if name not in data]
    unknown = [name for name in data if name not in names]
    if missing or unknown:
        text = "; ".join(
            f"{label} {', '.join(map(repr, some))}" for label, some in (("lacks", missing), ("has", unknown)) if some
        )
        raise InvalidArgumentError(f"{where} {text}; expected exactly {', '.join(names)}")
    return kind(**{name: _decoded(hints[name], data[name], f"{where}.{name}") for name in names})


def _decoded(hint: Any, data: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(arguments, data, where)
    if origin is tuple:
        if not isinstance(data, list) or (arguments[-1] is not Ellipsis and len(data) != len(arguments)):
            raise _wrong(where, "a list", data)
        kinds = [arguments[0]] * len(data) if arguments[-1] is Ellipsis else arguments
        return tuple(
            _decoded(one, item, f"{where}[{n}]") for n, (one, item) in enumerate(zip(kinds, data, strict=True))
        )
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, dict):
            raise _wrong(where, "an object", data)
        return {key: _decoded(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    if dataclasses.is_dataclass(hint):
        return _object(typing.cast("type[Any]", hint), data, where)
    return _plain(hint, data, where)


def _one_of(arguments: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in arguments:
        return None
    kinds = [each for each in arguments if each is not type(None)]
    for kind in kinds[:-1]:
        try:
            return _decoded(kind, data, where)
        except InvalidArgumentError:  # it may be one of the others; the last says what is wrong
            continue
    return _decoded(kinds[-1], data, where)


def _plain(hint: Any, data: Any, where: str) -> Any:
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        try:
            return float(data)
        except OverflowError:
            raise _wrong(where, "a number that fits into a float", "an integer of many digits") from None
    if not isinstance(data, hint) or (isinstance(data, bool) and hint is not bool):
        raise _wrong(where, f"a value of type {getattr(hint, '__name__', hint)}", data)
    if isinstance(data, float) and not math.isfinite(data):
        raise _wrong(where, "a finite number", data)
    return data


def _wrong(where: str, expected: str, found: Any) -> InvalidArgumentError:
    return InvalidArgumentError(f"{where} is {found!r:.60}; expected {expected}")
