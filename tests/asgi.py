"""An ASGI server of one request at a time, in process: what an application answers, without a socket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio


@dataclass
class Answer:
    """Status, headers by lower-case name, and the pieces of the body as they were sent."""

    status: int
    headers: Mapping[str, str]
    pieces: list[Any]

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def json(self) -> Any:
        """Of the whole body, or of the part that Inference-Header-Content-Length says."""
        length = self.headers.get("inference-header-content-length")
        return json.loads(self.body if length is None else self.body[: int(length)])

    @property
    def error(self) -> str:
        found = self.json
        assert list(found) == ["error"]
        text: str = found["error"]
        return text


async def ask(
    app: Any,
    path: str,
    body: bytes | Sequence[bytes] | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    method: str | None = None,
    complete: bool = True,
) -> Answer:
    """GET, or POST with a body, which may come in pieces; with ``complete=False`` the client goes away instead."""
    pieces = [body] if isinstance(body, bytes) else list(body or [b""])
    given = {"content-length": str(sum(map(len, pieces))), **{k.lower(): v for k, v in (headers or {}).items()}}
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": piece, "more_body": not complete or number < len(pieces)}
        for number, piece in enumerate(pieces, 1)
    ]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method or ("GET" if body is None else "POST"),
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in given.items() if value],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app(scope, receive, send)
    if not sent:
        return Answer(0, {}, [])
    start, *parts = sent
    assert start["type"] == "http.response.start"
    assert [part.get("more_body", False) for part in parts] == [True] * (len(parts) - 1) + [False]
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    answer = Answer(start["status"], found, [part.get("body", b"") for part in parts])
    assert "content-length" not in found or int(found["content-length"]) == len(answer.body)
    return answer


@asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[None]:
    """The application's startup, and its shutdown at the end of the block."""
    started, stop, stopped = anyio.Event(), anyio.Event(), anyio.Event()
    failure: list[str] = []
    asked = 0

    async def receive() -> dict[str, str]:
        nonlocal asked
        asked += 1
        if asked == 1:
            return {"type": "lifespan.startup"}
        await stop.wait()
        return {"type": "lifespan.shutdown"}

    async def send(message: Any) -> None:
        kind = message["type"]
        if kind.endswith("failed"):
            failure.append(message.get("message", ""))
        (started if ".startup." in kind else stopped).set()

    async with anyio.create_task_group() as group:
        group.start_soon(app, {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
        await started.wait()
        assert not failure, failure[0]
        yield
        stop.set()
        await stopped.wait()
        assert not failure, failure[0]
