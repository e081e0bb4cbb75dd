"""What the GPU does beside a run: NVML's answers, its absence, and the sampler's thread."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.nvml import FakeNvml
from tests.unit.serving import serving
from trtx_py.profiling import DeviceSample, DeviceSampler, NvmlSource, _device, profile
from trtx_py.profiling._device import reasons_of, throttling
from trtx_py.profiling._host import host_memory


class FakeSource:
    """A GPU that warms up by a degree at each look, and throttles from ``hot`` degrees on."""

    def __init__(self, hot: int = 1000, broken_after: int | None = None) -> None:
        self.looks = self.closed = 0
        self.looked = threading.Semaphore(0)
        self._hot, self._broken_after = hot, broken_after

    def look(self, at_s: float) -> DeviceSample:
        self.looks += 1
        self.looked.release()
        if self._broken_after is not None and self.looks > self._broken_after:
            raise OSError("the bus is gone")
        temperature = 59 + self.looks
        reasons = ("thermal",) if temperature >= self._hot else ()
        return DeviceSample(at_s, 0.5, 0.1, 2**30, 250.0, 1700, 2600, temperature, reasons)

    def close(self) -> None:
        assert not self.closed
        self.closed += 1


def test_sampler_looks_at_both_ends_and_between() -> None:
    source = FakeSource(hot=61)
    with DeviceSampler(source, 0.001) as sampler:
        for _ in range(4):
            assert source.looked.acquire(timeout=30)
    found = sampler.report()
    assert source.closed == 1
    assert len(found.samples) == source.looks >= 5
    times = [sample.at_s for sample in found.samples]
    assert times == sorted(times)
    assert found.throttled == ("thermal",)
    assert found.unavailable is None
    assert found.samples[0].reasons == ()
    assert found.samples[0].host_rss is not None
    extremes = found.extremes("temperature_c")
    assert extremes is not None
    assert list(extremes) == pytest.approx([60, 60 + (source.looks - 1) / 2, 59 + source.looks])
    assert found.extremes("sm_clock_mhz") == (1700, 1700, 1700)
    sampler.stop()
    assert source.closed == 1


def test_sampler_outlives_its_source() -> None:
    source = FakeSource(broken_after=2)
    with DeviceSampler(source, 0.001) as sampler:
        for _ in range(5):
            assert source.looked.acquire(timeout=30)
    found = sampler.report()
    assert found.unavailable is not None
    assert "OSError: the bus is gone" in found.unavailable
    assert found.samples[0].power_w == 250.0
    assert found.samples[-1].power_w is None
    assert source.closed == 1


def test_sampler_that_never_started_closes_its_source() -> None:
    source = FakeSource()
    sampler = DeviceSampler(source, 1.0)
    sampler.stop()
    assert (source.looks, source.closed) == (0, 1)
    assert sampler.report().samples == ()


@pytest.mark.parametrize("interval", [0, -1, None, "1", float("nan"), True])
def test_sampler_refuses_intervals(interval: Any) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="interval_s"):
        DeviceSampler(None, interval)


def test_reasons() -> None:
    assert reasons_of(0x1) == ()  # idle
    assert reasons_of(0x4 | 0x20) == ("power cap", "thermal")
    samples = [DeviceSample(0.0, reasons=reasons_of(mask)) for mask in (0x2, 0x40, 0x4)]
    assert throttling(samples) == ("power cap", "thermal (hardware)")


def test_host_memory(tmp_path: Path) -> None:
    found = host_memory()
    assert found is not None
    assert 2**20 < found[0] <= found[1]
    assert host_memory(tmp_path / "none") is None
    for text in ("", "VmRSS: 1 kB\n", "VmRSS: x kB\nVmHWM: 2 kB\n", "VmRSS:\nVmHWM:\n"):
        (tmp_path / "status").write_text(text)
        assert host_memory(tmp_path / "status") is None
    (tmp_path / "status").write_text("Name: x\nVmHWM:\t 20 kB\nVmRSS:\t 10 kB\n")
    assert host_memory(tmp_path / "status") == (10 * 1024, 20 * 1024)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


async def test_nvml_in_units(mock_backend: MockBackend, nvml: FakeNvml) -> None:
    async with serving(mock_backend) as engine:
        source = NvmlSource(engine.runtime.device)
    assert source.look(1.5) == DeviceSample(1.5, 0.75, 0.25, 2**30, 345.678, 1000, 2000, 65, ("power cap",))
    nvml.lacks = {"utilization", "power", "reasons", "memory", "clock"}
    assert source.look(2.0) == DeviceSample(2.0, temperature_c=65)
    source.close()
    assert nvml.open == 0


async def test_newer_bindings_name_the_reasons_otherwise(mock_backend: MockBackend, nvml: FakeNvml) -> None:
    nvml.nvmlDeviceGetCurrentClocksEventReasons = lambda gpu: 0x20  # type: ignore[attr-defined]
    async with serving(mock_backend) as engine:
        source = NvmlSource(engine.runtime.device)
        assert source.look(0.0).reasons == ("thermal",)
        source.close()


async def test_no_nvml_is_told_by_name(
    mock_backend: MockBackend, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(mock_backend) as engine:
        device = engine.runtime.device
        nvml.known = False
        with pytest.raises(trtx.BackendUnavailableError, match=r"does not know device 0 \(GPU-.*Not Found"):
            NvmlSource(device)
        assert nvml.open == 0

        def fails() -> None:
            raise nvml.NVMLError("Driver Not Loaded")

        monkeypatch.setattr(nvml, "nvmlInit", fails)
        with pytest.raises(trtx.BackendUnavailableError, match="NVML cannot be used here: Driver Not Loaded"):
            NvmlSource(device)
        monkeypatch.setitem(sys.modules, "pynvml", None)
        with pytest.raises(trtx.BackendUnavailableError, match=r"pip install 'trtx-py\[nvml\]'"):
            NvmlSource(device)
        made = await profile(engine, {"x": [[1, 2, 3, 4]]}, requests=2, warmup=0, stages=False, layers=False)
        assert made.device.unavailable is not None
        assert "nvml" in made.device.unavailable
        assert "Not known: NVML's Python bindings are not installed" in made.to_text()
        assert len(made.device.samples) >= 2


async def test_profile_samples_by_nvml_and_ends_it(mock_backend: MockBackend, nvml: FakeNvml) -> None:
    async with serving(mock_backend) as engine:
        made = await profile(engine, {"x": [[1, 2, 3, 4]]}, requests=5, stages=False, layers=False)
    assert made.device.throttled == ("power cap",)
    assert "GPU slowed down during the run (power cap)" in made.to_text()
    assert nvml.open == 0


class OddSource:
    """Gives ``sample``, whatever that is."""

    def __init__(self, sample: Any) -> None:
        self._sample = sample

    def look(self, at_s: float) -> DeviceSample:
        if isinstance(self._sample, BaseException):
            raise self._sample
        found: DeviceSample = self._sample
        return found

    def close(self) -> None:
        raise OSError("already gone")


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (None, "it gave a NoneType"),
        ("text", "it gave a str"),
        (DeviceSample(float("nan")), "its at_s is nan"),
        (DeviceSample(0.0, power_w=float("inf")), "its power_w is inf"),
        (DeviceSample(0.0, gpu_utilization="x"), "its gpu_utilization is 'x'"),  # type: ignore[arg-type]
        (DeviceSample(0.0, memory_bytes=10**400), "its memory_bytes is 1000"),
        (DeviceSample(0.0, sm_clock_mhz=1.5), "its sm_clock_mhz is 1.5"),  # type: ignore[arg-type]
        (DeviceSample(0.0, temperature_c=True), "its temperature_c is True"),
        (DeviceSample(0.0, reasons="abc"), "its reasons are 'abc'"),  # type: ignore[arg-type]
        (SystemExit(3), "SystemExit: 3"),
        (OSError("x" * 100_000), "OSError: xxx"),
    ],
    ids=lambda each: str(each)[:30],
)
async def test_a_source_that_gives_nonsense_ends_nothing(sample: Any, words: str, mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine:
        report = await profile(
            engine, {"x": np.zeros((2, 4), np.float32)}, requests=2, warmup=1, stages=False, layers=False,
            source=OddSource(sample),
        )  # fmt: skip
    assert report.device.unavailable is not None
    assert words in report.device.unavailable
    assert len(report.device.unavailable) < 400
    assert len(report.device.samples) >= 2
    assert type(report).from_json(report.to_json()) == report
    assert report.to_text()
    assert report.to_trace()


async def test_what_is_no_source_is_refused_by_name(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine:
        with pytest.raises(trtx.InvalidArgumentError, match=r"source is a int; expected one with look\(at_s\)"):
            await profile(engine, {"x": np.zeros((2, 4), np.float32)}, source=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("looks", [0, 1])
def test_a_source_that_hangs_is_left_alone(looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    free, seen, hanging, closed = threading.Event(), [], threading.Event(), threading.Event()

    class Hanging:
        def look(self, at_s: float) -> DeviceSample:
            seen.append(at_s)
            if len(seen) > looks:
                hanging.set()
                free.wait()
            return DeviceSample(at_s)

        def close(self) -> None:
            closed.set()

    sampler = DeviceSampler(Hanging(), 0.001)
    if looks:
        monkeypatch.setattr(_device, "_PATIENCE_S", 30)  # this look is answered
        sampler.start()
        assert hanging.wait(timeout=30)
    monkeypatch.setattr(_device, "_PATIENCE_S", 0.05)
    if not looks:
        sampler.start()
    sampler.stop()
    found = sampler.report()
    assert found.unavailable == "the source did not answer for 0.05 s"
    assert len(found.samples) == looks
    assert not closed.is_set()  # another thread is in it
    free.set()
    assert closed.wait(timeout=30)


async def test_a_short_run_says_what_nvml_averages(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine:
        report = await profile(
            engine, {"x": np.zeros((2, 4), np.float32)}, requests=2, warmup=1, stages=False, layers=False,
            source=FakeSource(),
        )  # fmt: skip
    assert "NVML averages utilization over up to a second" in report.to_text()
