"""From a plan's bytes to an engine that is ready, and to its first result: bare and ours in turn."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from .bare import load_seconds
from .rig import Rig
from .samples import compare_rates
from .workloads import Inputs, Workload


def run_load_time(rig: Rig, workload: Workload) -> dict[str, Any]:
    """Medians over repetitions; the first of each side is not counted."""
    inputs, plan = Inputs(rig.kit, workload), rig.plan_bytes(workload.engine)
    ours_plan = rig.plan(workload.engine)
    contexts = 0

    async def ours() -> tuple[float, float]:
        nonlocal contexts
        begun = time.perf_counter()
        engine = await rig.runtime.deserialize(ours_plan)
        ready = time.perf_counter() - begun
        contexts = engine.statistics().contexts
        begun = time.perf_counter()
        await engine.infer(inputs.first)
        first = ready + time.perf_counter() - begun
        await engine.aclose()
        return ready, first

    repetitions = rig.settings.count(9, 4)
    bare_s: list[tuple[float, float]] = []
    ours_s: list[tuple[float, float]] = []
    for number in range(repetitions + 1):
        pair = [lambda: bare_s.append(load_seconds(rig.bare, plan, inputs.shapes))]
        pair.append(lambda: ours_s.append(rig.loops.run("asyncio", ours())))
        for each in pair if number % 2 else reversed(pair):
            each()
    result: dict[str, Any] = {"repetitions": repetitions, "contexts_when_ready": contexts}
    for column, name in enumerate(("ready", "first_result")):
        bare, mine = ([times[column] for times in side[1:]] for side in (bare_s, ours_s))
        result[name] = {
            "bare_ms": float(np.median(bare)) * 1e3,
            "ours_ms": float(np.median(mine)) * 1e3,
            "bare_all_ms": [round(value * 1e3, 2) for value in bare],
            "ours_all_ms": [round(value * 1e3, 2) for value in mine],
            **compare_rates(mine, bare),
        }
    return result
