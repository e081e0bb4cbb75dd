"""Who may make, close and use what: the rules that all owned objects share."""

from __future__ import annotations

import asyncio
import copy
import pickle
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import trtx_py as trtx
from mock_backend import MockBackend, fail
from tests.unit.ownership import Gate, Tree, grow_tree, record_destruction, shared_plan, until
from trtx_py._resource import Handle, State, _close_subtree

FACTORIES = {
    trtx.Network: "builder.create_network()",
    trtx.BuilderConfig: "builder.create_config()",
    trtx.OptimizationProfile: "builder.create_optimization_profile()",
    trtx.Engine: "runtime.deserialize(plan)",
    trtx.ExecutionContext: "engine.create_execution_context()",
    trtx.Stream: "device.create_stream()",
    trtx.Event: "device.create_event()",
    trtx.DeviceBuffer: "device.allocate(nbytes)",
    trtx.PinnedBuffer: "device.allocate_pinned(nbytes)",
}


@pytest.mark.parametrize("kind", FACTORIES, ids=lambda kind: kind.__name__)
def test_only_owners_construct(kind: Any) -> None:
    with pytest.raises(TypeError, match=re.escape(FACTORIES[kind])):
        kind()
    assert trtx.live_objects() == []


def test_live_objects_lists_the_tree(mock_backend: MockBackend) -> None:
    tree = grow_tree(mock_backend)
    found = trtx.live_objects()
    rows = [(item.depth, item.kind, None if item.owner is None else item.owner.split("#")[0]) for item in found]
    assert rows == [
        (0, "Logger", None),
        (1, "Builder", "Logger"),
        (2, "Device", "Builder"),
        (2, "Network", "Builder"),
        (2, "OptimizationProfile", "Builder"),
        (2, "BuilderConfig", "Builder"),
        (1, "Runtime", "Logger"),
        (2, "Device", "Runtime"),
        (2, "Engine", "Runtime"),
        (3, "ExecutionContext", "Engine"),
        (0, "Device", None),
        (1, "Stream", "Device"),
        (1, "Event", "Device"),
        (1, "DeviceBuffer", "Device"),
        (1, "PinnedBuffer", "Device"),
    ]
    by_kind = {item.kind: item for item in found}
    assert all(re.search(r"ownership\.py:\d+ in grow_tree", item.made_at) for item in found)
    assert {item.state for item in found} == {"open"}
    assert [item.kind for item in found if item.internal] == ["Device", "Device"]
    assert (by_kind["DeviceBuffer"].device_bytes, by_kind["DeviceBuffer"].host_bytes) == (64, 0)
    assert (by_kind["PinnedBuffer"].device_bytes, by_kind["PinnedBuffer"].host_bytes) == (0, 64)
    assert by_kind["Engine"].device_bytes > 0
    assert by_kind["ExecutionContext"].device_bytes == tree.engine.device_memory_bytes()
    buffer = by_kind["DeviceBuffer"]
    assert str(buffer) == f"  {buffer.label} [open] made at {buffer.made_at}, 64 bytes device"
    tree.close()
    assert trtx.live_objects() == []


def test_close_with_live_children_names_each_and_where_it_was_made(mock_backend: MockBackend) -> None:
    tree = grow_tree(mock_backend)
    expected = {
        "logger": ["Builder", "Runtime"],
        "builder": ["Network", "OptimizationProfile", "BuilderConfig"],
        "runtime": ["Engine"],
        "engine": ["ExecutionContext"],
        "device": ["Stream", "Event", "DeviceBuffer", "PinnedBuffer"],
    }
    for owner, kinds in expected.items():
        item = tree.objects()[owner]
        with pytest.raises(trtx.BorrowedError) as caught:
            item.close()
        assert [who.split("#")[0] for who in caught.value.borrowers] == kinds
        for borrower in caught.value.borrowers:
            assert borrower in str(caught.value)
            assert re.search(r"made at .*ownership\.py:\d+ in grow_tree", borrower)
        assert not item.closed
    assert len(trtx.live_objects()) == 15  # nothing was closed
    tree.close()


def test_close_is_idempotent(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = grow_tree(mock_backend)
    tree.close()
    log = record_destruction(mock_backend, monkeypatch)
    for item in tree.objects().values():
        item.close()
        asyncio.run(item.aclose())
        assert item.closed
        assert "closed" in repr(item)
    assert log == []


ORDER = {
    "logger": [
        "execution context", "engine", "runtime", "cuDevicePrimaryCtxRelease",
        "network", "builder", "cuDevicePrimaryCtxRelease",
    ],
    "runtime": ["execution context", "engine", "runtime", "cuDevicePrimaryCtxRelease"],
    "builder": ["network", "builder", "cuDevicePrimaryCtxRelease"],
    "engine": ["execution context", "engine"],
    "device": ["cuMemFreeHost", "cuMemFree", "cuEventDestroy", "cuStreamDestroy", "cuDevicePrimaryCtxRelease"],
}  # fmt: skip


@pytest.mark.parametrize("root", ORDER)
def test_aclose_destroys_children_first(root: str, mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    log = record_destruction(mock_backend, monkeypatch)
    tree = grow_tree(mock_backend)
    assert log == []
    asyncio.run(tree.objects()[root].aclose())
    assert log == ORDER[root]
    asyncio.run(tree.logger.aclose())
    asyncio.run(tree.device.aclose())


def test_an_owners_native_object_goes_before_its_device(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = record_destruction(mock_backend, monkeypatch)
    trtx.Builder(None, mock_backend).close()
    trtx.Runtime(None, mock_backend).close()
    assert log == ["builder", "cuDevicePrimaryCtxRelease", "runtime", "cuDevicePrimaryCtxRelease"]


async def test_what_an_owner_made_for_itself_is_closed_with_it_only(mock_backend: MockBackend) -> None:
    runtime = trtx.Runtime(None, mock_backend)
    for attempt in (runtime.device.close, lambda: asyncio.run(runtime.device.aclose())):
        with pytest.raises(trtx.BorrowedError, match="closed together with it") as caught:
            await asyncio.to_thread(attempt)
        assert caught.value.borrowers[0].startswith("Runtime#")
    assert not runtime.device.closed
    runtime.close()
    assert runtime.device.closed
    runtime.device.close()


async def test_aclose_drains_first(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    device = trtx.Device(0, backend=mock_backend)
    stream = device.create_stream()
    gate = Gate(mock_backend, device, stream)
    log = record_destruction(mock_backend, monkeypatch)
    with pytest.raises(trtx.BorrowedError, match="has not finished"):
        stream.close()
    closing = asyncio.create_task(device.aclose())
    await until(lambda: device.closed)
    with pytest.raises(trtx.ClosedError):
        device.create_event()
    with pytest.raises(trtx.BorrowedError, match="being closed by aclose"):
        device.close()
    assert log == []
    gate.open()
    await closing
    assert log == ["cuStreamDestroy", "cuDevicePrimaryCtxRelease"]


async def test_cancelled_aclose_goes_on_to_its_end(mock_backend: MockBackend) -> None:
    device = trtx.Device(0, backend=mock_backend)
    stream = device.create_stream()
    gate = Gate(mock_backend, device, stream)
    closing = asyncio.create_task(device.aclose())
    await until(lambda: device.closed)
    for _ in range(3):
        closing.cancel()
        await asyncio.sleep(0)
    assert not closing.done()
    assert trtx.live_objects()[0].state == "closing"
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert trtx.live_objects() == []


async def test_many_acloses_at_once_release_once(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    log = record_destruction(mock_backend, monkeypatch)
    tree = grow_tree(mock_backend)
    assert log == []
    # parents and children together: their subtrees overlap
    wanted = [tree.context, tree.runtime, tree.engine, tree.logger, tree.builder, tree.network, tree.logger]
    await asyncio.gather(*[item.aclose() for item in wanted])
    assert sorted(log) == sorted(ORDER["logger"])
    assert log.index("execution context") < log.index("engine") < log.index("runtime")
    assert log.index("network") < log.index("builder")
    await tree.device.aclose()


async def test_overlapping_acloses_wait_for_one_another(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one thread destroys a child, another that closes its owner neither repeats that nor goes on without it."""
    log = record_destruction(mock_backend, monkeypatch)
    runtime = trtx.Runtime(None, mock_backend)
    engine = runtime.deserialize_sync(shared_plan())
    entered, go_on = threading.Event(), threading.Event()
    release = engine._handle.release
    assert release is not None
    releases: list[str] = []

    def held() -> None:
        releases.append(threading.current_thread().name)
        entered.set()
        assert go_on.wait(30)
        release()

    engine._handle.release = held
    child = asyncio.create_task(engine.aclose())
    assert await asyncio.to_thread(entered.wait, 30)
    reached = threading.Event()
    runtime._handle.drain = reached.set  # the last thing before the parent's thread comes to the child
    parent = asyncio.create_task(runtime.aclose())
    assert await asyncio.to_thread(reached.wait, 30)
    assert log == []
    go_on.set()
    await asyncio.gather(child, parent)
    assert len(releases) == 1
    assert log == ["engine", "runtime", "cuDevicePrimaryCtxRelease"]


async def test_nothing_is_released_while_another_thread_drains_it(mock_backend: MockBackend) -> None:
    """Two threads close subtrees that overlap: the child's own thread waits until the owner's has drained the child."""
    async with trtx.Device(0, backend=mock_backend) as device:
        child = device.create_stream()
        owner = device._handle
        drain, release = child._handle.drain, child._handle.release
        assert drain is not None
        assert release is not None
        draining, go_on = threading.Event(), threading.Event()
        log: list[str] = []

        def held() -> None:
            draining.set()
            assert go_on.wait(30)
            drain()
            log.append("drained")

        def released() -> None:
            log.append("released")
            release()

        child._handle.drain, child._handle.release = held, released
        closing_owner = asyncio.create_task(device.aclose())
        assert await asyncio.to_thread(draining.wait, 30)
        burying = asyncio.create_task(asyncio.to_thread(_close_subtree, child._handle))
        await asyncio.to_thread(burying_is_due, child._handle)
        assert log == []
        go_on.set()
        await asyncio.gather(closing_owner, burying)
        assert log == ["drained", "released"]
        assert owner.state is State.CLOSED


def burying_is_due(handle: Handle) -> None:
    """Give the thread that is about to release ``handle`` every chance to do so too early."""
    for _ in range(50):
        if handle.claimed:
            return
        time.sleep(0.001)


async def test_what_another_thread_releases_is_not_drained(mock_backend: MockBackend) -> None:
    """Its handle may be gone at any moment: draining it would wait on a destroyed stream."""
    device = trtx.Device(0, backend=mock_backend)
    child = device.create_stream()
    release = child._handle.release
    assert release is not None
    releasing, go_on, drains = threading.Event(), threading.Event(), []

    def held() -> None:
        releasing.set()
        assert go_on.wait(30)
        release()

    child._handle.release = held
    closing = asyncio.create_task(child.aclose())
    assert await asyncio.to_thread(releasing.wait, 30)
    child._handle.drain = lambda: drains.append("drained")
    reached = threading.Event()
    device._handle.drain = reached.set  # the last thing before the owner's thread comes to the release
    owner = asyncio.create_task(device.aclose())
    assert await asyncio.to_thread(reached.wait, 30)
    go_on.set()
    await asyncio.gather(closing, owner)
    assert drains == []


def in_threads(count: int, function: Callable[[], Any]) -> list[Any]:
    """Results, or exceptions, of ``count`` threads that start at the same moment."""
    barrier, results = threading.Barrier(count), []

    def run() -> None:
        barrier.wait()
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_concurrent_close_releases_once(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    log = record_destruction(mock_backend, monkeypatch)
    runtime = trtx.Runtime(None, mock_backend)
    assert in_threads(8, runtime.close) == [None] * 8
    assert log == ["runtime", "cuDevicePrimaryCtxRelease"]


def test_second_close_waits_for_the_first(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    device = trtx.Device(0, backend=mock_backend)
    entered, go_on = threading.Event(), threading.Event()
    release = mock_backend.driver.cuDevicePrimaryCtxRelease

    def held(cu_device: int) -> None:
        entered.set()
        assert go_on.wait(30)
        release(cu_device)

    monkeypatch.setattr(mock_backend.driver, "cuDevicePrimaryCtxRelease", held)
    first = threading.Thread(target=device.close)
    first.start()
    assert entered.wait(30)
    after_second: list[str] = []

    def close_again() -> None:
        device.close()
        after_second.append(device._handle.state.value)

    second = threading.Thread(target=close_again)
    second.start()
    go_on.set()
    first.join()
    second.join()
    assert after_second == ["closed"]


def test_close_against_create_leaves_nothing(mock_backend: MockBackend) -> None:
    """Children made while their owner closes: either it is refused, or they cannot be made."""
    for _ in range(30):
        device = trtx.Device(0, backend=mock_backend)

        def work(device: trtx.Device = device) -> Any:
            asyncio.run(device.aclose())
            return device.create_event()

        results = in_threads(3, work)
        assert {type(result) for result in results} == {trtx.ClosedError}
        assert trtx.live_objects() == []


def test_aclose_waits_for_a_child_that_is_being_made(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child cannot be had, its native part is destroyed, and only then its owner's."""
    log = record_destruction(mock_backend, monkeypatch)
    runtime = trtx.Runtime(None, mock_backend)
    entered, go_on = threading.Event(), threading.Event()
    deserialize = runtime._native.deserialize

    def held(plan: Any) -> Any:
        entered.set()
        assert go_on.wait(30)
        return deserialize(plan)

    monkeypatch.setattr(runtime._native, "deserialize", held)
    outcome: list[Any] = []

    def make() -> None:
        try:
            outcome.append(runtime.deserialize_sync(shared_plan()))
        except trtx.TrtxError as error:
            outcome.append(error)

    maker = threading.Thread(target=make)
    maker.start()
    assert entered.wait(30)
    with pytest.raises(trtx.BorrowedError, match="Engine"):
        runtime.close()
    closer = threading.Thread(target=lambda: asyncio.run(runtime.aclose()))
    closer.start()
    while not runtime.closed:
        pass
    go_on.set()
    maker.join()
    closer.join()
    assert isinstance(outcome[0], trtx.ClosedError)
    assert log == ["engine", "runtime", "cuDevicePrimaryCtxRelease"]


def test_with_closes(mock_backend: MockBackend) -> None:
    with trtx.Logger() as logger, trtx.Builder(logger, mock_backend) as builder, builder.create_network() as network:
        assert not network.closed
    assert network.closed
    assert builder.closed
    assert logger.closed
    with pytest.raises(trtx.ClosedError), builder:
        pass


async def test_async_with_closes_the_subtree(mock_backend: MockBackend) -> None:
    async with trtx.Builder(None, mock_backend) as builder:
        network = builder.create_network()
    assert network.closed
    with pytest.raises(trtx.ClosedError):
        await builder.__aenter__()


def test_exception_in_the_body_is_not_masked_by_a_refused_close(
    mock_backend: MockBackend, caplog: pytest.LogCaptureFixture
) -> None:
    builder = trtx.Builder(None, mock_backend)
    error = ZeroDivisionError("the body's own")
    with pytest.raises(ZeroDivisionError) as caught, builder:  # noqa: PT012 - the block is the point
        network = builder.create_network()
        raise error
    assert caught.value is error
    text = f"closing {builder._handle} failed too"
    assert any(text in note for note in getattr(error, "__notes__", [text]))  # notes came with CPython 3.11
    assert text in caplog.text
    network.close()
    builder.close()


@pytest.mark.parametrize("failure", [fail("destroy"), None])
async def test_exception_in_the_body_is_not_masked_by_a_failing_release(
    failure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = MockBackend(faults=[] if failure is None else [failure])
    error = ZeroDivisionError("the body's own")
    with pytest.raises(ZeroDivisionError) as caught:  # noqa: PT012 - the block is the point
        async with trtx.Builder(None, backend) as builder:
            if failure is None:  # not even a typed error
                builder._handle.release = lambda: (_ for _ in ()).throw(RuntimeError("not typed"))
            raise error
    assert caught.value is error
    assert builder.closed


def test_release_that_fails_is_reported_and_the_rest_is_released(caplog: pytest.LogCaptureFixture) -> None:
    backend = MockBackend(faults=[fail("destroy", 1), fail("destroy", 2)])
    tree = grow_tree(backend)
    with pytest.raises(trtx.EngineError, match="execution context"):
        asyncio.run(tree.runtime.aclose())
    assert "while closing Runtime" in caplog.text  # the second failure is in the log
    assert tree.engine.closed
    assert tree.runtime.closed
    assert backend.calls["cuDevicePrimaryCtxRelease"] == 1
    asyncio.run(tree.logger.aclose())
    asyncio.run(tree.device.aclose())
    assert trtx.live_objects() == []


def test_a_release_that_raises_something_else_does_not_stop_the_others(mock_backend: MockBackend) -> None:
    tree = grow_tree(mock_backend)
    release = tree.engine._handle.release
    assert release is not None

    def broken() -> None:
        release()
        raise OSError("no typed error")

    tree.engine._handle.release = broken
    with pytest.raises(OSError, match="no typed error"):
        asyncio.run(tree.logger.aclose())
    assert tree.logger.closed
    asyncio.run(tree.device.aclose())


def test_owned_objects_are_not_values(mock_backend: MockBackend) -> None:
    with trtx.Device(0, backend=mock_backend) as device:
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot be pickled"):
                attempt(device)


def test_child_keeps_its_owners_alive(mock_backend: MockBackend) -> None:
    engine = trtx.Runtime(trtx.Logger(), mock_backend).deserialize_sync(shared_plan())
    assert [item.kind for item in trtx.live_objects()] == ["Logger", "Runtime", "Device", "Engine"]
    runtime = engine.runtime
    logger = runtime._parent
    assert logger is not None
    engine.close()
    runtime.close()
    logger.close()


def test_loans() -> None:
    handle = Handle("Thing", None)
    handle.link()
    handle.opened()
    kept = threading.Lock()
    loan = handle.lend("somebody", Handle("Other", None), keep=kept)
    assert handle.blockers(handle) == ["somebody"]
    assert handle.lasting_loans(handle) == ["somebody"]
    loan.end()
    loan.end()
    assert handle.blockers(handle) == []
    with handle.lend("an operation"):
        assert handle.lasting_loans(handle) == []
        assert handle.blockers(handle) == ["an operation"]
    handle.unlink()
    assert handle.state is State.CLOSED
    with pytest.raises(trtx.ClosedError):
        handle.lend("too late")


def test_tree_helper_closes_everything(mock_backend: MockBackend) -> None:
    tree: Tree = grow_tree(mock_backend)
    tree.close()
    assert all(item.closed for item in tree.objects().values())
