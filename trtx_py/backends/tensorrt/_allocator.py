"""An IGpuAllocator that allocates where device memory is counted."""

from __future__ import annotations

import threading
from typing import Any

from ..._errors import BuilderError, TrtxError
from ..protocols import DeviceMemory
from ._vendor import Vendor

#: What cuMemAlloc aligns to; TensorRT asks for no more.
_ALIGNMENT = 256


class CountedAllocations:
    """What the allocator does, without the vendor's class. Called from threads of TensorRT's own choice.

    Source: nvinfer1::IGpuAllocator
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._sizes: dict[int, int] = {}

    def allocate(self, nbytes: int, alignment: int) -> int:
        """The address, 0 if there is no memory or the budget has no room: nothing may unwind through C++."""
        if nbytes == 0 or alignment > _ALIGNMENT:
            return 0
        try:
            address = self._memory.allocate_device(nbytes, owner="TensorRT, while it builds")
        except (TrtxError, MemoryError):
            return 0
        with self._lock:
            self._sizes[address] = nbytes
        return address

    def free(self, address: int) -> bool:
        """False for memory that did not come from here."""
        if address == 0:
            return True
        with self._lock:
            nbytes = self._sizes.pop(address, None)
        if nbytes is None:
            return False
        try:
            self._memory.free_device(address, nbytes)
        except TrtxError:
            return False
        return True


def make_allocator(vendor: Vendor, memory: DeviceMemory) -> Any:
    """An IGpuAllocator of the vendor's. Raises BuilderError where the bindings have none to derive from."""
    base: Any = getattr(vendor.module, "IGpuAllocator", None)
    if base is None:
        raise BuilderError(f"{vendor.title} has no IGpuAllocator in its bindings; leave account_memory unset")
    counted = CountedAllocations(memory)

    class Allocator(base):  # type: ignore[misc]  # the base is known only at run time
        def __init__(self) -> None:
            base.__init__(self)

        def allocate(self, size: int, alignment: int, flags: int) -> int:
            return counted.allocate(size, alignment)

        def deallocate(self, memory: int) -> bool:
            return counted.free(memory)

        def allocate_async(self, size: int, alignment: int, flags: int, stream: int) -> int:
            return counted.allocate(size, alignment)

        def deallocate_async(self, memory: int, stream: int) -> bool:
            return counted.free(memory)

        def reallocate(self, address: int, alignment: int, new_size: int) -> int:
            return 0  # "cannot be done in place", after which TensorRT allocates and copies

    return Allocator()
