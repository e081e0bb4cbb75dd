"""Counting what is allocated."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ..backends.protocols import CU_MEMHOSTALLOC_PORTABLE, CudaDriver


@dataclass(frozen=True)
class MemoryStatistics:
    """Memory that trtx_py allocated on one device, or pinned for it. What TensorRT allocates itself is not in here.

    Attributes:
        current_bytes: allocated now.
        peak_bytes: the most that was ever allocated at once.
        allocations: how often memory was allocated, freed or not.
        live: allocations that are not freed.
    """

    current_bytes: int
    peak_bytes: int
    allocations: int
    live: int


class _Counter:
    def __init__(self) -> None:
        self.current = self.peak = self.allocations = self.live = 0

    def add(self, nbytes: int) -> None:
        self.current += nbytes
        self.peak = max(self.peak, self.current)
        self.allocations += 1
        self.live += 1

    def remove(self, nbytes: int) -> None:
        self.current -= nbytes
        self.live -= 1

    def statistics(self) -> MemoryStatistics:
        return MemoryStatistics(self.current, self.peak, self.allocations, self.live)


class CountedMemory:
    """Allocates and frees through the driver, and counts. Thread-safe; the device's context must be current."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self._lock = threading.Lock()
        self._device = _Counter()
        self._pinned = _Counter()

    def allocate_device(self, nbytes: int) -> int:
        """Device pointer to ``nbytes`` bytes (one at least: TensorRT refuses null). Source: cuMemAlloc"""
        address = self._driver.cuMemAlloc(max(nbytes, 1))
        with self._lock:
            self._device.add(nbytes)
        return address

    def free_device(self, address: int, nbytes: int) -> None:
        """Source: cuMemFree"""
        with self._lock:
            self._device.remove(nbytes)
        self._driver.cuMemFree(address)

    def allocate_pinned(self, nbytes: int) -> int:
        """Host pointer to ``nbytes`` page-locked bytes. Source: cuMemHostAlloc"""
        address = self._driver.cuMemHostAlloc(max(nbytes, 1), CU_MEMHOSTALLOC_PORTABLE)
        with self._lock:
            self._pinned.add(nbytes)
        return address

    def free_pinned(self, address: int, nbytes: int) -> None:
        """Source: cuMemFreeHost"""
        with self._lock:
            self._pinned.remove(nbytes)
        self._driver.cuMemFreeHost(address)

    def device_statistics(self) -> MemoryStatistics:
        with self._lock:
            return self._device.statistics()

    def pinned_statistics(self) -> MemoryStatistics:
        with self._lock:
            return self._pinned.statistics()
