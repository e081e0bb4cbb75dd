"""The statuses of the C ABI, and which error is which."""

from __future__ import annotations

import enum
from collections.abc import Iterator

from .. import _errors as errors
from .._capture import NotCapturableError
from ..backends.protocols import CUDA_ERROR_OUT_OF_MEMORY


class Status(enum.IntEnum):
    """As in trtxpy.h."""

    OK = 0
    INVALID_ARGUMENT = 1
    INVALID_HANDLE = 2
    BORROWED = 3
    NOT_FOUND = 4
    SHAPE = 5
    DTYPE = 6
    RANGE = 7
    BUFFER_SIZE = 8
    OUT_OF_MEMORY = 9
    UNAVAILABLE = 10
    PYTHON = 11
    PARSE = 12
    BUILD = 13
    PLAN = 14
    VERSION_MISMATCH = 15
    EXECUTION = 16
    CUDA = 17
    CANCELLED = 18
    TIMEOUT = 19
    BUSY = 20
    CLOSED = 21
    IN_CALLBACK = 22
    FORKED = 23
    NOT_READY = 24
    UNSUPPORTED = 25
    INTERNAL = 26


class StatusError(errors.TrtxError):
    """An error that has a status of its own."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


#: The first that fits counts.
_STATUSES: tuple[tuple[type[BaseException], Status], ...] = (
    (MemoryError, Status.OUT_OF_MEMORY),  # MemoryBudgetError is one
    (errors.CudaError, Status.CUDA),
    (NotCapturableError, Status.UNSUPPORTED),
    (errors.ExecutionError, Status.EXECUTION),
    (errors.ParserError, Status.PARSE),
    (errors.BuilderError, Status.BUILD),
    (errors.PlanError, Status.PLAN),
    (errors.VersionMismatchError, Status.VERSION_MISMATCH),
    (errors.EngineError, Status.EXECUTION),
    (errors.ShapeError, Status.SHAPE),
    (errors.DTypeError, Status.DTYPE),
    (errors.InvalidArgumentError, Status.INVALID_ARGUMENT),
    (errors.BorrowedError, Status.BORROWED),
    (errors.ClosedError, Status.CLOSED),
    (errors.BackendUnavailableError, Status.UNAVAILABLE),
    (TimeoutError, Status.TIMEOUT),
    (FileNotFoundError, Status.NOT_FOUND),
    (KeyboardInterrupt, Status.CANCELLED),
)


def status_of(error: BaseException) -> Status:
    """The status for an exception; INTERNAL for one that nobody expected."""
    if isinstance(error, StatusError):
        return error.status
    if isinstance(error, errors.CudaError) and error.code == CUDA_ERROR_OUT_OF_MEMORY:
        return Status.OUT_OF_MEMORY
    for kind, status in _STATUSES:
        if isinstance(error, kind):
            return status
    return Status.INTERNAL


def failure(error: BaseException) -> tuple[int, str]:
    """What a function that the library calls returns instead of a result. The error's tracebacks end here."""
    status = status_of(error)
    text = str(error) or type(error).__name__
    if status is Status.INTERNAL:
        text = f"{type(error).__name__}: {text}"
    for link in _chain(error):
        link.__traceback__ = None  # its frames hold the caller's arrays, and the error itself
    # UTF-8 is what the library makes of it: a path that is none must not become another error.
    return int(status), text.encode("utf-8", "replace").decode("utf-8")


def _chain(error: BaseException) -> Iterator[BaseException]:
    waiting, seen = [error], set[int]()
    while waiting:
        link = waiting.pop()
        if id(link) not in seen:
            seen.add(id(link))
            yield link
            waiting.extend(other for other in (link.__cause__, link.__context__) if other is not None)
