"""Callers of a DynamicBatcher: how they hand rows in, all of them at once on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import trtx_py as trtx

from .rig import Rig
from .samples import Round
from .workloads import Arrays, Inputs, Workload

LANES = 3
#: Batches in one call of infer_many: of small rows as many as take a few milliseconds, of large ones fewer.
_BATCHES_OF_MANY, _BATCHES_OF_LARGE = 128, 16
_LARGE_BYTES = 4 << 20
#: A run that takes longer has lost somebody.
_PATIENCE_S = 120.0
#: How far ahead of an arrival the loop stops sleeping: its timers are no finer.
_TIMER_NS = 2_000_000


class Served:
    """An engine of its own with a batcher in front, for one event loop.

    Attributes:
        in_flight: rows that keep every lane busy, with a batch behind each and one that is being filled.
    """

    def __init__(
        self,
        rig: Rig,
        workload: Workload,
        inputs: Inputs,
        loop: str,
        *,
        policy: trtx.BatchPolicy | None = None,
        **serving: Any,
    ) -> None:
        self._rig, self.loop, self.inputs = rig, loop, inputs
        self.batch = workload.sizes[0]
        self.engine = rig.runtime.deserialize_sync(rig.plan(workload.engine), **serving)
        policy = policy or trtx.BatchPolicy()
        self.batcher = trtx.DynamicBatcher(self.engine, max_batch_size=self.batch, batch_axis=0, policy=policy)
        lanes = serving.get("lanes", 1)
        self.in_flight = (lanes * policy.depth + 1) * self.batch

    def run(self, main: Any) -> Any:
        """On its loop, to the end. Raises TimeoutError if that does not come: somebody was lost."""
        return self._rig.loops.run(self.loop, asyncio.wait_for(main, _PATIENCE_S))

    def close(self) -> None:
        with contextlib.ExitStack() as undo:
            undo.callback(self.engine.close)
            self.run(self.batcher.aclose())


@contextlib.contextmanager
def serving(rig: Rig, workload: Workload, inputs: Inputs, **options: Any) -> Iterator[list[Served]]:
    """One for each event loop."""
    with contextlib.ExitStack() as undo:
        made = []
        for loop in rig.loops.names:
            made.append(Served(rig, workload, inputs, loop, **options))
            undo.callback(made[-1].close)
        yield made


@contextlib.contextmanager
def young_heap() -> Iterator[None]:
    """Nothing that is here already is looked at by the garbage collector meanwhile.

    So has it a server that calls ``gc.freeze()`` before it serves: with this process's modules each full collection
    stops the event loop for 40 ms.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Way:
    """One way of asking for rows; each call is for ``step`` of them, and ``callers`` ask again when they are answered.

    Attributes:
        name: with the event loop.
    """

    label = ""

    def __init__(self, served: Served, step: int) -> None:
        self.served, self.step = served, step
        self.name = f"{self.label} {served.loop}"
        self.callers = max(2, served.in_flight // step)

    async def ask(self, number: int) -> Any:
        """The call that is timed."""
        raise NotImplementedError

    async def answer(self, number: int, inputs: Arrays) -> Arrays:
        """The same call with inputs that are known, ``step`` rows of them."""
        raise NotImplementedError

    def rate(self, batches: int) -> float:
        """Rows per second, for as many rows as so many batches have."""
        calls = max(1, batches * self.served.batch // self.step)
        elapsed: float = self.served.run(self._closed_loop(calls))
        return calls * self.step / elapsed

    async def _closed_loop(self, calls: int) -> float:
        left = calls

        async def caller(number: int) -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await self.ask(number)

        begun = time.perf_counter()
        await asyncio.gather(*map(caller, range(self.callers)))
        return time.perf_counter() - begun

    def all_outputs(self, inputs: Arrays) -> list[Arrays]:
        """Everybody asks at once, each for its part of these rows; the answers are put together again."""
        batch = self.served.batch
        parts = max(1, batch // self.step)
        rows = self.step * parts
        repeated = {name: np.resize(array, (rows, *array.shape[1:])) for name, array in inputs.items()}
        calls = -(-2 * self.callers // parts) * parts

        async def caller(number: int) -> Arrays:
            start = number % parts * self.step
            return await self.answer(number, {n: array[start : start + self.step] for n, array in repeated.items()})

        async def everybody() -> list[Arrays]:
            return list(await asyncio.gather(*map(caller, range(calls))))

        found = self.served.run(everybody())
        whole = [_joined(found[first : first + parts]) for first in range(0, calls, parts)]
        return [
            {name: array[start : start + batch] for name, array in each.items()}
            for each in whole
            for start in range(0, rows, batch)
        ]


def _joined(parts: Sequence[Arrays]) -> Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class FilledRows(Way):
    """``alloc_rows``: rows of the next batch's own memory, filled by the caller.

    Filling is the caller's own time, as it is for the C loop whose places are full before it begins: here one element
    of each input is written, and the rest is what the check before left there, so that the GPU works on real numbers.
    """

    def __init__(self, served: Served, step: int = 1) -> None:
        self.label = f"alloc_rows({step})"
        super().__init__(served, step)
        self._origins = {name: (0,) * array.ndim for name, array in served.inputs.first.items()}

    async def ask(self, number: int) -> Any:
        async with self.served.batcher.alloc_rows(self.step) as rows:
            for name, origin in self._origins.items():
                rows[name][origin] = 1
            return await rows.infer()

    async def answer(self, number: int, inputs: Arrays) -> Arrays:
        async with self.served.batcher.alloc_rows(self.step) as rows:
            for name, array in inputs.items():
                rows[name][...] = array
            return await rows.infer()


class SingleRows(Way):
    """``infer`` of one row in an array of the caller's."""

    label = "infer"

    def __init__(self, served: Served) -> None:
        super().__init__(served, 1)
        first = served.inputs.first
        self._rows = [{n: array[i : i + 1] for n, array in first.items()} for i in range(served.batch)]

    async def ask(self, number: int) -> Any:
        return await self.served.batcher.infer(self._rows[number % len(self._rows)])

    async def answer(self, number: int, inputs: Arrays) -> Arrays:
        return await self.served.batcher.infer(inputs)


class ManyRows(Way):
    """``infer_many`` of arrays of several batches each; they are copied into the batches' memory."""

    label = "infer_many"

    def __init__(self, served: Served) -> None:
        nbytes = sum(array.nbytes for array in served.inputs.first.values())
        batches = _BATCHES_OF_LARGE if nbytes > _LARGE_BYTES else _BATCHES_OF_MANY
        super().__init__(served, batches * served.batch)
        self.callers = max(2, -(-served.in_flight // self.step) + 1)  # one is answered, the others keep the lanes busy
        self._arrays = {name: np.concatenate([array] * batches) for name, array in served.inputs.first.items()}

    async def ask(self, number: int) -> Any:
        return await self.served.batcher.infer_many(self._arrays)

    async def answer(self, number: int, inputs: Arrays) -> Arrays:
        return await self.served.batcher.infer_many(inputs)


class EachATask(FilledRows):
    """As a server has it: a new task for every request, of one row that it fills."""

    def __init__(self, served: Served) -> None:
        super().__init__(served)
        self.name = f"a task for each request {served.loop}"

    async def _closed_loop(self, calls: int) -> float:
        left, loop = calls, asyncio.get_running_loop()

        async def caller(number: int) -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await loop.create_task(self.ask(number))

        begun = time.perf_counter()
        await asyncio.gather(*map(caller, range(self.callers)))
        return time.perf_counter() - begun

    def arrivals(self, rate: float, count: int, seed: int) -> tuple[Round, np.ndarray]:
        """``count`` requests at times of a Poisson process that were drawn before the first: an open loop, which does
        not wait for answers. Each counts from when it was due, so a loop that is late to begin it makes it longer.

        Returns:
            Times until the answers, and how late each began, in nanoseconds.
        """
        due = np.cumsum(np.random.default_rng(seed).exponential(1e9 / rate, count)).astype(np.int64)
        times, late = self.served.run(self._open_loop(due.tolist()))
        return Round(times), np.asarray(late)

    async def _open_loop(self, due: list[int]) -> tuple[list[int], list[int]]:
        clock, loop, count = time.perf_counter_ns, asyncio.get_running_loop(), len(due)
        times, late = [0] * count, [0] * count
        running: set[asyncio.Task[None]] = set()  # as a server holds them: no longer than they run
        begun = clock()

        async def request(number: int) -> None:
            late[number] = clock() - begun - due[number]
            await self.ask(number)
            times[number] = clock() - begun - due[number]

        number = 0
        while number < count:
            now = clock() - begun
            while number < count and due[number] <= now:
                running.add(task := loop.create_task(request(number)))
                task.add_done_callback(running.discard)
                number += 1
            if number < count:
                ahead = due[number] - now - _TIMER_NS
                await asyncio.sleep(ahead * 1e-9 if ahead > 0 else 0)  # 0: the loop turns on meanwhile
        await asyncio.gather(*running)
        return times, late
