"""Plans: serialized engines, with a header that says what they are and a checksum that proves they are whole.

File format, version 1, little-endian:

    offset  size  what
    0       8     magic "TRTXPLAN"
    8       4     format version
    12      4     length of the header
    16      8     length of the plan
    24      32    SHA-256 over bytes 0 to 23, the header and the plan
    56      ...   header: one msgpack map
    ...     ...   plan: what TensorRT serialized; nothing may follow it

TensorRT ends the process over a truncated plan and loads a damaged one without a word, so it never sees a byte before
all of this has been checked.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, TypeVar

import msgpack

from ._arguments import checked_path, replace_file
from ._errors import InvalidArgumentError, PlanError
from ._hashing import Hashing
from ._types import DataType, ShapeRange, TensorInfo, TensorLocation, TensorMode
from .backends._raw_plan import find_host_code, read_raw_plan_header

MAGIC = b"TRTXPLAN"
FORMAT_VERSION = 1
_PREFIX = struct.Struct("<8sIIQ32s")
_SEALED = 24  # the part of the prefix that the checksum covers
_MAX_HEADER = 16 << 20
# Numbers of few digits: versions are compared as integers, and text of thousands of digits is no version.
_VERSION = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}){0,3}([.+a-z][.+a-z0-9]{0,30})?")
_CAPABILITY = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}")

_T = TypeVar("_T")


@dataclass(frozen=True)
class PlanHeader:
    """What a plan says about itself. Empty values mean "not known": raw plans tell only flavour and version.

    Attributes:
        flavour: member of the TensorRT family that built it: "tensorrt", "tensorrt_rtx", "mock", ...
        version: its version.
        compute_capabilities: GPU architectures it was built for, such as ("8.9",).
        precision: the precision asked for, None for the model's own types.
        io_tensors: inputs and outputs as the network declared them, with the ranges of every profile.
        onnx_sha256: of the model with all its weights, as hexadecimal digits.
        build_options: the rest of what the build was asked for, read-only.
        version_compatible: later TensorRT versions may load it.
        host_code: it carries code for the CPU (the lean runtime of a version-compatible plan).
        is_raw: the plan came without our header.
    """

    flavour: str
    version: str
    compute_capabilities: tuple[str, ...] = ()
    precision: str | None = None
    io_tensors: tuple[TensorInfo, ...] = ()
    onnx_sha256: str = ""
    build_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    version_compatible: bool | None = None
    host_code: bool | None = None
    is_raw: bool = False

    def __post_init__(self) -> None:
        # A copy: what is sealed into the plan and what this object says must not part.
        object.__setattr__(self, "build_options", MappingProxyType(dict(self.build_options)))

    def __reduce__(self) -> tuple[Any, ...]:
        values = [getattr(self, f.name) for f in fields(self)]
        # A read-only view can be neither pickled nor copied.
        return (PlanHeader, tuple(dict(v) if isinstance(v, MappingProxyType) else v for v in values))


class Plan(bytes):
    """A serialized engine: a value, without an owner, that can be copied, compared, pickled, saved and loaded.

    The bytes are those of the container, header and checksum included, so writing them anywhere keeps them verifiable;
    ``serialized`` is what TensorRT made.

    Args:
        source: a container, or a raw ``.engine``/``.plan`` of TensorRT, as bytes. Of a container everything is
            verified; of a raw plan what can be is: magic, length field, version.

    Attributes:
        header: what is known about the plan.

    Raises:
        PlanError: not a plan, damaged, truncated, or followed by other bytes; says which.

    Source: nvinfer1::IHostMemory
    """

    header: PlanHeader
    _found_host_code: str | None = None

    def __new__(cls, source: bytes | bytearray | memoryview) -> Plan:
        if not isinstance(source, (bytes, bytearray, memoryview)):
            raise InvalidArgumentError(f"plan is {type(source).__name__}; expected bytes, or Plan.load for a path")
        return cls._parse(bytes(source), "plan")

    @classmethod
    def _parse(cls, blob: bytes, name: str) -> Plan:
        if blob[: len(MAGIC)] == MAGIC:
            plan = super().__new__(cls, blob)
            plan.header = _verify_container(blob, name)
            return plan
        try:
            raw = read_raw_plan_header(blob)
        except PlanError as error:
            raise PlanError(f"{name}: {error}") from None
        return cls.seal(blob, PlanHeader(raw.flavour, raw.version, is_raw=True))

    @classmethod
    def seal(cls, serialized: bytes | memoryview, header: PlanHeader) -> Plan:
        """Put what TensorRT serialized into a container. The library does this after a build."""
        packed = bytes(msgpack.Packer(use_bin_type=True).pack(_header_to_map(header)))
        prefix = _PREFIX.pack(MAGIC, FORMAT_VERSION, len(packed), len(serialized), bytes(32))[:_SEALED]
        hashing = Hashing([prefix, packed, serialized])
        plan = super().__new__(cls, _PREFIX.size + len(packed) + len(serialized))  # of zeros
        _fill(plan, _PREFIX.size, (packed, serialized))
        _fill(plan, 0, (prefix, hashing.digest()))
        plan.header = header
        return plan

    @property
    def serialized(self) -> memoryview:
        """What TensorRT serialized, without our header; a view that keeps the plan alive."""
        header_length: int = _PREFIX.unpack_from(self)[2]
        return memoryview(self)[_PREFIX.size + header_length :]

    @property
    def sha256(self) -> str:
        """The checksum in the container, as hexadecimal digits: it names the plan and its header."""
        digest: bytes = _PREFIX.unpack_from(self)[4]
        return digest.hex()

    @property
    def is_raw(self) -> bool:
        """True if it came without our header: nothing proves that it was undamaged when it was first loaded."""
        return self.header.is_raw

    def _host_code(self) -> str | None:
        """Code for the CPU that it carries; looked for once, since the bytes cannot change."""
        if self._found_host_code is None:
            self._found_host_code = find_host_code(self.serialized) or ""
        return self._found_host_code or None

    def __repr__(self) -> str:
        return f"Plan({self.header.flavour} {self.header.version}, {len(self.serialized)} bytes)"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Plan, (bytes(self),))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the container to ``path`` in one step: a reader sees the old file or the whole new one.

        Raises:
            InvalidArgumentError: the folder does not exist or cannot be written, or the disk is full; no file is left.
        """
        replace_file(checked_path(path, "path"), self, "plan")

    @classmethod
    def load(cls, source: str | os.PathLike[str] | bytes | bytearray | memoryview) -> Plan:
        """Read and verify a plan from a file, or from bytes as ``Plan(source)`` does.

        Raises:
            PlanError: as ``Plan(source)``, naming the file.
            InvalidArgumentError: the file cannot be read.
        """
        if isinstance(source, (bytes, bytearray, memoryview)):
            return source if isinstance(source, Plan) else cls(source)
        name = checked_path(source, "path", "a path or bytes")
        try:
            with open(name, "rb") as file:
                blob = file.read()
        except OSError as error:
            raise InvalidArgumentError(f"plan {name!r} cannot be read: {error.strerror}") from error
        return cls._parse(blob, name)


def _fill(blank: bytes, position: int, parts: Sequence[bytes | memoryview]) -> None:
    """Write into bytes that were just made and that nobody else has seen: joining would copy a plan once more."""
    memory = memoryview((ctypes.c_char * len(blank)).from_address(_address_of(blank))).cast("B")
    for part in parts:
        memory[position : position + len(part)] = memoryview(part).cast("B")
        position += len(part)


_address_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(("PyBytes_AsString", ctypes.pythonapi))


def looks_like_plan(data: bytes) -> bool:
    """True for bytes that begin as a plan does, ours or TensorRT's; says nothing about whether they are whole."""
    return data[: len(MAGIC)] == MAGIC or (len(data) >= 4 and data[1:4] == b"trt" and data[:1].islower())


def _digest(prefix: bytes, header: bytes | memoryview, plan: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(prefix)
    digest.update(header)
    digest.update(plan)
    return digest.digest()


def _verify_container(blob: bytes, name: str) -> PlanHeader:
    if len(blob) < _PREFIX.size:
        raise PlanError(f"{name}: {len(blob)} bytes is too short for a plan; copy the file again")
    _, version, header_length, plan_length, digest = _PREFIX.unpack_from(blob)
    if version != FORMAT_VERSION:
        raise PlanError(
            f"{name}: plan file format {version}, this trtx_py reads format {FORMAT_VERSION}; "
            "build the plan again, or use the trtx_py that wrote it"
        )
    expected = _PREFIX.size + header_length + plan_length
    if header_length > _MAX_HEADER or len(blob) != expected:
        what = "truncated" if len(blob) < expected else "followed by other bytes"
        raise PlanError(f"{name}: {len(blob)} bytes, its header says {expected}: {what}; copy or build it again")
    view = memoryview(blob)
    header = view[_PREFIX.size : _PREFIX.size + header_length]
    if _digest(blob[:_SEALED], header, view[_PREFIX.size + header_length :]) != digest:
        raise PlanError(
            f"{name}: the SHA-256 does not match: the plan was damaged after it was written; build it again"
        )
    try:
        return _header_from_map(msgpack.unpackb(header, raw=False, strict_map_key=True))
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, msgpack.UnpackException) as error:
        raise PlanError(
            f"{name}: the header is intact but cannot be understood ({error}); build the plan again"
        ) from error


def _range_to_list(limits: ShapeRange) -> list[list[int]]:
    return [list(limits.min), list(limits.opt), list(limits.max)]


def _tensor_to_map(tensor: TensorInfo) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "mode": tensor.mode.value,
        "dtype": tensor.dtype.value,
        "shape": list(tensor.shape),
        "location": tensor.location.value,
        "is_shape_tensor": tensor.is_shape_tensor,
        "ranges": [_range_to_list(limits) for limits in tensor.ranges],
    }


def _tensor_from_map(found: Any) -> TensorInfo:
    tensor = _checked(found, "an I/O tensor", dict)
    name = _checked(tensor["name"], "the name of an I/O tensor", str)
    ranges = _checked(tensor["ranges"], f"ranges of {name!r}", list)
    return TensorInfo(
        name=name,
        mode=TensorMode(tensor["mode"]),
        dtype=DataType(tensor["dtype"]),
        shape=_numbers(tensor["shape"], f"shape of {name!r}", minimum=-1),
        location=TensorLocation(tensor["location"]),
        is_shape_tensor=_checked(tensor["is_shape_tensor"], f"is_shape_tensor of {name!r}", bool),
        ranges=tuple(_range_from_list(limits, f"range of {name!r}") for limits in ranges),
    )


def _range_from_list(found: Any, what: str) -> ShapeRange:
    # Values of shape tensors may be negative.
    low, best, high = (_numbers(shape, what, minimum=-(2**63)) for shape in _checked(found, what, list))
    if not len(low) == len(best) == len(high):
        raise ValueError(f"{what} is {low}, {best}, {high}, which differ in rank")
    return ShapeRange(low, best, high)


def _checked(value: Any, what: str, kind: type[_T]) -> _T:
    # By the exact type: a bool is an int to isinstance, and msgpack makes no subclasses.
    if type(value) is not kind:
        raise ValueError(f"{what} is {value!r:.60}; expected {kind.__name__}")
    return value


def _numbers(found: Any, what: str, *, minimum: int) -> tuple[int, ...]:
    numbers = tuple(_checked(n, what, int) for n in _checked(found, what, list))
    if any(not minimum <= n < 2**63 for n in numbers):
        raise ValueError(f"{what} is {numbers}; expected {minimum} or more")
    return numbers


def _matching(value: Any, what: str, pattern: re.Pattern[str], expected: str) -> str:
    text = _checked(value, what, str)
    if not pattern.fullmatch(text):
        raise ValueError(f"{what} is {text!r:.60}; expected {expected}")
    return text


def _header_to_map(header: PlanHeader) -> dict[str, Any]:
    return {
        "flavour": header.flavour,
        "version": header.version,
        "compute_capabilities": list(header.compute_capabilities),
        "precision": header.precision,
        "io_tensors": [_tensor_to_map(tensor) for tensor in header.io_tensors],
        "onnx_sha256": header.onnx_sha256,
        "build_options": dict(header.build_options),
        "version_compatible": header.version_compatible,
        "host_code": header.host_code,
        "is_raw": header.is_raw,
    }


def _header_from_map(found: Any) -> PlanHeader:
    """Raises ValueError, LookupError or TypeError. A checksum proves that nothing was damaged, not who wrote it."""
    header = _checked(found, "the header", dict)
    capabilities = _checked(header["compute_capabilities"], "compute_capabilities", list)
    precision, compatible, host_code = header["precision"], header["version_compatible"], header["host_code"]
    options = _checked(header["build_options"], "build_options", dict)
    return PlanHeader(
        flavour=_checked(header["flavour"], "flavour", str),
        version=_matching(header["version"], "version", _VERSION, 'text such as "10.3.0.26"'),
        compute_capabilities=tuple(
            _matching(c, "a compute capability", _CAPABILITY, 'text such as "8.9"') for c in capabilities
        ),
        precision=None if precision is None else _checked(precision, "precision", str),
        io_tensors=tuple(_tensor_from_map(t) for t in _checked(header["io_tensors"], "io_tensors", list)),
        onnx_sha256=_checked(header["onnx_sha256"], "onnx_sha256", str),
        build_options={_checked(key, "a name in build_options", str): value for key, value in options.items()},
        version_compatible=None if compatible is None else _checked(compatible, "version_compatible", bool),
        host_code=None if host_code is None else _checked(host_code, "host_code", bool),
        is_raw=_checked(header["is_raw"], "is_raw", bool),
    )
