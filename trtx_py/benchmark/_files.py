"""Results as JSON: a schema with a version, checked when it is read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Any

from .._arguments import checked_path, replace_file
from ._errors import ResultFileError
from ._result import BenchmarkResult
from ._stats import Interval

SCHEMA = "trtx_py.benchmark"
#: Raised when a field changes its meaning or goes. New fields do not raise it: readers leave out what they do not know.
SCHEMA_VERSION = 1


def to_json(result: BenchmarkResult) -> str:
    """The result as JSON text."""
    content = {"schema": SCHEMA, "version": SCHEMA_VERSION, **dataclasses.asdict(result)}
    return json.dumps(content, indent=1, allow_nan=False, default=dict) + "\n"


def save_result(result: BenchmarkResult, path: str | os.PathLike[str]) -> None:
    """Replace the file in one step. Raises InvalidArgumentError if that cannot be done; no file is left then."""
    replace_file(checked_path(path, "path"), to_json(result).encode(), "benchmark results")


def load_result(path: str | os.PathLike[str]) -> BenchmarkResult:
    """Read a file of results.

    Raises ResultFileError: it cannot be read, is not JSON, or is of another kind or version; says which.
    """
    name = checked_path(path, "path")
    try:
        with open(name, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise ResultFileError(f"benchmark results {name!r} cannot be read: {error.strerror}", path=name) from error
    except UnicodeDecodeError as error:
        raise ResultFileError(f"benchmark results {name!r} are not text: {error}", path=name) from error
    return parse_result(text, name)


def parse_result(text: str, path: str = "") -> BenchmarkResult:
    """As ``load_result``, from text."""
    where = f"benchmark results {path!r}" if path else "benchmark results"
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ResultFileError(f"{where}: not JSON: {error}", path=path) from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ResultFileError(f"{where}: not a file of this kind; expected one that `trtx bench` wrote", path=path)
    version = content.get("version")
    if version != SCHEMA_VERSION:
        raise ResultFileError(
            f"{where}: schema version {version!r}; this trtx_py reads version {SCHEMA_VERSION}: measure again, or use "
            "the trtx_py that wrote it",
            path=path,
        )
    try:
        result = _decoded(BenchmarkResult, content, "")
    except _UnfitError as error:
        raise ResultFileError(f"{where}: {error}", path=path) from error
    assert isinstance(result, BenchmarkResult)
    return result


class _UnfitError(Exception):
    """A value is not what its field wants."""


def _decoded(kind: Any, value: object, where: str) -> Any:
    """``value`` as an annotation says: dataclasses, tuples, mappings, unions, literals and scalars."""
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (wanted,) = (argument for argument in arguments if argument is not type(None))
        return _decoded(wanted, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise _UnfitError(f"{where} is {value!r:.60}; expected a list")
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise _UnfitError(f"{where} has {len(value)} entries; expected {len(kinds)}")
        return tuple(
            _decoded(each, item, f"{where}[{n}]") for n, (each, item) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is typing.Literal:
        if value not in arguments:
            raise _UnfitError(f"{where} is {value!r:.60}; expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _UnfitError(f"{where} is {value!r:.60}; expected an object")
        return {name: _decoded(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    return _scalar(kind, value, where)


def _record(kind: Any, value: object, where: str) -> Any:
    if not isinstance(value, dict):
        raise _UnfitError(f"{where} is {value!r:.60}; expected an object")
    hints = typing.get_type_hints(kind)
    given = {}
    for field in dataclasses.fields(kind):
        path = f"{where}.{field.name}" if where else field.name
        if field.name in value:
            given[field.name] = _decoded(hints[field.name], value[field.name], path)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise _UnfitError(f"{path} is missing")
    if kind is Interval:
        low, high = given.get("low"), given.get("high")
        if given["value"] <= 0 or (low is None) != (high is None) or not (low is None or 0 < low <= high):
            raise _UnfitError(f"{where} is {value!r:.120}; expected numbers above 0, low not above high")
    return kind(**given)


def _scalar(kind: type, value: object, where: str) -> object:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise _UnfitError(f"{where} is an integer too large for a number") from None
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise _UnfitError(f"{where} is {value!r:.60}; expected {_WORDS[kind]}")
    return value


_WORDS = {float: "a number", int: "an integer", str: "a text", bool: "true or false"}
