"""``trtx profile``: where the time of an engine goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ._app import command as make_command
from ._app import options
from ._build_options import build_options, image_folder
from ._inputs import input_options, inputs_for, limits_of
from ._opening import is_plan, loading_options, open_source
from ._session import Session, run_async
from ._values import FILE, OUTPUT, Number, Shape

if TYPE_CHECKING:
    from ..profiling import ProfileReport

_own = options(
    click.argument("model", type=FILE),
    input_options,
    click.option("--iterations", type=click.IntRange(min=1), default=200, show_default=True, metavar="N",
                 help="Measured requests."),
    click.option("--warmup", type=click.IntRange(min=0), default=20, show_default=True, metavar="N",
                 help="Requests before them that do not count."),
    click.option("--clients", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
                 help="Callers at once, each of which waits for its result."),
    click.option("--runs", type=click.IntRange(min=1), default=20, show_default=True, metavar="N",
                 help="Inferences for the times of stages, and of layers."),
    click.option("--stages/--no-stages", default=True, show_default=True, help="Times of copies and kernels."),
    click.option("--layers/--no-layers", default=True, show_default=True, help="Times of layers."),
    click.option("--interval", type=Number(min=0, min_open=True), default=0.1, show_default=True,
                 metavar="S", help="Seconds between two looks at the GPU."),
    click.option("--nvtx", is_flag=True, help="Mark phases and requests for Nsight Systems."),
    click.option("--top", type=click.IntRange(min=1), default=20, show_default=True, metavar="N",
                 help="How many layers are printed."),
    click.option("-o", "--output", type=OUTPUT, metavar="FILE", help="The report to write, as JSON."),
    click.option("--html", type=OUTPUT, metavar="FILE", help="A page with plots to write."),
    click.option("--markdown", type=OUTPUT, metavar="FILE", help="Tables to write."),
    click.option("--trace", type=OUTPUT, metavar="FILE", help="A trace for Perfetto or Chrome to write."),
)  # fmt: skip


@make_command("profile", _own, loading_options, build_options, trtexec=True)
def command(
    session: Session, model: str, inputs: tuple[tuple[str, str], ...], shapes: dict[str, Shape] | None, **given: Any
) -> None:
    """Measure how MODEL, a plan or an ONNX model, serves one kind of request, and where the time goes.

    Latency, throughput, times of copies and layers, memory, and what the GPU did meanwhile.
    """
    names = ("iterations", "warmup", "clients", "runs", "stages", "layers", "interval", "nvtx", "top", "output", "html",
             "markdown", "trace", "seed", "ranges")  # fmt: skip
    own = {name: given.pop(name) for name in names}
    limits, images = limits_of(own["ranges"]), image_folder(given, ".")
    plan = model if is_plan(model) else None
    opening = open_source(session, model, given, shapes)

    async def measure() -> ProfileReport:
        import asyncio

        import trtx_py as trtx
        from trtx_py.profiling import profile

        async with opening as engine:
            arrays = await asyncio.to_thread(inputs_for, engine, inputs, shapes or {}, own["seed"], limits, images)
            loaded = None if plan is None else await asyncio.to_thread(trtx.Plan.load, plan)
            return await profile(
                engine, arrays, requests=own["iterations"], warmup=own["warmup"], concurrency=own["clients"],
                stages=own["stages"], layers=own["layers"], runs=own["runs"], plan=loaded, interval_s=own["interval"],
                nvtx=own["nvtx"],
            )  # fmt: skip

    report = run_async(measure())
    _write(report, own, session)
    session.answer(_as_json(report), lambda: click.echo(report.to_text(top=own["top"])))


def _write(report: ProfileReport, own: dict[str, Any], session: Session) -> None:
    # What can be written first is there if something else, such as plotly, is missing.
    markdown = _markdown(report, own["top"])
    writers = (("output", report.write_json), ("trace", report.write_trace), ("markdown", markdown),
               ("html", report.write_html))  # fmt: skip
    written = []
    for name, write in writers:
        if own[name] is not None:
            write(own[name])
            written.append(own[name])
            session.interrupted = f"written: {', '.join(written)}"


def _markdown(report: ProfileReport, top: int) -> Any:
    from .._arguments import replace_file

    return lambda path: replace_file(path, report.to_markdown(top=top).encode(), "report")


def _as_json(report: ProfileReport) -> Any:
    import json

    return json.loads(report.to_json())
