"""What a benchmark refuses: outputs that are wrong, contenders that raise, and result files that cannot be read."""

from __future__ import annotations

from .._errors import InvalidArgumentError, TrtxError


class WrongOutputError(TrtxError):
    """A contender's outputs are wrong or stale, so its figures would mean nothing and are not reported.

    Attributes:
        contender: its name.
        output: name of the output that is worst.
        problem: "wrong" (beyond the tolerance), "stale" (those of other inputs), "not finite" (NaN or infinite where
            the reference is not), "shape", "names" or "type" (no mapping of names to numpy arrays of real numbers).
        max_error: relative error: norm of the difference over that of the reference; for integers and booleans the
            share of entries that differ. Infinite where shapes, names or finiteness differ.
        tolerance: what would have been accepted.
    """

    def __init__(
        self, message: str, *, contender: str, output: str, problem: str, max_error: float, tolerance: float
    ) -> None:
        super().__init__(message)
        self.contender = contender
        self.output = output
        self.problem = problem
        self.max_error = max_error
        self.tolerance = tolerance


class ContenderError(TrtxError):
    """A contender raised, other than by what is wrong with the spec: what it raised is ``__cause__``.

    Attributes:
        contender: its name.
        stage: at what: "opened", "verified", "warmed up", "measured" or "verified again".
    """

    def __init__(self, message: str, *, contender: str, stage: str) -> None:
        super().__init__(message)
        self.contender = contender
        self.stage = stage


class ResultFileError(InvalidArgumentError):
    """A file of benchmark results cannot be read: missing, not JSON, of another kind or of another version.

    Attributes:
        path: the file, "" for text that came from elsewhere.
    """

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class NotAvailableError(TrtxError):
    """This contender cannot run here; the message says why. Caught by ``run``, which puts it into the result."""
