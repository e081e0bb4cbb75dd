"""Every exception that trtx_py raises. One root, leaves named for what the caller can do about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "BackendUnavailableError",
    "BorrowedError",
    "BuilderError",
    "CacheError",
    "CalibrationError",
    "ClosedError",
    "ConversionCause",
    "ConversionError",
    "CudaError",
    "DTypeError",
    "DeadlineExceededError",
    "DeviceLostError",
    "EngineError",
    "ExecutionError",
    "InvalidArgumentError",
    "MemoryBudgetError",
    "NoDeviceError",
    "OverloadedError",
    "ParserError",
    "ParserIssue",
    "PlanError",
    "PrecisionError",
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
    """A plan could not be built from a network.

    Attributes:
        codes: names of nvinfer1::ErrorCode, such as "INVALID_CONFIG", for each error of a failed build that TensorRT's
            error recorder was given, oldest first; empty for other failures.
    """

    def __init__(self, message: str, *, tensorrt_log: Sequence[str] = (), codes: Sequence[str] = ()) -> None:
        super().__init__(message, tensorrt_log=tensorrt_log)
        self.codes: tuple[str, ...] = tuple(codes)


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


class PrecisionError(BuilderError):
    """The model or the TensorRT at hand cannot have the precision that was asked for, or the engine has another.

    Attributes:
        problems: one text for each layer that is not what was asked for; empty where the build did not get that far.
    """

    def __init__(self, message: str, *, problems: Sequence[str] = (), tensorrt_log: Sequence[str] = ()) -> None:
        super().__init__("\n".join([message, *(f"  {problem}" for problem in problems)]), tensorrt_log=tensorrt_log)
        self.problems: tuple[str, ...] = tuple(problems)


class CalibrationError(BuilderError):
    """Ranges for INT8 or FP8 could not be found with the calibration data, or a calibration cache is unusable."""


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
    """An inference was accepted and failed. ``__cause__`` holds the first error where there is one.

    Attributes:
        launched: False if it is known that none of it ran on the GPU: then another attempt, elsewhere for example, can
            do no harm that this one did not.
    """

    launched: bool = True


class DeviceLostError(ExecutionError):
    """The device failed so that its CUDA context is unusable from here on; ``__cause__`` holds how.

    Attributes:
        device: ordinal of the device, None where it is not known.
    """

    def __init__(self, message: str, *, device: int | None = None, launched: bool) -> None:
        super().__init__(message)
        self.device = device
        self.launched = launched


class NoDeviceError(ExecutionError):
    """No device of a MultiDevice can serve at this moment; nothing was launched.

    Attributes:
        causes: by ordinal, why each device is out of service.
    """

    launched = False

    def __init__(self, message: str, *, causes: Mapping[int, BaseException]) -> None:
        super().__init__("\n".join([message, *(f"  device {device}: {cause}" for device, cause in causes.items())]))
        self.causes: Mapping[int, BaseException] = dict(causes)


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


class MemoryBudgetError(ExecutionError, MemoryError):
    """Device memory would exceed the budget (``max_device_bytes``). Neither CUDA nor TensorRT was asked for it.

    Attributes:
        requested_bytes: what was to be allocated.
        used_bytes: what is allocated and reserved already.
        budget_bytes: the most that both may be together.
    """

    def __init__(self, message: str, *, requested_bytes: int, used_bytes: int, budget_bytes: int) -> None:
        super().__init__(message)
        self.requested_bytes = requested_bytes
        self.used_bytes = used_bytes
        self.budget_bytes = budget_bytes


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


class OverloadedError(TrtxError):
    """The request was not accepted, or given up again before it was launched, because too much is waiting already."""


class DeadlineExceededError(TrtxError, TimeoutError):
    """The request's deadline passed before it could be launched; the GPU spent no time on it."""


class BackendUnavailableError(TrtxError):
    """No backend can serve the request; says what was looked for and what to install."""


class CacheError(TrtxError):
    """The folder of an engine cache cannot be used, or must not be trusted.

    Attributes:
        path: what cannot be used.
    """

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


#: Why a conversion failed. "damaged": the source is not what it should be; "refused": it needs an argument, or trust;
#: "missing": a package is not installed; "failed": the converter raised; "differs": the result computes something else;
#: "disk", "memory": there was none left; "timeout", "killed", "crashed": how the worker process ended.
ConversionCause = Literal[
    "damaged", "refused", "missing", "failed", "differs", "disk", "memory", "timeout", "killed", "crashed"
]


class ConversionError(TrtxError):
    """A model could not be converted; nothing was written.

    Attributes:
        format: of the source, as ``detect_format`` names it; None if that is what failed.
        step: which step it was, such as "load", "export", "simplify" or "compare".
        cause: why, in one word: see ConversionCause.
        log_tail: the end of what the converter printed.
        details: the converter's traceback, where it raised.
    """

    def __init__(
        self,
        message: str,
        *,
        format: str | None,
        step: str,
        cause: ConversionCause,
        log_tail: str = "",
        details: str = "",
    ) -> None:
        super().__init__(message)
        self.format = format
        self.step = step
        self.cause: ConversionCause = cause
        self.log_tail = log_tail
        self.details = details

    def __str__(self) -> str:
        lines = self.log_tail.strip().splitlines()[-_LOG_LINES:]
        if not lines:
            return self.message
        return "\n".join([self.message, "the converter printed:", *(f"  {line}" for line in lines)])


_LOG_LINES = 12
