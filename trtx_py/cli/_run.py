"""``trtx run``: one inference, its outputs saved and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ._app import command as make_command
from ._app import options
from ._build_options import build_options, image_folder
from ._inputs import input_options, inputs_for, limits_of
from ._main import Failure
from ._opening import loading_options, open_source
from ._session import Session, console, run_async, table
from ._values import FILE, OUTPUT, Number, Shape

if TYPE_CHECKING:
    from .._array_files import ArrayDifference
    from .._types import Array

_own = options(
    click.argument("model", type=FILE),
    input_options,
    click.option("-o", "--output", type=OUTPUT, metavar="FILE", help="Outputs to write: .npz, or .json."),
    click.option("--save-inputs", type=OUTPUT, metavar="FILE", help="Inputs to write, as .npz."),
    click.option("--reference", type=FILE, metavar="FILE",
                 help="What the outputs should be: a .npz, or an ONNX model for ONNX Runtime to run."),
    click.option("--rtol", type=Number(min=0), default=1e-3, show_default=True, metavar="X",
                 help="Allowed difference, as part of the reference."),
    click.option("--atol", type=Number(min=0), default=1e-4, show_default=True, metavar="X",
                 help="Allowed difference besides."),
    click.option("--show", is_flag=True, help="Print the outputs' values."),
)  # fmt: skip


@make_command("run", _own, loading_options, build_options, trtexec=True)
def command(
    session: Session, model: str, inputs: tuple[tuple[str, str], ...], shapes: dict[str, Shape] | None, **given: Any
) -> None:
    """Run MODEL, a plan or an ONNX model, once.

    Exit code 1 if the outputs are not what --reference says.
    """
    own = {
        name: given.pop(name)
        for name in ("seed", "ranges", "output", "save_inputs", "reference", "rtol", "atol", "show")
    }
    limits = limits_of(own["ranges"])
    images = image_folder(given, ".")
    opening = open_source(session, model, given, shapes)
    found = run_async(
        _run(opening, lambda engine: inputs_for(engine, inputs, shapes or {}, own["seed"], limits, images))
    )
    arrays, outputs, times = found
    from .._array_files import save_arrays

    if own["save_inputs"] is not None:
        save_arrays(own["save_inputs"], arrays)
    if own["output"] is not None:
        save_arrays(own["output"], outputs)  # before the comparison: wrong outputs are what one wants to look at
        session.interrupted = f"the outputs are in {own['output']}"
    compared = _compared(own, arrays, outputs)
    wrong = [each for each in compared or () if not each.within]
    facts = {
        "model": model, "seed": own["seed"], "inputs": _facts(arrays), "outputs": _facts(outputs), **times,
        "saved": own["output"], "reference": own["reference"], "differences": compared,
        "within": None if compared is None else not wrong,
    }  # fmt: skip
    if own["show"] and session.json:
        facts["values"] = outputs
    session.answer(facts, lambda: _show(facts, outputs if own["show"] else {}))
    if wrong:
        each = wrong[0]
        raise Failure(
            f"{len(wrong)} of {len(compared or ())} outputs differ from {own['reference']}: {each.name!r} by up to "
            f"{each.max_abs:.4g} in {each.wrong} of {each.elements} elements"
        )


async def _run(opening: Any, make: Any) -> tuple[dict[str, Array], dict[str, Array], dict[str, Any]]:
    import asyncio

    async with opening as engine:
        arrays = await asyncio.to_thread(make, engine)
        await engine.infer(arrays)  # makes buffers, and loads kernels: not a time to report
        result = await engine.infer_timed(arrays)
        outputs = dict(result.outputs)
        times = {name: getattr(result, name) for name in ("latency_ms", "queue_ms", "gpu_ms")}
        return arrays, outputs, times


def _compared(
    own: dict[str, Any], arrays: dict[str, Array], outputs: dict[str, Array]
) -> tuple[ArrayDifference, ...] | None:
    path = own["reference"]
    if path is None:
        return None
    import trtx_py as trtx

    from .._array_files import differences, read_npz

    if path.lower().endswith(".npz"):
        wanted = read_npz(path)
    else:
        from ..quantize._reference import Runner
        from ..quantize._store import load_model

        model, *_ = load_model(path)
        try:
            wanted = Runner(model).run(arrays)
        except trtx.TrtxError as error:  # ONNX Runtime does not know the file, and MODEL is another
            raise trtx.InvalidArgumentError(f"--reference {path}: {error}") from error
    return differences(outputs, wanted, rtol=own["rtol"], atol=own["atol"])


def _facts(arrays: dict[str, Array]) -> dict[str, Any]:
    found = {}
    for name, array in arrays.items():
        numbers = array.astype(float)
        some = numbers.size > 0
        found[name] = {
            "dtype": str(array.dtype), "shape": array.shape, "min": float(numbers.min()) if some else None,
            "max": float(numbers.max()) if some else None, "mean": float(numbers.mean()) if some else None,
        }  # fmt: skip
    return found


def _show(facts: dict[str, Any], values: dict[str, Array]) -> None:
    rows = table("", "name", "type", "shape", "min", "max", "mean")
    for what in ("inputs", "outputs"):
        for name, one in facts[what].items():
            numbers = ["-" if one[key] is None else f"{one[key]:.5g}" for key in ("min", "max", "mean")]
            rows.add_row(what[:-1], name, one["dtype"], "x".join(map(str, one["shape"])) or "scalar", *numbers)
    console().print(rows)
    for name, array in values.items():
        click.echo(f"{name} =\n{array}")
    if facts["gpu_ms"] is not None:
        click.echo(f"{facts['latency_ms']:.3f} ms in all, {facts['gpu_ms']:.3f} ms on the GPU")
    if facts["saved"]:
        click.echo(f"outputs: {facts['saved']}")
    for each in facts["differences"] or ():
        verdict = "as the reference" if each.within else f"{each.wrong} of {each.elements} elements differ"
        click.echo(f"{each.name}: {verdict}; largest difference {each.max_abs:.4g}, relative {each.max_rel:.4g}")
