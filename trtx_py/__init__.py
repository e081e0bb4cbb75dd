"""An asyncio runtime that owns NVIDIA TensorRT: build, load and serve engines with ``await engine.infer()``."""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

try:
    from . import _native as _native
except ImportError as error:
    raise ImportError(
        f"trtx_py's extension module cannot be loaded ({error}); in a checkout run "
        "`bash scripts/build-native PYTHON`, elsewhere reinstall trtx-py"
    ) from error

from ._build_stream import BuildStep, BuildStream
from ._builder import Builder
from ._builder_options import BuilderOptions, DlaOptions, TimingCache
from ._config import BuilderConfig, OptimizationProfile
from ._context import ExecutionContext
from ._engine import Engine, EngineStatistics
from ._errors import (
    BackendUnavailableError,
    BorrowedError,
    BuilderError,
    CacheError,
    CalibrationError,
    ClosedError,
    ConversionError,
    CudaError,
    DeadlineExceededError,
    DeviceLostError,
    DTypeError,
    EngineError,
    ExecutionError,
    InvalidArgumentError,
    MemoryBudgetError,
    NoDeviceError,
    OverloadedError,
    ParserError,
    ParserIssue,
    PlanError,
    PrecisionError,
    ShapeError,
    TrtxError,
    VersionMismatchError,
)
from ._graphs import GraphStatistics
from ._live import LiveObject, live_objects
from ._logger import Logger
from ._network import Network
from ._open import open_engine
from ._options import EngineOptions
from ._plan import Plan, PlanHeader
from ._refitter import Refitter
from ._request import InferenceResult
from ._runtime import Runtime
from ._slot import Slot
from ._types import (
    BackendInfo,
    DataType,
    LayerPrecision,
    Severity,
    ShapeRange,
    TensorInfo,
    TensorLocation,
    TensorMode,
)
from .cache import CacheEntry, CacheReport, EngineCache
from .convert import convert
from .cuda import (
    AllocationRecord,
    Device,
    DeviceArray,
    DeviceBuffer,
    DeviceProperties,
    Event,
    MemoryStatistics,
    PinnedBuffer,
    Stream,
    device_count,
    device_properties,
)
from .network import Layer, NetworkTensor
from .serving._batcher import DynamicBatcher
from .serving._ensemble import Ensemble, EnsembleStatistics
from .serving._filling import BatchRows
from .serving._metrics import HistogramSnapshot
from .serving._multi_device import MultiDevice
from .serving._policy import BatchPolicy
from .serving._pool_statistics import DeviceStatistics, MultiDeviceStatistics
from .serving._rows import pad_axis
from .serving._statistics import BatcherStatistics
from .serving._steps import Step
from .serving._strategies import DeviceLoad, RequestInfo
from .serving._supervisor import RecoveryPolicy

if _TYPE_CHECKING:
    from . import quantize as quantize
    from .convert import ConversionProgress, ConversionReport, ConversionTask, ConvertedModel, InputSpec
    from .profiling import ProfileReport, profile
    from .quantize import (
        Calibration,
        Comparison,
        ImageFolder,
        LayerError,
        OutputError,
        PrecisionPolicy,
        compare,
        compare_sync,
    )

__version__ = "0.1.0"

__all__ = [
    "AllocationRecord",
    "BackendInfo",
    "BackendUnavailableError",
    "BatchPolicy",
    "BatchRows",
    "BatcherStatistics",
    "BorrowedError",
    "BuildStep",
    "BuildStream",
    "Builder",
    "BuilderConfig",
    "BuilderError",
    "BuilderOptions",
    "CacheEntry",
    "CacheError",
    "CacheReport",
    "Calibration",
    "CalibrationError",
    "ClosedError",
    "Comparison",
    "ConversionError",
    "ConversionProgress",
    "ConversionReport",
    "ConversionTask",
    "ConvertedModel",
    "CudaError",
    "DTypeError",
    "DataType",
    "DeadlineExceededError",
    "Device",
    "DeviceArray",
    "DeviceBuffer",
    "DeviceLoad",
    "DeviceLostError",
    "DeviceProperties",
    "DeviceStatistics",
    "DlaOptions",
    "DynamicBatcher",
    "Engine",
    "EngineCache",
    "EngineError",
    "EngineOptions",
    "EngineStatistics",
    "Ensemble",
    "EnsembleStatistics",
    "Event",
    "ExecutionContext",
    "ExecutionError",
    "GraphStatistics",
    "HistogramSnapshot",
    "ImageFolder",
    "InferenceResult",
    "InputSpec",
    "InvalidArgumentError",
    "Layer",
    "LayerError",
    "LayerPrecision",
    "LiveObject",
    "Logger",
    "MemoryBudgetError",
    "MemoryStatistics",
    "MultiDevice",
    "MultiDeviceStatistics",
    "Network",
    "NetworkTensor",
    "NoDeviceError",
    "OptimizationProfile",
    "OutputError",
    "OverloadedError",
    "ParserError",
    "ParserIssue",
    "PinnedBuffer",
    "Plan",
    "PlanError",
    "PlanHeader",
    "PrecisionError",
    "PrecisionPolicy",
    "ProfileReport",
    "RecoveryPolicy",
    "Refitter",
    "RequestInfo",
    "Runtime",
    "Severity",
    "ShapeError",
    "ShapeRange",
    "Slot",
    "Step",
    "Stream",
    "TensorInfo",
    "TensorLocation",
    "TensorMode",
    "TimingCache",
    "TrtxError",
    "VersionMismatchError",
    "compare",
    "compare_sync",
    "convert",
    "device_count",
    "device_properties",
    "live_objects",
    "open_engine",
    "pad_axis",
    "profile",
]

# What only conversion, INT8 and profiling need is imported at the first use of one of these names.
_LATER = {
    name: module
    for module, names in {
        ".convert": ("ConversionProgress", "ConversionReport", "ConversionTask", "ConvertedModel", "InputSpec"),
        ".profiling": ("ProfileReport", "profile"),
        ".quantize": (
            "Calibration", "Comparison", "ImageFolder", "LayerError", "OutputError", "PrecisionPolicy", "compare",
            "compare_sync",
        ),
    }.items()
    for name in names
}  # fmt: skip

for _object in [globals()[_name] for _name in __all__ if _name not in _LATER]:
    # Errors and reprs show the public name, not the module that happens to define it.
    _object.__module__ = __name__


if not _TYPE_CHECKING:  # a checker that saw this would believe in every name

    def __getattr__(name: str) -> object:
        if name == "quantize":
            return _importlib.import_module(".quantize", __name__)
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(_importlib.import_module(_LATER[name], __name__), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, "quantize"})
