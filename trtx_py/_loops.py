"""Event loops and the native hot path: one Hub for each loop, and awaiting a Wait on asyncio and on trio."""

from __future__ import annotations

import sys
import types
import weakref
from asyncio import AbstractEventLoop, get_running_loop
from collections.abc import Awaitable, Generator
from typing import Any, cast

from ._native import Hub, Port, Wait

#: A slot that was given back in flight comes back silently: whoever is queued has it looked for this often.
_PUMP_INTERVAL_S = 0.001

# By id(loop): a Hub that is alive keeps its loop alive, so the number is still that loop's; the loop keeps the Hub
# alive, by watching its fd. Nothing here keeps either.
_hubs: dict[int, weakref.ref[Hub]] = {}
_modules = sys.modules
_trio_hub: Any = None  # a trio RunVar, made when trio is first used


def _running_trio() -> Any:
    """The trio package if a trio task runs here, also as a guest of asyncio; None if not."""
    lowlevel = getattr(_modules.get("trio"), "lowlevel", None)
    return _modules["trio"] if lowlevel is not None and lowlevel.in_trio_task() else None


def current_hub() -> Hub:
    """The Hub of the event loop that runs here, made at its first use; it ends with the loop.

    Raises:
        RuntimeError: no event loop runs in this thread.
    """
    if "trio" in _modules and (trio := _running_trio()) is not None:
        return _hub_of_trio(trio)
    loop = get_running_loop()
    reference = _hubs.get(id(loop))
    hub = reference() if reference is not None else None
    return hub if hub is not None else _hub_of_asyncio(loop)


def _hub_of_asyncio(loop: AbstractEventLoop) -> Hub:
    hub = Hub(loop.create_future)
    loop.add_reader(hub.fd, hub.drain)
    key = id(loop)

    def forget(reference: weakref.ref[Hub]) -> None:
        if _hubs.get(key) is reference:
            del _hubs[key]

    _hubs[key] = weakref.ref(hub, forget)
    return hub


def _hub_of_trio(trio: Any) -> Hub:
    global _trio_hub
    if _trio_hub is None:
        _trio_hub = trio.lowlevel.RunVar("trtx_py hub")
    try:
        found: Hub = _trio_hub.get()
    except LookupError:
        found = Hub(None)
        _trio_hub.set(found)
        trio.lowlevel.spawn_system_task(_drain_on_trio, trio, found)
    return found


async def _drain_on_trio(trio: Any, hub: Hub) -> None:
    while True:
        await trio.lowlevel.wait_readable(hub.fd)
        hub.drain()


def finish(wait: Wait) -> Awaitable[Any]:
    """What to await for the result of ``wait``, in the event loop whose Hub it was submitted with.

    Cancellation: queued, nothing ran; in flight, the result is dropped and the slot comes back when the GPU is done.
    """
    if wait.queued:
        _keep_pumping(wait)
    return wait if wait.awaitable else _finish_on_trio(wait)


@types.coroutine
def _yield() -> Generator[None, None, None]:
    yield


def turn() -> Awaitable[None]:
    """Let the event loop turn once. Cancellation: as any other suspension."""
    if "trio" in _modules and (trio := _running_trio()) is not None:
        return cast("Awaitable[None]", trio.lowlevel.checkpoint())
    return _yield()


async def _finish_on_trio(wait: Wait) -> Any:
    trio = _modules["trio"]
    event = trio.Event()
    wait.set_waker(event.set)
    try:
        await event.wait()
    except BaseException:
        wait.cancel()
        raise
    return wait.result()


def _keep_pumping(wait: Wait) -> None:
    """Serve the queue from a timer of this loop for as long as anything is queued."""
    hub, port = wait.hub, wait.port
    if hub is None or port is None or port in hub.pumping:
        return
    hub.pumping.add(port)
    if wait.awaitable:
        loop = get_running_loop()
        loop.call_later(_PUMP_INTERVAL_S, _pump_on_asyncio, loop, hub, port)
    else:
        trio = _modules["trio"]
        trio.lowlevel.spawn_system_task(_pump_on_trio, trio, hub, port)


def _pump_on_asyncio(loop: AbstractEventLoop, hub: Hub, port: Port) -> None:
    if port.pump():
        loop.call_later(_PUMP_INTERVAL_S, _pump_on_asyncio, loop, hub, port)
    else:
        hub.pumping.discard(port)


async def _pump_on_trio(trio: Any, hub: Hub, port: Port) -> None:
    try:
        while port.pump():
            await trio.sleep(_PUMP_INTERVAL_S)
    finally:
        hub.pumping.discard(port)
