"""The mock's execution context: checks what TensorRT checks, then puts one kernel on the stream."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from trtx_py._errors import CudaError, EngineError, ExecutionError, InvalidArgumentError, ShapeError, TrtxError
from trtx_py._types import Array, Shape, TensorInfo, TensorLocation, TensorMode
from trtx_py.backends.protocols import OutputAllocator

from ._arena import ALIGNMENT
from ._dtypes import from_bytes, tensor_dims, to_bytes
from ._faults import EXECUTE
from ._seam import LiveObject, Seam
from ._stream import DeviceFaultError, KernelError, Moment

if TYPE_CHECKING:
    from ._engine import MockEngine

__all__ = ["MockContext"]

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
    """

    kind = "execution context"

    def __init__(self, seam: Seam, engine: MockEngine, memory: int) -> None:
        super().__init__(seam, engine, engine.name)
        self._engine = engine
        self._memory = memory
        self._inputs = {t.name: t for t in engine.io_tensors if t.mode is TensorMode.INPUT}
        self._outputs = {t.name: t for t in engine.io_tensors if t.mode is TensorMode.OUTPUT}
        self._profile = -1
        self._switching: Moment | None = None
        self._last: Moment | None = None
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, OutputAllocator] = {}
        self._busy = threading.Lock()
        graph = engine.dims_model.graph
        self._dim_names = {v.name: tensor_dims(v.type.tensor_type) or () for v in graph.input if v.name in self._inputs}

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
            self._switching = self._seam.driver.launch(stream, lambda: None, call)
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
            if self._switching.stream.observed < self._switching.sequence:
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
        self._check_order(stream)
        try:
            shapes = self._resolve(values)
        except ValueError as error:
            raise self._refuse(f"the input shapes do not fit together: {error}") from error
        inputs = {n: (t, self._shapes[n], self._addresses[n]) for n, t in self._inputs.items() if n not in values}
        if any(-1 in shape for shape in shapes.values()):
            self._run_with_unknown_sizes(stream, shapes, inputs, values)
            return
        targets = {name: self._place(name, shape) for name, shape in shapes.items()}

        def kernel() -> None:
            results = self._compute(inputs, values, shapes)
            for name, (address, nbytes) in targets.items():
                self._write(name, address, nbytes, results[name])

        self._last = self._launch(stream, kernel)
        for name in self._allocators:
            self._allocators[name].notify_shape(name, shapes[name])

    def _run_with_unknown_sizes(
        self,
        stream: int,
        shapes: Mapping[str, Shape],
        inputs: Mapping[str, tuple[TensorInfo, Shape, int]],
        values: Mapping[str, Array],
    ) -> None:
        """Compute, wait, ask the allocators, then write: with unknown sizes TensorRT's enqueue synchronizes too."""
        for name, shape in shapes.items():
            if -1 in shape and name not in self._allocators:
                raise self._refuse(f"the size of output {name!r} depends on data: set an output allocator for it first")
            if -1 not in shape and name not in self._allocators:
                self._place(name, shape)
        results: dict[str, Array] = {}
        self._last = self._launch(stream, lambda: results.update(self._compute(inputs, values, shapes)))
        self._last.stream.wait(self._last.sequence)
        self._on_device(self._engine.device, _ENQUEUE, _execution_error)
        failure = self._last.stream.failure(self._last.sequence, clear=True)
        if failure is not None:
            raise self._refuse(failure)
        found = {name: array.shape for name, array in results.items()}
        targets = {name: self._place(name, shape) for name, shape in found.items()}

        def write() -> None:
            for name, (address, nbytes) in targets.items():
                self._write(name, address, nbytes, results[name])

        self._last = self._launch(stream, write)
        for name, allocator in self._allocators.items():
            allocator.notify_shape(name, found[name])

    def _launch(self, stream: int, kernel: Callable[[], None]) -> Moment:
        try:
            return self._seam.driver.launch(stream, kernel, _ENQUEUE)
        except CudaError as cause:
            raise self._seam.refuse(_ENQUEUE, str(cause), _execution_error, code="1: Cuda Driver") from cause

    def _compute(
        self,
        inputs: Mapping[str, tuple[TensorInfo, Shape, int]],
        values: Mapping[str, Array],
        shapes: Mapping[str, Shape],
    ) -> dict[str, Array]:
        """The kernel itself, on the stream's thread."""
        driver, settings = self._seam.driver, self._engine.settings
        outcome = self._seam.faults.enter(EXECUTE)
        if outcome is not None:
            raise DeviceFaultError(outcome.code, str(outcome))
        driver.clock.sleep(settings.duration_s)
        driver.device_view(self._memory, ALIGNMENT, f"kernel of {self}, activation memory")[:] = 0xEE
        feeds = dict(values)
        for name, (info, shape, address) in inputs.items():
            raw = driver.device_view(address, info.dtype.nbytes(shape), f"kernel of {self}, input {name!r}")
            feeds[name] = from_bytes(raw, info.dtype, shape)
        if not settings.compute and all(-1 not in shape for shape in shapes.values()):
            return {n: np.zeros(shapes[n], info.dtype.numpy) for n, info in self._outputs.items()}
        try:
            return self._engine.numerics.run(feeds)
        except Exception as error:  # the runners' exceptions share no base
            # a GPU reads and writes what it finds where values make no sense; it does not lose its context over them
            raise KernelError(f"kernel of {self} cannot compute these values: {error}") from error

    def _write(self, name: str, address: int, nbytes: int, array: Array) -> None:
        data = to_bytes(array, self._outputs[name].dtype)
        if data.size != nbytes:
            raise KernelError(
                f"kernel of {self}: output {name!r} has {data.size} bytes, and {nbytes} were expected from its shape"
            )
        view = self._seam.driver.device_view(address, nbytes, f"kernel of {self}, output {name!r}") if nbytes else None
        if view is not None:
            view[:] = data

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
        if self._last is None or self._last.reached:
            return
        try:
            ordered = self._seam.driver.is_ordered_after(stream, self._last, _ENQUEUE)
        except CudaError as cause:
            raise self._seam.refuse(_ENQUEUE, str(cause), _execution_error, code="1: Cuda Driver") from cause
        if not ordered:
            raise self._refuse(
                f"the context is still at work on stream {self._last.stream.handle:#x}, and stream {stream:#x} does "
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
            if self._seam.driver.is_device_address(address):
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
        # work that is still queued finds its activation memory gone, as on a GPU
        self._seam.driver.release(self._memory)
