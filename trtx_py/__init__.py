"""An asyncio runtime that owns NVIDIA TensorRT: build, load and serve engines with ``await engine.infer()``."""

from ._builder import Builder
from ._config import BuilderConfig, OptimizationProfile
from ._context import ExecutionContext
from ._engine import Engine, EngineOptions, EngineStatistics
from ._errors import (
    BackendUnavailableError,
    BorrowedError,
    BuilderError,
    ClosedError,
    CudaError,
    DTypeError,
    EngineError,
    ExecutionError,
    InvalidArgumentError,
    ParserError,
    ParserIssue,
    PlanError,
    ShapeError,
    TrtxError,
    VersionMismatchError,
)
from ._logger import Logger
from ._network import Network
from ._open import open_engine
from ._plan import Plan, PlanHeader
from ._request import InferenceResult
from ._resource import LiveObject, live_objects
from ._runtime import Runtime
from ._types import BackendInfo, DataType, Severity, ShapeRange, TensorInfo, TensorLocation, TensorMode
from .cuda import Device, DeviceBuffer, Event, MemoryStatistics, PinnedBuffer, Stream

__version__ = "0.1.0"

__all__ = [
    "BackendInfo",
    "BackendUnavailableError",
    "BorrowedError",
    "Builder",
    "BuilderConfig",
    "BuilderError",
    "ClosedError",
    "CudaError",
    "DTypeError",
    "DataType",
    "Device",
    "DeviceBuffer",
    "Engine",
    "EngineError",
    "EngineOptions",
    "EngineStatistics",
    "Event",
    "ExecutionContext",
    "ExecutionError",
    "InferenceResult",
    "InvalidArgumentError",
    "LiveObject",
    "Logger",
    "MemoryStatistics",
    "Network",
    "OptimizationProfile",
    "ParserError",
    "ParserIssue",
    "PinnedBuffer",
    "Plan",
    "PlanError",
    "PlanHeader",
    "Runtime",
    "Severity",
    "ShapeError",
    "ShapeRange",
    "Stream",
    "TensorInfo",
    "TensorLocation",
    "TensorMode",
    "TrtxError",
    "VersionMismatchError",
    "live_objects",
    "open_engine",
]

for _object in [globals()[_name] for _name in __all__]:
    # Errors and reprs show the public name, not the module that happens to define it.
    _object.__module__ = __name__
