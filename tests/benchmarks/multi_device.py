"""Several GPUs: the same rows data parallel over 1, 2 and 4 devices, by the same code in the same run."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import numpy as np

import trtx_py as trtx

from .checks import SAME_PLAN, CheckError, relative_error
from .rig import Rig
from .samples import compare_rates
from .workloads import Arrays, Inputs, Workload

_COUNTS = (1, 2, 4)
#: More lanes than the GPU needs: each copies its own rows to page-locked memory, which takes longer than the GPU.
_COPYING_LANES = 8
_LANES, _SLOTS = 4, 2
#: So that filling and draining the pipeline is a small part of a round.
_TASKS, _TURNS = 2, 3
_LOOP = "asyncio"


class Rows:
    """Batches whose answers tell them apart, as many as all devices get in one round.

    Attributes:
        batch: rows of a batch.
        arrays: all rows; even batches hold the first inputs, odd ones the second.
    """

    def __init__(self, inputs: Inputs, batches: int) -> None:
        self.batch = next(iter(inputs.shapes.values()))[0]
        self.arrays: Arrays = {}
        for name, first in inputs.first.items():
            whole = self.arrays[name] = np.empty((batches * self.batch, *first.shape[1:]), first.dtype)
            for number in range(batches):
                source = inputs.second if number % 2 else inputs.first
                whole[number * self.batch : (number + 1) * self.batch] = source[name]

    def part(self, batches: int) -> Arrays:
        return {name: array[: batches * self.batch] for name, array in self.arrays.items()}


class InferMany:
    """``pool.infer_many`` of host arrays: the rows are copied to page-locked memory by the lanes' threads."""

    def __init__(self, rig: Rig, pool: trtx.MultiDevice, rows: Rows) -> None:
        self.devices = len(pool.devices)
        self.name = f"infer_many, {self.devices} devices"
        self._rig, self._pool, self._rows = rig, pool, rows

    def rate(self, batches: int) -> float:
        """Rows per second, with so many batches for each device."""
        inputs = self._rows.part(batches * self.devices)

        async def caller() -> None:
            for _ in range(_TURNS):
                await self._pool.infer_many(inputs, chunk_rows=self._rows.batch)

        async def callers() -> float:
            begun = time.perf_counter()
            await asyncio.gather(*(caller() for _ in range(_TASKS)))
            return time.perf_counter() - begun

        elapsed = self._rig.loops.run(_LOOP, callers())
        return _TASKS * _TURNS * batches * self.devices * self._rows.batch / elapsed

    def batches(self, count: int) -> list[Arrays]:
        """The outputs, batch by batch."""
        inputs, size = self._rows.part(count), self._rows.batch
        found = self._rig.loops.run(_LOOP, self._pool.infer_many(inputs, chunk_rows=size))
        return [{name: array[n * size : (n + 1) * size] for name, array in found.items()} for n in range(count)]


class Slots:
    """Slots that the caller has filled, on every device: nothing is copied on the host. What the GPUs can do."""

    def __init__(self, rig: Rig, pool: trtx.MultiDevice, rows: Rows, inputs: Inputs) -> None:
        self.devices = len(pool.devices)
        self.name = f"slots, {self.devices} devices"
        self._rig, self._pool, self._rows, self._inputs = rig, pool, rows, inputs

    def rate(self, batches: int) -> float:
        """Rows per second, with so many batches for each device."""
        batches *= _TASKS * _TURNS
        elapsed, _ = self._rig.loops.run(_LOOP, self._run(batches))
        return batches * self.devices * self._rows.batch / elapsed

    def batches(self, count: int) -> list[Arrays]:
        """Of every slot of every device, the first and the second inputs in turn."""
        return self._rig.loops.run(_LOOP, self._run(4 * count))[1]

    async def _run(self, batches: int) -> tuple[float, list[Arrays]]:
        async with contextlib.AsyncExitStack() as undo:
            left = [batches] * self.devices
            slots: list[tuple[int, Any]] = []
            for number in range(_LANES * _SLOTS * self.devices):  # each device in turn
                slot = await undo.enter_async_context(self._pool.alloc_inputs(self._inputs.shapes))
                source = self._inputs.second if number % 2 else self._inputs.first
                for name, array in source.items():
                    slot[name][...] = array
                slots.append((number % self.devices, slot))

            async def client(device: int, slot: Any) -> None:
                await slot.infer(copy_outputs=False)
                while left[device] > 0:
                    left[device] -= 1
                    await slot.infer(copy_outputs=False)

            begun = time.perf_counter()
            await asyncio.gather(*(client(device, slot) for device, slot in slots))
            elapsed = time.perf_counter() - begun
            extra = len(slots) // self.devices  # each slot's first
            found = [{name: array.copy() for name, array in slot.outputs.items()} for _, slot in slots]
        return elapsed * batches / (batches + extra), found


def run_multi_device(rig: Rig, workload: Workload) -> dict[str, Any]:
    """Rows per second on 1, 2 and 4 devices, as far as there are so many."""
    options = rig.pool_options()
    there = trtx.device_count(options["backend"])
    counts = [count for count in _COUNTS if count <= there]
    inputs = Inputs(rig.kit, workload)
    batches = rig.settings.count(24, 12)
    rows = Rows(inputs, max(batches * counts[-1], 2 * counts[-1]))
    plan = rig.plan(workload.engine)
    with contextlib.ExitStack() as undo:

        def opened(count: int, lanes: int, slots: int) -> trtx.MultiDevice:
            how = {"strategy": "round_robin", "lanes": lanes, "slots": slots, **options}
            pool = rig.loops.run(_LOOP, trtx.MultiDevice.open(plan, range(count), **how))
            undo.callback(lambda: rig.loops.run(_LOOP, pool.aclose()))
            return pool

        runtime = undo.enter_context(trtx.Runtime(**options))
        engine = undo.enter_context(runtime.deserialize_sync(plan))
        contenders: list[InferMany | Slots] = []
        contenders += [InferMany(rig, opened(count, _COPYING_LANES, 1), rows) for count in counts]
        contenders += [Slots(rig, opened(count, _LANES, _SLOTS), rows, inputs) for count in counts]
        result: dict[str, Any] = {
            "devices": [trtx.device_properties(device, options["backend"]).name for device in range(there)],
            "errors": _check(contenders, engine, inputs, workload),
        }
        if rig.settings.check_only:
            return result
        rates: dict[str, list[float]] = {each.name: [] for each in contenders}
        for each in contenders:
            each.rate(max(3, batches // 4))
        for number in range(rig.settings.count(12, 6)):
            turn = number % len(contenders)
            for each in contenders[turn:] + contenders[:turn]:
                rates[each.name].append(each.rate(batches))
        result["errors_afterwards"] = _check(contenders, engine, inputs, workload)
    return result | {
        "batches_each_round": batches,
        "contenders": {
            each.name: {
                "rows_per_s": float(np.median(rates[each.name])),
                "rounds": [round(rate, 1) for rate in rates[each.name]],
                "over_one": compare_rates(rates[each.name], rates[each.name.replace(f" {each.devices} ", " 1 ")]),
            }
            for each in contenders
        },
    }


def _check(
    contenders: list[InferMany | Slots], engine: trtx.Engine, inputs: Inputs, workload: Workload
) -> dict[str, float]:
    """Against one engine, whose outputs for what the kit knows are held against the kit's."""
    wanted = [engine.infer_sync(given) for given in (inputs.first, inputs.second)]
    off = inputs.error_of_known(wanted[0])
    if off is not None and not off <= inputs.tolerance:
        raise CheckError(f"{workload.name}: one engine is off from the kit's outputs by {off:.2e}")
    errors = {}
    for each in contenders:
        found = each.batches(2 * each.devices)
        errors[each.name] = max(relative_error(one, wanted[n % 2]) for n, one in enumerate(found))
    wrong = [f"{name} by {error:.2e}" for name, error in errors.items() if not error <= SAME_PLAN]
    if wrong:
        raise CheckError(f"outputs are off from one engine's: {'; '.join(wrong)}; allowed is {SAME_PLAN}")
    return errors
