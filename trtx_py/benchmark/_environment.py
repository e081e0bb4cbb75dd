"""What the figures are taken on, and what makes them less trustworthy."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from .._engine import Engine
from .._errors import BackendUnavailableError
from ..cuda._device import Device
from ..profiling._device import DeviceSample, NvmlSource, throttling
from ._result import Environment, GpuState

_PACKAGES = (
    "trtx-py", "numpy", "anyio", "uvloop", "onnx", "onnxruntime", "onnxruntime-gpu", "torch", "tensorrt",
    "tensorrt-rtx", "tensorrt_dispatch_cu13", "tensorrt_lean_cu13", "nvidia-ml-py",
)  # fmt: skip
_GOVERNORS = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
#: Above these shares of the processors, and of the GPU, others' work is felt.
_BUSY, _BUSY_GPU = 0.5, 0.05


class Watch:
    """The GPU through NVML, looked at between turns, never while something is timed. Without NVML it sees nothing.

    Args:
        device: None on the mock, which has no GPU.

    Attributes:
        missing: why there is no NVML; empty if there is.
        driver: version of the driver; empty without NVML.
        warnings: what was found before the run: other work on the GPU.
    """

    def __init__(self, device: Device | None) -> None:
        self.missing, self.driver = "", ""
        self.warnings: list[str] = []
        self._source: NvmlSource | None = None
        self._samples: list[DeviceSample] = []
        if device is None:
            self.missing = "the mock has no GPU"
            return
        try:
            source = self._source = NvmlSource(device)
        except BackendUnavailableError as error:
            self.missing = f"clocks and throttling are not known: {error}"
            return
        self.driver = source.driver_version() or ""
        busy, others = source.look(0.0).gpu_utilization, source.other_processes()
        # In a container the pids are the host's, and this process is among them: only work that is seen counts.
        if others and busy is not None and busy > _BUSY_GPU:
            self.warnings.append(f"the GPU was {busy:.0%} busy before the run; processes on it: {others}")

    def look(self) -> None:
        """Once, after a turn. Milliseconds at most."""
        if self._source is not None:
            self._samples.append(self._source.look(0.0))

    def state(self) -> GpuState | None:
        """What was seen so far."""
        clocks = [sample.sm_clock_mhz for sample in self._samples if sample.sm_clock_mhz is not None]
        if self._source is None or not clocks:
            return None
        return GpuState(
            sm_clock_mhz=(min(clocks), max(clocks)),
            max_sm_clock_mhz=self._source.max_sm_clock_mhz(),
            temperature_c=_most(sample.temperature_c for sample in self._samples),
            power_w=_most(sample.power_w for sample in self._samples),
            throttled=throttling(self._samples),
        )

    def close(self) -> None:
        """Idempotent."""
        source, self._source = self._source, None
        if source is not None:
            source.close()


class Surroundings:
    """Taken before the run begins; ``environment`` puts in what was seen until then."""

    def __init__(self, engine: Engine, event_loop: str) -> None:
        self._event_loop = event_loop
        backend = engine.runtime.backend
        self.mock = self._is_mock(backend.name)
        device = engine.runtime.device
        self.watch = Watch(None if self.mock else device)
        self._driver = self.watch.driver or f"CUDA {_cuda_version(device._driver.cuDriverGetVersion())}"
        self._date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self._load = tuple(round(each, 2) for each in os.getloadavg())
        self._cpus = len(os.sched_getaffinity(0))
        self._backend, self._tensorrt, self._gpu = (
            backend.name,
            f"{backend.flavour} {engine.runtime.version}",
            device.name,
        )

    @staticmethod
    def _is_mock(backend: str) -> bool:
        return "mock" in backend

    def _warnings(self, state: GpuState | None) -> list[str]:
        found = list(self.watch.warnings)
        if self.mock:
            found.insert(0, "measured on the mock backend: these figures say nothing about the speed of a GPU")
        elif self.watch.missing:
            found.append(self.watch.missing)
        if self._load[0] > _BUSY * self._cpus:
            found.append(
                f"other work on this machine: load average {self._load[0]:g} on {self._cpus} CPUs before the run"
            )
        governor = _read(_GOVERNORS)
        if governor and governor != "performance":
            found.append(
                f"the CPU's clock is scaled (governor {governor!r}); set it to 'performance' for steady figures"
            )
        if state is not None:
            if state.throttled:
                found.append(f"the GPU throttled during the run: {', '.join(state.throttled)}")
            low, high = state.sm_clock_mhz
            if low < 0.9 * high:
                found.append(
                    f"the GPU's clock went between {low} and {high} MHz; lock it: nvidia-smi --lock-gpu-clocks"
                )
        return found

    def environment(self) -> Environment:
        """As of now."""
        state = self.watch.state()
        return Environment(
            date=self._date,
            command_line=shlex.join([os.path.basename(sys.executable or "python"), *sys.argv]),
            python=f"{platform.python_implementation()} {platform.python_version()}",
            platform=platform.platform(),
            cpu=_cpu(),
            cpus=self._cpus,
            load_average=self._load,
            versions={name: version for name in _PACKAGES if (version := _version(name)) is not None},
            backend=self._backend,
            tensorrt=self._tensorrt,
            gpu=self._gpu,
            driver=self._driver,
            event_loop=self._event_loop,
            gpu_state=state,
            warnings=tuple(self._warnings(state)),
        )


_N = TypeVar("_N", int, float)


def _most(values: Iterable[_N | None]) -> _N | None:
    return max((value for value in values if value is not None), default=None)


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> str:
    """Empty where this system has no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _cpu() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
