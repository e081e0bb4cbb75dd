"""Between threads and event loops: waking a loop, and waiting for native work safely under cancellation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import anyio
import anyio.lowlevel

from ._origin import with_origin

T = TypeVar("T")

#: Runs a function on the loop it was made in; callable from any thread; False once that loop is closed.
Poster = Callable[[Callable[[], object]], bool]


def loop_poster() -> Poster:
    """A Poster for the event loop that is running here: asyncio (any loop) or trio."""
    call: Callable[[Callable[[], object]], Any]
    try:
        call = asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:
        native: Any = anyio.lowlevel.current_token().native_token
        call = native.run_sync_soon

    def post(function: Callable[[], object]) -> bool:
        try:
            call(function)
        except RuntimeError:  # asyncio: the loop is closed; trio's RunFinishedError is a RuntimeError too
            return False
        return True

    return post


class _Outcome(Generic[T]):
    """Result of a function that runs on a thread of its own; the thread never depends on the loop that waits."""

    def __init__(self, function: Callable[[], T], on_done: Callable[[], object]) -> None:
        self._function = function
        self._on_done = on_done
        self.done = False
        self._value: T | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:  # handed to the awaiter, whatever it is
            self._error = error
        self.done = True
        self._on_done()

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # done without error: what the function returned


async def run_shielded(
    function: Callable[[], T],
    on_cancel: Callable[[], object] | None = None,
    on_end: Callable[[], object] = bool,
) -> T:
    """Run a blocking function on its own thread and wait until it has ended, whatever happens to the caller.

    Args:
        on_end: called once the function has ended, on its thread, or could not be started: lets go of what it works on.
            A coroutine that is dropped (its loop was closed) cannot wait for it, and must not let go of it either.

    Cancellation: ``on_cancel`` is called (once) so that the function can end early; the wait goes on until it has, and
    only then is the cancellation delivered. Native code never outlives the memory that it works on.
    """

    def run() -> T:
        try:
            return function()
        finally:
            on_end()

    try:
        event = anyio.Event()
        post = loop_poster()
        outcome = _Outcome(with_origin(run), lambda: post(event.set))
        thread = threading.Thread(target=outcome.run, name="trtx_py-worker", daemon=True)
    except BaseException:
        on_end()
        raise
    try:
        thread.start()
    except RuntimeError:  # there is no room for one; after anything else, such as Ctrl-C, it may be running
        on_end()
        raise
    try:
        await event.wait()
    except anyio.get_cancelled_exc_class():
        if not outcome.done and on_cancel is not None:
            on_cancel()
        with anyio.CancelScope(shield=True):
            # asyncio's own task.cancel() goes through the shield: then wait again.
            while not outcome.done:
                try:
                    await event.wait()
                except anyio.get_cancelled_exc_class():
                    continue
        raise
    return outcome.result()
