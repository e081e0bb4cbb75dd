"""The converted model against what its source computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ._onnx_file import Stored
from ._task import RefusedError, Spec

#: What an axis of unknown size gets: the leading one is nearly always the batch.
_BATCH, _SIZE = 2, 32


def declared_specs(stored: Stored) -> list[Spec]:
    """The inputs of an ONNX model, with sizes for the axes that have none."""
    from onnx import helper

    graph = stored.model.graph
    weights = {tensor.name for tensor in graph.initializer} | set(stored.outside)
    specs = []
    for value in graph.input:
        if value.name in weights or not value.type.HasField("tensor_type"):
            continue
        sizes: list[int] = []
        axes: dict[int, str] = {}
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value >= 0:
                sizes.append(dim.dim_value)
                continue
            sizes.append(_BATCH if axis == 0 else _SIZE)
            axes[axis] = dim.dim_param
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)).name
        specs.append(Spec(value.name, tuple(sizes), dtype, axes=axes))
    return specs


def run_onnx(path: str, *, optimize: bool) -> Callable[[Any], list[Any]] | str:
    """A function that runs the model of ``path``, or why ONNX Runtime cannot."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a dozen classes for it, which share no base
        return str(error)[:1000]
    return lambda sample: list(session.run(None, dict(sample)))


def compare(path: str, samples: str, tolerance: float) -> dict[str, Any]:
    """Run the model of ``path`` on the samples.

    Raises RefusedError if an output is further away than the tolerance allows.
    """
    import onnx

    runner = run_onnx(path, optimize=True)
    if isinstance(runner, str):
        raise RefusedError(
            f"ONNX Runtime cannot run the converted model, so it was not compared: {runner}; pass compare=False if "
            "that is expected", "failed",
        )  # fmt: skip
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in weights]
    outputs = [value.name for value in graph.output]
    worst = {name: {"name": name, "max_abs_error": 0.0, "max_abs_value": 0.0} for name in outputs}
    problems: list[str] = []
    with np.load(samples, allow_pickle=False) as file:
        stored = {key: file[key] for key in file.files}
    count = 1 + max(int(key.split(":", 2)[1]) for key in stored)
    for number in range(count):
        given = {key.split(":", 2)[2]: v for key, v in stored.items() if key.startswith(f"in:{number}:")}
        wanted = [v for key, v in stored.items() if key.startswith(f"out:{number}:")]
        found = runner(_renamed(given, inputs))
        if len(found) != len(wanted):
            raise RefusedError(f"the source has {len(wanted)} outputs, the converted model {len(found)}", "differs")
        for name, one, other in zip(outputs, wanted, found, strict=True):
            problem = _difference(one, np.asarray(other), tolerance, worst[name])
            if problem:
                sizes = ", ".join(f"{key} {array.shape}" for key, array in given.items())
                problems.append(f"output {name!r} {problem} (inputs {sizes})")
    if problems:
        raise RefusedError(
            f"the converted model does not compute what its source does: {'; '.join(problems[:5])}; allowed is "
            f"{tolerance:g} times the largest value, or times 1: look at the source for what cannot be exported, or "
            "pass another tolerance=", "differs",
        )  # fmt: skip
    return {"samples": count, "tolerance": tolerance, "outputs": list(worst.values())}


def _renamed(given: dict[str, Any], inputs: list[str]) -> dict[str, Any]:
    """By the model's own names: the converter may have changed them, but not their order."""
    if set(inputs) <= set(given):
        return {name: given[name] for name in inputs}
    if len(inputs) != len(given):
        raise RefusedError(
            f"the source has the inputs {', '.join(given)}, the converted model {', '.join(inputs)}", "differs"
        )
    return dict(zip(inputs, given.values(), strict=True))


def _difference(wanted: Any, found: Any, tolerance: float, worst: dict[str, Any]) -> str:
    """What is wrong with ``found``; empty if nothing is. Keeps the worst in ``worst``."""
    if wanted.shape != found.shape:
        return f"has shape {found.shape} instead of {wanted.shape}"
    if not wanted.size:
        return ""
    if wanted.dtype.kind in "biu" and found.dtype.kind in "biu":
        different = int(np.count_nonzero(wanted != found))
        worst["max_abs_error"] = max(worst["max_abs_error"], float(different > 0))
        return f"has {different} of {wanted.size} values that differ" if different else ""
    one, other = wanted.astype(np.float64), found.astype(np.float64)
    special = ~np.isfinite(one)
    if not np.array_equal(special, ~np.isfinite(other)) or not np.array_equal(one[special], other[special], True):
        return "has infinities or NaN at other places"
    plain = ~special
    error = float(np.max(np.abs(one[plain] - other[plain]), initial=0.0))
    value = float(np.max(np.abs(one[plain]), initial=0.0))
    worst["max_abs_error"], worst["max_abs_value"] = (
        max(worst["max_abs_error"], error),
        max(worst["max_abs_value"], value),
    )
    return f"is off by up to {error:.3g}, of values up to {value:.3g}" if error > tolerance * max(1.0, value) else ""
