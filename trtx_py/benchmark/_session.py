"""One benchmark at work: open, verify, warm up, measure in turns, verify again."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .._aio import run_shielded
from .._engine import Engine
from .._errors import InvalidArgumentError, PrecisionError, TrtxError
from .._plan import Plan
from ..quantize import compare
from ._check import TOLERANCES, Checker, Expected
from ._engines import EnginePool, SourceModel
from ._environment import Surroundings
from ._errors import ContenderError, NotAvailableError, WrongOutputError
from ._figures import Samples
from ._inputs import InputMaker
from ._load import Block, ClosedLoop, Inputs, Load, OpenLoop, Work, poisson_arrivals
from ._reference import Reference
from ._result import Accuracy, Status, WarmUpResult
from ._spec import SHARING, BenchmarkSpec, Contender
from ._targets import Opener, Target
from ._warmup import Stability

_VERIFIED_AT_MOST = 128
#: Requests that each of several clients sends in a turn, at least.
_TIMES_EACH = 4
#: Clients of a contender under an open loop while its outputs are verified.
_VERIFYING_CLIENTS = 4


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        stage: what it does.
        contender: with which, "" for all.
        done, total: of this stage: contenders, or turns while measuring.
    """

    stage: Literal["open", "verify", "warm up", "measure", "verify again", "accuracy"]
    contender: str
    done: int
    total: int


@dataclass
class Entry:
    """One contender and what is known of it so far."""

    contender: Contender
    load: Load
    status: Status = "not measured"
    reason: str = "the run ended before its turn"
    target: Target | None = None
    tolerance: float | None = None
    checked: int = 0
    worst: float | None = None
    warmup: WarmUpResult | None = None
    samples: Samples = field(default_factory=Samples)
    accuracy: tuple[Accuracy, ...] = ()
    no_accuracy: str = ""
    #: Checks the outputs of its turns.
    checker: Checker | None = None

    def leave(self, status: Status, reason: str) -> None:
        """It takes part no more, and nothing of it is reported."""
        self.status, self.reason, self.target = status, reason, None
        self.samples.clear()


@dataclass
class _Workload:
    """Inputs of one batch, and what they should give."""

    sets: list[Inputs]
    expected: Expected


class Session:
    """The state of one run. Everything it opens is closed by the stack."""

    def __init__(self, spec: BenchmarkSpec, on_progress: Callable[[Progress], object] | None) -> None:
        self.spec = spec
        self.entries = [Entry(contender, spec.load_of(contender)) for contender in spec.contenders]
        self.surroundings: Surroundings | None = None
        self.reference = ""
        self.complete_rounds = 0
        self.cut_short = ""
        self._on_progress = on_progress
        self._workloads: dict[int, _Workload] = {}
        self._source: SourceModel | None = None

    def _tell(self, stage: Literal["open", "verify", "warm up", "measure", "verify again", "accuracy"], entry: Entry,
              done: int, total: int) -> None:  # fmt: skip
        if self._on_progress is not None:
            self._on_progress(Progress(stage, entry.contender.name, done, total))

    @property
    def _taking_part(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.target is not None]

    async def run(self, stack: AsyncExitStack) -> None:
        """Raises WrongOutputError, and what opening and running engines raises."""
        spec = self.spec
        source = self._source = await run_shielded(lambda: SourceModel(spec))
        pool = EnginePool(spec, source, stack)
        try:
            first = await pool.get(*self._first_options())
        except PrecisionError:  # that contender will be told so; names and shapes are those of any
            first = await pool.get()
        loop = type(asyncio.get_running_loop()).__module__.split(".")[0]
        surroundings = self.surroundings = await run_shielded(partial(Surroundings, first, loop))
        stack.callback(surroundings.watch.close)
        maker = InputMaker(spec, first.io_tensors)
        reference = await run_shielded(lambda: Reference(spec, source, pool, maker))
        self.reference = reference.name
        await self._open(Opener(pool, stack, reference.model, first.io_tensors), maker, reference)
        for number, entry in enumerate(self._taking_part):
            self._tell("verify", entry, number, len(self.entries))
            await self._verify(entry, self._workloads[entry.contender.batch], "verified")
        for number, entry in enumerate(self._taking_part):
            self._tell("warm up", entry, number, len(self.entries))
            with self._named(entry, "warmed up"):
                await self._warm_up(entry)
        await self._measure()
        await self._verify_again(maker, reference)
        if spec.accuracy:
            await self._compare(pool, reference)

    def _first_options(self) -> tuple[str | None, dict[str, object]]:
        """Of a contender whose engine is opened anyway, preferably one of the model's own precision."""
        shared = [each for each in self.spec.contenders if each.kind in SHARING and each.source is None]
        for contender in sorted(shared, key=lambda each: each.precision is not None):
            return contender.precision, dict(contender.options)
        return None, {}

    @contextmanager
    def _named(self, entry: Entry, stage: str) -> Iterator[None]:
        """What its contender raises names it, or it is left out."""
        try:
            yield
        except (WrongOutputError, NotAvailableError):
            raise
        except Exception as error:
            if stage == "opened" and isinstance(error, InvalidArgumentError):
                raise  # the spec is wrong, and says what of it
            found = f"{type(error).__name__}: {error}".rstrip(": ")
            text = f"contender {entry.contender.name!r} failed when it was {stage}: {found}"
            if self.spec.on_wrong_output == "raise":
                raise ContenderError(text, contender=entry.contender.name, stage=stage) from error
            entry.leave("failed", text)

    # ---- before ----

    async def _open(self, opener: Opener, maker: InputMaker, reference: Reference) -> None:
        for number, entry in enumerate(self.entries):
            contender = entry.contender
            self._tell("open", entry, number, len(self.entries))
            shapes = maker.shapes(contender.batch)
            try:
                with self._named(entry, "opened"):
                    entry.target = await opener.open(contender, entry.load, shapes)
            except NotAvailableError as error:
                entry.leave("not available", error.message)
            if entry.target is None:
                continue
            if contender.batch not in self._workloads:
                sets = await run_shielded(partial(maker.sets, contender.batch, self.spec.input_sets))
                expected = await reference.expected(contender.batch, sets)
                self._workloads[contender.batch] = _Workload([each.arrays for each in sets], expected)
            entry.tolerance = self._tolerance(entry, reference)
            workload = self._workloads[contender.batch]
            entry.checker = Checker(contender.name, entry.tolerance, workload.expected)

    def _tolerance(self, entry: Entry, reference: Reference) -> float:
        given = entry.contender.tolerance or self.spec.tolerance
        if given is not None:
            return given
        engine = None if entry.target is None else entry.target.engine
        precision = entry.contender.precision
        if engine is not None and not reference.exact:
            precision = precision or engine.plan_header.precision
        return TOLERANCES.get(precision, TOLERANCES[None])

    async def _verify(self, entry: Entry, workload: _Workload, stage: str) -> None:
        """Every set of inputs several times, with all outputs checked; overwritten before, where that can be done."""
        if entry.contender.kind == "call":
            await self._called(entry, workload.sets[0], stage)
        if entry.target is not None:
            with self._named(entry, stage):
                await self._run_and_check(entry, entry.target, workload)

    async def _run_and_check(self, entry: Entry, target: Target, workload: _Workload) -> None:
        if isinstance(target.load, OpenLoop):
            target = dataclasses.replace(target, load=ClosedLoop(_VERIFYING_CLIENTS))
        sets = len(workload.sets)
        count = max(2 * sets, min(2 * _clients(target.load), _VERIFIED_AT_MOST))
        work = Work(_own(entry, workload.sets), [number % sets for number in range(count)], frozenset(range(count)))
        if target.poison is not None:
            target.poison(True)
        try:
            block = await target.run(work)
        finally:
            if target.poison is not None:
                target.poison(False)
        checker = Checker(entry.contender.name, entry.tolerance or 0.0, workload.expected)
        await self._check(entry, checker, block.kept)

    async def _called(self, entry: Entry, inputs: Inputs, stage: str) -> None:
        """Raises InvalidArgumentError where a call gives nothing to be awaited."""
        assert entry.target is not None
        call: Any = entry.target.infer
        with self._named(entry, stage):
            found = call(_copied(inputs))
            if inspect.isawaitable(found):
                await found
                return
        if entry.target is not None:
            raise InvalidArgumentError(
                f"contender {entry.contender.name!r}: call gave a {type(found).__name__}, nothing to be awaited; "
                "expected an async function (async def)"
            )

    async def _check(self, entry: Entry, checker: Checker, kept: list[tuple[int, Inputs]]) -> None:
        def work() -> None:
            for which, outputs in kept:
                checker.check(which, outputs)

        before = checker.checked
        try:
            await run_shielded(work)
        except WrongOutputError as error:
            entry.worst = error.max_error if np.isfinite(error.max_error) else None
            if self.spec.on_wrong_output == "raise":
                raise
            entry.leave("refused", error.message)
            return
        entry.checked += checker.checked - before
        entry.worst = max(entry.worst or 0.0, checker.worst)

    async def _warm_up(self, entry: Entry) -> None:
        target, warmup = entry.target, self.spec.warmup
        if target is None:
            return
        stability, medians, stable = Stability(warmup), list[float](), False
        count = max(warmup.window, 2 * _clients(entry.load))
        if isinstance(entry.load, OpenLoop):  # a window of rare arrivals would take longer than the limit
            count = min(count, max(2, int(entry.load.rate_per_s * warmup.time_limit_s / warmup.windows)))
        begun = time.perf_counter_ns()
        while not stable and (time.perf_counter_ns() - begun) / 1e9 < warmup.time_limit_s:
            block = await target.run(self._work(entry, count, (len(medians), 1), checks=0))
            medians.append(float(np.median(block.times_ns)) / 1e3)
            stable = stability.add(medians[-1])
        seconds = (time.perf_counter_ns() - begun) / 1e9
        entry.warmup = WarmUpResult(stable, count * len(medians), seconds, tuple(round(each, 3) for each in medians))

    # ---- the measuring ----

    def _work(self, entry: Entry, count: int, salt: tuple[int, int], *, checks: int) -> Work:
        place = self.entries.index(entry)
        rng = np.random.default_rng([self.spec.seed, place, *salt])
        sets = self._workloads[entry.contender.batch].sets
        start = int(rng.integers(len(sets)))
        order = [(start + number) % len(sets) for number in range(count)]
        keep = frozenset(rng.choice(count, min(checks, count), replace=False).tolist())
        arrivals: npt.NDArray[np.int64] | None = None
        if isinstance(entry.load, OpenLoop):
            arrivals = poisson_arrivals(entry.load.rate_per_s, count, rng)
        return Work(_own(entry, sets), order, keep, arrivals)

    async def _measure(self) -> None:
        """Rounds in which each contender has one turn. A round that is not finished does not count."""
        spec, begun = self.spec, time.perf_counter()
        orders = turn_orders(len(self.entries), spec.rounds, spec.seed)
        for number, order in enumerate(orders):
            if spec.time_limit_s is not None and number and time.perf_counter() - begun > spec.time_limit_s:
                self.cut_short = (
                    f"the time limit of {spec.time_limit_s:g} s came after {number} of {spec.rounds} rounds"
                )
                break
            done = [(entry, await self._turn(entry, number, turn)) for turn, entry in self._in_order(order)]
            for entry, block in done:
                if block is not None and entry.target is not None:
                    entry.samples.add(block)
                    entry.status, entry.reason = "measured", ""
            self.complete_rounds = number + 1

    def _in_order(self, order: npt.NDArray[np.int64]) -> list[tuple[int, Entry]]:
        return [(turn, self.entries[place]) for turn, place in enumerate(order.tolist()) if self.entries[place].target]

    async def _turn(self, entry: Entry, number: int, turn: int) -> Block | None:
        target, checker, spec = entry.target, entry.checker, self.spec
        if target is None or checker is None:
            return None
        total = spec.rounds * len(self.entries)
        self._tell("measure", entry, number * len(self.entries) + turn, total)
        block: Block | None = None
        with self._named(entry, "measured"):
            if spec.settle:
                count = max(spec.settle, _clients(entry.load))
                await target.run(self._work(entry, count, (number, 2), checks=0))
            # All clients have to come and go a few times, or the beginning and the end are most of a turn.
            many = _clients(entry.load) > 1
            count = max(spec.requests, _TIMES_EACH * _clients(entry.load)) if many else spec.requests
            block = await target.run(self._work(entry, count, (number, 3), checks=spec.checks_per_round))
            if self.surroundings is not None:
                self.surroundings.watch.look()
            await self._check(entry, checker, block.kept)
            block.kept = []
        return block

    # ---- after ----

    async def _verify_again(self, maker: InputMaker, reference: Reference) -> None:
        """With inputs that no contender has seen: one that remembers answers is noticed."""
        fresh: dict[int, _Workload] = {}
        for number, entry in enumerate(self._taking_part):
            batch = entry.contender.batch
            self._tell("verify again", entry, number, len(self.entries))
            if batch not in fresh:
                sets = await run_shielded(partial(maker.sets, batch, self.spec.input_sets, fresh=True))
                expected = await reference.expected(batch, sets)
                fresh[batch] = _Workload([each.arrays for each in sets], expected)
            await self._verify(entry, fresh[batch], "verified again")

    async def _compare(self, pool: EnginePool, reference: Reference) -> None:
        """Accuracy of engines that are not simply the model: each engine once."""
        found: dict[Engine, tuple[tuple[Accuracy, ...], str]] = {}
        for number, entry in enumerate(self._taking_part):
            contender, target = entry.contender, entry.target
            if target is None or target.engine is None or not self._has_accuracy(contender, reference):
                continue
            self._tell("accuracy", entry, number, len(self.entries))
            # Shared ones are free: those of slots, batchers and bare loops have slots or profiles that are held.
            engine = await pool.get(contender.precision, contender.options, source=contender.source)
            if engine not in found:
                found[engine] = await self._accuracy(entry, engine, reference)
            entry.accuracy, entry.no_accuracy = found[engine]

    def _has_accuracy(self, contender: Contender, reference: Reference) -> bool:
        """It was asked for a precision, or it is a plan, and there is the model that it was made of."""
        if contender.precision is not None:
            return True
        other = contender.source is not None or isinstance(self._content, Plan)
        return other and reference.model is not None

    @property
    def _content(self) -> Plan | bytes | str | None:
        return None if self._source is None else self._source.content

    async def _accuracy(self, entry: Entry, engine: Engine, reference: Reference) -> tuple[tuple[Accuracy, ...], str]:
        source = self.spec.reference if isinstance(self._content, Plan) else self._content
        if reference.exact or source is None or reference.model is None:
            return (), "there is no ONNX model that ONNX Runtime can run"
        options: dict[str, Any] = {**self.spec.options, **entry.contender.options}
        sets = list(self._workloads[entry.contender.batch].sets)
        try:
            found = await compare(
                source, engine, sets, calibration=options.get("calibration"), policy=options.get("precision_policy")
            )
        except TrtxError as error:
            return (), " ".join(str(error).split())
        return tuple(
            Accuracy(name, e.max_abs, e.relative, e.snr_db if np.isfinite(e.snr_db) else None, e.top1, e.rows)
            for name, e in found.outputs.items()
        ), ""


def turn_orders(contenders: int, rounds: int, seed: int) -> npt.NDArray[np.int64]:
    """Who is when in each round, (rounds, contenders): random, and in any ``contenders`` consecutive rounds from a
    multiple of that each has each place once, so that nobody is always first, or always behind the same one."""
    rng = np.random.default_rng([seed, 9])
    rows = [
        np.roll(base, shift)
        for base in (rng.permutation(contenders) for _ in range(-(-rounds // contenders)))
        for shift in range(contenders)
    ]
    return np.stack(rows[:rounds]).astype(np.int64)


def _own(entry: Entry, sets: Sequence[Inputs]) -> Sequence[Inputs]:
    """What a contender may write into without harm to others: copies for code that is not ours."""
    return [_copied(each) for each in sets] if entry.contender.kind in ("call", "torch") else sets


def _copied(inputs: Inputs) -> Inputs:
    return {name: np.array(array) for name, array in inputs.items()}


def _clients(load: Load) -> int:
    return load.clients if isinstance(load, ClosedLoop) else 1
