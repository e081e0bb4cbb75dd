"""Execution contexts of the caller's own: whole inferences, or the bare level, owned and checked."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ._arguments import checked_int, checked_shape, checked_timeout
from ._errors import BorrowedError, ExecutionError, InvalidArgumentError, ShapeError
from ._execution import Execution
from ._inputs import Arrays
from ._lane import Lanes
from ._request import Request
from ._resource import Loan, Resource
from ._site import LaneSite
from ._types import Shape, TensorInfo, TensorLocation, TensorMode
from .cuda._buffer import DeviceBuffer, PinnedBuffer
from .cuda._device import DeviceAccess, checked_peer
from .cuda._mark import Mark
from .cuda._stream import Stream

if TYPE_CHECKING:
    from ._engine import Engine


class ExecutionContext(Resource):
    """State of one inference at a time on an engine. Made by ``engine.create_execution_context()``.

    Use either ``execute`` or the bare level (``set_input_shape``, ``set_tensor_address``, ``enqueue_v3``): ``execute``
    sets shapes and addresses of its own and forgets those of the bare level.

    Source: nvinfer1::IExecutionContext
    """

    _engine: Engine
    _execution: Execution
    _lanes: Lanes
    _bare: _BareState

    def __init__(self) -> None:
        self._refuse_construction("engine.create_execution_context()")

    @classmethod
    def _create(cls, engine: Engine) -> ExecutionContext:
        context = cls.__new__(cls)
        access = engine._runtime.device._access
        with context._opening(engine) as handle:
            execution = Execution(LaneSite(access, engine._native, engine._tensors, engine._ledger, handle))
            handle.release = execution.release
            with engine._runtime._logger.attaching(), access.current:
                execution.open_context()
            lanes = Lanes(str(handle), 1, lambda: (execution, handle))
            bare = _BareState(access)
            context._engine, context._execution, context._lanes, context._bare = engine, execution, lanes, bare

            def busy() -> str | None:
                return lanes.busy() or bare.busy()

            def drain() -> None:
                lanes.drain()
                # A call of the bare level in another thread comes before this, or finds the context closing.
                with bare.lock:
                    try:
                        bare.finish()
                    finally:
                        bare.forget()  # whatever failed: cuMemFree waits for the device by itself

            handle.stop, handle.drain, handle.busy = lanes.refuse, drain, busy
        return context

    @property
    def engine(self) -> Engine:
        """The owner."""
        return self._engine

    @property
    def active_optimization_profile(self) -> int:
        """Index of the profile in use, -1 for none yet. Source: IExecutionContext::getOptimizationProfile"""
        with self._handle.lend("active_optimization_profile"), self._engine._runtime.device.current():
            return self._execution.open_context().active_profile

    async def execute(self, inputs: Mapping[str, Any]) -> Arrays:
        """Run one inference on this context; calls from several tasks run one after another.

        Inputs, results, errors and cancellation as ``engine.infer``.
        """
        return dict((await self._submit(inputs).wait()).outputs)

    def execute_sync(self, inputs: Mapping[str, Any], *, timeout_s: float | None = None) -> Arrays:
        """As ``execute``, blocking this thread; for threads, not for coroutines."""
        timeout = checked_timeout(timeout_s)  # before anything is submitted
        return dict(self._submit(inputs).wait_sync(timeout).outputs)

    def _submit(self, inputs: Mapping[str, Any]) -> Request:
        self._handle.require_open()
        arrays, profiles = self._engine._front.check(inputs)
        with self._bare.lock:
            in_flight = self._bare.busy()
            if in_flight:
                raise BorrowedError(f"{self._handle} cannot execute: {in_flight}; synchronize that stream first")
            self._bare.forget()
            request = Request(arrays, profiles)
            self._lanes.submit(request)
        return request

    # The bare level.

    def set_optimization_profile(self, index: int) -> None:
        """Select a profile and forget the shapes. Blocks until the switch is complete.

        Raises:
            BorrowedError: another context holds it and the plan does not share profiles.
        Source: nvinfer1::IExecutionContext::setOptimizationProfileAsync
        """
        self._handle.require_open()
        engine = self._engine
        index = checked_int(index, "profile", minimum=0, maximum=engine.num_optimization_profiles - 1)
        with self._idle(), engine._runtime._logger.attaching():
            self._execution.select_profile([index])
            self._bare.shapes.clear()

    def set_input_shape(self, name: str, shape: Any) -> None:
        """Set the shape of an input. The first call that no current profile admits selects one that does.

        Raises:
            ShapeError: not integers, wrong rank, or outside every profile; names the ranges.
            InvalidArgumentError: there is no such input, or it is a shape tensor, whose values count, not its shape.
            BorrowedError: other contexts hold the profiles that would do.
        Source: nvinfer1::IExecutionContext::setInputShape
        """
        tensor = self._tensor(name, TensorMode.INPUT)
        dims = checked_shape(shape, f"shape of {name!r}")
        if tensor.is_shape_tensor:
            raise InvalidArgumentError(
                f"{name!r} is a shape tensor: set its address to host memory that holds its values"
            )
        fits = len(dims) == len(tensor.shape) and all(w in (-1, h) for w, h in zip(tensor.shape, dims, strict=True))
        with self._idle(), self._engine._runtime._logger.attaching():
            wanted = {**self._bare.shapes, name: dims}
            candidates = [
                p for p in range(self._engine._native.num_profiles) if all(
                    not t.ranges or t.name not in wanted or t.is_shape_tensor or t.ranges[p].admits(wanted[t.name])
                    for t in self._engine._tensors
                )
            ]  # fmt: skip
            if not fits or not candidates:
                ranges = ", ".join(f"profile {p}: {limits}" for p, limits in enumerate(tensor.ranges))
                others = {other: dims for other, dims in self._bare.shapes.items() if other != name}
                raise ShapeError(
                    f"input {name!r}: shape {dims} does not fit; expected {tensor.shape}, {ranges or 'no dynamic axis'}"
                    + (f", in one profile with {others}" if others else "")
                )
            before = self._execution.open_context().active_profile
            self._execution.select_profile(candidates)
            context = self._execution.open_context()
            if context.active_profile != before:
                for other, other_dims in self._bare.shapes.items():
                    context.set_input_shape(other, other_dims)
            context.set_input_shape(name, dims)
            self._bare.shapes[name] = dims

    def get_tensor_shape(self, name: str) -> Shape:
        """Shape for the inputs set so far; -1 where it depends on data or on inputs that are not set.

        Source: nvinfer1::IExecutionContext::getTensorShape
        """
        self._tensor(name, None)
        with self._idle():
            return self._execution.open_context().get_tensor_shape(name)

    def set_tensor_address(self, name: str, memory: int | DeviceBuffer | PinnedBuffer) -> None:
        """Say where a tensor lies.

        Args:
            memory: a DeviceBuffer of the engine's device, which then cannot be closed before this context is, or before
                the address is replaced and what was enqueued with it has finished; a PinnedBuffer for a shape tensor
                on the host; or a bare pointer as an integer, for whose size and life the caller answers.
        Raises:
            InvalidArgumentError: no such tensor, null pointer, or memory of the wrong kind or device.
        Source: nvinfer1::IExecutionContext::setTensorAddress
        """
        tensor = self._tensor(name, None)
        wanted: type[DeviceBuffer | PinnedBuffer]
        wanted = PinnedBuffer if tensor.location is TensorLocation.HOST else DeviceBuffer
        nbytes: int | None = None
        loan: Loan | None = None
        lent: DeviceBuffer | PinnedBuffer | None = None
        if isinstance(memory, (DeviceBuffer, PinnedBuffer)):
            if not isinstance(memory, wanted):
                raise InvalidArgumentError(
                    f"{name!r} lies on the {tensor.location.value}: expected a {wanted.__name__}, got {memory!r}"
                )
            memory = checked_peer(memory, wanted, self._engine._runtime.device)
            address, nbytes, lent = memory.address, memory.nbytes, memory
            loan = memory._handle.lend(f"{self._handle} as the address of {name!r}", self._handle, keep=memory)
        else:
            address = checked_int(memory, f"address of {name!r}", minimum=1)
        try:
            with self._idle():
                self._execution.open_context().set_tensor_address(name, address)
                self._bare.set_address(name, nbytes, lent, loan)
        except BaseException:
            if loan is not None:
                loan.end()
            raise

    def enqueue_v3(self, stream: Stream | int) -> None:
        """Enqueue one inference on ``stream`` and return at once; outputs are there once the stream has come so far.

        Raises:
            ExecutionError: a shape or an address is not set, a buffer is too small, or TensorRT refuses. Nothing ran.
            InvalidArgumentError: the stream belongs to another device.
        Source: nvinfer1::IExecutionContext::enqueueV3
        """
        device = self._engine._runtime.device
        if isinstance(stream, Stream):
            value = checked_peer(stream, Stream, device).handle
        else:
            value = checked_int(stream, "stream", minimum=0)
        with self._idle(), self._engine._runtime._logger.attaching():
            context = self._execution.open_context()
            for tensor in self._engine._tensors:
                self._check_ready(tensor, context.get_tensor_shape(tensor.name))
            mark = self._bare.mark(value)  # before: an enqueue that nothing marks would be forgotten
            try:
                context.execute_async_v3(value)
            except BaseException:
                mark.disarm()
                raise
            mark.record(value)

    def _check_ready(self, tensor: TensorInfo, shape: Shape) -> None:
        if tensor.name not in self._bare.addresses:
            raise ExecutionError(f"{tensor.mode.value} {tensor.name!r} has no address; call set_tensor_address first")
        if -1 in shape:
            if tensor.mode is TensorMode.INPUT:
                raise ExecutionError(f"input {tensor.name!r} has no shape; call set_input_shape first")
            raise ExecutionError(
                f"the shape of output {tensor.name!r} is {shape}: it depends on data, which the bare level cannot give "
                "memory for; use execute() or engine.infer()"
            )
        have, need = self._bare.addresses[tensor.name], tensor.dtype.nbytes(shape)
        if have is not None and have < need:
            raise ExecutionError(
                f"{tensor.mode.value} {tensor.name!r} of shape {shape} needs {need} bytes, its buffer has {have}"
            )

    def _tensor(self, name: str, mode: TensorMode | None) -> TensorInfo:
        self._handle.require_open()
        for tensor in self._engine._tensors:
            if tensor.name == name and mode in (None, tensor.mode):
                return tensor
        known = ", ".join(str(t) for t in self._engine._tensors if mode in (None, t.mode))
        raise InvalidArgumentError(f"there is no {mode.value if mode else 'tensor'} {name!r}; the engine has {known}")

    @contextlib.contextmanager
    def _idle(self) -> Iterator[None]:
        """The bare level at work: open and not to be closed, the device current, no ``execute`` in flight."""
        with self._handle.lend("a call of the bare level"), self._bare.lock:
            self._handle.require_open()
            in_flight = self._lanes.at_work()
            if in_flight:
                raise BorrowedError(
                    f"{self._handle} is executing ({in_flight}); await that before using the bare level"
                )
            with self._engine._runtime.device._access.current:
                yield

    @property
    def _has_profile(self) -> bool:
        return self._execution.open_context().active_profile >= 0

    def _claim_profile(self) -> None:
        engine = self._engine
        with engine._runtime.device.current():
            self._execution.select_profile(range(engine._native.num_profiles))


class _BareState:
    """What the bare level has set: shapes, addresses with their sizes and loans, and what is still running."""

    def __init__(self, access: DeviceAccess) -> None:
        self.lock = threading.RLock()
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int | None] = {}
        self._loans: dict[str, tuple[DeviceBuffer | PinnedBuffer, Loan]] = {}
        self._access = access
        self._marks: list[Mark] = []  # of all that was enqueued and is not known to be over
        self._last: dict[int, Mark] = {}  # by stream: those that the next enqueue there may move on

    def set_address(
        self, name: str, nbytes: int | None, memory: DeviceBuffer | PinnedBuffer | None, loan: Loan | None
    ) -> None:
        self.addresses[name] = nbytes
        old = self._loans.pop(name, None)
        if memory is not None and loan is not None:
            self._loans[name] = memory, loan
        if old is not None:
            before, ended = old
            # What was enqueued uses the old memory to its end; what comes from now on does not, so the marks stay put.
            before._uses.add(self._running())
            self._last.clear()
            ended.end()

    def mark(self, stream: int) -> Mark:
        """The mark to record behind the next enqueue on ``stream``."""
        self._marks = self._running()
        mark = self._last.get(stream)
        if mark is None or not mark.arm():
            mark = self._last[stream] = Mark(self._access)
            self._marks = [*self._marks, mark]  # one assignment: busy() is asked from other threads, without the lock
        return mark

    def _running(self) -> list[Mark]:
        return [mark for mark in self._marks if not mark.over()]

    def busy(self) -> str | None:
        return "an inference of enqueue_v3 is not finished" if self._running() else None

    def finish(self) -> None:
        """Wait for what was enqueued."""
        marks, self._marks = self._marks, []
        self._last.clear()
        with contextlib.ExitStack() as stack:  # one that fails must not keep the others from being waited for
            for mark in marks:
                stack.callback(mark.wait)

    def forget(self) -> None:
        self.shapes.clear()
        self.addresses.clear()
        loans, self._loans = self._loans, {}
        for _, loan in loans.values():
            loan.end()
