"""trtx_py as a contender: engines in every completion mode, through slots and through ordinary arrays."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import trtx_py as trtx

from .bare import Shapes
from .loops import Loops
from .samples import CpuMeter, Round
from .workloads import Arrays

MODES = ("latency", "balanced", "efficient")

#: Requests before anything is timed: the shape recurs, and is captured beside them.
_SETTLING = 12


class Engines:
    """Engines of one plan, opened when first asked for and closed together."""

    def __init__(self, runtime: trtx.Runtime, plan: Any, loops: Loops) -> None:
        self._runtime, self._plan, self._loops = runtime, plan, loops
        self._open: dict[tuple[tuple[str, Any], ...], trtx.Engine] = {}

    def get(self, **options: Any) -> trtx.Engine:
        """The engine with these serving options; the same one for the same options."""
        key = tuple(sorted(options.items()))
        if key not in self._open:
            self._open[key] = self._runtime.deserialize_sync(self._plan, **options)
        return self._open[key]

    def statistics(self) -> dict[str, Any]:
        """Of all engines, by their options."""
        return {
            ", ".join(f"{name}={value}" for name, value in key): statistics_of(engine)
            for key, engine in self._open.items()
        }

    def close(self) -> None:
        engines, self._open = self._open, {}
        for engine in engines.values():
            engine.close()


def statistics_of(engine: trtx.Engine) -> dict[str, Any]:
    """``engine.statistics()`` for the JSON."""
    return dataclasses.asdict(engine.statistics())


class _Ours:
    def __init__(self, engine: trtx.Engine, loops: Loops, loop: str, shapes: Shapes, inputs: Arrays) -> None:
        self._engine, self._loops, self._loop = engine, loops, loop
        self._shapes, self._inputs = dict(shapes), inputs

    async def _requests(self, count: int) -> Round:
        raise NotImplementedError

    def round(self, count: int) -> Round:
        return self._loops.run(self._loop, self._requests(count))

    def settle(self) -> None:
        """Until the shape is captured, and everything has been run once."""
        self.round(_SETTLING)
        time.sleep(0.02)
        self.round(_SETTLING)


async def timed(request: Callable[[], Any], count: int) -> Round:
    """Await ``count`` requests, one after another."""
    clock, times = time.perf_counter_ns, [0] * count
    meter = CpuMeter()
    for i in range(count):
        begun = clock()
        await request()
        times[i] = clock() - begun
    return meter.round(times)


class OursSlot(_Ours):
    """``await slot.infer()``: inputs lie in pinned memory already, as a caller of alloc_inputs has written them."""

    def __init__(
        self,
        mode: str,
        engine: trtx.Engine,
        loops: Loops,
        loop: str,
        shapes: Shapes,
        inputs: Arrays,
        *,
        copy: bool = True,
        label: str = "",
    ) -> None:
        super().__init__(engine, loops, loop, shapes, inputs)
        self._copy = copy
        self.name = f"slot {mode} {loop}{'' if copy else ' in place'}{label}"

    async def _requests(self, count: int) -> Round:
        async with self._engine.alloc_inputs(self._shapes) as slot:
            for name, array in self._inputs.items():
                slot[name][...] = array
            if self._copy:
                return await timed(slot.infer, count)
            return await timed(functools.partial(slot.infer, copy_outputs=False), count)

    def outputs(self, inputs: Arrays) -> Arrays:
        return self._loops.run(self._loop, self._outputs(inputs))

    async def _outputs(self, inputs: Arrays) -> Arrays:
        async with self._engine.alloc_inputs(self._shapes) as slot:
            for name, array in inputs.items():
                slot[name][...] = array
            found = await slot.infer(copy_outputs=self._copy)
            return {name: array.copy() for name, array in found.items()}


class OursArrays(_Ours):
    """``await engine.infer(arrays)``: ordinary arrays in and out."""

    def __init__(
        self,
        mode: str,
        engine: trtx.Engine,
        loops: Loops,
        loop: str,
        shapes: Shapes,
        inputs: Arrays,
        *,
        label: str = "",
    ) -> None:
        super().__init__(engine, loops, loop, shapes, inputs)
        self.name = f"arrays {mode} {loop}{label}"

    async def _requests(self, count: int) -> Round:
        engine, inputs = self._engine, dict(self._inputs)
        return await timed(functools.partial(engine.infer, inputs), count)

    def outputs(self, inputs: Arrays) -> Arrays:
        return dict(self._loops.run(self._loop, self._outputs(inputs)))

    async def _outputs(self, inputs: Arrays) -> Arrays:
        return await self._engine.infer(inputs)
