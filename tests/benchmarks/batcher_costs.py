"""Where the time of single rows goes: samples of what the loop's thread runs, and what the parts cost on their own."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from .batcher_clients import Served, SingleRows
from .policy_rate import scheduling_rate

_SAMPLE_S = 0.001
_SHOWN = 14


def costs_alone(served: Served) -> dict[str, Callable[[int], float]]:
    """Rows per second of the parts, for so many batches: what remains of a row's time is everything else."""
    batch = served.batch
    return {
        "a future for each row": lambda batches: served.run(_futures(batch, served.in_flight, batches)),
        "copying each row in and out": lambda batches: _copying(served, batches),
        "scheduling tickets": lambda batches: scheduling_rate(batch, batches * batch),
    }


async def _futures(batch: int, callers: int, batches: int) -> float:
    """As many callers, each of whom awaits a future; a callback resolves those of a batch at once."""
    loop, left, calls = asyncio.get_running_loop(), batches * batch, batches * batch
    waiting: list[asyncio.Future[None]] = []

    def answer() -> None:
        answered = waiting[:batch]
        del waiting[:batch]
        for future in answered:
            future.set_result(None)
        if waiting or left > 0:
            loop.call_soon(answer)

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            future = loop.create_future()
            waiting.append(future)
            await future

    loop.call_soon(answer)
    begun = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return calls / (time.perf_counter() - begun)


def _copying(served: Served, batches: int) -> float:
    """By numpy, row by row, as large as inputs and outputs are."""
    batch = served.batch
    given = list(served.inputs.first.values())
    rows = [[array[i : i + 1] for array in given] for i in range(batch)]
    targets = [np.empty_like(array) for array in given]
    outputs = {
        tensor.name: np.zeros((batch, *tensor.shape[1:]), tensor.dtype.numpy)
        for tensor in served.engine.io_tensors
        if tensor.name not in served.inputs.first
    }
    begun = time.perf_counter()
    for _ in range(batches):
        answers = []
        for i, row in enumerate(rows):
            for target, array in zip(targets, row, strict=True):
                target[i : i + 1] = array
            answers.append({name: array[i : i + 1].copy() for name, array in outputs.items()})
    return batches * batch / (time.perf_counter() - begun)


def sampled_shares(way: SingleRows, batches: int) -> dict[str, Any]:
    """Run once more, and look every few milliseconds of CPU time which Python function the thread is in. C code counts
    for the Python function that called it; the clock is the process', so a thread that spins adds samples, and does not
    move them."""
    if threading.current_thread() is not threading.main_thread():
        return {"samples": 0, "shares": {}}
    found: Counter[str] = Counter()

    def look(_number: int, frame: FrameType | None) -> None:
        if frame is not None:
            path = Path(frame.f_code.co_filename)
            found[f"{path.parent.name}/{path.name}:{frame.f_code.co_name}"] += 1

    before = signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, _SAMPLE_S, _SAMPLE_S)
    try:
        way.rate(batches)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    total = sum(found.values())
    return {"samples": total, "shares": {name: count / total for name, count in found.most_common(_SHOWN)}}
