"""A TensorRT and a CUDA driver for machines without a GPU: real numbers, checked memory, planned faults.

Importing this package imports numpy, and neither onnx nor onnxruntime; those come with the first parse.
"""

from __future__ import annotations

from ._backend import MOCK_VERSION, MockBackend
from ._clock import Clock, RealClock, VirtualClock
from ._driver import MockDriver
from ._faults import Fault, device_lost, fail, out_of_memory, process_lost, slow
from ._plan import PlanPayload
from .joined import JoinedBackend

__all__ = [
    "MOCK_VERSION",
    "Clock",
    "Fault",
    "JoinedBackend",
    "MockBackend",
    "MockDriver",
    "PlanPayload",
    "RealClock",
    "VirtualClock",
    "device_lost",
    "fail",
    "out_of_memory",
    "process_lost",
    "slow",
]
