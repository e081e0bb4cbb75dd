"""``python -m tests.benchmarks.runner --out DIR``: the GPU kit's plans measured by ``trtx_py.benchmark``.

One file of results for each section, as JSON, markdown and HTML: what docs/benchmarks.md is filled from. On a GPU
source the kit's setup.sh first; with --rehearse the same sections run on the mock, and their figures mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import trtx_py as trtx
from tests.benchmarks.torch_models import torch_module
from tests.gpu.kit import BACKEND, Kit, load_kit
from trtx_py.benchmark import (
    BenchmarkSpec,
    ClosedLoop,
    Contender,
    OpenLoop,
    WarmUp,
    baselines,
    batch_sweep,
    batcher_against_direct,
    graphs_on_off,
    lanes_sweep,
    run,
)

Contenders = tuple[Contender, ...]

MLP, CNN, BERT = "mlp.fp32.vcx", "mnist_cnn.fp16.vcx", "bert_small.fp16.vcx"
RESNET, RESNET_INT8 = "resnet50.fp16.vcx", "resnet50.int8.vcx"
#: In which precision PyTorch computes what these plans have in float16; bert_small's model asks for float32 in places.
PYTORCH = {CNN: "float16", RESNET: "float16", BERT: "autocast"}


def modes(batch: int) -> Contenders:
    """Ours in every completion mode, and everybody else."""
    own = [Contender("latency", batch=batch, options={"completion": "latency"})]
    own += [Contender(mode, batch=batch, options={"completion": mode}) for mode in ("balanced", "efficient")]
    own.append(Contender("slot latency", "slot", batch, options={"completion": "latency"}))
    return (*own, *baselines(batch=batch))


def int8(plan: Any) -> Contenders:
    """The same network in two precisions, batch by batch."""
    found = []
    for batch in (1, 8, 32, 64):
        found.append(Contender(f"fp16 b{batch}", batch=batch))
        found.append(Contender(f"int8 b{batch}", batch=batch, source=plan, tolerance=0.15, versus=f"fp16 b{batch}"))
    return tuple(found)


def arrivals(rates: tuple[float, ...], largest: int) -> Contenders:
    """Batcher and direct under open loops."""
    return tuple(
        Contender(f"{kind} at {rate:g}/s", "batcher" if kind == "batcher" else "engine", load=OpenLoop(rate),
                  options={"lanes": 2}, batcher={"max_batch_size": largest} if kind == "batcher" else {})
        for rate in rates
        for kind in ("direct", "batcher")
    )  # fmt: skip


#: By name: the plan, and what is measured on it, given a way to other plans.
SECTIONS: dict[str, tuple[str, Callable[[Callable[[str], Any]], Contenders]]] = {
    "mlp": (MLP, lambda _: (*modes(1), *graphs_on_off())),
    "mlp_batches": (MLP, lambda _: batch_sweep((1, 4, 16, 64, 256))),
    "mlp_batcher": (MLP, lambda _: batcher_against_direct(clients=256, max_batch_size=256, options={"lanes": 2})),
    "mnist_cnn": (CNN, lambda _: (*modes(1), *graphs_on_off())),
    "mnist_cnn_batches": (CNN, lambda _: batch_sweep((1, 4, 16, 64))),
    "bert_small": (BERT, lambda _: (*modes(1), *graphs_on_off())),
    "bert_small_batches": (BERT, lambda _: batch_sweep((1, 2, 4, 8, 16, 32))),
    "resnet50": (RESNET, lambda _: (*modes(1), *graphs_on_off())),
    "resnet50_batches": (RESNET, lambda _: batch_sweep((1, 2, 4, 8, 16, 32, 64))),
    "resnet50_int8": (RESNET, lambda plan: int8(plan(RESNET_INT8))),
    "resnet50_lanes": (RESNET, lambda _: lanes_sweep(range(1, 9), batch=8)),
    "resnet50_batcher": (
        RESNET, lambda _: batcher_against_direct(clients=128, max_batch_size=64, options={"lanes": 2}),
    ),
    "resnet50_arrivals": (RESNET, lambda _: arrivals((1000.0, 4000.0), 64)),
}  # fmt: skip


def samples_of(kit: Kit, engine: str, count: int) -> dict[str, np.ndarray]:
    """Inputs of the kit's own kind: white noise gives nearly one answer on a network of random weights."""
    case = kit.case(engine)
    shapes = {"bert_small": [count, 128]}
    model = engine.split(".", 1)[0]
    inputs = [
        {**one, "shape": shapes.get(model, [count, *one["shape"][1:]]), **({"seed": 9} if "seed" in one else {})}
        for one in case["inputs"]
    ]
    return kit.inputs({**case, "seed": 77, "inputs": inputs})


def tolerance_of(kit: Kit, engine: str) -> float:
    return max(0.01, float(kit.case(engine)["relative_error"]))


def spec_of(name: str, kit: Kit, folder: Path, *, rehearse: bool, quick: bool) -> BenchmarkSpec:
    """The spec of a section. Models that are references are written to ``folder``."""
    engine, contenders_of = SECTIONS[name]

    def plan(of: str) -> Any:
        return kit.model(of) if rehearse else kit.folder / "engines" / f"{of}.engine"

    contenders = contenders_of(plan)
    if any(each.kind == "torch" for each in contenders):
        module = torch_module(kit.model(engine), PYTORCH.get(engine, "float32"))
        contenders = tuple(
            dataclasses.replace(each, module=module) if each.kind == "torch" else each for each in contenders
        )
    if rehearse:  # a CPU takes seconds for what a GPU does in milliseconds
        contenders = tuple(
            dataclasses.replace(each, batcher={**each.batcher, "max_batch_size": 4} if each.batcher else {})
            for each in contenders
            if each.batch <= 8
        )
    largest = max([contender.batch for contender in contenders])
    reference: Path | None = None
    if importlib.util.find_spec("onnxruntime"):
        reference = folder / f"{engine.split('.', 1)[0]}.onnx"
        reference.write_bytes(kit.model(engine))
    shapes = {"input_ids": (1, 128), "attention_mask": (1, 128)} if engine == BERT else {}
    fast = rehearse or quick
    return BenchmarkSpec(
        plan(engine), contenders, backend="mock" if rehearse else BACKEND, shapes=shapes,
        options={} if rehearse else {"lean_library": os.environ["TRTX_LEAN_LIBRARY"]},
        inputs=samples_of(kit, engine, 2 * largest + 2), reference=reference, tolerance=tolerance_of(kit, engine),
        load=ClosedLoop(1), rounds=3 if rehearse else 8 if quick else 20, requests=4 if rehearse else 100,
        warmup=WarmUp(window=2 if rehearse else 50, time_limit_s=0.1 if rehearse else 3.0 if fast else 10.0),
        time_limit_s=60.0,
        on_wrong_output="exclude",
    )  # fmt: skip


async def measure(names: list[str], kit: Kit, out: Path, *, rehearse: bool, quick: bool) -> int:
    """Every section guarded: one that fails is told, and the others run. The number of those that failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            begun = time.perf_counter()
            try:
                spec = spec_of(name, kit, Path(folder), rehearse=rehearse, quick=quick)
                result = await run(spec, save_to=out / f"{name}.json")
            except trtx.TrtxError as error:
                failed += 1
                print(f"{name}: FAILED: {type(error).__name__}: {error}", flush=True)
                continue
            (out / f"{name}.md").write_text(result.markdown(), encoding="utf-8")
            if importlib.util.find_spec("plotly"):
                (out / f"{name}.html").write_text(result.html(), encoding="utf-8")
            print(f"{name}: {time.perf_counter() - begun:.1f} s\n{result.text()}", flush=True)
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.runner", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=list(SECTIONS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="8 rounds in place of 20")
    parser.add_argument("--rehearse", action="store_true", help="on the mock; figures mean nothing")
    given = parser.parse_args(arguments)
    kit = load_kit()
    if kit is None or not (given.rehearse or os.environ.get("TRTX_LEAN_LIBRARY")):
        print("source the GPU kit's setup.sh first, which sets TRTX_GPU_KIT and TRTX_LEAN_LIBRARY", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    return 1 if asyncio.run(measure(given.only, kit, given.out, rehearse=given.rehearse, quick=given.quick)) else 0


if __name__ == "__main__":
    sys.exit(main())
