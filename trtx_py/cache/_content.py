"""Values as JSON has them: one form for all that mean the same, and the content of what is only named."""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np

from .._builder_options import BuilderOptions

_CHUNK = 1 << 20


class UncacheableError(Exception):
    """Nothing says when two such builds give the same plan; never leaves this package."""


def plain(value: Any) -> Any:
    """``value`` in its one form. Raises UncacheableError if it has none."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(texts(list(value)))
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise UncacheableError(f"a mapping has names that are no text: {list(value)!r:.80}")
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, float):
        return value.hex()
    try:
        return operator.index(value)
    except TypeError:
        raise UncacheableError(f"no rule says what a {type(value).__name__} stands for") from None


def texts(value: Any) -> list[str]:
    """Names in their order; one alone is a list of one."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise UncacheableError(f"{value!r:.80} is no list of names")
    return list(value)


def flags(value: Any) -> list[str]:
    """Names of builder flags, whose order and case have no meaning."""
    return sorted({name.upper() for name in texts(list(value) if isinstance(value, (set, frozenset)) else value)})


def fields_of(value: Any) -> dict[str, Any]:
    """A frozen dataclass of plain values."""
    if not is_dataclass(value):
        raise UncacheableError(f"no rule says what a {type(value).__name__} stands for")
    return {name: plain(each) for name, each in vars(value).items()}


def builder_options(value: Any) -> dict[str, Any]:
    """A BuilderOptions, whose libraries count by what they contain."""
    if not isinstance(value, BuilderOptions):
        raise UncacheableError(f"no rule says what a {type(value).__name__} stands for")
    if value.plugin_creators:
        raise UncacheableError("plugins written in Python may be other code the next time")
    if value.timing_cache is not None:
        raise UncacheableError("a plan depends on what its timing cache holds")
    settings = {name: one for name, one in vars(value).items() if name not in _BY_CONTENT}
    return {
        **plain(settings),
        "flags": sorted(value.builder_flags),
        "compute_capabilities": texts(value.compute_capabilities),
        "plugin_libraries": [_files(os.fspath(path)) for path in value.plugin_libraries],
        "dla": None if value.dla is None else fields_of(value.dla),
        "calibration": None if value.calibration is None else calibration(value.calibration),
        "precision_policy": None if value.precision_policy is None else fields_of(value.precision_policy),
    }


#: Fields of BuilderOptions that have a rule of their own.
_BY_CONTENT = frozenset(
    {"flags", "compute_capabilities", "plugin_libraries", "plugin_creators", "timing_cache", "dla", "calibration",
     "precision_policy"}
)  # fmt: skip


def calibration(value: Any) -> dict[str, Any]:
    """A Calibration: its settings, and all that its data holds."""
    if not is_dataclass(value) or not hasattr(value, "data"):
        raise UncacheableError(f"no rule says what a {type(value).__name__} stands for")
    settings = dict(vars(value))
    settings.pop("cache", None)  # it saves time, and keeps the same ranges
    data = settings.pop("data")
    return {**plain(settings), "data": _data(data)}


def _data(data: Any) -> Any:
    if isinstance(data, np.ndarray):
        return _array(data)
    if isinstance(data, Mapping):
        return plain({name: _array(array) for name, array in data.items()})
    if isinstance(data, (str, os.PathLike)):
        return _files(os.fspath(data))
    if isinstance(data, (list, tuple)) and all(isinstance(each, (str, os.PathLike)) for each in data):
        return [_files(os.fspath(each)) for each in data]
    folder = getattr(data, "folder", None)
    if isinstance(folder, (str, os.PathLike)):
        settings = {name: each for name, each in vars(data).items() if name != "folder"}
        return {**plain(settings), "folder": _files(os.fspath(folder))}
    raise UncacheableError(f"calibration data that is a {type(data).__name__} may be other data the next time")


def _array(array: Any) -> list[Any]:
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        raise UncacheableError(f"calibration data has a {type(array).__name__} where an array was expected")
    return [array.dtype.str, list(array.shape), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()]


def _files(path: str) -> Any:
    """Name and SHA-256 of a file, or of all in a folder."""
    try:
        if os.path.isdir(path):
            names = sorted(os.listdir(path))
            return [_files(os.path.join(path, name)) for name in names if os.path.isfile(os.path.join(path, name))]
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise UncacheableError(f"{path!r} cannot be read: {error.strerror}") from error
    return [os.path.basename(path), digest.hexdigest()]
