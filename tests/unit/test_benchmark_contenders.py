"""The contenders one by one, with stand-ins for what is not installed here, and what is said of the machine."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.nvml import FakeNvml
from tests.unit.ownership import WEIGHTS, matmul_model, shared_plan
from trtx_py.benchmark import BenchmarkSpec, Contender, OpenLoop, WarmUp, _environment, run
from trtx_py.benchmark._bare import BareLane, BareLanes
from trtx_py.benchmark._environment import Surroundings, Watch
from trtx_py.benchmark._errors import NotAvailableError
from trtx_py.benchmark._foreign import open_onnxruntime, open_torch

X = {"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)}
SHAPES = {"x": (2, 4)}


@pytest.fixture
def model() -> onnx.ModelProto:
    return onnx.load_from_string(matmul_model())


# ---- bare loop ----


def test_a_bare_loop_computes_and_notices_what_was_not(mock_backend: MockBackend) -> None:
    with trtx.Runtime(None, mock_backend) as runtime, runtime.deserialize_sync(shared_plan()) as engine:
        lane = BareLane(engine, SHAPES)
        first = lane.run(X)
        np.testing.assert_allclose(first["y"], X["x"] @ WEIGHTS, rtol=1e-5)
        other = lane.run({"x": -X["x"]})
        assert first["y"] is not other["y"]
        np.testing.assert_allclose(first["y"], -other["y"], rtol=1e-5)
        lane._execute = lambda stream: None  # as an enqueue that fails without a word
        np.testing.assert_array_equal(lane.run(X)["y"], other["y"])  # stale
        lane.poisoning = True
        assert np.isnan(lane.run(X)["y"]).all()
        lane.close()
        lane.close()


def test_bare_loops_for_several_threads(mock_backend: MockBackend) -> None:
    with trtx.Runtime(None, mock_backend) as runtime, runtime.deserialize_sync(shared_plan()) as engine:
        lanes = BareLanes(engine, SHAPES, 2)
        lanes.poison(True)
        assert all(lane.poisoning for lane in lanes.lanes)
        np.testing.assert_allclose(lanes.run(X)["y"], X["x"] @ WEIGHTS, rtol=1e-5)
        lanes.close()
        lanes.close()


def test_a_bare_loop_that_cannot_be_made_leaves_nothing(mock_backend: MockBackend) -> None:
    with (
        trtx.Runtime(None, mock_backend) as runtime,
        runtime.deserialize_sync(shared_plan()) as engine,
        pytest.raises(trtx.ShapeError),
    ):
        BareLanes(engine, {"x": (99, 4)}, 2)
    assert trtx.live_objects() == []


# ---- ONNX Runtime ----


def test_onnxruntime(model: onnx.ModelProto) -> None:
    call = open_onnxruntime("onnxruntime", model)
    np.testing.assert_allclose(call(X)["y"], X["x"] @ WEIGHTS, rtol=1e-5)


def test_onnxruntime_that_is_not_there(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotAvailableError, match="the source is a plan"):
        open_onnxruntime("onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(NotAvailableError, match="onnxruntime is not installed"):
        open_onnxruntime("onnxruntime", model)


def test_onnxruntime_that_cannot_or_falls_back(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            if broken:
                raise RuntimeError("no such operator")

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    fake = types.SimpleNamespace(
        __version__="9", InferenceSession=Session, SessionOptions=types.SimpleNamespace,
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    broken = True
    with pytest.raises(NotAvailableError, match="cannot run this model: no such operator"):
        open_onnxruntime("onnxruntime_cuda", model)
    broken = False
    with pytest.raises(NotAvailableError, match="fell back from CUDAExecutionProvider to CPUExecutionProvider"):
        open_onnxruntime("onnxruntime_cuda", model)


# ---- PyTorch ----


class Tensor:
    """As much of a tensor as is needed."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def to(self, device: str) -> Tensor:
        assert device == "cpu"
        return self

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> Any:
        return self.array


class Module:
    """As much of an ``nn.Module`` as is needed."""

    def __init__(self, form: Callable[[Any], Any] = lambda found: found) -> None:
        self._form = form
        self.calm = False

    def eval(self) -> Module:
        self.calm = True
        return self

    def to(self, device: str) -> Module:
        return self

    def __call__(self, x: Tensor) -> Any:
        return self._form(Tensor(x.array @ WEIGHTS))


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    import contextlib

    def load(path: str) -> Module:
        if not os.path.exists(path):
            raise RuntimeError("no such file")
        return Module()

    fake = types.SimpleNamespace(
        cuda=types.SimpleNamespace(is_available=lambda: False), inference_mode=contextlib.nullcontext,
        from_numpy=Tensor, jit=types.SimpleNamespace(load=load),
        export=types.SimpleNamespace(load=lambda path: types.SimpleNamespace(module=lambda: load(path))),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", fake)
    return fake


@pytest.mark.parametrize("form", [lambda y: y, lambda y: (y,), lambda y: [y], lambda y: {"y": y}])
def test_torch_modules(form: Callable[[Any], Any], torch: Any) -> None:
    module = Module(form)
    call = open_torch(module, ["x"], ["y"])
    assert module.calm
    np.testing.assert_allclose(call(X)["y"], X["x"] @ WEIGHTS, rtol=1e-5)


def test_torch_files(torch: Any, tmp_path: Path) -> None:
    for name in ("net.pt2", "net.torchscript"):
        (tmp_path / name).write_bytes(b"")
        np.testing.assert_allclose(open_torch(tmp_path / name, ["x"], ["y"])(X)["y"], X["x"] @ WEIGHTS, rtol=1e-5)
        with pytest.raises(NotAvailableError, match=r"PyTorch cannot load .*no such file"):
            open_torch(str(tmp_path / f"no-{name}"), ["x"], ["y"])


def test_torch_modules_that_are_none(torch: Any) -> None:
    with pytest.raises(NotAvailableError, match="PyTorch cannot load ONNX models: give module="):
        open_torch(None, ["x"], ["y"])
    with pytest.raises(trtx.InvalidArgumentError, match=r"expected an nn\.Module, or a path"):
        open_torch(5, ["x"], ["y"])
    call = open_torch(Module(lambda y: (y, y)), ["x"], ["y"])
    with pytest.raises(trtx.InvalidArgumentError, match="returns 2 tensors; the model has y"):
        call(X)


async def test_a_torch_module_takes_part(torch: Any, mock_backend: MockBackend) -> None:
    spec = BenchmarkSpec(
        matmul_model(), (Contender("engine"), Contender("torch", "torch", module=Module())), backend=mock_backend,
        rounds=1, requests=4, warmup=WarmUp(window=2, windows=2, agreement=9, time_limit_s=0.2),
    )  # fmt: skip
    assert [each.status for each in (await run(spec)).contenders] == ["measured", "measured"]


# ---- the machine ----


class Nvml(FakeNvml):
    """An H200 that throttles at its second turn."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0  # the first is the one before the run
        self.lacks = {"power"}

    def nvmlDeviceGetClockInfo(self, gpu: str, kind: int) -> int:
        self.looks += kind == self.NVML_CLOCK_SM
        return 1980 if self.looks < 3 else 1200

    def nvmlDeviceGetTemperature(self, gpu: str, sensor: int) -> int:
        return 40 + self.looks

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: str) -> int:
        return 0x1 if self.looks < 3 else 0x1 | 0x4 | 0x40


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    fake = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


@pytest.fixture
def engine(mock_backend: MockBackend) -> Iterator[trtx.Engine]:
    with trtx.Runtime(None, mock_backend) as runtime, runtime.deserialize_sync(shared_plan()) as opened:
        yield opened


def test_the_gpu_is_watched(nvml: Nvml, engine: trtx.Engine) -> None:
    watch = Watch(engine.runtime.device)
    assert watch.driver == "580.1"
    assert watch.warnings == ["the GPU was 75% busy before the run; processes on it: [1]"]
    assert watch.state() is None
    watch.look()
    watch.look()
    state = watch.state()
    assert state is not None
    assert state.sm_clock_mhz == (1200, 1980)
    assert state.max_sm_clock_mhz == 1980
    assert state.temperature_c == 43
    assert state.power_w is None
    assert state.throttled == ("power cap", "thermal (hardware)")
    watch.close()
    watch.close()
    assert nvml.open == 0
    watch.look()


def test_a_gpu_that_tells_nothing(nvml: Nvml, engine: trtx.Engine) -> None:
    nvml.lacks = {"driver", "utilization", "processes", "memory", "power", "most"}
    watch = Watch(engine.runtime.device)
    watch.look()
    state = watch.state()
    assert (watch.driver, watch.warnings, watch.missing) == ("", [], "")
    assert state is not None
    assert state.max_sm_clock_mhz is None
    watch.close()


def test_without_nvml_it_says_so(monkeypatch: pytest.MonkeyPatch, engine: trtx.Engine) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    watch = Watch(engine.runtime.device)
    assert "not known: NVML's Python bindings are not installed" in watch.missing
    watch.look()
    assert watch.state() is None
    watch.close()
    assert Watch(None).missing == "the mock has no GPU"


def test_what_makes_figures_less_trustworthy_is_said(
    nvml: Nvml, engine: trtx.Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "governor").write_text("powersave\n")
    monkeypatch.setattr(_environment, "_GOVERNORS", tmp_path / "governor")
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 1.0, 1.0))
    monkeypatch.setattr(Surroundings, "_is_mock", staticmethod(lambda name: False))
    surroundings = Surroundings(engine, "uvloop")
    surroundings.watch.look()
    surroundings.watch.look()
    found = surroundings.environment()
    surroundings.watch.close()
    said = "\n".join(found.warnings)
    for words in ("75% busy", "load average 99", "governor 'powersave'",
                  "throttled during the run: power cap, thermal (hardware)",
                  "went between 1200 and 1980 MHz"):  # fmt: skip
        assert words in said
    assert (found.driver, found.event_loop) == ("580.1", "uvloop")
    assert found.versions["numpy"] == np.__version__
    assert found.cpus >= 1
    assert found.command_line


def called(backend: Any, call: Any, **changes: Any) -> BenchmarkSpec:
    contenders = (Contender("mine", "call", call=call), Contender("engine"))
    given: dict[str, Any] = dict(
        backend=backend, rounds=2, requests=4, settle=0, warmup=WarmUp(4, 2, 10.0, 0.5), accuracy=False, **changes
    )
    return BenchmarkSpec(matmul_model(), contenders, **given)


async def test_a_call_that_is_not_async_is_named(mock_backend: MockBackend) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="'mine': call gave a dict, nothing to be awaited"):
        await run(called(mock_backend, lambda inputs: {"y": inputs["x"] @ WEIGHTS}))


async def test_a_call_that_writes_into_its_inputs_harms_itself_alone(mock_backend: MockBackend) -> None:
    async def writes(inputs: Any) -> Any:
        outputs = {"y": inputs["x"] @ WEIGHTS}
        inputs["x"][...] = 0
        return outputs

    found = await run(called(mock_backend, writes, on_wrong_output="exclude"))
    assert [each.status for each in found.contenders] == ["refused", "measured"]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: Contender("a", options=5), "'a': options is 5; expected a mapping"),  # type: ignore[arg-type]
        (lambda: Contender("a", "batcher", batcher=5), "'a': batcher is 5"),  # type: ignore[arg-type]
        (lambda: BenchmarkSpec("m", shapes=5), "shapes is 5"),  # type: ignore[arg-type]
        (lambda: BenchmarkSpec("m", options=5), "options is 5"),  # type: ignore[arg-type]
        (lambda: BenchmarkSpec("m", input_ranges=4), "input_ranges is 4"),  # type: ignore[arg-type]
        (lambda: OpenLoop(1e-9), "expected 0.01 to 1e9 requests a second"),
        (lambda: OpenLoop(5e-324), "expected 0.01 to 1e9 requests a second"),
        (lambda: OpenLoop(1e300), "expected 0.01 to 1e9 requests a second"),
    ],
)
def test_specs_that_cannot_be(made: Callable[[], object], words: str) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=words):
        made()


async def test_rare_arrivals_do_not_stretch_the_warm_up(mock_backend: MockBackend) -> None:
    warmup = WarmUp(window=1000, windows=2, agreement=10.0, time_limit_s=0.2)
    contender = Contender("engine", load=OpenLoop(100.0))
    spec = BenchmarkSpec(
        matmul_model(), (contender,), backend=mock_backend, rounds=1, requests=2, settle=0, warmup=warmup
    )
    found = (await run(spec)).contenders[0].warmup
    assert found is not None
    assert found.requests <= 40
