"""One inference on its way: what was asked, who waits for it, and how it ended."""

from __future__ import annotations

import asyncio
import enum
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio

from ._aio import loop_poster
from ._inputs import Given

if TYPE_CHECKING:
    from ._capture import ShapeKey
    from .cuda._device import Device


@dataclass(frozen=True)
class InferenceResult:
    """What ``infer_timed`` returns.

    Attributes:
        outputs: new arrays that the caller owns, by output tensor name; on the host, or on the device if asked for.
        latency_ms: from the submission until the outputs were there.
        queue_ms: the part of it before a lane took the request.
        gpu_ms: TensorRT's part on the GPU, between two events around the enqueue; copies are not in it.
    """

    outputs: Mapping[str, Any]
    latency_ms: float
    queue_ms: float
    gpu_ms: float


class Phase(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


class Request:
    """Thread-safe: the lane starts and finishes it, the waiter may cancel it until it is started."""

    def __init__(
        self,
        arrays: Given,
        profiles: list[int],
        *,
        timed: bool = False,
        outputs_on: Device | None = None,
        capture: ShapeKey | None = None,
        within: ShapeKey | None = None,
        places: int = 0,
        background: bool = False,
    ) -> None:
        self.arrays = arrays
        self.profiles = profiles
        self.timed = timed
        self.outputs_on = outputs_on  # None: the host
        self.capture = capture  # not an inference: record this shape
        self.within = within  # in the memory of this larger one
        self.places = places  # with so many slots at least
        self.background = background  # nobody waits for it
        self.attempts = 0
        self.key: ShapeKey | None = None  # filled in by the lane
        self.counted = capture is not None  # by somebody else, or not an inference: the lane counts the others
        self.submitted_ns = time.perf_counter_ns()
        self.started_ns = 0
        self.cancelled = False
        self.result: InferenceResult | None = None
        self.error: BaseException | None = None
        self.on_end: Callable[[], object] | None = None
        self._phase = Phase.WAITING
        self._lock = threading.Lock()

    def start(self) -> bool:
        """The lane takes it; False if it was cancelled before: then nothing runs."""
        with self._lock:
            if self.cancelled:
                return False
            self._phase = Phase.RUNNING
            self.started_ns = time.perf_counter_ns()
            return True

    def requeue(self) -> None:
        """The lane that took it cannot serve it and gives it back untouched."""
        with self._lock:
            self._phase = Phase.WAITING

    def finish(self, result: InferenceResult | None, error: BaseException | None) -> None:
        """Hand over the outcome; the first one counts."""
        with self._lock:
            if self._phase is Phase.ENDED:
                return
            self._phase = Phase.ENDED
            self.result, self.error = result, error
            self.arrays = {}
            wake, self.on_end = self.on_end, None
        if wake is not None:
            wake()

    def cancel(self) -> None:
        """Nobody waits any more. Before the start nothing runs; after it the result is dropped."""
        with self._lock:
            self.cancelled = True
            self.on_end = None  # nobody is to be woken, and it refers to the waiter's loop
            if self._phase is Phase.WAITING:
                self.arrays = {}  # it may wait long for a lane to look at it; its inputs need not

    def outcome(self) -> InferenceResult:
        error, self.error = self.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback refers to this frame, and to the request: no cycles
        assert self.result is not None
        return self.result

    async def wait(self) -> InferenceResult:
        """Wait in the running event loop.

        Cancellation: before the lane took the request nothing runs; after it the result is dropped.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return await self._wait_on_trio()
        future: asyncio.Future[None] = loop.create_future()
        post = loop_poster()

        def resolve() -> None:
            if not future.done():
                future.set_result(None)

        self.when_ended(lambda: post(resolve))
        try:
            await future
        except BaseException:  # cancelled, or the loop went away and the coroutine with it (GeneratorExit)
            self.cancel()
            raise
        return self.outcome()

    async def _wait_on_trio(self) -> InferenceResult:
        event = anyio.Event()
        post = loop_poster()
        self.when_ended(lambda: post(event.set))
        try:
            await event.wait()
        except BaseException:
            self.cancel()
            raise
        return self.outcome()

    def wait_sync(self, timeout_s: float | None) -> InferenceResult:
        """Block this thread; TimeoutError cancels as ``wait`` does."""
        event = threading.Event()
        self.when_ended(event.set)
        try:
            if not event.wait(timeout_s):
                raise TimeoutError(f"no result within {timeout_s} s; the request was cancelled")
        except BaseException:
            self.cancel()
            raise
        return self.outcome()

    def when_ended(self, wake: Callable[[], object]) -> None:
        """Call ``wake`` once it has ended, on whatever thread ends it; at once if it has. One at a time."""
        with self._lock:
            self.on_end = wake
            ended = self._phase is Phase.ENDED
        if ended:
            wake()
