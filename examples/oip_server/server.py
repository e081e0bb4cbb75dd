"""Serves a model by the Open Inference Protocol over HTTP, with requests batched, until SIGTERM.

    pip install ".[mock,oip]" uvicorn "tritonclient[http]"     # in a checkout of trtx_py
    python examples/oip_server/server.py --backend mock
    curl localhost:8000/v2/models/digits

At SIGTERM or SIGINT it says that it is not ready, refuses new requests with 503, answers all that it has accepted, and
then ends. Connections that are still in the middle of a request have what is left of --drain-s, and are then cut off. A
second signal ends it at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import uvicorn

import trtx_py as trtx
from trtx_py.integrations.open_inference import OpenInferenceApp, Servable, create_app

MODEL = Path(__file__).parents[1] / "digits" / "digits.onnx"
PROFILE = {"image": ((1, 1, 8, 8), (16, 1, 8, 8), (32, 1, 8, 8))}


def make_app(backend: str | None, model: Path = MODEL) -> OpenInferenceApp:
    """The application; its lifespan opens the model and closes it, behind the last answer."""

    @contextlib.asynccontextmanager
    async def models() -> AsyncIterator[dict[str, Servable]]:
        async with trtx.open_engine(model, backend=backend, profiles=[PROFILE]) as engine:
            await engine.warmup(1)
            async with trtx.DynamicBatcher(engine, max_batch_size=32, max_delay_s=0.001) as batcher:
                yield {model.stem: batcher}

    return create_app(models)


class Server(uvicorn.Server):
    """uvicorn's, that leaves signals to us: at the first it should go on listening, to say that it is not ready."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(app: OpenInferenceApp, host: str, port: int, drain_s: float) -> None:
    server = Server(uvicorn.Config(app, host=host, port=port, access_log=False, log_level="warning"))
    stop, draining = asyncio.Event(), anyio.CancelScope()

    def on_signal() -> None:
        if stop.is_set():
            draining.cancel()
            server.should_exit, server.config.timeout_graceful_shutdown = True, 0
            for task in server.server_state.tasks:
                task.cancel()
        stop.set()

    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, on_signal)
    serving = asyncio.create_task(server.serve())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if stop.is_set():
        until = loop.time() + drain_s
        with draining:
            await app.drain(drain_s)
        if drain_s < math.inf and not draining.cancel_called:
            # A request whose body does not come was not accepted: nothing but this ends its connection.
            server.config.timeout_graceful_shutdown = max(1, math.ceil(until - loop.time()))
    server.should_exit = True  # closes the connections, then the lifespan closes the model
    await serving
    print(app.statistics(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", help="tensorrt, tensorrt_rtx, mock, ...; without it what TRTX_BACKEND says")
    parser.add_argument("--model", type=Path, default=MODEL, help="an ONNX model or a plan")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--drain-s", type=float, default=30.0, help="seconds that accepted requests have at the end")
    options = parser.parse_args()
    asyncio.run(serve(make_app(options.backend, options.model), options.host, options.port, options.drain_s))


if __name__ == "__main__":
    main()
