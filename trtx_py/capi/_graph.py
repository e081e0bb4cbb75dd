"""A graph of the C ABI: an engine, what its tensors are called and typed, and its captured shapes as addresses."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _native
from .._capture import NotCapturableError, ShapeKey
from .._engine import Engine
from .._errors import BorrowedError, TrtxError
from .._inputs import Given
from .._interop import DeviceView
from .._plan import Plan, PlanHeader
from .._request import InferenceResult, Request
from .._slot import _checked
from .._types import Array, Shape, TensorLocation, TensorMode
from ..backends._flavours import parse_version
from ..cuda._array import DeviceArray
from ..cuda._device import Device
from ._dtypes import CARRIERS, DType, of_engine
from ._memory import address_of, array_at, copy
from ._models import carried_in

#: By lane: its address, and of each slot the graph, the addresses of its inputs and those of its outputs.
Places = tuple[tuple[int, tuple[tuple[int, int, tuple[int, ...], tuple[int, ...]], ...]], ...]
#: (address, dims, on the device)
Input = tuple[int, Shape, bool]
#: (address, bytes, dims)
Output = tuple[int, int, Shape]
#: (0 input or 1 output, name, type, the engine's type, dims)
Port = tuple[int, str, int, int, Shape]

_ATTEMPTS = 50
_LOOK_S = 0.0005
_SHARES_ALWAYS = 10  # TensorRT's major version from which contexts share optimization profiles in any plan


class Captured:
    """A captured shape whose graphs stay until ``release``: C takes slots of them itself."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._buckets: list[_native.Bucket] = []  # one for each lane

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, buckets: tuple[_native.Bucket, ...]) -> None:
        """Answer for the pins of these. One that is here already is pinned once less."""
        with self._graph.pinning:
            new = [bucket for bucket in buckets if bucket not in self._buckets]
            self._graph.pinned += bool(new) and not self._buckets
            self._buckets += new
            self._graph.lanes.update(bucket.lane for bucket in new)
        for bucket in set(buckets) - set(new):
            _native.return_bucket(bucket)

    @property
    def outputs(self) -> tuple[Shape, ...]:
        return tuple(tuple(view.shape) for view in _native.bucket_outputs(self._buckets[0]))

    @property
    def places(self) -> Places:
        return tuple(_native.bucket_table(bucket) for bucket in self._buckets)

    def release(self) -> None:
        """The graphs may be evicted again, once the GPU has done what was launched of them. Idempotent."""
        with self._graph.pinning:
            buckets, self._buckets = self._buckets, []
            self._graph.pinned -= bool(buckets)
        for bucket in buckets:
            _native.return_bucket(bucket)


class Graph:
    """An open graph. Thread-safe.

    Attributes:
        engine: serves this graph alone.
        plan: what was built or loaded; None where nobody will ask.
        io: what the caller is told of the tensors, inputs first.
        pinned: captured shapes that the library has, under the lock ``pinning``.
        lanes: those that C launches on.
        on_close: told of the end.
    """

    def __init__(self, engine: Engine, plan: Plan | None) -> None:
        self.engine, self.plan = engine, plan
        self.inputs = tuple(t for t in engine.io_tensors if t.mode is TensorMode.INPUT)
        self.outputs = tuple(t for t in engine.io_tensors if t.mode is TensorMode.OUTPUT)
        carried = carried_in(engine.plan_header)
        tensors = (*self.inputs, *self.outputs)
        self._engine_types = {t.name: of_engine(t.dtype, t.name) for t in tensors}
        self._types = {
            name: carried[name] if name in carried and CARRIERS[carried[name]] is dtype else dtype
            for name, dtype in self._engine_types.items()
        }
        self.io: tuple[Port, ...] = tuple(
            (
                int(t.mode is TensorMode.OUTPUT),
                t.name,
                int(self._types[t.name]),
                int(self._engine_types[t.name]),
                t.shape,
            )
            for t in tensors
        )
        self.pinning = threading.Lock()
        self.pinned = 0
        self.lanes: set[_native.Lane] = set()
        self._exclusive = _is_exclusive(engine)
        self.on_close: Callable[[Graph], object] | None = None

    def dtype(self, name: str) -> DType:
        """What the tensor's elements are to the caller."""
        return self._types[name]

    def engine_dtype(self, name: str) -> DType:
        """What they are computed in."""
        return self._engine_types[name]

    @property
    def max_graphs(self) -> int:
        """How many captured shapes may be had at once."""
        return self.engine._options.max_graphs

    # Captured shapes

    def capture(self, shapes: tuple[Shape, ...]) -> Captured:
        """The captured graphs of a shape, on as many lanes as can have them, recorded now if need be; pinned.

        Args:
            shapes: of the inputs, in order.
        Raises:
            NotCapturableError: requests of this shape go through ``infer``.
            ShapeError: no optimization profile admits it.
            MemoryBudgetError, CudaError, EngineError: not now.
        """
        self._require_capturable()
        key = _checked(self.engine.io_tensors, dict(zip((t.name for t in self.inputs), shapes, strict=True)))
        captured = Captured(self)
        try:
            self._capture_into(captured, key)
        except BaseException:
            captured.release()
            raise
        return captured

    def _capture_into(self, captured: Captured, key: ShapeKey) -> None:
        front = self.engine._front
        shapes = tuple(shape for _, shape in key.shapes)
        for _ in range(_ATTEMPTS):
            failures: list[TrtxError] = []
            requests = front.capture_requests(key)
            for request in requests:
                try:
                    request.wait_sync(None)
                except TrtxError as error:
                    failures.append(error)
            # What one lane has stays pinned while another one, where it was evicted meanwhile, records it again.
            captured.take(_native.borrow_buckets(front.port, shapes))
            if len(captured) >= len(requests) - len(failures) > 0:
                failures.clear()  # their tracebacks refer to this frame
                return
            if failures:
                self._require_capturable()  # that the plan is exclusive may have come out just now
                raise failures.pop(0)
        if not captured:
            raise BorrowedError(
                f"the captured graph for {key} was given up for other shapes {_ATTEMPTS} times before it could be "
                "used; raise max_graphs, or use fewer shapes at once"
            )

    def _require_capturable(self) -> None:
        host = [t for t in (*self.inputs, *self.outputs) if t.location is TensorLocation.HOST]
        if host:
            raise NotCapturableError(
                f"{host[0]} lies on the host for TensorRT, and a captured graph would keep its values"
            )
        if self._exclusive or self.engine._ledger.exclusive:
            # What is captured keeps its context and so the profile, and no other shape could be served any more.
            raise NotCapturableError(
                f"the plan of {self.engine!r} lets one context at a time use an optimization profile; "
                "build it with profile sharing, or with a TensorRT from 10 on"
            )

    # Requests through Python

    def infer(self, inputs: tuple[Input, ...], *, on_device: bool) -> tuple[list[Array | DeviceArray], list[Output]]:
        """Run on the caller's memory, in the engine's types: results that the caller owns, and where they are.

        Raises as Engine.infer. Never waits for a slot: those that C has come back without a word to the port.
        """
        front, device = self.engine._front, self.engine.runtime.device
        self.engine._handle.require_open()
        given: Given = {}
        views: dict[str, DeviceView] = {}
        for tensor, (address, shape, there) in zip(self.inputs, inputs, strict=True):
            dtype = tensor.dtype.numpy
            if not there:
                given[tensor.name] = array_at(address, shape, dtype)
            elif tensor.location is TensorLocation.HOST:
                given[tensor.name] = _fetched(device, address, shape, dtype)
            else:
                view = DeviceView(address, shape, dtype, tensor.dtype.nbytes(shape), True, keep=None)
                given[tensor.name] = views[tensor.name] = view
        arrays, profiles = front.check(given, views)
        request = Request(arrays, profiles, outputs_on=device if on_device else None)
        front.lanes.submit(request)
        found = _to_the_end(request).outputs
        results = [_put(device, found[t.name]) if on_device else np.asarray(found[t.name]) for t in self.outputs]
        return results, [_where(result) for result in results]

    def close(self) -> None:
        """Close the engine. Raises BorrowedError while captured shapes are out, or requests in flight.

        Waits for what C gave back in flight, of which the engine knows nothing.
        """
        with self.pinning:
            if self.pinned:
                raise BorrowedError(f"{self.engine!r} has {self.pinned} captured shapes that are still in use")
        self.settle()
        self.engine.close()
        if self.on_close is not None:
            self.on_close(self)

    def settle(self) -> None:
        """Wait until the GPU has done what C launched; nothing new comes."""
        with self.pinning:
            lanes, self.lanes = self.lanes, set()
        while not self.engine.closed and any(lane.poll() for lane in lanes):
            time.sleep(_LOOK_S)


def _fetched(device: Device, address: int, shape: Shape, dtype: np.dtype[Any]) -> Array:
    host = np.empty(shape, dtype)
    copy(device, address_of(host), False, address, True, host.nbytes)
    return host


def _put(device: Device, array: Any) -> DeviceArray:
    """On the device also what TensorRT writes on the host."""
    if isinstance(array, DeviceArray):
        return array
    made = DeviceArray._create(device, array.shape, array.dtype)
    try:
        copy(device, made.address, True, address_of(array), False, array.nbytes)
    except BaseException:
        made.close()
        raise
    return made


def _where(result: Array | DeviceArray) -> Output:
    address = result.address if isinstance(result, DeviceArray) else address_of(result)
    return address if result.nbytes else 0, result.nbytes, tuple(result.shape)


def _is_exclusive(engine: Engine) -> bool:
    """Whether the plan lets one context at a time use a profile. Where it might, two contexts are made to find out."""
    if not _might_be_exclusive(engine.plan_header):
        return False
    if all(limits.min == limits.max for tensor in engine.io_tensors for limits in tensor.ranges):
        return False
    with contextlib.suppress(TrtxError), engine.create_execution_context(), engine.create_execution_context():
        pass  # the refusal of the second one is noted in the engine's ledger
    return engine._ledger.exclusive


def _might_be_exclusive(header: PlanHeader) -> bool:
    if header.flavour == "tensorrt_rtx" or parse_version(header.version)[0] >= _SHARES_ALWAYS:
        return False
    return header.is_raw or not header.build_options.get("profile_sharing", True)


def _to_the_end(request: Request) -> InferenceResult:
    """Wait for a request that works on the caller's memory: until it is over, whatever interrupts this thread."""
    ended = threading.Event()
    request.when_ended(ended.set)
    interrupted: BaseException | None = None
    while not ended.is_set():
        try:
            ended.wait()
        except BaseException as error:  # KeyboardInterrupt, say: told once nobody uses the memory any more
            interrupted = error
    if interrupted is not None:
        raise interrupted
    return request.outcome()
