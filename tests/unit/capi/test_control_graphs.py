"""Graphs of the control plane: opened, captured for C, pinned, and run through Python where they cannot be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

import trtx_py as trtx
from mock_backend import slow
from tests.unit.capi.kit import (
    BFLOAT16,
    FLOAT32,
    INT32,
    Launcher,
    context,
    control,
    graph,
    ok,
    options,
    read,
)
from tests.unit.serving import (
    NONZERO,
    PATIENCE_S,
    affine_model,
    build,
    identity_model,
    make_model,
    nonzero_model,
    pair_model,
    reshape_model,
)
from trtx_py.backends.registry import resolve_backend

pytestmark = pytest.mark.usefixtures("nothing_stays_open")

N4 = (("x", (1, 4), (2, 4), (8, 4)),)
PAIR = tuple((name, (1, 2), (2, 2), (4, 2)) for name in ("left", "right"))
F4 = np.dtype(np.float32)


def rows(count: int) -> np.ndarray:
    return np.arange(count * 4, dtype=np.float32).reshape(count, 4)


def mock() -> Any:
    """The one that contexts of the name "mock" have."""
    return resolve_backend("mock", need="run")


def in_time(function: Callable[[], Any]) -> Any:
    """The result of a function that must not hang."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()), daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert found, "hangs"
    return found[0]


# opening


def test_io_has_the_models_own_names_types_and_open_axes() -> None:
    with context() as owner:
        made, io = ok(control.open_onnx(owner, memoryview(pair_model()), None, options(PAIR)))
        assert sorted(io[:3]) == [
            (0, "fixed", INT32, INT32, (3,)),
            (0, "left", FLOAT32, FLOAT32, (-1, 2)),
            (0, "right", FLOAT32, FLOAT32, (-1, 2)),
        ]
        assert sorted(io[3:]) == [(1, "same", INT32, INT32, (3,)), (1, "total", FLOAT32, FLOAT32, (-1, 2))]
        assert control.close_graph(made) == (0,)


def test_a_plan_comes_back_as_it_was_saved() -> None:
    with context() as owner, graph(owner, affine_model(), ranges=N4) as first:
        plan = ok(control.graph_plan(first))
        assert isinstance(plan, bytes)
        second, io = ok(control.open_plan(owner, memoryview(plan), options()))
        assert [row[1] for row in io] == ["x", "y"]
        assert ok(control.graph_plan(second)) == plan
        assert control.close_graph(second) == (0,)


def test_options_of_a_build_are_refused_for_a_plan() -> None:
    with context() as owner, graph(owner, affine_model(), ranges=N4) as first:
        plan = memoryview(ok(control.graph_plan(first)))
        for given in (options(N4), options(precision="fp16"), options(level=3)):
            assert control.open_plan(owner, plan, given)[0] == 1


def test_files_are_told_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(affine_model())
    with context() as owner:
        first, io = ok(control.open_file(owner, str(tmp_path / "model"), options(N4)))
        (tmp_path / "plan").write_bytes(ok(control.graph_plan(first)))
        second, same = ok(control.open_file(owner, str(tmp_path / "plan"), options()))
        assert same == io
        assert control.open_file(owner, str(tmp_path / "nothing"), options())[0] == 4
        assert control.open_file(owner, str(tmp_path), options())[0] == 1
        for made in (first, second):
            assert control.close_graph(made) == (0,)


def external_model(location: str, offset: int, values: np.ndarray) -> bytes:
    tensor = numpy_helper.from_array(values, "w")
    set_external_data(tensor, location, offset, values.nbytes)
    tensor.ClearField("raw_data")
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, values.shape) for name in "xy"]
    made = helper.make_model(
        helper.make_graph(nodes, "g", io[:1], io[1:], [tensor]),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip
    return bytes(made.SerializeToString())


@pytest.mark.parametrize("location", ["weights.bin", "../elsewhere", "/no/such/file", "*/_ORT_MEM_ADDR_/*"])
def test_the_blob_is_taken_whatever_the_model_calls_it(location: str) -> None:
    values = np.array([10, 20, 30], np.float32)
    blob = b"\xff" * 8 + values.tobytes() + b"\xff" * 3
    model = external_model(location, 8, values)
    with context() as owner:
        made, _ = ok(control.open_onnx(owner, memoryview(model), memoryview(blob), options()))
        x = np.array([1, 2, 3], np.float32)
        results, rows = ok(control.infer(made, ((x.ctypes.data, (3,), False),), False))
        assert read(rows[0][0], (3,), F4).tolist() == [11, 22, 33]
        del results
        assert control.close_graph(made) == (0,)
        for short in (blob[:19], b""):
            status, text = control.open_onnx(owner, memoryview(model), memoryview(short), options())
            assert status == 12, text
        assert control.open_onnx(owner, memoryview(model), None, options())[0] == 12


def test_no_weights_may_be_an_empty_blob() -> None:
    with context() as owner:
        made, _ = ok(control.open_onnx(owner, memoryview(affine_model()), memoryview(b""), options(N4)))
        assert control.close_graph(made) == (0,)


def test_scalars() -> None:
    model = make_model(
        [helper.make_node("Neg", ["x"], ["y"])], [("x", TensorProto.FLOAT, [])], [("y", TensorProto.FLOAT, [])]
    )
    with context() as owner, graph(owner, model) as made:
        entry, outputs, buckets = ok(control.capture(made, ((),)))
        assert outputs == ((),)
        assert Launcher(buckets[0]).run([np.array(3, np.float32)], [((), F4)]) == [-3]
        assert control.release(entry) == (0,)


def test_errors_leave_nothing_open() -> None:
    with context() as owner:
        assert control.open_onnx(owner, memoryview(b""), None, options())[0] == 12
        assert control.open_onnx(owner, memoryview(b"junk"), None, options())[0] == 12
        assert control.open_plan(owner, memoryview(b"junk"), options())[0] == 14
        assert control.open_onnx(owner, memoryview(affine_model()), None, options(precision="fp3"))[0] == 1
        assert control.open_onnx(owner, memoryview(affine_model()), None, options(level=9))[0] == 1
        assert control.open_onnx(owner, memoryview(affine_model()), None, options(lanes=65))[0] == 1
        assert control.open_onnx(owner, memoryview(affine_model()), None, options((("z", (1,), (1,), (1,)),)))[0] == 1
        backwards = (("x", (4, 4), (2, 4), (1, 4)),)
        assert control.open_onnx(owner, memoryview(affine_model()), None, options(backwards))[0] == 5
        assert len(trtx.live_objects()) == 2  # the context's runtime and device


# capturing


@pytest.mark.parametrize("lanes", [1, 2])
def test_c_launches_every_slot_of_every_lane(lanes: int) -> None:
    with context() as owner, graph(owner, affine_model(), ranges=N4, lanes=lanes, slots=3) as made:
        entry, outputs, buckets = ok(control.capture(made, ((2, 4),)))
        assert outputs == ((2, 4),)
        assert len(buckets) == lanes
        for bucket in buckets:
            launcher = Launcher(bucket)
            taken = [launcher.take() for _ in range(3)]
            assert sorted(taken) == [0, 1, 2]
            assert launcher.acquire() is None
            for number, slot in enumerate(taken):
                launcher.submit(slot, rows(2) + number)
            for number, slot in enumerate(taken):
                launcher.wait(slot)
                found = read(launcher.by_slot[slot][2][0], (2, 4), F4)
                assert np.array_equal(found, 2 * (rows(2) + number) + 1)
                launcher.release(slot)
        assert control.release(entry) == (0,)
        assert control.release(entry) == (0,)  # once is enough


def test_inputs_of_an_entry_are_in_the_graphs_order() -> None:
    with context() as owner:
        made, io = ok(control.open_onnx(owner, memoryview(pair_model()), None, options(PAIR)))
        given: dict[str, Any] = {"left": np.full((2, 2), 2, np.float32), "right": np.full((2, 2), 5, np.float32)}
        given["fixed"] = np.array([7, 8, 9], np.int32)
        names = [row[1] for row in io if row[0] == 0]
        entry, outputs, buckets = ok(control.capture(made, tuple(given[name].shape for name in names)))
        results = [row[1] for row in io if row[0] == 1]
        kinds = [
            (shape, np.int32 if name == "same" else np.float32) for name, shape in zip(results, outputs, strict=True)
        ]
        found = dict(zip(results, Launcher(buckets[0]).run([given[name] for name in names], kinds), strict=True))
        assert (found["total"] == 7).all()
        assert found["same"].tolist() == [7, 8, 9]
        assert control.release(entry) == (0,)
        assert control.close_graph(made) == (0,)


def test_what_cannot_be_captured_is_said_and_runs() -> None:
    with context() as owner:
        with graph(owner, nonzero_model(), ranges=(("x", *NONZERO["x"]),)) as made:
            status, text = control.capture(made, ((4,),))
            assert (status, "data" in text) == (25, True)
            x = np.array([0, 1, 0, 1], np.float32)
            results, found = ok(control.infer(made, ((x.ctypes.data, (4,), False),), False))
            assert found[0][1:] == (16, (1, 2))
            assert read(found[0][0], (1, 2), np.int64).tolist() == [[1, 3]]
            del results
        with graph(owner, affine_model(), ranges=N4, no_cuda_graphs=True) as made:
            assert control.capture(made, ((2, 4),))[0] == 25
        ranges = (("x", (1,), (6,), (24,)), ("shape", (1, 1), (2, 3), (12, 12)))
        made, io = ok(control.open_onnx(owner, memoryview(reshape_model()), None, options(ranges)))
        names = [row[1] for row in io if row[0] == 0]
        assert control.capture(made, tuple({"x": (6,), "shape": (2,)}[name] for name in names))[0] == 25
        given: dict[str, Any] = {"x": np.arange(6, dtype=np.float32), "shape": np.array([3, 2], np.int64)}
        where = tuple((given[name].ctypes.data, given[name].shape, False) for name in names)
        results, found = ok(control.infer(made, where, False))
        assert found[0][2] == (3, 2)
        del results
        assert control.close_graph(made) == (0,)


@pytest.mark.parametrize("shapes", [((9, 4),), ((0, 4),), ((2, 5),), ((4,),), ((2, 4, 1),)])
def test_shapes_that_no_profile_admits(shapes: Any) -> None:
    with context() as owner, graph(owner, affine_model(), ranges=N4) as made:
        assert control.capture(made, shapes)[0] == 5


def test_a_pinned_shape_is_not_evicted() -> None:
    with context() as owner, graph(owner, affine_model(), ranges=N4, max_graphs=1, slots=2) as made:
        assert ok(control.max_graphs(made)) == 1
        entries = []
        for count in (1, 2, 3):
            entry, _, buckets = ok(control.capture(made, ((count, 4),)))
            entries.append((entry, Launcher(buckets[0]), count))
        for _, launcher, count in entries:
            (found,) = launcher.run([rows(count)], [((count, 4), F4)])
            assert np.array_equal(found, 2 * rows(count) + 1)
        pinned = ok(control.context_statistics(owner))[3]
        for entry, _, _ in entries:
            assert control.release(entry) == (0,)
        entry, _, _ = ok(control.capture(made, ((4, 4),)))  # makes room
        assert ok(control.context_statistics(owner))[3] < pinned
        assert made.engine.statistics().graphs.captured == 1
        assert control.release(entry) == (0,)


def test_one_shape_may_be_captured_and_pinned_twice() -> None:
    with context() as owner, graph(owner, affine_model(), ranges=N4, max_graphs=1) as made:
        first, _, buckets = ok(control.capture(made, ((2, 4),)))
        second, _, same = ok(control.capture(made, ((2, 4),)))
        assert same == buckets
        assert control.release(first) == (0,)
        other, _, _ = ok(control.capture(made, ((3, 4),)))
        assert Launcher(buckets[0]).run([rows(2)], [((2, 4), F4)])[0][0, 1] == 3
        for entry in (second, other):
            assert control.release(entry) == (0,)


def test_threads_capture_many_shapes_at_once() -> None:
    with context() as owner, graph(owner, affine_model(), ranges=N4, max_graphs=2, lanes=2, slots=2) as made:
        wrong: list[object] = []

        def work(seed: int) -> None:
            for number in range(12):
                count = 1 + (seed + number) % 8
                answer = control.capture(made, ((count, 4),))
                if answer[0]:
                    wrong.append(answer)
                    continue
                entry, _, buckets = answer[1:]
                launcher = Launcher(buckets[number % 2])
                slot = launcher.acquire()
                if slot is not None:
                    launcher.submit(slot, rows(count))
                    launcher.wait(slot)
                    found = read(launcher.by_slot[slot][2][0], (count, 4), F4)
                    if not np.array_equal(found, 2 * rows(count) + 1):
                        wrong.append(found)
                    launcher.release(slot)
                control.release(entry)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert wrong == []


def test_a_slot_given_back_in_flight_keeps_its_graph() -> None:
    with context() as owner, graph(owner, affine_model(), ranges=N4, max_graphs=1, slots=1) as made:
        entry, _, buckets = ok(control.capture(made, ((2, 4),)))
        launcher = Launcher(buckets[0])
        slot = launcher.take()
        mock().inject(slow("execute", 1, count=1))
        launcher.submit(slot, rows(2))
        launcher.release(slot)
        (bucket,) = entry._buckets
        assert control.release(entry) == (0,)
        assert bucket.busy  # with what nobody waits for
        other, _, _ = ok(control.capture(made, ((3, 4),)))  # evicts, but not what the GPU still works on
        mock().clear_faults()
        deadline = time.monotonic() + PATIENCE_S
        while bucket.busy:  # until somebody has seen that it is done
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert control.release(other) == (0,)


def test_closing_waits_for_what_was_given_back_in_flight() -> None:
    with context() as owner:
        with graph(owner, affine_model(), ranges=N4) as made:
            entry, _, buckets = ok(control.capture(made, ((2, 4),)))
            launcher = Launcher(buckets[0])
            slot = launcher.take()
            mock().inject(slow("execute", 0.3))
            began = time.monotonic()
            launcher.submit(slot, rows(2))
            launcher.release(slot)
            assert control.release(entry) == (0,)
        mock().clear_faults()
        assert time.monotonic() - began >= 0.3


def test_closing_frees_all() -> None:
    with context() as owner:
        with graph(owner, affine_model(), ranges=N4) as made:
            entry, _, _ = ok(control.capture(made, ((2, 4),)))
            assert control.release(entry) == (0,)
        before = ok(control.context_statistics(owner))
        assert (before[0], before[2], before[3], before[5]) == (0, 0, 0, 0)


# through Python


def test_a_request_through_python_does_not_wait_for_slots_that_c_holds() -> None:
    with context() as owner, graph(owner, affine_model(), ranges=N4, slots=2) as made:
        entry, _, buckets = ok(control.capture(made, ((2, 4),)))
        launcher = Launcher(buckets[0])
        taken = [launcher.take() for _ in range(2)]
        x = rows(2)
        results, found = ok(in_time(lambda: control.infer(made, ((x.ctypes.data, (2, 4), False),), False)))
        assert np.array_equal(read(found[0][0], (2, 4), F4), 2 * x + 1)
        del results
        third = ok(in_time(lambda: control.capture(made, ((3, 4),))))[0]
        for slot in taken:
            launcher.release(slot)
        for each in (entry, third):
            assert control.release(each) == (0,)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("places", [(True, True, True), (True, False, True), (False, False, False)])
def test_device_memory_in_and_out(places: tuple[bool, ...], on_device: bool) -> None:
    with context() as owner:
        made, io = ok(control.open_onnx(owner, memoryview(pair_model()), None, options(PAIR)))
        given: dict[str, Any] = {"left": np.full((2, 2), 2, np.float32), "right": np.full((2, 2), 5, np.float32)}
        given["fixed"] = np.array([7, 8, 9], np.int32)
        buffers, where = [], []
        for (_, name, *_), device in zip(io, places, strict=False):
            array = given[name]
            buffer, address = ok(control.alloc(owner, array.nbytes, int(device)))
            assert control.copy(owner, address, device, array.ctypes.data, False, array.nbytes) == (0,)
            buffers.append(buffer)
            where.append((address, array.shape, device))
        results, found = ok(control.infer(made, tuple(where), on_device))
        outputs = [row[1] for row in io if row[0] == 1]
        for name, (address, nbytes, shape) in zip(outputs, found, strict=True):
            host = np.empty(shape, np.float32 if name == "total" else np.int32)
            assert host.nbytes == nbytes
            assert control.copy(owner, host.ctypes.data, False, address, on_device, nbytes) == (0,)
            assert host.tolist() == ([[7, 7], [7, 7]] if name == "total" else [7, 8, 9])
        del results
        for buffer in buffers:
            assert control.free(buffer) == (0,)
        assert control.close_graph(made) == (0,)


def test_shape_tensors_may_lie_on_the_device_for_the_caller() -> None:
    with context() as owner:
        ranges = (("x", (1,), (6,), (24,)), ("shape", (1, 1), (2, 3), (12, 12)))
        made, io = ok(control.open_onnx(owner, memoryview(reshape_model()), None, options(ranges)))
        given: dict[str, Any] = {"x": np.arange(6, dtype=np.float32), "shape": np.array([3, 2], np.int64)}
        buffers, where = [], []
        for _, name, *_ in io[:2]:
            buffer, address = ok(control.alloc(owner, given[name].nbytes, 1))
            assert control.copy(owner, address, True, given[name].ctypes.data, False, given[name].nbytes) == (0,)
            buffers.append(buffer)
            where.append((address, given[name].shape, True))
        results, found = ok(control.infer(made, tuple(where), True))
        assert found[0][1:] == (24, (3, 2))
        host = np.empty((3, 2), np.float32)
        assert control.copy(owner, host.ctypes.data, False, found[0][0], True, 24) == (0,)
        assert host.ravel().tolist() == list(range(6))
        del results
        for buffer in buffers:
            assert control.free(buffer) == (0,)
        assert control.close_graph(made) == (0,)


@pytest.mark.parametrize("element", ["BFLOAT16", "FLOAT16", "FLOAT8E4M3FN", "BOOL", "INT64", "INT8"])
def test_every_type_goes_through_device_memory(element: str) -> None:
    model = identity_model(getattr(TensorProto, element), (4,))
    with context() as owner:
        made, io = ok(control.open_onnx(owner, memoryview(model), None, options()))
        raw = np.frombuffer(bytes([1, 0] * 16), np.uint8)
        kind = made.engine.io_tensors[0].dtype
        nbytes = kind.nbytes((4,))
        assert (io[0][2] == BFLOAT16) == (element == "BFLOAT16")
        buffer, address = ok(control.alloc(owner, nbytes, 1))
        assert control.copy(owner, address, True, raw.ctypes.data, False, nbytes) == (0,)
        results, found = ok(control.infer(made, ((address, (4,), True),), True))
        host = np.zeros(nbytes, np.uint8)
        assert control.copy(owner, host.ctypes.data, False, found[0][0], True, nbytes) == (0,)
        assert host.tolist() == raw[:nbytes].tolist()
        del results
        assert control.free(buffer) == (0,)
        assert control.close_graph(made) == (0,)


def test_no_elements() -> None:
    model = identity_model(TensorProto.FLOAT, ("N",))
    with context() as owner, graph(owner, model, ranges=(("x", (0,), (4,), (8,)),)) as made:
        for device in (False, True):
            results, found = ok(control.infer(made, ((0, (0,), device),), device))
            assert found[0][1:] == (0, (0,))
            del results
        answer = control.capture(made, ((0,),))
        if answer[0] == 0:
            assert control.release(answer[1]) == (0,)
        else:
            assert answer[0] == 25


def test_requests_and_captures_from_many_threads() -> None:
    with context() as owner, graph(owner, affine_model(), ranges=N4, max_graphs=2, slots=2) as made:
        wrong: list[object] = []

        def work(seed: int) -> None:
            for number in range(10):
                x = rows(1 + (seed + number) % 8)
                answer = control.infer(made, ((x.ctypes.data, x.shape, False),), False)
                if answer[0] or not np.array_equal(read(answer[2][0][0], x.shape, F4), 2 * x + 1):
                    wrong.append(answer)
                captured = control.capture(made, (x.shape,))
                if captured[0]:
                    wrong.append(captured)
                else:
                    control.release(captured[1])

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert wrong == []


def test_a_plan_whose_profiles_serve_one_context_at_a_time() -> None:
    plan = build(affine_model(), [{"x": ((1, 4), (2, 4), (8, 4))}], sharing=False)
    with context() as owner:
        made, _ = ok(control.open_plan(owner, memoryview(bytes(plan)), options()))
        for _ in range(3):
            for count in (1, 2, 3):
                answer = in_time(partial(control.capture, made, ((count, 4),)))
                assert answer[0] in (0, 25), answer
                x = rows(count)
                if answer[0] == 0:
                    entry, _, buckets = answer[1:]
                    assert np.array_equal(Launcher(buckets[0]).run([x], [(x.shape, F4)])[0], 2 * x + 1)
                    assert control.release(entry) == (0,)
                else:
                    results, found = ok(
                        in_time(partial(control.infer, made, ((x.ctypes.data, x.shape, False),), False))
                    )
                    assert np.array_equal(read(found[0][0], x.shape, F4), 2 * x + 1)
                    del results
        assert control.close_graph(made) == (0,)


def test_a_pinned_graph_does_not_starve_other_shapes_of_an_exclusive_plan() -> None:
    plan = build(affine_model(), [{"x": ((1, 4), (2, 4), (8, 4))}], sharing=False)
    with context() as owner:
        made, _ = ok(control.open_plan(owner, memoryview(bytes(plan)), options()))
        first = in_time(lambda: control.capture(made, ((1, 4),)))
        x = rows(2)
        second = in_time(lambda: control.capture(made, (x.shape,)))
        assert (first[0], second[0]) in ((25, 25), (0, 25))
        results, found = ok(in_time(lambda: control.infer(made, ((x.ctypes.data, x.shape, False),), False)))
        assert np.array_equal(read(found[0][0], x.shape, F4), 2 * x + 1)
        del results
        if first[0] == 0:
            assert control.release(first[1]) == (0,)
        assert control.close_graph(made) == (0,)


def test_the_instant_mock_gives_zeros() -> None:
    with context("mock:instant") as owner, graph(owner, affine_model(), ranges=N4) as made:
        entry, _, buckets = ok(control.capture(made, ((2, 4),)))
        assert not Launcher(buckets[0]).run([rows(2)], [((2, 4), F4)])[0].any()
        assert control.release(entry) == (0,)
