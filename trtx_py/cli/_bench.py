"""``trtx bench``: contenders measured side by side, with checked outputs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ._app import command as make_command
from ._app import options
from ._build_options import build_options
from ._inputs import limits_of
from ._main import Failure
from ._opening import loading_options, open_arguments
from ._session import Session, run_async
from ._values import FILE, OUTPUT, PAIR, SHAPES, Number

if TYPE_CHECKING:
    from ..benchmark import BenchmarkResult, BenchmarkSpec, Contender, Progress, ResultComparison

_KINDS = ("engine", "slot", "batcher", "sync", "bare", "to_thread", "onnxruntime", "onnxruntime_cuda", "baselines")
_PRECISIONS = ("model", "fp32", "tf32", "fp16", "bf16", "int8", "fp8", "int4-weights")

_what = options(
    click.argument("model", type=FILE, required=False),
    click.option("--contender", multiple=True, type=click.Choice(_KINDS),
                 help="What is measured; baselines are all but ours. May be repeated; engine and baselines if nothing "
                 "is said."),
    click.option("--torch", "torch_module", type=FILE, metavar="FILE", help="The model as .pt2 or TorchScript."),
    click.option("--batch", type=click.IntRange(min=1), metavar="N",
                 help="Rows of a request; what --shapes says, else 1."),
    click.option("--batch-sweep", metavar="N,...", help="The engine with requests of these sizes: 1,2,4,8."),
    click.option("--lanes-sweep", metavar="N,...", help="The engine with so many lanes: 1,2,4,8."),
    click.option("--precisions", metavar="WORD,...", help="The engine in these precisions: model,fp16,int8."),
    click.option("--graphs-on-off", is_flag=True, help="The engine with CUDA graphs and without."),
    click.option("--batcher-direct", is_flag=True, help="Many clients through a batcher, and to the engine directly."),
    click.option("--max-batch-size", type=click.IntRange(min=1), default=64, show_default=True, metavar="N",
                 help="Of the batcher."),
    click.option("--baseline", metavar="NAME", help="The contender that others are compared with."),
)  # fmt: skip
_how = options(
    click.option("--clients", type=click.IntRange(min=1), metavar="N",
                 help="Callers at once, each of which waits for its result; 1, with several lanes 2 for each."),
    click.option("--rate", type=Number(min=0, min_open=True), metavar="PER_S",
                 help="Requests a second that arrive at random, in place of --clients."),
    click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True, metavar="N",
                 help="How often each contender has its turn."),
    click.option("--requests", type=click.IntRange(min=1), metavar="N", help="In each turn; 100 if not given."),
    click.option("--iterations", type=click.IntRange(min=1), metavar="N",
                 help="Requests of each contender in all turns together, at least, in place of --requests."),
    click.option("--settle", type=click.IntRange(min=0), default=3, show_default=True, metavar="N",
                 help="Requests before each turn that are not measured."),
    click.option("--warmup-limit", type=Number(min=0, min_open=True), default=10.0, show_default=True,
                 metavar="S", help="Seconds after which a contender is measured though its latency is not stable."),
    click.option("--time-limit", type=Number(min=0, min_open=True), metavar="S",
                 help="No round begins after so many seconds."),
    click.option("--inputs", type=FILE, metavar="FILE", help="Samples by input name, as .npz; random if not given."),
    click.option("--range", "ranges", multiple=True, type=PAIR, metavar="NAME=LOW:HIGH",
                 help="Limits of a random input. May be repeated."),
    click.option("--shapes", type=SHAPES, metavar="X:SHAPE,...", help="Of inputs with dynamic axes besides the first."),
    click.option("--input-sets", type=click.IntRange(min=2), default=4, show_default=True, metavar="N",
                 help="Different inputs that requests go through."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
                 help="Of all chance."),
    click.option("--reference", type=FILE, metavar="FILE",
                 help="What outputs are compared with: an ONNX model, or a .npz for --inputs."),
    click.option("--tolerance", type=Number(min=0, min_open=True), metavar="X",
                 help="Relative error that is accepted."),
    click.option("--exclude-wrong", is_flag=True,
                 help="Leave out a contender that fails, or whose outputs are wrong; else the run ends."),
    click.option("--accuracy/--no-accuracy", default=True, show_default=True,
                 help="Compare engines of a precision with the FP32 model."),
    click.option("--confidence", type=Number(0, 1, min_open=True, max_open=True), default=0.95,
                 show_default=True, metavar="X", help="Of intervals."),
)  # fmt: skip
_results = options(
    click.option("-o", "--output", type=OUTPUT, metavar="FILE",
                 help="The result to write, as JSON; Ctrl-C leaves the complete rounds there."),
    click.option("--html", type=OUTPUT, metavar="FILE", help="A page with plots to write."),
    click.option("--markdown", type=OUTPUT, metavar="FILE", help="Tables to write."),
    click.option("--against", type=FILE, metavar="FILE", help="An older result: exit code 1 if this one is worse."),
    click.option("--compare", type=FILE, nargs=2, metavar="OLD NEW", help="Compare two results; nothing is measured."),
    click.option("--max-regression", type=Number(min=0), default=0.05, show_default=True, metavar="X",
                 help="Share by which a figure may be worse."),
)  # fmt: skip


@make_command("bench", _what, _how, _results, loading_options, build_options, trtexec=True)
def command(session: Session, model: str | None, compare: tuple[str, str] | None, **given: Any) -> None:
    """Measure MODEL, a plan or an ONNX model, side by side with what else could run it.

    Turns are interleaved, intervals bootstrapped, and outputs checked: nothing is reported of a contender whose outputs
    are wrong or stale. --compare OLD NEW compares two results, and exits with 1 if the second is worse.
    """
    from ..benchmark import compare_results

    if compare is not None:
        if model is not None:
            raise click.UsageError("--compare measures nothing; leave MODEL out")
        found = compare_results(*compare, max_regression=given["max_regression"])
        session.answer(_comparison(found), lambda: click.echo(str(found)))
        _check(found)
        return
    if model is None:
        raise click.UsageError("Missing argument 'MODEL'")
    own = {name: given.pop(name) for name in list(given) if name in _OWN}
    spec = _spec(session, model, own, given)
    if own["output"] is not None:
        session.interrupted = f"complete rounds, if there were any, are in {own['output']}"
    result = run_async(_run(spec, own["output"], _progress(session)))
    session.interrupted = f"the result is in {own['output']}" if own["output"] else session.interrupted
    _write(result, own)
    older = (
        None
        if own["against"] is None
        else compare_results(own["against"], result, max_regression=own["max_regression"])
    )
    session.answer(_facts(result, older), lambda: _show(result, older))
    if older is not None:
        _check(older)
    if not any(each.measurement is not None for each in result.contenders):
        raise Failure("nothing could be measured; see the reasons above")


_OWN = frozenset(str(each.name) for each in click.command()(_what(_how(_results(lambda: None)))).params)


async def _run(
    spec: BenchmarkSpec, output: str | None, progress: Callable[[Progress], object] | None
) -> BenchmarkResult:
    from ..benchmark import run

    return await run(spec, save_to=output, on_progress=progress)


def _spec(session: Session, model: str, own: dict[str, Any], given: dict[str, Any]) -> BenchmarkSpec:
    import trtx_py as trtx

    from ..benchmark import BenchmarkSpec, ClosedLoop, OpenLoop, WarmUp

    lanes = given["lanes"]
    clients = own["clients"] or (1 if lanes == 1 else 2 * lanes)
    load = ClosedLoop(clients) if own["rate"] is None else OpenLoop(own["rate"])
    # The precision belongs to contenders, which accept more error with it; the others run the model as it is.
    precision = given.pop("precision", None)
    opening = open_arguments(model, {**given, "precision": None})
    builder = opening.get("builder_options")
    profiles = None
    if builder is not None and builder.profiles:
        # Given to open_engine beside the options they would be added to themselves.
        profiles, opening["builder_options"] = builder.profiles, dataclasses.replace(builder, profiles=())
    requests = own["requests"] or 100
    if own["iterations"] is not None:
        if own["requests"] is not None:
            raise click.UsageError("--iterations is in place of --requests; give one of them")
        requests = -(-own["iterations"] // own["rounds"])
    try:
        contenders = _contenders(own, precision, load)
        return BenchmarkSpec(
            model, contenders, own["baseline"], load, own["rounds"], requests, own["settle"],
            WarmUp(time_limit_s=own["warmup_limit"]), session.backend, session.device, profiles, opening,
            own["shapes"] or {}, own["inputs"], limits_of(own["ranges"]), own["input_sets"], own["reference"],
            own["tolerance"], "exclude" if own["exclude_wrong"] else "raise", accuracy=own["accuracy"],
            seed=own["seed"], confidence=own["confidence"], time_limit_s=own["time_limit"],
        )  # fmt: skip
    except trtx.InvalidArgumentError as error:
        raise click.UsageError(str(error)) from error


def _contenders(own: dict[str, Any], precision: str | None, load: Any) -> tuple[Contender, ...]:
    from .. import benchmark as b

    batch = _batch(own)
    found: list[Contender] = []
    if own["batch_sweep"]:
        found += b.batch_sweep(_numbers(own["batch_sweep"], "--batch-sweep"), precision=precision, load=load)
    if own["lanes_sweep"]:
        lanes = _numbers(own["lanes_sweep"], "--lanes-sweep")
        found += b.lanes_sweep(lanes, batch=batch, clients=own["clients"], precision=precision)
    if own["precisions"]:
        found += b.precision_comparison(_words(own["precisions"]), batch=batch, load=load)
    if own["graphs_on_off"]:
        found += b.graphs_on_off(batch=batch, precision=precision, load=load)
    if own["batcher_direct"]:
        many = load if own["rate"] is not None else b.ClosedLoop(own["clients"] or 64)
        found += b.batcher_against_direct(load=many, max_batch_size=own["max_batch_size"], precision=precision)
    kinds = own["contender"] or (() if found else ("engine", "baselines"))
    for kind in dict.fromkeys(kinds):
        if kind == "baselines":
            found += b.baselines(batch=batch, module=own["torch_module"])
            continue
        with_engine = kind in ("engine", "slot", "batcher", "sync", "bare", "to_thread")
        batcher = {"max_batch_size": own["max_batch_size"]} if kind == "batcher" else {}
        found.append(b.Contender(kind, kind, batch, precision if with_engine else None, batcher=batcher))
    if own["torch_module"] is not None and "baselines" not in kinds:
        found.append(b.Contender("PyTorch", "torch", batch, module=own["torch_module"]))
    return tuple(found)


def _batch(own: dict[str, Any]) -> int:
    if own["batch"] is not None:
        return int(own["batch"])
    rows = {shape[0] for shape in (own["shapes"] or {}).values() if shape}
    if len(rows) > 1:
        raise click.UsageError(f"--shapes has first axes of {', '.join(map(str, sorted(rows)))}; say --batch")
    return rows.pop() if rows else 1


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r}; expected numbers such as 1,2,4", param_hint=option) from None


def _words(text: str) -> list[str | None]:
    words = [part.strip() for part in text.split(",")]
    wrong = [word for word in words if word not in _PRECISIONS]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r}; expected some of {', '.join(_PRECISIONS)}", param_hint="--precisions")
    return [None if word == "model" else word for word in words]


def _progress(session: Session) -> Callable[[Progress], object] | None:
    if session.json or not (session.verbose or sys.stderr.isatty()):
        return None
    said: list[str] = []

    def tell(step: Progress) -> None:
        # A line for each stage, and for each tenth of the measuring: thousands of turns are no news.
        tenth = 10 * step.done // max(1, step.total) if step.stage == "measure" else step.done
        line = f"{step.stage} {step.done} of {step.total}" + ("" if step.stage == "measure" else f": {step.contender}")
        if not said or said[-1] != f"{step.stage} {tenth}":
            said.append(f"{step.stage} {tenth}")
            session.note(line)

    return tell


def _write(result: BenchmarkResult, own: dict[str, Any]) -> None:
    from .._arguments import replace_file

    for name, make in (("markdown", result.markdown), ("html", result.html)):
        if own[name] is not None:
            replace_file(own[name], make().encode(), f"{name} report")


def _facts(result: BenchmarkResult, older: ResultComparison | None) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(result.to_json())
    if older is not None:
        found["against"] = _comparison(older)
    return found


def _comparison(found: ResultComparison) -> dict[str, Any]:
    return {
        "ok": found.ok,
        "max_regression": found.max_regression,
        "changes": found.changes,
        "warnings": found.warnings,
    }


def _show(result: BenchmarkResult, older: ResultComparison | None) -> None:
    click.echo(result.text())
    if older is not None:
        click.echo(str(older))


def _check(found: ResultComparison) -> None:
    if found.ok:
        return
    worst = found.regressions[0]
    more = f", and {len(found.regressions) - 1} more" if len(found.regressions) > 1 else ""
    raise Failure(f"{worst.contender}: {worst.figure or 'nothing to compare'}: {worst.verdict}{more}")
