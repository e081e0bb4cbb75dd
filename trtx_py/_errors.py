"""Every exception that trtx_py raises. One root, leaves named for what the caller can do about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "BackendUnavailableError",
    "BorrowedError",
    "BuilderError",
    "ClosedError",
    "CudaError",
    "DTypeError",
    "EngineError",
    "ExecutionError",
    "InvalidArgumentError",
    "ParserError",
    "ParserIssue",
    "PlanError",
    "ShapeError",
    "TrtxError",
    "VersionMismatchError",
]


class TrtxError(Exception):
    """Root of all errors of this package.

    Attributes:
        tensorrt_log: the lines that TensorRT logged as errors or warnings while the failing call ran, oldest first.
    """

    def __init__(self, message: str, *, tensorrt_log: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.tensorrt_log: tuple[str, ...] = tuple(tensorrt_log)

    def __str__(self) -> str:
        if not self.tensorrt_log:
            return self.message
        return "\n".join([self.message, "TensorRT said:", *(f"  {line}" for line in self.tensorrt_log)])


class BuilderError(TrtxError):
    """A plan could not be built from a network."""


@dataclass(frozen=True)
class ParserIssue:
    """One entry of the parser's error list.

    Source: nvonnxparser::IParserError
    """

    reason: str
    node: str = ""
    operator: str = ""
    code: str = ""

    def __str__(self) -> str:
        where = f"node {self.node!r} ({self.operator}): " if self.node or self.operator else ""
        return f"{where}{self.reason}" + (f" [{self.code}]" if self.code else "")


class ParserError(BuilderError):
    """An ONNX model could not be parsed.

    Attributes:
        issues: every error of the parser, each with node, operator and reason.
    """

    def __init__(self, message: str, *, issues: Sequence[ParserIssue] = (), tensorrt_log: Sequence[str] = ()) -> None:
        text = "\n".join([message, *(f"  {issue}" for issue in issues)])
        super().__init__(text, tensorrt_log=tensorrt_log)
        self.issues: tuple[ParserIssue, ...] = tuple(issues)


class EngineError(TrtxError):
    """A plan could not become an engine, or an engine could not give what was asked of it."""


class PlanError(EngineError):
    """The bytes of a plan are damaged, incomplete or not a plan; TensorRT never saw them."""


class VersionMismatchError(EngineError):
    """A plan was made for another TensorRT version or another GPU than the one that should run it.

    Attributes:
        plan: what the plan was built with (flavour and version, or GPU architecture).
        runtime: what is here.
    """

    def __init__(self, message: str, *, plan: str, runtime: str, tensorrt_log: Sequence[str] = ()) -> None:
        super().__init__(message, tensorrt_log=tensorrt_log)
        self.plan = plan
        self.runtime = runtime


class ExecutionError(TrtxError):
    """An inference was accepted and failed. ``__cause__`` holds the first error where there is one."""


class CudaError(ExecutionError):
    """A CUDA driver call returned something other than CUDA_SUCCESS.

    Attributes:
        code: the CUresult value.
        name: its name, for example ``CUDA_ERROR_OUT_OF_MEMORY``.
        call: the driver function that returned it.
    """

    def __init__(self, code: int, name: str, call: str, detail: str = "", *, tensorrt_log: Sequence[str] = ()) -> None:
        message = f"{call} returned {name} ({code})" + (f": {detail}" if detail else "")
        super().__init__(message, tensorrt_log=tensorrt_log)
        self.code = code
        self.name = name
        self.call = call


class InvalidArgumentError(TrtxError, ValueError):
    """An argument cannot be used; nothing was changed and nothing was launched."""


class ShapeError(InvalidArgumentError):
    """A shape lies outside what the engine, its profiles or the buffer at hand allow."""


class DTypeError(InvalidArgumentError):
    """An array has another dtype than the tensor it is meant for."""


class ClosedError(TrtxError):
    """The object is closed or closing, or belongs to the process that this one was forked from."""


class BorrowedError(TrtxError):
    """The object cannot be closed or handed out because something open still uses it.

    Attributes:
        borrowers: descriptions of what uses it, each with the place where it was made.
    """

    def __init__(self, message: str, *, borrowers: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.borrowers: tuple[str, ...] = tuple(borrowers)


class BackendUnavailableError(TrtxError):
    """No backend can serve the request; says what was looked for and what to install."""
