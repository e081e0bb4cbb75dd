"""Running one inference at a time, blocking: through a captured graph where there is one, else TensorRT's enqueue."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np

from . import _native
from ._capture import ShapeKey
from ._errors import BorrowedError, CudaError, ExecutionError, MemoryBudgetError, TrtxError
from ._graphs import GraphCache
from ._inputs import Arrays, Given
from ._interop import DeviceView
from ._request import InferenceResult, Request
from ._site import ENQUEUED, LaneSite, OwnedContext, on_device
from ._types import Array, Shape, TensorInfo, TensorLocation
from .backends.protocols import CU_EVENT_DEFAULT, CUDA_ERROR_OUT_OF_MEMORY, STICKY_CUDA_ERRORS, BackendContext
from .cuda._array import DeviceArray
from .cuda._buffer import pinned_view
from .cuda._device import Device, Releases

_ALIGNMENT = 256  # of addresses that TensorRT takes


class _Staging:
    """Device memory of one tensor and the pinned memory it is copied from or to; grows, never shrinks.

    Device memory comes and goes in the order of the lane's stream, because cuMemFree and cuMemFreeHost wait for
    everything on the device and hold up every thread that calls the driver meanwhile, also those of other lanes. Pinned
    memory has no such order: what was outgrown is kept until there is more of it than of what is in use.
    """

    def __init__(self, site: LaneSite) -> None:
        self._site = site
        self._memory = site.access.memory
        self._owner = site.handle
        self.device = self.pinned = 0
        self._device_bytes = self._pinned_bytes = -1
        self._outgrown: list[tuple[int, int]] = []

    def reserve(self, nbytes: int) -> None:
        """Have ``nbytes`` of both; what was in them is gone then. Raises MemoryBudgetError, CudaError."""
        if nbytes > self._device_bytes:
            self._replace_device(nbytes)
        if nbytes > self._pinned_bytes:
            self._replace_pinned(nbytes)

    def array(self, shape: Shape, dtype: np.dtype[Any]) -> Array:
        count = int(np.prod(shape, dtype=np.int64))
        return pinned_view(self.pinned, count * dtype.itemsize).view(dtype).reshape(shape)

    def free_device(self) -> None:
        """Behind what is enqueued. Idempotent. Raises CudaError."""
        address, nbytes = self.device, self._device_bytes
        if not address:
            return
        try:
            self._memory.free_ordered(address, nbytes, self._site.stream)
        finally:
            if not self._memory.has(address):  # else it is still ours: the stream could not be waited for
                self.device, self._device_bytes = 0, -1
                self._owner.device_bytes -= nbytes

    def free_pinned(self) -> None:
        """All of it, also what was outgrown. Nothing may be running. Idempotent. Raises CudaError."""
        self._retire_pinned()
        self._free_outgrown()

    def _replace_device(self, nbytes: int) -> None:
        replaces = self.device != 0
        self.free_device()
        try:
            self.device = self._allocate_device(nbytes)
        except CudaError as error:
            if not replaces or error.code != CUDA_ERROR_OUT_OF_MEMORY:
                raise
            self._site.driver.cuStreamSynchronize(self._site.stream)  # what was just freed is not there before that
            self.device = self._allocate_device(nbytes)
        self._device_bytes = nbytes
        self._owner.device_bytes += nbytes

    def _allocate_device(self, nbytes: int) -> int:
        return self._memory.allocate_ordered(nbytes, self._site.stream, owner=self._purpose)

    def _replace_pinned(self, nbytes: int) -> None:
        pinned = self._memory.allocate_pinned(nbytes, owner=self._purpose)
        self._retire_pinned()
        self.pinned, self._pinned_bytes = pinned, nbytes
        self._owner.host_bytes += nbytes
        if sum(size for _, size in self._outgrown) > nbytes:
            self._site.driver.cuStreamSynchronize(self._site.stream)  # a request that failed may have left copies
            self._free_outgrown()

    def _retire_pinned(self) -> None:
        if self.pinned:
            self._outgrown.append((self.pinned, self._pinned_bytes))
            self.pinned, self._pinned_bytes = 0, -1

    def _free_outgrown(self) -> None:
        errors: list[CudaError] = []
        while self._outgrown:
            address, nbytes = self._outgrown.pop()
            self._owner.host_bytes -= nbytes
            try:
                self._memory.free_pinned(address, nbytes)
            except CudaError as error:  # the others are still due
                errors.append(error)
        if errors:
            raise errors[0]

    @property
    def _purpose(self) -> str:
        return f"a tensor that {self._owner} enqueues"


class _GrowingOutput:
    """Memory for an output whose size only the running engine knows. Source: nvinfer1::IOutputAllocator"""

    def __init__(self, staging: _Staging) -> None:
        self._staging = staging
        self.shape: Shape | None = None
        self.error: ExecutionError | None = None

    def reallocate(self, name: str, current: int, nbytes: int, alignment: int) -> int:
        try:
            self._staging.reserve(nbytes)  # the driver aligns to 256 bytes, more than TensorRT asks for
        except ExecutionError as error:  # no memory, or no budget: must not cross into TensorRT; run() raises it
            self.error = error
            return 0
        return self._staging.device

    def notify_shape(self, name: str, shape: Shape) -> None:
        self.shape = shape


class Execution:
    """The thread's side of one lane, or of one context of the caller's. Used by one thread at a time.

    Everything is made at the first run, so that an engine nobody asks costs nothing.

    Args:
        graphs: the lane's captured shapes; None for a context of the caller's own.
    """

    def __init__(self, site: LaneSite, graphs: GraphCache | None = None) -> None:
        self._site = site
        self._graphs = graphs
        self._access = site.access
        self._driver = site.driver
        self._inputs, self._outputs = site.inputs, site.outputs
        self._handle = site.handle
        self._staging = {t.name: _Staging(site) for t in on_device(site.inputs + site.outputs)}
        self._context: OwnedContext | None = None
        self.launched = False  # something of the latest request
        self._start = self._end = 0

    @property
    def contexts(self) -> int:
        """Execution contexts that exist."""
        return (self._context is not None) + (self._graphs.contexts if self._graphs is not None else 0)

    @property
    def holds_profile(self) -> bool:
        captured = self._graphs is not None and self._graphs.contexts > 0
        return captured or (self._context is not None and self._context.holds_profile)

    def open_context(self) -> BackendContext:
        """The execution context that enqueues, made if need be. The device must be current."""
        if self._context is None:
            self._context = OwnedContext(self._site)
        self._context.compute_in(ENQUEUED)
        return self._context.native

    def drop_context(self) -> None:
        """Give the context, and with it the optimization profile, back; buffers stay. Nothing may be running."""
        context, self._context = self._context, None
        if context is not None:
            context.destroy()

    def give_up_profiles(self, *, wait: bool = True) -> None:
        """Give all contexts back, those of captured shapes too. Raises BorrowedError while one is in use."""
        if self._graphs is not None:
            self._graphs.give_up(wait=wait)
        self.drop_context()

    def select_profile(self, candidates: Sequence[int]) -> None:
        """Bring the context into one of these profiles. The device must be current. Raises BorrowedError."""
        self.open_context()
        context = self._context
        assert context is not None
        try:
            context.select_profile(candidates)
        except BorrowedError:
            # It may be a captured shape of this very lane that has the profile.
            if self._graphs is None or not self._graphs.give_up():
                raise
            context.select_profile(candidates)

    def wants_capture(self, request: Request) -> ShapeKey | None:
        """The shape of a request that was served, if it recurs and ought to be captured now."""
        key = request.key
        return key if key is not None and self._graphs is not None and self._graphs.recurs(key) else None

    def run(self, request: Request) -> InferenceResult:
        """Copy in, enqueue, copy out, wait; returns arrays that the caller owns. Blocks without the interpreter lock.

        Raises ExecutionError, CudaError, BorrowedError; nothing of the request is in flight afterwards.
        """
        self.launched = False
        with self._access.current:
            if request.capture is not None:
                self._capture(request.capture, request)
                return _NOTHING
            place = self._find_place(request)
            if place is not None:
                return self._replay(request, place)
            try:
                return self._enqueue(request)
            except ExecutionError as error:
                if not is_out_of_memory(error) or self._graphs is None or not self._graphs.make_space():
                    raise
            return self._enqueue(request)

    def _find_place(self, request: Request) -> _native.Place | None:
        """A slot of the captured shape, if there is one and the request is one for it."""
        if self._graphs is None or request.timed or request.outputs_on is not None:
            return None
        if any(isinstance(array, DeviceView) for array in request.arrays.values()):
            return None
        request.key = ShapeKey.of(self._inputs, request.arrays)
        shape = self._graphs.find(request.key)
        place = shape.bucket.acquire() if shape is not None else None
        if shape is not None and place is not None:
            request.counted = not self._graphs.replayed(shape)
        return place

    def _capture(self, key: ShapeKey, request: Request) -> None:
        assert self._graphs is not None
        try:
            self._graphs.capture(key, request.profiles, self.drop_context, within=request.within, places=request.places)
            self._site.free_enqueued()  # less is enqueued from now on
        except BaseException as error:
            self._raise_with_cause(error)

    def _replay(self, request: Request, place: _native.Place) -> InferenceResult:
        """Through a slot of a captured shape, for what an event loop must not copy itself."""
        try:
            device_inputs = on_device(self._inputs)
            for tensor, view in zip(device_inputs, place.inputs, strict=True):
                array = request.arrays[tensor.name]
                assert isinstance(array, np.ndarray)  # _find_place sees to it
                np.copyto(view, array)
            wait = place.submit(None, False)
            self.launched = True
            wait.block(0)
            outputs = {name: np.array(view) for name, view in wait.result().items()}
            return self._result(request, outputs, 0.0)
        finally:
            place.release()

    def _enqueue(self, request: Request) -> InferenceResult:
        try:
            self._prepare()
            self.select_profile(request.profiles)
            if request.outputs_on is not None:
                return self._result(request, self._run_on_device(request, request.outputs_on), 0.0)
            outputs, keep = self._launch(request.arrays)
            self._driver.cuStreamSynchronize(self._site.stream)
        except BaseException as error:
            self._raise_with_cause(error)
        gpu_ms = self._driver.cuEventElapsedTime(self._start, self._end) if request.timed else 0.0
        result = {name: np.array(array) for name, array in outputs.items()}
        del keep
        return self._result(request, result, gpu_ms)

    @staticmethod
    def _result(request: Request, outputs: Mapping[str, Any], gpu_ms: float) -> InferenceResult:
        finished_ns = time.perf_counter_ns()
        return InferenceResult(
            outputs=outputs,
            latency_ms=(finished_ns - request.submitted_ns) / 1e6,
            queue_ms=(request.started_ns - request.submitted_ns) / 1e6,
            gpu_ms=gpu_ms,
        )

    def _prepare(self) -> None:
        if not self._start:
            self._start = self._driver.cuEventCreate(CU_EVENT_DEFAULT)
        if not self._end:
            self._end = self._driver.cuEventCreate(CU_EVENT_DEFAULT)

    def _launch(self, arrays: Given) -> tuple[Arrays, list[Array]]:
        """Enqueue everything; the output views are valid once the stream is synchronized, ``keep`` until then."""
        keep = self._set_inputs(self.open_context(), arrays)
        shapes, host = self._run_kernels({})
        outputs: Arrays = {}
        for tensor in self._outputs:
            if tensor.location is TensorLocation.HOST:
                outputs[tensor.name] = host[tensor.name]
                continue
            staging = self._staging[tensor.name]
            array = outputs[tensor.name] = staging.array(shapes[tensor.name], tensor.dtype.numpy)
            if array.nbytes:
                self._driver.cuMemcpyDtoHAsync(staging.pinned, staging.device, array.nbytes, self._site.stream)
        return outputs, keep

    def _run_on_device(self, request: Request, device: Device) -> dict[str, DeviceArray | Array | None]:
        """Outputs into memory that the caller gets; those that TensorRT writes on the host stay there."""
        context = self.open_context()
        made: dict[str, DeviceArray] = {}
        with contextlib.ExitStack() as undo:

            def make(tensor: TensorInfo, shape: Shape) -> DeviceArray:
                return undo.enter_context(DeviceArray._create(device, shape, tensor.dtype.numpy))

            try:
                keep = self._set_inputs(context, request.arrays)
                for tensor in on_device(self._outputs):
                    shape = context.get_tensor_shape(tensor.name)
                    if -1 not in shape:
                        made[tensor.name] = make(tensor, shape)
                addresses = {name: array.address for name, array in made.items()}
                shapes, host = self._run_kernels(addresses)
                for tensor in on_device(self._outputs):
                    if tensor.name not in made:
                        array = made[tensor.name] = make(tensor, shapes[tensor.name])
                        if array.nbytes:
                            source = self._staging[tensor.name].device
                            self._driver.cuMemcpyDtoDAsync(array.address, source, array.nbytes, self._site.stream)
                self._driver.cuStreamSynchronize(self._site.stream)
                del keep
            except BaseException:
                self._settle()  # before the arrays go: what is enqueued writes to them
                raise
            undo.pop_all()
        return {tensor.name: made.get(tensor.name, host.get(tensor.name)) for tensor in self._outputs}

    def _run_kernels(self, addresses: Mapping[str, int]) -> tuple[dict[str, Shape], Arrays]:
        """Enqueue TensorRT's part. Returns the outputs' shapes, and those that it writes on the host.

        Args:
            addresses: where outputs go on the device; the others go to this lane's staging memory.
        """
        context = self.open_context()
        shapes, host, growing = self._set_outputs(context, addresses)
        self._driver.cuEventRecord(self._start, self._site.stream)
        self.launched = True
        try:
            context.execute_async_v3(self._site.stream)
        except ExecutionError as error:
            self._raise_allocation_failure(growing, error)
            raise
        self._driver.cuEventRecord(self._end, self._site.stream)
        if growing:
            # The shapes of these are known, and their memory is final, only when the engine has run.
            self._driver.cuStreamSynchronize(self._site.stream)
            self._raise_allocation_failure(growing, None)
            for tensor in self._outputs:
                if tensor.name in growing:
                    shape = growing[tensor.name].shape
                    if shape is None:
                        raise ExecutionError(f"TensorRT never told the shape of output {tensor.name!r}")
                    self._staging[tensor.name].reserve(tensor.dtype.nbytes(shape))
                    shapes[tensor.name] = shape
        return shapes, host

    def _set_inputs(self, context: BackendContext, arrays: Given) -> list[Array]:
        keep: list[Array] = []
        for tensor in self._inputs:
            array = arrays[tensor.name]
            if isinstance(array, DeviceView):
                context.set_input_shape(tensor.name, array.shape)
                context.set_tensor_address(tensor.name, self._placed(tensor, array))
                continue
            if tensor.location is TensorLocation.HOST:
                values = np.array(array, order="C", ndmin=1)  # TensorRT reads these on the CPU, also after the enqueue
                keep.append(values)
                context.set_tensor_address(tensor.name, values.ctypes.data)
                continue
            staging = self._staging[tensor.name]
            staging.reserve(array.nbytes)
            if array.nbytes:
                np.copyto(staging.array(array.shape, array.dtype), array)
                self._driver.cuMemcpyHtoDAsync(staging.device, staging.pinned, array.nbytes, self._site.stream)
            context.set_input_shape(tensor.name, array.shape)
            context.set_tensor_address(tensor.name, staging.device)
        return keep

    def _placed(self, tensor: TensorInfo, view: DeviceView) -> int:
        """Where TensorRT shall read the caller's device memory: where it is, if its address is one TensorRT takes."""
        self._site.order_behind_producers()
        if view.nbytes and view.address % _ALIGNMENT == 0:
            return view.address
        staging = self._staging[tensor.name]
        staging.reserve(view.nbytes)
        if view.nbytes:
            self._driver.cuMemcpyDtoDAsync(staging.device, view.address, view.nbytes, self._site.stream)
        return staging.device

    def _set_outputs(
        self, context: BackendContext, addresses: Mapping[str, int]
    ) -> tuple[dict[str, Shape], Arrays, dict[str, _GrowingOutput]]:
        shapes: dict[str, Shape] = {}
        host: Arrays = {}
        growing: dict[str, _GrowingOutput] = {}
        for tensor in self._outputs:
            shape = shapes[tensor.name] = context.get_tensor_shape(tensor.name)
            if tensor.location is TensorLocation.HOST:
                host[tensor.name] = np.empty(shape, tensor.dtype.numpy)
                context.set_tensor_address(tensor.name, host[tensor.name].ctypes.data)
            elif -1 in shape:
                growing[tensor.name] = _GrowingOutput(self._staging[tensor.name])
                context.set_output_allocator(tensor.name, growing[tensor.name])
            else:
                address = addresses.get(tensor.name, 0)
                if not address:
                    self._staging[tensor.name].reserve(tensor.dtype.nbytes(shape))
                    address = self._staging[tensor.name].device
                context.set_tensor_address(tensor.name, address)
        return shapes, host, growing

    @staticmethod
    def _raise_allocation_failure(growing: dict[str, _GrowingOutput], cause: ExecutionError | None) -> None:
        for output in growing.values():
            if output.error is not None:
                raise output.error from cause

    def _raise_with_cause(self, error: BaseException) -> NoReturn:
        """``error`` again, once nothing runs any more, and because of the loss of the device if that is why."""
        lost = self._settle()
        if lost is not None and not any(isinstance(link, CudaError) for link in (error, error.__cause__)):
            raise error from lost  # TensorRT says only that it failed
        raise error

    def _settle(self) -> CudaError | None:
        """After a failure: what was enqueued before it still uses the buffers. Returns how the device was lost."""
        try:
            self._driver.cuStreamSynchronize(self._site.stream)
        except CudaError as error:
            return error if error.code in STICKY_CUDA_ERRORS else None
        return None

    def step_back(self) -> None:
        """As ``give_up_profiles`` on any thread; what cannot be destroyed is logged by TensorRT and left."""
        with contextlib.suppress(TrtxError), self._access.current:
            self.give_up_profiles()

    def rest(self) -> None:
        """Wait until the GPU is done with all that was launched on the lane."""
        self._site.rest()

    def release(self) -> None:
        """Give everything back, whatever part of it fails. Nothing is wanted any more; what runs is waited for."""
        driver, events = self._driver, (self._start, self._end)
        self._start = self._end = 0
        releases = Releases(self._access)
        releases.add(self._site.release)
        for event in filter(None, events):
            releases.add(partial(driver.cuEventDestroy, event))
        for staging in self._staging.values():
            releases.add(staging.free_pinned)
        if any(staging.device for staging in self._staging.values()):
            # Until the stream is waited for, the driver's pool keeps what is freed in its order from everybody else.
            releases.add(partial(driver.cuStreamSynchronize, self._site.stream))
        for staging in self._staging.values():
            releases.add(staging.free_device)
        if self._graphs is not None:
            releases.add(self._graphs.release)
        releases.add(self.drop_context)
        releases.add(self.rest)  # steps run last to first
        releases()


def is_out_of_memory(error: BaseException) -> bool:
    """There was no device memory, or no budget, for it."""
    return isinstance(error, MemoryBudgetError) or (
        isinstance(error, CudaError) and error.code == CUDA_ERROR_OUT_OF_MEMORY
    )


#: The outcome of a request to capture: it has no outputs.
_NOTHING = InferenceResult({}, 0.0, 0.0, 0.0)
