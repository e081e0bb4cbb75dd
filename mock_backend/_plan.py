"""The mock's serialized plan: everything the engine needs, in a layout that the checks for real plans fit too.

Bytes 0-3 magic, 4-7 layout number, 8-15 zero, 16-23 total length (little-endian u64), 24-27 version (major, minor,
patch, build), 28-31 length of the JSON header, 32-63 SHA-256 of all that follows; then the header, then the model.
"""

from __future__ import annotations

import enum
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trtx_py._errors import PlanError
from trtx_py._types import DataType, Shape, ShapeRange, TensorInfo, TensorLocation, TensorMode

__all__ = ["MAGIC", "PlanPayload", "version_bytes"]

MAGIC = b"mtrt"
_LAYOUT = 1
_MOST_PROFILES = 4096  # an engine computes something for each; nothing that was built has nearly as many
_HEAD = struct.Struct("<4sIQQ4sI32s")


def version_bytes(version: str) -> bytes:
    """Up to four dotted numbers as bytes, each cut to one byte. Raises ValueError for anything else."""
    try:
        parts = [int(part) for part in version.split(".")]
    except ValueError:
        raise ValueError(f"version {version!r} is not a row of dotted numbers such as 1.0.0.0") from None
    return bytes(min(part, 255) for part in [*parts, 0, 0, 0, 0][:4])


@dataclass(frozen=True)
class PlanPayload:
    """The content of one mock plan.

    Attributes:
        compute_capabilities: GPU architectures it was built for.
        profile_sharing: several contexts may use one profile at a time.
        tensors: I/O with the ranges of each profile.
        real_plan: size and SHA-256 of the plan that a real builder made from the same network, if one did.
    """

    flavour: str
    version: str
    name: str
    compute_capabilities: tuple[str, ...]
    profile_sharing: bool
    tensors: tuple[TensorInfo, ...]
    num_profiles: int
    num_layers: int
    model: bytes = field(repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)
    real_plan: Mapping[str, Any] | None = None

    def to_bytes(self) -> bytes:
        """The plan, ready to be stored."""
        header = {
            "flavour": self.flavour, "version": self.version, "name": self.name,
            "compute_capabilities": list(self.compute_capabilities), "profile_sharing": self.profile_sharing,
            "tensors": [_tensor_out(t) for t in self.tensors], "num_profiles": self.num_profiles,
            "num_layers": self.num_layers, "options": dict(self.options),
            "real_plan": None if self.real_plan is None else dict(self.real_plan),
        }  # fmt: skip
        text = json.dumps(header, sort_keys=True).encode()
        body = text + self.model
        digest = hashlib.sha256(body).digest()
        head = _HEAD.pack(
            MAGIC, _LAYOUT, 0, _HEAD.size + len(body), version_bytes(self.version), len(text), digest
        )  # fmt: skip
        return head + body

    @classmethod
    def from_bytes(cls, plan: bytes | memoryview) -> PlanPayload:
        """Read a plan. Raises PlanError for anything but the exact bytes that ``to_bytes`` made."""
        data = bytes(plan)
        if len(data) < _HEAD.size:
            raise PlanError(f"the plan has {len(data)} bytes; even its head takes {_HEAD.size}: it was cut off")
        magic, layout, _, total, version, header_length, digest = _HEAD.unpack_from(data)
        if magic != MAGIC:
            raise PlanError(f"the plan begins with {magic!r}, not with {MAGIC!r}: it is no plan of the mock backend")
        if layout != _LAYOUT:
            raise PlanError(f"the plan has layout {layout}; this mock reads layout {_LAYOUT}: build the plan again")
        if total != len(data):
            kind = "it was cut off" if len(data) < total else "something was appended to it"
            raise PlanError(f"the plan says it has {total} bytes, but there are {len(data)}: {kind}")
        body = data[_HEAD.size :]
        if hashlib.sha256(body).digest() != digest:
            raise PlanError("the plan's checksum does not match its content: it was damaged after it was built")
        try:
            found = json.loads(body[:header_length])
        except (ValueError, RecursionError) as error:
            raise _damaged(f"it is no JSON: {error}") from error
        header = _Fields(found, "header")
        result = cls(
            flavour=header.text("flavour"), version=header.text("version"), name=header.text("name"),
            compute_capabilities=header.texts("compute_capabilities"),
            profile_sharing=header.boolean("profile_sharing"),
            tensors=tuple(_tensor_in(entry, f"tensors[{i}]") for i, entry in enumerate(header.row("tensors"))),
            num_profiles=header.count("num_profiles"), num_layers=header.count("num_layers"),
            model=body[header_length:], options=header.mapping("options"),
            real_plan=header.mapping_or_none("real_plan"),
        )  # fmt: skip
        try:
            same = version_bytes(result.version) == version
        except ValueError as error:
            raise _damaged(str(error)) from error
        if not same:
            raise _damaged("its two version fields differ")
        if result.num_profiles > _MOST_PROFILES:
            raise _damaged(f"header.num_profiles is {result.num_profiles}; expected at most {_MOST_PROFILES}")
        for info in result.tensors:
            wanted = result.num_profiles if info.ranges else 0
            if len(info.ranges) != wanted:
                raise _damaged(
                    f"tensor {info.name!r} has {len(info.ranges)} ranges; expected one for each of {wanted} profiles"
                )
        return result


def _tensor_out(info: TensorInfo) -> dict[str, Any]:
    return {
        "name": info.name, "mode": info.mode.value, "dtype": info.dtype.value, "shape": list(info.shape),
        "location": info.location.value, "is_shape_tensor": info.is_shape_tensor,
        "ranges": [[list(r.min), list(r.opt), list(r.max)] for r in info.ranges],
    }  # fmt: skip


def _damaged(what: str) -> PlanError:
    return PlanError(f"the plan's head is damaged: {what}; build the plan again")


_E = TypeVar("_E", bound=enum.Enum)


class _Fields:
    """A JSON object whose values are taken by name and kind. Whatever is missing or of another kind is a PlanError."""

    def __init__(self, found: object, where: str) -> None:
        self._where = where
        self._entries: dict[str, object] = _of(found, dict, where, "an object")

    def _value(self, name: str) -> object:
        if name not in self._entries:
            raise _damaged(f"{self._where} has no {name!r}")
        return self._entries[name]

    def _path(self, name: str) -> str:
        return f"{self._where}.{name}"

    def text(self, name: str) -> str:
        return _of(self._value(name), str, self._path(name), "a string")

    def boolean(self, name: str) -> bool:
        return _of(self._value(name), bool, self._path(name), "true or false")

    def count(self, name: str) -> int:
        number = _integer(self._value(name), self._path(name))
        if number < 0:
            raise _damaged(f"{self._path(name)} is {number}; expected 0 or more")
        return number

    def row(self, name: str) -> list[object]:
        return _of(self._value(name), list, self._path(name), "a list")

    def texts(self, name: str) -> tuple[str, ...]:
        path = self._path(name)
        return tuple(_of(each, str, f"{path}[{i}]", "a string") for i, each in enumerate(self.row(name)))

    def mapping(self, name: str) -> dict[str, object]:
        return _of(self._value(name), dict, self._path(name), "an object")

    def mapping_or_none(self, name: str) -> dict[str, object] | None:
        value = self._value(name)
        return None if value is None else _of(value, dict, self._path(name), "an object or null")

    def member(self, name: str, kind: type[_E]) -> _E:
        value = self._value(name)
        for each in kind:
            if each.value == value and type(each.value) is type(value):
                return each
        raise _damaged(f"{self._path(name)} is {_shown(value)}; expected one of {[each.value for each in kind]}")

    def shape(self, name: str) -> Shape:
        return _numbers(self._value(name), self._path(name))


_T = TypeVar("_T")


def _of(value: object, kind: type[_T], path: str, expected: str) -> _T:
    if not isinstance(value, kind):
        raise _damaged(f"{path} is {_shown(value)}; expected {expected}")
    return value


def _integer(value: object, path: str) -> int:
    if isinstance(value, bool):  # which is an int to Python, and none to a plan
        raise _damaged(f"{path} is {_shown(value)}; expected a whole number")
    number = _of(value, int, path, "a whole number")
    if not -(1 << 63) <= number < 1 << 63:
        raise _damaged(f"{path} does not fit 64 bits; expected a whole number that does")
    return number


def _numbers(value: object, path: str) -> Shape:
    row = _of(value, list, path, "a list of whole numbers")
    return tuple(_integer(each, f"{path}[{i}]") for i, each in enumerate(row))


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:40] + '...'}"


def _range_in(entry: object, path: str) -> ShapeRange:
    row = _of(entry, list, path, "a list of min, opt and max")
    if len(row) != 3:
        raise _damaged(f"{path} has {len(row)} entries; expected min, opt and max")
    low, opt, high = (_numbers(each, f"{path}[{i}]") for i, each in enumerate(row))
    if not len(low) == len(opt) == len(high):
        raise _damaged(f"{path} has {len(low)}, {len(opt)} and {len(high)} numbers; expected as many each time")
    return ShapeRange(low, opt, high)


def _tensor_in(entry: object, path: str) -> TensorInfo:
    fields = _Fields(entry, path)
    return TensorInfo(
        name=fields.text("name"), mode=fields.member("mode", TensorMode), dtype=fields.member("dtype", DataType),
        shape=fields.shape("shape"), location=fields.member("location", TensorLocation),
        is_shape_tensor=fields.boolean("is_shape_tensor"),
        ranges=tuple(_range_in(each, f"{path}.ranges[{i}]") for i, each in enumerate(fields.row("ranges"))),
    )  # fmt: skip
