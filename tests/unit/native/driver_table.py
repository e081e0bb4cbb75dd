"""A function table made in Python: what the native Driver passes to the driver, and what it makes of the answers."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HEADER = Path(__file__).parents[3] / "capi" / "src" / "cuda_api.h"

_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_uint64] * 4)
_C_TYPES: dict[str, Any] = {
    "unsigned": ctypes.c_uint,
    "unsigned long long": ctypes.c_uint64,
    "unsigned char": ctypes.c_ubyte,
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "CUdevice": ctypes.c_int,
    "CUresult": ctypes.c_int,
    "size_t": ctypes.c_size_t,
    "CUdeviceptr": ctypes.c_uint64,
}


def functions() -> dict[str, list[tuple[str, str]]]:
    """The table's functions in order, each with the types and names of its parameters, as the header has them."""
    text = HEADER.read_text().replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {}
    for name, parameters in re.findall(r'X\((cu\w+),\s*"\w+",\s*\(([^)]*)\)\)', text):
        found[name] = []
        for parameter in parameters.split(","):
            kind, label = re.fullmatch(r"\s*(.*?)(\w+)\s*", parameter).groups()  # type: ignore[union-attr]
            found[name].append((" ".join(kind.replace("*", " *").split()), label))
    return found


class Table:
    """Answers every call.

    Attributes:
        status: the CUresult of a function, by name; 0 without an entry.
        answers: what a function writes to its out parameters, in order.
        calls: functions and their arguments by value; of an out parameter, None, or what an int was before.
    """

    def __init__(self) -> None:
        self.status: dict[str, int] = {}
        self.answers: dict[str, Sequence[Any]] = {}
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.names: dict[int, tuple[bytes, bytes]] = {}
        self._keep: list[object] = []
        self._entries = (ctypes.c_void_p * len(functions()))()
        self._place = {name: index for index, name in enumerate(functions())}
        for name, parameters in functions().items():
            self.replace(name, self._function(name, parameters))

    @property
    def capsule(self) -> object:
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return make(ctypes.addressof(self._entries), b"trtx_cuda_api", None)

    def replace(self, name: str, function: Any) -> None:
        """Put a C function in the place of one; it must be called as ``name`` is."""
        self._keep.append(function)
        self._entries[self._place[name]] = ctypes.cast(function, ctypes.c_void_p).value

    def _function(self, name: str, parameters: list[tuple[str, str]]) -> Callable[..., int]:
        if name in ("cuGetErrorName", "cuGetErrorString"):
            return _FUNCTION(lambda code, place, *_: self._describe(name, ctypes.c_int(code & 0xFFFFFFFF).value, place))

        def call(*words: int) -> int:
            answers = list(self.answers.get(name, ()))
            given = [self._take(kind, word, answers) for (kind, _), word in zip(parameters, words, strict=False)]
            self.calls.append((name, tuple(given)))
            return self.status.get(name, 0)

        return _FUNCTION(call)

    def _take(self, kind: str, word: int, answers: list[Any]) -> Any:
        if kind in ("void *", "const void *") or (kind.startswith("CU") and kind not in _C_TYPES and kind[-1] != "*"):
            return word
        if kind[-1] != "*":
            return _C_TYPES[kind](word).value
        if not word:
            return None
        if kind in ("char *", "unsigned char *"):
            ctypes.memmove(word, answers[0], len(answers.pop(0)))
            return None
        place = _C_TYPES.get(kind[:-1].strip(), ctypes.c_void_p).from_address(word)
        before = place.value if kind == "int *" else None  # an exchange is given something too
        if answers:
            place.value = answers.pop(0)
        return before

    def _describe(self, name: str, code: int, place: int) -> int:
        if code not in self.names:
            return 1
        text = self.names[code][name == "cuGetErrorString"]
        self._keep.append(text)
        ctypes.c_char_p.from_address(place).value = text
        return 0
