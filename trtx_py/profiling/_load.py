"""The measured run: callers that send requests one after another, with the time of every step of each."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from typing import Any, cast

import anyio

from .._engine import Engine
from .._graphs import ReroutedError
from .._loops import current_hub, finish
from .._request import Request
from ..serving._batcher import DynamicBatcher
from ..serving._memory import Run
from ._nvtx import Ranges
from ._report import BatchTimes, RequestTimes

GRAPH, LANE, BATCHER = "graph", "lane", "batcher"

#: Way, then nanoseconds of time.perf_counter_ns: submitted, launched, completed, resumed; 0 for what is not known.
Steps = tuple[str, int, int, int, int]


class Load:
    """Requests of ``concurrency`` callers, each of which sends its next one when it has its result.

    For an engine it takes the steps of ``Engine.infer``, and looks at the clock between them.

    Attributes:
        times: of each finished request, in the order they finished: its worker, and its steps.
        batches: of a batcher, likewise: the lane, wanted and computed rows, launched and completed.
    """

    def __init__(
        self, target: Engine | DynamicBatcher, inputs: Mapping[str, Any], requests: int, ranges: Ranges
    ) -> None:
        batcher = target if isinstance(target, DynamicBatcher) else None
        self._engine = batcher.engine if batcher is not None else cast(Engine, target)
        self._batcher, self._inputs, self._ranges = batcher, inputs, ranges
        self._numbers = itertools.repeat(None, requests)
        self._error: BaseException | None = None
        self.times: list[tuple[int, Steps]] = []
        self.batches: list[tuple[object, int, int, int, int]] = []

    async def run(self, concurrency: int) -> None:
        """All of them. Raises the first failure, when every caller has ended. Cancellation: as ``Engine.infer``."""
        if self._batcher is None:
            await self._run(concurrency)
            return
        launcher = self._batcher._launcher
        before, launcher.on_batch = launcher.on_batch, self._note
        try:
            await self._run(concurrency)
        finally:
            launcher.on_batch = before

    def _note(self, run: Run, wanted: int) -> None:
        if run.launched_ns:
            self.batches.append((run.lane, wanted, run.size, run.launched_ns, run.completed_ns))

    async def _run(self, concurrency: int) -> None:
        if concurrency == 1:
            await self._call(0)
            return
        async with anyio.create_task_group() as group:
            for worker in range(concurrency):
                group.start_soon(self._guarded, worker, group.cancel_scope)
        error, self._error = self._error, None
        if error is not None:
            raise error

    async def _guarded(self, worker: int, scope: anyio.CancelScope) -> None:
        try:
            await self._call(worker)
        except Exception as error:  # the first one counts, and a group's error is not one that callers know
            self._error = self._error or error
            scope.cancel()

    async def _call(self, worker: int) -> None:
        for _ in self._numbers:
            with self._ranges.span("request"):
                self.times.append((worker, await (self._infer() if self._batcher is None else self._infer_batched())))

    async def _infer_batched(self) -> Steps:
        assert self._batcher is not None
        submitted = time.perf_counter_ns()
        await self._batcher.infer(self._inputs)
        return BATCHER, submitted, 0, 0, time.perf_counter_ns()

    async def _infer(self) -> Steps:
        engine, clock = self._engine, time.perf_counter_ns  # CLOCK_MONOTONIC, as the native side's
        front, inputs = engine._front, self._inputs
        submitted = clock()
        wait = engine._submit(inputs, current_hub())
        arrays, profiles = ({}, []) if wait is not None else front.checked(inputs)
        if wait is None:  # it may have been only the form that did not fit
            wait = engine._submit(arrays, current_hub())
        if wait is not None:
            try:
                await finish(wait)
                resumed = clock()
                return GRAPH, submitted, wait.launched_ns, wait.completed_ns or resumed, resumed
            except ReroutedError:
                front.rerouted += 1
                arrays, profiles = front.checked(inputs)
        request = Request(arrays, profiles)
        front.lanes.submit(request)
        result = await request.wait()
        resumed = clock()
        return LANE, submitted, request.started_ns, request.submitted_ns + int(result.latency_ms * 1e6), resumed


def requests_of(load: Load, began_ns: int) -> list[RequestTimes]:
    """As the report has them, in the order they were submitted."""

    def since(at_ns: int) -> float | None:
        return (at_ns - began_ns) / 1e3 if at_ns else None

    found = [
        RequestTimes(
            worker, way, (submitted - began_ns) / 1e3, since(launched), since(completed), (resumed - began_ns) / 1e3
        )
        for worker, (way, submitted, launched, completed, resumed) in load.times
    ]
    return sorted(found, key=lambda each: each.submitted)


def batches_of(load: Load, began_ns: int) -> list[BatchTimes]:
    """Likewise, by their launch."""
    lanes: dict[int, int] = {}
    return [
        BatchTimes(
            lanes.setdefault(id(lane), len(lanes)),
            rows,
            size,
            (launched - began_ns) / 1e3,
            (completed - began_ns) / 1e3,
        )
        for lane, rows, size, launched, completed in sorted(load.batches, key=lambda each: each[3])
    ]
