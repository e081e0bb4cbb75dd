"""``python -m tests.benchmarks``: runs the sections, writes benchmarks.json and benchmarks.md, prints the goals.

Exit code 1 when a section failed; goals that are not reached are results, not failures.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .build_overhead import run_build_overhead
from .capi_calls import run_capi_on_mock
from .engine_cache import run_engine_cache
from .goals import evaluate, section_of
from .import_time import run_import_time
from .machine import machine_facts
from .mock_clients import run_clients
from .policy_rate import run_policy
from .report import markdown
from .rig import Rig, Settings, SetupError, wall_clock
from .serving_clients import run_serving_clients
from .serving_http import run_serving_http
from .serving_ray import run_serving_ray
from .steady_state import run_steady_state

Section = Callable[[], dict[str, Any]]


def mock_sections(settings: Settings) -> dict[str, Section]:
    """What needs no GPU."""
    requests = 200_000 if settings.quick else 1_000_000
    return {
        "imports": functools.partial(run_import_time, 15),
        "engine_cache": functools.partial(run_engine_cache, settings),
        "build_overhead": functools.partial(run_build_overhead, settings),
        "capi": functools.partial(run_capi_on_mock, settings),
        "clients": functools.partial(run_clients, settings.quick),
        "policy": functools.partial(run_policy, settings),
        "serving_clients": functools.partial(run_serving_clients, settings.quick, settings.scale),
        "serving_clients/ray": functools.partial(run_serving_ray, settings.quick, settings.scale),
        "serving_clients/http": functools.partial(run_serving_http, settings.quick, settings.scale),
        "steady_state": functools.partial(run_steady_state, round(requests * settings.scale)),
    }


def gpu_sections(rig: Rig) -> dict[str, Section]:
    """In the order that matters most first: a run may be cut short."""
    from .batcher import run_arrivals, run_batcher, run_lone
    from .capi_calls import run_capi
    from .latency import run_latency
    from .multi_device import run_multi_device
    from .split import run_split
    from .throughput import run_throughput

    sections: dict[str, Section] = {}
    for workload in rig.workloads:
        sections[section_of("latency", workload)] = functools.partial(run_latency, rig, workload)
    for workload in rig.capi:
        sections[section_of("capi", workload)] = functools.partial(run_capi, rig, workload)
    for workload in rig.large:
        sections[section_of("split", workload)] = functools.partial(run_split, rig, workload)
    sections["lanes"] = functools.partial(run_throughput, rig, rig.large[0])
    sections["multi_device"] = functools.partial(run_multi_device, rig, rig.parallel)
    for workload in rig.batched:
        sections[section_of("batcher", workload)] = functools.partial(run_batcher, rig, workload)
    sections[section_of("batcher_arrivals", rig.batched[0])] = functools.partial(run_arrivals, rig, rig.batched[0])
    for workload in rig.lone:
        sections[section_of("batcher_lone", workload)] = functools.partial(run_lone, rig, workload)
    if not rig.settings.check_only:
        from .device_memory import run_device_memory
        from .load_time import run_load_time
        from .loop_hold import run_loop_hold

        sections["loop_hold"] = functools.partial(run_loop_hold, rig, rig.workloads[0])
        sections["load"] = functools.partial(run_load_time, rig, rig.loaded)
        for workload in rig.measured_memory:
            sections[section_of("memory", workload)] = functools.partial(run_device_memory, rig, workload)
    from .torch_models import run_torch

    for workload in rig.torch:
        sections[section_of("torch", workload)] = functools.partial(run_torch, rig, workload)
    return sections


def run_sections(sections: dict[str, Section], only: list[str], limit_s: float) -> dict[str, Any]:
    """Each guarded: one that fails is reported, and the others run."""
    results: dict[str, Any] = {}
    started = wall_clock()
    for name, section in sections.items():
        if only and not any(name.startswith(each) for each in only):
            continue
        begun = wall_clock()
        if begun - started > limit_s:
            results[name] = {"status": "not run", "error": f"{limit_s:.0f} s were over", "seconds": 0.0}
            continue
        print(f"{name} ...", end=" ", flush=True)
        try:
            outcome: dict[str, Any] = {"status": "ok", "data": section()}
        except SetupError as error:
            outcome = {"status": "skipped", "error": str(error)}
        except Exception as error:
            outcome = {
                "status": "failed",
                "error": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc(),
            }
        outcome["seconds"] = wall_clock() - begun
        gc.collect()
        print(f"{outcome['status']}, {outcome['seconds']:.1f} s", flush=True)
        if outcome["status"] == "failed":
            print(outcome["traceback"], flush=True)
        results[name] = outcome
    return results


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/benchmarks/run.sh", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer samples: about 2.5 minutes")
    parser.add_argument("--check-only", action="store_true", help="compare outputs of every contender, time nothing")
    parser.add_argument("--mock", action="store_true", help="only what needs no GPU")
    parser.add_argument("--gpu-only", action="store_true", help="leave out what needs no GPU")
    parser.add_argument("--rehearse", action="store_true", help="the GPU sections on stand-ins; figures mean nothing")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="sections whose names begin so")
    parser.add_argument("--out", type=Path, help="folder for benchmarks.json and benchmarks.md")
    parser.add_argument("--limit-s", type=float, default=480.0, help="no section begins later than this (480)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply all counts")
    parser.add_argument("--list", action="store_true", help="print the names of the sections without a GPU's")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    settings = Settings(options.quick, options.check_only, options.scale)
    started = wall_clock()
    rig: Rig | None = None
    sections: dict[str, Any] = {}
    gpu = not options.mock
    mock = options.mock or not (options.gpu_only or options.check_only or options.rehearse)
    if options.list:
        print(*mock_sections(settings), sep="\n")
        return 0
    facts = machine_facts()
    try:
        if gpu:
            if options.rehearse:
                from .rehearsal import RehearsalRig

                rig = RehearsalRig(settings)
            else:
                rig = Rig(settings)
            sections |= gpu_sections(rig)
        if mock:
            sections |= mock_sections(settings)
        found = run_sections(sections, options.only, options.limit_s)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 2
    results = {
        "machine": facts,
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "seconds": wall_clock() - started,
        "sections": found,
        "goals": [] if options.check_only or options.rehearse else evaluate(found, gpu=gpu, mock=mock),
    }
    write(results, options.out)
    failed = [name for name, outcome in found.items() if outcome["status"] not in ("ok", "skipped")]
    try:
        if rig is not None:
            rig.close()
    except Exception:
        traceback.print_exc()
        failed.append("closing")
    print(f"failed: {', '.join(failed)}" if failed else f"all sections ran, {results['seconds']:.0f} s")
    return 1 if failed else 0


def write(results: dict[str, Any], out: Path | None) -> None:
    """Files where they are wanted, and the goals on the screen."""
    page = markdown(results)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "benchmarks.json").write_text(json.dumps(results, indent=1, default=str), encoding="utf-8")
        (out / "benchmarks.md").write_text(page, encoding="utf-8")
    if results["goals"]:
        begin = page.index("## Goals")
        after = page.find("\n## ", begin + 1)
        print(page[begin : after if after > 0 else len(page)])


if __name__ == "__main__":
    sys.exit(main())
