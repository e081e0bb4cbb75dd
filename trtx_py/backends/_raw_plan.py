"""What a serialized engine says about itself before TensorRT sees it.

TensorRT checks little: a truncated plan ends the process, and version mismatches come as assertions. Layout, measured
on plans of TensorRT 8.6 and RTX 1.7: four bytes of magic, at offset 16 the total length (u64, little-endian), at offset
24 one byte each for major, minor, patch and build.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from .._errors import PlanError
from .._native import find_image_marks

HEADER_BYTES = 32
_LENGTH_OFFSET = 16
_VERSION_OFFSET = 24

_ELF = b"\x7fELF"
_MAX_PE_OFFSET = 4096
_ELF_HOST_MACHINES = {3: "x86", 40: "ARM", 62: "x86-64", 183: "AArch64", 243: "RISC-V"}
_PE_HOST_MACHINES = {0x14C: "x86", 0x8664: "x86-64", 0xAA64: "AArch64"}


@dataclass(frozen=True)
class RawPlanHeader:
    """The beginning of a plan.

    Attributes:
        magic: its first four bytes.
        flavour: "tensorrt", "tensorrt_rtx" or "mock".
        version: major.minor.patch.build of the library that built it.
        length: bytes of the whole plan.
    """

    magic: bytes
    flavour: str
    version: str
    length: int


def read_raw_plan_header(data: bytes | memoryview) -> RawPlanHeader:
    """Read the header of a plan and check its length against the bytes at hand.

    Raises:
        PlanError: the bytes are no plan, are cut off, or go on behind the plan's end.
    """
    view = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
    size = len(view)
    if size < HEADER_BYTES:
        raise PlanError(
            f"the plan has {size} bytes, expected at least the {HEADER_BYTES} of its header: it is empty or cut off; "
            f"copy it again or rebuild it"
        )
    magic = bytes(view[:4])
    flavour = _flavour_of(magic)
    if flavour is None:
        raise PlanError(
            f"these {size} bytes begin with {magic!r} and are no TensorRT plan, which begins with b'ftrt' (or another "
            f"letter before b'trt'); {_looks_like(bytes(view[:16]))}"
        )
    (length,) = struct.unpack_from("<Q", view, _LENGTH_OFFSET)
    version = ".".join(str(number) for number in view[_VERSION_OFFSET : _VERSION_OFFSET + 4])
    if length < HEADER_BYTES:
        raise PlanError(
            f"the plan's header ({flavour} {version}) gives a length of {length} bytes, less than the header itself: "
            f"it is damaged; copy it again or rebuild it"
        )
    if size < length:
        raise PlanError(
            f"the plan ({flavour} {version}) is cut off: {size} bytes are here, its header says {length}; "
            f"copy it again or rebuild it"
        )
    if size > length:
        raise PlanError(
            f"{size - length} bytes follow the end of the plan ({flavour} {version}): {size} bytes are here, its "
            f"header says {length}; pass the plan alone"
        )
    return RawPlanHeader(magic=magic, flavour=flavour, version=version, length=length)


def find_host_code(data: bytes | memoryview) -> str | None:
    """Look for executable code for the CPU in a plan: an embedded lean runtime or plugin library.

    GPU code is ELF too (EM_CUDA, 190) and does not count. Compressed images are not found: this is a reason to refuse,
    never a proof of harmlessness.

    Returns:
        What was found and where, None if nothing was.
    """
    view = memoryview(data)
    try:
        marks = find_image_marks(view)
    except ValueError as error:  # made to look like anything but a plan
        return str(error)
    for position in marks:
        if bytes(view[position : position + 4]) == _ELF:
            machine, start = _elf_host_machine(view, position), position
        else:
            machine, start = _pe_host_machine(view, position)
        if machine is not None:
            kind = "an ELF" if bytes(view[position : position + 4]) == _ELF else "a PE"
            return f"{kind} image for {machine} at byte {start}"
    return None


def _flavour_of(magic: bytes) -> str | None:
    if magic[1:] != b"trt" or not b"a" <= magic[:1] <= b"z":
        return None
    return {b"vtrt": "tensorrt_rtx", b"mtrt": "mock"}.get(magic, "tensorrt")


def _looks_like(start: bytes) -> str:
    if start.startswith(b"\x08") and b"\x12" in start:
        return "it looks like an ONNX model: build a plan from it first"
    if start.startswith(b"PK\x03\x04"):
        return "it looks like a zip archive: unpack it and pass the plan inside"
    if start.startswith(b"version https:"):
        return "it looks like a Git LFS pointer: fetch the file itself"
    return "pass a serialized engine"


def _elf_host_machine(content: memoryview, position: int) -> str | None:
    if position + 20 > len(content):
        return None
    byte_order = {1: "little", 2: "big"}.get(content[position + 5])
    if byte_order is None:
        return None
    field = content[position + 18 : position + 20]
    return _ELF_HOST_MACHINES.get(int.from_bytes(field, "little" if byte_order == "little" else "big"))


def _pe_host_machine(content: memoryview, position: int) -> tuple[str | None, int]:
    """For the "PE" signature at ``position``: the machine, and where the image with its "MZ" begins."""
    if position + 6 > len(content):
        return None, position
    (machine,) = struct.unpack_from("<H", content, position + 4)
    for header in range(64, min(_MAX_PE_OFFSET, position) + 1):  # what the DOS header says the signature's offset is
        start = position - header
        if bytes(content[start : start + 2]) == b"MZ" and struct.unpack_from("<I", content, start + 60)[0] == header:
            return _PE_HOST_MACHINES.get(machine), start
    return None, position
