"""What is allocated, for whom and since when; and the budget that it must keep to."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from .._errors import CudaError, MemoryBudgetError
from ..backends.protocols import CU_MEMHOSTALLOC_PORTABLE, STICKY_CUDA_ERRORS, CudaDriver

_MEMORY_POOLS_SUPPORTED = 115  # CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED
_INVALID_VALUE = 1  # CUDA_ERROR_INVALID_VALUE: what a driver from before CUDA 11.2 says to that attribute
_NAMED_OWNERS = 3

Kind = Literal["device", "pinned", "tensorrt"]


@dataclass(frozen=True)
class MemoryStatistics:
    """Memory of one device, or pinned for it, as far as it was allocated through one Device or Runtime.

    Attributes:
        current_bytes: allocated now. Device memory that TensorRT allocates itself is in it: weights of engines, and
            execution contexts with memory of their own.
        peak_bytes: the most that was ever allocated at once.
        allocations: how often memory was allocated, freed or not.
        live: allocations that are not freed.
        budget_bytes: what ``current_bytes`` cannot exceed (``max_device_bytes``); None without a budget, and for pinned
            memory.
    """

    current_bytes: int
    peak_bytes: int
    allocations: int
    live: int
    budget_bytes: int | None = None


@dataclass(frozen=True)
class AllocationRecord:
    """One allocation that is not freed, as ``device.memory_allocations()`` lists it.

    Attributes:
        kind: "device", "pinned" (page-locked host memory) or "tensorrt" (device memory that TensorRT allocates).
        nbytes: size as asked for; the driver rounds it up.
        owner: what it is for, and of what object; "" if that was not said.
        address: device or host address; 0 for "tensorrt".
        wall_s: when it was allocated, as ``time.time()`` counts.
        monotonic_s: the same as ``time.monotonic()`` counts, for ages.
    """

    kind: Kind
    nbytes: int
    owner: str
    address: int
    wall_s: float
    monotonic_s: float


class Reservation:
    """Room in the budget for memory that something else allocates. Made by ``CountedMemory.reserve``."""

    def __init__(self, release: Callable[[], None], nbytes: int) -> None:
        self._release = release
        self.nbytes = nbytes

    def release(self) -> None:
        """Give the room back: the memory has been freed. Idempotent, on any thread."""
        self._release()


class _Figures:
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


class CountedMemory:
    """Allocates and frees through the driver, and keeps a record of each. Thread-safe; the device must be current.

    A budget bounds device memory: what is allocated here and what is reserved for others. It is claimed before the
    driver is asked and given back after the driver has freed, so that threads together never exceed it.

    Args:
        device: the CUdevice, to ask it for memory pools; None: it has none.
        max_bytes: the budget; None: there is none.
    """

    def __init__(self, driver: CudaDriver, device: int | None = None, max_bytes: int | None = None) -> None:
        self._driver = driver
        self._cu_device = device
        self._budget = max_bytes
        # Reentrant: the garbage collector can run in here, and free what somebody's __del__ closes.
        self._lock = threading.RLock()
        self._claimed = 0
        self._device = _Figures()
        self._pinned = _Figures()
        self._records: dict[tuple[Kind, int], AllocationRecord] = {}
        self._numbers = itertools.count(1)
        self._pools: bool | None = None
        self._kept: Counter[int] = Counter()  # pinned blocks that somebody writes to, whoever frees them
        self._due: set[int] = set()  # of these, the freed ones

    # plain memory

    def allocate_device(self, nbytes: int, *, owner: str = "") -> int:
        """Device pointer to ``nbytes`` bytes (one at least: TensorRT refuses null).

        Raises MemoryBudgetError before the driver is asked, CudaError after it. Source: cuMemAlloc
        """
        return self._allocate_device(nbytes, owner, partial(self._driver.cuMemAlloc, max(nbytes, 1)))

    def free_device(self, address: int, nbytes: int) -> None:
        """``nbytes`` as it was allocated, though it is the record that counts. Source: cuMemFree"""
        self._free("device", address, partial(self._driver.cuMemFree, address))

    def allocate_pinned(self, nbytes: int, *, owner: str = "") -> int:
        """Host pointer to ``nbytes`` page-locked bytes, which no budget bounds. Source: cuMemHostAlloc"""
        address = self._driver.cuMemHostAlloc(max(nbytes, 1), CU_MEMHOSTALLOC_PORTABLE)
        self._add("pinned", address, nbytes, owner)
        return address

    def free_pinned(self, address: int, nbytes: int) -> None:
        """As ``free_device``; what is kept goes when it is kept no more. Source: cuMemFreeHost"""
        with self._lock:
            if address in self._kept:
                self._due.add(address)
                return
        self._free("pinned", address, partial(self._driver.cuMemFreeHost, address))

    def keep_pinned(self, address: int) -> Callable[[], None]:
        """Keep the block that has this address, even if it is freed, until what is returned is called, once."""
        with self._lock:
            block = next(
                start
                for (kind, start), record in self._records.items()
                if kind == "pinned" and start <= address < start + max(record.nbytes, 1)
            )
            self._kept[block] += 1

        def let_go() -> None:
            with self._lock:
                self._kept[block] -= 1
                if self._kept[block]:
                    return
                del self._kept[block]
                if block not in self._due:
                    return
                self._due.remove(block)
            self.free_pinned(block, 0)

        return let_go

    # memory in the order of a stream

    def allocate_ordered(self, nbytes: int, stream: int, *, owner: str = "") -> int:
        """Device pointer that work enqueued on ``stream`` from now on may use; not while the stream is captured.

        From the device's default memory pool. Its release threshold is left at the driver's 0, because other libraries
        use the same pool: what is given back goes to the next one on the stream, or to the driver when the stream is
        waited for. So this is for what is kept, not for every request. Where there is no pool it is a plain allocation.
        Raises as ``allocate_device``. Source: cuMemAllocAsync
        """
        if not self._has_pools():
            return self.allocate_device(nbytes, owner=owner)
        return self._allocate_device(nbytes, owner, partial(self._driver.cuMemAllocAsync, max(nbytes, 1), stream))

    def free_ordered(self, address: int, nbytes: int, stream: int) -> None:
        """Free behind what is enqueued on ``stream``, for memory of ``allocate_ordered``; the budget has it at once.

        Without pools the stream is waited for. If that fails the memory stays allocated and counted, because work may
        still use it, unless the device is lost and the memory with it. Source: cuMemFreeAsync
        """
        if self._has_pools():
            self._free("device", address, partial(self._driver.cuMemFreeAsync, address, stream))
            return
        try:
            self._driver.cuStreamSynchronize(stream)
        except CudaError as error:
            if error.code in STICKY_CUDA_ERRORS:
                self._forget(("device", address))
            raise
        self.free_device(address, nbytes)

    def has(self, address: int) -> bool:
        """Whether device memory at ``address`` is allocated here: after a free that failed, whether it is still due."""
        with self._lock:
            return ("device", address) in self._records

    def _has_pools(self) -> bool:
        if self._pools is None:
            try:
                self._pools = self._cu_device is not None and bool(
                    self._driver.cuDeviceGetAttribute(_MEMORY_POOLS_SUPPORTED, self._cu_device)
                )
            except CudaError as error:
                if error.code != _INVALID_VALUE:
                    raise
                self._pools = False
        return self._pools

    # the budget

    def require(self, nbytes: int, what: str) -> None:
        """Raise MemoryBudgetError if ``nbytes`` more would not fit now; allocates and claims nothing."""
        with self._lock:
            self._check(nbytes, what)

    def reserve(self, nbytes: int, what: str) -> Reservation:
        """Count device memory that something else allocates, TensorRT as a rule, until the reservation is released.

        Raises MemoryBudgetError.
        """
        self._claim(nbytes, what)
        number = next(self._numbers)
        self._add("tensorrt", number, nbytes, what)
        return Reservation(partial(self._forget, ("tensorrt", number)), nbytes)

    def _claim(self, nbytes: int, what: str) -> None:
        with self._lock:
            self._check(nbytes, what)
            self._claimed += nbytes

    def _check(self, nbytes: int, what: str) -> None:
        if self._budget is not None and self._claimed + nbytes > self._budget:
            raise MemoryBudgetError(
                f"{what or 'an allocation'} needs {nbytes:,} bytes of device memory and does not fit: {self._usage()} "
                f"of the budget of {self._budget:,} bytes; close what is not needed (device.memory_allocations() lists "
                "what there is) or raise max_device_bytes",
                requested_bytes=nbytes,
                used_bytes=self._claimed,
                budget_bytes=self._budget,
            )

    def _usage(self) -> str:
        owners: Counter[str] = Counter()
        for record in self._records.values():
            if record.kind != "pinned":
                owners[record.owner or "unnamed allocations"] += record.nbytes
        biggest = [(owner, nbytes) for owner, nbytes in owners.most_common(_NAMED_OWNERS) if nbytes]
        names = [f"{nbytes:,} by {owner}" for owner, nbytes in biggest]
        rest = self._claimed - sum(nbytes for _, nbytes in biggest)
        if rest and names:
            names.append(f"{rest:,} by others")
        return f"{self._claimed:,} bytes are in use" + (f" ({', '.join(names)})" if names else "")

    # the records

    def _allocate_device(self, nbytes: int, owner: str, allocate: Callable[[], int]) -> int:
        self._claim(nbytes, owner)
        try:
            address = allocate()
        except BaseException:
            with self._lock:
                self._claimed -= nbytes
            raise
        self._add("device", address, nbytes, owner)
        return address

    def _free(self, kind: Kind, address: int, free: Callable[[], None]) -> None:
        # The record goes before the driver's call, behind which the address may be another thread's; the bytes go
        # after it, or that thread could exceed the budget. What has no record is the driver's to refuse.
        with self._lock:
            record = self._records.pop((kind, address), None)
        try:
            free()
        finally:
            if record is not None:
                self._uncount(record)

    def _forget(self, key: tuple[Kind, int]) -> None:
        with self._lock:
            record = self._records.pop(key, None)
        if record is not None:
            self._uncount(record)

    def _add(self, kind: Kind, key: int, nbytes: int, owner: str) -> None:
        address = 0 if kind == "tensorrt" else key
        record = AllocationRecord(kind, nbytes, owner, address, time.time(), time.monotonic())
        with self._lock:
            (self._pinned if kind == "pinned" else self._device).add(nbytes)
            self._records[kind, key] = record

    def _uncount(self, record: AllocationRecord) -> None:
        with self._lock:
            if record.kind == "pinned":
                self._pinned.remove(record.nbytes)
            else:
                self._device.remove(record.nbytes)
                self._claimed -= record.nbytes

    def allocations(self) -> tuple[AllocationRecord, ...]:
        """What is not freed, of all kinds, the biggest first and the oldest first among equals."""
        with self._lock:
            records = list(self._records.values())
        return tuple(sorted(records, key=lambda record: (-record.nbytes, record.monotonic_s)))

    def device_statistics(self) -> MemoryStatistics:
        return self._statistics(self._device, self._budget)

    def pinned_statistics(self) -> MemoryStatistics:
        return self._statistics(self._pinned, None)

    def _statistics(self, figures: _Figures, budget: int | None) -> MemoryStatistics:
        with self._lock:
            current, peak, allocations, live = figures.current, figures.peak, figures.allocations, figures.live
        return MemoryStatistics(current, peak, allocations, live, budget)
