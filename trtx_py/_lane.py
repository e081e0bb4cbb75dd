"""Lanes: actors that serve one engine. Each has a thread and an Execution; all take from one mailbox.

What a captured graph serves never comes here: the port launches it where the caller is. The threads are for what
blocks: TensorRT's enqueue of shapes that are not captured, large copies, and capturing itself.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from traceback import clear_frames

from ._capture import ShapeKey
from ._errors import BorrowedError, ClosedError, CudaError, DeviceLostError, ExecutionError, TrtxError
from ._execution import Execution, is_out_of_memory
from ._graphs import GraphCache
from ._request import Request
from ._resource import Handle
from ._upkeep import Upkeep
from .backends.protocols import STICKY_CUDA_ERRORS

_CAPTURE_POLL_S = 0.002
_ATTEMPTS = 5
_LET_PASS = 64

_log = logging.getLogger("trtx_py")


@dataclass
class Counts:
    """Requests by how they ended."""

    completed: int = 0
    failed: int = 0
    cancelled: int = 0


class _Lane:
    def __init__(self, execution: Execution, handle: Handle, upkeep: Upkeep) -> None:
        self.execution = execution
        self.handle = handle
        self.upkeep = upkeep
        self.tidying = False  # on its thread, beside the lock
        self.running: Request | None = None
        self.inbox: deque[Request] = deque()  # for this lane and no other
        self.let_pass = 0
        self.thread: threading.Thread | None = None

    @property
    def holds_profile(self) -> bool:
        """It has a profile, or is about to have one again: a capture exchanges contexts."""
        running = self.running
        return self.execution.holds_profile or (running is not None and running.capture is not None)

    def is_to_capture(self, key: ShapeKey) -> bool:
        """It captures this shape now, or will soon."""
        requests = (*self.inbox, self.running)
        return any(request is not None and request.capture == key for request in requests)

    def hits(self, key: ShapeKey) -> int | None:
        """Replays of this shape here; None if this lane has no graph for it and is not about to."""
        hits = self.upkeep.hits(key)
        return 0 if hits is None and self.is_to_capture(key) else hits


class Lanes:
    """The mailbox of an engine (or of one context) and the lanes that serve it. Thread-safe.

    Lanes are started when there is more to do than the present ones can take, up to ``limit``. No lane refers to the
    engine object, so an engine that nobody refers to is collected although its lanes are alive.

    Args:
        name: of whom it serves, for messages and thread names.
        limit: how many lanes there may be.
        make: makes the Execution of a new lane and the Handle that owns its memory.
        on_loss: told once, with the error that later requests get, when the device is lost.
        graphs: the captured shapes of a lane that was just made.
        wanted: true while requests wait for slots of captured shapes.
    """

    def __init__(
        self,
        name: str,
        limit: int,
        make: Callable[[], tuple[Execution, Handle]],
        on_loss: Callable[[TrtxError], object] | None = None,
        graphs: Callable[[Handle], GraphCache] | None = None,
        wanted: Callable[[], object] = bool,
    ) -> None:
        self._name = name
        self._limit = limit
        self._make = make
        self._on_loss = on_loss
        self._graphs = graphs
        self._wanted = wanted
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[Request] = deque()
        self._lanes: list[_Lane] = []
        self._idle = 0
        self._refusing = False
        self._stopping = False
        self._dead: CudaError | None = None
        self._retired = 0
        self.counts = Counts()

    def submit(self, request: Request, *, accepted: bool = False) -> None:
        """Queue a request. Raises ClosedError once refusing, ExecutionError once the device was lost.

        Args:
            accepted: what it is part of was accepted before, by something that is drained before this is.
        """
        with self._lock:
            self._require_serving(accepted)
            if self._idle <= len(self._waiting) and len(self._lanes) < self._limit:
                self._add_lane()  # may fail: then the request was not accepted
            self._waiting.append(request)
            self._changed.notify()

    def submit_to_each(self, make: Callable[[], Request]) -> list[Request]:
        """One request for each lane, all of which are started. Raises as ``submit``."""
        with self._lock:
            self._require_serving()
            while len(self._lanes) < self._limit:
                self._add_lane()
            return [self._post(lane, make()) for lane in self._lanes]

    def _post(self, lane: _Lane, request: Request) -> Request:
        lane.inbox.append(request)
        self._changed.notify_all()
        return request

    def _require_serving(self, accepted: bool = False) -> None:
        if self._stopping or (self._refusing and not accepted):
            raise ClosedError(f"{self._name} is closing and takes no more requests")
        if self._dead is not None:
            raise self._death()

    def require_serving(self) -> None:
        """Raise ClosedError or ExecutionError as ``submit`` would."""
        with self._lock:
            self._require_serving()

    def _add_lane(self) -> None:
        # Under the lock: once the owner is closing, no lane can come into being behind its back.
        execution, handle = self._make()
        lane = _Lane(execution, handle, Upkeep(self._graphs(handle) if self._graphs is not None else None))
        lane.thread = threading.Thread(target=self._serve, args=(lane,), name=f"trtx_py-{handle}", daemon=True)
        lane.thread.start()
        self._lanes.append(lane)

    def busy(self) -> str | None:
        """What is in flight and waited for, or None. What was cancelled is nobody's any more: ``drain`` sees it out.

        Takes no lock: whoever asks holds the lock of the ownership tree.
        """
        return self._in_flight(sum(not request.cancelled and request.capture is None for request in self._running()))

    def at_work(self) -> str | None:
        """What is in flight, or None: cancelled requests that run occupy the execution context too."""
        return self._in_flight(len(self._running()))

    def _in_flight(self, running: int) -> str | None:
        waiting = sum(not request.cancelled and request.capture is None for request in self._queued())
        return f"{running} requests running, {waiting} waiting" if running or waiting else None

    def _queued(self) -> list[Request]:
        return [*list(self._waiting), *(request for lane in list(self._lanes) for request in list(lane.inbox))]

    def _running(self) -> list[Request]:
        found = [lane.running for lane in list(self._lanes)]
        return [request for request in found if request is not None]

    def load(self) -> tuple[int, int, int, int]:
        """Requests waiting, requests running, lanes, execution contexts."""
        with self._lock:
            return (
                sum(not request.cancelled and request.capture is None for request in self._queued()),
                sum(request.capture is None for request in self._running()),
                len(self._lanes),
                sum(lane.execution.contexts for lane in self._lanes),
            )

    def refuse(self) -> None:
        """From now on ``submit`` raises ClosedError; what was accepted goes on."""
        with self._lock:
            self._refusing = True

    def drop_waiting(self, make: Callable[[], TrtxError]) -> int:
        """End what no lane has taken yet with an error; returns how many requests somebody waited for."""
        with self._lock:
            doomed = [request for request in self._waiting if request.capture is None]
            self._waiting = deque(request for request in self._waiting if request.capture is not None)
            for request in doomed:
                self._count(request, "cancelled" if request.cancelled else "failed")
        for request in doomed:
            request.finish(None, make())
        return sum(not request.cancelled for request in doomed)

    def drain(self) -> None:
        """Wait until every accepted request has ended, then until the lanes' threads have."""
        with self._lock:
            self._refusing = self._stopping = True
            self._changed.notify_all()
            threads = [lane.thread for lane in self._lanes if lane.thread is not None]
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()

    def rest(self) -> None:
        """Wait until the GPU is done with what the lanes launched. Behind ``drain``."""
        for lane in list(self._lanes):
            lane.execution.rest()

    @contextlib.contextmanager
    def parked(self) -> Iterator[None]:
        """Idle lanes give their contexts back, so that a caller can have their profiles; none begins anything inside.

        Raises BorrowedError if a lane is at work, or one of its slots is held.
        """
        with self._lock:
            while any(request.capture is not None for request in self._running()) or any(
                lane.tidying for lane in self._lanes
            ):
                self._changed.wait(_CAPTURE_POLL_S)  # it is nobody's request, and soon over
            for lane in self._lanes:
                if lane.running is not None:
                    raise BorrowedError(
                        f"a request in flight on {lane.handle} uses the optimization profile, and this plan lets one "
                        "context at a time use it; await the request first",
                        borrowers=[lane.handle.describe()],
                    )
            for lane in self._lanes:
                lane.execution.give_up_profiles(wait=False)
            yield

    def _serve(self, lane: _Lane) -> None:
        while (request := self._next(lane)) is not None:
            if not self._run(lane, request):
                return
            del request  # an idle lane must not keep the last caller's arrays alive

    def _next(self, lane: _Lane) -> Request | None:
        """The next request for ``lane``, however long it takes; None: the lane ends."""
        while True:
            with self._lock:
                lane.tidying = False
                now_s = time.monotonic()
                if not lane.upkeep.tidying_is_due(now_s):
                    self._make_up_on(lane, now_s)
                    request = self._take(lane)
                    if request is not None or self._stopping:
                        return request
                    self._idle += 1
                    self._changed.wait(lane.upkeep.pause_s(now_s))
                    self._idle -= 1
                    continue
                lane.tidying = True
            self._tidy(lane)

    def _take(self, lane: _Lane) -> Request | None:
        """Under the lock: the next request for ``lane``, started; None if there is none now."""
        while lane.inbox or self._waiting:
            request = self._choose(lane).popleft()
            if request.start():
                lane.running = request
                return request
            self._count(request, "cancelled")
            self._lost(lane, request)
            request.finish(None, None)
        return None

    def _choose(self, lane: _Lane) -> deque[Request]:
        """Under the lock: where the next request comes from. A capture that nobody awaits lets some requests pass."""
        if not lane.inbox or not self._waiting:
            return lane.inbox or self._waiting
        if lane.inbox[0].background:
            lane.let_pass += 1
            if lane.let_pass < _LET_PASS:
                return self._waiting
        lane.let_pass = 0
        return lane.inbox

    def _run(self, lane: _Lane, request: Request) -> bool:
        """Serve one request; False if the lane has to end because the plan has no profile for it."""
        retired = self._retired
        try:
            result = lane.execution.run(request)
        except ExecutionError as error:
            if request.capture is None and is_out_of_memory(error) and self._step_aside(lane, request):
                return False
            self._failed(lane, request, error)
            return True
        except BorrowedError as error:
            goes_on = None if request.capture is not None else self._step_back(lane, request, retired)
            if goes_on is None:
                self._failed(lane, request, error)
            return goes_on is not False
        except BaseException as error:
            self._failed(lane, request, error)
            return True
        with self._lock:
            self._count(request, "cancelled" if request.cancelled else "completed")
            lane.running = None
        request.finish(result, None)
        self._follow_up(lane, request)
        return True

    def _count(self, request: Request, outcome: str) -> None:
        if not request.counted:
            setattr(self.counts, outcome, getattr(self.counts, outcome) + 1)

    def _follow_up(self, lane: _Lane, request: Request) -> None:
        """The result is delivered; if its shape recurs, all lanes record it now, beside the requests."""
        key = lane.execution.wants_capture(request)
        if key is None:
            return
        profiles = request.profiles
        with contextlib.suppress(TrtxError):  # closing, or the device was lost, which others are told
            for capture in self.submit_to_each(lambda: Request({}, profiles, capture=key, background=True)):
                capture.when_ended(partial(_report, self._name, capture))

    def make_up(self, key: ShapeKey, profiles: list[int]) -> None:
        """Somebody waits for a slot of ``key``: lanes that lack its graph record it now, beside the requests."""
        with self._lock:
            if self._refusing or self._dead is not None:
                return
            for lane in self._lanes:
                if not lane.is_to_capture(key):
                    lane.upkeep.want(key, profiles, time.monotonic())
            self._changed.notify_all()

    def _make_up_on(self, lane: _Lane, now_s: float) -> None:
        """Under the lock: have ``lane`` capture what it lost, where it is of use."""
        if self._refusing or self._dead is not None:
            return
        for capture in lane.upkeep.due_captures(now_s, partial(self._hits_beside, lane), bool(self._wanted())):
            capture.when_ended(partial(_report, self._name, capture))
            lane.inbox.append(capture)

    def _hits_beside(self, lane: _Lane, key: ShapeKey) -> int | None:
        """Under the lock: replays of ``key`` on the other lanes; None if none of them has it, or is about to."""
        found = [other.hits(key) for other in self._lanes if other is not lane]
        hits = [count for count in found if count is not None]
        return sum(hits) if hits else None

    def _lost(self, lane: _Lane, capture: Request) -> None:
        """Under the lock: if others serve its shape, no request will ever ask ``lane`` for it again."""
        if capture.capture is not None and len(self._lanes) > 1:
            lane.upkeep.lost(capture, time.monotonic(), self._hits_beside(lane, capture.capture))

    def _tidy(self, lane: _Lane) -> None:
        try:
            lane.upkeep.tidy()
        except TrtxError as error:  # nobody's request: there is nobody else to tell
            _log.error("%s: letting go of unused CUDA graphs failed: %s", self._name, error)
            loss = device_loss(error)
            if loss is not None:
                self.lose(loss)

    def _step_aside(self, lane: _Lane, request: Request) -> bool:
        """There is no memory for ``lane``: if others have theirs, they serve, and this one ends."""
        with self._lock:
            if not any(other.execution.contexts for other in self._lanes if other is not lane):
                return False
            self._remove(lane)
            self._put_back(lane, request)
        _log.warning("%s: no device memory for another lane; %d serve", self._name, len(self._lanes))
        return True

    def _remove(self, lane: _Lane) -> None:
        lane.execution.step_back()
        self._lanes.remove(lane)
        self._limit = len(self._lanes)
        self._retired += 1
        for left in lane.inbox:
            left.finish(None, BorrowedError(f"{lane.handle} ended: the engine has no room for it"))
        lane.inbox.clear()

    def _put_back(self, lane: _Lane, request: Request) -> None:
        lane.running = None
        request.requeue()
        self._waiting.appendleft(request)
        self._changed.notify()

    def _step_back(self, lane: _Lane, request: Request, retired: int) -> bool | None:
        """The plan lets one context at a time use a profile, and ``lane`` could not have the one it needs.

        False if a lane beside it holds one: then this lane gives its own back and ends, and the others serve. True if
        such a lane has ended meanwhile (more than ``retired`` had), or may be exchanging its contexts for a capture at
        this moment: then this one tries again. None if nobody here is in the way.
        """
        with self._lock:
            holds = any(other.holds_profile for other in self._lanes if other is not lane)
            request.attempts += 1
            exchanging = len(self._lanes) > 1 and request.attempts < _ATTEMPTS
            if not holds and self._retired == retired and not exchanging:
                return None
            if holds:
                self._remove(lane)
            self._put_back(lane, request)
            return not holds

    def _failed(self, lane: _Lane, request: Request, error: BaseException) -> None:
        if not isinstance(error, TrtxError):
            wrapped = ExecutionError(
                f"{self._name}: an inference failed inside trtx_py: {type(error).__name__}: {error}"
            )
            wrapped.__cause__ = error
            error = wrapped
        if isinstance(error, ExecutionError) and not lane.execution.launched:
            error.launched = False
        _forget_locals(error)
        loss = device_loss(error)
        with self._lock:
            self._count(request, "failed")
            lane.running = None
            if loss is None:
                self._lost(lane, request)
        if loss is not None:
            self.lose(loss)
        request.finish(None, error)

    def lose(self, loss: CudaError) -> None:
        """The device is gone: what waits fails with the cause, and so does what comes. Idempotent."""
        with self._lock:
            if self._dead is not None:
                return
            self._dead = _twin(loss)
            doomed = self._queued()
            self._waiting.clear()
            for lane in self._lanes:
                lane.inbox.clear()
            for other in doomed:
                self._count(other, "cancelled" if other.cancelled else "failed")
        if self._on_loss is not None:
            self._on_loss(self._death())
        for other in doomed:
            other.finish(None, self._death())

    def _death(self) -> ExecutionError:
        # Closing this one alone does not help: engines beside it keep the primary context, and its error, alive.
        error = DeviceLostError(
            f"{self._name} is dead: its device failed ({self._dead}) and stays broken in this process until everything "
            "on it is closed; close every engine, runtime and Device on that device, then open another one",
            launched=False,
        )
        error.__cause__ = self._dead
        return error


def _report(name: str, request: Request) -> None:
    """Say why a shape that recurs could not be recorded: its requests are served, but slower than they could be."""
    if request.error is not None:
        _log.warning("%s: %s is not captured as a CUDA graph: %s", name, request.capture, request.error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def device_loss(error: BaseException) -> CudaError | None:
    """The error after which no call on the device will work, if that is what is behind ``error``."""
    return next((e for e in _chain(error) if isinstance(e, CudaError) and e.code in STICKY_CUDA_ERRORS), None)


def _twin(error: CudaError) -> CudaError:
    """The same error apart from its traceback, which grows by its first caller's frames when it is raised there."""
    twin = CudaError.__new__(CudaError, *error.args)
    twin.__dict__.update(error.__dict__)
    return twin


def _forget_locals(error: BaseException) -> None:
    """A traceback keeps the locals of its frames, here the caller's arrays, as long as the error lives."""
    for link in _chain(error):
        clear_frames(link.__traceback__)
