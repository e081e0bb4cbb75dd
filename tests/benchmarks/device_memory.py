"""Device memory beyond bare TensorRT's: each figure from a process of its own, since modules load once in a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .bare import BareLane
from .ours import statistics_of
from .rig import Rig, Settings
from .workloads import Inputs, Workload

_ROOT = Path(__file__).parents[2]
_RUNS = 10


def measure_bare(rig: Rig, workload: Workload, lanes: int, *, graphs: bool) -> int:
    """Bytes of device memory that an engine with ``lanes`` contexts and their I/O takes, after some runs."""
    inputs, plan = Inputs(rig.kit, workload), rig.plan_bytes(workload.engine)
    before = rig.bare.free_bytes()
    engine = rig.bare.deserialize(plan)
    made = [BareLane(rig.bare, engine, inputs.shapes) for _ in range(lanes)]
    for lane in made:
        lane.fill(inputs.first)
        for _ in range(_RUNS):
            lane.run(lane.places[0])
        if graphs:
            lane.capture(lane.places[0])
            rig.floor.by_event(lane.places[0].graph, lane.stream, lane.places[0].event, _RUNS)
    taken = before - rig.bare.free_bytes()
    for lane in made:
        lane.close()
    return taken


def measure_ours(rig: Rig, workload: Workload, lanes: int) -> tuple[int, dict[str, Any]]:
    """As ``measure_bare``, for an engine of ours whose lanes have all served, and its statistics."""
    inputs, plan = Inputs(rig.kit, workload), rig.plan(workload.engine)
    before = rig.bare.free_bytes()
    engine = rig.runtime.deserialize_sync(plan, lanes=lanes, slots=1)
    slots = [engine.alloc_inputs(inputs.shapes) for _ in range(lanes)]
    opened = [slot.__enter__() for slot in slots]
    for slot in opened:
        for name, array in inputs.first.items():
            slot[name][...] = array
        for _ in range(_RUNS):
            slot.infer_sync(copy_outputs=False)
    taken = before - rig.bare.free_bytes()
    statistics = statistics_of(engine)
    for request in slots:
        request.__exit__(None, None, None)
    engine.close()
    return taken, statistics


def measure_one(rig: Rig, workload: Workload, side: str, lanes: int) -> dict[str, Any]:
    """In a child process."""
    if side == "ours":
        taken, statistics = measure_ours(rig, workload, lanes)
        return {"bytes": taken, "statistics": statistics}
    return {"bytes": measure_bare(rig, workload, lanes, graphs=side == "bare with graph")}


def run_device_memory(rig: Rig, workload: Workload, lanes: int = 3) -> dict[str, Any]:
    """Bytes for one context and for ``lanes``, bare and ours, and their ratios."""
    wanted = [("bare", 1), ("ours", 1), ("bare", lanes), ("ours", lanes)]
    if not rig.settings.quick:
        wanted += [("bare with graph", 1), ("bare with graph", lanes)]
    found: dict[str, Any] = {f"{side}, {n}": _in_child(rig, workload, side, n) for side, n in wanted}
    size = {name: entry["bytes"] for name, entry in found.items()}
    return {
        "plan_bytes": len(rig.plan_bytes(workload.engine)),
        "lanes": lanes,
        "figures": found,
        "one_lane_ratio": size["ours, 1"] / size["bare, 1"],
        "lanes_ratio": size[f"ours, {lanes}"] / size[f"bare, {lanes}"],
    }


def _in_child(rig: Rig, workload: Workload, side: str, lanes: int) -> dict[str, Any]:
    arguments = [workload.engine, ",".join(map(str, workload.sizes)), side, str(lanes), *rig.child_arguments]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.device_memory", *arguments],
        cwd=_ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{side} with {lanes} lanes ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    engine, sizes, side, lanes, *rehearse = sys.argv[1:]
    if rehearse:
        from .rehearsal import RehearsalRig

        rig: Rig = RehearsalRig(Settings())
    else:
        rig = Rig(Settings())
    workload = Workload(engine, tuple(map(int, sizes.split(","))))
    result = measure_one(rig, workload, side, int(lanes))
    rig.close()
    print(json.dumps(result, default=str))


if __name__ == "__main__":
    main()
