"""Which converter is for which format: those of this package, and the users' own."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .._arguments import checked_path
from .._errors import InvalidArgumentError
from ._formats import FORMATS, Detected, ModelSource, detect, is_module_name, start_of
from ._types import Converter


@dataclass(frozen=True)
class Registered:
    """A converter: ``function`` as module:name, for the worker to import."""

    function: str
    suffixes: tuple[str, ...] = ()
    magic: bytes = b""


_OWN = {
    **dict.fromkeys(("torch-module", "torch-pickle", "torchscript", "torch-export", "safetensors"), "._torch:convert"),
    **dict.fromkeys(("keras", "keras-h5", "saved-model", "tf-graph", "tflite"), "._tensorflow:convert"),
}


class Registry:
    """Formats and their converters; the latest one registered for a format is used."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._registered: dict[str, Registered] = {}

    def register(
        self, format: str, converter: Converter | str, *, suffixes: Sequence[str] = (), magic: bytes = b""
    ) -> None:
        """As ``Convert.register``."""
        if not _is_text(format) or format in ("onnx", "plan"):
            raise InvalidArgumentError(
                f"format is {format!r}; expected a name of your own, or that of a format to convert otherwise"
            )
        if isinstance(suffixes, str) or not all(_is_text(s) and s.startswith(".") for s in suffixes):
            raise InvalidArgumentError(f"suffixes is {suffixes!r}; expected names such as ('.foo',)")
        if not isinstance(magic, bytes):
            raise InvalidArgumentError(f"magic is {type(magic).__name__}; expected bytes that a file begins with")
        if format not in FORMATS and not suffixes and not magic:
            raise InvalidArgumentError(
                f"nothing tells a file of format {format!r}; give suffixes=('.foo',) or magic=b'...'"
            )
        entry = Registered(_importable(converter), tuple(s.lower() for s in suffixes), magic)
        with self._lock:
            self._registered[format] = entry

    def unregister(self, format: str) -> None:
        """As ``Convert.unregister``."""
        with self._lock:
            if self._registered.pop(format, None) is None:
                raise InvalidArgumentError(f"no converter was registered for {format!r}")

    def detect(self, source: ModelSource) -> Detected:
        """As ``detect``, with the registered formats before all others."""
        with self._lock:
            registered = dict(self._registered)
        path, start = "", b""
        if isinstance(source, (bytes, bytearray, memoryview)):
            start = start_of(source, 64)
        else:
            path = checked_path(source, "source", "a path, bytes or package.module:factory")
            if os.path.isfile(path) and os.access(path, os.R_OK):
                try:
                    with open(path, "rb") as file:
                        start = file.read(64)
                except OSError as error:
                    raise InvalidArgumentError(f"{path!r} cannot be read: {error.strerror}") from error
        for name, entry in registered.items():
            if entry.magic and start.startswith(entry.magic):
                return Detected(name)
            if not entry.magic and os.path.exists(path) and path.lower().endswith(entry.suffixes or ("\0",)):
                return Detected(name)
        return detect(source)

    def converter(self, format: str) -> str | None:
        """The converter as module:name; None for ONNX, which needs none, and for plans."""
        with self._lock:
            entry = self._registered.get(format)
        return _OWN.get(format) if entry is None else entry.function


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _importable(converter: Any) -> str:
    if _is_text(converter):
        if not is_module_name(converter):
            raise InvalidArgumentError(f"converter is {converter!r}; expected a function or 'package.module:function'")
        return str(converter)
    module, name = getattr(converter, "__module__", None), getattr(converter, "__qualname__", None)
    # A class instance has neither, a lambda and an inner function have "<" in their names.
    if not module or not name or "<" in name or module == "__main__":
        raise InvalidArgumentError(
            f"converter is {converter!r}; expected a function at the top of a module that another process can import, "
            "or 'package.module:function'"
        )
    return f"{module}:{name}"
