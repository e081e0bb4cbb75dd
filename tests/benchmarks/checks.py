"""A fast wrong answer is worth nothing: outputs of every contender are compared before and after it is timed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from .samples import Round
from .workloads import Arrays

#: Between two ways of running one plan; kernels may add in another order.
SAME_PLAN = 0.01
#: Outputs for the two sets of inputs differ by more than this, or stale outputs could not be told.
_APART = 0.03


class InputSets(Protocol):
    """What a reference is made with; see Inputs."""

    first: Arrays
    second: Arrays
    tolerance: float

    def error_of_known(self, outputs: Mapping[str, np.ndarray]) -> float | None: ...


class CheckError(AssertionError):
    """Outputs are wrong; nothing that was timed with them counts."""


class Contender(Protocol):
    """One way of running a request."""

    name: str

    def round(self, count: int) -> Round:
        """``count`` requests, one after another."""
        ...

    def outputs(self, inputs: Arrays) -> Arrays:
        """Run once with these inputs, by the very path that is timed; what is returned is the caller's."""
        ...


def relative_error(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float:
    """The largest of any output: norm of the difference over that of the reference; infinite for wrong names."""
    if found.keys() != wanted.keys():
        return float("inf")
    worst = 0.0
    for name, want in wanted.items():
        if found[name].shape != want.shape or not np.all(np.isfinite(found[name])):
            return float("inf")
        a, b = np.asarray(found[name], np.float64), np.asarray(want, np.float64)
        worst = max(worst, float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)))
    return worst


class Reference:
    """What the outputs of a workload must be: P0's, which are themselves held against the kit's expectations."""

    def __init__(self, p0: Contender, inputs: InputSets) -> None:
        self.inputs: InputSets = inputs
        self.first, self.second = p0.outputs(inputs.first), p0.outputs(inputs.second)
        self.error = inputs.error_of_known(self.first)
        if self.error is not None and not self.error <= inputs.tolerance:
            raise CheckError(f"P0 is off by {self.error:.2e} from the kit's outputs, {inputs.tolerance:.0e} is allowed")
        apart = relative_error(self.first, self.second)
        if not apart > _APART:
            raise CheckError(f"outputs of both sets of inputs differ by {apart:.1e} only: stale outputs would pass")

    def check(self, contenders: Iterable[Contender], *, second: bool) -> dict[str, float]:
        """Errors by contender's name. Raises CheckError, naming every contender that is wrong."""
        given, wanted = (self.inputs.second, self.second) if second else (self.inputs.first, self.first)
        errors = {each.name: relative_error(each.outputs(given), wanted) for each in contenders}
        wrong = [f"{name} by {error:.2e}" for name, error in errors.items() if not error <= SAME_PLAN]
        if wrong:
            when = "after timing, with changed inputs" if second else "before timing"
            raise CheckError(f"outputs are off from P0's {when}: {'; '.join(wrong)}; allowed is {SAME_PLAN}")
        return errors
