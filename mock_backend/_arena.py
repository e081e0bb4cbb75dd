"""Device memory that notices misuse: bounds, use after free, double free, leaks and the memory limit."""

from __future__ import annotations

import pathlib
import sys
import threading
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field
from types import FrameType

import numpy as np
import numpy.typing as npt

__all__ = ["ALIGNMENT", "BASE_ADDRESS", "DEVICE_SPAN", "POISON", "Arena", "ArenaError", "Block", "call_site"]

#: Device pointers are multiples of this, as those of cuMemAlloc are.
ALIGNMENT = 256
#: Fresh device memory is filled with this byte: code that counts on zeros shows.
POISON = 0xCB
#: Address space of device 0 starts here; no host mapping of a 64-bit process lies in this range.
BASE_ADDRESS = 0x2000_0000_0000
#: Address space of one device. Addresses are never used twice, so a stale pointer can never hit a newer block.
DEVICE_SPAN = 1 << 43

_PACKAGE = str(pathlib.Path(__file__).parent) + "/"
_RED_ZONE = 256
_RED_BYTE = 0xA5
_REMEMBERED = 8192

Bytes = npt.NDArray[np.uint8]


def call_site() -> str:
    """``file:line in function`` of the nearest caller outside this package."""
    # walking the frames by hand reads no source files, which matters: every allocation comes here
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(_PACKAGE) or filename.endswith("conformance.py"):
            return f"{filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "inside mock_backend"


class ArenaError(Exception):
    """A request that the arena refuses; ``reason`` is one of the class constants."""

    OUT_OF_MEMORY = "out of memory"
    INVALID = "invalid"
    ILLEGAL = "illegal address"

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass
class Block:
    """One allocation: ``size`` bytes at ``address``; host memory stands behind it from the first touch on."""

    address: int
    size: int
    site: str
    label: str = ""
    freed_at: str = ""
    _backing: Bytes | None = field(default=None, repr=False)

    @property
    def data(self) -> Bytes:
        """The bytes, as a view between two red zones."""
        if self._backing is None:
            backing = np.full(self.size + 2 * _RED_ZONE, _RED_BYTE, np.uint8)
            backing[_RED_ZONE : _RED_ZONE + self.size] = POISON
            self._backing = backing
        return self._backing[_RED_ZONE : _RED_ZONE + self.size]

    def damage(self) -> str:
        """What overwrote a red zone, or an empty string."""
        if self._backing is None:
            return ""
        before, after = self._backing[:_RED_ZONE], self._backing[_RED_ZONE + self.size :]
        if (before != _RED_BYTE).any():
            return f"{self}: {int((before != _RED_BYTE).sum())} bytes before it were overwritten"
        if (after != _RED_BYTE).any():
            return f"{self}: {int((after != _RED_BYTE).sum())} bytes after it were overwritten"
        return ""

    def drop(self) -> None:
        """Let the host memory go; views that a running kernel holds keep it alive for themselves."""
        self._backing = None

    def __str__(self) -> str:
        what = f" ({self.label})" if self.label else ""
        return f"device block 0x{self.address:x} of {self.size} bytes{what}, allocated at {self.site}"


class Arena:
    """The memory of one device. Thread-safe.

    Args:
        limit_bytes: total memory; an allocation beyond it is refused as the driver does.
        device: ordinal, which decides the address range.
    """

    def __init__(self, limit_bytes: int, device: int = 0) -> None:
        if limit_bytes <= 0:
            raise ValueError(f"memory_bytes is {limit_bytes}; a device has at least one byte")
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._first = BASE_ADDRESS + device * DEVICE_SPAN
        self._next = self._first + ALIGNMENT
        self._live: dict[int, Block] = {}
        self._starts: list[int] = []
        self._freed: dict[int, Block] = {}
        self._freed_order: deque[int] = deque()
        self._used = 0
        self._damage: list[str] = []

    def __contains__(self, address: int) -> bool:
        """True if ``address`` lies in this device's address range, allocated or not."""
        return self._first <= address < self._first + DEVICE_SPAN

    @property
    def used_bytes(self) -> int:
        """Bytes taken, each block rounded up to the alignment."""
        with self._lock:
            return self._used

    def allocate(self, size: int, *, label: str = "") -> int:
        """Address of a fresh, poisoned block. Raises ArenaError (INVALID for 0 bytes, OUT_OF_MEMORY)."""
        if size <= 0:
            raise ArenaError(ArenaError.INVALID, f"{size} bytes were asked for; the smallest block is 1 byte")
        site = call_site()
        padded = -(-size // ALIGNMENT) * ALIGNMENT
        with self._lock:
            if self._used + padded > self.limit_bytes:
                raise ArenaError(
                    ArenaError.OUT_OF_MEMORY,
                    f"{size} bytes were asked for, {self.limit_bytes - self._used} of {self.limit_bytes} are free in "
                    f"{len(self._live)} live blocks; free some, or raise MockBackend(memory_bytes=...)",
                )
            address = self._next
            # the gap to the next block is what makes an overrun land nowhere instead of in a neighbour
            self._next += padded + ALIGNMENT
            self._live[address] = Block(address, size, site, label)
            self._starts.append(address)  # addresses only grow, so the list stays sorted
            self._used += padded
            return address

    def free(self, address: int) -> None:
        """Give a block back. Raises ArenaError (INVALID) for a double free or a pointer that starts no block."""
        with self._lock:
            block = self._live.pop(address, None)
            if block is None:
                raise ArenaError(ArenaError.INVALID, self._explain(address, "free"))
            if found := block.damage():
                self._damage.append(found)
            self._starts.pop(bisect_right(self._starts, address) - 1)
            self._used -= -(-block.size // ALIGNMENT) * ALIGNMENT
            block.freed_at = call_site()
            block.drop()
            self._freed[address] = block
            self._freed_order.append(address)
            if len(self._freed_order) > _REMEMBERED:
                self._freed.pop(self._freed_order.popleft(), None)

    def view(self, address: int, nbytes: int) -> Bytes:
        """``nbytes`` writable bytes at ``address``. Raises ArenaError (ILLEGAL) if no live block has them all."""
        with self._lock:
            block = self._find(address)
            if block is None:
                raise ArenaError(ArenaError.ILLEGAL, self._explain(address, "access"))
            offset = address - block.address
            if nbytes < 0 or offset + nbytes > block.size:
                beyond = offset + nbytes - block.size
                raise ArenaError(ArenaError.ILLEGAL, f"access to {nbytes} bytes runs {beyond} bytes beyond {block}")
            return block.data[offset : offset + nbytes]

    def check(self, address: int, nbytes: int) -> None:
        """Like view, without touching the memory."""
        with self._lock:
            block = self._find(address)
            if block is None:
                raise ArenaError(ArenaError.ILLEGAL, self._explain(address, "access"))
            beyond = address - block.address + nbytes - block.size
            if beyond > 0:
                raise ArenaError(ArenaError.ILLEGAL, f"access to {nbytes} bytes runs {beyond} bytes beyond {block}")

    def reset(self) -> list[str]:
        """Free everything, as the end of a context does; returns what was still allocated."""
        with self._lock:
            lost = [str(block) for block in self._live.values()]
            self._damage += [found for block in self._live.values() if (found := block.damage())]
            for block in self._live.values():
                block.drop()
            self._live.clear()
            self._starts.clear()
            self._used = 0
            return lost

    def leaks(self) -> list[str]:
        """Live blocks with the place where each was allocated."""
        with self._lock:
            return [str(block) for block in self._live.values()]

    def damage(self) -> list[str]:
        """Overwritten red zones, of live and of freed blocks."""
        with self._lock:
            return self._damage + [found for block in self._live.values() if (found := block.damage())]

    def _find(self, address: int) -> Block | None:
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        block = self._live[self._starts[index]]
        return block if address < block.address + block.size else None

    def _explain(self, address: int, verb: str) -> str:
        holder = self._find(address)
        if holder is not None:
            return f"{verb} of 0x{address:x}, which is {address - holder.address} bytes inside {holder}; pass its start"
        for freed in reversed(self._freed.values()):
            if freed.address <= address < freed.address + freed.size:
                kind = "double free" if verb == "free" else "use after free"
                return f"{kind}: 0x{address:x} is in {freed}, freed at {freed.freed_at}"
        index = bisect_right(self._starts, address) - 1
        near = f"; the nearest block below is {self._live[self._starts[index]]}" if index >= 0 else ""
        return f"{verb} of 0x{address:x}, which no allocation holds{near}"
