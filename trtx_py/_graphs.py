"""The captured shapes of one lane: a bounded cache, filled by what recurs."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from . import _native
from ._capture import (
    CapturedShape,
    CaptureRefusedError,
    NotCapturableError,
    ShapeKey,
    capture_shape,
    split_candidates,
)
from ._errors import BorrowedError, MemoryBudgetError, TrtxError
from ._options import DEFAULT_SLOTS
from ._site import LaneSite
from ._types import TensorInfo, TensorLocation

_log = logging.getLogger("trtx_py")

#: A shape is captured when it has come this often.
RECURS = 2
_REMEMBERED = 512  # shapes that were seen and are not captured
_SMALL_BYTES = 1 << 20
_GIVE_UP_S = 5.0
_SLOTS_S = 2.0
_MOST_PATIENT = 6
_MOST_REFUSALS = 3  # in a row: then TensorRT is not asked again to let a shape be captured
_GRACE_S = 1.0  # whoever had a shape captured takes a slot of it in this time


class ReroutedError(TrtxError):
    """Inside the engine only: the graph that a request was queued for is gone, TensorRT shall enqueue it."""


@dataclass(frozen=True)
class GraphStatistics:
    """What CUDA graphs did for an engine; counts since it was opened, over all its lanes.

    Attributes:
        captured: shapes that are captured now, each lane's counted.
        hits: requests served by replaying a graph.
        misses: requests of capturable shapes that TensorRT had to enqueue.
        captures: shapes captured, again or for the first time.
        recaptures: of these: shapes that had been captured before and were evicted or given up.
        evictions: captured shapes that made room for others.
        failures: captures that failed; their shapes go on through TensorRT's enqueue, and are tried again when they
            recur unless they can never be captured.
        capture_ms: time spent capturing, beside the requests.
    """

    captured: int
    hits: int
    misses: int
    captures: int
    recaptures: int
    evictions: int
    failures: int
    capture_ms: float


class GraphCounts:
    """Counters that the lanes of an engine share. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.captured = self.hits = self.misses = 0
        self.captures = self.recaptures = self.evictions = self.failures = 0
        self.capture_ns = 0

    def add(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def statistics(self, hits: int) -> GraphStatistics:
        """A snapshot; ``hits``: those that the native side counted."""
        with self._lock:
            return GraphStatistics(
                self.captured, self.hits + hits, self.misses, self.captures, self.recaptures, self.evictions,
                self.failures, self.capture_ns / 1e6,
            )  # fmt: skip


class GraphCache:
    """Captured shapes of one lane. Used on the lane's thread; requests reach the graphs through the port alone.

    Args:
        port: where captured shapes are announced.
        admit: the optimization profiles that admit these input shapes.
    """

    def __init__(
        self,
        site: LaneSite,
        port: _native.Port,
        counts: GraphCounts,
        admit: Callable[[Mapping[str, tuple[int, ...]], Mapping[str, bytes]], Sequence[int]],
    ) -> None:
        self._site, self._port, self._counts, self._admit = site, port, counts, admit
        self._captured: dict[ShapeKey, CapturedShape] = {}
        self._hits: dict[ShapeKey, int] = {}
        self._retired: list[CapturedShape] = []
        self._seen: OrderedDict[ShapeKey, int] = OrderedDict()
        self._refused: OrderedDict[ShapeKey, str] = OrderedDict()
        self._once: set[ShapeKey] = set()
        self._attempts: dict[ShapeKey, int] = {}
        self._refusals: dict[ShapeKey, int] = {}
        self._newest: tuple[ShapeKey, float] | None = None  # and until when nothing else makes it go
        self._last: ShapeKey | None = None
        self.enabled = site.options.cuda_graphs and not site.engine.captures_itself

    def find(self, key: ShapeKey) -> CapturedShape | None:
        """The graph for ``key``. A miss is counted, and remembered for ``recurs``."""
        if not self.enabled:
            return None
        found = self._captured.get(key)
        if found is None:
            self._counts.add(misses=1)
            # One context at a time: going to and fro between shapes would capture each time anew.
            one_context = self._site.ledger.exclusive and key != self._last
            self._seen[key] = 1 if one_context else self._seen.get(key, 0) + 1
            self._seen.move_to_end(key)
            if len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
        self._last = key
        return found

    def recurs(self, key: ShapeKey) -> bool:
        """Worth capturing: seen often enough, not captured, and not refused before."""
        return (
            self.enabled
            and key not in self._captured
            and key not in self._refused
            # What failed for want of memory, say, is tried again, but ever more rarely.
            and self._seen.get(key, 0) >= RECURS * 4 ** self._attempts.get(key, 0)
        )

    def lacks(self, key: ShapeKey) -> bool:
        """It is not captured, and to ask for it would harm nobody. May be asked from any thread."""
        return (
            self.enabled
            and key not in self._captured
            and key not in self._refused
            and not self._site.ledger.exclusive  # it would take another lane's profile
        )

    def hits(self, key: ShapeKey) -> int | None:
        """How often the graph for ``key`` was launched; None if there is none. May be asked from any thread."""
        found = self._captured.get(key)
        return None if found is None else found.bucket.hits

    def replayed(self, shape: CapturedShape) -> bool:
        """Count a replay on the lane's thread; False if the port, which sees the launch, counts it."""
        if not shape.announced:
            self._counts.add(hits=1)
        return not shape.announced

    def why_not(self, key: ShapeKey) -> str | None:
        """Why ``key`` cannot be captured; None if it can, as far as is known."""
        if not self.enabled:
            return (
                "cuda_graphs is off" if not self._site.options.cuda_graphs else "this TensorRT captures graphs itself"
            )
        return self._refused.get(key)

    def capture(
        self,
        key: ShapeKey,
        profiles: Sequence[int],
        give_up_context: Callable[[], object],
        *,
        within: ShapeKey | None = None,
        places: int = 0,
    ) -> CapturedShape:
        """Record ``key`` and announce it. The device is current.

        Args:
            give_up_context: where the plan lets one context at a time use a profile, the context that enqueues has to
                go before one can be made that is captured.
            within: record it in the memory of this captured shape, of which it is the beginning, slot by slot. If it
                is captured elsewhere and in use, it stays there.
            places: for how many slots at least.
        Raises:
            NotCapturableError: this shape can never be captured; it is remembered.
            CudaError, EngineError, MemoryBudgetError, BorrowedError: not now. Nothing is left behind.
        """
        larger = None if within is None else self._captured.get(within)
        if within is not None and larger is None:
            raise BorrowedError(f"{self._site.handle}: the graph for {within} was given up before {key} was captured")
        found = self._captured.get(key)
        if found is not None and (larger is None or found.within is larger or found.busy):
            self._extend(found, places)
            return found
        if found is not None:
            self._retire(key)  # it comes back in the larger one's memory
        reason = self.why_not(key)
        if reason is not None:
            raise NotCapturableError(f"{self._site.handle} has no CUDA graph for {key}: {reason}; use infer()")
        self._free_retired()
        started = time.perf_counter_ns()
        try:
            with self._alone_in(larger):
                shape = self._record(key, profiles, give_up_context, larger, places)
        except NotCapturableError as error:
            self._refuse(key, error)
            raise NotCapturableError(
                f"{self._site.handle} has no CUDA graph for {key}: {error}; use infer()"
            ) from error
        except TrtxError:
            self._failed(key)
            raise
        finally:
            self._counts.add(capture_ns=time.perf_counter_ns() - started)
        self._keep(key, shape)
        return shape

    def _keep(self, key: ShapeKey, shape: CapturedShape) -> None:
        self._attempts.pop(key, None)
        self._refusals.pop(key, None)
        self._captured[key] = shape
        self._hits[key] = 0
        try:
            if shape.announced:
                self._port.add(shape.bucket)
        finally:  # not before: whoever sees the count may rely on it that the next request finds the graph
            self._counts.add(captured=1, captures=1, recaptures=int(key in self._once))
        self._once.add(key)
        self._newest = key, time.monotonic() + _GRACE_S
        try:
            self._make_room()
        finally:
            self._hits = {key: shape.bucket.hits for key, shape in self._captured.items()}

    @contextlib.contextmanager
    def _alone_in(self, larger: CapturedShape | None) -> Iterator[None]:
        """Recording writes into the slots of ``larger``: nobody has one meanwhile. Raises BorrowedError."""
        places: list[_native.Place] = []
        deadline = time.monotonic() + _SLOTS_S
        try:
            while larger is not None and len(places) < larger.places:
                place = larger.bucket.acquire()
                if place is not None:
                    places.append(place)
                elif time.monotonic() > deadline:
                    raise BorrowedError(f"slots of {self._site.handle} are held, and graphs cannot be recorded in them")
                else:
                    time.sleep(0.0002)
            yield
        finally:
            for place in places:
                place.release()

    def _extend(self, shape: CapturedShape, places: int) -> None:
        """More slots for a captured shape, if it has fewer than ``places``. Raises as ``capture``."""
        wanted = self._bounded(places)
        if shape.within is not None:
            wanted = min(wanted, shape.within.places)
        if shape.places < wanted:
            with self._alone_in(shape.within):
                self._have(shape, wanted)

    def _have(self, shape: CapturedShape, places: int) -> None:
        """So many slots. What they are proven against stays until there cannot be more of them."""
        shape.record(places)
        if shape.places >= self._most_places:
            shape.complete()

    def _failed(self, key: ShapeKey) -> None:
        self._attempts[key] = min(self._attempts.get(key, 0) + 1, _MOST_PATIENT)
        self._counts.add(failures=1)

    def _refuse(self, key: ShapeKey, error: NotCapturableError) -> None:
        """Remember that it cannot be captured: for good, unless it was TensorRT that failed, which it may do once."""
        self._failed(key)
        refusals = self._refusals[key] = self._refusals.get(key, 0) + 1
        if isinstance(error, CaptureRefusedError) and refusals < _MOST_REFUSALS:
            return
        del self._refusals[key]
        self._refused[key] = str(error)
        if len(self._refused) > _REMEMBERED:
            self._refused.popitem(last=False)

    def _record(
        self,
        key: ShapeKey,
        profiles: Sequence[int],
        give_up_context: Callable[[], object],
        within: CapturedShape | None,
        places: int,
    ) -> CapturedShape:
        site = self._site
        request_bytes = _device_bytes(site.inputs, dict(key.shapes))
        candidates, admitted = [1], {1: list(profiles)}
        for parts in split_candidates(site, key, request_bytes)[1:]:
            shapes = {name: (shape[0] // parts, *shape[1:]) for name, shape in key.shapes}
            admitting = self._admit(shapes, dict(key.values))
            if admitting:
                candidates.append(parts)
                admitted[parts] = list(admitting)
        if site.ledger.exclusive:
            candidates = [1]
            self.give_up()
            give_up_context()
        while True:
            try:
                wanted = site.missing_bytes(candidates[-1]) + request_bytes
                site.access.memory.require(wanted, f"a CUDA graph of {site.handle} for {key}")
                break
            except MemoryBudgetError:
                if len(candidates) == 1:
                    raise
                candidates.pop()  # in fewer parts it may fit
        try:
            shape = capture_shape(site, key, admitted, candidates, within)
        except BorrowedError:
            if not site.ledger.exclusive:  # only now it is known that profiles are not shared
                raise
            give_up_context()
            shape = capture_shape(site, key, admitted, [1], within)
        try:
            self._have(shape, max(self._places(shape), self._bounded(places)) if within is None else within.places)
        except BaseException:
            shape.abandon()
            raise
        return shape

    def _places(self, shape: CapturedShape) -> int:
        if self._site.options.slots is not None:
            return self._site.options.slots
        nbytes = max(shape.input_bytes + shape.output_bytes, 1)
        return max(2, min(DEFAULT_SLOTS, _SMALL_BYTES // nbytes))

    @property
    def _most_places(self) -> int:
        """No lane has more slots than it was made with."""
        return self._site.options.slots or DEFAULT_SLOTS

    def _bounded(self, places: int) -> int:
        return min(places, self._most_places)

    def _make_room(self) -> None:
        """Keep to the bound: what was hit least since the last capture goes, the oldest first."""
        while len(self._captured) > self._site.options.max_graphs:
            spared = self._newest[0] if self._newest is not None and time.monotonic() < self._newest[1] else None
            idle = [key for key in self._captured if key != spared and not self._captured[key].busy]
            if not idle:
                break  # more than the bound for a while: ``tidy`` looks again
            victim = min(idle, key=lambda key: self._captured[key].bucket.hits - self._hits[key])
            self._retire(victim)
            self._counts.add(evictions=1)

    @property
    def untidy(self) -> bool:
        """There is more than the bound allows, or something retired, because it was in use when it should have gone."""
        return bool(self._retired) or len(self._captured) > self._site.options.max_graphs

    def tidy(self) -> None:
        """Let go of what is out of use by now. On the lane's thread."""
        with self._site.access.current:
            self._make_room()
            self._free_retired()

    def _retire(self, key: ShapeKey) -> None:
        shape = self._captured.pop(key)
        self._hits.pop(key, None)
        self._seen.pop(key, None)  # it has to recur again
        self._counts.add(captured=-1)
        if shape.announced:
            self._port.remove(shape.bucket)
            if shape.bucket.busy:  # who waits for a slot of it would wait for ever
                self._port.fail_orphans(ReroutedError(f"the CUDA graph for {key} was given up"))
        self._retired.append(shape)
        self._free_retired()

    def _free_retired(self) -> None:
        """Destroy what was retired and is not in use any more. Raises the first error, once all had their turn."""
        idle = [shape for shape in self._retired if not shape.busy]
        self._retired = [shape for shape in self._retired if shape not in idle]
        self._destroy(idle)

    def give_up(self, *, wait: bool = True) -> bool:
        """Retire all captured shapes, so that their contexts' profiles are free; False if there were none.

        Args:
            wait: for requests in flight, and a while for slots that callers hold; not where an event loop may be the
                one that waits, since it is the loop that fetches results.
        Raises BorrowedError while one of them is in use.
        """
        if not self._captured and not self._retired:
            return False
        if not wait and self.busy():
            raise BorrowedError(
                f"requests or slots of {self._site.handle} are under way, and this plan lets one context at a time use "
                "a profile; await them first",
                borrowers=[self._site.handle.describe()],
            )
        for key in list(self._captured):
            self._retire(key)
        deadline = time.monotonic() + _GIVE_UP_S
        while self._retired:
            if time.monotonic() > deadline:
                raise BorrowedError(
                    f"slots of {self._site.handle} are held by alloc_inputs, and this plan lets one context at a time "
                    "use a profile; leave the `async with` block first",
                    borrowers=[self._site.handle.describe()],
                )
            self._site.lane.poll()
            time.sleep(0.0002)
            self._free_retired()
        return True

    def make_space(self) -> bool:
        """Give up what is captured and not in use: serving comes before serving fast. False if there was nothing."""
        idle = [key for key, shape in self._captured.items() if not shape.busy]
        for key in idle:
            self._retire(key)
            self._counts.add(evictions=1)
        return bool(idle)

    def busy(self) -> bool:
        """A captured shape is in use."""
        return any(shape.bucket.busy for shape in [*self._captured.values(), *self._retired])

    @property
    def contexts(self) -> int:
        """Execution contexts that captured shapes hold."""
        return sum(shape.parts for shape in [*self._captured.values(), *self._retired])

    def release(self) -> None:
        """Destroy everything; nothing runs and nobody asks any more."""
        shapes = [*self._captured.values(), *self._retired]
        for shape in self._captured.values():
            if shape.announced:
                self._port.remove(shape.bucket)
        self._counts.add(captured=-len(self._captured))
        self._captured, self._retired = {}, []
        self._destroy(shapes)

    def _destroy(self, shapes: Sequence[CapturedShape]) -> None:
        errors: list[TrtxError] = []
        for shape in shapes:
            try:
                shape.destroy()
            except TrtxError as error:  # the others are still due
                errors.append(error)
        for other in errors[1:]:
            _log.error("while releasing the graphs of %s: %s", self._site.handle, other)
        if errors:
            raise errors[0]


def _device_bytes(tensors: Sequence[TensorInfo], shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(t.dtype.nbytes(shapes[t.name]) for t in tensors if t.location is TensorLocation.DEVICE)
