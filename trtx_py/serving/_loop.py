"""What the batcher needs of an event loop, on asyncio and on trio: soon, later, a future, a task of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import anyio
import anyio.lowlevel

from ._lineup import NEVER


class Outcome(Protocol):
    """A result that one task waits for; set and read in its loop."""

    def done(self) -> bool: ...
    def set_result(self, value: Any, /) -> None: ...
    def set_exception(self, error: BaseException, /) -> None: ...
    def __await__(self) -> Any: ...


class Timer(Protocol):
    def cancel(self) -> object: ...


class Loop(Protocol):
    """The event loop that a batcher belongs to.

    Attributes:
        native: the loop, or trio's token: what tells one loop from another.
        over: it has ended: nothing that it was to do will be done. For any thread.
        stands: it is over, or does not run at this moment, and may be run again. For any thread.
    """

    native: object

    @property
    def over(self) -> bool: ...

    @property
    def stands(self) -> bool: ...

    def now(self) -> float: ...
    def soon(self, function: Callable[[], object], /) -> object: ...
    def soon_threadsafe(self, function: Callable[[], object]) -> None: ...
    def later(self, when: float, function: Callable[[], object], /) -> Timer: ...
    def outcome(self) -> Any: ...
    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None: ...


class AsyncioLoop:
    """asyncio, with any loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.native: object = loop
        self._loop = loop
        self._tasks: set[asyncio.Task[None]] = set()
        self.now = loop.time
        self.soon = loop.call_soon
        self.later = loop.call_at
        self.outcome = loop.create_future

    @property
    def over(self) -> bool:
        return self._loop.is_closed()

    @property
    def stands(self) -> bool:
        return not self._loop.is_running()

    def soon_threadsafe(self, function: Callable[[], object]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)  # the loop refers to its tasks only weakly
        task.add_done_callback(self._tasks.discard)


class _TrioOutcome:
    """As much of asyncio.Future as is needed."""

    def __init__(self) -> None:
        self._event = anyio.Event()
        self._value: Any = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        return self._event.is_set()

    def set_result(self, value: Any) -> None:
        self._value = value
        self._event.set()

    def set_exception(self, error: BaseException) -> None:
        self._error = error
        self._event.set()

    def __await__(self) -> Any:
        yield from self._event.wait().__await__()
        if self._error is not None:
            raise self._error
        return self._value


class TrioLoop:
    """trio, by its token."""

    def __init__(self, token: Any, lowlevel: Any, trio: Any) -> None:
        self.native: object = token
        self._token = token
        self._lowlevel = lowlevel
        self._trio = trio
        self.now: Callable[[], float] = token_clock(token)
        self.soon = token.run_sync_soon
        self.outcome = _TrioOutcome

    @property
    def over(self) -> bool:
        try:
            self._token.run_sync_soon(_nothing, idempotent=True)
        except self._trio.RunFinishedError:
            return True
        return False

    @property
    def stands(self) -> bool:
        return self.over  # it cannot be interrupted

    def soon_threadsafe(self, function: Callable[[], object]) -> None:
        try:
            self._token.run_sync_soon(function)
        except self._trio.RunFinishedError:
            return  # the loop is over, and with it whoever waited

    def later(self, when: float, function: Callable[[], object]) -> Timer:
        scope = self._trio.CancelScope()

        async def sleep() -> None:
            with scope:
                await self._trio.sleep_until(when)
                function()

        self._lowlevel.spawn_system_task(sleep)
        timer: Timer = scope
        return timer

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            await coroutine

        self._lowlevel.spawn_system_task(run)


def _nothing() -> None:
    """What asks whether a loop still takes something."""


def token_clock(token: Any) -> Callable[[], float]:
    """trio's own clock, which tests may replace; only valid inside the loop."""
    import trio  # the token says that it is there

    del token
    return trio.current_time


def running_loop() -> Loop:
    """The loop that runs here. Raises RuntimeError if none does."""
    try:
        return AsyncioLoop(asyncio.get_running_loop())
    except RuntimeError:
        native: Any = anyio.lowlevel.current_token().native_token
    import trio

    return TrioLoop(native, trio.lowlevel, trio)


def running_native() -> object:
    """What ``native`` of the running loop is; cheap. Raises RuntimeError if no loop runs here."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return anyio.lowlevel.current_token().native_token


def until_of(loop: Loop, deadline_s: float | None) -> float:
    """A deadline in so many seconds, by the loop's clock."""
    return NEVER if deadline_s is None else loop.now() + deadline_s
