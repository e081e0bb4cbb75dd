"""An Open Inference Protocol application served until SIGTERM, without losing what was accepted. Extra: ``serve``."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
from collections.abc import Callable, Iterator

import anyio

from .open_inference import OpenInferenceApp

try:
    import uvicorn
except ImportError as error:
    raise ImportError(
        f"trtx_py.integrations.oip_server needs uvicorn ({error}); install it with: pip install 'trtx-py[serve]'"
    ) from error

__all__ = ["serve"]


class _Server(uvicorn.Server):
    """uvicorn's, that leaves signals to us: at the first it should go on listening, to say that it is not ready."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    app: OpenInferenceApp,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    drain_s: float = 30.0,
    log_level: str = "error",
    on_ready: Callable[[str, int], None] | None = None,
) -> bool:
    """Serve until SIGTERM or SIGINT; then say that it is not ready, answer all that was accepted, and return. A second
    signal gives up what is still under way.

    Args:
        host, port: where to listen; port 0 takes one that is free.
        drain_s: seconds that accepted requests and open connections have at the end.
        log_level: of uvicorn, by its names.
        on_ready: called with host and port when requests are accepted.
    Returns:
        False if it could not start: its models could not be opened, or the port is taken, of which uvicorn's log says
        why; or a signal came first.
    """
    return bool(await serve_or_stop(app, host, port, drain_s, log_level, on_ready))


async def serve_or_stop(
    app: OpenInferenceApp,
    host: str,
    port: int,
    drain_s: float,
    log_level: str,
    on_ready: Callable[[str, int], None] | None,
) -> bool | None:
    """``serve``, that returns None where a signal came before requests were accepted."""
    server = _Server(uvicorn.Config(app, host=host, port=port, access_log=False, log_level=log_level))
    stop, draining = asyncio.Event(), anyio.CancelScope()

    def on_signal() -> None:
        if stop.is_set():  # the second one: at once
            draining.cancel()
            server.should_exit, server.config.timeout_graceful_shutdown = True, 0
            for task in server.server_state.tasks:
                task.cancel()
        stop.set()

    loop = asyncio.get_running_loop()
    caught = (signal.SIGTERM, signal.SIGINT)
    for each in caught:
        loop.add_signal_handler(each, on_signal)
    try:
        return await _until(server, app, stop, draining, drain_s, on_ready)
    finally:
        for each in caught:
            loop.remove_signal_handler(each)


async def _until(
    server: uvicorn.Server,
    app: OpenInferenceApp,
    stop: asyncio.Event,
    draining: anyio.CancelScope,
    drain_s: float,
    on_ready: Callable[[str, int], None] | None,
) -> bool | None:
    loop = asyncio.get_running_loop()
    others = asyncio.all_tasks()
    serving = asyncio.create_task(_served(server))
    stopping = asyncio.create_task(stop.wait())
    try:
        while not (server.started or serving.done() or stop.is_set()):  # noqa: ASYNC110 - uvicorn tells no other way
            await asyncio.sleep(0.01)
        if server.started and on_ready is not None:
            host, port = server.servers[0].sockets[0].getsockname()[:2]
            on_ready(host, port)
        await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    if stop.is_set() and not server.started and not serving.done():
        # uvicorn would wait until all models are built. It keeps no reference to the task that opens them.
        opening = {serving, *(task for task in asyncio.all_tasks() - others if "Lifespan" in repr(task.get_coro()))}
        for task in opening:
            task.cancel()
        await asyncio.wait(opening)
        return None
    if stop.is_set() and server.started:
        until = loop.time() + drain_s
        with draining:
            await app.drain(drain_s)
        if drain_s < math.inf and not draining.cancel_called:
            # A request whose body does not come was not accepted: nothing but this ends its connection.
            server.config.timeout_graceful_shutdown = max(1, math.ceil(until - loop.time()))
    server.should_exit = True  # closes the connections, then the lifespan closes the models
    return await serving and server.started


async def _served(server: uvicorn.Server) -> bool:
    try:
        await server.serve()
    except SystemExit:  # how uvicorn ends when it cannot bind
        return False
    return True
