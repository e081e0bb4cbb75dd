"""``trtx inspect``: what a plan or an ONNX model is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ._app import command as make_command
from ._app import options
from ._build import header_facts
from ._opening import loading_options
from ._session import Session, console, one_line_name, size_text, table
from ._values import FILE

if TYPE_CHECKING:
    from .. import LayerPrecision
    from ..diagnostics import ModelDescription

_own = options(
    click.argument("file", type=FILE),
    click.option("--layers", is_flag=True, help="Layers with what they compute in: a plan is loaded for it, a model "
                 "parsed, by --backend."),
)  # fmt: skip


@make_command("inspect", _own, loading_options)
def command(session: Session, file: str, layers: bool, **given: Any) -> None:
    """Say what FILE, a plan or an ONNX model, is: header, inputs and outputs, profiles, operators.

    That takes neither a GPU nor TensorRT; --layers does.
    """
    from ..diagnostics import describe

    found = describe(file)
    facts: dict[str, Any] = {
        "path": found.path, "kind": found.kind, "bytes": found.size_bytes, "sha256": found.sha256,
        "io_tensors": found.io_tensors,
    }  # fmt: skip
    if found.header is not None:
        facts.update(header_facts(found.header))
    else:
        for name in ("operators", "opsets", "parameters", "weights_by_type", "producer"):
            facts[name] = getattr(found, name)
    rows: tuple[LayerPrecision, ...] = ()
    if layers:
        rows = _plan_layers(session, file, given) if found.kind == "plan" else _model_layers(session, file)
        facts["layers"] = [
            {"name": row.name, "kind": row.kind, "inputs": row.inputs, "outputs": row.outputs, "computes_in": row.dtype}
            for row in rows
        ]
    session.answer(facts, lambda: _show(found, rows, layers))


def _plan_layers(session: Session, file: str, given: dict[str, Any]) -> tuple[LayerPrecision, ...]:
    import trtx_py as trtx

    with (
        trtx.Runtime(
            backend=session.backend, device=session.device, lean_library=given["lean_library"],
            allow_host_code=given["allow_host_code"], max_device_bytes=given["max_device_memory"],
            runtime_cache=given["runtime_cache"],
        ) as runtime,
        runtime.deserialize_sync(trtx.Plan.load(file)) as engine,
    ):  # fmt: skip
        return engine.layer_precisions()


def _model_layers(session: Session, file: str) -> tuple[LayerPrecision, ...]:
    import trtx_py as trtx

    with trtx.Builder(backend=session.backend, device=session.device) as builder, builder.create_network() as network:
        network.parse_onnx(file)
        return network.layer_precisions()


def _show(found: ModelDescription, layers: tuple[LayerPrecision, ...], asked: bool) -> None:
    kind = "TensorRT plan" if found.kind == "plan" else "ONNX model"
    click.echo(f"{one_line_name(found.path)}: {kind}, {size_text(found.size_bytes)}")
    click.echo(f"SHA-256 {found.sha256}")
    header = found.header
    if header is None:
        opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in found.opsets.items())
        click.echo(f"opset {opsets}; by {found.producer or 'an unknown producer'}; {found.parameters:,} parameters")
        click.echo(
            "weights: " + (", ".join(f"{count:,} {name}" for name, count in found.weights_by_type.items()) or "none")
        )
        click.echo("operators: " + ", ".join(f"{name} {count}" for name, count in found.operators.items()))
    else:
        targets = ", ".join(header.compute_capabilities) or "not known"
        click.echo(f"built with {header.flavour} {header.version}, for compute capability {targets}")
        if header.is_raw:
            click.echo("a raw plan, without trtx_py's header: its inputs, outputs and options are not told")
        compatible = _word(header.version_compatible)
        click.echo(f"precision {header.precision or 'of the model'}; version-compatible: {compatible}; "
                   f"code for the CPU: {_word(header.host_code)}")  # fmt: skip
        said = {name: value for name, value in header.build_options.items() if value not in (None, [], {}, "")}
        if said:
            click.echo("build: " + ", ".join(f"{name}={value}" for name, value in said.items()))
        if header.onnx_sha256:
            click.echo(f"of the model with SHA-256 {header.onnx_sha256}")
    for tensor in found.io_tensors:
        click.echo(f"  {tensor}")
        for number, limits in enumerate(tensor.ranges):
            click.echo(f"    profile {number}: {list(limits.min)} .. {list(limits.opt)} .. {list(limits.max)}")
    if asked:
        _show_layers(layers)


def _show_layers(layers: tuple[LayerPrecision, ...]) -> None:
    if not layers:
        click.echo(
            "layers: the plan does not tell; build it with --require-precision or --profiling-verbosity detailed"
        )
        return
    rows = table("layer", "kind", "computes in", "inputs", "outputs")
    for row in layers:
        rows.add_row(
            row.name, row.kind, "-" if row.dtype is None else row.dtype.value, ", ".join(t.value for t in row.inputs),
            ", ".join(t.value for t in row.outputs),
        )  # fmt: skip
    console().print(rows)


def _word(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "not known"}[value]
