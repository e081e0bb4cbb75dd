"""The Open Inference Protocol application beside bare Starlette, asked by NVIDIA's client over loopback.

One client that waits for each answer shows what a request takes; 16 at once show how many a second there can be. The
server's own CPU time is what it says itself, and so has no client in it. An inference on the mock is noticed by a
thread, which on two cores takes between 100 and 250 microseconds from one run to the next; so what the application
itself adds is measured without: its share is what a request takes beyond one to the bare endpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.ports import free_port

from .rig import SetupError
from .samples import Round, Samples, compare
from .serving_contenders import WIDTH, compared

ROOT = Path(__file__).parents[2]
_OURS, _OURS_ALONE, _BARE = "Open Inference Protocol", "Open Inference Protocol without inference", "bare Starlette"
WAYS = {_OURS: "oip", "bare Starlette with inference": "infer", _OURS_ALONE: "quick", _BARE: "bare"}
_AT_ONCE = 16
_STARTS_WITHIN_S = 60.0


@contextlib.contextmanager
def _server() -> Iterator[int]:
    """The port of a server that answers."""
    with free_port() as port:
        yield from _server_on(port)


def _server_on(port: int) -> Iterator[int]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.serving_http_server", str(port)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + _STARTS_WITHIN_S
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > until:
                process.kill()
                raise RuntimeError(f"the server does not answer:\n{process.communicate()[1]}")
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.communicate(timeout=_STARTS_WITHIN_S)


def _answers(port: int) -> bool:
    try:
        _cpu_s(port)
    except OSError:
        return False
    return True


def _cpu_s(port: int) -> float:
    """CPU time of the server so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/cpu", timeout=30) as answer:
        return float(answer.read())


class _Client:
    """Asks one model of the server."""

    def __init__(self, triton: Any, port: int, model: str) -> None:
        self._model = model
        self._client = triton.InferenceServerClient(f"127.0.0.1:{port}", concurrency=_AT_ONCE)
        self._input = triton.InferInput("x", [1, WIDTH], "FP32")
        self._input.set_data_from_numpy(np.ones((1, WIDTH), np.float32))

    def infer(self) -> Any:
        return self._client.infer(self._model, [self._input])

    def one_by_one(self, requests: int) -> tuple[float, list[int]]:
        times, begun = [], time.perf_counter_ns()
        for _ in range(requests):
            asked = time.perf_counter_ns()
            self.infer()
            times.append(time.perf_counter_ns() - asked)
        return requests / (time.perf_counter_ns() - begun) * 1e9, times

    def at_once(self, requests: int) -> tuple[float, list[int]]:
        """16 in flight; the times are from the call until the answer."""
        times: list[int] = []
        pool: Any = importlib.import_module("gevent.pool").Pool(_AT_ONCE)

        def one() -> None:
            asked = time.perf_counter_ns()
            self.infer()
            times.append(time.perf_counter_ns() - asked)

        begun = time.perf_counter_ns()
        for _ in range(requests):
            pool.spawn(one)
        pool.join(raise_error=True)
        return len(times) / (time.perf_counter_ns() - begun) * 1e9, times

    def close(self) -> None:
        self._client.close()


def _measured(
    ask: Callable[[str], tuple[float, list[int]]], port: int, clients: int, requests: int, rounds: int
) -> dict[str, Any]:
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    samples = {way: Samples() for way in WAYS}
    cpu_us: dict[str, list[float]] = {way: [] for way in WAYS}
    order = list(WAYS)
    for way in order:
        ask(way)
    for number in range(rounds):
        turn = number % len(order)
        for way in order[turn:] + order[:turn]:
            before = _cpu_s(port)
            rate, times = ask(way)
            cpu_us[way].append((_cpu_s(port) - before) / requests * 1e6)
            rates[way].append(rate)
            samples[way].add(Round(times))
    found = compared(rates, samples, clients, requests)
    found["alone_over_bare"] = compare(samples[_OURS_ALONE], samples[_BARE])
    for way in WAYS:
        found["ways"][way]["server_cpu_us"] = float(np.median(cpu_us[way]))
    return found


def _in_process(calls: int, rounds: int) -> dict[str, float]:
    """Microseconds of a call of each application, without sockets and without inference: the least of all rounds."""
    from .serving_http_server import alone, fixed

    apps = {_OURS_ALONE: alone("oip"), _BARE: fixed("oip", None)}
    x = np.ones((1, WIDTH), np.float32)
    entry = {"name": "x", "shape": [1, WIDTH], "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    header = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    body = header + x.tobytes()
    headers = {"host": "localhost", "content-length": len(body), "inference-header-content-length": len(header)}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v2/models/oip/infer", "raw_path": b"/v2/models/oip/infer", "root_path": "", "query_string": b"",
        "headers": [(name.encode(), str(value).encode()) for name, value in headers.items()],
    }  # fmt: skip
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        sent.append(message)

    async def timed(app: Any) -> float:
        begun = time.perf_counter_ns()
        for _ in range(calls):
            await app(dict(scope), receive, send)
        return (time.perf_counter_ns() - begun) / calls / 1e3

    async def all_rounds() -> dict[str, float]:
        found: dict[str, list[float]] = {name: [] for name in apps}
        for _ in range(rounds):
            for name, app in apps.items():
                sent.clear()
                found[name].append(await timed(app))
                if {message["status"] for message in sent if "status" in message} != {200}:
                    raise AssertionError(f"{name} answered {sent[:2]}")
        return {name: min(times) for name, times in found.items()}

    return asyncio.run(all_rounds())


def run_serving_http(quick: bool, scale: float) -> dict[str, Any]:
    """Raises SetupError where the client or the server is not installed."""
    for package in ("tritonclient", "uvicorn", "starlette"):
        if importlib.util.find_spec(package) is None:
            raise SetupError(f"{package} is not installed: pip install 'trtx-py[test]'")
    triton: Any = importlib.import_module("tritonclient.http")
    rounds, requests = (6, 500) if quick else (12, 1500)
    requests = max(20, int(requests * scale))
    with _server() as port, contextlib.ExitStack() as undo:
        clients = {way: _Client(triton, port, model) for way, model in WAYS.items()}
        for way, client in clients.items():
            undo.callback(client.close)
            found = client.infer().as_numpy("y")
            if found.shape != (1, WIDTH) or found.any():
                raise AssertionError(f"{way} answered {found}")
        one = _measured(lambda way: clients[way].one_by_one(requests), port, 1, requests, rounds)
        many = _measured(lambda way: clients[way].at_once(requests), port, _AT_ONCE, requests, rounds)
    in_process = _in_process(max(100, int(5000 * scale)), rounds)
    alone, bare = one["ways"][_OURS_ALONE], one["ways"][_BARE]
    ratio, interval = one["alone_over_bare"]["p50_ratio"], one["alone_over_bare"]["p50_ratio_ci"]
    return {
        "one client": one,
        f"{_AT_ONCE} clients": many,
        "share_of_p50": 1 - 1 / ratio,
        "share_of_p50_ci": [1 - 1 / each for each in interval],
        "share_of_server_cpu": 1 - bare["server_cpu_us"] / alone["server_cpu_us"],
        "in_process_bare_us": in_process[_BARE],
        "in_process_us": in_process[_OURS_ALONE],
    }
