"""Layer times at the seam: TensorRT's IProfiler over stand-ins, the mock's, and the process that tries another."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import trtx_py as trtx
from mock_backend import MockBackend
from mock_backend._engine import MockEngine
from mock_backend._layer_times import LayerTimes
from tests.unit.backends.test_tensorrt_contexts import Rig, bind
from tests.unit.serving import affine_plan, build, make_model, rows, serving
from trtx_py._errors import EngineError, ExecutionError
from trtx_py.backends._flavours import untried_profiler
from trtx_py.profiling import _probe, profile
from trtx_py.profiling._passes import Layers, OwnContext, Run

F32 = TensorProto.FLOAT
X = {"x": rows(2)}


class Told:
    """A profiler that remembers."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.layers: list[tuple[str, float]] = []
        self._error = error

    def report_layer_time(self, layer: str, ms: float) -> None:
        self.layers.append((layer, ms))
        if self._error is not None:
            raise self._error


# TensorRT's


def rig_with_profiler(*, told: bool = True, has: bool = True) -> tuple[Rig, Any]:
    """A context of TensorRT 10 whose vendor reports two layers when it is asked to."""
    rig = Rig("tensorrt", "10.16.0.72")
    base = type(rig.native)

    class Context(base):  # type: ignore[misc,valid-type]
        profiler: Any = None
        enqueue_emits_profile = True

        def report_to_profiler(self) -> bool:
            assert self.profiler is not None
            if told:
                self.profiler.report_layer_time("conv", 0.25)
                self.profiler.report_layer_time("relu", 0.5)
            return told

    if has:
        rig.vendor.IProfiler = type("IProfiler", (), {"__init__": lambda self: None})  # type: ignore[attr-defined]
        rig.vendor.next_context = Context()
        rig.vendor.next_context.vendor = rig.vendor
    context = rig.open().create_context()
    bind(context)
    return rig, context


def test_tensorrt_reports_when_it_is_asked() -> None:
    rig, context = rig_with_profiler()
    told = Told()
    context.set_profiler(told)
    assert rig.native.enqueue_emits_profile is False
    context.execute_async_v3(1)
    assert told.layers == []
    context.report_to_profiler()
    assert told.layers == [("conv", 0.25), ("relu", 0.5)]
    context.set_profiler(None)
    assert rig.native.profiler is None
    with pytest.raises(EngineError, match="no profiler; set one"):
        context.report_to_profiler()


def test_what_a_profiler_raises_comes_out_afterwards() -> None:
    _, context = rig_with_profiler()
    told = Told(KeyError("mine"))
    context.set_profiler(told)
    context.execute_async_v3(1)
    with pytest.raises(KeyError, match="mine"):
        context.report_to_profiler()
    assert len(told.layers) == 2
    told._error = None
    context.report_to_profiler()


def test_tensorrt_that_tells_nothing() -> None:
    _, context = rig_with_profiler(told=False)
    context.set_profiler(Told())
    with pytest.raises(EngineError, match="told no layer times: enqueue once, not captured"):
        context.report_to_profiler()


def test_a_version_without_a_profiler_is_refused_by_name() -> None:
    _, context = rig_with_profiler(has=False)
    with pytest.raises(EngineError, match=r"10\.16\.0\.72 has no IProfiler that reports when it is asked"):
        context.set_profiler(Told())


def test_the_real_bindings_have_what_is_used() -> None:
    """tensorrt_rtx's, which are here: names and kinds of the members, since there is no GPU to run them on."""
    rtx: Any = pytest.importorskip("tensorrt_rtx")
    from trtx_py.backends.tensorrt._layer_profiler import _PARTS

    assert all(hasattr(rtx.IExecutionContext, part) for part in _PARTS)
    told = []

    class Profiler(rtx.IProfiler):
        def __init__(self) -> None:
            rtx.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            told.append((layer_name, ms))

    Profiler().report_layer_time("conv", 0.5)
    assert told == [("conv", 0.5)]


def test_only_old_lean_libraries_are_in_doubt() -> None:
    assert untried_profiler("tensorrt 10.16", None) is None
    assert untried_profiler("tensorrt_dispatch 11.4", "10.16.1") is None
    doubt = untried_profiler("tensorrt_dispatch 10.16", "8.6.0")
    assert doubt == "nobody has tried an IProfiler of tensorrt_dispatch 10.16 in the lean library 8.6.0"


def test_what_was_measured_is_in_no_doubt_and_nothing_beside_it() -> None:
    assert untried_profiler("tensorrt_dispatch 10.16.1.11", "8.6.0") is None
    for runtime, lean in (
        ("tensorrt_dispatch 10.16.1.11", "8.6.1"),
        ("tensorrt_dispatch 10.16.1.12", "8.6.0"),
        ("tensorrt_dispatch 11.0.0.1", "8.6.0"),
        ("tensorrt 10.16.1.11", "8.6.0"),
        ("tensorrt_dispatch", "8.6.0"),
    ):
        assert (
            untried_profiler(runtime, lean) == f"nobody has tried an IProfiler of {runtime} in the lean library {lean}"
        )


# The mock's


async def test_the_mock_refuses_what_the_contract_forbids(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine:
        with OwnContext(engine, X) as own:
            with pytest.raises(EngineError, match="nothing to report"):
                own.report()
            layers = Layers()
            own.profiled(layers)
            with pytest.raises(EngineError, match="nothing to report"):
                own.report()
            own.run()
            own.report()
            with pytest.raises(EngineError, match="nothing to report"):
                own.report()
            driver, stream = own._driver, own._stream.handle
            with engine.runtime.device.current():
                driver.cuStreamBeginCapture(stream, 2)
            with pytest.raises(ExecutionError, match="layers cannot be timed inside a capture"):
                own._context.enqueue_v3(own._stream)
            with engine.runtime.device.current(), pytest.raises(trtx.CudaError):
                driver.cuStreamEndCapture(stream)
            own.profiled(None)
            own.run()


def _layer_times(model: bytes, **options: Any) -> tuple[list[str], list[tuple[str, float]]]:
    import onnx

    loaded = onnx.load_from_string(model)
    backend = MockBackend()
    plan = build(model, options.pop("profiles", []))

    async def tensors() -> Any:
        async with serving(backend, plan) as engine:
            return engine.io_tensors

    infos = asyncio.run(tensors())
    backend.close()
    times = LayerTimes(loaded, infos, threads=1, duration_s=0.004, real=True)
    times.run({info.name: np.ones(info.shape, info.dtype.numpy) for info in infos if info.mode.value == "input"})
    found = times.layers()
    return [name for name, _ in found], found


def test_every_node_has_a_name_of_its_own() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"], name="same"),
        helper.make_node("Neg", ["b"], ["c"], name="same"),
        helper.make_node("Abs", ["c"], ["y"], name="Relu_0"),
    ]
    names, found = _layer_times(make_model(nodes, [("x", F32, [2, 4])], [("y", F32, [2, 4])]))
    assert len(set(names)) == 5
    assert names[1] == "same"
    assert names[3:] == ["Relu_0", "between nodes"]
    assert all(ms >= 1.0 for _, ms in found[:4])


def test_nodes_inside_of_others_are_not_counted_twice() -> None:
    one = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["p"])], "p", [], [helper.make_tensor_value_info("p", F32, [4])]
    )
    two = helper.make_graph(
        [helper.make_node("Abs", ["x"], ["q"])], "q", [], [helper.make_tensor_value_info("q", F32, [4])]
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Cast", ["m"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], then_branch=one, else_branch=two),
    ]
    names, _ = _layer_times(make_model(nodes, [("x", F32, [4])], [("y", F32, [4])]))
    assert names == ["ReduceMax_0", "Cast_1", "If_2", "between nodes"]


def test_the_reference_evaluator_is_timed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Neg", ["a"], ["y"])]
    names, found = _layer_times(make_model(nodes, [("x", F32, [2, 4])], [("y", F32, [2, 4])]))
    assert names == ["Relu_0", "Neg_1", "between nodes"]
    assert all(ms > 2.0 for _, ms in found[:2])


@pytest.mark.parametrize("left", [0, 40, None])
def test_times_that_did_not_reach_the_disk(left: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime says nothing of a full disk; None: the file is not there at all."""
    onnxruntime = pytest.importorskip("onnxruntime")
    whole = onnxruntime.InferenceSession.end_profiling

    def end_profiling(session: Any) -> str:
        file = Path(whole(session))
        if left is None:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:left])
        return str(file)

    monkeypatch.setattr(onnxruntime.InferenceSession, "end_profiling", end_profiling)
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    with pytest.raises(trtx.ExecutionError, match=r"times of layers, in .* are not whole .*is that disk full"):
        _layer_times(make_model(nodes, [("x", F32, [2, 4])], [("y", F32, [2, 4])]))


def test_layers_of_one_name_are_kept_apart() -> None:
    layers = Layers()
    for _ in range(2):
        layers.next_run()
        for ms in (1.0, 3.0):
            layers.report_layer_time("copy", ms)
    found = layers.times([Run(1.0, 0.0, 3000.0, 0.0, 2.0, True), Run(1.0, 0.0, 5000.0, 0.0, 2.0, False)])
    assert [(each.name, each.mean_us, each.share) for each in found.layers] == [
        ("copy", 1000.0, 0.25), ("copy (2)", 3000.0, 0.75)
    ]  # fmt: skip
    assert (found.sum_us, found.gpu_us, found.ratio, found.runs, found.ahead) == (4000.0, 4000.0, 1.0, 2, 1)


# What is tried in a process of its own


@pytest.fixture
def doubtful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MockEngine, "untried_profiler", property(lambda self: "nobody has tried it"))
    monkeypatch.setattr(_probe, "_found", {})


async def _layers_of(backend: MockBackend, plan: trtx.Plan | None) -> str | None:
    async with serving(backend) as engine:
        made = await profile(engine, X, requests=2, warmup=0, stages=False, runs=2, plan=plan)
    assert (made.layers.unavailable is None) == bool(made.layers.layers)
    return made.layers.unavailable


@pytest.mark.usefixtures("doubtful")
async def test_without_a_plan_a_doubtful_profiler_is_not_set(mock_backend: MockBackend) -> None:
    told = await _layers_of(mock_backend, None)
    assert told == "nobody has tried it; pass plan= and it is tried in a process of its own first"
    assert mock_backend.calls["set_profiler"] == 0


@pytest.mark.usefixtures("doubtful")
async def test_a_doubtful_profiler_is_tried_once(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(MockEngine, "untried_profiler")  # of this process; the other one has the mock as it is
    monkeypatch.setattr(MockEngine, "untried_profiler", "nobody has tried it", raising=False)
    assert await _layers_of(mock_backend, affine_plan()) is None
    assert len(_probe._found) == 1
    monkeypatch.setattr(_probe, "probe_command", lambda: ["false"])
    assert await _layers_of(mock_backend, None) is None


@pytest.mark.usefixtures("doubtful")
@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.abort()", "died of SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV"),
        ("import sys; sys.exit('no such thing')", "failed with status 1: no such thing"),
    ],
)
async def test_a_profiler_that_ends_the_process_ends_another_one(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    monkeypatch.setattr(_probe, "probe_command", lambda: [sys.executable, "-c", code])
    told = await _layers_of(mock_backend, affine_plan())
    assert told is not None
    assert told.startswith("IProfiler through mock 1.0.0.0, plans of 1.0.0.0: a process that tried it ")
    assert words in told
    assert mock_backend.calls["set_profiler"] == 0


@pytest.mark.usefixtures("doubtful")
async def test_a_process_that_hangs_is_given_up(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_probe, "probe_command", lambda: ["sleep", "1000"])
    monkeypatch.setattr(_probe, "_TIMEOUT_S", 0.2)
    told = await _layers_of(mock_backend, affine_plan())
    assert told is not None
    assert "did not end within" in told


@pytest.mark.usefixtures("doubtful")
async def test_cancelled_while_it_is_tried(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_probe, "probe_command", lambda: ["sleep", "1000"])
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(_layers_of(mock_backend, affine_plan()), 1.0)
    assert _probe._found == {}


def test_the_probe_says_what_is_wrong() -> None:
    task = '{"backend": "mock", "plan": "/none", "inputs": "/none.npz", "names": [], "device": 0, "lean_library": null}'
    ended = subprocess.run(list(_probe.probe_command()), input=task.encode(), capture_output=True, check=False)
    assert ended.returncode == 1
