"""Recording one input shape: contexts, device buffers, and for each slot pinned memory and a CUDA graph.

A graph holds the copies in, TensorRT's kernels and the copies out. TensorRT is asked once, here; what is replayed later
needs neither TensorRT nor Python. A large request may be recorded in parts that are branches of one graph, so that the
copies of one part overlap with the kernels of another.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _native
from ._errors import CudaError, EngineError, ExecutionError, TrtxError
from ._inputs import Given
from ._site import ENQUEUED, DeviceBlock, LaneSite, OwnedContext, PinnedBlock, on_device
from ._types import Array, Shape, TensorInfo, TensorLocation
from .backends.protocols import CU_EVENT_DISABLE_TIMING, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
from .cuda._buffer import pinned_view

_log = logging.getLogger("trtx_py")

#: What outputs are filled with before a canary runs. As float32 it is -2.9e-16, in half -0.022: no plausible result.
POISON = 0xA5
#: Arrays up to this size are copied by whoever submits, which may be an event loop.
ON_LOOP_BYTES = 64 << 10
_ALIGNMENT = 256
_TIMED_RUNS = 5


class NotCapturableError(ExecutionError):
    """This shape cannot be recorded; it is served by TensorRT's enqueue. The text says why."""


class CaptureRefusedError(NotCapturableError):
    """Not now: another attempt may succeed. TensorRT does not tell whether it always refuses what it refused once."""


@dataclass(frozen=True)
class ShapeKey:
    """What a graph is good for: the shapes of all inputs, and the values of those that TensorRT reads on the host."""

    shapes: tuple[tuple[str, Shape], ...]
    values: tuple[tuple[str, bytes], ...] = ()

    @classmethod
    def of(cls, inputs: Sequence[TensorInfo], given: Given) -> ShapeKey:
        shapes, values = [], []
        for tensor in inputs:
            array = given[tensor.name]
            shapes.append((tensor.name, array.shape))
            if tensor.location is TensorLocation.HOST and isinstance(array, np.ndarray):
                values.append((tensor.name, array.tobytes()))
        return cls(tuple(shapes), tuple(values))

    def __str__(self) -> str:
        return ", ".join(f"{name}: {list(shape)}" for name, shape in self.shapes)


class _Part:
    """One context with its device buffers: the whole request, or some rows of it."""

    def __init__(self, site: LaneSite, number: int, undo: contextlib.ExitStack) -> None:
        self.context = OwnedContext(site, number)
        undo.callback(self.context.destroy)
        self.blocks: dict[str, DeviceBlock] = {}
        self.nbytes: dict[str, int] = {}

    def add(self, site: LaneSite, tensor: TensorInfo, shape: Shape, undo: contextlib.ExitStack) -> None:
        nbytes = tensor.dtype.nbytes(shape)
        block = DeviceBlock(site, nbytes, f"{tensor.mode.value} {tensor.name!r}")
        undo.callback(block.free)
        self.blocks[tensor.name], self.nbytes[tensor.name] = block, nbytes
        self.context.native.set_tensor_address(tensor.name, block.address)


class _Place:
    """The pinned memory of one slot for this shape, and the graph over it.

    Args:
        within: the same slot's place of a larger shape, whose memory this one is the beginning of, tensor by tensor;
            None: memory of its own.
    """

    def __init__(
        self,
        site: LaneSite,
        layout: Mapping[str, tuple[int, Shape, np.dtype[Any]]],
        nbytes: int,
        within: _Place | None = None,
    ) -> None:
        self.block = None if within is not None else PinnedBlock(site, nbytes, "a slot")
        self.addresses: dict[str, int] = {}
        self.views: dict[str, Array] = {}
        for name, (offset, shape, dtype) in layout.items():
            count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            if within is not None:
                address = within.addresses[name]
            else:
                assert self.block is not None
                address = self.block.address + offset
            self.addresses[name] = address
            self.views[name] = pinned_view(address, max(count, 1))[:count].view(dtype).reshape(shape)
        self.exec = 0

    def free(self) -> None:
        """Its own memory. Idempotent."""
        if self.block is not None:
            self.block.free()


class CapturedShape:
    """One recorded shape of one lane. Made by ``record``; used on the lane's thread, but for its native bucket.

    Attributes:
        bucket: what the native side replays; requests find it through the engine's port.
        input_bytes, output_bytes: of one request.
        announced: requests may find it by shapes alone; not where values of shape tensors are recorded with it.
        within: the larger shape whose pinned memory this one uses the beginning of, slot by slot; None: its own.
        dependents: how many shapes use this one's memory.
    """

    def __init__(
        self,
        site: LaneSite,
        key: ShapeKey,
        profiles: Sequence[int],
        parts: int,
        within: CapturedShape | None = None,
    ) -> None:
        """Make contexts and buffers.

        Raises NotCapturableError, CudaError, EngineError, BorrowedError, MemoryBudgetError.
        """
        self.site, self.key, self.parts = site, key, parts
        self.within, self.dependents = within, 0
        self._places: list[_Place] = []
        self._spoilt: list[_Place] = []
        self._undo = contextlib.ExitStack()
        self._parts: list[_Part] = []
        self._values: dict[str, Array] = {}
        self._reference: dict[str, Array] = {}
        self._inputs, self._outputs = on_device(site.inputs), on_device(site.outputs)
        if len(self._outputs) < len(site.outputs):
            raise NotCapturableError("an output lies on the host")
        with contextlib.ExitStack() as undo:
            undo.callback(self._free_places)
            if within is not None:
                within.dependents += 1
                undo.callback(self._leave)
            self._shapes: dict[str, Shape] = self._prepare(dict(key.shapes), profiles, undo)
            self.announced = len(self._inputs) == len(site.inputs)
            self._layout, self._place_bytes = self._lay_out()
            if within is not None:
                self._require_beginning_of(within)
            self.input_bytes = sum(t.dtype.nbytes(self._shapes[t.name]) for t in self._inputs)
            self.output_bytes = sum(t.dtype.nbytes(self._shapes[t.name]) for t in self._outputs)
            self.bucket = _native.Bucket(
                site.lane,
                tuple((t.name, self._format(t), self._shapes[t.name]) for t in self._inputs),
                tuple(t.name for t in self._outputs),
                self.input_bytes <= ON_LOOP_BYTES and self.output_bytes <= ON_LOOP_BYTES,
            )
            self._undo = undo.pop_all()

    @staticmethod
    def _format(tensor: TensorInfo) -> str | None:
        """Code of the element type in the buffer protocol; None for what the native side leaves to Python."""
        try:
            return memoryview(np.empty(0, tensor.dtype.numpy)).format  # type: ignore[arg-type]  # an array is a buffer
        except (ValueError, NotImplementedError):  # the types of ml_dtypes have no code
            return None

    def _prepare(
        self, shapes: dict[str, Shape], profiles: Sequence[int], undo: contextlib.ExitStack
    ) -> dict[str, Shape]:
        site, values = self.site, dict(self.key.values)
        whole = dict(shapes)
        if self.parts > 1:
            shapes = {t.name: self._share(t, shapes[t.name]) for t in self._inputs}
        for number in range(self.parts):
            part = _Part(site, number, undo)
            part.context.select_profile(profiles)
            native = part.context.native
            for tensor in site.inputs:
                if tensor.location is TensorLocation.HOST:
                    value = np.frombuffer(values[tensor.name], tensor.dtype.numpy).copy()
                    held = self._values.setdefault(tensor.name, np.array(value, order="C", ndmin=1))
                    native.set_tensor_address(tensor.name, held.ctypes.data)
                else:
                    native.set_input_shape(tensor.name, shapes[tensor.name])
                    part.add(site, tensor, shapes[tensor.name], undo)
            for tensor in self._outputs:
                shape = native.get_tensor_shape(tensor.name)
                if -1 in shape:
                    raise NotCapturableError(f"the size of output {tensor.name!r} depends on data")
                part.add(site, tensor, shape, undo)
                whole[tensor.name] = self._together(tensor, shape, dict(self.key.shapes))
            self._parts.append(part)
        return whole

    def _share(self, tensor: TensorInfo, shape: Shape) -> Shape:
        if not shape or shape[0] % self.parts:
            raise NotCapturableError(f"input {tensor.name!r} of shape {shape} has no {self.parts} equal parts")
        return (shape[0] // self.parts, *shape[1:])

    def _together(self, tensor: TensorInfo, shape: Shape, whole: Mapping[str, Shape]) -> Shape:
        if self.parts == 1:
            return shape
        rows = next(iter(whole.values()))[0]
        if not shape or shape[0] * self.parts != rows:
            raise NotCapturableError(f"output {tensor.name!r} of shape {shape} does not have a row for each input row")
        return (rows, *shape[1:])

    def _lay_out(self) -> tuple[dict[str, tuple[int, Shape, np.dtype[Any]]], int]:
        layout: dict[str, tuple[int, Shape, np.dtype[Any]]] = {}
        offset = 0
        for tensor in (*self._inputs, *self._outputs):
            shape = self._shapes[tensor.name]
            layout[tensor.name] = offset, shape, tensor.dtype.numpy
            offset += -(-tensor.dtype.nbytes(shape) // _ALIGNMENT) * _ALIGNMENT
        return layout, offset

    def _require_beginning_of(self, larger: CapturedShape) -> None:
        for name, (_, shape, _) in self._layout.items():
            whole = larger._layout[name][1]
            if not shape or shape[1:] != whole[1:] or shape[0] > whole[0]:
                raise NotCapturableError(f"{name!r} of shape {shape} is not the beginning of one of shape {whole}")

    def _leave(self) -> None:
        assert self.within is not None
        self.within.dependents -= 1

    @property
    def busy(self) -> bool:
        """Something uses its graphs or its memory."""
        return self.dependents > 0 or bool(self.bucket.busy)

    @property
    def places(self) -> int:
        """How many slots are recorded."""
        return len(self._places)

    @property
    def values(self) -> Mapping[str, Array]:
        """The values of shape tensors, which are recorded with the graph."""
        return self._values

    def record(self, places: int) -> None:
        """Have ``places`` places in all, each recorded and proven by a canary run. Raises as the constructor."""
        while len(self._places) < places:
            larger = self.within._places[len(self._places)] if self.within is not None else None
            place = _Place(self.site, self._layout, self._place_bytes, larger)
            self._places.append(place)
            try:
                self._fill(place)
                if len(self._places) == 1:
                    self._flush(place)
                place.exec = self._capture(place)
                self._prove(place)
                self.bucket.add_place(
                    len(self._places) - 1,
                    place.exec,
                    tuple(place.views[t.name] for t in self._inputs),
                    tuple(place.views[t.name] for t in self._outputs),
                )
            except BaseException:
                # What was enqueued may still use its memory, which goes with the others'. It is nobody's slot.
                self._spoilt.append(self._places.pop())
                raise

    def _flush(self, place: _Place) -> None:
        """Two runs that TensorRT enqueues: one for what replays are compared with, one to settle what a capture needs.

        Other shapes' graphs may be launched between their kernels. The first run has memory that no graph uses; what
        the second one gives does not matter.
        """
        for part in self._parts:
            part.context.compute_in(ENQUEUED)
        self._enqueue(place, [self.site.stream] * self.parts)
        self.site.driver.cuStreamSynchronize(self.site.stream)
        self._reference = {t.name: place.views[t.name].copy() for t in self._outputs}
        if self.site.shares_memory:
            for number, part in enumerate(self._parts):
                part.context.compute_in(number)
            self._enqueue(place, [self.site.stream] * self.parts)
            self.site.driver.cuStreamSynchronize(self.site.stream)

    def complete(self) -> None:
        """There will be no more places: what they were proven against is of no more use.

        Until then it is kept, though it is as large as the outputs: to make it anew, TensorRT would have to enqueue a
        context whose graphs are being replayed, which changes what they compute.
        """
        self._reference = {}

    def _enqueue(self, place: _Place, streams: Sequence[int]) -> None:
        driver = self.site.driver
        for number, (part, stream) in enumerate(zip(self._parts, streams, strict=True)):
            for tensor in self._inputs:
                nbytes = part.nbytes[tensor.name]
                if nbytes:
                    source = place.addresses[tensor.name] + number * nbytes
                    driver.cuMemcpyHtoDAsync(part.blocks[tensor.name].address, source, nbytes, stream)
            part.context.native.execute_async_v3(stream)
            for tensor in self._outputs:
                nbytes = part.nbytes[tensor.name]
                if nbytes:
                    target = place.addresses[tensor.name] + number * nbytes
                    driver.cuMemcpyDtoHAsync(target, part.blocks[tensor.name].address, nbytes, stream)

    def _capture(self, place: _Place) -> int:
        """A CUgraphExec of one request. Other threads may launch and allocate meanwhile: capture is thread-local."""
        driver = self.site.driver
        # Not the lane's own stream: what others launch there now must not become part of the graph.
        streams = self.site.streams(1 + self.parts)[1:]
        events: list[int] = []
        try:
            driver.cuStreamBeginCapture(streams[0], CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            try:
                self._fork(streams, events)
                self._enqueue(place, streams)
                self._join(streams, events)
            except BaseException as error:
                self._abandon_capture(streams[0])
                if isinstance(error, ExecutionError) and not isinstance(error, CudaError):
                    # Enqueued on a stream it went well: it is being captured that TensorRT cannot do with this plan.
                    raise CaptureRefusedError(f"TensorRT does not let it be captured: {error}") from error
                raise
            try:
                graph = driver.cuStreamEndCapture(streams[0])
            except BaseException:
                self._abandon_capture(streams[0])
                raise
        finally:
            for event in events:
                driver.cuEventDestroy(event)
        try:
            copies = self.parts * (len(self._inputs) + len(self._outputs))
            if driver.cuGraphGetNodes(graph) <= copies - self._empty_tensors() * self.parts:
                raise NotCapturableError("the captured graph holds copies only: TensorRT enqueued nothing")
            execution = driver.cuGraphInstantiate(graph, 0)
        except BaseException:
            driver.cuGraphDestroy(graph)
            raise
        try:
            driver.cuGraphDestroy(graph)
        except BaseException:
            driver.cuGraphExecDestroy(execution)
            raise
        return execution

    def _abandon_capture(self, stream: int) -> None:
        """A thread that leaves a capture open can do nothing else; what went wrong first is what counts."""
        driver = self.site.driver
        with contextlib.suppress(ExecutionError):
            if driver.cuStreamIsCapturing(stream):
                graph = driver.cuStreamEndCapture(stream)
                if graph:
                    driver.cuGraphDestroy(graph)

    def _empty_tensors(self) -> int:
        return sum(not nbytes for nbytes in self._parts[0].nbytes.values())

    def _fork(self, streams: Sequence[int], events: list[int]) -> None:
        driver = self.site.driver
        if len(streams) > 1:
            events.append(driver.cuEventCreate(CU_EVENT_DISABLE_TIMING))
            driver.cuEventRecord(events[-1], streams[0])
            for stream in streams[1:]:
                driver.cuStreamWaitEvent(stream, events[0], 0)

    def _join(self, streams: Sequence[int], events: list[int]) -> None:
        driver = self.site.driver
        for stream in streams[1:]:
            events.append(driver.cuEventCreate(CU_EVENT_DISABLE_TIMING))
            driver.cuEventRecord(events[-1], stream)
            driver.cuStreamWaitEvent(streams[0], events[-1], 0)

    def _fill(self, place: _Place) -> None:
        """Inputs of a canary: numbers in [0, 1) for floats, zeros for the rest, which may be indices."""
        block = np.random.default_rng(0).random(4096)
        for tensor in self._inputs:
            view = place.views[tensor.name].reshape(-1)
            if view.dtype.kind in "fV":
                pattern = block.astype(view.dtype)
                for start in range(0, view.size, pattern.size):
                    view[start : start + pattern.size] = pattern[: view.size - start]
            else:
                view[...] = 0

    def _prove(self, place: _Place) -> None:
        """Replay over poisoned outputs and compare with what the flush run gave."""
        driver, stream = self.site.driver, self.site.stream
        for tensor in self._outputs:
            place.views[tensor.name].reshape(-1).view(np.uint8)[...] = POISON
            for part in self._parts:
                if part.nbytes[tensor.name]:
                    driver.cuMemsetD8Async(part.blocks[tensor.name].address, POISON, part.nbytes[tensor.name], stream)
        driver.cuGraphLaunch(place.exec, stream)
        driver.cuStreamSynchronize(stream)
        for tensor in self._outputs:
            if not agree(self._reference[tensor.name], place.views[tensor.name]):
                raise NotCapturableError(
                    f"the replay of the captured graph gave another {tensor.name!r} than TensorRT's enqueue did"
                )

    def outputs_agree_with(self, other: CapturedShape) -> bool:
        """Both were proven with the same inputs: does the other way of recording give the same outputs?"""
        mine, theirs = self._places[0].views, other._places[0].views
        return all(agree(mine[t.name], theirs[t.name]) for t in self._outputs)

    def measure_s(self) -> float:
        """Median time of a replay, in seconds."""
        driver, stream, execution = self.site.driver, self.site.stream, self._places[0].exec
        times: list[float] = []
        for _ in range(_TIMED_RUNS):
            driver.cuStreamSynchronize(stream)
            start = time.perf_counter()
            driver.cuGraphLaunch(execution, stream)
            driver.cuStreamSynchronize(stream)
            times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 2]

    def _free_places(self) -> None:
        driver = self.site.driver
        places = [*self._places, *self._spoilt]
        self._places, self._spoilt = [], []
        with contextlib.ExitStack() as undo:
            for place in places:
                undo.callback(place.free)
                if place.exec:
                    undo.callback(driver.cuGraphExecDestroy, place.exec)

    def abandon(self) -> None:
        """As ``destroy`` after a failure: what was enqueued before it still uses the memory."""
        try:
            with contextlib.suppress(ExecutionError):
                self.site.driver.cuStreamSynchronize(self.site.stream)
            self.destroy()
        except TrtxError as error:  # the failure that led here is the one to tell
            _log.error("giving up a capture for %s failed: %s", self.key, error)

    def destroy(self) -> None:
        """Graphs, memory and contexts go. The bucket serves nobody any more. Idempotent."""
        self._undo.close()


def agree(reference: Array, found: Array) -> bool:
    """Equal, or for floats as equal as kernels that add in another order make it; NaN equals NaN."""
    if reference.tobytes() == found.tobytes():
        return True
    if reference.dtype.kind not in "fV":
        return False
    expected, given = reference.astype(np.float64), found.astype(np.float64)
    scale = np.max(np.abs(expected[np.isfinite(expected)]), initial=0.0)
    return bool(np.allclose(given, expected, rtol=0.02, atol=0.02 * scale, equal_nan=True))


def split_candidates(site: LaneSite, key: ShapeKey, request_bytes: int) -> list[int]:
    """Into how many parts the request may be cut: 1 first, then what the options and the shape allow.

    Small requests are left whole: each part costs launches of its own, and what it can win is the time of the copies.
    """
    options = site.options
    if options.batch_axis is None or request_bytes < _SPLIT_BYTES or key.values:
        return [1]
    rows = {shape[0] if shape else 0 for _, shape in key.shapes}
    if len(rows) != 1:
        return [1]
    (count,) = rows
    doubling = itertools.takewhile(lambda n: n <= options.max_split, (2**i for i in range(1, 5)))
    return [1, *(n for n in doubling if count % n == 0 and count >= 2 * n)]


_SPLIT_BYTES = 1 << 20


def capture_shape(
    site: LaneSite,
    key: ShapeKey,
    profiles: Mapping[int, Sequence[int]],
    candidates: Sequence[int],
    within: CapturedShape | None = None,
) -> CapturedShape:
    """Record ``key`` whole and in parts, and keep what is fastest, with all the places that a lane shall have.

    Args:
        profiles: by number of parts: the optimization profiles that admit one part.
        within: see CapturedShape.
    Raises NotCapturableError, CudaError, EngineError, BorrowedError, MemoryBudgetError.
    """
    best: CapturedShape | None = None
    best_s = 0.0
    with contextlib.ExitStack() as undo:
        for parts in candidates:
            try:
                candidate, taken_s = _tried(site, key, profiles[parts], parts, within, timed=len(candidates) > 1)
            except (ExecutionError, EngineError):
                if best is None:
                    raise
                continue  # whole it works
            if best is None or (taken_s < best_s and candidate.outputs_agree_with(best)):
                undo.pop_all().close()  # what was best before
                undo.callback(candidate.destroy)
                best, best_s = candidate, taken_s
            else:
                candidate.destroy()
        undo.pop_all()
    assert best is not None
    return best


def _tried(
    site: LaneSite,
    key: ShapeKey,
    profiles: Sequence[int],
    parts: int,
    within: CapturedShape | None,
    *,
    timed: bool,
) -> tuple[CapturedShape, float]:
    shape = CapturedShape(site, key, profiles, parts, within)
    try:
        shape.record(1)  # proves it
        return shape, shape.measure_s() if timed else 0.0
    except BaseException:
        shape.abandon()
        raise
