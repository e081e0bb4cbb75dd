"""Devices, streams, events and memory as owned objects, over the CUDA driver seam."""

from ._array import DeviceArray
from ._buffer import DeviceBuffer, PinnedBuffer
from ._device import Device
from ._memory import AllocationRecord, MemoryStatistics
from ._properties import DeviceProperties, device_count, device_properties
from ._stream import Event, Stream

__all__ = [
    "AllocationRecord",
    "Device",
    "DeviceArray",
    "DeviceBuffer",
    "DeviceProperties",
    "Event",
    "MemoryStatistics",
    "PinnedBuffer",
    "Stream",
    "device_count",
    "device_properties",
]
