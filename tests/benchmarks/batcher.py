"""The batcher in front of an engine: throughput against bare lanes, arrivals, and what a lone client pays."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import trtx_py as trtx

from .bare import BareLane
from .bare_contenders import P0, Bench, C0Event
from .batcher_clients import (
    LANES,
    EachATask,
    FilledRows,
    ManyRows,
    Served,
    SingleRows,
    serving,
    young_heap,
)
from .batcher_costs import costs_alone, sampled_shares
from .checks import Contender, Reference
from .loops import Loops
from .ours import OursArrays, statistics_of, timed
from .rig import Rig, interleave
from .samples import Round, Samples, compare, compare_percentiles, compare_rates, median_of
from .throughput import CLanes, Lanes, OurLanes, check_all
from .workloads import Arrays, Inputs, Workload

#: Of the saturated rate, for arrivals.
LOAD = 0.85
#: Lanes for arrivals: batches that share the GPU take longer, each of them. Two keep it busy.
_PROMPT_LANES = 2
#: How long one contender runs in one round, in seconds.
_TURN_S = 0.3
_LEAST_BATCHES = 12
Rate = Callable[[int], float]


def _prompt(batch: int) -> trtx.BatchPolicy:
    """For short waits: batches that are not full are padded by little."""
    step = max(1, batch // 8)
    return trtx.BatchPolicy(batch_sizes=tuple(range(step, batch + 1, step)))


class _P0:
    """Outputs of one batch, for checks."""

    def __init__(self, rig: Rig, engine: Any, inputs: Inputs) -> None:
        self._lane = BareLane(rig.bare, engine, inputs.shapes)
        self.close = self._lane.close

    def __call__(self, given: Arrays) -> Arrays:
        lane = self._lane
        lane.fill(given)
        lane.poison()
        lane.run(lane.places[0])
        return lane.read(lane.places[0])


def run_batcher(rig: Rig, workload: Workload) -> dict[str, Any]:
    """Rows per second of a batcher that never lacks rows, over bare lanes that are given whole batches."""
    inputs, batch = Inputs(rig.kit, workload), workload.sizes[0]
    alone: dict[str, Rate] = {}
    with contextlib.ExitStack() as undo:
        engine = rig.bare.deserialize(rig.plan_bytes(workload.engine))
        contenders: list[Lanes] = []
        count = LANES
        for depth in (1, 2):
            contenders.append(lanes := CLanes(rig, engine, inputs, depth, count))
            undo.callback(lanes.close)
        p0 = _P0(rig, engine, inputs)
        undo.callback(p0.close)
        made = undo.enter_context(serving(rig, workload, inputs, lanes=count))
        for served in made:
            contenders += [FilledRows(served), ManyRows(served)]
        first, singles = made[0], SingleRows(made[0])
        contenders += [FilledRows(first, max(1, batch // 8)), singles]
        if workload.small:
            slots = rig.runtime.deserialize_sync(rig.plan(workload.engine), lanes=count, slots=2)
            undo.callback(slots.close)
            contenders.append(OurLanes(rig, slots, "balanced", first.loop, inputs))
            alone = costs_alone(first)
        result: dict[str, Any] = {"lanes": count, "batch": batch}
        result["errors_to_p0"] = check_all(contenders, p0, inputs.first)
        if rig.settings.check_only:
            return result | {"errors_to_p0_changed_inputs": check_all(contenders, p0, inputs.second)}
        with young_heap():
            rates = _interleaved({each.name: each.rate for each in contenders} | alone, rig, batch)
        if workload.small:
            seconds = 4 * _TURN_S * rig.settings.scale
            batches = max(_LEAST_BATCHES, round(seconds * float(np.median(rates[singles.name])) / batch))
            result["sampled"] = sampled_shares(singles, batches)
        result["errors_to_p0_changed_inputs"] = check_all(contenders, p0, inputs.second)
        result["statistics"] = _statistics(made)
    c_loops = [each.name for each in contenders if isinstance(each, CLanes)]
    floor = max(c_loops, key=lambda name: float(np.median(rates[name])))
    if alone:
        names = [singles.name, contenders[-1].name, *alone]
        result["us_per_row"] = {name: 1e6 / float(np.median(rates[name])) for name in names}
    result["c0"] = floor
    result["contenders"] = {
        each.name: {
            "items_per_s": float(np.median(rates[each.name])),
            "rounds": [round(value, 1) for value in rates[each.name]],
            "over_c0": compare_rates(rates[each.name], rates[floor]),
            "over_c_depth_1": compare_rates(rates[each.name], rates[c_loops[0]]),
        }
        for each in contenders
    }
    return result


def _interleaved(runs: Mapping[str, Rate], rig: Rig, batch: int) -> dict[str, list[float]]:
    """Rates in rounds, as ``rig.interleave`` orders them. Everyone gets as many batches as take it equally long."""
    seconds, batches = _TURN_S * rig.settings.scale, {}
    for name, run in runs.items():
        guess = run(_LEAST_BATCHES)
        guess = run(max(_LEAST_BATCHES, round(seconds / 4 * guess / batch)))
        batches[name] = max(_LEAST_BATCHES, round(seconds * guess / batch))
    rates: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(rig.settings.count(6, 3)):
        turn = number % len(order)
        for name in order[turn:] + order[:turn]:
            rates[name].append(runs[name](batches[name]))
    return rates


def _statistics(made: list[Served]) -> dict[str, Any]:
    """Of batchers and engines, by event loop."""
    return {each.loop: {"batcher": _counts(each), "engine": statistics_of(each.engine)} for each in made}


def _counts(served: Served) -> dict[str, Any]:
    found = vars(served.batcher.statistics())
    return {name: value for name, value in found.items() if isinstance(value, int)}


# ---- arrivals ----


def run_arrivals(rig: Rig, workload: Workload) -> dict[str, Any]:
    """Single rows that arrive as they like, at 0.85 of the rate that the same requests reach when they never lack."""
    inputs, settings = Inputs(rig.kit, workload), rig.settings
    with contextlib.ExitStack() as undo:
        engine = rig.bare.deserialize(rig.plan_bytes(workload.engine))
        bench = Bench(rig.bare, rig.floor, engine, inputs.shapes, inputs.first)
        undo.callback(bench.close)
        p0 = _P0(rig, engine, inputs)
        undo.callback(p0.close)
        made = undo.enter_context(
            serving(rig, workload, inputs, lanes=_PROMPT_LANES, policy=_prompt(workload.sizes[0]))
        )
        ways = [EachATask(served) for served in made]
        result: dict[str, Any] = {"load": LOAD, "errors_to_p0": check_all(ways, p0, inputs.first)}
        if settings.check_only:
            return result | {"errors_to_p0_changed_inputs": check_all(ways, p0, inputs.second)}
        before = {way.name: _counts(way.served) for way in ways}
        bench.lane.fill(inputs.first)
        c0, whole_batch = C0Event(bench), Samples()
        runs = {way.name: _Arrivals(way, _TURN_S * settings.scale) for way in ways}
        undo.enter_context(young_heap())
        for number in range(settings.count(5, 3)):
            whole_batch.add(c0.round(settings.count(60, 20)))
            for run in runs.values():
                run.round(number)
        lost = {way.name: _lost(way.served, before[way.name], runs[way.name].calls) for way in ways}
        result["errors_to_p0_changed_inputs"] = check_all(ways, p0, inputs.second)
        result["statistics"] = _statistics(made)
    result["one_batch"] = whole_batch.summary()
    result["arrivals"] = {
        name: run.found() | lost[name] | {"p99_over_batch": compare_percentiles(run.times, 99, whole_batch, 50)}
        for name, run in runs.items()
    }
    return result


class _Arrivals:
    """Rounds of a saturated run and of arrivals, by one way of asking.

    Attributes:
        calls: requests of all of them.
    """

    def __init__(self, way: EachATask, turn_s: float) -> None:
        self._way, self._turn_s = way, turn_s
        self.times = Samples()
        self._late: list[np.ndarray] = []
        self._saturated: list[float] = []
        self._offered: list[float] = []
        self.calls = 0
        self._saturate(_LEAST_BATCHES)
        self._batches = max(_LEAST_BATCHES, round(turn_s * self._saturated.pop() / way.served.batch))

    def _saturate(self, batches: int) -> None:
        self._saturated.append(self._way.rate(batches))
        self.calls += batches * self._way.served.batch

    def round(self, number: int) -> None:
        """Saturated first; then so many arrivals as take three times as long."""
        self._saturate(self._batches)
        rate = LOAD * float(np.median(self._saturated))
        count = max(200, round(3 * self._turn_s * rate))
        times, late = self._way.arrivals(rate, count, 100 + number)
        self.calls += count
        self.times.add(times)
        self._late.append(late)
        self._offered.append(rate)

    def found(self) -> dict[str, Any]:
        late = np.concatenate(self._late)
        return {
            **median_of("saturated_rows_per_s", self._saturated),
            "offered_rows_per_s": float(np.median(self._offered)),
            "began_late_p50_us": float(np.percentile(late, 50)) / 1e3,
            "began_late_p99_us": float(np.percentile(late, 99)) / 1e3,
            **self.times.summary(),
        }


def _lost(served: Served, before: Mapping[str, int], calls: int) -> dict[str, Any]:
    """Requests that have no answer of their own. Everybody who asked has been answered, or this was not reached."""
    after = _counts(served)
    grown = {name: after[name] - before[name] for name in after}
    ended = ("failed", "cancelled", "rejected", "shed", "late", "dropped")
    lost = abs(grown["accepted"] - grown["completed"]) + abs(calls - grown["completed"])
    return {"calls": calls, "lost": lost + sum(grown[name] for name in ended), "grown": grown}


# ---- a lone client ----


class _Alone(OursArrays):
    """``await batcher.infer(arrays)``, one after another."""

    def __init__(self, served: Served, loops: Loops, inputs: Inputs) -> None:
        super().__init__("latency", served.engine, loops, served.loop, inputs.shapes, inputs.first)
        self.name = f"batcher {served.loop}"
        self._served = served

    async def _requests(self, count: int) -> Round:
        return await timed(functools.partial(self._served.batcher.infer, dict(self._inputs)), count)

    async def _outputs(self, inputs: Arrays) -> Arrays:
        return await self._served.batcher.infer(inputs)


def run_lone(rig: Rig, workload: Workload) -> dict[str, Any]:
    """One client that awaits each answer: through the batcher, and on another engine without one."""
    inputs, loops = Inputs(rig.kit, workload), rig.loops
    with contextlib.ExitStack() as undo:
        engine = rig.bare.deserialize(rig.plan_bytes(workload.engine))
        bench = Bench(rig.bare, rig.floor, engine, inputs.shapes, inputs.first)
        undo.callback(bench.close)
        direct = undo.enter_context(rig.engines(workload.engine)).get(completion="latency")
        largest = next(each for each in rig.batched if each.engine == workload.engine)
        made = undo.enter_context(serving(rig, largest, inputs, completion="latency"))
        ours = [OursArrays("latency", direct, loops, loop, inputs.shapes, inputs.first) for loop in loops.names]
        lone = [_Alone(served, loops, inputs) for served in made]
        for each in (*ours, *lone):
            each.settle()
        contenders: list[Contender] = [C0Event(bench), *ours, *lone]
        reference = Reference(P0(bench), inputs)
        result: dict[str, Any] = {"errors_to_p0": reference.check(contenders, second=False)}
        if rig.settings.check_only:
            return result | {"errors_to_p0_changed_inputs": reference.check(contenders, second=True)}
        rounds, count = rig.settings.rounds(workload)
        bench.lane.fill(inputs.first)
        samples = interleave(contenders, rounds, count)
        result["errors_to_p0_changed_inputs"] = reference.check(contenders, second=True)
        result["statistics"] = _statistics(made)
    result["c0"] = "c0_event"
    result["contenders"] = {
        name: each.summary() | {"over_c0": compare(each, samples["c0_event"])} for name, each in samples.items()
    }
    for through, straight in zip(lone, ours, strict=True):
        result["contenders"][through.name]["over_direct"] = compare(samples[through.name], samples[straight.name])
    return result
