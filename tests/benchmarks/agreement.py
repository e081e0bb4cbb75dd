"""``python -m tests.benchmarks.agreement --out DIR``: figures of ``trtx_py.benchmark`` beside loops timed from outside.

Outside are loops around ``await engine.infer`` and around the bare loop's request, with a clock of their own. They take
turns, as the runner's contenders do: who comes second finds other things in the CPU's caches than who goes on alone.
Runs and loops take turns too, ten times, each with new engines, and each run is compared with the loops before and
after it: medians of one loop were up to 13% apart within a minute. Wanted: within 3%. The bare loop of cuda-python and
TensorRT's own bindings (tests/benchmarks/bare.py) stands beside them: what ``bare`` costs over it.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import trtx_py as trtx
from tests.gpu.kit import Kit, load_kit
from trtx_py.benchmark import BenchmarkResult, BenchmarkSpec, Contender, _bare, run

from .bare import BareLane, BareRuntime
from .pages import MODELS
from .runner import BERT, CNN, MLP, RESNET, SECTIONS, spec_of

#: Runs, rounds of each, requests of a turn; and turns of the loops in between, the first of which warms up.
PAIRS, ROUNDS, TURN, TURNS = 10, 4, 100, 5
WANTED = 0.03
Inputs = list[dict[str, np.ndarray]]

assert {SECTIONS[name][0] for name in MODELS} == {MLP, CNN, BERT, RESNET}


def timed_us(request: Callable[[dict[str, np.ndarray]], object], inputs: Inputs, count: int) -> list[float]:
    """What each of so many calls of ``request`` takes, one after another. As in most loops, a result lives until the
    next one is there: memory that is given back at once comes from the system anew each time."""
    times, found = list[float](), object()
    for number in range(count):
        begun = time.perf_counter()
        found = request(inputs[number % len(inputs)])
        times.append((time.perf_counter() - begun) * 1e6)
    del found
    return times


async def awaited_us(engine: trtx.Engine, inputs: Inputs, count: int) -> list[float]:
    """The same of ``await engine.infer``."""
    times, found = list[float](), dict[str, np.ndarray]()
    for number in range(count):
        begun = time.perf_counter()
        found = await engine.infer(inputs[number % len(inputs)])
        times.append((time.perf_counter() - begun) * 1e6)
    del found
    return times


def with_cuda_python(kit: Kit, name: str, inputs: Inputs) -> float:
    """A loop with nothing of trtx_py in it."""
    plan = (kit.folder / "engines" / f"{SECTIONS[name][0]}.engine").read_bytes()
    runtime = BareRuntime(os.environ["TRTX_LEAN_LIBRARY"])
    lane = BareLane(runtime, runtime.deserialize(plan), {name: array.shape for name, array in inputs[0].items()})

    def request(given: dict[str, np.ndarray]) -> None:
        lane.fill(given)
        lane.run(lane.places[0])
        lane.read(lane.places[0])

    try:
        return float(np.median(timed_us(request, inputs, TURNS * TURN)[TURN:]))
    finally:
        lane.close()


async def outside(spec: BenchmarkSpec, inputs: Inputs) -> dict[str, float]:
    """Medians in microseconds by contender."""
    options: dict[str, Any] = {**spec.options, "completion": "latency"}
    async with (
        trtx.open_engine(spec.source, spec.backend, **options) as engine,
        trtx.open_engine(spec.source, spec.backend, **options) as other,
    ):
        lane = _bare.BareLane(other, {name: array.shape for name, array in inputs[0].items()})
        times: dict[str, list[float]] = {"latency": [], "bare loop": []}
        try:
            for turn in range(TURNS):
                mine = await awaited_us(engine, inputs, spec.requests)
                bare = await asyncio.to_thread(timed_us, lane.run, inputs, spec.requests)
                if turn > 0:
                    times["latency"] += mine
                    times["bare loop"] += bare
        finally:
            lane.close()
    return {contender: float(np.median(each)) for contender, each in times.items()}


async def compared(name: str, kit: Kit, folder: Path, *, rehearse: bool) -> dict[str, Any]:
    """Figures of the runner and from outside, and their ratios, for one model."""
    spec = spec_of(name, kit, folder, rehearse=rehearse, quick=True)
    contenders = (Contender("latency", options={"completion": "latency"}), Contender("bare loop", "bare"))
    spec = dataclasses.replace(
        spec, contenders=contenders, rounds=ROUNDS, warmup=dataclasses.replace(spec.warmup, time_limit_s=1.0)
    )
    assert isinstance(spec.inputs, Mapping)
    inputs = [{key: np.ascontiguousarray(array[n : n + 1]) for key, array in spec.inputs.items()} for n in range(4)]
    loops, runs = [await outside(spec, inputs)], list[BenchmarkResult]()
    for _ in range(2 if rehearse else PAIRS):
        runs.append(await run(spec))
        loops.append(await outside(spec, inputs))
    found: dict[str, Any] = {}
    if not rehearse:
        found["cuda_python_p50_us"] = await asyncio.to_thread(with_cuda_python, kit, name, inputs)
    for contender in ("latency", "bare loop"):
        measured = [each.contender(contender).measurement for each in runs]
        seen = [each.p50_us.value for each in measured if each is not None]
        ours = [each[contender] for each in loops]
        if len(seen) == len(runs):
            between = [(before + after) / 2 for before, after in itertools.pairwise(ours)]
            found[contender] = {"runner_p50_us": seen, "outside_p50_us": ours, **ratio(seen, between)}
    return found


def ratio(measured: list[float], between: list[float]) -> dict[str, Any]:
    """The median of the ratios of neighbours, with a 95% interval by bootstrap."""
    ratios = np.divide(measured, between)
    middle = float(np.median(ratios))
    drawn = np.median(np.random.default_rng(0).choice(ratios, (4000, len(ratios))), axis=1)
    low, high = (float(each) for each in np.quantile(drawn, (0.025, 0.975)))
    return {"ratio": middle, "low": low, "high": high, "within": abs(middle - 1) <= WANTED}


async def measure(kit: Kit, *, rehearse: bool, names: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return {name: await compared(name, kit, Path(folder), rehearse=rehearse) for name in names}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.agreement", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for agreement.json")
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--rehearse", action="store_true", help="on the mock; figures mean nothing")
    given = parser.parse_args(arguments)
    kit = load_kit()
    if kit is None or not (given.rehearse or os.environ.get("TRTX_LEAN_LIBRARY")):
        print("source the GPU kit's setup.sh first, which sets TRTX_GPU_KIT and TRTX_LEAN_LIBRARY", file=sys.stderr)
        return 2
    found = asyncio.run(measure(kit, rehearse=given.rehearse, names=given.only))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "agreement.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
