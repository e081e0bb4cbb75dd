"""What the GPU does while something runs: NVML, sampled by a thread beside it."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .._arguments import checked_timeout
from .._errors import BackendUnavailableError, InvalidArgumentError
from ._host import host_memory

if TYPE_CHECKING:
    from ..cuda._device import Device

T = TypeVar("T")

_log = logging.getLogger("trtx_py")
#: A source that takes longer hangs, as NVML may when a GPU has fallen off the bus.
_PATIENCE_S = 5.0
#: Nothing that a GPU tells is larger; bytes of device memory are the most.
_LARGEST = 1e18

#: Why clocks are lower than they could be, by the bits of NVML's mask. Idle clocks and clocks that somebody set are no
#: throttling, but a reader wants to know of the second. Source: nvmlClocksEventReasons*
_REASONS: dict[int, str] = {
    0x02: "clocks set by hand",
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}
_BY_HAND = "clocks set by hand"


@dataclass(frozen=True)
class DeviceSample:
    """One look; None where the GPU does not tell.

    Attributes:
        at_s: seconds since the sampler started.
        gpu_utilization: share of the last sampling period of NVML's own in which a kernel ran, 0 to 1.
        memory_utilization: likewise, in which device memory was read or written.
        memory_bytes: device memory in use, by all processes.
        power_w: watts.
        sm_clock_mhz, memory_clock_mhz: clocks.
        temperature_c: of the GPU.
        reasons: why its clocks are lower than they could be: "power cap", "thermal", ...
        host_rss: resident bytes of this process.
    """

    at_s: float
    gpu_utilization: float | None = None
    memory_utilization: float | None = None
    memory_bytes: int | None = None
    power_w: float | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    temperature_c: int | None = None
    reasons: tuple[str, ...] = ()
    host_rss: int | None = None


@dataclass(frozen=True)
class DeviceReport:
    """The samples of one run.

    Attributes:
        interval_s: seconds between two samples.
        samples: in order; the first before the run, the last after it.
        throttled: reasons for which the GPU slowed down in some sample; clocks set by hand are not among them.
        unavailable: why the GPU tells nothing, None if it does; samples then hold host memory alone.
    """

    interval_s: float
    samples: tuple[DeviceSample, ...]
    throttled: tuple[str, ...]
    unavailable: str | None

    @property
    def clocks_set_by_hand(self) -> bool:
        """Somebody locked the clocks: figures repeat better, and are not those of a GPU left alone."""
        return any(_BY_HAND in sample.reasons for sample in self.samples)

    def extremes(self, name: str) -> tuple[float, float, float] | None:
        """Least, mean and most of one field over all samples; None if no sample has it."""
        values = [float(value) for sample in self.samples if (value := getattr(sample, name)) is not None]
        return (min(values), sum(values) / len(values), max(values)) if values else None


class DeviceSource(Protocol):
    """Where samples come from; NVML, or a stand-in for it in a test. Used by one thread at a time."""

    def look(self, at_s: float) -> DeviceSample: ...
    def close(self) -> None: ...


class NvmlSource:
    """One GPU, as NVML sees it.

    Args:
        device: the GPU; NVML numbers them otherwise than CUDA, so it is found by its UUID.
    Raises:
        BackendUnavailableError: nvidia-ml-py is not installed, there is no NVML, or it does not know this GPU.
    Source: nvmlInit, nvmlDeviceGetHandleByUUID
    """

    def __init__(self, device: Device) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise BackendUnavailableError(
                "NVML's Python bindings are not installed: pip install 'trtx-py[nvml]'"
            ) from error
        driver = device._driver
        name = f"GPU-{uuid.UUID(bytes=driver.cuDeviceGetUuid(driver.cuDeviceGet(device.ordinal)))}"
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise BackendUnavailableError(f"NVML cannot be used here: {error}") from error
        try:
            self._gpu: Any = pynvml.nvmlDeviceGetHandleByUUID(name.encode())
        except pynvml.NVMLError as error:
            pynvml.nvmlShutdown()
            raise BackendUnavailableError(f"NVML does not know device {device.ordinal} ({name}): {error}") from error

    def look(self, at_s: float) -> DeviceSample:
        """Source: nvmlDeviceGetUtilizationRates, GetMemoryInfo, GetPowerUsage, GetClockInfo, GetTemperature"""
        nvml, gpu = self._nvml, self._gpu
        busy = self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(gpu))
        memory = self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(gpu))
        milliwatts = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(gpu))
        return DeviceSample(
            at_s=at_s,
            gpu_utilization=None if busy is None else busy.gpu / 100,
            memory_utilization=None if busy is None else busy.memory / 100,
            memory_bytes=None if memory is None else int(memory.used),
            power_w=None if milliwatts is None else milliwatts / 1000,
            sm_clock_mhz=self._ask(lambda: int(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM))),
            memory_clock_mhz=self._ask(lambda: int(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM))),
            temperature_c=self._ask(lambda: int(nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU))),
            reasons=self._reasons(),
        )

    def driver_version(self) -> str | None:
        """None where it is not told. Source: nvmlSystemGetDriverVersion"""
        found = self._ask(self._nvml.nvmlSystemGetDriverVersion)
        return found.decode() if isinstance(found, bytes) else found

    def other_processes(self) -> list[int]:
        """Whose compute contexts this GPU has, this process's excepted. Source: nvmlDeviceGetComputeRunningProcesses"""
        found = self._ask(lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(self._gpu))
        return [process.pid for process in found or [] if process.pid != os.getpid()]

    def max_sm_clock_mhz(self) -> int | None:
        """Source: nvmlDeviceGetMaxClockInfo"""
        return self._ask(lambda: int(self._nvml.nvmlDeviceGetMaxClockInfo(self._gpu, self._nvml.NVML_CLOCK_SM)))

    def _reasons(self) -> tuple[str, ...]:
        nvml = self._nvml
        # Renamed by NVIDIA in 2023; older bindings and drivers have the first name alone.
        ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        ask = ask or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        return reasons_of(self._ask(lambda: int(ask(self._gpu))) or 0)

    def _ask(self, question: Callable[[], T]) -> T | None:
        try:
            return question()
        except self._nvml.NVMLError:  # this GPU does not tell that: the field stays None, the others count
            return None

    def close(self) -> None:
        """Source: nvmlShutdown"""
        self._nvml.nvmlShutdown()


def reasons_of(mask: int) -> tuple[str, ...]:
    """NVML's mask of reasons for lower clocks in words; idleness is none."""
    return tuple(name for bit, name in _REASONS.items() if mask & bit)


class DeviceSampler:
    """Looks every ``interval_s`` seconds, on a thread of its own, from ``start`` to ``stop``.

    A look takes NVML up to some milliseconds, in which it holds no interpreter lock. Use it as ``with`` where blocking
    is fine; ``start`` and ``stop`` block for one look each, for seconds where the source hangs. Whatever a source does
    wrong is in the report, and ends nothing.

    Args:
        source: None where the GPU tells nothing: then host memory alone is sampled.
        interval_s: seconds, at least 0.001.
        unavailable: why there is no ``source``, for the report.
    Raises:
        InvalidArgumentError: the interval is none.
    """

    def __init__(self, source: DeviceSource | None, interval_s: float, *, unavailable: str | None = None) -> None:
        self._interval_s = checked_interval(interval_s)
        self._source = source
        self._unavailable = unavailable if source is None else None
        self._samples: list[DeviceSample] = []
        self._looked = threading.Event()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._began = 0.0

    def start(self) -> None:
        """Take the first sample, and go on beside."""
        self._began = time.perf_counter()
        self._thread = threading.Thread(target=self._run, name="trtx_py-profile", daemon=True)
        self._thread.start()
        if not self._looked.wait(_PATIENCE_S):
            self._unavailable = f"the source did not answer for {_PATIENCE_S:g} s"

    def stop(self) -> None:
        """Take the last sample, and close the source. Idempotent; also where ``start`` never was."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        if self._thread is None:
            self._close()
            return
        self._thread.join(_PATIENCE_S if self._looked.is_set() else 0.0)
        if self._thread.is_alive():  # it closes the source itself, should it ever come back
            self._unavailable = f"the source did not answer for {_PATIENCE_S:g} s"

    def __enter__(self) -> DeviceSampler:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def report(self) -> DeviceReport:
        """What was seen so far."""
        samples = tuple(self._samples)
        return DeviceReport(self._interval_s, samples, throttling(samples), self._unavailable)

    def _run(self) -> None:
        try:
            self._look()
            self._looked.set()
            while not self._stopped.wait(self._interval_s):
                self._look()
            self._look()
        finally:
            self._close()

    def _close(self) -> None:
        if self._source is None:
            return
        try:
            self._source.close()
        except Exception as error:  # likewise
            _log.warning("what was asked about the GPU cannot be closed: %s: %.200s", type(error).__name__, error)

    def _look(self) -> None:
        at_s = time.perf_counter() - self._began
        memory = host_memory()
        rss = None if memory is None else memory[0]
        if self._source is None:
            self._samples.append(DeviceSample(at_s, host_rss=rss))
            return
        try:
            sample = _checked_sample(self._source.look(at_s))
        except BaseException as error:  # whatever a source raises: a sampler must not end the run that it watches
            said = f"{type(error).__name__}: {error}"[:300]
            self._unavailable = f"the source failed after {at_s:.1f} s: {said}"
            self._samples.append(DeviceSample(at_s, host_rss=rss))
            return
        self._samples.append(_with_host(sample, rss))


_WHOLE = frozenset({"memory_bytes", "sm_clock_mhz", "memory_clock_mhz", "temperature_c", "host_rss"})


def _checked_sample(sample: object) -> DeviceSample:
    """Raises TypeError or ValueError for what no report could hold."""
    if not isinstance(sample, DeviceSample):
        raise TypeError(f"it gave a {type(sample).__name__}; expected a DeviceSample")
    reasons: object = sample.reasons
    if not isinstance(reasons, tuple) or not all(isinstance(reason, str) for reason in reasons):
        raise TypeError(f"its reasons are {reasons!r:.60}; expected a tuple of texts")
    for field in dataclasses.fields(sample):
        value = getattr(sample, field.name)
        if field.name == "reasons" or (value is None and field.name != "at_s"):
            continue
        kinds = int if field.name in _WHOLE else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not abs(value) < _LARGEST:
            raise ValueError(f"its {field.name} is {value!r:.60}; expected a finite number, whole where the field is")
    return sample


def _with_host(sample: DeviceSample, rss: int | None) -> DeviceSample:
    fields = {**vars(sample), "host_rss": rss}
    return DeviceSample(**fields)


def throttling(samples: Sequence[DeviceSample]) -> tuple[str, ...]:
    """Every reason for which the GPU slowed down by itself, in the order of NVML's bits."""
    seen = {reason for sample in samples for reason in sample.reasons} - {_BY_HAND}
    return tuple(name for name in _REASONS.values() if name in seen)


def checked_interval(value: float) -> float:
    """Seconds between two samples. Raises InvalidArgumentError."""
    seconds = checked_timeout(value, "interval_s")
    if seconds is None or seconds < 0.001:
        raise InvalidArgumentError(f"interval_s is {value!r}; expected at least 0.001 seconds, for example 0.1")
    return seconds
