"""Where batches are put together: pinned slots of lanes with graphs for several sizes, or plain arrays."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import _native
from .._capture import ON_LOOP_BYTES, CaptureRefusedError, NotCapturableError, ShapeKey
from .._errors import BorrowedError, CudaError, ExecutionError
from .._loops import current_hub, finish
from .._types import Array
from ._rows import Group, RowLayout

if TYPE_CHECKING:
    from .._engine import Engine

#: Slots beside those that are launched: one that is filled, and one that somebody is slow to fill.
_SPARE_SLOTS = 2
_PATIENCE_S = 30.0
#: How often graphs are captured that others take away before they are borrowed.
_ATTEMPTS = 4


@dataclass
class Run:
    """How one batch went.

    Attributes:
        outputs: arrays of ``size`` rows, valid until the memory is released.
        gpu_s: from the launch until the result was seen.
        lane: that ran it; None where a captured graph did not.
        launched_ns, completed_ns: of CLOCK_MONOTONIC; 0 likewise.
    """

    outputs: Mapping[str, Array]
    size: int
    gpu_s: float
    lane: _native.Lane | None = None
    launched_ns: int = 0
    completed_ns: int = 0


class Memory:
    """Memory of one batch. ``inputs`` have ``capacity`` rows; what is in rows that nobody writes is unspecified.

    Attributes:
        users: who still reads or writes the arrays, callers excepted: the batch, and what copies into it.
        holders: callers inside the block in which they fill rows of it. It is nobody else's before they have left.
        withheld: a caller has rows of it, and its batch went without them.
    """

    inputs: Sequence[Array]
    capacity: int
    users: int = 1
    holders: int = 0
    withheld: bool = False

    def launch(self, rows: int) -> Coroutine[Any, Any, Run]:
        """Launch the first ``rows`` rows, and give what to await. Raises CudaError, ExecutionError, ClosedError."""
        raise NotImplementedError

    def size_for(self, rows: int) -> int:
        """With how many rows this many are launched."""
        raise NotImplementedError

    def where_it_is_free(self, rows: int) -> Memory:
        """This memory, or other memory with the same rows that is launched sooner; then this one is released."""
        return self

    def release(self) -> None:
        """One user less; when nobody is left the memory goes back."""
        self.users -= 1
        self._settle()

    def hold(self) -> None:
        """One holder more."""
        self.holders += 1

    def let_go(self) -> None:
        """One holder less."""
        self.holders -= 1
        self._settle()

    @property
    def shared(self) -> bool:
        """Others than the batch use it."""
        return self.users + self.holders > 1

    def _settle(self) -> None:
        if self.users <= 0 and not self.holders:
            self._free()

    def _free(self) -> None:
        raise NotImplementedError


class OwnRows(Memory):
    """Arrays of one caller's rows alone. They are in no batch, and copied into one when they are sent."""

    users = 0

    def __init__(self, inputs: Sequence[Array], rows: int) -> None:
        self.inputs, self.capacity = inputs, rows

    def _free(self) -> None:
        self.inputs = ()


@dataclass
class _LaneGraphs:
    """The graphs of one lane, all over the memory of the largest."""

    host: _native.Bucket
    members: list[tuple[int, _native.Bucket]]  # ascending
    running: int = 0
    turn: int = 0  # of its last launch


@dataclass
class GraphPool:
    """Batches of one group in pinned slots. Borrowed from the engine until ``close``.

    Attributes:
        lanes: how many batches run at once.
        keep: keeps the pinned memory that has an address until what it returned is called, whatever is closed.
    """

    sizes: tuple[int, ...]
    keep: Callable[[int], Callable[[], None]]
    _lanes: list[_LaneGraphs]
    _borrowed: list[_native.Bucket]
    _launches: int = 0
    _out: set[_Slot] = field(default_factory=set)
    _closed: bool = False

    @property
    def lanes(self) -> int:
        return len(self._lanes)

    @property
    def capacity(self) -> int:
        return self.sizes[-1]

    @property
    def in_use(self) -> bool:
        return bool(self._out)

    def take(self) -> Memory | None:
        """A free slot of the lane that will be free first; None if all are in use."""
        if self._out:
            places = sum(lane.host.places for lane in self._lanes)
            still = sum(slot.withheld or not slot.launched for slot in self._out)
            # Plain arrays and single requests are run through slots too. They are what the batches in these slots wait
            # for: if none is left for them, all wait for ever.
            if 2 * self.withheld >= places or still >= max(1, places - len(self._lanes)):
                return None
        # Others launch on the lanes too.
        for lane in sorted(self._lanes, key=lambda lane: (max(lane.running, lane.host.lane.poll()), lane.turn)):
            taken = self._take_of(lane)
            if taken is not None:
                return taken
        return None

    def _take_of(self, lane: _LaneGraphs) -> _Slot | None:
        """A free slot of this lane."""
        place = lane.host.acquire()
        if place is None:
            return None
        slot = _Slot(self, lane, place)
        self._out.add(slot)
        return slot

    def take_some(self, most: int) -> list[_Slot]:
        """Free slots of all lanes in turn, so many at most. On each lane one is left to others."""
        taken: list[_Slot] = []
        room = {id(lane): lane.host.places - 1 for lane in self._lanes}
        for out in self._out:
            room[id(out._lane)] -= 1
        lanes = sorted(self._lanes, key=lambda lane: (lane.host.lane.poll(), lane.turn))
        while lanes and len(taken) < most:
            lane = lanes.pop(0)
            slot = self._take_of(lane) if room[id(lane)] > 0 else None
            if slot is not None:
                room[id(lane)] -= 1
                slot.launched = True  # nothing keeps it waiting
                taken.append(slot)
                lanes.append(lane)
        return taken

    @property
    def most_for_many(self) -> int:
        """What ``take_some`` gives if nothing is out."""
        return sum(lane.host.places - 1 for lane in self._lanes)

    @property
    def withheld(self) -> int:
        """Slots that callers have and no batch waits for."""
        return sum(slot.withheld for slot in self._out)

    @property
    def given_back(self) -> bool:
        """Closed, and nothing is out."""
        return self._closed and not self._out

    def close(self) -> None:
        """Give the graphs back to the engine's cache; what is out is given back when it comes. Idempotent."""
        self._closed = True
        self._return()

    def end(self) -> None:
        """As ``close``, for what is out too, unless callers are in it."""
        for slot in list(self._out):
            slot.abandon()
        self.close()

    def settle(self) -> None:
        """Wait until the GPU is done, also with what nobody waits for: of a loop that ended in the middle.

        What callers are in is kept for them from now on: lanes may be released before the batcher is.
        """
        deadline = time.monotonic() + _PATIENCE_S
        for lane in self._lanes if not self.given_back else ():
            while lane.host.lane.poll() and time.monotonic() < deadline:
                time.sleep(0.0005)
        for slot in list(self._out):
            slot.keep()

    def _return(self) -> None:
        if self._closed and not self._out:
            borrowed, self._borrowed = self._borrowed, []
            _give_back(borrowed)


class _Slot(Memory):
    """A pinned slot: launched by the smallest graph that has enough rows.

    Attributes:
        launched: it comes back whatever the others do.
    """

    launched = False

    def __init__(self, pool: GraphPool, lane: _LaneGraphs, place: _native.Place) -> None:
        self._pool, self._lane, self._place = pool, lane, place
        self._kept: list[Callable[[], None]] = []
        self.inputs = place.inputs
        self.capacity = pool.capacity

    @property
    def outputs(self) -> tuple[Array, ...]:
        """Of ``capacity`` rows."""
        return self._place.outputs

    @property
    def place_and_graphs(self) -> tuple[_native.Place, tuple[_native.Bucket, ...]]:
        """For native work: graphs ascending in rows."""
        return self._place, tuple(bucket for _, bucket in self._lane.members)

    def size_for(self, rows: int) -> int:
        return next(size for size, _ in self._lane.members if size >= rows)

    def where_it_is_free(self, rows: int) -> Memory:
        """The slot was chosen when the batch was begun: by now its lane may be the one that is at work."""
        pool = self._pool
        if len(pool._lanes) < 2 or self.shared or not self._lane.host.lane.poll():
            return self
        if sum(view[:rows].nbytes for view in self.inputs) > ON_LOOP_BYTES:
            return self
        for lane in pool._lanes:
            other = None if lane.host.lane.poll() else pool._take_of(lane)
            if other is None:
                continue
            for view, target in zip(self.inputs, other.inputs, strict=True):
                target[:rows] = view[:rows]
            self.release()
            return other
        return self

    def launch(self, rows: int) -> Coroutine[Any, Any, Run]:
        lane, pool = self._lane, self._pool
        size, bucket = next((size, bucket) for size, bucket in lane.members if size >= rows)
        wait = self._place.submit(current_hub(), False, bucket)
        self.launched = True
        pool._launches += 1
        lane.turn = pool._launches
        lane.running += 1
        return self._finish(wait, size)

    async def _finish(self, wait: _native.Wait, size: int) -> Run:
        lane = self._lane
        try:
            outputs: Mapping[str, Array] = await finish(wait)
        except RuntimeError as error:  # the place was given back by the engine's end
            raise ExecutionError(f"the batch has no result: {error}") from error
        finally:
            lane.running -= 1
        launched, completed = wait.launched_ns, wait.completed_ns
        return Run(outputs, size, (completed - launched) / 1e9, lane.host.lane, launched, completed)

    def _free(self) -> None:
        self.end()
        self._pool._return()

    def end(self) -> None:
        """The slot goes back. Idempotent."""
        if self in self._pool._out:
            self._pool._out.discard(self)
            self._place.release()
        while self._kept:
            with contextlib.suppress(CudaError):  # a device that is lost took its memory with it
                self._kept.pop()()

    def abandon(self) -> None:
        """The batch uses it no more, nor what runs; only callers may, until they leave."""
        self.users = 0
        self._settle()

    def keep(self) -> None:
        """If callers are in it, its memory stays until they leave, even without the engine. Idempotent."""
        if self.holders and not self._kept:
            self._kept.append(self._pool.keep(self.inputs[0].ctypes.data))
            self._settle()  # they may have left meanwhile, in their thread


@dataclass
class PlainPool:
    """Batches of one group in ordinary arrays, which go through the engine as any request does.

    For shapes that have no graphs (yet), and for batch axes other than the first.
    """

    engine: Engine
    layout: RowLayout
    group: Group
    sizes: tuple[int, ...]
    clock: Callable[[], float]
    limit: int
    _free: list[tuple[Array, ...]] = field(default_factory=list)
    _out: set[_Plain] = field(default_factory=set)
    _runs: int = 0

    @property
    def capacity(self) -> int:
        return self.sizes[-1]

    @property
    def in_use(self) -> bool:
        return bool(self._out)

    @property
    def crowded(self) -> bool:
        """Callers that are slow to fill rows have as many batches as can be under way."""
        return bool(self._out) and sum(plain.withheld for plain in self._out) >= self.limit

    def take(self) -> Memory | None:
        """Arrays for a batch; None if as many as can be under way are."""
        if sum(not plain.withheld for plain in self._out) >= self.limit:
            return None
        if self._free:
            arrays = self._free.pop()
        else:
            arrays = self.layout.blank(self.group, self.capacity)
        plain = _Plain(self, arrays)
        self._out.add(plain)
        return plain

    def close(self) -> None:
        self._free.clear()


class _Plain(Memory):
    def __init__(self, pool: PlainPool, arrays: tuple[Array, ...]) -> None:
        self._pool = pool
        self.inputs = arrays
        self.capacity = pool.capacity

    def size_for(self, rows: int) -> int:
        return next(size for size in self._pool.sizes if size >= rows)

    def launch(self, rows: int) -> Coroutine[Any, Any, Run]:
        return self._run(rows)

    async def _run(self, rows: int) -> Run:
        pool = self._pool
        pool._runs += 1
        size = self.size_for(rows)
        arrays = pool.layout.part(self.inputs, 0, size)
        names = [tensor.name for tensor in pool.layout.inputs]
        started = pool.clock()
        outputs = await infer_accepted(pool.engine, dict(zip(names, arrays, strict=True)))
        return Run(outputs, size, pool.clock() - started)

    def _free(self) -> None:
        pool = self._pool
        pool._out.discard(self)
        if pool._runs > 1 and len(pool._free) < pool.limit:  # arrays of shapes that come once are not kept
            pool._free.append(tuple(self.inputs))


async def infer_accepted(engine: Engine, inputs: dict[str, Array]) -> Mapping[str, Array]:
    """As ``engine.infer``, for part of what was accepted: also while the engine waits for it before it closes."""
    if not engine.closed:
        return await engine.infer(inputs)
    return await engine._front.infer_accepted({**inputs})


async def capture_pool(engine: Engine, layout: RowLayout, group: Group, sizes: Sequence[int], depth: int) -> GraphPool:
    """Record graphs for these numbers of rows on every lane, over the memory of the largest, and borrow them.

    Sizes that cannot be had (the cache's bound, memory that somebody else's slot occupies) are left out.

    Raises:
        NotCapturableError: there can be no graph for the largest; CaptureRefusedError: not now. Batches go as ordinary
            requests.
        TrtxError: as engine.infer.
    """
    if not layout.leading:
        raise NotCapturableError("rows lie on another axis than the first")
    front, places = engine._front, depth + _SPARE_SLOTS
    largest, *smaller = [(rows, ShapeKey(tuple(layout.shapes(group, rows).items()))) for rows in reversed(sizes)]
    with contextlib.ExitStack() as undo:
        borrowed: list[_native.Bucket] = []
        undo.callback(_give_back, borrowed)
        borrowed.extend(await _capture_largest(engine, largest[1], places))
        lanes = [_LaneGraphs(bucket, [(largest[0], bucket)]) for bucket in borrowed]
        for rows, key in smaller:
            try:
                await front.capture_for_batches(key, within=largest[1], places=places)
            except (BorrowedError, NotCapturableError, MemoryError):
                break  # the smaller ones go padded
            found = front.borrow(key)
            borrowed.extend(found)
            by_lane = {id(bucket.lane): bucket for bucket in found}
            for lane in lanes:
                bucket = by_lane.get(id(lane.host.lane))
                if bucket is not None and _shares_memory(bucket, lane.host):
                    lane.members.insert(0, (rows, bucket))
        undo.pop_all()
    keep = engine._runtime.device._access.keep_pinned
    return GraphPool(tuple(sizes), keep, lanes, borrowed)


async def _capture_largest(engine: Engine, key: ShapeKey, places: int) -> tuple[_native.Bucket, ...]:
    """Its graph on each lane that can have it, one at least. Raises CaptureRefusedError, and as engine.infer."""
    found: tuple[_native.Bucket, ...] = ()
    for _ in range(_ATTEMPTS):
        _give_back(found)
        await engine._front.capture_for_batches(key, within=None, places=places)
        found = engine._front.borrow(key)
        if len(found) == engine._options.lanes:
            break
        # Another batcher's graphs, of which this is the beginning, have just taken it: it comes back in their memory.
    if not found:
        raise CaptureRefusedError("the graph was given up again before it could be used")
    return found


def _give_back(borrowed: Sequence[_native.Bucket]) -> None:
    for bucket in borrowed:
        _native.return_bucket(bucket)


def _shares_memory(bucket: _native.Bucket, host: _native.Bucket) -> bool:
    _, mine = _native.bucket_table(bucket)
    _, theirs = _native.bucket_table(host)
    places = {slot: (inputs, outputs) for slot, _, inputs, outputs in mine}
    return all(places.get(slot) == (inputs, outputs) for slot, _, inputs, outputs in theirs)
