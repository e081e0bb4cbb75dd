"""Running one inference at a time on one execution context: the blocking part of a lane."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ._errors import CudaError, ExecutionError, TrtxError
from ._inputs import Arrays
from ._profiles import ProfileLedger
from ._request import InferenceResult, Request
from ._resource import Handle
from ._types import Array, Shape, TensorInfo, TensorLocation, TensorMode
from .backends.protocols import (
    CU_EVENT_DEFAULT,
    CU_STREAM_NON_BLOCKING,
    STICKY_CUDA_ERRORS,
    BackendContext,
    BackendEngine,
)
from .cuda._buffer import pinned_view
from .cuda._device import DeviceAccess, Releases


class _Staging:
    """Device memory of one tensor and the pinned memory it is copied from or to; grows, never shrinks."""

    def __init__(self, access: DeviceAccess, owner: Handle) -> None:
        self._memory = access.memory
        self._owner = owner
        self.device = self.pinned = 0
        self._capacity = -1

    def reserve(self, nbytes: int) -> None:
        if nbytes <= self._capacity:
            return
        self.free()
        device = self._memory.allocate_device(nbytes)
        try:
            pinned = self._memory.allocate_pinned(nbytes)
        except BaseException:
            self._memory.free_device(device, nbytes)
            raise
        self.device, self.pinned, self._capacity = device, pinned, nbytes
        self._owner.device_bytes += nbytes
        self._owner.host_bytes += nbytes

    def array(self, shape: Shape, dtype: np.dtype[Any]) -> Array:
        count = int(np.prod(shape, dtype=np.int64))
        return pinned_view(self.pinned, count * dtype.itemsize).view(dtype).reshape(shape)

    def free(self) -> None:
        device, pinned, nbytes = self.device, self.pinned, self._capacity
        self.device = self.pinned = 0
        self._capacity = -1
        try:
            if device:
                self._owner.device_bytes -= nbytes
                self._memory.free_device(device, nbytes)
        finally:
            if pinned:
                self._owner.host_bytes -= nbytes
                self._memory.free_pinned(pinned, nbytes)


class _GrowingOutput:
    """Memory for an output whose size only the running engine knows. Source: nvinfer1::IOutputAllocator"""

    def __init__(self, staging: _Staging) -> None:
        self._staging = staging
        self.shape: Shape | None = None
        self.error: CudaError | None = None

    def reallocate(self, name: str, current: int, nbytes: int, alignment: int) -> int:
        try:
            self._staging.reserve(nbytes)  # cuMemAlloc aligns to 256 bytes, more than TensorRT asks for
        except CudaError as error:  # must not cross into TensorRT; run() raises it
            self.error = error
            return 0
        return self._staging.device

    def notify_shape(self, name: str, shape: Shape) -> None:
        self.shape = shape


class Execution:
    """One execution context with its stream, events and buffers. Used by one thread at a time.

    Everything is made at the first run, so that an engine nobody asks costs nothing.
    """

    def __init__(
        self,
        access: DeviceAccess,
        engine: BackendEngine,
        tensors: Sequence[TensorInfo],
        ledger: ProfileLedger,
        handle: Handle,
    ) -> None:
        self._access = access
        self._driver = access.driver
        self._engine = engine
        self._inputs = [t for t in tensors if t.mode is TensorMode.INPUT]
        self._outputs = [t for t in tensors if t.mode is TensorMode.OUTPUT]
        self._ledger = ledger
        self._handle = handle
        self._staging = {t.name: _Staging(access, handle) for t in tensors if t.location is TensorLocation.DEVICE}
        self._context: BackendContext | None = None
        self._activation_bytes = 0
        self._stream = 0
        self._start = self._end = 0

    @property
    def has_context(self) -> bool:
        return self._context is not None

    @property
    def holds_profile(self) -> bool:
        return self._context is not None and self._context.active_profile >= 0

    def open_context(self) -> BackendContext:
        """The execution context, made if need be. The device must be current."""
        if self._context is None:
            nbytes = self._engine.device_memory_bytes(None)
            self._context = self._ledger.create(self._handle, self._engine.create_context)
            self._activation_bytes = nbytes
            self._handle.device_bytes += self._activation_bytes
        return self._context

    def drop_context(self) -> None:
        """Give the context, and with it the optimization profile, back; buffers stay. Nothing may be running."""
        context, self._context = self._context, None
        if context is not None:
            self._handle.device_bytes -= self._activation_bytes
            try:
                context.destroy()
            finally:
                self._ledger.left(self._handle)

    def select_profile(self, candidates: Sequence[int]) -> None:
        """Bring the context into one of these profiles. The device must be current. Raises BorrowedError."""
        context = self.open_context()
        if self._ledger.select(self._handle, context, candidates, self._stream):
            self._driver.cuStreamSynchronize(self._stream)

    def run(self, request: Request) -> InferenceResult:
        """Copy in, enqueue, copy out, wait; returns arrays that the caller owns. Blocks without the interpreter lock.

        Raises ExecutionError, CudaError, BorrowedError; nothing of the request is in flight afterwards.
        """
        with self._access.current:
            try:
                self._prepare()
                self.select_profile(request.profiles)
                outputs, keep = self._launch(request.arrays)
                self._driver.cuStreamSynchronize(self._stream)
            except BaseException as error:
                lost = self._settle()
                if lost is not None and error.__cause__ is None and not isinstance(error, CudaError):
                    raise error from lost  # TensorRT says only that it failed; this is why
                raise
            finished_ns = time.perf_counter_ns()
            gpu_ms = self._driver.cuEventElapsedTime(self._start, self._end) if request.timed else 0.0
            result = {name: np.array(array) for name, array in outputs.items()}
            del keep
        return InferenceResult(
            outputs=result,
            latency_ms=(finished_ns - request.submitted_ns) / 1e6,
            queue_ms=(request.started_ns - request.submitted_ns) / 1e6,
            gpu_ms=gpu_ms,
        )

    def _prepare(self) -> None:
        if not self._stream:
            self._stream = self._driver.cuStreamCreate(CU_STREAM_NON_BLOCKING)
        if not self._start:
            self._start = self._driver.cuEventCreate(CU_EVENT_DEFAULT)
        if not self._end:
            self._end = self._driver.cuEventCreate(CU_EVENT_DEFAULT)

    def _launch(self, arrays: Arrays) -> tuple[Arrays, list[Array]]:
        """Enqueue everything; the output views are valid once the stream is synchronized, ``keep`` until then."""
        context = self.open_context()
        keep = self._set_inputs(context, arrays)
        outputs, growing = self._set_outputs(context)
        self._driver.cuEventRecord(self._start, self._stream)
        try:
            context.execute_async_v3(self._stream)
        except ExecutionError as error:
            self._raise_allocation_failure(growing, error)
            raise
        self._driver.cuEventRecord(self._end, self._stream)
        if growing:
            # The shapes of these are known, and their memory is final, only when the engine has run.
            self._driver.cuStreamSynchronize(self._stream)
            self._raise_allocation_failure(growing, None)
            for tensor in self._outputs:
                if tensor.name in growing:
                    shape = growing[tensor.name].shape
                    if shape is None:
                        raise ExecutionError(f"TensorRT never told the shape of output {tensor.name!r}")
                    staging = self._staging[tensor.name]
                    staging.reserve(tensor.dtype.nbytes(shape))
                    outputs[tensor.name] = staging.array(shape, tensor.dtype.numpy)
        for tensor in self._outputs:
            array = outputs[tensor.name]
            if tensor.location is TensorLocation.DEVICE and array.nbytes:
                staging = self._staging[tensor.name]
                self._driver.cuMemcpyDtoHAsync(staging.pinned, staging.device, array.nbytes, self._stream)
        return outputs, keep

    def _set_inputs(self, context: BackendContext, arrays: Arrays) -> list[Array]:
        keep: list[Array] = []
        for tensor in self._inputs:
            array = arrays[tensor.name]
            if tensor.location is TensorLocation.HOST:
                values = np.array(array, order="C", ndmin=1)  # TensorRT reads these on the CPU, also after the enqueue
                keep.append(values)
                context.set_tensor_address(tensor.name, values.ctypes.data)
                continue
            staging = self._staging[tensor.name]
            staging.reserve(array.nbytes)
            if array.nbytes:
                np.copyto(staging.array(array.shape, array.dtype), array)
                self._driver.cuMemcpyHtoDAsync(staging.device, staging.pinned, array.nbytes, self._stream)
            context.set_input_shape(tensor.name, array.shape)
            context.set_tensor_address(tensor.name, staging.device)
        return keep

    def _set_outputs(self, context: BackendContext) -> tuple[Arrays, dict[str, _GrowingOutput]]:
        outputs: Arrays = {}
        growing: dict[str, _GrowingOutput] = {}
        for tensor in self._outputs:
            shape = context.get_tensor_shape(tensor.name)
            dtype = tensor.dtype.numpy
            if tensor.location is TensorLocation.HOST:
                outputs[tensor.name] = np.empty(shape, dtype)
                context.set_tensor_address(tensor.name, outputs[tensor.name].ctypes.data)
            elif -1 in shape:
                growing[tensor.name] = _GrowingOutput(self._staging[tensor.name])
                context.set_output_allocator(tensor.name, growing[tensor.name])
            else:
                staging = self._staging[tensor.name]
                staging.reserve(tensor.dtype.nbytes(shape))
                outputs[tensor.name] = staging.array(shape, dtype)
                context.set_tensor_address(tensor.name, staging.device)
        return outputs, growing

    @staticmethod
    def _raise_allocation_failure(growing: dict[str, _GrowingOutput], cause: ExecutionError | None) -> None:
        for output in growing.values():
            if output.error is not None:
                raise output.error from cause

    def _settle(self) -> CudaError | None:
        """After a failure: what was enqueued before it still uses the buffers. Returns how the device was lost."""
        if self._stream:
            try:
                self._driver.cuStreamSynchronize(self._stream)
            except CudaError as error:
                return error if error.code in STICKY_CUDA_ERRORS else None
        return None

    def step_back(self) -> None:
        """As ``drop_context`` on any thread; a context that cannot be destroyed is logged by TensorRT and left."""
        with contextlib.suppress(TrtxError), self._access.current:
            self.drop_context()

    def release(self) -> None:
        """Give everything back, whatever part of it fails. Nothing may be running."""
        driver, stream, events = self._driver, self._stream, (self._start, self._end)
        self._start = self._end = self._stream = 0
        releases = Releases(self._access)
        if stream:
            releases.add(lambda: driver.cuStreamDestroy(stream))
        for event in filter(None, events):
            releases.add(partial(driver.cuEventDestroy, event))
        for staging in self._staging.values():
            releases.add(staging.free)
        releases.add(self.drop_context)  # steps run last to first
        releases()
