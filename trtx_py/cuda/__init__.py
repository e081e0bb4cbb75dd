"""Devices, streams, events and memory as owned objects, over the CUDA driver seam."""

from ._buffer import DeviceBuffer, PinnedBuffer
from ._device import Device
from ._memory import MemoryStatistics
from ._stream import Event, Stream

__all__ = ["Device", "DeviceBuffer", "Event", "MemoryStatistics", "PinnedBuffer", "Stream"]
