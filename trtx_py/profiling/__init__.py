"""Where the time of an engine goes: ``report = await trtx.profile(engine, inputs)``.

Importing it costs what its own files cost; plotting and NVML are imported when they are used.
"""

from ._device import DeviceReport, DeviceSample, DeviceSampler, DeviceSource, NvmlSource
from ._distribution import Distribution
from ._profile import profile
from ._report import (
    BatchTimes,
    LayerTime,
    LayerTimes,
    MemoryUse,
    ProfiledEngine,
    ProfileReport,
    RequestTimes,
    StageTimes,
)

__all__ = [
    "BatchTimes",
    "DeviceReport",
    "DeviceSample",
    "DeviceSampler",
    "DeviceSource",
    "Distribution",
    "LayerTime",
    "LayerTimes",
    "MemoryUse",
    "NvmlSource",
    "ProfileReport",
    "ProfiledEngine",
    "RequestTimes",
    "StageTimes",
    "profile",
]

for _object in [globals()[_name] for _name in __all__]:
    # Errors and reprs show the public name; two of them belong to the facade too.
    _object.__module__ = "trtx_py" if _object in (ProfileReport, profile) else __name__
