"""Lets TensorRT ask Python for output memory while an engine runs."""

from __future__ import annotations

from typing import Any

from ..._errors import EngineError
from ..protocols import OutputAllocator
from ._vendor import Vendor


class AllocatorState:
    """What TensorRT asked of one output's allocator.

    Attributes:
        failure: what the allocator raised; TensorRT was told that there is no memory.
    """

    def __init__(self, allocator: OutputAllocator) -> None:
        self._allocator = allocator
        self.failure: BaseException | None = None

    def reallocate(self, name: str, current: int, nbytes: int, alignment: int) -> int:
        """Source: nvinfer1::IOutputAllocator::reallocateOutput"""
        try:
            return int(self._allocator.reallocate(name, current, nbytes, alignment))
        except BaseException as error:  # must not unwind through C++; raised again after the enqueue
            self.failure = self.failure or error
            return 0

    def notify_shape(self, name: str, dims: Any) -> None:
        """Source: nvinfer1::IOutputAllocator::notifyShape"""
        try:
            self._allocator.notify_shape(name, tuple(int(n) for n in dims))
        except BaseException as error:  # as above
            self.failure = self.failure or error


def make_allocator(vendor: Vendor, state: AllocatorState) -> Any:
    """An IOutputAllocator of the vendor's that calls ``state``."""
    base: Any = getattr(vendor.module, "IOutputAllocator", None)
    if base is None:
        raise EngineError(f"{vendor.title} has no IOutputAllocator; bind a buffer of the output's maximum size")

    class Allocator(base):  # type: ignore[misc]  # the base is known only at run time
        def __init__(self) -> None:
            base.__init__(self)

        def reallocate_output(self, tensor_name: str, memory: Any, size: int, alignment: int) -> int:
            return state.reallocate(tensor_name, int(memory or 0), size, alignment)

        def reallocate_output_async(self, tensor_name: str, memory: Any, size: int, alignment: int, stream: int) -> int:
            return state.reallocate(tensor_name, int(memory or 0), size, alignment)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            state.notify_shape(tensor_name, shape)

    return Allocator()
