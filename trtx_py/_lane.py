"""Lanes: actors that serve one engine. Each has a thread and an Execution; all take from one mailbox."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from traceback import clear_frames

from ._errors import BorrowedError, ClosedError, CudaError, ExecutionError, TrtxError
from ._execution import Execution
from ._request import Request
from ._resource import Handle
from .backends.protocols import STICKY_CUDA_ERRORS


@dataclass
class Counts:
    """Requests by how they ended."""

    completed: int = 0
    failed: int = 0
    cancelled: int = 0


class _Lane:
    def __init__(self, execution: Execution, handle: Handle) -> None:
        self.execution = execution
        self.handle = handle
        self.running: Request | None = None
        self.thread: threading.Thread | None = None


class Lanes:
    """The mailbox of an engine (or of one context) and the lanes that serve it. Thread-safe.

    Lanes are started when there is more to do than the present ones can take, up to ``limit``. No lane refers to the
    engine object, so an engine that nobody refers to is collected although its lanes are alive.

    Args:
        name: of whom it serves, for messages and thread names.
        limit: how many lanes there may be.
        make: makes the Execution of a new lane and the Handle that owns its memory.
    """

    def __init__(self, name: str, limit: int, make: Callable[[], tuple[Execution, Handle]]) -> None:
        self._name = name
        self._limit = limit
        self._make = make
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

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ClosedError once refusing, ExecutionError once the device was lost."""
        with self._lock:
            if self._refusing:
                raise ClosedError(f"{self._name} is closing and takes no more requests")
            if self._dead is not None:
                raise self._death()
            if self._idle <= len(self._waiting) and len(self._lanes) < self._limit:
                self._add_lane()  # may fail: then the request was not accepted
            self._waiting.append(request)
            self._changed.notify()

    def _add_lane(self) -> None:
        # Under the lock: once the owner is closing, no lane can come into being behind its back.
        execution, handle = self._make()
        lane = _Lane(execution, handle)
        lane.thread = threading.Thread(target=self._serve, args=(lane,), name=f"trtx_py-{handle}", daemon=True)
        lane.thread.start()
        self._lanes.append(lane)

    def busy(self) -> str | None:
        """What is in flight and waited for, or None. What was cancelled is nobody's any more: ``drain`` sees it out.

        Takes no lock: whoever asks holds the lock of the ownership tree.
        """
        return self._in_flight(sum(not request.cancelled for request in self._running()))

    def at_work(self) -> str | None:
        """What is in flight, or None: cancelled requests that run occupy the execution context too."""
        return self._in_flight(len(self._running()))

    def _in_flight(self, running: int) -> str | None:
        waiting = sum(not request.cancelled for request in list(self._waiting))
        return f"{running} requests running, {waiting} waiting" if running or waiting else None

    def _running(self) -> list[Request]:
        found = [lane.running for lane in list(self._lanes)]
        return [request for request in found if request is not None]

    def load(self) -> tuple[int, int, int, int]:
        """Requests waiting, requests running, lanes, execution contexts."""
        with self._lock:
            return (
                sum(not request.cancelled for request in self._waiting),
                sum(lane.running is not None for lane in self._lanes),
                len(self._lanes),
                sum(lane.execution.has_context for lane in self._lanes),
            )

    def refuse(self) -> None:
        """From now on ``submit`` raises ClosedError; what was accepted goes on."""
        with self._lock:
            self._refusing = True

    def drain(self) -> None:
        """Wait until every accepted request has ended, then until the lanes' threads have."""
        with self._lock:
            self._refusing = self._stopping = True
            self._changed.notify_all()
            threads = [lane.thread for lane in self._lanes if lane.thread is not None]
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()

    def park(self) -> None:
        """Give the contexts of idle lanes back, so that a caller can have their profiles.

        Raises BorrowedError if a lane is at work.
        """
        with self._lock:
            for lane in self._lanes:
                if lane.running is not None:
                    raise BorrowedError(
                        f"a request in flight on {lane.handle} uses the optimization profile, and this plan lets one "
                        "context at a time use it; await the request first",
                        borrowers=[lane.handle.describe()],
                    )
            for lane in self._lanes:
                lane.execution.drop_context()

    def _serve(self, lane: _Lane) -> None:
        while (request := self._next(lane)) is not None:
            if not self._run(lane, request):
                return
            del request  # an idle lane must not keep the last caller's arrays alive

    def _next(self, lane: _Lane) -> Request | None:
        with self._lock:
            while True:
                while self._waiting:
                    request = self._waiting.popleft()
                    if request.start():
                        lane.running = request
                        return request
                    self.counts.cancelled += 1
                    request.finish(None, None)
                if self._stopping:
                    return None
                self._idle += 1
                self._changed.wait()
                self._idle -= 1

    def _run(self, lane: _Lane, request: Request) -> bool:
        """Serve one request; False if the lane has to end because the plan has no profile for it."""
        retired = self._retired
        try:
            result = lane.execution.run(request)
        except BorrowedError as error:
            goes_on = self._step_back(lane, request, retired)
            if goes_on is None:
                self._failed(lane, request, error)
            return goes_on is not False
        except BaseException as error:
            self._failed(lane, request, error)
            return True
        with self._lock:
            if request.cancelled:
                self.counts.cancelled += 1
            else:
                self.counts.completed += 1
            lane.running = None
        request.finish(result, None)
        return True

    def _step_back(self, lane: _Lane, request: Request, retired: int) -> bool | None:
        """The plan lets one context at a time use a profile, and ``lane`` could not have the one it needs.

        False if a lane beside it holds one: then this lane gives its own back and ends, and the others serve. True if
        such a lane has ended meanwhile (more than ``retired`` had): then this one tries again. None if nobody here is
        in the way.
        """
        with self._lock:
            holds = any(other.execution.holds_profile for other in self._lanes if other is not lane)
            if not holds and self._retired == retired:
                return None
            if holds:
                lane.execution.step_back()
                self._lanes.remove(lane)
                self._limit = len(self._lanes)
                self._retired += 1
            lane.running = None
            request.requeue()
            self._waiting.appendleft(request)
            self._changed.notify()
            return not holds

    def _failed(self, lane: _Lane, request: Request, error: BaseException) -> None:
        if not isinstance(error, TrtxError):
            wrapped = ExecutionError(
                f"{self._name}: an inference failed inside trtx_py: {type(error).__name__}: {error}"
            )
            wrapped.__cause__ = error
            error = wrapped
        _forget_locals(error)
        loss = _device_loss(error)
        with self._lock:
            self.counts.failed += 1
            lane.running = None
            doomed: list[Request] = []
            if loss is not None and self._dead is None:
                self._dead = _twin(loss)
                doomed = self._take_all()
                for other in doomed:
                    if other.cancelled:
                        self.counts.cancelled += 1
                    else:
                        self.counts.failed += 1
        request.finish(None, error)
        for other in doomed:
            other.finish(None, self._death())

    def _take_all(self) -> list[Request]:
        waiting = list(self._waiting)
        self._waiting.clear()
        return waiting

    def _death(self) -> ExecutionError:
        # Closing this one alone does not help: engines beside it keep the primary context, and its error, alive.
        error = ExecutionError(
            f"{self._name} is dead: its device failed ({self._dead}) and stays broken in this process until everything "
            "on it is closed; close every engine, runtime and Device on that device, then open another one"
        )
        error.__cause__ = self._dead
        return error


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _device_loss(error: BaseException) -> CudaError | None:
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
