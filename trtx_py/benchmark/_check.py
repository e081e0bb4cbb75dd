"""A fast wrong answer is worth nothing: outputs are held against a reference, and against those of other inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .._errors import InvalidArgumentError
from .._types import Array
from ._errors import WrongOutputError
from ._load import Outputs

#: Relative errors that are usual, by precision; on GPUs that have TF32, TensorRT uses it for FP32.
TOLERANCES = {
    None: 0.01, "fp32": 0.01, "tf32": 0.01, "fp16": 0.03, "bf16": 0.1, "int8": 0.3, "fp8": 0.3, "int4-weights": 0.5,
}  # fmt: skip

#: Outputs that differ by less than this share do not tell one set of inputs from another.
_APART = 1e-3


class Deviation(NamedTuple):
    """How far one output is off.

    Attributes:
        output: its name.
        error: relative error, see WrongOutputError.max_error.
        max_abs: largest magnitude of a difference.
        problem: "" for a difference of numbers, else as WrongOutputError.problem.
    """

    output: str
    error: float
    max_abs: float
    problem: str = ""


def deviation(found: Outputs, wanted: Outputs) -> Deviation:
    """The output that is furthest off."""
    given: Any = found
    if not isinstance(given, Mapping):
        return Deviation(type(given).__name__, float("inf"), float("inf"), "type")
    if found.keys() != wanted.keys():
        odd = sorted(map(str, found.keys() ^ wanted.keys()))
        return Deviation(", ".join(odd), float("inf"), float("inf"), "names")
    return max((_deviation(name, found[name], want) for name, want in wanted.items()), key=lambda each: each.error)


def _deviation(name: str, found: Array, want: Array) -> Deviation:
    given: Any = found
    # Complex numbers would be compared without their imaginary parts, objects and texts not at all.
    if not isinstance(given, np.ndarray) or given.dtype.kind in "cOSUMm":
        return Deviation(name, float("inf"), float("inf"), "type")
    if found.shape != want.shape:
        return Deviation(name, float("inf"), float("inf"), "shape")
    if want.dtype.kind in "iub":
        differ = np.asarray(found) != want
        share = float(differ.mean()) if differ.size else 0.0
        return Deviation(name, share, float(differ.any()))
    a, b = np.asarray(found, np.float64), np.asarray(want, np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(np.isfinite(a), finite):
        return Deviation(name, float("inf"), float("inf"), "not finite")
    difference = a[finite] - b[finite]
    norm = float(np.linalg.norm(b[finite]))
    error = float(np.linalg.norm(difference)) / max(norm, 1e-12)
    return Deviation(name, error, float(np.abs(difference).max(initial=0.0)))


class Expected:
    """What each set of inputs should give.

    Attributes:
        outputs: one for each set.
        reference: where they come from, for messages.

    Raises:
        InvalidArgumentError: neighbouring sets give the same outputs, so that stale ones would pass.
    """

    def __init__(self, outputs: Sequence[Outputs], reference: str) -> None:
        self.outputs, self.reference = tuple(outputs), reference
        count = len(self.outputs)
        differ = [
            [
                one != other and deviation(self.outputs[one], self.outputs[other]).error > _APART
                for other in range(count)
            ]
            for one in range(count)
        ]
        for number in range(count):
            if not differ[number][(number + 1) % count]:
                raise InvalidArgumentError(
                    f"different inputs give the same outputs ({reference}), so stale outputs could not be told; give "
                    "inputs= or input_ranges= that the model tells apart"
                )
        self._others = [[other for other in range(count) if differ[one][other]] for one in range(count)]

    def others(self, which: int) -> list[int]:
        """Sets whose outputs differ from those of set ``which``."""
        return self._others[which]


def _digest(outputs: Outputs) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(outputs):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(outputs[name]).tobytes())
    return digest.digest()


class Checker:
    """Checks the outputs of one contender.

    Args:
        contender: its name.
        tolerance: relative error that is accepted.
        expected: what each set of inputs should give.
    """

    def __init__(self, contender: str, tolerance: float, expected: Expected) -> None:
        self._contender, self._expected = contender, expected
        self.tolerance = tolerance
        #: The largest error that was seen and accepted.
        self.worst = 0.0
        #: How many answers were checked.
        self.checked = 0
        self._seen: dict[bytes, int] = {}

    def check(self, which: int, found: Outputs) -> None:
        """Outputs for the inputs number ``which``. Raises WrongOutputError."""
        wanted, others = self._expected.outputs, self._expected.others(which)
        off = deviation(found, wanted[which])
        if not off.error <= self.tolerance:
            for other in others:
                if deviation(found, wanted[other]).error <= self.tolerance:
                    raise self._stale(off, other)
            raise self._wrong(off)
        # With a loose tolerance the outputs of other inputs may pass; but no two inputs give the same bits.
        seen = self._seen.setdefault(_digest(found), which)
        if seen in others:
            raise self._stale(off, seen)
        self.worst = max(self.worst, off.error)
        self.checked += 1

    def _stale(self, off: Deviation, other: int) -> WrongOutputError:
        return self._error(
            off, "stale",
            f"those of other inputs (set {other}): nothing ran, or an earlier result was handed out",
        )  # fmt: skip

    def _wrong(self, off: Deviation) -> WrongOutputError:
        said = {
            "names": "there in one of contender and reference only",
            "type": "no array of numbers by its output's name: a contender gives numpy arrays by output name",
            "shape": "of another shape than the reference's",
            "not finite": "NaN or infinite where the reference is not, or the other way round",
        }.get(off.problem, f"wrong, by {off.max_abs:.3g} at most")
        return self._error(off, off.problem or "wrong", said)

    def _error(self, off: Deviation, problem: str, said: str) -> WrongOutputError:
        return WrongOutputError(
            f"contender {self._contender!r} is not reported: output {off.output!r} is {said}; relative error "
            f"{off.error:.3g} to {self._expected.reference}, {self.tolerance:g} is allowed. If it is "
            "only less precise, give tolerance=",
            contender=self._contender, output=off.output, problem=problem, max_error=off.error,
            tolerance=self.tolerance,
        )  # fmt: skip
