"""``run``: a spec goes in, a result comes out, and what was measured before an interruption is kept."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack

from .._aio import run_shielded
from .._arguments import checked_path
from .._errors import InvalidArgumentError, TrtxError
from .._plan import Plan
from ._errors import WrongOutputError
from ._figures import Figures
from ._result import BenchmarkResult, ContenderResult
from ._session import Entry, Progress, Session
from ._spec import BenchmarkSpec
from ._stats import FEWEST_ROUNDS, Bootstrap

_log = logging.getLogger("trtx_py")
#: Shorter and without what may be a secret: an object is named by its type.
_LONGEST_OPTION = 120
#: An open loop that takes that much longer than its arrivals could not keep up.
_OVERLOADED = 1.1


async def run(
    spec: BenchmarkSpec,
    *,
    save_to: str | os.PathLike[str] | None = None,
    on_progress: Callable[[Progress], object] | None = None,
) -> BenchmarkResult:
    """Measure all contenders of ``spec`` side by side. Runs on asyncio; needs the machine to itself.

    Every contender's outputs are compared with the reference before the timing, at random during it, and after it with
    inputs that nobody has seen. Nothing is reported of a contender whose outputs are wrong or stale.

    Args:
        save_to: a file for the result. It is written too when the run is cancelled or fails after the first round:
            marked as not complete, with the rounds that were.
        on_progress: called before each step, on the event loop.
    Raises:
        WrongOutputError: outputs are wrong or stale, and ``spec.on_wrong_output`` is "raise". Nothing is saved.
        ContenderError: one raised, likewise; what is complete is saved.
        InvalidArgumentError, ShapeError: the spec does not fit the model, or ``save_to`` cannot be written; that is
            looked at before anything is measured.
        TrtxError: as ``open_engine`` and ``Engine.infer``, of the engine that names and shapes are read from, and of
            the reference.
    Cancellation: requests in flight are cancelled and awaited, all that was opened is closed, and the rounds that are
        complete are saved.
    """
    if not isinstance(spec, BenchmarkSpec):
        raise InvalidArgumentError(f"spec is {type(spec).__name__}; expected a BenchmarkSpec")
    path = None if save_to is None else await run_shielded(lambda: _writable(save_to))
    begun = time.perf_counter()
    session = Session(spec, on_progress)
    async with AsyncExitStack() as stack:
        try:
            await session.run(stack)
        except WrongOutputError:
            raise  # figures of wrong outputs are not kept either
        except BaseException as error:
            if path is not None and session.complete_rounds:
                save = functools.partial(_save_partial, session, path, error, time.perf_counter() - begun)
                if isinstance(error, GeneratorExit):
                    save()  # nothing can be awaited any more
                else:
                    await run_shielded(save)  # a second Ctrl-C would end it in the middle
            raise
        cut = session.cut_short
        result = await run_shielded(lambda: _result(session, not cut, cut, time.perf_counter() - begun))
    if path is not None:
        await run_shielded(lambda: result.save(path))
    return result


def _writable(path: str | os.PathLike[str]) -> str:
    """The path, if a file can be written there: better known before than after an hour."""
    name = os.path.abspath(checked_path(path, "save_to"))
    folder = os.path.dirname(name)
    if os.path.isdir(name) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise InvalidArgumentError(f"save_to {name!r} cannot be written: its folder must be there and be writable")
    return name


def _save_partial(session: Session, path: str, error: BaseException, seconds: float) -> None:
    named = f"{type(error).__name__}: {error}".rstrip(": ")
    reason = f"interrupted after {session.complete_rounds} of {session.spec.rounds} rounds ({named})"
    try:
        _result(session, False, reason, seconds).save(path)
    except TrtxError as second:
        _log.warning("the partial results are lost: %s", second)  # the first error is the one to be raised
        return
    # Whoever cancels it knows; of an error not everybody will think that there is something to be had.
    level = logging.WARNING if isinstance(error, Exception) else logging.INFO
    _log.log(level, "%s; what was measured is in %s", reason, path)


def _result(session: Session, complete: bool, reason: str, seconds: float) -> BenchmarkResult:
    spec, surroundings = session.spec, session.surroundings
    assert surroundings is not None  # made before anything is measured
    bootstrap = Bootstrap(confidence=spec.confidence, seed=spec.seed)
    figures = {
        entry.contender.name: Figures(entry.samples, entry.contender.batch, bootstrap)
        for entry in session.entries
        if entry.status == "measured"
    }
    baseline = spec.baseline if spec.baseline in figures else next(iter(figures), None)
    contenders = tuple(_contender(entry, figures, _versus(entry, session, baseline)) for entry in session.entries)
    environment = surroundings.environment()
    warnings = [*environment.warnings, *_warnings(session, contenders)]
    return BenchmarkResult(
        complete=complete,
        reason=reason,
        meaningful=not surroundings.mock,
        source=_described(spec.source),
        reference=session.reference,
        rounds=session.complete_rounds,
        requests=spec.requests,
        seed=spec.seed,
        confidence=spec.confidence,
        seconds=round(seconds, 3),
        contenders=contenders,
        environment=dataclasses.replace(environment, warnings=tuple(warnings)),
    )


def _versus(entry: Entry, session: Session, baseline: str | None) -> str | None:
    """What it asks for itself; else the baseline, if that does the same: ratios across loads and batches mislead."""
    if entry.contender.versus is not None:
        return entry.contender.versus
    for other in session.entries:
        if other.contender.name == baseline:
            alike = other.load == entry.load and other.contender.batch == entry.contender.batch
            return baseline if alike else None
    return None


def _contender(entry: Entry, figures: Mapping[str, Figures], versus: str | None) -> ContenderResult:
    contender = entry.contender
    mine = figures.get(contender.name)
    other = None if versus is None or versus == contender.name else figures.get(versus)
    engine = None if entry.target is None else entry.target.engine
    counts = None if engine is None else engine.statistics()
    return ContenderResult(
        name=contender.name,
        kind=contender.kind,
        batch=contender.batch,
        precision=contender.precision,
        load=str(entry.load),
        options={name: _as_text(value) for name, value in {**contender.options, **contender.batcher}.items()},
        status=entry.status,
        reason=entry.reason,
        checked=entry.checked,
        max_error=entry.worst,
        tolerance=entry.tolerance,
        warmup=entry.warmup,
        measurement=None if mine is None else mine.measurement(),
        ratio=None if mine is None or other is None or versus is None else mine.over(other, versus),
        accuracy=entry.accuracy,
        no_accuracy=entry.no_accuracy,
        device_bytes=None if counts is None else counts.device_memory.peak_bytes,
        pinned_bytes=None if counts is None else counts.pinned_memory.peak_bytes,
        graph_hits=None if counts is None else counts.graphs.hits,
        graph_misses=None if counts is None else counts.graphs.misses,
        device_now_bytes=None if counts is None else counts.device_memory.current_bytes,
    )


def _warnings(session: Session, contenders: tuple[ContenderResult, ...]) -> list[str]:
    found = []
    if session.complete_rounds < FEWEST_ROUNDS:
        found.append(f"{session.complete_rounds} rounds are too few for intervals that can be believed; take 20")
    unstable = [each.name for each in contenders if each.warmup is not None and not each.warmup.stable]
    if unstable:
        found.append(f"not stable when the warm-up's time limit came: {', '.join(unstable)}")
    for entry in session.entries:
        rate = getattr(entry.load, "rate_per_s", None)
        if rate is not None and entry.samples.elapsed_ns:
            share = sum(entry.samples.rates) / len(entry.samples.rates) / rate
            if share * _OVERLOADED < 1:
                found.append(
                    f"{entry.contender.name} answered {share:.0%} of {rate:g} requests a second: it was overloaded, or "
                    "the rounds are too short, and its latency depends on how long they are"
                )
    return found


def _described(source: object) -> str:
    if isinstance(source, Plan):
        return repr(source)
    if isinstance(source, bytes):
        return f"{len(source):,} bytes"
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__


def _as_text(value: object) -> str:
    if isinstance(value, (str, int, float, bool)) or value is None:
        return str(value)[:_LONGEST_OPTION]
    return type(value).__name__
