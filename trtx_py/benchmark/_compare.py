"""Two results of the same benchmark: what became slower, by more than chance explains."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, Literal

from .._errors import InvalidArgumentError
from ..profiling._text import printable
from ._files import load_result
from ._report import markdown_table, plain
from ._result import BenchmarkResult, ContenderResult, Measurement
from ._stats import Interval

Verdict = Literal["same", "regression", "improvement", "unclear", "missing", "not comparable", "new"]

_FAILING = frozenset({"regression", "missing", "not comparable"})
_HEADINGS = ("contender", "figure", "old", "new", "change, worse is above 1", "verdict", "why")


@dataclass(frozen=True)
class Change:
    """One figure of one contender.

    Attributes:
        contender, figure: names; figure is "p50", "p99" or "rows/s", or "" where there is nothing to compare.
        old, new: the figures; None where one side has none.
        worse_by: new over old for times, old over new for throughput: above 1 is worse.
        verdict: "regression" (worse by more than is allowed, and by more than chance explains), "improvement" (the
            same the other way), "same" (within what is allowed), "unclear" (beyond it, but chance explains it, or a
            side has no interval), "missing" (measured before, not now), "new" (the other way round), "not comparable"
            (another batch, load, kind or precision).
        reason: in words, where there is one.
    """

    contender: str
    figure: str
    old: Interval | None
    new: Interval | None
    worse_by: Interval | None
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class ResultComparison:
    """What ``compare_results`` found.

    Attributes:
        changes: of every figure of every contender.
        max_regression: share by which a figure may be worse.
        warnings: what makes the comparison less trustworthy, such as another GPU.
    """

    changes: tuple[Change, ...]
    max_regression: float
    warnings: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        """What became worse, is missing, or cannot be compared."""
        return tuple(change for change in self.changes if change.verdict in _FAILING)

    @property
    def ok(self) -> bool:
        """Nothing of that."""
        return not self.regressions

    def markdown(self) -> str:
        """A table of all changes, and the warnings."""
        lines = [f"- warning: {plain(warning)}" for warning in self.warnings]
        lines += [""] if lines else []
        return "\n".join([*lines, *markdown_table(_HEADINGS, (_row(change) for change in self.changes))]) + "\n"

    def __str__(self) -> str:
        lines = [f"warning: {warning}" for warning in self.warnings]
        lines += [" ".join(cell for cell in _row(change) if cell) for change in self.changes]
        return "\n".join(map(printable, lines))


def compare_results(
    old: BenchmarkResult | str | os.PathLike[str],
    new: BenchmarkResult | str | os.PathLike[str],
    *,
    max_regression: float = 0.05,
    figures: tuple[str, ...] = ("p50", "p99", "rows/s"),
) -> ResultComparison:
    """Compare two results, or files of them, contender by contender.

    A figure counts as worse if it is so by more than ``max_regression`` and the confidence interval of the ratio
    excludes 1. The interval is made of those of both runs; what differs between two sessions on one machine (clocks,
    temperature, neighbours) is not in it, so leave ``max_regression`` some room.

    Args:
        max_regression: 0.05 allows 5% more time, or 5% less throughput.
        figures: which of "p50", "p99" and "rows/s" are compared.
    Raises:
        ResultFileError: a file cannot be read, or is of another kind or version.
        InvalidArgumentError: ``max_regression`` is no number of 0 or more, a figure that there is none of, or one
            result is of the mock and the other is not.
    """
    allowed: Any = max_regression
    if isinstance(allowed, bool) or not isinstance(allowed, (int, float)) or not 0 <= allowed < math.inf:
        raise InvalidArgumentError(f"max_regression is {max_regression!r}; expected a share such as 0.05")
    wanted: Any = figures
    known = ("p50", "p99", "rows/s")
    if not isinstance(wanted, (tuple, list)) or not wanted or not all(each in known for each in wanted):
        raise InvalidArgumentError(f'figures are {figures!r}; expected some of "p50", "p99", "rows/s"')
    before = old if isinstance(old, BenchmarkResult) else load_result(old)
    after = new if isinstance(new, BenchmarkResult) else load_result(new)
    if before.meaningful != after.meaningful:
        raise InvalidArgumentError("one result was measured on the mock backend and the other was not")
    was = {each.name: each for each in before.contenders}
    now = {each.name: each for each in after.contenders}
    changes: list[Change] = []
    for name in [*was, *(name for name in now if name not in was)]:
        changes += _changes(name, was.get(name), now.get(name), max_regression, figures)
    return ResultComparison(tuple(changes), max_regression, tuple(_warnings(before, after)))


def _warnings(old: BenchmarkResult, new: BenchmarkResult) -> list[str]:
    found = []
    for which, result in (("old", old), ("new", new)):
        if not result.complete:
            found.append(f"the {which} result is not complete: {result.reason}")
    for what, before, after in (
        ("model", os.path.basename(old.source), os.path.basename(new.source)),
        ("GPU", old.environment.gpu, new.environment.gpu),
        ("driver", old.environment.driver, new.environment.driver),
        ("TensorRT", old.environment.tensorrt, new.environment.tensorrt),
        ("CPU", old.environment.cpu, new.environment.cpu),
        ("number of CPUs", str(old.environment.cpus), str(new.environment.cpus)),
    ):
        if before != after:
            found.append(f"the {what} is another: {before!r} then, {after!r} now")
    if not old.meaningful:
        found.append("both were measured on the mock backend: the figures say nothing about the speed of a GPU")
    return found


def _changes(
    name: str, old: ContenderResult | None, new: ContenderResult | None, allowed: float, figures: tuple[str, ...]
) -> list[Change]:
    before = None if old is None else old.measurement
    after = None if new is None else new.measurement
    if old is None or before is None:
        if after is None:
            return []
        return [Change(name, "", None, None, None, "new", "was not measured before")]
    if new is None or after is None:
        reason = "is not in the new result" if new is None else f"{new.status}: {new.reason}"
        return [Change(name, "", None, None, None, "missing", reason)]
    other = [
        f"{what} was {then} and is {today}"
        for what, then, today in (
            ("kind", old.kind, new.kind), ("batch", old.batch, new.batch), ("load", old.load, new.load),
            ("precision", old.precision, new.precision), ("options", dict(old.options), dict(new.options)),
        ) if then != today
    ]  # fmt: skip
    if other:
        return [Change(name, "", None, None, None, "not comparable", "; ".join(other))]
    return [_change(name, figure, _figure(before, figure), _figure(after, figure), allowed) for figure in figures]


def _figure(found: Measurement, figure: str) -> Interval:
    return {"p50": found.p50_us, "p99": found.p99_us, "rows/s": found.rows_per_s}[figure]


def _change(name: str, figure: str, old: Interval, new: Interval, allowed: float) -> Change:
    worse = quotient(old, new) if figure == "rows/s" else quotient(new, old)
    ratio, verdict, reason = worse.value, "same", ""
    if ratio > 1 + allowed or ratio < 1 / (1 + allowed):
        if worse.low is None or worse.high is None:
            verdict, reason = "unclear", "one of them has no interval: measure more rounds"
        elif worse.low <= 1 <= worse.high:
            verdict, reason = "unclear", "the interval includes no change: measure more rounds"
        else:
            verdict = "regression" if ratio > 1 else "improvement"
    return Change(name, figure, old, new, worse, verdict, reason)  # type: ignore[arg-type]  # one of the literals


def quotient(above: Interval, below: Interval) -> Interval:
    """The ratio of two independent figures. Widths add up as those of independent errors do, on a logarithmic scale."""
    value = above.value / below.value
    widths = _widths(above), _widths(below)
    if widths[0] is None or widths[1] is None:
        return Interval(value)
    down = math.hypot(widths[0][0], widths[1][1])
    up = math.hypot(widths[0][1], widths[1][0])
    return Interval(value, value * math.exp(-down), value * math.exp(up))


def _widths(figure: Interval) -> tuple[float, float] | None:
    """Of the interval below and above its figure, in logarithms."""
    if figure.low is None or figure.high is None or figure.low <= 0:
        return None
    # A percentile bootstrap may leave its own figure just outside.
    return max(0.0, math.log(figure.value / figure.low)), max(0.0, math.log(figure.high / figure.value))


def _row(change: Change) -> list[str]:
    return [
        change.contender,
        change.figure,
        "" if change.old is None else str(change.old),
        "" if change.new is None else str(change.new),
        "" if change.worse_by is None else str(change.worse_by),
        change.verdict,
        change.reason,
    ]
