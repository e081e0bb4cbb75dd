"""How long our code holds the event loop: every callback of asyncio is timed, in a pass of its own."""

from __future__ import annotations

import asyncio
import asyncio.events
import contextlib
import time
from typing import Any

import numpy as np

import trtx_py as trtx

from .bare_contenders import Bench
from .ours import MODES
from .rig import Rig
from .workloads import Inputs, Workload

_AT_ONCE = 32
_BLOCK_S = 0.004  # longer than 32 of the small engine's requests


class CallbackClock:
    """Times every callback of every asyncio loop while it is entered, by its kind.

    A callback's kind is what ``mark`` last said within it, else "turn". Its own cost (about 0.2 us a callback) is in
    the figures; ``idle_callback_us`` in the results says what an empty callback takes here.
    """

    def __init__(self) -> None:
        self.times: dict[str, list[int]] = {}
        self.order: list[tuple[str, int]] = []
        self._kind = "turn"

    def mark(self, kind: str) -> None:
        """The callback that runs now is of this kind."""
        self._kind = kind

    def __enter__(self) -> CallbackClock:
        self._original = original = asyncio.events.Handle._run
        clock, times, order = time.perf_counter_ns, self.times, self.order

        def run(handle: asyncio.Handle) -> None:
            self._kind = "turn"
            begun = clock()
            original(handle)
            taken = clock() - begun
            times.setdefault(self._kind, []).append(taken)
            order.append((self._kind, taken))

        asyncio.events.Handle._run = run  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *exc_info: object) -> None:
        asyncio.events.Handle._run = self._original  # type: ignore[method-assign]


def _percentiles(times_ns: list[int] | np.ndarray) -> dict[str, Any]:
    if len(times_ns) == 0:
        return {"samples": 0}
    p50, p99 = np.percentile(times_ns, (50, 99))
    return {
        "samples": len(times_ns),
        "p50_us": float(p50) / 1e3,
        "p99_us": float(p99) / 1e3,
        "max_us": float(np.max(times_ns)) / 1e3,
    }


async def _one_by_one(engine: trtx.Engine, inputs: Inputs, count: int) -> CallbackClock:
    async with engine.alloc_inputs(inputs.shapes) as slot:
        for name, array in inputs.first.items():
            slot[name][...] = array
        for _ in range(100):
            await slot.infer()
        clock = CallbackClock()
        with clock:
            for _ in range(count):
                await asyncio.sleep(0)  # the submission has a callback of its own
                clock.mark("submit")
                await slot.infer()
                clock.mark("completion")
    return clock


async def _at_once(engine: trtx.Engine, inputs: Inputs, count: int) -> dict[str, Any]:
    """All slots in flight, the loop blocked until all are done: what then runs is timed, callback by callback."""
    longest, together, submitting = [], [], []
    async with contextlib.AsyncExitStack() as undo:
        slots = [await undo.enter_async_context(engine.alloc_inputs(inputs.shapes)) for _ in range(_AT_ONCE)]
        for slot in slots:
            for name, array in inputs.first.items():
                slot[name][...] = array
            await slot.infer()
        clock = CallbackClock()
        with clock:
            for _ in range(count):
                clock.order.clear()
                tasks = [asyncio.ensure_future(slot.infer()) for slot in slots]
                await asyncio.sleep(0)  # each task submits in a callback of its own
                submitting.append(sum(taken for _, taken in clock.order))
                clock.mark("blocked")
                time.sleep(_BLOCK_S)  # noqa: ASYNC251 - blocking the loop is the point
                clock.order.clear()
                await asyncio.gather(*tasks)
                ours = [taken for kind, taken in clock.order if kind == "turn"]
                longest.append(max(ours))
                together.append(sum(ours))
    return {
        "longest_callback": _percentiles(longest),
        "all_callbacks_together": _percentiles(together),
        "submitting_all": _percentiles(submitting),
    }


async def _idle(count: int) -> dict[str, Any]:
    loop, clock = asyncio.get_running_loop(), CallbackClock()
    with clock:
        for _ in range(count):
            loop.call_soon(clock.mark, "idle")
            await asyncio.sleep(0)
    return _percentiles(clock.times["idle"])


def run_loop_hold(rig: Rig, workload: Workload) -> dict[str, Any]:
    """On asyncio, captured shape, pinned slots."""
    inputs = Inputs(rig.kit, workload)
    count, floods = rig.settings.count(5000, 1000), rig.settings.count(200, 50)
    with contextlib.ExitStack() as undo:
        engine = rig.bare.deserialize(rig.plan_bytes(workload.engine))
        bench = Bench(rig.bare, rig.floor, engine, inputs.shapes, inputs.first)
        undo.callback(bench.close)
        launches = bench.floor.launches(bench.graph, bench.lane.stream, bench.place.event, count)[count // 10 :]
        result: dict[str, Any] = {
            "launch_in_c": _percentiles(launches),
            "idle_callback": rig.loops.run("asyncio", _idle(2000)),
            "completions_at_once": _AT_ONCE,
            "modes": {},
        }
        engines = undo.enter_context(rig.engines(workload.engine))
        launch = float(np.median(launches))
        for mode in MODES:
            ours = engines.get(completion=mode, slots=_AT_ONCE)
            clock = rig.loops.run("asyncio", _one_by_one(ours, inputs, count))
            kinds = {kind: _percentiles(times) for kind, times in clock.times.items()}
            submit = np.asarray(clock.times["submit"], np.float64)
            result["modes"][mode] = {
                "callbacks": kinds,
                "submit_beyond_launch": _percentiles(submit - launch),
                "at_once": rig.loops.run("asyncio", _at_once(ours, inputs, floods)),
            }
    return result
