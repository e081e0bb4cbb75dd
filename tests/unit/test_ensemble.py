"""Ensembles: what they compute, in which order, on which device, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

import anyio
import numpy as np
import pytest
from onnx import TensorProto, helper

import trtx_py as trtx
from mock_backend import MockBackend, fail, slow
from tests.unit.serving import (
    N4,
    NONZERO,
    PATIENCE_S,
    RESHAPE,
    GateClock,
    affine,
    affine_plan,
    build,
    cancel_at,
    make_model,
    nonzero_model,
    reshape_model,
    rows,
)  # fmt: skip

X = rows(3)
LOOPS = pytest.mark.parametrize("loop", ["asyncio", "trio"])


async def no_device_arrays() -> None:
    """A lane's thread may hold one for a moment longer than its request; nothing waits for the collector."""
    with anyio.fail_after(PATIENCE_S):
        while any(item.kind == "DeviceArray" for item in trtx.live_objects()):  # noqa: ASYNC110 - nothing tells when
            await anyio.sleep(0.001)


@functools.cache
def scale_plan(factor: float) -> trtx.Plan:
    """out = factor x."""
    model = make_model(
        [helper.make_node("Mul", ["x", "factor"], ["out"])],
        [("x", TensorProto.FLOAT, ["N", 4])],
        [("out", TensorProto.FLOAT, ["N", 4])],
        {"factor": np.float32(factor).reshape(1)},
    )
    return build(model, [N4])


@functools.cache
def head_plan() -> trtx.Plan:
    """label = a + b, box = a - b."""
    model = make_model(
        [helper.make_node("Add", ["a", "b"], ["label"]), helper.make_node("Sub", ["a", "b"], ["box"])],
        [(name, TensorProto.FLOAT, ["N", 4]) for name in "ab"],
        [(name, TensorProto.FLOAT, ["N", 4]) for name in ("label", "box")],
    )
    return build(model, [dict.fromkeys("ab", N4["x"])])


class Models:
    """The engines of the usual graph, all on one device."""

    def __init__(self, runtime: trtx.Runtime, **options: Any) -> None:
        self.runtime = runtime
        self.pre = runtime.deserialize_sync(affine_plan(), **options)
        self.a = runtime.deserialize_sync(scale_plan(3), **options)
        self.b = runtime.deserialize_sync(scale_plan(5), **options)
        self.head = runtime.deserialize_sync(head_plan(), **options)

    def graph(self, **outputs: Any) -> trtx.Ensemble:
        return trtx.Ensemble(
            inputs=("image",),
            outputs=outputs.get("outputs", ("label", "box")),
            steps=[
                trtx.Step(self.head, {"a": "a", "b": "b"}, {"label": "label", "box": "box"}, name="head"),
                trtx.Step(self.a, {"x": "features"}, {"out": "a"}, name="a"),
                trtx.Step(self.b, {"x": "features"}, {"out": "b"}, name="b"),
                trtx.Step(self.pre, {"x": "image"}, {"y": "features"}, name="pre"),
            ],
        )


@contextlib.asynccontextmanager
async def models(backend: MockBackend, **options: Any) -> AsyncIterator[Models]:
    async with trtx.Runtime(None, backend) as runtime:
        yield Models(runtime, **options)


def expected(x: np.ndarray) -> dict[str, np.ndarray]:
    a, b = affine(x) * np.float32(3), affine(x) * np.float32(5)
    return {"label": a + b, "box": a - b}


def check(found: Mapping[str, Any], wanted: Mapping[str, np.ndarray]) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert type(found[name]) is np.ndarray
        np.testing.assert_array_equal(found[name], array)


def function_step(function: Any, read: str, made: str, name: str = "") -> trtx.Step:
    return trtx.Step(function, {"x": read}, {"y": made}, name=name)


async def double(x: Any) -> dict[str, Any]:
    return {"y": x * 2}


def chain(*functions: Any) -> trtx.Ensemble:
    """One step after the other."""
    steps = [function_step(f, f"v{i}", f"v{i + 1}", name=f"s{i}") for i, f in enumerate(functions)]
    return trtx.Ensemble(inputs=("v0",), outputs=(f"v{len(functions)}",), steps=steps)


def fan(*functions: Any) -> trtx.Ensemble:
    """All steps beside each other, and one behind them."""

    async def join(**values: Any) -> dict[str, Any]:
        return {"y": sum(values.values())}

    steps = [function_step(f, "x", f"v{i}", name=f"s{i}") for i, f in enumerate(functions)]
    last = trtx.Step(join, {f"v{i}": f"v{i}" for i in range(len(functions))}, {"y": "y"}, name="join")
    return trtx.Ensemble(inputs=("x",), outputs=("y",), steps=[*steps, last])


def on(loop: str, main: Callable[[], Awaitable[Any]]) -> None:
    anyio.run(main, backend=loop)


# What it computes


@LOOPS
def test_values(loop: str, mock_backend: MockBackend) -> None:
    async def main() -> None:
        async with models(mock_backend) as m:
            graph = m.graph()
            assert (graph.inputs, graph.outputs) == (("image",), ("label", "box"))
            assert graph.step_names == ("head", "a", "b", "pre")
            for count in (1, 3, 8):
                check(await graph.infer({"image": rows(count)}), expected(rows(count)))
            assert "image -> head, a, b, pre -> label, box" in repr(graph)

    on(loop, main)


@LOOPS
def test_many_requests_at_once(loop: str, mock_backend: MockBackend) -> None:
    async def main() -> None:
        async with models(mock_backend) as m:
            graph = m.graph()

            async def request(seed: int) -> None:
                x = rows(1 + seed % 8, seed)
                check(await graph.infer({"image": x}), expected(x))

            async with anyio.create_task_group() as group:
                for seed in range(40):
                    group.start_soon(request, seed)
            statistics = graph.statistics()
            assert (statistics.completed, statistics.failed, statistics.cancelled, statistics.running) == (40, 0, 0, 0)
            assert statistics.completion_s.count == 40
            assert {name: taken.count for name, taken in statistics.step_s.items()} == dict.fromkeys(
                ("head", "a", "b", "pre"), 40
            )

    on(loop, main)


async def test_threads_with_loops_of_their_own(mock_backend: MockBackend) -> None:
    async with models(mock_backend) as m:
        graph = m.graph()

        async def requests() -> None:
            for seed in range(10):
                check(await graph.infer({"image": rows(2, seed)}), expected(rows(2, seed)))

        threads = [threading.Thread(target=on, args=(loop, requests)) for loop in ("asyncio", "trio", "asyncio")]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        assert graph.statistics().completed == 30


@LOOPS
def test_functions_of_all_kinds(loop: str) -> None:
    threads: list[int] = []

    def plain(x: Any) -> dict[str, Any]:
        threads.append(threading.get_ident())
        return {"y": x + 1, "unwanted": None}

    def hidden(x: Any) -> Any:
        return double(x)  # a coroutine, from an ordinary function

    class Callable_:  # noqa: N801
        async def __call__(self, x: Any) -> dict[str, Any]:
            return {"y": x + 100}

    class Served:
        async def infer(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
            return {"y": inputs["x"] + 1000}

    class Same:
        async def infer(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
            return {"y": inputs["x"], **inputs}

    async def scaled(factor: int, x: Any) -> dict[str, Any]:
        return {"y": x * factor}

    graph = chain(plain, hidden, Callable_(), Served(), Same(), functools.partial(scaled, 10))

    async def main() -> None:
        assert await graph.infer({"v0": 1}) == {"v6": 11040}

    on(loop, main)
    assert threads != [threading.get_ident()]


async def test_a_function_between_engines(mock_backend: MockBackend) -> None:
    seen: list[type] = []

    async def clip(x: Any) -> dict[str, Any]:
        seen.append(type(x))
        return {"y": np.maximum(x, np.float32(0))}

    async with models(mock_backend) as m:
        graph = trtx.Ensemble(
            inputs=("image",),
            outputs=("y", "features"),
            steps=[
                trtx.Step(m.pre, {"x": "image"}, {"y": "features"}),
                function_step(clip, "features", "clipped"),
                trtx.Step(m.a, {"x": "clipped"}, {"out": "y"}),
            ],
        )
        wanted = np.maximum(affine(X), np.float32(0)) * np.float32(3)
        check(await graph.infer({"image": X}), {"y": wanted, "features": affine(X)})
        assert seen == [np.ndarray]
        assert graph.step_names == ("small", "clip", "small-2")


async def test_an_ensemble_in_an_ensemble_and_a_batcher(mock_backend: MockBackend) -> None:
    async with models(mock_backend) as m, trtx.DynamicBatcher(m.pre, max_delay_s=0.0) as batcher:
        graph = trtx.Ensemble(
            inputs=("x",),
            outputs=("label", "box"),
            steps=[
                trtx.Step(batcher, {"x": "x"}, {"y": "doubled"}),
                trtx.Step(m.graph(), {"image": "doubled"}, {"label": "label", "box": "box"}),
            ],
        )
        check(await graph.infer({"x": X}), expected(affine(X)))
        assert graph.step_names == ("small", "Ensemble")
        with pytest.raises(
            trtx.InvalidArgumentError, match=r"step 'Ensemble' has no input 'imag' .did you mean 'image'"
        ):
            trtx.Ensemble(
                inputs=("x",), outputs=("label",), steps=[trtx.Step(m.graph(), {"imag": "x"}, {"label": "label"})]
            )
        with pytest.raises(trtx.InvalidArgumentError, match="step 'small' has no output 'z'; it has output 'y'"):
            trtx.Ensemble(inputs=("x",), outputs=("z",), steps=[trtx.Step(batcher, {"x": "x"}, {"z": "z"})])


async def test_several_devices_as_one_step(mock_backend_factory: Any) -> None:
    backend = mock_backend_factory(devices=2)
    async with await trtx.MultiDevice.open(affine_plan(), devices=[0, 1], backend=backend) as pool:
        graph = trtx.Ensemble(
            inputs=("x",),
            outputs=("z",),
            steps=[
                trtx.Step(pool, {"x": "x"}, {"y": "y"}, name="first"),
                trtx.Step(pool, {"x": "y"}, {"y": "z"}, name="second"),
            ],
        )
        check(await graph.infer({"x": X}), {"z": affine(affine(X))})
        with pytest.raises(trtx.InvalidArgumentError, match="step 'first' has no output 'yy'"):
            trtx.Ensemble(inputs=("x",), outputs=("z",), steps=[trtx.Step(pool, {"x": "x"}, {"yy": "z"}, name="first")])
    with pytest.raises(trtx.ClosedError, match="step 'first' cannot run: MultiDevice"):
        await graph.infer({"x": X})


# In parallel


@LOOPS
def test_independent_steps_run_at_the_same_time(loop: str) -> None:
    """Each waits for the other: one after the other they would never end."""

    async def main() -> None:
        events = [anyio.Event(), anyio.Event(), anyio.Event()]

        async def meet(mine: int, x: Any) -> dict[str, Any]:
            events[mine].set()
            for event in events:
                await event.wait()
            return {"y": x + mine}

        with anyio.fail_after(PATIENCE_S):
            graph = fan(*(functools.partial(meet, i) for i in range(3)))
            assert await graph.infer({"x": 1}) == {"y": 6}

    on(loop, main)


async def test_independent_engines_run_at_the_same_time(mock_backend_factory: Any) -> None:
    clock = GateClock()
    backend = mock_backend_factory(clock=clock)
    async with models(backend, cuda_graphs=False) as m:
        graph = m.graph()
        check(await graph.infer({"image": X}), expected(X))
        backend.inject(slow("execute", 1.0, nth=2, count=2))  # the second kernel and the third: both detectors
        request = asyncio.create_task(graph.infer({"image": X}))
        await clock.wait_reached()
        await clock.wait_reached()  # both are on the device now
        assert graph.statistics().running == 1
        clock.open()
        check(await request, expected(X))


@LOOPS
def test_a_step_starts_as_soon_as_its_own_inputs_are_there(loop: str) -> None:
    """The long branch of the graph goes on while the short one waits for its end."""

    async def main() -> None:
        far = anyio.Event()

        async def slow_step(x: Any) -> dict[str, Any]:
            await far.wait()
            return {"y": x}

        async def end(x: Any) -> dict[str, Any]:
            far.set()
            return {"y": x * 10}

        steps = [
            function_step(slow_step, "x", "slow"),
            function_step(double, "x", "one"),
            function_step(double, "one", "two"),
            function_step(end, "two", "end"),
        ]
        with anyio.fail_after(PATIENCE_S):
            assert await trtx.Ensemble(inputs=("x",), outputs=("slow", "end"), steps=steps).infer({"x": 1}) == {
                "slow": 1,
                "end": 40,
            }

    on(loop, main)


# On the device


class Spy:
    """What an engine is handed, and what it returns."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, dict[str, str], dict[str, str]]] = []
        for method in ("infer", "infer_on_device"):
            patch.setattr(trtx.Engine, method, self._spied(method, getattr(trtx.Engine, method)))

    def _spied(self, name: str, method: Any) -> Any:
        async def call(engine: trtx.Engine, inputs: Mapping[str, Any]) -> Any:
            taken = {key: type(value).__name__ for key, value in inputs.items()}
            found = await method(engine, inputs)
            self.calls.append((name, taken, {key: type(value).__name__ for key, value in found.items()}))
            return found

        return call


async def test_values_between_engines_stay_on_the_device(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with models(mock_backend, cuda_graphs=False) as m:
        spy = Spy(monkeypatch)
        graph = m.graph()
        check(await graph.infer({"image": X}), expected(X))
        resident = {"x": "DeviceArray"}
        assert spy.calls[0] == ("infer_on_device", {"x": "ndarray"}, {"y": "DeviceArray"})
        assert spy.calls[1:3] == [("infer_on_device", resident, {"out": "DeviceArray"})] * 2
        both = dict.fromkeys(("a", "b"), "DeviceArray")
        assert spy.calls[3:] == [("infer", both, {"label": "ndarray", "box": "ndarray"})]


async def test_only_inputs_and_outputs_cross_the_bus(mock_backend: MockBackend) -> None:
    async with models(mock_backend, cuda_graphs=False) as m:
        graph = m.graph()
        await graph.infer({"image": X})
        before = mock_backend.calls
        await graph.infer({"image": X})
        after = mock_backend.calls - before
        assert (after["cuMemcpyHtoDAsync"], after["cuMemcpyDtoHAsync"]) == (1, 2)  # image; label and box
        assert after["execute"] == 4


async def test_a_value_that_both_sides_want_is_copied_once(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[type] = []

    async def look(x: Any) -> dict[str, Any]:
        seen.append(type(x))
        return {"y": x.sum()}

    spy = Spy(monkeypatch)
    async with models(mock_backend, cuda_graphs=False) as m:
        graph = trtx.Ensemble(
            inputs=("image",),
            outputs=("features", "sum", "out"),
            steps=[
                trtx.Step(m.pre, {"x": "image"}, {"y": "features"}),
                function_step(look, "features", "sum"),
                trtx.Step(m.a, {"x": "features"}, {"out": "out"}),
            ],
        )
        found = await graph.infer({"image": X})
        np.testing.assert_array_equal(found["features"], affine(X))
        np.testing.assert_array_equal(found["out"], affine(X) * np.float32(3))
        assert found["sum"] == affine(X).sum()
        assert seen == [np.ndarray]
        assert ("infer", {"x": "DeviceArray"}, {"out": "ndarray"}) in spy.calls
        before = mock_backend.calls
        await graph.infer({"image": X})
        assert (mock_backend.calls - before)["cuMemcpyDtoHAsync"] == 2  # features and out
        assert set(graph.statistics().step_s) == {"small", "look", "small-2"}  # a copy is no step


async def test_values_are_freed_behind_their_last_reader(mock_backend: MockBackend) -> None:
    async with models(mock_backend, cuda_graphs=False) as m:
        freed: list[bool] = []

        async def look(x: Any) -> dict[str, Any]:
            if not freed:
                await no_device_arrays()
                freed.append(True)
            return {"y": x}

        steps = [
            trtx.Step(m.pre, {"x": "image"}, {"y": "one"}),
            trtx.Step(m.a, {"x": "one"}, {"out": "two"}),
            trtx.Step(m.b, {"x": "two"}, {"out": "three"}),
            function_step(look, "three", "end"),
        ]
        graph = trtx.Ensemble(inputs=("image",), outputs=("end",), steps=steps)
        await graph.infer({"image": X})
        assert freed == [True]  # before the request was over
        both = trtx.Ensemble(inputs=("image",), outputs=("end", "one"), steps=steps)
        check(
            await both.infer({"image": X}),
            {"end": affine(X) * np.float32(3) * np.float32(5), "one": affine(X)},
        )
        await no_device_arrays()


async def test_engines_on_different_devices_exchange_host_arrays(
    mock_backend_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    two = mock_backend_factory(devices=2)
    async with (
        trtx.Runtime(None, two, device=0) as here,
        trtx.Runtime(None, two, device=0) as beside,
        trtx.Runtime(None, two, device=1) as there,
        trtx.Runtime(None, mock_backend_factory()) as elsewhere,
        await here.deserialize(affine_plan()) as first,
    ):
        for runtime, kind in (
            (here, "DeviceArray"),
            (beside, "DeviceArray"),
            (there, "ndarray"),
            (elsewhere, "ndarray"),
        ):
            async with await runtime.deserialize(scale_plan(3)) as second:
                graph = trtx.Ensemble(
                    inputs=("x",),
                    outputs=("z",),
                    steps=[trtx.Step(first, {"x": "x"}, {"y": "y"}), trtx.Step(second, {"x": "y"}, {"out": "z"})],
                )
                check(await graph.infer({"x": X}), {"z": affine(X) * np.float32(3)})
            assert [taken for _, taken, _ in spy.calls] == [{"x": "ndarray"}, {"x": kind}]
            spy.calls.clear()


async def test_shape_tensors_come_from_the_host(mock_backend: MockBackend) -> None:
    """Indices of NonZero (int64) as the new shape: TensorRT reads it on the host."""
    async with trtx.Runtime(None, mock_backend) as runtime:
        model = make_model(
            [helper.make_node("Mul", ["x", "x"], ["shape"])],
            [("x", TensorProto.INT64, [2])],
            [("shape", TensorProto.INT64, [2])],
        )
        square = runtime.deserialize_sync(build(model))
        reshape = runtime.deserialize_sync(build(reshape_model(), [RESHAPE]))
        nonzero = runtime.deserialize_sync(build(nonzero_model(), [NONZERO]))
        flat = await nonzero.infer({"x": np.array([0, 1, 1], np.float32)})
        assert flat["where"].tolist() == [[1, 2]]
        graph = trtx.Ensemble(
            inputs=("roots", "x"),
            outputs=("y",),
            steps=[
                trtx.Step(square, {"x": "roots"}, {"shape": "shape"}),
                trtx.Step(reshape, {"x": "x", "shape": "shape"}, {"y": "y"}),
            ],
        )
        x = np.arange(4, dtype=np.float32)
        found = await graph.infer({"roots": np.array([2, 1], np.int64), "x": x})
        np.testing.assert_array_equal(found["y"], x.reshape(4, 1))


# Failures


@LOOPS
def test_a_failing_step_ends_the_others_and_its_error_comes_as_it_is(loop: str) -> None:
    class OddError(Exception):
        pass

    async def main() -> None:
        started, ended = anyio.Event(), []

        async def wait(x: Any) -> dict[str, Any]:
            started.set()
            try:
                await anyio.sleep_forever()
            finally:
                ended.append(True)
            raise AssertionError("not reached")

        async def break_(x: Any) -> dict[str, Any]:
            await started.wait()
            raise OddError("no")

        graph = fan(wait, break_)
        with pytest.raises(OddError, match="no") as caught:
            await graph.infer({"x": 1})
        assert caught.value.__notes__ == ["in step 's1' of an ensemble"]  # type: ignore[attr-defined,unused-ignore]
        assert ended == [True]
        statistics = graph.statistics()
        assert (statistics.completed, statistics.failed, statistics.cancelled, statistics.running) == (0, 1, 0, 0)
        assert statistics.step_s["s1"].count == 0

    on(loop, main)


@LOOPS
def test_of_several_errors_the_first_is_raised(loop: str) -> None:
    async def main() -> None:
        started = anyio.Event()

        async def break_too(x: Any) -> dict[str, Any]:
            started.set()
            try:
                await anyio.sleep_forever()
            finally:
                raise KeyError("second")

        async def break_(x: Any) -> dict[str, Any]:
            await started.wait()
            raise ValueError("first")

        with pytest.raises(ValueError, match="first"):
            await fan(break_too, break_).infer({"x": 1})

    on(loop, main)


@LOOPS
@pytest.mark.parametrize("end", [SystemExit(3), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("shape", [chain, fan])
def test_what_ends_a_program_arrives_as_it_is(shape: Any, end: BaseException, loop: str) -> None:
    def in_a_thread(x: Any) -> dict[str, Any]:
        raise end

    async def in_the_loop(x: Any) -> dict[str, Any]:
        raise end

    async def main() -> None:
        for function in (in_a_thread, in_the_loop):
            graph = shape(function, double)
            with pytest.raises(type(end)) as caught:
                await graph.infer({graph.inputs[0]: 1})
            assert caught.value is end
            assert graph.statistics().running == 0

    on(loop, main)


@LOOPS
@pytest.mark.parametrize("broken", ["s0", "s1", "s2"])
@pytest.mark.parametrize("shape", [chain, fan])
def test_a_failure_at_every_step(shape: Any, broken: str, loop: str) -> None:
    error = ValueError("no")

    async def maybe(name: str, x: Any) -> dict[str, Any]:
        if name == broken:
            raise error
        return {"y": x}

    async def main() -> None:
        graph = shape(*(functools.partial(maybe, f"s{i}") for i in range(3)))
        for count in (1, 2):  # one error may end several requests; it is noted once
            with pytest.raises(ValueError, match="no") as caught:
                await graph.infer({graph.inputs[0]: 1})
            assert caught.value is error
            assert error.__notes__ == [f"in step {broken!r} of an ensemble"]  # type: ignore[attr-defined,unused-ignore]
            assert graph.statistics().failed == count

    on(loop, main)


@pytest.mark.parametrize("nth", range(1, 5))
async def test_a_kernel_that_fails_is_a_typed_error_and_leaves_nothing(nth: int, mock_backend_factory: Any) -> None:
    backend = mock_backend_factory(faults=[fail("execute_async_v3", nth)])
    async with models(backend, cuda_graphs=False) as m:
        graph = m.graph()
        with pytest.raises(trtx.ExecutionError) as caught:
            await graph.infer({"image": X})
        (note,) = caught.value.__notes__  # type: ignore[attr-defined,unused-ignore]
        names = {1: ("pre",), 2: ("a", "b"), 3: ("a", "b"), 4: ("head",)}[nth]
        assert note in [f"in step {name!r} of an ensemble" for name in names]
        check(await graph.infer({"image": X}), expected(X))  # and it goes on
        del caught
        await no_device_arrays()


async def test_a_request_that_does_not_fit_names_the_step(mock_backend: MockBackend) -> None:
    async with models(mock_backend) as m:
        with pytest.raises(trtx.ShapeError, match="profile") as caught:
            await m.graph().infer({"image": rows(9)})
        assert caught.value.__notes__ == ["in step 'pre' of an ensemble"]  # type: ignore[attr-defined,unused-ignore]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "step 's0' returned a NoneType; expected a mapping .* with 'y'"),
        ({}, "step 's0' returned nothing; 'y' is missing"),
        ({"z": 1}, "step 's0' returned 'z'; 'y' is missing: return it, or leave it out"),
    ],
)
async def test_a_function_that_breaks_its_promise(returned: Any, message: str) -> None:
    async def function(x: Any) -> Any:
        return returned

    with pytest.raises(trtx.InvalidArgumentError, match=message):
        await chain(function).infer({"v0": 1})


async def test_inputs_that_do_not_fit(mock_backend: MockBackend) -> None:
    async with models(mock_backend) as m:
        graph = m.graph()
        for inputs, message in (
            ({}, "'image' is missing; expected a mapping of array by name: 'image'"),
            ({"image": X, "extra": X}, "there is no input 'extra'"),
            ([X], "inputs is list; expected a mapping"),
        ):
            with pytest.raises(trtx.InvalidArgumentError, match=message):
                await graph.infer(inputs)  # type: ignore[arg-type]
        assert graph.statistics().failed == 0  # never accepted


async def test_closed_engines_are_refused(mock_backend: MockBackend) -> None:
    async with models(mock_backend) as m:
        graph = m.graph()
        await m.b.aclose()
        with pytest.raises(
            trtx.ClosedError, match=r"step 'b' cannot run: Engine#\d+ 'small' is closed; it was made at"
        ):
            await graph.infer({"image": X})
        with pytest.raises(trtx.ClosedError, match="step 'b' cannot run"):
            m.graph()
        assert m.pre.statistics().completed == 0  # nothing ran


async def test_it_does_not_own_its_engines(mock_backend: MockBackend) -> None:
    async with models(mock_backend) as m:
        await m.graph().infer({"image": X})
        check(await m.pre.infer({"x": X}), {"y": affine(X)})


# Cancellation


@LOOPS
@pytest.mark.parametrize("kind", [chain, fan])
@pytest.mark.parametrize("held", range(3))
def test_cancellation_while_each_step_runs(kind: Any, held: int, loop: str) -> None:
    async def main() -> None:
        reached, ended = anyio.Event(), []

        async def step(number: int, x: Any) -> dict[str, Any]:
            if number == held:
                reached.set()
                try:
                    await anyio.sleep_forever()
                finally:
                    ended.append(number)
            return {"y": x}

        graph = kind(*(functools.partial(step, i) for i in range(3)))
        async with anyio.create_task_group() as group:
            group.start_soon(graph.infer, {graph.inputs[0]: 1})
            await reached.wait()
            assert graph.statistics().running == 1
            group.cancel_scope.cancel()
        assert ended == [held]
        statistics = graph.statistics()
        assert (statistics.completed, statistics.failed, statistics.cancelled, statistics.running) == (0, 0, 1, 0)

    on(loop, main)


async def test_cancellation_at_every_suspension_leaves_nothing(mock_backend: MockBackend) -> None:
    async with models(mock_backend) as m:
        graph = m.graph(outputs=("label", "box", "features"))
        suspension, cancelled = 1, 0
        while True:
            how, value, _ = await cancel_at(lambda: graph.infer({"image": X}), suspension)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            if how == "finished":
                break
            cancelled += 1
            suspension += 1
        check(value, {**expected(X), "features": affine(X)})
        statistics = graph.statistics()
        assert cancelled > 0
        assert (statistics.completed, statistics.cancelled, statistics.running) == (1, cancelled, 0)
        await m.head.aclose()
        await no_device_arrays()


async def test_cancellation_while_each_kernel_runs(mock_backend_factory: Any) -> None:
    """The result is dropped; the device's memory outlives the work on it."""
    for nth in range(1, 5):
        clock = GateClock()
        backend = mock_backend_factory(clock=clock, faults=[slow("execute", 1.0, nth=nth, count=1)])
        async with models(backend, cuda_graphs=False) as m:
            graph = m.graph()
            request = asyncio.create_task(graph.infer({"image": X}))
            await clock.wait_reached()
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            assert asyncio.all_tasks() == {asyncio.current_task()}
            clock.open()
            check(await graph.infer({"image": X}), expected(X))
            assert graph.statistics().cancelled == 1


async def test_a_function_in_a_thread_is_waited_for() -> None:
    entered, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work(x: Any) -> dict[str, Any]:
        entered.set()
        assert go_on.wait(PATIENCE_S)
        ended.set()
        return {"y": x}

    request = asyncio.create_task(chain(work).infer({"v0": 1}))
    await asyncio.to_thread(entered.wait, PATIENCE_S)
    request.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not request.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert ended.is_set()


async def test_a_step_that_is_cancelled_by_somebody_else_is_an_error() -> None:
    async def cancelled(x: Any) -> dict[str, Any]:
        raise asyncio.CancelledError

    graph = fan(cancelled, double)
    with pytest.raises(trtx.ExecutionError, match="a step was cancelled, and not by the caller"):
        await graph.infer({"x": 1})
    assert graph.statistics().failed == 1


# Tracing


@LOOPS
def test_around_each_step(loop: str) -> None:
    log: list[str] = []

    @contextlib.contextmanager
    def around(name: str) -> Iterator[None]:
        log.append(f"> {name}")
        try:
            yield
        finally:
            log.append(f"< {name}")

    async def main() -> None:
        await chain(double, double).infer({"v0": 1}, around=around)
        await fan(double).infer({"x": 1}, around=around)

    on(loop, main)
    assert log == ["> s0", "< s0", "> s1", "< s1", "> s0", "< s0", "> join", "< join"]


# How it is made


def refused(
    error: type[Exception], message: str, steps: list[Any], inputs: Any = ("x",), outputs: Any = ("y",)
) -> None:
    with pytest.raises(error, match=message):
        trtx.Ensemble(inputs=inputs, outputs=outputs, steps=steps)


def test_names_that_do_not_fit() -> None:
    wrong = functools.partial(refused, trtx.InvalidArgumentError)
    one = function_step(double, "x", "y", name="one")
    wrong("steps is empty", [])
    wrong("steps has a str; expected Step objects", ["one"])
    wrong("steps is None; expected a sequence of Step objects", None)  # type: ignore[arg-type]
    wrong("inputs is None; expected a sequence of names", [one], inputs=None)
    wrong("outputs is 3; expected a sequence of names", [one], outputs=3)
    wrong("2 steps are named 'one'", [one, function_step(double, "x", "z", name="one")])
    wrong("inputs is 'x'; expected a sequence of names", [one], inputs="x")
    wrong("expected each name once", [one], inputs=("x", "x"))
    wrong("outputs is empty", [one], outputs=())
    wrong("no step makes the output 'z'; there is 'y'", [one], outputs=("z",))
    wrong("no step makes the output 'x'", [one], outputs=("y", "x"))
    wrong("no step reads the input 'extra'", [one], inputs=("x", "extra"))
    wrong(
        "'x' of step 'two' reads value 'yy', which nothing makes; there is 'x', 'y', 'z' .did you mean 'y'",
        [one, function_step(double, "yy", "z", name="two")],
    )
    wrong(
        "value 'y' comes from 'y' of step 'one' and from 'y' of step 'two'; expected exactly one source",
        [one, function_step(double, "x", "y", name="two")],
    )
    wrong(
        "value 'x' comes from the ensemble's inputs and from 'y' of step 'two'",
        [one, function_step(double, "y", "x", name="two")],
    )
    wrong(
        "value 'z', made by 'y' of step 'two', is neither read by a step nor an output",
        [one, function_step(double, "y", "z", name="two")],
    )
    wrong("has a int as its target; expected an Engine", [trtx.Step(3, {"x": "x"}, {"y": "y"})])  # type: ignore[arg-type]


def test_circles_are_refused_by_name() -> None:
    steps = [
        trtx.Step(double, {"x": "x", "back": "c"}, {"y": "a"}, name="first"),
        function_step(double, "a", "b", name="second"),
        function_step(double, "b", "c", name="third"),
        function_step(double, "c", "y", name="outside"),
    ]
    refused(trtx.InvalidArgumentError, "circle: 'first' -> 'second' -> 'third' -> 'first'$", steps)
    refused(trtx.InvalidArgumentError, "circle: 'me' -> 'me'$", [
        trtx.Step(double, {"x": "x", "z": "y"}, {"y": "y"}, name="me")
    ])  # fmt: skip


async def test_tensors_that_do_not_exist_or_fit(mock_backend: MockBackend) -> None:
    def plan(element: int, shape: tuple[int | str, ...], ranges: Any = None) -> trtx.Plan:
        model = make_model(
            [helper.make_node("Identity", ["x"], ["y"])], [("x", element, shape)], [("y", element, shape)]
        )
        return build(model, [{"x": ranges}] if ranges else [])

    async with trtx.Runtime(None, mock_backend) as runtime:
        make = runtime.deserialize_sync
        float4 = make(plan(TensorProto.FLOAT, (2, 4)))
        half4 = make(plan(TensorProto.FLOAT16, (2, 4)))
        float5 = make(plan(TensorProto.FLOAT, (2, 5)))
        flat = make(plan(TensorProto.FLOAT, (8,)))
        large = make(plan(TensorProto.FLOAT, ("N", 4), ((3, 4), (4, 4), (5, 4))))
        fits = make(plan(TensorProto.FLOAT, ("N", 4), ((1, 4), (2, 4), (8, 4))))
        first = trtx.Step(float4, {"x": "x"}, {"y": "v"}, name="first")

        def then(engine: Any) -> list[trtx.Step]:
            return [first, trtx.Step(engine, {"x": "v"}, {"y": "y"}, name="second")]

        ends = "value 'v': 'y' of step 'first' {} 'x' of step 'second' {}"
        refused(trtx.DTypeError, ends.format("is float32 and", "is float16"), then(half4))
        refused(trtx.ShapeError, ends.format(r"has shape \(2, 4\) and", r"has shape \(2, 5\)"), then(float5))
        refused(trtx.ShapeError, ends.format(r"has shape \(2, 4\) and", r"has shape \(8,\)"), then(flat))
        refused(
            trtx.ShapeError,
            ends.format(r"has shape \(2, 4\), which no optimization profile of", r"admits: \[3, 4\]..\[5, 4\]"),
            then(large),
        )
        graph = trtx.Ensemble(inputs=("x",), outputs=("y",), steps=then(fits))
        check(await graph.infer({"x": rows(2)}), {"y": rows(2)})
        refused(
            trtx.DTypeError,
            "value 'x': 'x' of step 'first' is float32 and 'x' of step 'second' is float16",
            [first, trtx.Step(half4, {"x": "x"}, {"y": "y"}, name="second")],
            outputs=("v", "y"),
        )
        wrong = functools.partial(refused, trtx.InvalidArgumentError)
        wrong(
            r"step 's' has no input 'xx' \(did you mean 'x'\?\); it has input 'x' float32 \[2x4\]",
            [trtx.Step(float4, {"xx": "x"}, {"y": "y"}, name="s")],
        )
        wrong("step 's' has no output 'z'; it has output 'y'", [trtx.Step(float4, {"x": "x"}, {"z": "y"}, name="s")])
        wrong("step 's' is given no value for its input 'x'", [trtx.Step(float4, {}, {"y": "y"}, name="s")], inputs=())
