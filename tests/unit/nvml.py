"""A stand-in for pynvml."""

from __future__ import annotations

import os
import types
from typing import Any


class FakeNvml(types.ModuleType):
    """pynvml with one GPU, whose UUID it takes from whoever asks first."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.open = 0
        self.known = True
        self.mask = 0x4
        self.lacks: set[str] = set()

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, name: bytes) -> str:
        assert name.startswith(b"GPU-")
        if not self.known:
            raise self.NVMLError("Not Found")
        return "gpu"

    def _answer(self, name: str, value: Any) -> Any:
        assert self.open
        if name in self.lacks:
            raise self.NVMLError("Not Supported")
        return value

    def nvmlDeviceGetUtilizationRates(self, gpu: str) -> Any:
        return self._answer("utilization", types.SimpleNamespace(gpu=75, memory=25))

    def nvmlDeviceGetMemoryInfo(self, gpu: str) -> Any:
        return self._answer("memory", types.SimpleNamespace(used=2**30))

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        return self._answer("power", 345_678)

    def nvmlDeviceGetClockInfo(self, gpu: str, kind: int) -> int:
        return self._answer("clock", 1000 * kind)

    def nvmlDeviceGetTemperature(self, gpu: str, sensor: int) -> int:
        return self._answer("temperature", 65)

    def nvmlDeviceGetMaxClockInfo(self, gpu: str, kind: int) -> int:
        return self._answer("most", 1980)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: str) -> list[Any]:
        return self._answer("processes", [types.SimpleNamespace(pid=1), types.SimpleNamespace(pid=os.getpid())])

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return self._answer("driver", b"580.1")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: str) -> int:
        return self._answer("reasons", self.mask)
