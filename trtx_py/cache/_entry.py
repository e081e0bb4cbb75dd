"""Entries on disk: what was kept, what it is, and a checksum over both.

File format, version 1, little-endian:

    offset  size  what
    0       8     magic "TRTXCACH"
    8       4     format version
    12      4     length of the header
    16      32    SHA-256 of the header
    48      ...   header: one msgpack map, with the entry's key and the SHA-256 of its content
    ...     ...   content: a plan's container, or what TensorRT-RTX compiled

The header ties the content to its key, so an entry under another's name is found too. A plan's container verifies
itself when it is parsed; that its checksum is the one in the header completes the chain.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, BinaryIO

import msgpack

from .._errors import PlanError
from .._plan import Plan
from ._folder import UntrustedFileError, open_trusted

_MAGIC = b"TRTXCACH"
_FORMAT = 1
_PREFIX = struct.Struct("<8sII32s")
_MAX_HEADER = 1 << 20
TEMPORARY = ".tmp"


class DamagedEntryError(Exception):
    """An entry that cannot be used; never leaves this package."""


@dataclass(frozen=True)
class CacheEntry:
    """One plan in an ``EngineCache``.

    Attributes:
        key: 64 hexadecimal digits: the hash of all that the plan was made of.
        size_bytes: of the file.
        flavour: member of the TensorRT family that built it, or "mock".
        version: its version.
        compute_capabilities: GPU architectures it was built for.
        precision: what was asked for, None for the model's own types.
        model: name of the model's file, or "ONNX model (bytes)".
        created_s: when it was built, in seconds since the epoch.
        last_used_s: when it was found last, or built.
    """

    key: str
    size_bytes: int
    flavour: str
    version: str
    compute_capabilities: tuple[str, ...]
    precision: str | None
    model: str
    created_s: float
    last_used_s: float


@dataclass(frozen=True)
class CacheReport:
    """What ``prune``, ``verify`` or ``clear`` did.

    Attributes:
        checked: files that were looked at.
        removed: those that are gone now, by their place below the root, each with the reason.
        freed_bytes: their size together.
    """

    checked: int
    removed: Mapping[str, str]
    freed_bytes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "removed", MappingProxyType(dict(self.removed)))


def read_plan(path: str, key: str) -> Plan:
    """The plan at ``path``, whole and kept under this key.

    Raises:
        FileNotFoundError: there is none.
        DamagedEntryError: it cannot be used; says why.
        OSError: it cannot be read.
    """
    try:
        with open_trusted(path) as file:
            header = _read_header(file, key)
            plan = Plan(file.read())
    except UntrustedFileError as error:
        raise DamagedEntryError(str(error)) from error
    except PlanError as error:
        raise DamagedEntryError(error.message) from error
    if plan.sha256 != header["sha256"]:
        raise DamagedEntryError("it holds another plan than its header says")
    return plan


def read_blob(path: str, key: str) -> bytes:
    """As ``read_plan``, for what is no plan."""
    try:
        with open_trusted(path) as file:
            header = _read_header(file, key)
            content = file.read()
    except UntrustedFileError as error:
        raise DamagedEntryError(str(error)) from error
    if hashlib.sha256(content).hexdigest() != header["sha256"]:
        raise DamagedEntryError("the SHA-256 of its content does not match")
    return content


def read_description(path: str, key: str) -> CacheEntry:
    """What the header says; the plan itself is not read. Raises as ``read_plan``."""
    try:
        with open_trusted(path) as file:
            header = _read_header(file, key)
            status = os.fstat(file.fileno())
    except UntrustedFileError as error:
        raise DamagedEntryError(str(error)) from error
    try:
        return CacheEntry(
            key=key,
            size_bytes=status.st_size,
            flavour=header["flavour"],
            version=header["version"],
            compute_capabilities=tuple(header["compute_capabilities"]),
            precision=header["precision"],
            model=header["model"],
            created_s=header["created_s"],
            last_used_s=status.st_mtime,
        )
    except (KeyError, TypeError) as error:
        raise DamagedEntryError(f"its header is intact and has no {error}") from error


def write_plan(path: str, key: str, plan: Plan, model: str) -> None:
    """Keep ``plan`` at ``path`` in one step. Raises OSError; no file is left then."""
    header = plan.header
    described = {
        "key": key,
        "sha256": plan.sha256,
        "flavour": header.flavour,
        "version": header.version,
        "compute_capabilities": list(header.compute_capabilities),
        "precision": header.precision,
        "model": model,
        "created_s": time.time(),
    }
    _write(path, key, described, plan)


def write_blob(path: str, key: str, content: bytes) -> None:
    """As ``write_plan``, for what is no plan."""
    _write(path, key, {"key": key, "sha256": hashlib.sha256(content).hexdigest()}, content)


def _write(path: str, key: str, described: Mapping[str, Any], content: bytes) -> None:
    header = bytes(msgpack.Packer(use_bin_type=True).pack(dict(described)))
    prefix = _PREFIX.pack(_MAGIC, _FORMAT, len(header), hashlib.sha256(header).digest())
    temporary = os.path.join(os.path.dirname(path), f".{key}.{secrets.token_hex(8)}{TEMPORARY}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb") as file:
            for part in (prefix, header, content):
                file.write(part)
            file.flush()
            os.fsync(fd)  # before the name: after a power failure the name must not lead to half a plan
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # it is there only if something failed
            os.unlink(temporary)


def _read_header(file: BinaryIO, key: str) -> dict[str, Any]:
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        raise DamagedEntryError(f"it ends after {len(prefix)} bytes")
    magic, version, length, digest = _PREFIX.unpack(prefix)
    if magic != _MAGIC or version != _FORMAT or length > _MAX_HEADER:
        raise DamagedEntryError("it does not begin as an entry of this format does")
    header = file.read(length)
    if hashlib.sha256(header).digest() != digest:
        raise DamagedEntryError("the SHA-256 of its header does not match")
    try:
        found = msgpack.unpackb(header, raw=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise DamagedEntryError(f"its header is intact and cannot be understood ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("sha256"), str):
        raise DamagedEntryError("its header is intact and has no SHA-256 of its content")
    if found.get("key") != key:
        raise DamagedEntryError(f"it was kept under another key, {found.get('key')!r:.80}")
    return found
