"""Execution context: the calls of one inference, each checked before it and after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..._errors import EngineError, ExecutionError, InvalidArgumentError, ShapeError
from ..._types import Shape, TensorInfo, TensorMode
from .._flavours import output_allocator_refusal
from ..protocols import LayerProfiler, LogSink, OutputAllocator
from ._creation import MemorySetter
from ._guards import alive, checked_shape, deprecated_calls, unknown_tensor
from ._layer_profiler import ProfilerState, attach, detach
from ._output_allocator import AllocatorState, make_allocator
from ._vendor import Vendor

_MAX_ADDRESS = 2**64 - 1
_MEMORY_ALIGNMENT = 256


class Context:
    """Implements BackendContext. Used by one thread at a time.

    Args:
        memory_bytes: activation memory it computes in.
        memory_setter: how it is told where that memory is, None if it has allocated it.
        kept: what TensorRT needs for as long as the context is there.
    Source: nvinfer1::IExecutionContext
    """

    def __init__(
        self,
        vendor: Vendor,
        log: LogSink,
        handle: Any,
        *,
        tensors: Sequence[TensorInfo],
        num_profiles: int,
        title: str,
        lean_version: str | None,
        num_aux_streams: int,
        memory_bytes: int,
        memory_setter: MemorySetter | None,
        kept: Any,
    ) -> None:
        self._vendor = vendor
        self._log = log
        self._handle: Any = handle
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._num_profiles = num_profiles
        self._title = title
        self._lean_version = lean_version
        self._num_aux_streams = num_aux_streams
        self._memory_bytes = memory_bytes
        self._memory_setter = memory_setter
        self._lacks_memory = memory_setter is not None and memory_bytes > 0
        self._kept = kept
        self._unbound = set(self._tensors)
        # TensorRT borrows the allocators.
        self._allocators: dict[str, tuple[AllocatorState, Any]] = {}
        self._profiler: tuple[ProfilerState, Any] | None = None

    @property
    def active_profile(self) -> int:
        return int(alive(self._handle, "execution context").active_optimization_profile)

    def set_profile(self, index: int, stream: int) -> None:
        """Source: nvinfer1::IExecutionContext::setOptimizationProfileAsync"""
        context = alive(self._handle, "execution context")
        if not 0 <= index < self._num_profiles:
            raise EngineError(f"there is no optimization profile {index}; the engine has {self._num_profiles}")
        with self._vendor.router.operation(self._log) as operation:
            try:
                selected = context.set_optimization_profile_async(index, stream)
            except RuntimeError:  # how the bindings of version 10 say False
                selected = False
            if not selected or context.active_optimization_profile == -1:
                raise EngineError(
                    f"{self._title} did not give optimization profile {index} to this execution context: another "
                    f"context uses it; close that one, use another profile, or rebuild the plan with profile_sharing",
                    tensorrt_log=operation.lines,
                )

    def set_device_memory(self, address: int, nbytes: int) -> None:
        """Source: nvinfer1::IExecutionContext::setDeviceMemoryV2, setDeviceMemory"""
        context = alive(self._handle, "execution context")
        if self._memory_setter is None:
            raise InvalidArgumentError(
                "this execution context has activation memory of its own; create it with own_memory=False to give it "
                "other memory"
            )
        if nbytes < self._memory_bytes:
            # The older form is not told the size: kernels would write past the end.
            raise InvalidArgumentError(
                f"{nbytes} bytes of activation memory are too few; expected at least {self._memory_bytes}"
            )
        if not 0 < address <= _MAX_ADDRESS or address % _MEMORY_ALIGNMENT:
            raise InvalidArgumentError(
                f"activation memory cannot be at {address:#x}; expected an address that is a multiple of "
                f"{_MEMORY_ALIGNMENT}, as allocations of device memory are"
            )
        with self._vendor.router.operation(self._log) as operation:
            if self._memory_setter == "set_device_memory":
                context.set_device_memory(address, nbytes)
            else:
                with deprecated_calls():
                    context.device_memory = address
            if operation.errors:  # both return nothing
                raise EngineError(
                    f"{self._title} refused {nbytes} bytes at {address:#x} as activation memory",
                    tensorrt_log=operation.lines,
                )
        self._lacks_memory = False

    def set_aux_streams(self, streams: Sequence[int]) -> None:
        """Source: nvinfer1::IExecutionContext::setAuxStreams"""
        context = alive(self._handle, "execution context")
        found = [int(stream) for stream in streams]
        if any(not 0 < stream <= _MAX_ADDRESS for stream in found) or len(set(found)) < len(found):
            raise InvalidArgumentError(
                f"{found} cannot be auxiliary streams; expected streams that all differ, and not the default stream 0"
            )
        if self._num_aux_streams == 0:
            return
        with self._vendor.router.operation(self._log) as operation:
            context.set_aux_streams(found[: self._num_aux_streams])
            if operation.errors:  # it returns nothing
                raise EngineError(f"{self._title} refused the auxiliary streams {found}", tensorrt_log=operation.lines)

    def set_input_shape(self, name: str, shape: Shape) -> None:
        """Source: nvinfer1::IExecutionContext::setInputShape

        Raises:
            ShapeError: the shape is not in the active profile's range, which TensorRT would not say before it runs.
        """
        context = alive(self._handle, "execution context")
        tensor = self._tensor(name, TensorMode.INPUT)
        dims = checked_shape(name, shape)
        fits = len(dims) == len(tensor.shape) and all(
            size in (-1, n) for size, n in zip(tensor.shape, dims, strict=True)
        )
        if not fits:
            raise ShapeError(f"{tensor} cannot have the shape {list(dims)}")
        if not tensor.is_shape_tensor and -1 in tensor.shape:
            profile = int(context.active_optimization_profile)
            if profile < 0:
                raise EngineError(
                    "this execution context has no optimization profile, because another context uses it; select one "
                    "with set_profile, or rebuild the plan with profile_sharing"
                )
            if not tensor.ranges[profile].admits(dims):
                raise ShapeError(
                    f"{tensor}: shape {list(dims)} is outside {tensor.ranges[profile]}, the range of the active "
                    f"optimization profile {profile}"
                )
        with self._vendor.router.operation(self._log) as operation:
            if not context.set_input_shape(name, dims):
                raise ShapeError(
                    f"{self._title} refused the shape {list(dims)} for {tensor}", tensorrt_log=operation.lines
                )

    def set_tensor_address(self, name: str, address: int) -> None:
        """Source: nvinfer1::IExecutionContext::setTensorAddress"""
        context = alive(self._handle, "execution context")
        tensor = self._tensor(name)
        if not 0 <= address <= _MAX_ADDRESS:
            raise InvalidArgumentError(f"{tensor}: {address} is no address; expected 0 to 2**64 - 1")
        with self._vendor.router.operation(self._log) as operation:
            if not context.set_tensor_address(name, address):
                raise InvalidArgumentError(
                    f"{self._title} refused the address {address:#x} for {tensor}", tensorrt_log=operation.lines
                )
        if address:
            self._unbound.discard(name)
        else:
            self._unbound.add(name)

    def set_output_allocator(self, name: str, allocator: OutputAllocator | None) -> None:
        """Source: nvinfer1::IExecutionContext::setOutputAllocator"""
        context = alive(self._handle, "execution context")
        tensor = self._tensor(name, TensorMode.OUTPUT)
        refusal = output_allocator_refusal(self._vendor.title, self._lean_version)
        if refusal is not None and allocator is not None:
            raise EngineError(f"{tensor}: {refusal}")
        if allocator is None and name not in self._allocators:
            return
        entry = None
        if allocator is not None:
            state = AllocatorState(allocator)
            entry = (state, make_allocator(self._vendor, state))
        with self._vendor.router.operation(self._log) as operation:
            if not context.set_output_allocator(name, entry[1] if entry else None):
                raise EngineError(
                    f"{self._title} refused an output allocator for {tensor}", tensorrt_log=operation.lines
                )
        if entry is None:
            del self._allocators[name]
        else:
            self._allocators[name] = entry

    def set_profiler(self, profiler: LayerProfiler | None) -> None:
        """Source: nvinfer1::IExecutionContext::setProfiler, setEnqueueEmitsProfile"""
        context = alive(self._handle, "execution context")
        with self._vendor.router.operation(self._log) as operation:
            if profiler is not None:
                self._profiler = attach(self._vendor, context, profiler)
            elif self._profiler is not None:
                detach(context)
                self._profiler = None
            if operation.errors:  # it returns nothing
                raise EngineError(f"{self._title} refused the profiler", tensorrt_log=operation.lines)

    def report_to_profiler(self) -> None:
        """Source: nvinfer1::IExecutionContext::reportToProfiler"""
        context = alive(self._handle, "execution context")
        if self._profiler is None:
            raise EngineError("this execution context has no profiler; set one with set_profiler before the enqueue")
        state = self._profiler[0]
        with self._vendor.router.operation(self._log) as operation:
            told = context.report_to_profiler()
            failure, state.failure = state.failure, None
            if failure is not None:
                raise failure
            if not told:
                raise EngineError(
                    f"{self._title} told no layer times: enqueue once, not captured, and synchronize the stream before",
                    tensorrt_log=operation.lines,
                )

    def get_tensor_shape(self, name: str) -> Shape:
        """Source: nvinfer1::IExecutionContext::getTensorShape"""
        context = alive(self._handle, "execution context")
        tensor = self._tensor(name)
        with self._vendor.router.operation(self._log) as operation:
            try:
                return tuple(int(n) for n in context.get_tensor_shape(name))
            except (ValueError, RuntimeError) as error:
                # The bindings raise where TensorRT answers with a rank of -1: inputs missing or contradictory.
                raise ShapeError(
                    f"{self._title} has no shape for {tensor} with the inputs set so far: {error}",
                    tensorrt_log=operation.lines,
                ) from error

    def execute_async_v3(self, stream: int) -> None:
        """Source: nvinfer1::IExecutionContext::enqueueV3"""
        context = alive(self._handle, "execution context")
        if context.active_optimization_profile == -1:
            raise ExecutionError(
                "this execution context has no optimization profile, because another context uses it: nothing was "
                "enqueued; select one with set_profile, or rebuild the plan with profile_sharing"
            )
        if self._lacks_memory:
            raise ExecutionError(
                f"this execution context has no activation memory: nothing was enqueued; give it {self._memory_bytes} "
                f"bytes with set_device_memory"
            )
        missing = self._unbound.difference(self._allocators) if self._unbound else ()
        if missing:
            raise ExecutionError(f"no address is set for {', '.join(map(repr, sorted(missing)))}: nothing was enqueued")
        with self._vendor.router.operation(self._log) as operation:
            enqueued = context.execute_async_v3(stream)
            self._raise_allocator_failures()
            if not enqueued:
                raise ExecutionError(
                    f"{self._title} refused to enqueue the inference; nothing was enqueued"
                    f"{_capture_hint(operation.lines)}",
                    tensorrt_log=operation.lines,
                )

    def destroy(self) -> None:
        """Idempotent."""
        if self._handle is not None:
            with self._vendor.router.operation(self._log):
                self._handle = None
                self._allocators.clear()
                self._profiler = None
                self._kept = None

    def _raise_allocator_failures(self) -> None:
        for name, (state, _) in self._allocators.items():
            failure, state.failure = state.failure, None
            if isinstance(failure, Exception):
                raise ExecutionError(f"the output allocator of {name!r} failed: {failure}") from failure
            if failure is not None:
                raise failure

    def _tensor(self, name: str, mode: TensorMode | None = None) -> TensorInfo:
        tensor = self._tensors.get(name)
        if tensor is None or (mode is not None and tensor.mode is not mode):
            known = [one.name for one in self._tensors.values() if mode is None or one.mode is mode]
            unknown_tensor(name, known, mode.value if mode is not None else "tensor")
        return tensor


def _capture_hint(lines: Sequence[str]) -> str:
    """What to do where TensorRT's lines say that a stream capture stood in its way."""
    if not any("captur" in line.lower() for line in lines):
        return ""
    return (
        ": the stream is being captured, and this inference needs calls that a capture does not permit; enqueue it "
        "once with this shape before, or run it without a CUDA graph"
    )
