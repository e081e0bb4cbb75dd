"""An ONNX model made ready for TensorRT: checked, axes named, shapes inferred, simplified, compared with its source."""

from __future__ import annotations

import os
from typing import Any

from . import _graph, _onnx_file
from ._compare import compare, declared_specs, run_onnx
from ._shapes import follows_values
from ._task import RefusedError, Task, need, random_samples


def refine(task: Task) -> None:
    """``task.source`` is an ONNX file; ``task.output`` will be one."""
    job = task.job
    limit = int(job["inline_limit"])
    if job["compare"]:
        need("onnxruntime", "convert", "comparing the converted model with its source (compare=True)")
    if job["simplify"]:
        need("onnxslim", "convert", "simplifying (simplify=True)")
    with task.step("read", f"reading {task.label}"):
        stored = _onnx_file.read(task.source, limit)
        _graph.check_opset(stored.model)
        if not stored.model.graph.output:
            raise RefusedError("the graph has no outputs, so it computes nothing; export the model again", "damaged")
        if _graph.put_in_order(stored.model.graph):
            task.note("the nodes were not in the order of computation and were sorted")
        _graph.drop_traces(stored.model)
        if not task.producer:
            task.producer = f"{stored.model.producer_name} {stored.model.producer_version}".strip()
    samples = job["samples"] if os.path.exists(job["samples"]) else None
    if job["compare"] and samples is None:
        samples = _reference(task, stored)
    if task.opset is not None and job["is_source"]:
        with task.step("change opset"):
            _change_opset(stored, task.opset)
    with task.step("name axes"):
        task.extra["renamed_axes"] = _graph.name_axes_apart(stored.model)
    with task.step("infer shapes"):
        _infer_shapes(task, stored)
    if job["validate"]:
        _validate(task, stored.model)
    before = len(stored.model.graph.node)
    task.extra["simplification"] = {
        "tool": "",
        "nodes_before": before,
        "nodes_after": before,
        "used": False,
        "note": "",
    }
    plain = stored.model
    slim = _simplified(task, stored) if job["simplify"] else None
    comparison = None
    if slim is not None:
        stored.model = slim
        try:
            comparison = _finish(task, stored, samples, limit)
        except RefusedError as refusal:
            # The model itself may well be right: what simplifying did to it is not worth an error.
            task.extra["simplification"] |= {"used": False, "nodes_after": before, "note": str(refusal)}
            task.note(f"simplifying was undone: {refusal}")
            stored = _onnx_file.Stored(plain, stored.folder, stored.outside, stored.fixed)
            slim = None
    if slim is None:
        comparison = _finish(task, stored, samples, limit)
    task.extra["comparison"] = comparison


def _finish(task: Task, stored: _onnx_file.Stored, samples: str | None, limit: int) -> dict[str, Any] | None:
    """Write the model, and compare what was written."""
    with task.step("write"):
        _onnx_file.put_back(stored)
        for name in os.listdir(os.path.dirname(task.output)):
            os.unlink(os.path.join(os.path.dirname(task.output), name))
        task.extra["files"] = _onnx_file.write(stored, task.output, limit)
        task.extra["opset"] = _graph.check_opset(stored.model)
    if samples is None:
        return None
    with task.step("compare", "comparing with the source on random inputs"):
        return compare(task.output, samples, float(task.job["tolerance"]))


def _reference(task: Task, stored: _onnx_file.Stored) -> str | None:
    """Samples of what the ONNX model computes as it was given."""
    with task.step("reference", "running the source on random inputs"):
        specs = task.specs_of(declared_specs(stored))
        runner = run_onnx(task.source, optimize=False)
        if isinstance(runner, str):
            task.note(f"not compared: ONNX Runtime cannot run the source: {runner}")
            return None
        try:
            task.reference_all(random_samples(specs), runner)
        except Exception as error:  # whatever ONNX Runtime raises: the inputs may be what is wrong
            sizes = {spec.name: spec.shape for spec in specs}
            task.note(f"not compared: the source refuses random inputs of {sizes}; give inputs= ({error})"[:1000])
            return None
    task.save_samples()
    path: str = task.job["samples"]
    return path


def _change_opset(stored: _onnx_file.Stored, opset: int) -> None:
    from onnx import defs, version_converter

    if _graph.check_opset(stored.model) == opset:
        return
    if not 1 <= opset <= defs.onnx_opset_version():
        raise RefusedError(f"opset is {opset}; the installed onnx knows 1 to {defs.onnx_opset_version()}")
    try:
        stored.model = version_converter.convert_version(stored.model, opset)
    except Exception as error:  # the converter is native: RuntimeError, mostly
        raise RefusedError(f"onnx cannot convert the model to opset {opset}: {error}; export it with that opset",
                      "failed") from error  # fmt: skip


def _validate(task: Task, model: Any) -> None:
    from onnx import checker

    with task.step("validate", "onnx.checker"):
        try:
            checker.check_model(model)
        except (checker.ValidationError, ValueError) as error:
            raise RefusedError(
                f"onnx's checker refuses the model: {str(error).strip()[:1500]}; export it again", "damaged"
            ) from error


def _infer_shapes(task: Task, stored: _onnx_file.Stored) -> None:
    from onnx import shape_inference

    try:
        stored.model = shape_inference.infer_shapes(
            stored.model, strict_mode=True, data_prop=follows_values(stored.model)
        )
    except (shape_inference.InferenceError, ValueError, RuntimeError) as error:
        # It may be onnx that does not know better: whether the model runs is for others to say.
        task.note(f"onnx finds the shapes inconsistent: {str(error).strip()[:800]}")
        stored.model = shape_inference.infer_shapes(stored.model)


def _simplified(task: Task, stored: _onnx_file.Stored) -> Any:
    """The model with constants folded and nodes merged; None, with a note, if that fails or changes what it takes."""
    report = task.extra["simplification"]
    if stored.fixed:
        report["note"] = "weights inside subgraphs lie in files of their own"
        return None
    with task.step("simplify", "onnxslim"):
        onnxslim = need("onnxslim", "convert", "simplifying (simplify=True)")
        report["tool"] = f"onnxslim {onnxslim.__version__}"
        original = stored.model
        copied = type(original)()
        copied.CopyFrom(original)
        try:
            slim = onnxslim.slim(copied)
        except Exception as error:  # onnxslim raises what it happens to meet
            report["note"] = f"onnxslim failed: {type(error).__name__}: {error}"[:500]
            task.note(report["note"])
            return None
        changed = _changed_interface(original.graph, slim.graph)
        if changed:
            report["note"] = changed
            task.note(f"simplifying was undone: {changed}")
            return None
        report |= {"nodes_after": len(slim.graph.node), "used": True}
        return slim


def _changed_interface(before: Any, after: Any) -> str:
    for what, one, other in (("inputs", before.input, after.input), ("outputs", before.output, after.output)):
        names = [[value.name for value in values] for values in (one, other)]
        if names[0] != names[1]:
            return f"onnxslim changed the {what} from {names[0]} to {names[1]}"
    return ""
