"""Devices, buffers and streams against misuse: foreign objects, Python objects as bytes, memory that is still read."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.ownership import SAMPLE, WEIGHTS, Gate, shared_plan
from tests.unit.serving import GateClock
from trtx_py._lane import Lanes

RESULT = SAMPLE @ WEIGHTS
HUGE = 2**31 - 1


class Foreign:
    """Stands for a tensor of another library."""


class Rig:
    """An engine with a context that reads ``x`` into ``y``, and a stream."""

    def __init__(self, backend: MockBackend, stack: contextlib.ExitStack) -> None:
        self.backend = backend
        self.runtime: trtx.Runtime = stack.enter_context(trtx.Runtime(None, backend))
        self.device = self.runtime.device
        self.engine: trtx.Engine = stack.enter_context(self.runtime.deserialize_sync(shared_plan()))
        self.stream: trtx.Stream = stack.enter_context(self.device.create_stream())
        self.y: trtx.DeviceBuffer = stack.enter_context(self.device.allocate(256))
        self.context: trtx.ExecutionContext = stack.enter_context(self.engine.create_execution_context())
        self.context.set_input_shape("x", (2, 4))
        self.context.set_tensor_address("y", self.y)

    def source(self, values: np.ndarray[Any, Any] = SAMPLE) -> trtx.DeviceBuffer:
        buffer = self.device.allocate(64)
        buffer.copy_from_host(values, self.stream)
        return buffer

    def result(self) -> Any:
        return self.y.copy_to_host((2, 3), "f4", self.stream)


@pytest.fixture
def rig(mock_backend: MockBackend) -> Iterator[Rig]:
    with contextlib.ExitStack() as stack:
        yield Rig(mock_backend, stack)


# Bytes that are none.


def plain_bytes(device: trtx.Device, check: Callable[..., None]) -> None:
    with device.allocate(64) as buffer, device.allocate_pinned(64) as pinned, device.create_stream() as stream:
        check(buffer, pinned, stream)


@pytest.mark.parametrize(
    "dtype", [object, "O", np.dtype([("a", "f4"), ("b", "O")]), "zz", 5, "f4,(", ("f4", (2,)), "S", "V0"]
)
def test_dtypes_that_are_no_plain_bytes(dtype: Any, rig: Rig) -> None:
    def check(buffer: trtx.DeviceBuffer, pinned: trtx.PinnedBuffer, stream: trtx.Stream) -> None:
        buffer.copy_from_host(np.arange(1000, 1008), stream)  # as pointers these would crash the interpreter
        with pytest.raises(trtx.InvalidArgumentError, match=r"dtype .*expected|dtype .*use a number dtype"):
            buffer.copy_to_host((8,), dtype, stream)
        with pytest.raises(trtx.InvalidArgumentError, match=r"dtype .*expected|dtype .*use a number dtype"):
            pinned.array((8,), dtype)

    plain_bytes(rig.device, check)


@pytest.mark.parametrize("value", [[object()], np.array([None, "x"]), [[1], [1, 2]]])
def test_values_that_are_no_plain_bytes(value: Any, rig: Rig) -> None:
    def check(buffer: trtx.DeviceBuffer, pinned: trtx.PinnedBuffer, stream: trtx.Stream) -> None:
        with pytest.raises(trtx.InvalidArgumentError, match=r"Python objects|cannot make an array of a list"):
            buffer.copy_from_host(value, stream)

    plain_bytes(rig.device, check)


@pytest.mark.parametrize(
    "shape", [(HUGE,) * 2, (HUGE,) * 8, (65536,) * 4, (HUGE, HUGE, 4), (0, HUGE, HUGE, HUGE), (1 << 20, 1 << 20)]
)
def test_shapes_beyond_memory(shape: tuple[int, ...], rig: Rig) -> None:
    def check(buffer: trtx.DeviceBuffer, pinned: trtx.PinnedBuffer, stream: trtx.Stream) -> None:
        for attempt in (lambda: buffer.copy_to_host(shape, "f4", stream), lambda: pinned.array(shape, "f4")):
            with pytest.raises(trtx.ShapeError, match=r"needs more bytes|has 4398046511104 bytes"):
                attempt()

    plain_bytes(rig.device, check)


# Objects of another device, and things that are none.


def foreign_uses(mine: Rig, stream: Any, event: Any, buffer: Any) -> list[Callable[[], object]]:
    stack = contextlib.ExitStack()
    own = stack.enter_context(mine.device.create_event())
    memory = stack.enter_context(mine.device.allocate(64))
    return [
        lambda: own.record(stream),
        lambda: mine.stream.wait(event),
        lambda: own.elapsed_ms(event),
        lambda: memory.copy_from_host(SAMPLE, stream),
        lambda: memory.copy_to_host((1,), "f4", stream),
        lambda: mine.context.enqueue_v3(stream),
        lambda: mine.context.set_tensor_address("x", buffer),
        stack.close,
    ]


@pytest.mark.parametrize("kind", ["another driver", "another ordinal"])
def test_objects_of_another_device(kind: str, mock_backend_factory: Any) -> None:
    backend = mock_backend_factory(devices=2)
    other = (backend, 1) if kind == "another ordinal" else (mock_backend_factory(), 0)
    with contextlib.ExitStack() as stack:
        mine = Rig(backend, stack)
        device = stack.enter_context(trtx.Device(other[1], backend=other[0]))
        stream, event = stack.enter_context(device.create_stream()), stack.enter_context(device.create_event())
        *uses, done = foreign_uses(mine, stream, event, stack.enter_context(device.allocate(64)))
        for use in uses:
            with pytest.raises(trtx.InvalidArgumentError, match=r"belongs to .*; expected one made from"):
                use()
        done()


@pytest.mark.parametrize("wrong", [None, "x", 1.5])
def test_things_that_are_no_peers(wrong: Any, rig: Rig) -> None:
    *uses, done = foreign_uses(rig, wrong, wrong, wrong)
    for use in uses:
        with pytest.raises(trtx.InvalidArgumentError, match="expected an"):
            use()
    done()
    for attempt in (
        lambda: trtx.Stream.from_handle(wrong, 0, owner=None),
        lambda: trtx.DeviceBuffer.from_handle(wrong, 256, 1, owner=None),
    ):
        with pytest.raises(trtx.InvalidArgumentError, match="expected a Device"):
            attempt()


# Memory that an enqueued inference still uses.


def test_a_replaced_address_is_in_use_until_its_work_has_ended(rig: Rig) -> None:
    first, second = rig.source(), rig.source(SAMPLE * 2)
    rig.context.set_tensor_address("x", first)
    gate = Gate(rig.backend, rig.device, rig.stream)
    rig.context.enqueue_v3(rig.stream)
    rig.context.set_tensor_address("x", second)
    with pytest.raises(trtx.BorrowedError, match="enqueued with its address is not finished"):
        first.close()
    gate.open()
    rig.stream.synchronize()
    np.testing.assert_allclose(rig.result(), RESULT, rtol=1e-5)
    first.close()  # the context is still open
    rig.context.enqueue_v3(rig.stream)
    np.testing.assert_allclose(rig.result(), RESULT * 2, rtol=1e-5)
    rig.context.close()
    second.close()


def test_later_work_does_not_hold_the_replaced_memory(rig: Rig) -> None:
    first, second = rig.source(), rig.source()
    rig.context.set_tensor_address("x", first)
    rig.context.enqueue_v3(rig.stream)
    rig.context.set_tensor_address("x", second)
    rig.stream.synchronize()
    gate = Gate(rig.backend, rig.device, rig.stream)
    rig.context.enqueue_v3(rig.stream)
    first.close()
    gate.open()
    rig.stream.synchronize()
    rig.context.close()
    second.close()


def test_aclose_of_replaced_memory_waits(rig: Rig) -> None:
    first, second = rig.source(), rig.source()
    rig.context.set_tensor_address("x", first)
    gate = Gate(rig.backend, rig.device, rig.stream)
    rig.context.enqueue_v3(rig.stream)
    rig.context.set_tensor_address("x", second)
    closing = threading.Thread(target=lambda: asyncio.run(first.aclose()))
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    gate.open()
    closing.join()
    np.testing.assert_allclose(rig.result(), RESULT, rtol=1e-5)
    rig.context.close()
    second.close()


@pytest.mark.parametrize("end", ["closed", "dropped"])
def test_owner_of_replaced_memory_is_kept(end: str, rig: Rig) -> None:
    foreign = Foreign()
    seen = weakref.ref(foreign)
    memory, second = rig.source(), rig.source()
    borrowed = trtx.DeviceBuffer.from_handle(rig.device, memory.address, 64, owner=foreign)
    del foreign
    rig.context.set_tensor_address("x", borrowed)
    gate = Gate(rig.backend, rig.device, rig.stream)
    rig.context.enqueue_v3(rig.stream)
    rig.context.set_tensor_address("x", second)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        if end == "closed":
            with pytest.raises(trtx.BorrowedError):
                borrowed.close()
        else:
            del borrowed
        gc.collect()
    assert seen() is not None
    gate.open()
    rig.stream.synchronize()
    if end == "closed":
        borrowed.close()
    trtx.live_objects()  # waits for the reaper
    gc.collect()
    assert seen() is None
    rig.context.close()
    memory.close()
    second.close()


# Requests that nobody waits for any more.


@pytest.mark.parametrize("level", ["engine", "context"])
def test_with_blocks_close_after_a_timeout(level: str, mock_backend_factory: Any) -> None:
    clock = GateClock()
    backend = mock_backend_factory(duration_s=0.2, clock=clock)

    def run(call: Any) -> None:
        try:
            call({"x": SAMPLE}, timeout_s=0.05)
        except TimeoutError:
            threading.Timer(0.05, clock.open).start()  # while the blocks are left
            raise

    with pytest.raises(TimeoutError):  # noqa: SIM117, PT012 - the blocks are the point
        with trtx.Runtime(None, backend) as runtime, runtime.deserialize_sync(shared_plan()) as engine:
            if level == "engine":
                run(engine.infer_sync)
            with engine.create_execution_context() as context:
                run(context.execute_sync)
    assert trtx.live_objects() == []
    assert (engine.closed, runtime.closed) == (True, True)


def test_with_blocks_close_after_an_interrupt(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    from mock_backend._context import MockContext

    entered, go_on = threading.Event(), threading.Event()
    real, wait = MockContext.execute_async_v3, threading.Event.wait

    def held(context: Any, stream: int) -> None:
        entered.set()
        assert wait(go_on, 30)
        real(context, stream)

    def interrupted(event: threading.Event, timeout: float | None = None) -> bool:
        if threading.current_thread() is not threading.main_thread() or sys._getframe(1).f_code.co_name != "wait_sync":
            return wait(event, timeout)
        assert wait(entered, 30)
        threading.Timer(0.05, go_on.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(MockContext, "execute_async_v3", held)
    monkeypatch.setattr(threading.Event, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with trtx.Runtime(None, mock_backend) as runtime, runtime.deserialize_sync(shared_plan()) as engine:
            engine.infer_sync({"x": SAMPLE})
    assert trtx.live_objects() == []


def test_the_bare_level_waits_for_a_cancelled_request(mock_backend_factory: Any) -> None:
    """Nobody waits for it, but it has the context."""
    clock = GateClock()
    backend = mock_backend_factory(duration_s=0.2, clock=clock)
    with trtx.Runtime(None, backend) as runtime, runtime.deserialize_sync(shared_plan()) as engine:  # noqa: SIM117
        with engine.create_execution_context() as context:
            with pytest.raises(TimeoutError):
                context.execute_sync({"x": SAMPLE}, timeout_s=0.05)
            clock.wait_reached_sync()
            with pytest.raises(trtx.BorrowedError, match="is executing"):
                context.set_input_shape("x", (2, 4))
            clock.open()


def test_a_dead_device_says_what_revives_it() -> None:
    lanes = Lanes("Engine#1", 1, lambda: pytest.fail("no lane is needed"))
    lanes._dead = trtx.CudaError(719, "CUDA_ERROR_LAUNCH_FAILED", "cuEventSynchronize")
    with pytest.raises(trtx.ExecutionError, match="close every engine, runtime and Device on that device"):
        lanes.submit(None)  # type: ignore[arg-type]


# The fixtures.


def test_what_a_test_dropped_is_no_leak(tmp_path: Path) -> None:
    """A cycle holds the objects, so nothing but the collector can find them before the fixture looks."""
    (tmp_path / "test_drop.py").write_text(
        textwrap.dedent("""
            import gc, pytest, trtx_py as trtx

            @pytest.mark.filterwarnings("ignore")
            def test_drop(mock_backend):
                gc.disable()
                device = trtx.Device(0, backend=mock_backend)
                cycle = [device, device.allocate(64), device.create_stream()]
                cycle.append(cycle)

            @pytest.mark.filterwarnings("ignore")
            def test_leak(mock_backend):
                pytest.kept = trtx.Device(0, backend=mock_backend).allocate(64)
        """)
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         "-W", "ignore::pytest.PytestAssertRewriteWarning", "--rootdir", str(tmp_path), str(tmp_path)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "ERROR at teardown of test_leak" in done.stdout, done.stdout + done.stderr
    assert "2 passed, 1 error" in done.stdout, done.stdout
