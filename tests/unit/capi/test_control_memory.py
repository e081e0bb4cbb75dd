"""Contexts and memory of the control plane."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import fail, out_of_memory
from tests.unit.capi.kit import Launcher, context, control, graph, ok, options, read
from tests.unit.serving import affine_model
from trtx_py._capture import NotCapturableError
from trtx_py.backends.registry import resolve_backend
from trtx_py.capi._status import Status, StatusError, failure

pytestmark = pytest.mark.usefixtures("nothing_stays_open")


def test_what_a_context_is() -> None:
    made, info = ok(control.create_context("mock", 0, 2, 0, None, 0, False))
    assert info[0] == "mock"
    assert info[5] is True
    assert info[4] > 0
    assert (info[1], info[3]) == ("1.0.0.0", "8.9")
    assert control.destroy_context(made) == (0,)
    assert control.destroy_context(made) == (0,)


def test_the_environment_names_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mock", "mock:instant"):
        monkeypatch.setenv("TRTX_BACKEND", name)
        with context(None) as made:
            assert made.info[0] == "mock"


def test_contexts_that_cannot_be() -> None:
    assert control.create_context("nothing", 0, 0, 0, None, 0, False)[0] == 1
    assert control.create_context("mock:slow", 0, 0, 0, None, 0, False)[0] == 1
    assert control.create_context("mock", 7, 0, 0, None, 0, False)[0] == 1
    assert control.create_context("mock", -1, 0, 0, None, 0, False)[0] == 1
    assert control.create_context("mock", 0, 9, 0, None, 0, False)[0] == 1
    status, text = control.create_context("mock", 0, 0, 0, "/no/such/lean", 0, False)
    assert status == 10, text
    status, text = control.create_context("tensorrt", 0, 0, 0, None, 0, False)
    assert status == 10
    assert "pip install" in text


def test_a_context_with_open_things_is_not_destroyed() -> None:
    made, _ = ok(control.create_context("mock", 0, 0, 0, None, 0, False))
    opened, _ = ok(control.open_onnx(made, memoryview(affine_model()), None, options()))
    buffer, _ = ok(control.alloc(made, 4, 0))
    empty, _ = ok(control.alloc(made, 0, 0))
    for close, thing in ((control.close_graph, opened), (control.free, buffer), (control.free, empty)):
        assert control.destroy_context(made)[0] == 3
        assert made.statistics() is not None
        assert close(thing) == (0,)
        assert close(thing) == (0,)
    assert control.destroy_context(made) == (0,)
    assert control.open_onnx(made, memoryview(affine_model()), None, options())[0] == 21
    assert control.alloc(made, 4, 1)[0] == 21


def test_a_graph_with_pinned_shapes_is_not_closed() -> None:
    with context() as owner, graph(owner, affine_model()) as made:
        entry, *_ = ok(control.capture(made, ((2, 4),)))
        status, text = control.close_graph(made)
        assert status == 3, text
        assert control.release(entry) == (0,)


@pytest.mark.parametrize("location", [0, 1])
@pytest.mark.parametrize("nbytes", [0, 1, 7, 1 << 20])
def test_memory_is_zeroed_and_counted(location: int, nbytes: int) -> None:
    with context() as owner:
        before = ok(control.context_statistics(owner))
        buffer, address = ok(control.alloc(owner, nbytes, location))
        assert bool(address) == bool(nbytes)
        host = np.full(nbytes, 7, np.uint8)
        assert control.copy(owner, host.ctypes.data, False, address, bool(location), nbytes) == (0,)
        assert not host.any()
        after = ok(control.context_statistics(owner))
        first = 0 if location else 3
        assert after[first] - before[first] == nbytes
        assert after[first + 2] - before[first + 2] == bool(nbytes)
        assert control.free(buffer) == (0,)
        last = ok(control.context_statistics(owner))
        assert last[first] == before[first]
        assert last[first + 1] >= nbytes


def test_copies_in_every_direction() -> None:
    with context() as owner:
        data = np.arange(1000, dtype=np.uint8)
        addresses, buffers = {}, []
        for location in (0, 1, 2, 3):  # 2 and 3: other buffers of the same kind
            buffer, addresses[location] = ok(control.alloc(owner, data.nbytes, location % 2))
            buffers.append(buffer)
        assert control.copy(owner, addresses[0], False, data.ctypes.data, False, data.nbytes) == (0,)
        for to, source in ((1, 0), (3, 1), (2, 3)):
            assert control.copy(owner, addresses[to], to % 2 == 1, addresses[source], source % 2 == 1, data.nbytes) == (
                0,
            )
        assert np.array_equal(read(addresses[2], data.shape, np.uint8), data)
        status, _ = control.copy(owner, addresses[1], True, 8, True, 100)
        assert status == 17
        for buffer in buffers:
            assert control.free(buffer) == (0,)


def test_the_budget_and_what_is_there_bound_memory() -> None:
    with context(budget=1 << 20) as owner:
        assert control.alloc(owner, 2 << 20, 1)[0] == 9
        assert control.alloc(owner, 1 << 60, 0)[0] in (9, 17)
        buffer, _ = ok(control.alloc(owner, 1 << 19, 1))
        assert control.free(buffer) == (0,)


def test_errors_of_the_driver_are_told_with_their_names() -> None:
    mock: Any = resolve_backend("mock", need="run")
    with context() as owner:
        mock.inject(fail("cuMemAlloc", error=2))
        assert control.alloc(owner, 8, 1)[0] == 9
        mock.inject(fail("cuMemAlloc", error=100))
        status, text = control.alloc(owner, 8, 1)
        mock.clear_faults()
        assert status == 17
        assert "CUDA_ERROR_NO_DEVICE" in text


ERRORS = [
    (trtx.InvalidArgumentError("m"), Status.INVALID_ARGUMENT),
    (trtx.ShapeError("m"), Status.SHAPE),
    (trtx.DTypeError("m"), Status.DTYPE),
    (trtx.ParserError("m"), Status.PARSE),
    (trtx.BuilderError("m"), Status.BUILD),
    (trtx.PlanError("m"), Status.PLAN),
    (trtx.VersionMismatchError("m", plan="a", runtime="b"), Status.VERSION_MISMATCH),
    (trtx.EngineError("m"), Status.EXECUTION),
    (trtx.ExecutionError("m"), Status.EXECUTION),
    (NotCapturableError("m"), Status.UNSUPPORTED),
    (trtx.CudaError(719, "CUDA_ERROR_LAUNCH_FAILED", "cuGraphLaunch"), Status.CUDA),
    (trtx.CudaError(2, "CUDA_ERROR_OUT_OF_MEMORY", "cuMemAlloc"), Status.OUT_OF_MEMORY),
    (trtx.MemoryBudgetError("m", requested_bytes=2, used_bytes=0, budget_bytes=1), Status.OUT_OF_MEMORY),
    (MemoryError(), Status.OUT_OF_MEMORY),
    (trtx.BorrowedError("m"), Status.BORROWED),
    (trtx.ClosedError("m"), Status.CLOSED),
    (trtx.BackendUnavailableError("m"), Status.UNAVAILABLE),
    (TimeoutError("m"), Status.TIMEOUT),
    (FileNotFoundError("m"), Status.NOT_FOUND),
    (KeyboardInterrupt(), Status.CANCELLED),
    (StatusError(Status.RANGE, "m"), Status.RANGE),
    (ZeroDivisionError("m"), Status.INTERNAL),
    (SystemExit(3), Status.INTERNAL),
]


@pytest.mark.parametrize(("error", "status"), ERRORS, ids=lambda value: type(value).__name__)
def test_every_error_has_its_status(error: BaseException, status: Status) -> None:
    found, text = failure(error)
    assert (found, type(found)) == (int(status), int)
    assert text


def test_texts_have_tensorrts_lines_and_can_be_utf8() -> None:
    assert "[E] broken" in failure(trtx.EngineError("m", tensorrt_log=["[E] broken"]))[1]
    assert failure(trtx.InvalidArgumentError("\udcff"))[1].encode() == b"?"


def test_an_error_keeps_nothing_alive() -> None:
    class Thing:
        pass

    kept: list[weakref.ref[Thing]] = []

    def work(thing: Thing) -> None:
        try:
            raise ValueError
        except ValueError as first:
            raise KeyError from first

    def outer() -> None:
        thing = Thing()
        kept.append(weakref.ref(thing))
        work(thing)

    gc.disable()
    try:
        errors: list[KeyError] = []
        try:
            outer()
        except KeyError as error:
            failure(error)
            errors.append(error)
        assert errors
        assert kept[0]() is None
    finally:
        gc.enable()


def test_nothing_but_answers_leaves() -> None:
    for function in (control.close_graph, control.free, control.release, control.destroy_context, control.max_graphs):
        assert function(None)[0] == 26
    assert control.alloc()[0] == 26


def test_stop_closes_what_is_open() -> None:
    made, _ = ok(control.create_context("mock", 0, 0, 0, None, 0, False))
    opened, _ = ok(control.open_onnx(made, memoryview(affine_model()), None, options()))
    entry, *_ = ok(control.capture(opened, ((2, 4),)))
    buffer, _ = ok(control.alloc(made, 8, 1))
    assert control.stop() == (0,)
    assert trtx.live_objects() == []
    assert control.capture(opened, ((2, 4),))[0] == 21
    for close, thing in ((control.release, entry), (control.free, buffer), (control.close_graph, opened)):
        assert close(thing) == (0,)
    assert control.destroy_context(made) == (0,)
    assert control.stop() == (0,)


def test_any_thread_may_call() -> None:
    found: list[Any] = []

    def work() -> None:
        with context() as owner, graph(owner, affine_model()) as made:
            entry, *_ = ok(control.capture(made, ((2, 4),)))
            found.append(control.release(entry))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(0,)] * 4


async def test_an_event_loops_thread_may_call() -> None:
    with context() as owner, graph(owner, affine_model()) as made:
        x = np.ones((2, 4), np.float32)
        results, found = ok(control.infer(made, ((x.ctypes.data, x.shape, False),), False))
        assert read(found[0][0], (2, 4), np.float32).tolist() == [[3] * 4] * 2
        del results
        entry, *_ = ok(control.capture(made, ((2, 4),)))
        assert control.release(entry) == (0,)


def test_stop_waits_for_what_is_in_flight() -> None:
    made, _ = ok(control.create_context("mock:duration_s=0.2", 0, 0, 0, None, 0, False))
    opened, _ = ok(control.open_onnx(made, memoryview(affine_model()), None, options()))
    _, _, buckets = ok(control.capture(opened, ((2, 4),)))
    launcher = Launcher(buckets[0])
    launcher.take()  # held, and never given back
    began = time.monotonic()
    launcher.submit(launcher.take(), np.ones((2, 4), np.float32))
    assert control.stop() == (0,)
    assert time.monotonic() - began >= 0.2
    mock: Any = made._runtime._backend
    assert (mock.leaks(), mock.damage()) == ([], [])


def test_threads_that_python_does_not_know_may_call() -> None:
    found: list[Any] = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
    def work(_: Any) -> None:
        with context() as owner, graph(owner, affine_model()) as made:
            x = np.ones((2, 4), np.float32)
            _, rows = ok(control.infer(made, ((x.ctypes.data, x.shape, False),), False))
            entry, *_ = ok(control.capture(made, ((2, 4),)))
            found.append((rows[0][1:], control.release(entry)))

    pthreads = ctypes.CDLL(None)
    idents = (ctypes.c_ulong * 4)()
    for number in range(4):
        assert pthreads.pthread_create(ctypes.byref(idents, 8 * number), None, work, None) == 0
    for ident in idents:
        pthreads.pthread_join(ctypes.c_ulong(ident), None)
    assert found == [((32, (2, 4)), (0,))] * 4


def test_no_memory_for_a_capture_is_told_and_no_obstacle_to_the_next_one() -> None:
    mock: Any = resolve_backend("mock", need="run")
    with context() as owner, graph(owner, affine_model()) as made:
        for call in ("cuMemAlloc", "cuMemHostAlloc"):
            mock.inject(out_of_memory(call))
            status, text = control.capture(made, ((3, 4),))
            mock.clear_faults()
            assert (status, call in text) == (9, True)
        entry, *_ = ok(control.capture(made, ((3, 4),)))
        assert control.release(entry) == (0,)


def test_a_lost_device() -> None:
    made, _ = ok(control.create_context("mock:threads=2", 0, 0, 0, None, 0, False))
    mock: Any = made._runtime._backend
    opened, _ = ok(control.open_onnx(made, memoryview(affine_model()), None, options()))
    entry, _, buckets = ok(control.capture(opened, ((2, 4),)))
    launcher = Launcher(buckets[0])
    slot = launcher.take()
    mock.inject(fail("execute"))
    x = np.ones((2, 4), np.float32)
    assert launcher.fault(slot, x) == 719
    launcher.release(slot)
    for answer in (
        control.infer(opened, ((x.ctypes.data, x.shape, False),), False),
        control.capture(opened, ((3, 4),)),
        control.alloc(made, 8, 1),
    ):
        assert answer[0] in (16, 17), answer
        assert "CUDA_ERROR_LAUNCH_FAILED" in answer[1]
    for close, thing in ((control.release, entry), (control.close_graph, opened), (control.destroy_context, made)):
        assert close(thing) == (0,)
    assert (mock.leaks(), mock.damage()) == ([], [])


EXIT = """
import ctypes
from trtx_py.capi import _control as control

@ctypes.CFUNCTYPE(None)
def end():
    print("end", control.stop())

context = control.create_context("mock", 0, 0, 0, None, 0, False)[1]
import onnx
from onnx import helper
io = [helper.make_tensor_value_info(name, 1, [4]) for name in "xy"]
model = helper.make_model(helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", io[:1], io[1:]))
graph = control.open_onnx(context, memoryview(model.SerializeToString()), None, (None, None, -1, 0, 0, 0, False))[1]
entry = control.capture(graph, ((4,),))[1]
control.on_exit(ctypes.cast(end, ctypes.c_void_p).value)
print("main")
"""


def test_the_library_hears_of_the_interpreters_end() -> None:
    done = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["main", "end (0,)"]), done.stderr
    assert "Traceback" not in done.stderr
