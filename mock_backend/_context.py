"""The mock's execution context: checks what TensorRT checks, then puts one kernel on the stream."""

from __future__ import annotations

import ctypes
import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trtx_py._errors import CudaError, EngineError, ExecutionError, InvalidArgumentError, ShapeError, TrtxError
from trtx_py._types import Array, Shape, TensorInfo, TensorLocation, TensorMode
from trtx_py.backends.protocols import CU_STREAM_CAPTURE_STATUS_NONE, LayerProfiler, OutputAllocator

from ._driver import Position
from ._dtypes import from_bytes, tensor_dims
from ._kernel import ContextMemory, Kernel
from ._native import KernelError, Region, Stamp
from ._seam import LiveObject, Seam

if TYPE_CHECKING:
    from ._engine import MockEngine
    from ._layer_times import LayerTimes

__all__ = ["ALIGNMENT", "MockContext"]

#: Device pointers are multiples of this, as those of cuMemAlloc are.
ALIGNMENT = 256

_ENQUEUE = "IExecutionContext::enqueueV3"


def _engine_error(text: str, log: tuple[str, ...]) -> TrtxError:
    return EngineError(text, tensorrt_log=log)


def _execution_error(text: str, log: tuple[str, ...]) -> TrtxError:
    return ExecutionError(text, tensorrt_log=log)


def _argument_error(text: str, log: tuple[str, ...]) -> TrtxError:
    return InvalidArgumentError(text, tensorrt_log=log)


def _shape_error(text: str, log: tuple[str, ...]) -> TrtxError:
    return ShapeError(text, tensorrt_log=log)


class MockContext(LiveObject):
    """BackendContext of the mock.

    As TensorRT does, it accepts a shape outside the profile in set_input_shape and refuses it in execute_async_v3.
    What TensorRT leaves undefined is refused here: one context at work on two unordered streams, or in two threads;
    input shapes that are set before a change of profile has been synchronized; addresses not aligned to 256 bytes.
    An enqueue on a stream that is captured is recorded, if the latest one outside a capture had the same shapes,
    addresses, memory and host values. An enqueue with others makes the graphs that were captured before worthless:
    a replay is damage and poisons its outputs.

    Args:
        memory: address and size of its own activation memory; None for a context that is given some.
    """

    kind = "execution context"

    def __init__(self, seam: Seam, engine: MockEngine, memory: tuple[int, int] | None) -> None:
        super().__init__(seam, engine, engine.name)
        self._engine = engine
        self._own = memory is not None
        self._memory = self._memory_of(*memory) if memory is not None else None
        self._inputs = {t.name: t for t in engine.io_tensors if t.mode is TensorMode.INPUT}
        self._outputs = {t.name: t for t in engine.io_tensors if t.mode is TensorMode.OUTPUT}
        self._profile = -1
        self._switching: Position | None = None
        self._last: tuple[int, Position] | None = None
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, OutputAllocator] = {}
        self._busy = threading.Lock()
        self._profiler: LayerProfiler | None = None
        #: for the next enqueue with a profiler, made before it: an enqueue's time is not to have that in it
        self._next_times: LayerTimes | None = None
        #: of the latest enqueue with a profiler, and where it stands on its stream
        self._timed: tuple[LayerTimes, Position] | None = None
        #: what the latest enqueue outside a capture went by, and how many different ones there were before it
        self._settled: object = None
        self._settings = 0
        self._stamp = Stamp()
        graph = engine.dims_model.graph
        self._dim_names = {v.name: tensor_dims(v.type.tensor_type) or () for v in graph.input if v.name in self._inputs}

    def _memory_of(self, address: int, nbytes: int) -> ContextMemory:
        region = Region(self._seam.driver.mock, address, nbytes, f"kernels of {self}") if nbytes else None
        return ContextMemory(address, nbytes, region)

    @property
    def active_profile(self) -> int:
        return self._profile

    def take_profile(self, index: int) -> None:
        """Make ``index`` the active profile and forget all input shapes but the fixed ones."""
        self._profile = index
        self._shapes = {n: t.shape for n, t in self._inputs.items() if -1 not in t.shape}

    def set_profile(self, index: int, stream: int) -> None:
        call = "IExecutionContext::setOptimizationProfileAsync"
        self._alive(call, _engine_error)
        self._seam.enter("set_profile", _engine_error)
        self._on_device(self._engine.device, call, _engine_error)
        reason = self._engine.claim_profile(self, index)
        if reason:
            raise self._seam.refuse(call, reason, _engine_error)
        try:
            if self._is_captured(stream):
                self._seam.driver.cuStreamSynchronize(stream)  # as the caller has to; it fails, and ends the capture
            self._switching = self._seam.driver.launch(stream, None, call)
        except CudaError as cause:
            raise self._seam.refuse(call, str(cause), _engine_error, code="1: Cuda Driver") from cause
        self.take_profile(index)

    def set_input_shape(self, name: str, shape: Shape) -> None:
        """Raises ShapeError for a wrong rank or fixed dimension; the profile's limits are checked by execute alone."""
        call = "IExecutionContext::setInputShape"
        self._alive(call, _engine_error)
        self._seam.enter("set_input_shape", _shape_error)
        info = self._inputs.get(name)
        if info is None:
            text = f"{name!r} is not an input; inputs are {', '.join(map(repr, self._inputs))}"
            raise self._seam.refuse(call, text, _argument_error)
        if self._switching is not None:
            if not self._seam.driver.mock.is_observed(self._switching):
                text = (
                    "a change of the optimization profile is not complete: synchronize its stream before setting shapes"
                )
                raise self._seam.refuse(call, text, _engine_error)
            self._switching = None
        shape = tuple(int(n) for n in shape)
        if len(shape) != len(info.shape):
            raise self._seam.refuse(call, f"{info} has {len(info.shape)} dimensions, but {shape} was set", _shape_error)
        if any(n < 0 for n in shape) or any(e not in (-1, n) for e, n in zip(info.shape, shape, strict=True)):
            raise self._seam.refuse(call, f"static dimension mismatch: {info} cannot have shape {shape}", _shape_error)
        self._shapes[name] = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        """Not checked here, as TensorRT does not: execute_async_v3 and the kernel find out."""
        call = "IExecutionContext::setTensorAddress"
        self._alive(call, _engine_error)
        self._seam.enter("set_tensor_address", _argument_error)
        self._known(name, call)
        self._addresses[name] = int(address)

    def set_device_memory(self, address: int, nbytes: int) -> None:
        """Whether it is live memory shows when the kernel runs."""
        call = "IExecutionContext::setDeviceMemoryV2"
        self._alive(call, _engine_error)
        self._seam.enter("set_device_memory", _engine_error)
        needed = self._engine.activation_bytes(None)
        if self._own:
            text = "the context has memory of its own; make it with own_memory=False to give it some"
        elif nbytes < needed:
            text = f"{nbytes} bytes of device memory were given, and the engine needs {needed}"
        elif address % ALIGNMENT or (not address and needed):
            text = f"the device memory at 0x{address:x} is not aligned to {ALIGNMENT} bytes, or is none"
        else:
            self._memory = self._memory_of(address, needed)
            return
        raise self._seam.refuse(call, text, _argument_error)

    def set_aux_streams(self, streams: Sequence[int]) -> None:
        """Checked and not used: the mock's kernels have no parallel branches."""
        call = "IExecutionContext::setAuxStreams"
        self._alive(call, _engine_error)
        self._seam.enter("set_aux_streams", _engine_error)
        if 0 in streams or len(set(streams)) != len(streams):
            text = f"auxiliary streams must be different ones and not the default stream, and these are {list(streams)}"
            raise self._seam.refuse(call, text, _argument_error)

    def set_output_allocator(self, name: str, allocator: OutputAllocator | None) -> None:
        call = "IExecutionContext::setOutputAllocator"
        self._alive(call, _engine_error)
        self._seam.enter("set_output_allocator", _engine_error)
        if self._known(name, call).mode is not TensorMode.OUTPUT:
            raise self._seam.refuse(call, f"{name!r} is an input; only outputs have allocators", _argument_error)
        if allocator is None:
            self._allocators.pop(name, None)
        else:
            self._allocators[name] = allocator

    def set_profiler(self, profiler: LayerProfiler | None) -> None:
        self._alive("IExecutionContext::setProfiler", _engine_error)
        self._seam.enter("set_profiler", _engine_error)
        self._profiler, self._timed = profiler, None
        self._next_times = self._engine.layer_times() if profiler is not None else None

    def report_to_profiler(self) -> None:
        """One layer for each node that was computed; see LayerTimes."""
        call = "IExecutionContext::reportToProfiler"
        self._alive(call, _engine_error)
        self._seam.enter("report_to_profiler", _engine_error)
        if self._profiler is None or self._timed is None:
            text = "there is nothing to report: set a profiler, enqueue once and synchronize the stream before"
            raise self._seam.refuse(call, text, _engine_error)
        times, position = self._timed
        if not self._seam.driver.mock.is_observed(position):
            text = "the enqueue that was timed is not known to be over: synchronize its stream before"
            raise self._seam.refuse(call, text, _engine_error)
        self._timed = None
        for layer, ms in times.layers():
            self._profiler.report_layer_time(layer, ms)
        self._next_times = self._engine.layer_times()

    def get_tensor_shape(self, name: str) -> Shape:
        call = "IExecutionContext::getTensorShape"
        self._alive(call, _engine_error)
        self._seam.enter("get_tensor_shape", _engine_error)
        info = self._known(name, call)
        if info.mode is TensorMode.INPUT:
            return self._shapes.get(name, info.shape)
        try:
            return self._resolve(self._host_values())[name]
        except ValueError as error:
            raise self._seam.refuse(call, f"the input shapes do not fit together: {error}", _shape_error) from error

    def execute_async_v3(self, stream: int) -> None:
        self._alive(_ENQUEUE, _execution_error)
        if not self._busy.acquire(blocking=False):
            text = "two threads are in one execution context at once; give each its own context"
            raise self._seam.refuse(_ENQUEUE, text, _execution_error)
        try:
            self._enqueue(stream)
        finally:
            self._busy.release()

    def _enqueue(self, stream: int) -> None:
        self._seam.enter("execute_async_v3", _execution_error)
        self._on_device(self._engine.device, _ENQUEUE, _execution_error)
        if self._profile < 0:
            raise self._refuse(
                "the context has no optimization profile: the plan does not share profiles and another context has it; "
                "build with profile_sharing=True, or call set_profile with a free one"
            )
        values = self._host_values()
        self._check_inputs(values)
        memory = self._memory
        if memory is None and self._engine.activation_bytes(None):
            raise self._refuse("the context has no device memory: call set_device_memory before execute")
        captured = self._is_captured(stream)
        if captured and self._profiler is not None:
            raise self._refuse_capture(stream, "a profiler is set, and layers cannot be timed inside a capture")
        if not captured:
            self._check_order(stream)
        times, self._next_times = self._next_times, None
        if times is None and self._profiler is not None:
            times = self._engine.layer_times()
        try:
            shapes = self._resolve(values)
        except ValueError as error:
            raise self._refuse(f"the input shapes do not fit together: {error}") from error
        unknown = any(-1 in shape for shape in shapes.values())
        if captured and unknown:
            raise self._refuse_capture(
                stream, "outputs whose size depends on data make the enqueue wait for the stream"
            )
        targets = {} if unknown else {name: self._place(name, shape) for name, shape in shapes.items()}
        kernel = Kernel(
            name=str(self), driver=self._seam.driver, engine=self._engine,
            inputs={n: (t, self._shapes[n], self._addresses[n]) for n, t in self._inputs.items() if n not in values},
            values=values, shapes=shapes, outputs=self._outputs, targets=targets,
            memory=memory or ContextMemory(0, 0, None), stamp=self._stamp,
            settings=self._settle(stream, values, targets, captured=captured), captured=captured, times=times,
        )  # fmt: skip
        if unknown:
            self._run_with_unknown_sizes(stream, kernel)
        else:
            position = self._launch(lambda: kernel.launch(stream, _ENQUEUE))
            if not captured:
                self._last = (stream, position)
        if times is not None and self._last is not None:
            self._timed = times, self._last[1]
        if unknown:
            return
        for name in self._allocators:
            self._allocators[name].notify_shape(name, shapes[name])

    def _settle(
        self, stream: int, values: Mapping[str, Array], targets: Mapping[str, tuple[int, int]], *, captured: bool
    ) -> int:
        """The number of the settings that an enqueue goes by now."""
        memory = self._memory and (self._memory.address, self._memory.nbytes)
        host = {name: (value.shape, value.tobytes()) for name, value in values.items()}
        addresses = {name: self._addresses.get(name) for name in self._inputs if name not in values}
        settings = (self._profile, dict(self._shapes), addresses, host, dict(targets), memory)
        if settings != self._settled:
            if captured:
                raise self._refuse_capture(
                    stream,
                    "shapes, addresses, device memory or host values changed since the latest enqueue outside a "
                    "capture, so TensorRT may allocate and wait in this one: enqueue once before the capture begins",
                )
            self._settings += 1
            self._settled = settings
        return self._settings

    def _is_captured(self, stream: int) -> bool:
        return self._seam.driver.mock.capture_status(stream) != CU_STREAM_CAPTURE_STATUS_NONE

    def _refuse_capture(self, stream: int, why: str) -> TrtxError:
        """The error of an enqueue that does what no capture permits, which also makes the capture invalid."""
        try:
            self._seam.driver.cuStreamSynchronize(stream)
        except CudaError as cause:
            error = self._refuse(f"the stream is being captured: {why} ({cause.name})")
            error.__cause__ = cause
            return error
        return self._refuse(f"the stream was being captured: {why}")

    def _run_with_unknown_sizes(self, stream: int, kernel: Kernel) -> None:
        """Compute, wait, ask the allocators, then write: with unknown sizes TensorRT's enqueue synchronizes too."""
        for name, shape in kernel.shapes.items():
            if -1 in shape and name not in self._allocators:
                raise self._refuse(f"the size of output {name!r} depends on data: set an output allocator for it first")
            if -1 not in shape and name not in self._allocators:
                self._place(name, shape)
        driver, duration_s = self._seam.driver, self._engine.settings.duration_s
        results: dict[str, Array] = {}
        failures: list[KernelError] = []

        def compute() -> None:
            try:
                results.update(kernel.compute_first())
            except KernelError as error:
                failures.append(error)

        region = kernel.memory.region
        position = self._launch(
            lambda: driver.launch(stream, compute, _ENQUEUE, duration_s=duration_s, counted=True, region=region)
        )
        self._last = (stream, position)
        driver.mock.wait(position)
        self._on_device(self._engine.device, _ENQUEUE, _execution_error)
        if failures:
            raise self._refuse(str(failures[0]))
        found = {name: array.shape for name, array in results.items()}
        final = dataclasses.replace(kernel, targets={name: self._place(name, shape) for name, shape in found.items()})
        self._last = (stream, self._launch(lambda: driver.launch(stream, lambda: final.write(results), _ENQUEUE)))
        for name, allocator in self._allocators.items():
            allocator.notify_shape(name, found[name])

    def _launch(self, launch: Callable[[], Position]) -> Position:
        try:
            return launch()
        except CudaError as cause:
            raise self._seam.refuse(_ENQUEUE, str(cause), _execution_error, code="1: Cuda Driver") from cause

    def _place(self, name: str, shape: Shape) -> tuple[int, int]:
        """Address and size in bytes of an output; asks its allocator if it has one."""
        nbytes = self._outputs[name].dtype.nbytes(shape)
        allocator = self._allocators.get(name)
        if allocator is not None:
            # TensorRT asks for at least one byte, so that an empty output has an address too
            address = allocator.reallocate(name, self._addresses.get(name, 0), max(nbytes, 1), ALIGNMENT)
            if not address:
                raise self._refuse(f"the output allocator of {name!r} had no {nbytes} bytes to give")
            self._addresses[name] = address
        return self._address(name), nbytes

    def _address(self, name: str) -> int:
        address = self._addresses.get(name, 0)
        if not address:
            raise self._refuse(f"no address is set for tensor {name!r}; call set_tensor_address before execute")
        if address % ALIGNMENT:
            raise self._refuse(f"the address of {name!r}, 0x{address:x}, is not aligned to {ALIGNMENT} bytes")
        return address

    def _check_inputs(self, values: Mapping[str, Array]) -> None:
        sizes: dict[str, tuple[int, str]] = {}
        for name, info in self._inputs.items():
            limits = info.ranges[self._profile]
            if info.location is TensorLocation.HOST:
                if name not in values:
                    raise self._refuse(f"no address is set for shape tensor {name!r}: TensorRT reads it on the host")
                found = tuple(int(n) for n in values[name].reshape(-1))
                if info.is_shape_tensor and not limits.admits(found):
                    raise self._refuse(f"the values {found} of {info} are outside profile {self._profile}: {limits}")
                continue
            shape = self._shapes.get(name)
            if shape is None:
                raise self._refuse(f"the shape of {info} was not set; call set_input_shape")
            if not limits.admits(shape):
                raise self._refuse(
                    f"the shape {shape} of {info} is outside optimization profile {self._profile}: {limits}"
                )
            self._address(name)
            for dim, size in zip(self._dim_names.get(name, ()), shape, strict=False):
                if isinstance(dim, str):
                    first, where = sizes.setdefault(dim, (size, name))
                    if first != size:
                        raise self._refuse(
                            f"dimensions with name {dim} must be equal: {where} has {first}, {name} has {size}"
                        )

    def _check_order(self, stream: int) -> None:
        if self._last is None:
            return
        other, position = self._last
        if not self._seam.driver.mock.is_ordered_after(stream, position):
            raise self._refuse(
                f"the context is still at work on stream {other:#x}, and stream {stream:#x} does "
                "not wait for it: on a GPU the two runs would overwrite each other. Use one context per stream, or "
                "an event"
            )

    def _resolve(self, values: Mapping[str, Array]) -> dict[str, Shape]:
        return self._engine.shapes.resolve({n: self._shapes.get(n) for n in self._inputs}, values)

    def _host_values(self) -> dict[str, Array]:
        """A snapshot of the shape tensors that have an address."""
        values: dict[str, Array] = {}
        for name, info in self._inputs.items():
            address = self._addresses.get(name, 0)
            if info.location is not TensorLocation.HOST or not address:
                continue
            if self._seam.driver.mock.is_device_address(address):
                raise self._refuse(f"shape tensor {name!r} is read on the host, but 0x{address:x} is a device address")
            nbytes = info.dtype.nbytes(info.shape)
            raw = np.frombuffer(ctypes.string_at(address, nbytes), np.uint8)
            values[name] = from_bytes(raw, info.dtype, info.shape)
        return values

    def _known(self, name: str, call: str) -> TensorInfo:
        info = self._inputs.get(name) or self._outputs.get(name)
        if info is None:
            names = ", ".join(map(repr, [*self._inputs, *self._outputs]))
            raise self._seam.refuse(call, f"there is no tensor {name!r}; the engine has {names}", _argument_error)
        return info

    def _refuse(self, text: str) -> TrtxError:
        return self._seam.refuse(_ENQUEUE, text, _execution_error)

    def _release(self) -> None:
        self._engine.release_profile(self)
        self._stamp.end()
        if self._own and self._memory is not None:
            # work that is still queued finds its activation memory gone, as on a GPU
            self._seam.driver.release(self._memory.address)
        self._memory = None
