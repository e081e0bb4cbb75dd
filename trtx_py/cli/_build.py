"""``trtx build``: a plan from an ONNX model."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ._app import command as make_command
from ._app import options
from ._build_options import build_options, builder_options, taken
from ._session import Session, run_async, size_text
from ._values import FILE, OUTPUT, SHAPES, Shape

if TYPE_CHECKING:
    from .. import BuilderOptions, Plan, PlanHeader

_own = options(
    click.argument("model", type=FILE),
    click.option("-o", "--output", type=OUTPUT, metavar="PLAN",
                 help="Where the plan goes; beside the model, ending in .plan, if not given."),
    click.option("--shapes", type=SHAPES, metavar="X:SHAPE,...", help="The only shapes of one profile: x:8x3x224x224."),
    click.option("--progress/--no-progress", default=None, help="Draw bars; on a terminal that is the default."),
)  # fmt: skip


@make_command("build", _own, build_options, trtexec=True)
def command(
    session: Session,
    model: str,
    output: str | None,
    shapes: dict[str, Shape] | None,
    progress: bool | None,
    **given: Any,
) -> None:
    """Build a plan from the ONNX model MODEL.

    Other formats: `trtx convert` first. A model with dynamic axes gets ranges by --profile, or the documented defaults.
    Ctrl-C stops the build, and nothing half-written is left.
    """
    build = taken(given)
    asked = builder_options(build, shapes)
    target = output if output is not None else f"{os.path.splitext(model)[0]}.plan"
    if output is None:
        # Before minutes of building, as for one that was given.
        OUTPUT.convert(target, None, None)
        if os.path.realpath(target) == os.path.realpath(model):
            raise click.UsageError(f"{model!r} would be replaced by its plan; say where that goes: --output")
    began = time.monotonic()
    plan = run_async(_build(session, model, asked, build["weights"], _on_progress(session, progress)))
    seconds = time.monotonic() - began
    plan.save(target)
    found = {"plan": target, "bytes": len(plan), "sha256": plan.sha256, "seconds": seconds, **header_facts(plan.header)}
    session.answer(found, lambda: _show(found))


@contextlib.contextmanager
def _bars() -> Any:
    from ..integrations.progress import BuildProgressBar

    with BuildProgressBar() as bar:
        yield bar


def _on_progress(session: Session, wanted: bool | None) -> Callable[[], Any]:
    import sys

    shown = wanted if wanted is not None else sys.stderr.isatty() and not session.json and not session.verbose
    return _bars if shown else lambda: contextlib.nullcontext(None)


async def _build(
    session: Session, model: str, asked: BuilderOptions | None, weights: str | None, progress: Callable[[], Any]
) -> Plan:
    import trtx_py as trtx

    from .._build import add_profiles

    # Coming to an end through the task's cancellation, Ctrl-C stops the build at its next step.
    async with trtx.Builder(backend=session.backend, device=session.device) as builder:
        if asked is not None and asked.plugin_libraries:
            builder.load_plugins(asked.plugin_libraries)
        async with builder.create_network() as network:
            await network.parse_onnx_async(model, weights)
            async with builder.create_config(asked) as config:
                if not config.optimization_profiles:
                    add_profiles(builder, network, config, None)
                with progress() as bar:
                    return await builder.build_serialized_network(network, config, on_progress=bar)


def header_facts(header: PlanHeader) -> dict[str, Any]:
    """What a plan's header says, for JSON."""
    return {
        "flavour": header.flavour, "version": header.version, "compute_capabilities": header.compute_capabilities,
        "precision": header.precision, "version_compatible": header.version_compatible, "host_code": header.host_code,
        "raw": header.is_raw, "onnx_sha256": header.onnx_sha256, "build_options": header.build_options,
        "io_tensors": header.io_tensors,
    }  # fmt: skip


def _show(found: dict[str, Any]) -> None:
    built_for = ", ".join(found["compute_capabilities"]) or "the GPU here"
    click.echo(
        f"{found['plan']}: {size_text(found['bytes'])}, {found['flavour']} {found['version']} for {built_for}, "
        f"built in {found['seconds']:.1f} s"
    )
    layers = found["build_options"].get("layers_by_precision")
    if layers:
        click.echo("layers: " + ", ".join(f"{count} in {name}" for name, count in layers.items()))
    for tensor in found["io_tensors"]:
        click.echo(f"  {tensor}" + "".join(f"  {limits}" for limits in tensor.ranges))
