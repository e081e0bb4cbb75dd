"""Serving until a signal comes, through sockets and in this process."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the extra oip is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from trtx_py.integrations.oip_server import serve
from trtx_py.integrations.open_inference import Model, TensorMetadata, create_app

BODY = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [2.0]}]}'
HEAD = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
PATIENCE_S = 60.0


class Held:
    """Answers when it is let."""

    def __init__(self) -> None:
        self.begun, self.go, self.given_up = asyncio.Event(), asyncio.Event(), 0

    async def infer(self, inputs: Mapping[str, Any], /) -> Mapping[str, np.ndarray]:
        self.begun.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        return {"y": inputs["x"]}


def app_of(servable: Held) -> Any:
    tensor = [TensorMetadata("x", "FP32", (-1,))]
    return create_app({"m": Model(servable, tensor, [TensorMetadata("y", "FP32", (-1,))])})


class Client:
    """One connection with one request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def asking(cls, port: int, sent: bytes = BODY) -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD % len(BODY) + sent)
        await writer.drain()
        return cls(reader, writer)

    async def answer(self) -> bytes:
        """All that comes until the server closes the connection."""
        try:
            return await asyncio.wait_for(self.reader.read(), PATIENCE_S)
        finally:
            self.writer.close()


async def started(app: Any, drain_s: float) -> tuple[asyncio.Task[bool], int]:
    """A server, and its port."""
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(
        serve(app, port=0, drain_s=drain_s, log_level="critical", on_ready=lambda _, port: ready.set_result(port))
    )
    return server, await asyncio.wait_for(ready, PATIENCE_S)


async def test_the_first_signal_waits_for_what_was_accepted() -> None:
    held = Held()
    server, port = await started(app_of(held), 1000.0)
    client = await Client.asking(port)
    await held.begun.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    done, _ = await asyncio.wait([server], timeout=0.3)
    assert not done
    held.go.set()
    assert b"200 OK" in await client.answer()
    assert await asyncio.wait_for(server, PATIENCE_S)
    assert held.given_up == 0


@pytest.mark.parametrize("drain_s", [1000.0, float("inf")])
@pytest.mark.parametrize("pause", [0.0, 0.3])
async def test_the_second_signal_gives_up_what_was_accepted(pause: float, drain_s: float) -> None:
    held = Held()
    server, port = await started(app_of(held), drain_s)
    client = await Client.asking(port)
    await held.begun.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(pause)
    begun = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)
    assert b"200 OK" not in await client.answer()
    assert await asyncio.wait_for(server, PATIENCE_S)
    assert held.given_up == 1
    assert time.monotonic() - begun < PATIENCE_S


@pytest.mark.parametrize("drain_s", [1000.0, float("inf")])
async def test_the_second_signal_gives_up_what_does_not_come(drain_s: float) -> None:
    """A body in the middle was not accepted, and keeps the connection open behind the draining."""
    app = app_of(Held())
    server, port = await started(app, drain_s)
    client = await Client.asking(port, BODY[:-1])
    await asyncio.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)
    done, _ = await asyncio.wait([server], timeout=0.5)
    assert not done
    os.kill(os.getpid(), signal.SIGINT)
    assert b"200 OK" not in await client.answer()
    assert await asyncio.wait_for(server, PATIENCE_S)
    assert app.statistics().accepted == 0
