"""``trtx compare``: an engine against its model in FP32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ._app import command as make_command
from ._app import options
from ._build_options import build_options, calibration_from, data_from, policy_from
from ._main import Failure
from ._opening import loading_options, open_source
from ._session import Session, console, run_async, table
from ._values import ANY_PATH, COUNT, FILE, Number

if TYPE_CHECKING:
    from ..quantize import Comparison

_own = options(
    click.argument("model", type=FILE),
    click.option("--engine", type=FILE, metavar="PLAN", help="The plan; built from MODEL if not given."),
    click.option("--data", multiple=True, type=ANY_PATH, metavar="PATH", required=True,
                 help="Samples to compare on, as --calibration-data. May be repeated."),
    click.option("--batches", type=COUNT, metavar="N", help="Use no more than N batches."),
    click.option("--batch-size", type=COUNT, default=8, show_default=True, metavar="N",
                 help="Samples in a batch, where the model leaves it open."),
    click.option("--top-k", type=COUNT, default=5, show_default=True, metavar="K",
                 help="How many of the largest entries of a row are compared."),
    click.option("--layer-limit", type=Number(min=0, min_open=True), default=0.01, show_default=True, metavar="X",
                 help="Relative error from which on a layer counts as wrong."),
    click.option("--fail-above", type=Number(min=0), metavar="X",
                 help="Exit code 1 if the relative error of an output is more."),
)  # fmt: skip


@make_command("compare", _own, loading_options, build_options)
def command(
    session: Session, model: str, engine: str | None, data: tuple[str, ...], fail_above: float | None, **given: Any
) -> None:
    """Run an engine and the ONNX model MODEL, in FP32 by ONNX Runtime, on the same data.

    Says how far each output is off, and in which layer that begins, with the calibration and policy of the build.
    """
    import trtx_py as trtx

    try:
        calibration, policy, samples = calibration_from(given), policy_from(given), data_from(data, given)
    except trtx.InvalidArgumentError as error:
        raise click.UsageError(str(error)) from error
    asked = {name: given.pop(name) for name in ("batches", "batch_size", "top_k", "layer_limit")}
    if engine is not None:
        # These tell how the plan was built, which makes its layers comparable; nothing is built with them.
        given.update(calibration_data=(), calibration_cache=None, keep=(), keep_operator=(), quantize_operator=())
        given.update(max_relative_error=None, int4_block_size="128")
    opening = open_source(session, engine or model, given)

    async def compare() -> Comparison:
        async with opening as opened:
            return await trtx.compare(model, opened, samples, calibration=calibration, policy=policy, **asked)

    found = run_async(compare())
    session.answer({"model": model, "engine": engine, "comparison": found}, lambda: _show(found))
    if fail_above is not None:
        wrong = {name: each.relative for name, each in found.outputs.items() if not each.relative <= fail_above}
        if wrong:
            name, worst = max(wrong.items(), key=lambda item: item[1])
            raise Failure(f"output {name!r} has a relative error of {worst:.4g}, more than {fail_above:g}")


def _show(found: Comparison) -> None:
    click.echo(str(found))
    if found.no_layers:
        click.echo(f"layers: {found.no_layers}")
    if found.layers:
        rows = table("node", "operator", "relative error", "added")
        for layer in sorted(found.layers, key=lambda each: -each.added)[:10]:
            rows.add_row(layer.node, layer.operator, f"{layer.relative_error:.4g}", f"{layer.added:.4g}")
        console().print(rows)
