"""Whole benchmarks on the mock: what is measured, what is refused, what is said to be absent, what is kept."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import trtx_py as trtx
from mock_backend import MockBackend, fail
from tests.unit.ownership import WEIGHTS, exclusive_plan, matmul_model, shared_plan
from trtx_py.benchmark import (
    BenchmarkResult,
    BenchmarkSpec,
    ClosedLoop,
    Contender,
    ContenderError,
    OpenLoop,
    Progress,
    WarmUp,
    WrongOutputError,
    baselines,
    batch_sweep,
    batcher_against_direct,
    graphs_on_off,
    lanes_sweep,
    load_result,
    precision_comparison,
    run,
)
from trtx_py.benchmark._bare import BareLane

#: Over after two windows, however much they differ: how many requests there are does not depend on their times.
QUICK: dict[str, Any] = {
    "rounds": 2, "requests": 6, "settle": 1, "warmup": WarmUp(window=2, windows=2, agreement=1e9, time_limit_s=60.0),
}  # fmt: skip
Arrays = Mapping[str, Any]


def spec(backend: MockBackend, *contenders: Contender, source: Any = None, **options: Any) -> BenchmarkSpec:
    model = matmul_model() if source is None else source
    return BenchmarkSpec(model, contenders, backend=backend, **{**QUICK, **options})


def mine(call: Callable[..., Any], name: str = "mine", **options: Any) -> Contender:
    return Contender(name, "call", call=call, **options)


async def right(inputs: Arrays) -> Arrays:
    return {"y": inputs["x"] @ WEIGHTS}


ENGINE = Contender("engine")


async def test_every_kind_that_is_here_is_measured(mock_backend: MockBackend) -> None:
    kinds: list[Any] = ["engine", "slot", "batcher", "sync", "bare", "to_thread", "onnxruntime"]
    result = await run(spec(mock_backend, *(Contender(kind, kind) for kind in kinds), mine(right, "call")))
    assert [each.status for each in result.contenders] == ["measured"] * 8, result.text()
    for each in result.contenders:
        assert each.measurement is not None
        assert (each.measurement.rounds, each.measurement.requests) == (2, 12)
        assert each.measurement.p50_us.value > 0
        assert each.measurement.rows_per_s.value > 0
        assert each.checked >= 8 + 8 + 2 * 2  # before, after, and in each round
        assert each.max_error is not None
        assert each.max_error < 1e-5
        assert each.warmup is not None
        assert each.warmup.stable
    assert result.contenders[0].ratio is None
    assert all(each.ratio is not None and each.ratio.versus == "engine" for each in result.contenders[1:])
    assert result.complete
    assert not result.meaningful
    assert any("mock" in warning for warning in result.environment.warnings)
    assert any("2 rounds are too few" in warning for warning in result.environment.warnings)
    assert result.environment.backend == "mock"
    assert result.environment.gpu_state is None
    assert result.environment.event_loop == "asyncio"
    engine = result.contender("engine")
    assert engine.device_bytes
    assert engine.pinned_bytes
    assert engine.graph_hits
    assert result.contender("call").device_bytes is None
    with pytest.raises(KeyError):
        result.contender("nobody")


async def test_what_is_absent_says_why(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = await run(spec(mock_backend, ENGINE, *baselines(), rounds=1))
    absent = {each.name: each.reason for each in result.contenders if each.status == "not available"}
    assert set(absent) == {"ONNX Runtime CUDA", "PyTorch"}
    assert "CUDAExecutionProvider" in absent["ONNX Runtime CUDA"]
    assert "torch is not installed" in absent["PyTorch"]
    assert "PyTorch: not available: torch is not installed" in result.text()


async def test_sets_of_contenders(mock_backend: MockBackend) -> None:
    contenders = (
        *batch_sweep((1, 4)), *graphs_on_off(batch=2), *lanes_sweep((1, 2)),
        *batcher_against_direct(clients=4, max_batch_size=4), *precision_comparison((None, "fp16")),
    )  # fmt: skip
    result = await run(spec(mock_backend, *contenders, rounds=1))
    assert {each.status for each in result.contenders} == {"measured"}, result.text()
    versus = {each.name: each.ratio.versus for each in result.contenders if each.ratio is not None}
    assert versus == {
        "engine b4": "engine b1", "graphs on b2": "graphs off b2", "lanes 2 b1": "lanes 1 b1", "batcher": "direct",
        "as is b1": "engine b1", "fp16 b1": "as is b1",
    }  # fmt: skip
    half = result.contender("fp16 b1")
    (accuracy,) = half.accuracy
    assert (accuracy.output, half.precision, half.tolerance) == ("y", "fp16", 0.03)
    assert 0 < accuracy.relative < 0.01
    assert result.contender("graphs off b2").graph_hits == 0
    assert result.contender("graphs on b2").graph_hits
    assert result.contender("lanes 2 b1").options == {"lanes": "2"}
    assert result.contender("lanes 2 b1").load == "closed, 4 clients"
    direct = result.contender("direct").measurement
    assert direct is not None
    assert direct.requests == 16  # 4 for each client, and not 6 in all
    assert result.contender("batcher").options["max_batch_size"] == "4"


async def test_open_loop(mock_backend: MockBackend) -> None:
    kinds: list[Any] = ["engine", "batcher", "bare", "to_thread"]
    contenders = [Contender(kind, kind) for kind in kinds]
    result = await run(spec(mock_backend, *contenders, load=OpenLoop(2000.0), rounds=1))
    for each in result.contenders:
        assert each.measurement is not None, result.text()
        assert each.measurement.late_p99_us is not None
        assert each.measurement.late_p99_us >= 0
        assert each.load == "open, 2000/s"


async def test_batches_beyond_the_default_get_a_profile(mock_backend: MockBackend) -> None:
    result = await run(spec(mock_backend, *batch_sweep((1, 48)), rounds=1))
    assert result.contender("engine b48").status == "measured"


async def test_a_plan_is_compared_with_a_bare_loop(mock_backend: MockBackend) -> None:
    contenders = (ENGINE, Contender("bare", "bare"), Contender("ort", "onnxruntime"))
    for plan in (shared_plan(), exclusive_plan()):
        result = await run(spec(mock_backend, *contenders, source=plan, rounds=1))
        assert [each.status for each in result.contenders] == ["measured", "measured", "not available"]
        assert "bare loop" in result.reference
        assert "give reference='model.onnx'" in result.contender("ort").reason


async def test_several_bare_loops_on_a_plan_for_one_are_not_available(mock_backend: MockBackend) -> None:
    bare = Contender("bare", "bare", load=ClosedLoop(2))
    result = await run(spec(mock_backend, ENGINE, bare, source=exclusive_plan(), rounds=1))
    assert result.contender("bare").status == "not available"
    assert "no execution context is left" in result.contender("bare").reason


async def test_two_plans_of_one_model(mock_backend: MockBackend, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(matmul_model())
    other = Contender("other", source=exclusive_plan(), versus="engine", options={"lanes": 1})
    options: dict[str, Any] = {"source": shared_plan(), "reference": tmp_path / "model.onnx", "rounds": 1}
    result = await run(spec(mock_backend, ENGINE, other, Contender("bare", "bare", source=exclusive_plan()), **options))
    assert [each.status for each in result.contenders] == ["measured"] * 3
    assert result.contender("other").ratio is not None
    assert [each.output for each in result.contender("other").accuracy] == ["y"]
    assert result.contender("bare").accuracy[0].relative < 1e-5
    with pytest.raises(trtx.InvalidArgumentError, match="source is for an engine"):
        Contender("ort", "onnxruntime", source=shared_plan())
    with pytest.raises(trtx.InvalidArgumentError, match="cannot be read"):
        await run(spec(mock_backend, ENGINE, Contender("other", source=tmp_path / "none.engine"), **options))


async def test_references_of_the_callers(mock_backend: MockBackend, tmp_path: Path) -> None:
    rows = np.random.default_rng(1).standard_normal((9, 4)).astype(np.float32)
    (tmp_path / "model.onnx").write_bytes(matmul_model())
    np.savez(tmp_path / "outputs.npz", y=rows @ WEIGHTS)
    np.savez(tmp_path / "inputs.npz", x=rows)
    np.savez(tmp_path / "short.npz", y=(rows @ WEIGHTS)[:2])
    plan = shared_plan()
    ort = Contender("ort", "onnxruntime")
    by_model = await run(spec(mock_backend, ENGINE, ort, source=plan, reference=tmp_path / "model.onnx", rounds=1))
    assert [each.status for each in by_model.contenders] == ["measured"] * 2
    files: dict[str, Any] = {"source": plan, "inputs": tmp_path / "inputs.npz", "rounds": 1}
    by_file = await run(spec(mock_backend, ENGINE, **files, reference=tmp_path / "outputs.npz"))
    assert by_file.reference == "the file outputs.npz"
    with pytest.raises(trtx.InvalidArgumentError, match="fewer samples"):
        await run(spec(mock_backend, ENGINE, **files, reference=tmp_path / "short.npz"))
    with pytest.raises(trtx.InvalidArgumentError, match="give them as inputs="):
        await run(spec(mock_backend, ENGINE, source=plan, reference=tmp_path / "outputs.npz"))


# ---- what is refused ----


async def wrong(inputs: Arrays) -> Arrays:
    return {"y": 1.1 * (inputs["x"] @ WEIGHTS)}


class Stale:
    """Hands out what it computed before, as an empty graph over unchanged buffers does."""

    def __init__(self, fresh: int) -> None:
        self.fresh, self.last = fresh, None

    async def __call__(self, inputs: Arrays) -> Arrays:
        self.fresh -= 1
        if self.last is None or self.fresh >= 0:
            self.last = inputs["x"] @ WEIGHTS
        return {"y": self.last}


class Remembers:
    """Right for inputs that it has seen often; a benchmark that never changes them would believe it."""

    def __init__(self) -> None:
        self.known: dict[bytes, Any] = {}

    async def __call__(self, inputs: Arrays) -> Arrays:
        key = inputs["x"].tobytes()
        if len(self.known) < 4:
            self.known[key] = inputs["x"] @ WEIGHTS
        return {"y": self.known.get(key, np.zeros((1, 3), np.float32))}


@pytest.mark.parametrize(
    ("call", "problem"),
    [(wrong, "wrong"), (Stale(0), "stale"), (Stale(3), "stale"), (Stale(17), "stale"), (Remembers(), "wrong")],
)
async def test_wrong_and_stale_contenders_are_refused(
    call: Callable[..., Any], problem: str, mock_backend: MockBackend, tmp_path: Path
) -> None:
    with pytest.raises(WrongOutputError, match="contender 'mine' is not reported: output 'y'") as caught:
        await run(spec(mock_backend, ENGINE, mine(call)), save_to=tmp_path / "result.json")
    assert (caught.value.contender, caught.value.output, caught.value.problem) == ("mine", "y", problem)
    assert caught.value.max_error > caught.value.tolerance
    assert not (tmp_path / "result.json").exists()


async def test_a_mock_that_computes_nothing_is_refused(mock_backend_factory: Callable[..., MockBackend]) -> None:
    with pytest.raises(WrongOutputError) as caught:
        await run(spec(mock_backend_factory(compute=False), ENGINE))
    assert caught.value.contender == "engine"


async def test_the_others_are_reported_where_that_is_asked_for(mock_backend: MockBackend) -> None:
    contenders = (mine(wrong), mine(Stale(17), "late"), ENGINE)
    result = await run(spec(mock_backend, *contenders, on_wrong_output="exclude"))
    assert [each.status for each in result.contenders] == ["refused", "refused", "measured"]
    assert result.contender("late").measurement is None
    assert "those of other inputs" in result.contender("late").reason
    assert "mine: refused" in result.text()
    assert result.contender("engine").ratio is None


class Breaks:
    """Right for so many requests, and then it raises."""

    def __init__(self, after: int) -> None:
        self.left = after

    async def __call__(self, inputs: Arrays) -> Arrays:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("it is worn out")
        return await right(inputs)


@pytest.mark.parametrize(
    ("after", "stage"), [(0, "verified"), (10, "warmed up"), (19, "measured"), (32, "verified again")]
)
async def test_a_contender_that_raises_is_named(
    after: int, stage: str, mock_backend: MockBackend, tmp_path: Path
) -> None:
    def contenders() -> tuple[Contender, ...]:
        return ENGINE, mine(Breaks(after))

    with pytest.raises(ContenderError) as caught:
        await run(spec(mock_backend, *contenders()), save_to=tmp_path / "result.json")
    assert (caught.value.contender, caught.value.stage) == ("mine", stage)
    assert str(caught.value) == f"contender 'mine' failed when it was {stage}: RuntimeError: it is worn out"
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert (tmp_path / "result.json").exists() == (stage == "verified again")
    # Left out, it costs the others nothing.
    result = await run(spec(mock_backend, *contenders(), on_wrong_output="exclude"))
    assert [each.status for each in result.contenders] == ["measured", "failed"]
    assert result.contender("mine").reason == str(caught.value)
    assert result.contender("mine").measurement is None
    assert result.complete
    assert "mine: failed: contender 'mine' failed when it was" in result.text()


async def test_a_contender_that_cannot_be_opened_is_named(mock_backend: MockBackend) -> None:
    broken = Contender("small", options={"max_device_bytes": 1})
    with pytest.raises(
        ContenderError, match="contender 'small' failed when it was opened: MemoryBudgetError"
    ) as caught:
        await run(spec(mock_backend, ENGINE, broken))
    assert isinstance(caught.value.__cause__, trtx.MemoryBudgetError)
    result = await run(spec(mock_backend, ENGINE, broken, on_wrong_output="exclude"))
    assert [each.status for each in result.contenders] == ["measured", "failed"]


async def test_bare_loops_are_verified_with_their_outputs_overwritten_and_timed_without(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    overwrite = BareLane._poison

    def poison(lane: BareLane) -> None:
        seen.append("overwritten")
        overwrite(lane)

    def told(progress: Progress) -> None:
        seen.append(progress.stage)

    monkeypatch.setattr(BareLane, "_poison", poison)
    await run(spec(mock_backend, Contender("bare", "bare"), rounds=1), on_progress=told)
    stages = [stage for number, stage in enumerate(seen) if number == 0 or seen[number - 1] != stage]
    assert stages == ["open", "verify", "overwritten", "warm up", "measure", "verify again", "overwritten"]
    assert seen.count("overwritten") == 16


async def test_a_tolerance_lets_pass_what_it_says(mock_backend: MockBackend) -> None:
    result = await run(spec(mock_backend, mine(wrong, tolerance=0.2), rounds=1))
    assert result.contender("mine").max_error == pytest.approx(0.1, rel=1e-3)


async def test_a_model_whose_outputs_do_not_depend_on_inputs_is_refused(mock_backend: MockBackend) -> None:
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "zero"], ["y"])], "constant",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [onnx.numpy_helper.from_array(np.zeros((1, 4), np.float32), "zero")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(trtx.InvalidArgumentError, match="stale outputs could not be told"):
        await run(spec(mock_backend, ENGINE, source=model.SerializeToString()))


# ---- what is kept ----


def in_round(number: int, task: list[asyncio.Task[Any]]) -> Callable[[Progress], None]:
    """Cancels the task when that round begins, as ctrl-C does."""

    def told(progress: Progress) -> None:
        if progress.stage == "measure" and progress.done >= number * 2:
            task[0].cancel()

    return told


async def test_a_cancelled_run_keeps_its_complete_rounds(mock_backend: MockBackend, tmp_path: Path) -> None:
    path, task = tmp_path / "result.json", list[asyncio.Task[BenchmarkResult]]()
    work = run(spec(mock_backend, ENGINE, mine(right), rounds=50), save_to=path, on_progress=in_round(3, task))
    task.append(asyncio.create_task(work))
    with pytest.raises(asyncio.CancelledError):
        await task[0]
    result = load_result(path)
    assert not result.complete
    assert result.rounds == 3
    assert "interrupted after 3 of 50 rounds (CancelledError)" in result.reason
    assert [each.measurement.rounds for each in result.contenders if each.measurement] == [3, 3]
    assert "NOT COMPLETE" in result.text()


async def test_a_run_cancelled_before_the_first_round_leaves_no_file(mock_backend: MockBackend, tmp_path: Path) -> None:
    path, task = tmp_path / "result.json", list[asyncio.Task[BenchmarkResult]]()
    path.write_text("of an earlier run")
    work = run(spec(mock_backend, ENGINE, mine(right)), save_to=path, on_progress=in_round(0, task))
    task.append(asyncio.create_task(work))
    with pytest.raises(asyncio.CancelledError):
        await task[0]
    assert path.read_text() == "of an earlier run"


async def test_a_failing_run_keeps_its_complete_rounds(mock_backend: MockBackend, tmp_path: Path) -> None:
    count = 0

    async def breaks(inputs: Arrays) -> Arrays:
        nonlocal count
        count += 1
        if count > 24:
            raise trtx.ExecutionError("the GPU is gone")
        return await right(inputs)

    with pytest.raises(ContenderError, match="gone") as caught:
        await run(spec(mock_backend, ENGINE, mine(breaks), rounds=50), save_to=tmp_path / "result.json")
    assert isinstance(caught.value.__cause__, trtx.ExecutionError)
    assert caught.value.stage == "measured"
    result = load_result(tmp_path / "result.json")
    assert not result.complete
    assert "the GPU is gone" in result.reason


async def test_an_engine_that_fails_is_an_error(mock_backend: MockBackend) -> None:
    mock_backend.inject(fail("deserialize"))
    with pytest.raises(trtx.TrtxError):
        await run(spec(mock_backend, ENGINE))


async def test_a_time_limit_ends_it_after_a_round(mock_backend: MockBackend, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = await run(spec(mock_backend, ENGINE, rounds=1000, time_limit_s=1e-6), save_to=path)
    assert result.rounds == 1
    assert not result.complete
    assert "time limit" in result.reason
    assert load_result(path) == result


async def test_where_the_result_goes_is_looked_at_first(mock_backend: MockBackend, tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "folder.json", tmp_path, "", "a\0b"):
        with pytest.raises(trtx.InvalidArgumentError):
            await run(spec(mock_backend, ENGINE), save_to=path)
    assert mock_backend.calls["deserialize"] == 0


# ---- what is asked for ----


@pytest.mark.parametrize(
    "options",
    [{"rounds": 0}, {"requests": 0}, {"settle": -1}, {"input_sets": 1}, {"checks_per_round": 0}, {"seed": -1},
     {"confidence": 2}, {"tolerance": 0}, {"time_limit_s": 0}, {"load": 5}, {"warmup": 5}, {"on_wrong_output": "ask"},
     {"contenders": (ENGINE, ENGINE)}, {"contenders": ("engine",)}, {"contenders": ENGINE}, {"baseline": "nobody"},
     {"contenders": (Contender("a", versus="nobody"),)}],
)  # fmt: skip
def test_specs_that_cannot_be(options: Any) -> None:
    with pytest.raises(trtx.InvalidArgumentError):
        BenchmarkSpec(b"model", **options)


@pytest.mark.parametrize(
    "options",
    [{"name": ""}, {"name": 5}, {"kind": "magic"}, {"batch": 0}, {"load": "all"}, {"tolerance": -1}, {"kind": "call"},
     {"call": right}, {"kind": "call", "call": 5}, {"module": object()}, {"batcher": {"max_queue": 5}},
     {"kind": "onnxruntime", "precision": "fp16"}, {"kind": "torch", "options": {"lanes": 2}}],
)  # fmt: skip
def test_contenders_that_cannot_be(options: Any) -> None:
    with pytest.raises(trtx.InvalidArgumentError):
        Contender(**{"name": "a", **options})


@pytest.mark.parametrize("make", [
    lambda: batch_sweep(()), lambda: batch_sweep((0,)), lambda: lanes_sweep(()), lambda: precision_comparison(()),
])  # fmt: skip
def test_sets_of_contenders_that_cannot_be(make: Callable[[], Any]) -> None:
    with pytest.raises(trtx.InvalidArgumentError):
        make()


def test_the_default_is_the_engine_and_all_baselines() -> None:
    kinds = [contender.kind for contender in BenchmarkSpec(b"model").contenders]
    assert kinds == ["engine", "bare", "sync", "to_thread", "onnxruntime", "onnxruntime_cuda", "torch"]
    halves = baselines(batch=8, precision="fp16", options={"lanes": 2}, suffix=" b8")
    assert [contender.precision for contender in halves] == ["fp16"] * 3 + [None] * 3
    assert halves[0] == Contender("bare loop b8", "bare", 8, "fp16", {"lanes": 2})


async def test_run_takes_a_spec() -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="expected a BenchmarkSpec"):
        await run("model.onnx")  # type: ignore[arg-type]


async def test_options_that_an_engine_has_not_are_named(mock_backend: MockBackend) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="lains"):
        await run(spec(mock_backend, Contender("engine", options={"lains": 2})))


def test_importing_the_package_does_not_import_the_benchmark() -> None:
    code = "import sys, trtx_py; print([n for n in sys.modules if n.startswith('trtx_py.benchmark')])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
