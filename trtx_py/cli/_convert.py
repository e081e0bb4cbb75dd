"""``trtx convert``: ONNX from a model of another framework, or from ONNX."""

from __future__ import annotations

import re
import sys
from typing import Any

import click

from ._app import command as make_command
from ._app import options
from ._inputs import limits_of, once
from ._session import Session
from ._values import OUTPUT, PAIR, SHAPES, FolderPath, Number, Shape, is_special

_own = options(
    click.argument("model"),
    click.option("-o", "--output", type=OUTPUT, required=True, metavar="FILE", help="The ONNX model to write."),
    click.option("--inputs", type=SHAPES, metavar="X:SHAPE,...", help="Inputs, in order, if the model tells none."),
    click.option("--input-type", multiple=True, type=PAIR, metavar="X=DTYPE", help="Type of an input; float32 if not "
                 "given. May be repeated."),
    click.option("--input-range", multiple=True, type=PAIR, metavar="X=LOW:HIGH", help="Limits of random values. May "
                 "be repeated."),
    click.option("--dynamic-axis", multiple=True, type=PAIR, metavar="X=AXIS:NAME",
                 help="An axis that may have other sizes: image=0:batch. May be repeated."),
    click.option("--opset", type=click.IntRange(min=7), metavar="N", help="Of the result."),
    click.option("--module", metavar="PACKAGE.MODULE:FACTORY", help="Makes the module, for files of weights."),
    click.option("--trust", is_flag=True, help="Let code inside the model run: pickles, .pt2, Keras layers in Python."),
    click.option("--python", type=click.Path(exists=True), metavar="PATH", help="An interpreter that has torch or "
                 "tensorflow."),
    click.option("--import-path", multiple=True, type=FolderPath(exists=True), metavar="FOLDER",
                 help="Where modules are looked for. May be repeated."),
    click.option("--option", multiple=True, type=PAIR, metavar="NAME=VALUE", help="For the converter; lists have "
                 "commas. May be repeated."),
    click.option("--timeout", type=Number(min=0), default=1800.0, show_default=True, metavar="S",
                 help="Seconds for all of it."),
    click.option("--no-validate", is_flag=True, help="Do not let onnx.checker look at the model."),
    click.option("--no-simplify", is_flag=True, help="Do not fold constants and merge nodes."),
    click.option("--no-compare", is_flag=True, help="Do not run source and result on random inputs."),
    click.option("--tolerance", type=Number(min=0), default=1e-4, show_default=True, metavar="X",
                 help="Largest difference, as part of an output's largest magnitude."),
    click.option("--no-check-operators", is_flag=True, help="Do not ask the target's parser."),
    click.option("--target", metavar="NAME", help="Whose parser that is; --backend if not given."),
)  # fmt: skip


@make_command("convert", _own)
def command(session: Session, model: str, output: str, **given: Any) -> None:
    """Convert MODEL to ONNX that TensorRT takes.

    MODEL is a file (PyTorch, TorchScript, Keras, SavedModel, TensorFlow Lite, ONNX, ...) or package.module:factory. The
    conversion runs in a process of its own, which Ctrl-C ends; nothing is written then.
    """
    import trtx_py as trtx

    if is_special(model):
        raise click.UsageError(f"{model!r} is a pipe or a device; give the path of a file")
    made = trtx.convert.sync(
        model, inputs=_inputs(given), dynamic_axes=_axes(given["dynamic_axis"]), opset=given["opset"],
        module=given["module"], trust=given["trust"], python=given["python"], import_path=given["import_path"] or None,
        options={name: _listed(value) for name, value in once(given["option"], "--option").items()} or None,
        timeout_s=given["timeout"], progress=_progress(session), validate=not given["no_validate"],
        simplify=not given["no_simplify"], compare=not given["no_compare"], tolerance=given["tolerance"],
        output=output, check_operators=not given["no_check_operators"], target=given["target"] or session.backend,
    )  # fmt: skip
    report = made.report
    session.answer({"output": made.path, "report": report}, lambda: _show(made.path, report))


def _inputs(given: dict[str, Any]) -> Any:
    import trtx_py as trtx

    shapes: dict[str, Shape] = given["inputs"] or {}
    types, ranges = once(given["input_type"], "--input-type"), limits_of(given["input_range"], "--input-range")
    for name in [*types, *ranges]:
        if name not in shapes:
            raise click.UsageError(f"--inputs names no {name!r}; give its shape there")
    found = {}
    for name, shape in shapes.items():
        low, high = ranges.get(name, (None, None))
        found[name] = trtx.InputSpec(shape, types.get(name, "float32"), low, high)
    return found or None


def _axes(given: tuple[tuple[str, str], ...]) -> dict[str, dict[int, str]] | None:
    found: dict[str, dict[int, str]] = {}
    for name, text in given:
        axis, _, label = text.partition(":")
        if not re.fullmatch("[0-9]{1,9}", axis) or not label:
            raise click.UsageError(f"--dynamic-axis {name}={text}: expected AXIS:NAME such as 0:batch")
        if int(axis) in found.setdefault(name, {}):
            raise click.UsageError(f"--dynamic-axis: axis {int(axis)} of {name!r} has two names; give one")
        found[name][int(axis)] = label
    return found or None


def _listed(value: str) -> str | list[str]:
    return value.split(",") if "," in value else value


def _progress(session: Session) -> Any:
    if session.json or not (session.verbose or sys.stderr.isatty()):
        return None
    return lambda event: session.note(f"{event.elapsed_s:6.1f} s  {event.step}: {event.text}")


def _show(path: str | None, report: Any) -> None:
    click.echo(f"{path}: from {report.format}, {report.producer}, opset {report.opset}")
    simplified = report.simplification
    if simplified.used:
        click.echo(f"simplified from {simplified.nodes_before} nodes to {simplified.nodes_after} ({simplified.tool})")
    if report.comparison is not None:
        worst = max((output.max_abs_error for output in report.comparison.outputs), default=0.0)
        click.echo(f"differs from the source by {worst:.3g} at most ({report.comparison.samples} samples)")
    if report.operators is not None:
        click.echo(f"{report.operators.target}: " + ("takes it" if report.operators.supported else "does not take it"))
        for issue in report.operators.issues:
            click.echo(f"  {issue}")
    for axis, name in report.renamed_axes.items():
        click.echo(f"renamed: {axis} is {name}")
    for note in report.notes:
        click.echo(f"note: {note}")
