"""What ``serving_http`` asks: one uvicorn with four applications, told apart by the model's name.

``bare``: a Starlette endpoint that reads the body and gives fixed bytes. ``infer``: the same, which awaits the engine
in between, on an array that was there before. ``oip``: the Open Inference Protocol application over the same engine.
``quick``: the application over a model that answers at once.

    python -m tests.benchmarks.serving_http_server PORT
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import trtx_py as trtx
from trtx_py.integrations._oip_codec import InferRequest, write_response
from trtx_py.integrations.open_inference import Model, OpenInferenceApp, Servable, TensorMetadata, create_app

from .serving_contenders import MAX_BATCH, MAX_DELAY_S, WIDTH, Kind, engine_of

KIND = Kind("no time, no numbers", 0.0, False, 1, 1)


def _answer(name: str) -> Response:
    """What the protocol's application would give: zeros."""
    request = InferRequest({}, binary=True)
    header, tensors = write_response(name, "1", request, {"y": np.zeros((1, WIDTH), np.float32)})
    return Response(
        header + b"".join(tensors),
        media_type="application/octet-stream",
        headers={"Inference-Header-Content-Length": str(len(header))},
    )


def fixed(name: str, servable: Servable | None) -> Any:
    """A bare endpoint."""
    content = _answer(name)
    ready = {"x": np.zeros((1, WIDTH), np.float32)}
    kept = {key: value for key, value in content.headers.items() if key != "content-length"}

    async def endpoint(request: Request) -> Response:
        await request.body()
        if servable is not None:
            await servable.infer(ready)
        return Response(content.body, headers=kept)

    return Starlette(routes=[Route("/v2/models/{model}/infer", endpoint, methods=["POST"])])


class _AtOnce:
    """Answers without an engine."""

    def __init__(self) -> None:
        self._outputs = {"y": np.zeros((1, WIDTH), np.float32)}

    async def infer(self, inputs: Any, /) -> Any:
        return self._outputs


def alone(name: str) -> OpenInferenceApp:
    """The application without an engine."""
    inputs, outputs = ([TensorMetadata(name, "FP32", (-1, WIDTH))] for name in "xy")
    return create_app({name: Model(_AtOnce(), inputs, outputs)})


async def _cpu(request: Request) -> Response:
    return JSONResponse(time.process_time())


class Chooser:
    """One ASGI application in front of four: the first by the path, so that each pays the same for it."""

    def __init__(self) -> None:
        self._apps: dict[str, Any] = {}
        self._rest = Starlette(routes=[Route("/cpu", _cpu)], lifespan=self._opened)

    @contextlib.asynccontextmanager
    async def _opened(self, _: Any) -> AsyncIterator[None]:
        async with (
            engine_of(KIND) as engine,
            trtx.DynamicBatcher(engine, max_batch_size=MAX_BATCH, max_delay_s=MAX_DELAY_S) as batcher,
        ):
            self._apps = {
                "/v2/models/bare/infer": fixed("bare", None),
                "/v2/models/infer/infer": fixed("infer", batcher),
                "/v2/models/oip/infer": create_app({"oip": batcher}),
                "/v2/models/quick/infer": alone("quick"),
            }
            yield
            self._apps = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._apps.get(scope.get("path", ""), self._rest)(scope, receive, send)


if __name__ == "__main__":
    config = uvicorn.Config(Chooser(), port=int(sys.argv[1]), access_log=False, log_level="warning")
    asyncio.run(uvicorn.Server(config).serve())
