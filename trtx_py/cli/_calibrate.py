"""``trtx calibrate``: ranges for INT8 and FP8, as a cache file, as a Q/DQ model, or as both."""

from __future__ import annotations

from typing import Any

import click

from ._app import command as make_command
from ._app import options
from ._build_options import (
    calibration_from,
    calibration_options,
    image_options,
    policy_from,
    policy_options,
    refuse_for_another_precision,
)
from ._session import Session
from ._values import FILE, OUTPUT

_own = options(
    click.argument("model", type=FILE),
    click.option("--precision", type=click.Choice(["int8", "fp8"]), default="int8", show_default=True,
                 help="What the ranges are for."),
    click.option("-o", "--output", type=OUTPUT, metavar="FILE", help="An ONNX model with Q/DQ nodes to write."),
)  # fmt: skip


@make_command("calibrate", _own, calibration_options, image_options, policy_options)
def command(session: Session, model: str, precision: str, output: str | None, **given: Any) -> None:
    """Find the ranges of the activations of the float32 model MODEL.

    They are kept in --calibration-cache, where `trtx build` finds them if it is given the same model, data, method and
    cache, and put into the model that --output names, which any strongly typed TensorRT builds as it is. ONNX Runtime
    runs the model.
    """
    import trtx_py as trtx
    from trtx_py.quantize import convert

    if not given["calibration_data"]:
        raise click.UsageError("there is nothing to calibrate with; give --calibration-data")
    if output is None and given["calibration_cache"] is None:
        raise click.UsageError("the ranges would be lost; give --calibration-cache, --output or both")
    refuse_for_another_precision(precision)
    try:
        calibration, policy = calibration_from(given), policy_from(given)
    except trtx.InvalidArgumentError as error:
        raise click.UsageError(str(error)) from error
    made = convert(model, precision, calibration=calibration, policy=policy)
    if output is not None:
        made.save(output)
    found = {
        "precision": precision, "cache": given["calibration_cache"], "output": output, "ranges": dict(made.ranges),
        "quantized": sorted(made.changed), "kept": dict(made.kept),
    }  # fmt: skip
    session.answer(found, lambda: _show(found))


def _show(found: dict[str, Any]) -> None:
    click.echo(f"{len(found['ranges'])} ranges for {found['precision']}, {len(found['quantized'])} nodes quantized")
    for name, limit in found["ranges"].items():
        click.echo(f"  {name}: {limit:.6g}")
    for name, why in found["kept"].items():
        click.echo(f"  kept in FP32: {name} ({why})")
    for what in ("cache", "output"):
        if found[what]:
            click.echo(f"{what}: {found[what]}")
