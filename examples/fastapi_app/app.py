"""A FastAPI application that owns an engine: opened when it starts, drained and closed when it ends.

    pip install ".[mock]" fastapi uvicorn      # in a checkout of trtx_py
    TRTX_BACKEND=mock uvicorn --app-dir examples/fastapi_app app:app
    curl localhost:8000/readyz

On a GPU leave TRTX_BACKEND out.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

import trtx_py as trtx

MODEL = Path(__file__).parents[1] / "digits" / "digits.onnx"
PROFILE = {"image": ((1, 1, 8, 8), (16, 1, 8, 8), (32, 1, 8, 8))}


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Everything that owns GPU memory lives here, on the server's event loop."""
    policy = trtx.BatchPolicy(overload="reject")
    async with trtx.open_engine(MODEL, profiles=[PROFILE], lanes=2) as engine:
        await engine.warmup(1)
        async with trtx.DynamicBatcher(engine, max_batch_size=32, max_queue=1024, policy=policy) as batcher:
            app.state.batcher = batcher
            yield  # serving; what follows runs behind the last answer
            app.state.batcher = None


app = FastAPI(title="digits", lifespan=lifespan)


class Image(BaseModel):
    """Eight rows of eight pixels, one after another."""

    pixels: list[Annotated[float, Field(ge=0, le=16)]] = Field(min_length=64, max_length=64)


class Digit(BaseModel):
    """What the image shows."""

    digit: int
    probability: float


@app.post("/classify")
async def classify(image: Image, request: Request) -> Digit:
    """One image in, one digit out; requests that come at the same time share a launch."""
    array = np.array(image.pixels, np.float32).reshape(1, 1, 8, 8)
    outputs = await request.app.state.batcher.infer({"image": array}, deadline_s=2.0)
    (row,) = outputs["probabilities"]
    return Digit(digit=int(row.argmax()), probability=float(row.max()))


@app.post("/classify-raw")
async def classify_raw(request: Request) -> Response:
    """Any number of images as float32 bytes in, their digits as int64 bytes out: no JSON on the way."""
    body = await request.body()
    if not body or len(body) % 256:
        raise HTTPException(422, f"{len(body)} bytes are no images: each is 64 float32 values, 256 bytes")
    images = np.frombuffer(body, np.float32).reshape(-1, 1, 8, 8)
    outputs = await request.app.state.batcher.infer_many({"image": images}, deadline_s=2.0)
    return Response(outputs["probabilities"].argmax(axis=1).tobytes(), media_type="application/octet-stream")


@app.get("/healthz")
async def alive() -> dict[str, str]:
    """The process answers."""
    return {"status": "alive"}


@app.get("/readyz")
async def ready(request: Request) -> dict[str, str]:
    """The model is loaded."""
    if getattr(request.app.state, "batcher", None) is None:
        raise HTTPException(503, "no model is loaded")
    return {"status": "ready"}


#: What a caller can do about an error is what its status says; the most special class that matches counts.
STATUS = {
    trtx.OverloadedError: 503,
    trtx.DeadlineExceededError: 504,
    trtx.ClosedError: 503,
    trtx.NoDeviceError: 503,
    trtx.InvalidArgumentError: 422,
    trtx.TrtxError: 500,
}


@app.exception_handler(trtx.TrtxError)
async def failed(request: Request, error: Exception) -> JSONResponse:
    """Every error of trtx_py as an answer."""
    status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
    return JSONResponse({"error": str(error)}, status, headers={"Retry-After": "1"} if status == 503 else None)
