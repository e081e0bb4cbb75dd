"""Pinned host memory: real memory of this process, guarded on both sides and watched after it is freed."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ._arena import ArenaError, call_site

__all__ = ["PinnedMemory"]

_PAGE = 4096
_GUARD = 256
_GUARD_BYTE = 0xA5
_POISON = 0xCD
_FREED_BYTE = 0xDD
_QUARANTINE_BYTES = 64 << 20
_QUARANTINE_BLOCKS = 512


@dataclass
class _Pinned:
    address: int
    size: int
    site: str
    backing: npt.NDArray[np.uint8] = field(repr=False)
    offset: int = 0
    freed_at: str = ""

    def guards_damaged(self) -> str:
        before = self.backing[self.offset - _GUARD : self.offset]
        after = self.backing[self.offset + self.size : self.offset + self.size + _GUARD]
        for side, zone in (("before", before), ("after", after)):
            if (zone != _GUARD_BYTE).any():
                return f"{self}: {int((zone != _GUARD_BYTE).sum())} bytes {side} it were overwritten"
        return ""

    def written_after_free(self) -> str:
        body = self.backing[self.offset : self.offset + self.size]
        if (body != _FREED_BYTE).any():
            return f"{self}: written to after it was freed at {self.freed_at}"
        return ""

    def __str__(self) -> str:
        return f"pinned block 0x{self.address:x} of {self.size} bytes, allocated at {self.site}"


class PinnedMemory:
    """What cuMemHostAlloc gives out, for all devices of one driver. Thread-safe.

    Freed blocks stay in a quarantine of bounded size, filled with a pattern: copies that still name them are refused,
    and host code that still writes to them is found.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: dict[int, _Pinned] = {}
        self._quarantine: deque[_Pinned] = deque()
        self._quarantined_bytes = 0
        self._damage: list[str] = []

    def allocate(self, size: int) -> int:
        """Page-aligned address of ``size`` poisoned bytes. Raises ArenaError."""
        if size <= 0:
            raise ArenaError(ArenaError.INVALID, f"{size} bytes were asked for; the smallest block is 1 byte")
        try:
            backing = np.empty(size + 2 * _GUARD + _PAGE, np.uint8)
        except MemoryError as error:
            raise ArenaError(ArenaError.OUT_OF_MEMORY, f"{size} bytes of host memory were asked for") from error
        start = backing.ctypes.data
        offset = -(start + _GUARD) % _PAGE + _GUARD
        backing[offset - _GUARD : offset] = _GUARD_BYTE
        backing[offset : offset + size] = _POISON
        backing[offset + size : offset + size + _GUARD] = _GUARD_BYTE
        block = _Pinned(start + offset, size, call_site(), backing, offset)
        with self._lock:
            self._live[block.address] = block
        return block.address

    def free(self, address: int) -> None:
        """Give a block back. Raises ArenaError (INVALID) for a double free or a pointer that starts no block."""
        with self._lock:
            block = self._live.pop(address, None)
            if block is None:
                stale = self._find_freed(address)
                why = f"double free of {stale}, freed at {stale.freed_at}" if stale else "no pinned block starts there"
                raise ArenaError(ArenaError.INVALID, f"0x{address:x}: {why}")
            if found := block.guards_damaged():
                self._damage.append(found)
            block.freed_at = call_site()
            block.backing[block.offset : block.offset + block.size] = _FREED_BYTE
            self._quarantine.append(block)
            self._quarantined_bytes += block.size
            while len(self._quarantine) > _QUARANTINE_BLOCKS or self._quarantined_bytes > _QUARANTINE_BYTES:
                old = self._quarantine.popleft()
                self._quarantined_bytes -= old.size
                if found := old.written_after_free():
                    self._damage.append(found)

    def check(self, address: int, nbytes: int) -> bool:
        """True if the range lies in a live pinned block, False for pageable memory.

        Raises ArenaError (ILLEGAL) for a range in a freed block or one that leaves its block.
        """
        with self._lock:
            for block in self._live.values():
                if block.address <= address < block.address + block.size:
                    beyond = address + nbytes - block.address - block.size
                    if beyond > 0:
                        raise ArenaError(ArenaError.ILLEGAL, f"the range runs {beyond} bytes beyond {block}")
                    return True
            stale = self._find_freed(address)
        if stale is not None:
            raise ArenaError(
                ArenaError.ILLEGAL, f"use after free: 0x{address:x} is in {stale}, freed at {stale.freed_at}"
            )
        return False

    def reset(self) -> list[str]:
        """Free everything, as the end of the last context does; returns what was still allocated."""
        with self._lock:
            lost = list(self._live)
            names = [str(self._live[address]) for address in lost]
        for address in lost:
            self.free(address)
        return names

    def leaks(self) -> list[str]:
        """Live blocks with the place where each was allocated."""
        with self._lock:
            return [str(block) for block in self._live.values()]

    def damage(self) -> list[str]:
        """Overwritten guards and writes after free."""
        with self._lock:
            found = [block.guards_damaged() for block in self._live.values()]
            found += [block.written_after_free() for block in self._quarantine]
            return self._damage + [text for text in found if text]

    def _find_freed(self, address: int) -> _Pinned | None:
        return next((b for b in self._quarantine if b.address <= address < b.address + b.size), None)
