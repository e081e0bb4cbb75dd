"""ExecutionContext: the bare level owned and checked, and who may have which optimization profile."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, fail
from tests.unit.ownership import SAMPLE, WEIGHTS, Gate, build_plan, exclusive_plan, matmul_model, shared_plan

RESULT = SAMPLE @ WEIGHTS


class Bare:
    """An engine with a context, buffers that fit SAMPLE, and a stream."""

    def __init__(self, backend: MockBackend, plan: trtx.Plan, stack: contextlib.ExitStack) -> None:
        enter: Any = stack.enter_context
        self.backend = backend
        self.runtime: trtx.Runtime = enter(trtx.Runtime(None, backend))
        self.device = self.runtime.device
        self.engine: trtx.Engine = enter(self.runtime.deserialize_sync(plan))
        self.x: trtx.DeviceBuffer = enter(self.device.allocate(256))
        self.y: trtx.DeviceBuffer = enter(self.device.allocate(256))
        self.stream: trtx.Stream = enter(self.device.create_stream())
        self.context: trtx.ExecutionContext = enter(self.engine.create_execution_context())

    def bind(self) -> None:
        self.context.set_input_shape("x", (2, 4))
        self.context.set_tensor_address("x", self.x)
        self.context.set_tensor_address("y", self.y)
        self.x.copy_from_host(SAMPLE, self.stream)


@pytest.fixture
def bare(mock_backend: MockBackend) -> Iterator[Bare]:
    with contextlib.ExitStack() as stack:
        yield Bare(mock_backend, shared_plan(), stack)


def test_bare_level(bare: Bare) -> None:
    assert bare.context.get_tensor_shape("y") == (-1, 3)
    bare.bind()
    assert bare.context.get_tensor_shape("x") == (2, 4)
    assert bare.context.get_tensor_shape("y") == (2, 3)
    assert bare.context.active_optimization_profile == 0
    assert bare.context.engine is bare.engine
    bare.context.enqueue_v3(bare.stream)
    np.testing.assert_allclose(bare.y.copy_to_host((2, 3), "f4", bare.stream), RESULT, rtol=1e-5)


def test_bare_pointers_and_handles(bare: Bare) -> None:
    bare.context.set_input_shape("x", np.array([2, 4]))
    bare.context.set_tensor_address("x", bare.x.address)
    bare.context.set_tensor_address("y", bare.y.address)
    bare.x.copy_from_host(SAMPLE, bare.stream)
    bare.context.enqueue_v3(bare.stream.handle)
    np.testing.assert_allclose(bare.y.copy_to_host((2, 3), "f4", bare.stream), RESULT, rtol=1e-5)
    with bare.device.allocate(64) as loose:
        bare.context.set_tensor_address("x", loose.address)
    assert bare.x._handle.loans == {}  # for a bare pointer the caller answers


@pytest.mark.parametrize(
    ("shape", "error"),
    [((9, 4), trtx.ShapeError), ((0, 4), trtx.ShapeError), ((2, 5), trtx.ShapeError), ((2,), trtx.ShapeError),
     ((2, 4, 1), trtx.ShapeError), ((-1, 4), trtx.ShapeError), ((2.0, 4), trtx.ShapeError), ("24", trtx.ShapeError),
     (None, trtx.ShapeError), ((float("nan"), 4), trtx.ShapeError)],
)  # fmt: skip
def test_shapes_that_cannot_be(shape: Any, error: type, bare: Bare) -> None:
    with pytest.raises(error):
        bare.context.set_input_shape("x", shape)
    bare.context.set_input_shape("x", (8, 4))  # and nothing was spoilt


def test_names_that_are_not_there(bare: Bare) -> None:
    for attempt in (
        lambda: bare.context.set_input_shape("y", (2, 3)),
        lambda: bare.context.set_input_shape("z", (2, 3)),
        lambda: bare.context.get_tensor_shape("z"),
        lambda: bare.context.set_tensor_address("z", bare.x),
    ):
        with pytest.raises(trtx.InvalidArgumentError, match="the engine has"):
            attempt()


def test_addresses_that_cannot_be(bare: Bare) -> None:
    with bare.device.allocate_pinned(64) as pinned, trtx.Device(0, backend=MockBackend()) as foreign:
        with pytest.raises(trtx.InvalidArgumentError, match="lies on the device: expected a DeviceBuffer"):
            bare.context.set_tensor_address("x", pinned)
        with foreign.allocate(64) as buffer, pytest.raises(trtx.InvalidArgumentError, match="belongs to"):
            bare.context.set_tensor_address("x", buffer)
        with foreign.create_stream() as stream, pytest.raises(trtx.InvalidArgumentError, match="belongs to"):
            bare.context.enqueue_v3(stream)
    for address in (0, -1, 1.5, None, "0x10", True):
        with pytest.raises(trtx.InvalidArgumentError, match="address"):
            bare.context.set_tensor_address("x", address)  # type: ignore[arg-type]
    for stream_handle in (-1, None, 1.5):
        with pytest.raises(trtx.InvalidArgumentError, match="stream"):
            bare.context.enqueue_v3(stream_handle)  # type: ignore[arg-type]


def test_enqueue_refuses_what_is_not_ready(bare: Bare) -> None:
    with pytest.raises(trtx.ExecutionError, match="no address"):
        bare.context.enqueue_v3(bare.stream)
    bare.context.set_tensor_address("x", bare.x)
    with pytest.raises(trtx.ExecutionError, match="no shape"):
        bare.context.enqueue_v3(bare.stream)
    bare.context.set_input_shape("x", (8, 4))
    with bare.device.allocate(95) as small:
        bare.context.set_tensor_address("y", small)
        with pytest.raises(trtx.ExecutionError, match="needs 96 bytes, its buffer has 95"):
            bare.context.enqueue_v3(bare.stream)
        bare.context.set_tensor_address("y", bare.y)
    bare.context.enqueue_v3(bare.stream)
    bare.stream.synchronize()
    assert bare.backend.calls["execute"] == 1


def test_lent_buffer_cannot_be_closed(bare: Bare) -> None:
    bare.bind()
    with pytest.raises(trtx.BorrowedError, match=r"ExecutionContext#\d+ as the address of 'x'"):
        bare.x.close()
    with pytest.raises(trtx.BorrowedError):
        asyncio.run(bare.x.aclose())
    with bare.device.allocate(64) as other:
        bare.context.set_tensor_address("x", other)
        bare.x.close()
        with pytest.raises(trtx.BorrowedError):
            other.close()
        bare.context.close()


def test_a_refused_address_is_not_lent(bare: Bare) -> None:
    bare.backend.inject(fail("set_tensor_address"))
    with pytest.raises(trtx.TrtxError):
        bare.context.set_tensor_address("x", bare.x)
    bare.x.close()


def test_close_with_work_in_flight(bare: Bare) -> None:
    """Asked from a thread where no device is current, as everywhere outside the library."""
    bare.bind()
    gate = Gate(bare.backend, bare.device, bare.stream)
    bare.context.enqueue_v3(bare.stream)
    with pytest.raises(trtx.BorrowedError, match="enqueue_v3 is not finished"):
        bare.context.close()
    with pytest.raises(trtx.BorrowedError, match="synchronize that stream first"):
        bare.context.execute_sync({"x": SAMPLE})
    closing = threading.Thread(target=lambda: asyncio.run(bare.context.aclose()))
    closing.start()
    while not bare.context.closed:
        pass
    assert bare.x._handle.loans  # still lent: the work is in flight
    gate.open()
    closing.join()
    assert not bare.x._handle.loans
    np.testing.assert_allclose(bare.y.copy_to_host((2, 3), "f4", bare.stream), RESULT, rtol=1e-5)


def test_nothing_closes_during_a_call_of_the_bare_level(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    bare.bind()
    native: Any = bare.context._execution.open_context()
    entered, go_on = threading.Event(), threading.Event()
    enqueue = native.execute_async_v3

    def held(stream: int) -> None:
        entered.set()
        assert go_on.wait(30)
        enqueue(stream)

    monkeypatch.setattr(native, "execute_async_v3", held)
    calling = threading.Thread(target=bare.context.enqueue_v3, args=(bare.stream,))
    calling.start()
    assert entered.wait(30)
    with pytest.raises(trtx.BorrowedError, match="a call of the bare level"):
        bare.context.close()
    go_on.set()
    calling.join()
    bare.stream.synchronize()


async def test_execute_and_the_bare_level_take_turns(bare: Bare) -> None:
    bare.bind()
    outputs = await bare.context.execute({"x": SAMPLE})
    np.testing.assert_allclose(outputs["y"], RESULT, rtol=1e-5)
    assert not bare.x._handle.loans  # execute forgets the bare level's addresses
    with pytest.raises(trtx.ExecutionError, match="no address"):
        bare.context.enqueue_v3(bare.stream)
    bare.bind()
    bare.context.enqueue_v3(bare.stream)
    np.testing.assert_allclose(bare.y.copy_to_host((2, 3), "f4", bare.stream), RESULT, rtol=1e-5)


def test_several_contexts_at_once(bare: Bare) -> None:
    with bare.engine.create_execution_context() as one, bare.engine.create_execution_context() as two:
        results = [context.execute_sync({"x": SAMPLE})["y"] for context in (one, two, bare.context)]
    for result in results:
        np.testing.assert_allclose(result, RESULT, rtol=1e-5)


TWO_PROFILES = [((1, 4), (2, 4), (4, 4)), ((5, 4), (6, 4), (16, 4))]


@pytest.fixture
def ranged(mock_backend: MockBackend) -> Iterator[Bare]:
    """A plan with two profiles that do not overlap."""
    with (
        trtx.Builder(None, mock_backend) as builder,
        builder.create_network() as network,
        builder.create_config() as config,
    ):
        network.parse_onnx(matmul_model())
        for limits in TWO_PROFILES:
            with builder.create_optimization_profile() as profile:
                profile.set_shape("x", *limits)
                config.add_optimization_profile(profile)
        plan = builder.build_serialized_network_sync(network, config)
    with contextlib.ExitStack() as stack:
        yield Bare(mock_backend, plan, stack)


def test_profile_is_chosen_by_shape(ranged: Bare) -> None:
    context = ranged.context
    context.set_input_shape("x", (3, 4))
    assert context.active_optimization_profile == 0
    context.set_input_shape("x", (7, 4))
    assert context.active_optimization_profile == 1
    assert context.get_tensor_shape("y") == (7, 3)
    context.set_optimization_profile(0)
    assert context.active_optimization_profile == 0
    assert context.get_tensor_shape("y") == (-1, 3)  # the shapes are forgotten
    for index in (-1, 2, 0.5, None):
        with pytest.raises(trtx.InvalidArgumentError, match="profile"):
            context.set_optimization_profile(index)  # type: ignore[arg-type]
    with pytest.raises(trtx.ShapeError, match=r"profile 0: \[1, 4\]\.\.\[4, 4\], profile 1: \[5, 4\]\.\.\[16, 4\]"):
        context.set_input_shape("x", (17, 4))
    for rows in (1, 4, 5, 16):
        outputs = context.execute_sync({"x": np.ones((rows, 4), np.float32)})
        np.testing.assert_allclose(outputs["y"], np.ones((rows, 4), np.float32) @ WEIGHTS, rtol=1e-5)


@pytest.fixture
def engines(mock_backend: MockBackend) -> Iterator[Any]:
    """Makes engines of plans that do not share profiles."""
    with contextlib.ExitStack() as stack:
        runtime = stack.enter_context(trtx.Runtime(None, mock_backend))
        yield lambda profiles=1: stack.enter_context(runtime.deserialize_sync(exclusive_plan(profiles), lanes=2))


def test_second_context_on_an_exclusive_profile(engines: Any) -> None:
    engine = engines()
    with engine.create_execution_context() as first:
        with pytest.raises(trtx.BorrowedError) as caught:
            engine.create_execution_context()
        assert caught.value.borrowers == (first._handle.describe(),)
        assert f"{first._handle}" in str(caught.value)
        assert "test_context.py" in str(caught.value)
        kinds = [item.kind for item in trtx.live_objects() if item.kind == "ExecutionContext"]
        assert len(kinds) == 1  # the refused one left nothing
        first.execute_sync({"x": SAMPLE})
    with engine.create_execution_context() as again:
        np.testing.assert_allclose(again.execute_sync({"x": SAMPLE})["y"], RESULT, rtol=1e-5)


async def test_infer_names_the_users_context(engines: Any) -> None:
    engine = engines()
    with engine.create_execution_context() as mine:
        for _ in range(2):
            with pytest.raises(trtx.BorrowedError) as caught:
                await engine.infer({"x": SAMPLE})
            assert caught.value.borrowers == (mine._handle.describe(),)
    np.testing.assert_allclose((await engine.infer({"x": SAMPLE}))["y"], RESULT, rtol=1e-5)


async def test_idle_lanes_step_back(engines: Any) -> None:
    engine = engines()
    await asyncio.gather(*[engine.infer({"x": SAMPLE}) for _ in range(8)])
    with engine.create_execution_context() as mine:
        np.testing.assert_allclose((await mine.execute({"x": SAMPLE}))["y"], RESULT, rtol=1e-5)
        with pytest.raises(trtx.BorrowedError):
            await engine.infer({"x": SAMPLE})
    await engine.infer({"x": SAMPLE})


async def test_no_lane_takes_back_what_it_gave(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the lanes' step back and the caller's claim no lane begins anything: a capture, say."""
    engine = engines()
    await engine.infer({"x": SAMPLE})
    lanes, claim = engine._front.lanes, trtx.ExecutionContext._claim_profile
    could_begin: list[bool] = []

    def look(context: trtx.ExecutionContext) -> None:
        def try_to_begin() -> None:  # as a lane's thread does it: under this lock
            could_begin.append(lanes._lock.acquire(blocking=False))
            if could_begin[-1]:
                lanes._lock.release()

        other = threading.Thread(target=try_to_begin)
        other.start()
        other.join()
        claim(context)

    monkeypatch.setattr(trtx.ExecutionContext, "_claim_profile", look)
    with engine.create_execution_context() as mine:
        np.testing.assert_allclose((await mine.execute({"x": SAMPLE}))["y"], RESULT, rtol=1e-5)
    assert could_begin == [False]


async def test_two_profiles_serve_two_contexts(engines: Any) -> None:
    engine = engines(2)
    with engine.create_execution_context() as one:
        await engine.infer({"x": SAMPLE})  # the lane takes the other profile
        with engine.create_execution_context() as two:  # and gives it back
            for context in (one, two):
                np.testing.assert_allclose((await context.execute({"x": SAMPLE}))["y"], RESULT, rtol=1e-5)
            assert {one.active_optimization_profile, two.active_optimization_profile} == {0, 1}
            with pytest.raises(trtx.BorrowedError) as caught:
                engine.create_execution_context()
            assert set(caught.value.borrowers) == {one._handle.describe(), two._handle.describe()}


def test_bare_level_on_a_taken_profile(engines: Any) -> None:
    engine = engines(2)
    with engine.create_execution_context() as one, engine.create_execution_context() as two:
        taken = one.active_optimization_profile
        with pytest.raises(trtx.BorrowedError) as caught:
            two.set_optimization_profile(taken)
        assert caught.value.borrowers == (one._handle.describe(),)
        two.set_input_shape("x", (2, 4))


async def test_busy_lane_does_not_step_back(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mock_backend._context import MockContext

    engine = engines()
    entered, go_on = threading.Event(), threading.Event()
    real = MockContext.execute_async_v3

    def held(context: Any, stream: int) -> None:
        entered.set()
        assert go_on.wait(30)
        real(context, stream)

    monkeypatch.setattr(MockContext, "execute_async_v3", held)
    running = asyncio.create_task(engine.infer({"x": SAMPLE}))
    await asyncio.sleep(0)
    assert await asyncio.to_thread(entered.wait, 30)
    with pytest.raises(trtx.BorrowedError, match="request in flight on Lane"):
        engine.create_execution_context()
    go_on.set()
    await running
    engine.create_execution_context().close()


def test_static_shapes_need_no_profile_of_their_own(mock_backend: MockBackend) -> None:
    with (
        trtx.Builder(None, mock_backend) as builder,
        builder.create_network() as network,
        builder.create_config() as config,
    ):
        network.parse_onnx(matmul_model(2))
        plan = builder.build_serialized_network_sync(network, config)
    with contextlib.ExitStack() as stack:
        bare = Bare(mock_backend, plan, stack)
        assert bare.context.get_tensor_shape("x") == (2, 4)
        with pytest.raises(trtx.ShapeError, match=r"no dynamic axis|does not fit"):
            bare.context.set_input_shape("x", (3, 4))
        bare.bind()
        bare.context.enqueue_v3(bare.stream)
        np.testing.assert_allclose(bare.y.copy_to_host((2, 3), "f4", bare.stream), RESULT, rtol=1e-5)


def test_helper_plans_differ() -> None:
    assert build_plan().header.build_options["profile_sharing"] is True
    assert exclusive_plan().header.build_options["profile_sharing"] is False
