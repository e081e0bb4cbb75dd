"""``infer_many`` without Python between its batches: native threads launch them while nobody else is there.

A request of many rows that meets no other requests gets slots for itself, and a thread that copies, launches and copies
back in C; where batches are large, other threads help it copy. As soon as somebody else waits, the thread is told to
stop, and the rest goes as any request does: in pieces that stand in line with the others. Once those are gone, a
thread takes over again.
"""

from __future__ import annotations

import functools
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .. import _native
from .._errors import ClosedError, DeadlineExceededError, TrtxError
from ._groups import Groups
from ._jobs import Parts
from ._loop import Loop, Timer
from ._memory import GraphPool, _Slot
from ._policy import NEVER, Scheduler, State
from ._results import unexpected
from ._rows import Group, RowLayout

if TYPE_CHECKING:
    from ._launcher import Launcher

_Places: TypeAlias = "tuple[tuple[_native.Place, tuple[_native.Bucket, ...]], ...]"
#: Batches of more bytes, in and out, are copied by several threads.
_LARGE_BYTES = 1 << 20
#: Of less, a second thread helps with the copies if there are bytes enough in a batch's inputs.
_HELPED_BYTES = 1 << 15
#: What a thread copies at a time, of a large batch.
_PIECE_BYTES = 1 << 18
#: More add little: by then memory is what takes the time.
_MOST_THREADS = 8
#: Requests that are at work at once; the others wait for their turn.
_AT_ONCE = 2
#: How long a request keeps its slots while others of its kind want them.
_QUANTUM_NS = 100_000_000
#: Somebody who was there so long ago may be about to come again.
_CALM_S = 0.005
#: How long a thread polls before it sleeps, for results and for something to copy, by the engine's way of noticing
#: results; of small batches, and of large.
_SPIN_NS = ((1_000_000_000, 200_000, 0), (50_000, 20_000, 0))


class Crew:
    """Threads for native work, started when there is some. Refers to nobody but that work."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._jobs: dict[Future[object], _native.ManyRows] = {}

    def start(self, call: Callable[[], object], job: _native.ManyRows) -> Future[object]:
        """Run this in a thread, for this job."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_AT_ONCE * _MOST_THREADS, thread_name_prefix="trtx_py-many")
        future = self._threads.submit(call)
        self._jobs[future] = job
        future.add_done_callback(lambda done: self._jobs.pop(done, None))
        return future

    def close(self) -> None:
        """Wait until the threads have ended. What is at work, because its loop ended, launches no more. Idempotent.

        Graphs and memory go after this.
        """
        threads, self._threads = self._threads, None
        for job in list(self._jobs.values()):
            job.tell(True)
        if threads is not None:
            threads.shutdown()


class ManyRequest:
    """One call of ``infer_many`` whose rows may go the native way.

    Args:
        offer: put its next piece in line; False: there is none.
        until: its deadline, by the loop's clock.
        kind: priority and tenant; requests of one kind share the lanes equally.

    Attributes:
        run: its native work, while there is some.
        gone: nobody waits for it any more.
    """

    def __init__(self, parts: Parts, offer: Callable[[], bool], until: float, kind: tuple[int, str]) -> None:
        self.parts, self.offer, self.until, self.kind = parts, offer, until, kind
        self.run: _Run | None = None
        self.timer: Timer | None = None
        self.gone = False

    @property
    def group(self) -> Group:
        return self.parts.rows.group

    @property
    def left(self) -> int:
        """Rows that are neither launched nor in line."""
        return self.parts.rows.rows - (self.parts.position if self.run is None else self.run.job.next)


class _Run:
    """Native work for one request.

    Args:
        nbytes: of a batch's inputs.
        limited: it gives its slots back after a while, because others waited when it began.
        over: what a task awaits that notices the end of the loop.

    Attributes:
        thread: what launches.
    """

    def __init__(self, job: _native.ManyRows, slots: Sequence[_Slot], nbytes: int, limited: bool, over: Any) -> None:
        self.job, self.slots, self.nbytes, self.limited, self.over = job, slots, nbytes, limited, over
        self.thread: Future[object] | None = None
        self.ended = False
        self.failure: Exception | None = None


class NativeWay:
    """All requests of one batcher that may go the native way. Used in its event loop only.

    Args:
        wake_mode: how eagerly results are noticed, as EngineOptions has it.
        on_idle: called when something has ended.
    """

    def __init__(
        self,
        name: str,
        layout: RowLayout,
        scheduler: Scheduler,
        groups: Groups,
        launcher: Launcher,
        crew: Crew,
        wake_mode: int,
        on_idle: Callable[[], None],
    ) -> None:
        self._name, self._layout, self._scheduler, self._groups = name, layout, scheduler, groups
        self._launcher, self._crew, self._wake_mode, self._on_idle = launcher, crew, wake_mode, on_idle
        self._requests: set[ManyRequest] = set()  # that go this way whenever they can
        self._turn: deque[ManyRequest] = deque()  # they wait for slots
        self._runs: list[_Run] = []
        self._crowded_s = -NEVER  # when others were there
        self._held = 0  # of scheduler.preparing: requests that wait for slots, or have them
        self._most = scheduler.lanes * scheduler.policy.depth
        self._cores = len(os.sched_getaffinity(0))
        self._possible = layout.leading and layout.formats is not None and layout.output_formats is not None

    # ---- what infer_many calls ----

    def begin(self, request: ManyRequest) -> None:
        """Start it, one way or the other. Raises OverloadedError, InvalidArgumentError."""
        parts = request.parts
        parts.advance = lambda: self._advance(request)
        if self._possible and self._pool(request) and all(array.flags.c_contiguous for array in parts.rows.arrays):
            self._requests.add(request)
            if not self._crowded():
                self._go_native(request)
                return
        self._top_up(request)
        self.look()

    def end(self, request: ManyRequest) -> None:
        """Nobody waits for it any more: what is not launched never is, the rest is dropped when done. Idempotent."""
        request.gone = True
        request.parts.advance = None
        self._requests.discard(request)
        if request.run is not None:
            request.run.job.tell(False)
        elif request in self._turn:
            self._turn.remove(request)
            self._leave(request)

    # ---- what the batcher calls ----

    def look(self) -> None:
        """If anybody else waits, make room."""
        if self._requests and self._crowded() and self._held:
            for run in self._runs:
                run.job.tell(False)
            while self._turn:
                self._go_in_pieces(self._turn.popleft())

    @property
    def at_work(self) -> bool:
        """Threads launch."""
        return bool(self._runs)

    def uses(self, group: Group) -> bool:
        """Rows of this group are not launched yet."""
        return any(request.group == group for request in self._requests)

    def drop(self, error: Callable[[], ClosedError]) -> None:
        """Give up what is not launched."""
        for request in list(self._requests):
            if request.left:
                self._refuse(request, error(), "dropped")

    # ---- which way ----

    def _pool(self, request: ManyRequest) -> GraphPool | None:
        """The graphs, if they are worth it: for more than one batch."""
        state = self._groups.known.get(request.group)
        pool = None if state is None else state.graphs
        return pool if pool is not None and request.left > pool.capacity else None

    def _crowded(self) -> bool:
        """Somebody waits who is not of these requests, or they are not all alike."""
        crowded = self._others_wait()
        if crowded:
            self._crowded_s = self._loop.now()
        return crowded

    def _others_wait(self) -> bool:
        scheduler = self._scheduler
        if scheduler.preparing > self._held or len({request.kind for request in self._requests}) > 1:
            return True
        own = sum(ticket.state < State.RUNNING for request in self._requests for ticket in request.parts.tickets)
        if scheduler.waiting - len(scheduler.apart) + scheduler.outside > own:
            return True
        return any(batch.guests is not None and batch.guests.live for batch in scheduler.opened())

    def _advance(self, request: ManyRequest) -> bool:
        """A piece is done; once others are gone, and the last piece is done, it goes on without pieces."""
        native = request in self._requests and not self._crowded() and self._pool(request) is not None
        if not native or self._loop.now() < self._crowded_s + _CALM_S:
            return self._top_up(request)
        if not request.parts.tickets:
            self._go_native(request)
        return True

    def _top_up(self, request: ManyRequest) -> bool:
        """A few pieces at a time stand in line."""
        while len(request.parts.tickets) <= self._most:
            if not request.offer():
                return False
        return True

    def _go_native(self, request: ManyRequest) -> None:
        if request.parts.admit():
            self._launcher.counts.accepted += 1
        self._launcher.lone = False
        self._scheduler.preparing += 1
        self._held += 1
        if request.until != NEVER:
            request.timer = self._loop.later(request.until, functools.partial(self._too_late, request))
        self._turn.append(request)
        self._take_turns()

    def _go_in_pieces(self, request: ManyRequest) -> None:
        """It waits no longer for slots."""
        try:
            self._top_up(request)
        except Exception as error:  # whoever called this is not who waits for it
            if not request.parts.outcome.done():
                request.parts.outcome.set_exception(self._typed(error))
        self._leave(request)

    def _leave(self, request: ManyRequest) -> None:
        if request.timer is not None:
            request.timer.cancel()
            request.timer = None
        self._held -= 1
        self._scheduler.preparing -= 1
        self._on_idle()

    def _refuse(self, request: ManyRequest, error: TrtxError, how: str) -> None:
        """It has no result."""
        self._launcher.counts.end(request.parts, how)
        if not request.parts.outcome.done():
            request.parts.outcome.set_exception(error)
        self.end(request)

    def _too_late(self, request: ManyRequest) -> None:
        request.timer = None
        if request.left and not request.parts.outcome.done():
            text = f"{self._name}: {request.left} of {request.parts.rows.rows} rows were not launched in time"
            self._refuse(request, DeadlineExceededError(f"{text}; see deadline_s"), "late")

    # ---- native work ----

    @property
    def _loop(self) -> Loop:
        loop = self._launcher.loop
        assert loop is not None
        return loop

    def _take_turns(self) -> None:
        """Who has waited longest gets a share of the slots. The others are for who comes next: that one's first batches
        are copied while the first one's last ones run."""
        while self._turn:
            request = self._turn[0]
            if request.until <= self._loop.now():  # before its timer had a turn of the loop
                self._turn.popleft()
                self._leave(request)
                self._too_late(request)
                continue
            pool = self._pool(request)
            slots: Sequence[_Slot] = ()
            if pool is not None and len(self._runs) < _AT_ONCE:
                slots = pool.take_some(self._share(request, pool))
            if self._runs and pool is not None and not slots:
                if not any(run.limited for run in self._runs):
                    self._runs[0].job.tell(False)  # it comes back when it is its turn again
                return
            self._turn.popleft()
            if pool is None or not self._start(request, pool, slots):
                self._crowded_s = self._loop.now()
                self._go_in_pieces(request)

    def _share(self, request: ManyRequest, pool: GraphPool) -> int:
        """How many slots it may have."""
        scheduler = self._scheduler
        free = self._most - (scheduler.running - sum(len(run.slots) for run in self._runs))
        if scheduler.max_bytes != NEVER:
            nbytes = pool.capacity * self._layout.row_bytes(request.group)
            free = min(free, int(scheduler.max_bytes - scheduler.bytes_in_flight) // max(1, nbytes))
        return min(free, -(-pool.most_for_many // _AT_ONCE))

    def _start(self, request: ManyRequest, pool: GraphPool, slots: Sequence[_Slot]) -> bool:
        """False: there are no slots, or no memory, or outputs are not made of rows, which goes wrong batch by batch; or
        these arrays are not for native work."""
        parts, loop = request.parts, self._loop
        names = self._layout.output_axes
        views = dict(zip(names, slots[0].outputs, strict=True)) if slots else {}
        try:
            if not slots or any(not view.ndim or view.shape[0] != pool.capacity for view in views.values()):
                raise LookupError
            outputs = parts.outputs_like(views)
            found = tuple(outputs[name] for name in names)
            nbytes = pool.capacity * self._layout.row_bytes(request.group)
            large = nbytes + sum(view.nbytes for view in views.values()) > _LARGE_BYTES
            piece = _PIECE_BYTES if large else nbytes // 2 + 1
            job = _native.ManyRows(parts.rows.arrays, found, parts.position, parts.rows.rows, pool.capacity, piece)
        except Exception:  # batch by batch it is done, or said what is wrong
            for slot in slots:
                slot.release()
            return False
        limited, alone = bool(self._turn), not self._runs and not self._turn
        until_ns = time.monotonic_ns() + _QUANTUM_NS if limited else 0
        run = request.run = _Run(job, slots, nbytes, limited, loop.outcome())
        self._runs.append(run)
        for _ in slots:
            self._scheduler.started(nbytes)
        places = tuple(slot.place_and_graphs for slot in slots)
        spin_ns = _SPIN_NS[large][self._wake_mode]
        threads = self._threads(nbytes, large=large, alone=alone)
        try:
            run.thread = self._crew.start(functools.partial(self._work, request, run, places, spin_ns, until_ns), job)
            for _ in range(1, threads):
                self._crew.start(functools.partial(job.help, spin_ns), job)
        except RuntimeError as error:  # no more threads: it goes without help, but not without a thread that launches
            if run.thread is None:
                self._failed(run, error)
                loop.soon(functools.partial(self._thread_ended, request, run))
        loop.spawn(self._guard(request, run))
        return True

    def _threads(self, nbytes: int, *, large: bool, alone: bool) -> int:
        """How many work for one request: one launches, the others copy."""
        if large:
            return min(self._cores, _MOST_THREADS) // (1 if alone else _AT_ONCE)
        return 2 if nbytes >= _HELPED_BYTES and self._cores >= 4 * _AT_ONCE else 1

    def _work(self, request: ManyRequest, run: _Run, places: _Places, spin_ns: int, until_ns: int) -> None:
        """In a thread."""
        if run.ended:
            return  # this thread was given up
        try:
            run.job.run(places, spin_ns, until_ns)
        except Exception as error:
            self._failed(run, error)
        self._loop.soon_threadsafe(functools.partial(self._thread_ended, request, run))

    @staticmethod
    def _failed(run: _Run, error: Exception) -> None:
        run.failure = error
        run.job.tell(False)

    async def _guard(self, request: ManyRequest, run: _Run) -> None:
        try:
            await run.over
        except BaseException:  # the event loop ends
            if not run.ended:
                run.job.tell(True)
                if run.thread is not None:
                    run.thread.exception()  # it leaves at once
                self._end_run(request, run)
                error = ClosedError(f"{self._name}: the event loop ended before the result was there")
                self._refuse(request, error, "failed")
                self._leave(request)
            raise

    def _thread_ended(self, request: ManyRequest, run: _Run) -> None:
        """The run is at its end."""
        if run.ended:
            return
        try:
            self._end_run(request, run)
            error = self._error_of(run)
        except Exception as failure:  # nobody called this: who waits would never hear of it
            error = self._typed(failure)
        run.over.set_result(None)
        parts = request.parts
        if not request.gone and not parts.outcome.done():
            if error is not None:
                parts.outcome.set_exception(error)
            elif parts.landed(run.job.done):
                self._launcher.counts.end(parts, "completed")
        if request.gone or parts.outcome.done():
            self._leave(request)
        elif self._crowded():
            self._go_in_pieces(request)
        else:
            self._turn.append(request)
        self._take_turns()
        if not self._scheduler.idle:
            self._launcher.soon()

    def _end_run(self, request: ManyRequest, run: _Run) -> None:
        """Nothing is launched for it any more."""
        run.ended = True
        request.run = None
        request.parts.position = run.job.next
        self._runs.remove(run)
        for slot in run.slots:
            slot.release()
            self._scheduler.ended(run.nbytes)
        queue, gpu = (np.frombuffer(values) for values in run.job.times())
        self._launcher.chunks_done(run.job.done, run.slots[0].capacity, run.job.padding, queue, gpu)

    def _error_of(self, run: _Run) -> TrtxError | None:
        error = run.failure or run.job.error()
        return None if error is None else self._typed(error)

    def _typed(self, error: BaseException) -> TrtxError:
        """What to raise for it."""
        return error if isinstance(error, TrtxError) else unexpected(f"{self._name}: many rows could not be run", error)
