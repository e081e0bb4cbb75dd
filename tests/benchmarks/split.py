"""One large request, cut along its batch axis so that copies and kernels overlap, against the C loop."""

from __future__ import annotations

import contextlib
from typing import Any

from .bare_contenders import P0, Bench, C0Event
from .checks import Contender, Reference
from .ours import OursSlot
from .rig import Rig, interleave
from .samples import compare
from .workloads import Inputs, Workload


def run_split(rig: Rig, workload: Workload) -> dict[str, Any]:
    """Outputs stay in the slot on both sides."""
    inputs = Inputs(rig.kit, workload)
    with contextlib.ExitStack() as undo:
        engine = rig.bare.deserialize(rig.plan_bytes(workload.engine))
        bench = Bench(rig.bare, rig.floor, engine, inputs.shapes, inputs.first)
        undo.callback(bench.close)
        engines = undo.enter_context(rig.engines(workload.engine))
        whole = engines.get(completion="latency", slots=2)
        cut = engines.get(completion="latency", slots=2, batch_axis=0)
        ours = [
            OursSlot("latency", cut, rig.loops, loop, inputs.shapes, inputs.first, copy=False, label=" split")
            for loop in rig.loops.names
        ]
        ours.append(OursSlot("latency", whole, rig.loops, "asyncio", inputs.shapes, inputs.first, copy=False))
        for each in ours:
            each.settle()
        contenders: list[Contender] = [C0Event(bench), *ours]
        reference = Reference(P0(bench), inputs)
        result: dict[str, Any] = {"errors_to_p0": reference.check(contenders, second=False)}
        if rig.settings.check_only:
            result["errors_to_p0_changed_inputs"] = reference.check(contenders, second=True)
            return result
        rounds, count = rig.settings.rounds(workload)
        samples = interleave(contenders, rounds, count)
        result["errors_to_p0_changed_inputs"] = reference.check(contenders, second=True)
        result["statistics"] = engines.statistics()
    floor = samples["c0_event"]
    result["c0"] = "c0_event"
    result["contenders"] = {name: each.summary() | {"over_c0": compare(each, floor)} for name, each in samples.items()}
    return result
