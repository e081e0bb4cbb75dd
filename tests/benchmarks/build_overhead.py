"""What building through trtx_py costs over the bare tensorrt-rtx API: same model, same options, in one run.

Needs no GPU. Time: both in one process, in turn, from the model's bytes to the plan's. Ours hashes the model, whose
SHA-256 goes into the plan's header, and the plan, which it seals: how long that takes by itself is measured too, and
subtracted for ``time_ratio``; where there is a second core much of it goes on beside TensorRT's own work. Peak memory:
that of a process of its own for each build, in turn, the bare ones without trtx_py and onnx.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from .engine_cache import save_kit_model
from .rig import Settings, SetupError

_ROOT = Path(__file__).parents[2]

_CHILD = """
import json, sys
from tests.benchmarks.build_overhead import build_bare, build_ours
contender, path = sys.argv[1:]
with open(path, "rb") as file:
    model = file.read()
plan = {"bare": build_bare, "ours": build_ours}[contender](model)
# Not getrusage: a process that was made by a larger one starts with that one's peak.
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
print(json.dumps({"peak_bytes": peak, "plan_bytes": len(plan)}))
"""


def prepare() -> None:
    """What a process does once: import TensorRT and onnx, and build a network of one layer with each."""
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for build in (build_bare, build_ours):
        build(model.SerializeToString())


def build_bare(model: bytes) -> bytes:
    """With the vendor's own API, as its samples do it."""
    import tensorrt_rtx as trt

    builder = trt.Builder(_bare_logger(trt))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, _bare_logger(trt))
    if not parser.parse(model):
        raise RuntimeError(str(parser.get_error(0)))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    shape = tuple(network.get_input(0).shape)
    if -1 in shape:
        profile = builder.create_optimization_profile()
        profile.set_shape(network.get_input(0).name, *([n, *shape[1:]] for n in _BATCHES))
        config.add_optimization_profile(profile)
    plan = bytes(builder.build_serialized_network(network, config))
    del parser, network, config, builder
    return plan


#: min, opt and max of a dynamic leading axis
_BATCHES = (1, 8, 32)
_loggers: list[Any] = []


def _bare_logger(trt: Any) -> Any:
    if not _loggers:
        _loggers.append(trt.Logger(trt.Logger.WARNING))
    return _loggers[0]


def build_ours(model: bytes) -> bytes:
    """The same through trtx_py."""
    import trtx_py as trtx

    with trtx.Builder(None, "tensorrt_rtx") as builder, builder.create_network() as network:
        network.parse_onnx(model)
        (tensor,) = network.inputs
        ranges = {tensor.name: tuple((n, *tensor.shape[1:]) for n in _BATCHES)} if -1 in tensor.shape else {}
        options = trtx.BuilderOptions(compute_capabilities=("8.9",), profiles=[ranges] if ranges else ())  # type: ignore[list-item]
        with builder.create_config(options) as config:
            return builder.build_serialized_network_sync(network, config)


def run_build_overhead(settings: Settings, name: str = "resnet50") -> dict[str, Any]:
    """Medians over pairs; ``time_ratio`` is without hashing.

    Args:
        name: a function of the kit's models.py.
    """
    if importlib.util.find_spec("tensorrt_rtx") is None:
        raise SetupError("tensorrt-rtx is not installed (extra: rtx)")
    with tempfile.TemporaryDirectory() as folder:
        path = save_kit_model(name, Path(folder))
        model = Path(path).read_bytes()
        prepare()
        plan = build_bare(model)
        times: list[tuple[float, float, float]] = []
        for number in range(settings.count(11, 3) + 1):
            runs = [_timed(build, model) for build in ((build_bare, build_ours), (build_ours, build_bare))[number % 2]]
            bare, ours = runs if number % 2 == 0 else runs[::-1]
            hashing = sum(_timed(hashlib.sha256, blob) for blob in (model, plan))
            if number:
                times.append((bare, ours, hashing))
        peaks = [(_peak("bare", path), _peak("ours", path)) for _ in range(settings.count(5, 2))]
    bare_s, ours_s, hash_s = (float(np.median(column)) for column in zip(*times, strict=True))
    return {
        "pairs": len(times),
        "model_bytes": len(model),
        "bare_s": bare_s,
        "ours_s": ours_s,
        "hash_s": hash_s,
        "time_ratio": float(np.median([(ours - hashing) / bare for bare, ours, hashing in times])),
        "time_ratio_with_hashing": float(np.median([ours / bare for bare, ours, _ in times])),
        "bare_peak_bytes": float(np.median([bare for bare, _ in peaks])),
        "ours_peak_bytes": float(np.median([ours for _, ours in peaks])),
        "memory_ratio": float(np.median([ours / bare for bare, ours in peaks])),
    }


def _timed(function: Any, argument: Any) -> float:
    begun = time.perf_counter()
    function(argument)
    return time.perf_counter() - begun


def _peak(contender: str, path: str) -> float:
    """Peak resident memory of a process that builds once."""
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, contender, path], env=environment, capture_output=True, text=True, timeout=600
    )
    if child.returncode:
        raise RuntimeError(f"building with {contender} failed: {child.stderr[-2000:]}")
    found = json.loads(child.stdout.splitlines()[-1])
    return float(found["peak_bytes"])
