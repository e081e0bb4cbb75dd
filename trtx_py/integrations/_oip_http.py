"""The inference endpoint's HTTP: a body taken from an ASGI server, an answer given to it, errors as statuses.

Plain ASGI: a Request and a Response object for each inference would cost more than all the rest of it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, TypeAlias

import trtx_py as trtx

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

_log = logging.getLogger("trtx_py")
#: Bodies up to this size are sent in one piece; above it copying would cost more than another write.
_JOINED_BYTES = 64 << 10


class Refused(Exception):  # noqa: N818  it is an answer
    """An answer other than tensors.

    Attributes:
        status: the HTTP status.
        message: for the body, which is ``{"error": message}``.
        retry: the client should come again (Retry-After).
        close: the connection ends with this answer.
    """

    def __init__(self, status: int, message: str, *, retry: bool = False, close: bool = False) -> None:
        super().__init__(message)
        self.status, self.message, self.retry, self.close = status, message, retry, close


class Disconnected(Exception):  # noqa: N818  nobody is there to be told
    """The client went away while it sent its request."""


def draining() -> Refused:
    """What new requests are told at the end."""
    return Refused(503, "the server is shutting down and takes no new requests", retry=True, close=True)


def refusal(error: Exception) -> Refused:
    """The status that says what the client can do about it. What is no error of this package is logged, not shown."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, trtx.InvalidArgumentError):
        return Refused(400, str(error))
    if isinstance(error, (trtx.OverloadedError, trtx.NoDeviceError)):  # devices may come back
        return Refused(503, str(error), retry=True)
    if isinstance(error, TimeoutError):  # DeadlineExceededError is one
        return Refused(504, str(error) or "the request's timeout passed; its result was dropped")
    if isinstance(error, trtx.ClosedError):
        return Refused(503, str(error), retry=True, close=True)
    if isinstance(error, trtx.TrtxError):
        _log.error("an inference failed: %s", error)
        return Refused(500, str(error))
    _log.error("an inference failed", exc_info=error)
    return Refused(500, f"{type(error).__name__} inside the server; its log says more")


def read_headers(headers: Iterable[tuple[bytes, bytes]]) -> tuple[int | None, int | None]:
    """Length of the body, if it is known, and of the JSON in front of it.

    Raises:
        InvalidArgumentError: one of them is no number.
        Refused: the body is compressed.
    """
    length: int | None = None
    header_length: int | None = None
    for name, value in headers:
        if name == b"content-length":
            length = _number(value, "Content-Length")
        elif name == b"inference-header-content-length":
            header_length = _number(value, "Inference-Header-Content-Length")
        elif name == b"content-encoding" and value.lower() != b"identity":
            raise Refused(415, f"Content-Encoding is {value.decode('latin-1')[:40]!r}; send the body as it is")
    return length, header_length


def _number(value: bytes, name: str) -> int:
    if not value.isdigit() or len(value) > 18:  # more is no size of anything
        raise trtx.InvalidArgumentError(f"{name} is {value.decode('latin-1')[:40]!r}; expected a number of bytes")
    return int(value)


async def receive_body(receive: Receive, length: int | None, limit: int) -> bytes:
    """The body, as the server's own bytes where it came in one piece.

    One that is too large is read up to twice the limit and dropped, so that a client that sends first and reads then is
    there to see the answer.

    Raises:
        Refused: 413, it is larger than ``limit``.
        Disconnected: there is nobody to answer.
    """
    if length is not None and length > 2 * limit:
        raise _too_large(length, limit)
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Disconnected
    first: bytes = message.get("body", b"")
    size, pieces = len(first), [first]
    while message.get("more_body"):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        piece: bytes = message.get("body", b"")
        size += len(piece)
        if size <= limit:
            pieces.append(piece)
        elif size > 2 * limit:
            break
    if size > limit:
        raise _too_large(length or size, limit)
    return first if len(pieces) == 1 else b"".join(pieces)


def _too_large(size: int, limit: int) -> Refused:
    return Refused(413, f"the body has {size} bytes; this server takes at most {limit}", close=True)


async def send_answer(send: Send, header: bytes, tensors: list[memoryview]) -> None:
    """Status 200 with the JSON and what follows it; large tensors as views, which the server writes out or keeps."""
    total = len(header)
    for tensor in tensors:
        total += len(tensor)
    headers = [(b"content-length", b"%d" % total)]
    if tensors:
        headers.append((b"content-type", b"application/octet-stream"))
        headers.append((b"inference-header-content-length", b"%d" % len(header)))
    else:
        headers.append((b"content-type", b"application/json"))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if total <= _JOINED_BYTES:
        await send({"type": "http.response.body", "body": b"".join([header, *tensors])})
        return
    await send({"type": "http.response.body", "body": header, "more_body": bool(tensors)})
    for number, tensor in enumerate(tensors, 1):
        await send({"type": "http.response.body", "body": tensor, "more_body": number < len(tensors)})


async def send_error(send: Send, refused: Refused, retry_after_s: int) -> None:
    """The status with ``{"error": message}``."""
    body = json.dumps({"error": refused.message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if refused.retry:
        headers.append((b"retry-after", b"%d" % retry_after_s))
    if refused.close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
