"""The mock's serialized plan: everything the engine needs, in a layout that the checks for real plans fit too.

Bytes 0-3 magic, 4-7 layout number, 8-15 zero, 16-23 total length (little-endian u64), 24-27 version (major, minor,
patch, build), 28-31 length of the JSON header, 32-63 SHA-256 of all that follows; then the header, then the model.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trtx_py._errors import PlanError
from trtx_py._types import DataType, ShapeRange, TensorInfo, TensorLocation, TensorMode

__all__ = ["MAGIC", "PlanPayload", "version_bytes"]

MAGIC = b"mtrt"
_LAYOUT = 1
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
            header = json.loads(body[:header_length])
            result = cls(
                flavour=header["flavour"], version=header["version"], name=header["name"],
                compute_capabilities=tuple(header["compute_capabilities"]), profile_sharing=header["profile_sharing"],
                tensors=tuple(_tensor_in(t) for t in header["tensors"]), num_profiles=header["num_profiles"],
                num_layers=header["num_layers"], model=body[header_length:], options=header["options"],
                real_plan=header["real_plan"],
            )  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f"the plan's head is damaged: {error}") from error
        if version_bytes(result.version) != version:
            raise PlanError("the plan's head is damaged: its two version fields differ")
        return result


def _tensor_out(info: TensorInfo) -> dict[str, Any]:
    return {
        "name": info.name, "mode": info.mode.value, "dtype": info.dtype.value, "shape": list(info.shape),
        "location": info.location.value, "is_shape_tensor": info.is_shape_tensor,
        "ranges": [[list(r.min), list(r.opt), list(r.max)] for r in info.ranges],
    }  # fmt: skip


def _tensor_in(entry: Mapping[str, Any]) -> TensorInfo:
    rows: Sequence[Sequence[Sequence[int]]] = entry["ranges"]
    return TensorInfo(
        name=entry["name"], mode=TensorMode(entry["mode"]), dtype=DataType(entry["dtype"]),
        shape=tuple(entry["shape"]), location=TensorLocation(entry["location"]),
        is_shape_tensor=entry["is_shape_tensor"],
        ranges=tuple(ShapeRange(tuple(low), tuple(opt), tuple(high)) for low, opt, high in rows),
    )  # fmt: skip
