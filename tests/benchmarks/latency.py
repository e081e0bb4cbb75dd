"""One request at a time: C0, P0, a thread, and ours in every mode, interleaved on one plan."""

from __future__ import annotations

import contextlib
from typing import Any

from .bare import BareLane
from .bare_contenders import P0, Bench, C0Event, C0Flag, EnqueueSpin, ToThread
from .checks import CheckError, Contender, Reference, relative_error
from .ours import MODES, Engines, OursArrays, OursSlot
from .rig import Rig, interleave
from .samples import Samples, compare
from .workloads import Inputs, Workload


def run_latency(rig: Rig, workload: Workload) -> dict[str, Any]:
    """Everything about one engine at one shape."""
    inputs = Inputs(rig.kit, workload)
    with contextlib.ExitStack() as undo:
        engine = rig.bare.deserialize(rig.plan_bytes(workload.engine))
        bench = Bench(rig.bare, rig.floor, engine, inputs.shapes, inputs.first)
        undo.callback(bench.close)
        engines = undo.enter_context(rig.engines(workload.engine))
        bare: list[Contender] = [C0Event(bench), C0Flag(bench), P0(bench), ToThread(bench, rig.loops)]
        if workload.small:
            bare.append(EnqueueSpin(bench))
        ours = _ours(rig, workload, engines, inputs)
        for each in ours:
            each.settle()
        contenders = [*bare, *ours]
        reference = Reference(P0(bench), inputs)
        result: dict[str, Any] = {
            "engine": workload.engine,
            "shapes": {name: list(shape) for name, shape in inputs.shapes.items()},
            "loops": rig.loops.names,
            "p0_error_to_kit": _case_error(rig, engine, inputs) if reference.error is None else reference.error,
            "errors_to_p0": reference.check(contenders, second=False),
        }
        if rig.settings.check_only:
            result["errors_to_p0_changed_inputs"] = reference.check(contenders, second=True)
            return result
        rounds, count = rig.settings.rounds(workload)
        bench.lane.fill(inputs.first)
        slower, pilot = "", {}
        if workload.heavy:  # the slower of both ways to wait is shown with fewer samples
            pilot = interleave(bare[:2], 4, max(5, count // 2))
            slower = max(pilot, key=lambda name: pilot[name].percentile(50))
            contenders = [each for each in contenders if each.name != slower]
        samples = interleave(contenders, rounds, count)
        if slower:
            samples[slower] = pilot[slower]
        result["errors_to_p0_changed_inputs"] = reference.check(contenders, second=True)
        result["statistics"] = engines.statistics()
    return result | _evaluated(samples)


def _case_error(rig: Rig, engine: Any, inputs: Inputs) -> float:
    """Where the kit expects nothing of the shape that is timed: P0's error at the shape of the kit's case."""
    given, wanted = inputs.at_case()
    lane = BareLane(rig.bare, engine, {name: array.shape for name, array in given.items()})
    try:
        lane.fill(given)
        lane.poison()
        lane.run(lane.places[0])
        error = relative_error(lane.read(lane.places[0]), wanted)
    finally:
        lane.close()
    if not error <= inputs.tolerance:
        raise CheckError(f"P0 is off by {error:.2e} from the kit's case, {inputs.tolerance:.0e} is allowed")
    return error


def _ours(rig: Rig, workload: Workload, engines: Engines, inputs: Inputs) -> list[OursSlot | OursArrays]:
    loops, shapes, first = rig.loops, inputs.shapes, inputs.first
    made: list[OursSlot | OursArrays] = []
    for mode in MODES:
        engine = engines.get(completion=mode)
        for loop in loops.names:
            if workload.small or mode == "latency" or loop == "asyncio":
                made.append(OursSlot(mode, engine, loops, loop, shapes, first))
    latency = engines.get(completion="latency")
    made.append(OursArrays("latency", latency, loops, "asyncio", shapes, first))
    if not workload.heavy:
        made.append(OursSlot("latency", latency, loops, "asyncio", shapes, first, copy=False))
    if workload.small:
        for loop in loops.names[1:]:
            made.append(OursArrays("latency", latency, loops, loop, shapes, first))
        for mode in MODES[1:]:
            made.append(OursArrays(mode, engines.get(completion=mode), loops, "asyncio", shapes, first))
        without = engines.get(completion="latency", cuda_graphs=False)
        made.append(OursArrays("latency", without, loops, "asyncio", shapes, first, label=" without graph"))
    return made


def _evaluated(samples: dict[str, Samples]) -> dict[str, Any]:
    """Summaries, and every contender over C0 (the faster of both), P0 and the enqueue loop."""
    floor = min(("c0_event", "c0_flag"), key=lambda name: samples[name].percentile(50))
    contenders: dict[str, Any] = {}
    for name, each in samples.items():
        entry = each.summary()
        entry["over_c0"] = compare(each, samples[floor])
        entry["over_p0"] = compare(each, samples["p0"])
        if "enqueue_spin" in samples:
            entry["over_enqueue_spin"] = compare(each, samples["enqueue_spin"])
        contenders[name] = entry
    return {"c0": floor, "contenders": contenders}
