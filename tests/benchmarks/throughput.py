"""Lanes: several requests in flight, against a C loop over as many lanes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

import trtx_py as trtx

from .bare import BareLane
from .checks import SAME_PLAN, CheckError, relative_error
from .rig import Rig
from .samples import compare_rates
from .workloads import Arrays, Inputs, Workload

_LANES, _DEPTH = 3, 2


class Lanes(Protocol):
    """A contender that keeps several requests in flight."""

    name: str

    def rate(self, requests: int, /) -> float:
        """Items per second, of as many launches."""
        ...

    def all_outputs(self, inputs: Arrays) -> list[Arrays]:
        """Several answers for these inputs, by the very path that is timed."""
        ...


class CLanes:
    """Lanes of a context, a stream and ``depth`` captured places each, driven by c0_lanes."""

    def __init__(self, rig: Rig, engine: Any, inputs: Inputs, depth: int, lanes: int = _LANES) -> None:
        self.name = f"c loop, {depth} in flight a lane"
        self._floor, self._rows = rig.floor, next(iter(inputs.shapes.values()))[0]
        self._lanes: list[BareLane] = []
        try:
            for _ in range(lanes):
                lane = BareLane(rig.bare, engine, inputs.shapes, places=depth)
                self._lanes.append(lane)
                lane.fill(inputs.first)
                for place in lane.places:
                    lane.capture(place)
        except BaseException:
            self.close()
            raise

    def rate(self, requests: int) -> float:
        """Items per second."""
        lanes = self._lanes
        elapsed_ns = self._floor.lanes(
            [[place.graph for place in lane.places] for lane in lanes],
            [lane.stream for lane in lanes],
            [[place.event for place in lane.places] for lane in lanes],
            requests,
        )
        return requests * self._rows / (elapsed_ns * 1e-9)

    def all_outputs(self, inputs: Arrays) -> list[Arrays]:
        """Of every place, run by the loop that is timed."""
        for lane in self._lanes:
            lane.fill(inputs)
            lane.poison()
        self.rate(4 * sum(len(lane.places) for lane in self._lanes))
        return [lane.read(place) for lane in self._lanes for place in lane.places]

    def close(self) -> None:
        with contextlib.ExitStack() as undo:
            for lane in self._lanes:
                undo.callback(lane.close)


class OurLanes:
    """Clients of one engine, each with a slot: all slots of all lanes are in flight."""

    def __init__(self, rig: Rig, engine: trtx.Engine, mode: str, loop: str, inputs: Inputs) -> None:
        self.name = f"ours {mode} {loop}"
        self._rig, self._engine, self._loop, self._inputs = rig, engine, loop, inputs
        self._rows = next(iter(inputs.shapes.values()))[0]

    def rate(self, requests: int) -> float:
        """Items per second."""
        elapsed, _ = self._rig.loops.run(self._loop, self._clients(requests, self._inputs.first))
        return requests * self._rows / elapsed

    def all_outputs(self, inputs: Arrays) -> list[Arrays]:
        """Of every slot."""
        return self._rig.loops.run(self._loop, self._clients(4 * _LANES * _DEPTH, inputs))[1]

    async def _clients(self, requests: int, inputs: Arrays) -> tuple[float, list[Arrays]]:
        left = requests
        async with contextlib.AsyncExitStack() as undo:
            slots = []
            for _ in range(_LANES * _DEPTH):
                slot = await undo.enter_async_context(self._engine.alloc_inputs(self._inputs.shapes))
                for name, array in inputs.items():
                    slot[name][...] = array
                slots.append(slot)

            async def client(slot: Any) -> None:
                nonlocal left
                while left > 0:
                    left -= 1
                    await slot.infer(copy_outputs=False)

            begun = time.perf_counter()
            await asyncio.gather(*map(client, slots))
            elapsed = time.perf_counter() - begun
            found = [{name: array.copy() for name, array in slot.outputs.items()} for slot in slots]
        return elapsed, found


def run_throughput(rig: Rig, workload: Workload) -> dict[str, Any]:
    """Items per second on three lanes."""
    inputs = Inputs(rig.kit, workload)
    with contextlib.ExitStack() as undo:
        engine = rig.bare.deserialize(rig.plan_bytes(workload.engine))
        contenders: list[CLanes | OurLanes] = []
        for depth in (1, _DEPTH):
            lanes = CLanes(rig, engine, inputs, depth)
            undo.callback(lanes.close)
            contenders.append(lanes)
        engines = undo.enter_context(rig.engines(workload.engine))
        for mode in ("latency", "balanced"):
            ours = engines.get(completion=mode, lanes=_LANES, slots=_DEPTH)
            contenders += [OurLanes(rig, ours, mode, loop, inputs) for loop in rig.loops.names]
        lane = BareLane(rig.bare, engine, inputs.shapes)
        undo.callback(lane.close)

        def p0(given: Arrays) -> Arrays:
            lane.fill(given)
            lane.poison()
            lane.run(lane.places[0])
            return lane.read(lane.places[0])

        result: dict[str, Any] = {"lanes": _LANES, "errors_to_p0": check_all(contenders, p0, inputs.first)}
        if rig.settings.check_only:
            return result | {"errors_to_p0_changed_inputs": check_all(contenders, p0, inputs.second)}
        rounds, requests = rig.settings.count(8, 4), rig.settings.count(300, 120)
        rates: dict[str, list[float]] = {each.name: [] for each in contenders}
        for each in contenders:
            each.rate(max(_LANES * _DEPTH, requests // 4))
        for number in range(rounds):
            turn = number % len(contenders)
            for each in contenders[turn:] + contenders[:turn]:
                rates[each.name].append(each.rate(requests))
        result["errors_to_p0_changed_inputs"] = check_all(contenders, p0, inputs.second)
        result["statistics"] = engines.statistics()
    loops = [each.name for each in contenders if isinstance(each, CLanes)]
    floor = max(loops, key=lambda name: float(np.median(rates[name])))
    return result | {
        "requests_each_round": requests,
        "c0": floor,
        "contenders": {
            name: {
                "items_per_s": float(np.median(values)),
                "rounds": [round(value, 1) for value in values],
                "over_c0": compare_rates(values, rates[floor]),
                "over_c_depth_1": compare_rates(values, rates[loops[0]]),
            }
            for name, values in rates.items()
        },
    }


def check_all(contenders: Sequence[Lanes], p0: Callable[[Arrays], Arrays], inputs: Arrays) -> dict[str, float]:
    """Errors by contender's name, of its worst outputs. Raises CheckError, naming every contender that is wrong."""
    wanted = p0(inputs)
    errors = {
        each.name: max(relative_error(found, wanted) for found in each.all_outputs(inputs)) for each in contenders
    }
    wrong = [f"{name} by {error:.2e}" for name, error in errors.items() if not error <= SAME_PLAN]
    if wrong:
        raise CheckError(f"outputs are off from P0's: {'; '.join(wrong)}; allowed is {SAME_PLAN}")
    return errors
