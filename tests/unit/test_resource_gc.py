"""Open objects that nobody refers to any more: warned about, and destroyed in the right order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import trtx_py as trtx
from mock_backend import MockBackend, fail
from tests.unit.ownership import SAMPLE, Gate, Tree, grow_tree, record_destruction, shared_plan
from trtx_py._resource import _process


@contextlib.contextmanager
def told(texts: list[str]) -> Iterator[None]:
    """Collects the texts of ResourceWarnings; recorded warnings would keep the objects that they are about."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        assert category is ResourceWarning
        texts.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", ResourceWarning)
        warnings.showwarning = show
        yield


def collect(drop: Callable[[], Any]) -> list[str]:
    """Texts of the ResourceWarnings that come when what ``drop`` made is collected."""
    texts: list[str] = []
    with told(texts):
        drop()
        left = None
        for _ in range(3):  # what is native below a logger refers to it until it is released: one round for each level
            gc.collect()
            left = trtx.live_objects()
        assert left == []
    return texts


def test_collected_open_object_warns_with_where_it_was_made(mock_backend: MockBackend) -> None:
    texts = collect(lambda: trtx.Device(0, backend=mock_backend).create_stream())
    assert sorted(text.split("#")[0] for text in texts) == ["unclosed Device", "unclosed Stream"]
    assert all(re.search(r"made at .*test_resource_gc\.py:\d+ in <lambda>", text) for text in texts)


def test_closed_objects_do_not_warn(mock_backend: MockBackend) -> None:
    def use() -> None:
        with trtx.Device(0, backend=mock_backend) as device:
            device.create_event().close()

    assert collect(use) == []


def check_order(log: list[str]) -> None:
    assert log.index("execution context") < log.index("engine") < log.index("runtime"), log
    assert log.index("network") < log.index("builder"), log
    for owner in ("runtime", "builder"):  # each has a device of its own, which goes right after it
        assert log[log.index(owner) + 1] == "cuDevicePrimaryCtxRelease", log


def test_collected_tree_is_destroyed_in_order(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    log = record_destruction(mock_backend, monkeypatch)
    texts = collect(lambda: grow_tree(mock_backend))
    # every object but the two devices that builder and runtime made for themselves
    assert len(texts) == 13
    check_order(log)
    last = len(log) - 1 - log[::-1].index("cuDevicePrimaryCtxRelease")
    assert all(log.index(call) < last for call in ("cuMemFree", "cuMemFreeHost", "cuStreamDestroy", "cuEventDestroy"))
    assert log.count("cuDevicePrimaryCtxRelease") == 3


@pytest.mark.parametrize("seed", range(6))
def test_collected_cycle_is_destroyed_in_order(
    seed: int, mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector finalizes the objects of a cycle in any order: here in six."""
    log = record_destruction(mock_backend, monkeypatch)

    def make() -> None:
        tree = grow_tree(mock_backend)
        items = list(tree.objects().values())
        turned = items[seed * 2 :] + items[: seed * 2]
        ring: list[Any] = []
        for item in turned:
            item.ring = ring
        ring.extend(turned if seed % 2 else reversed(turned))

    texts = collect(make)
    assert len(texts) == 13
    check_order(log)


def test_engine_with_lanes_is_collected(mock_backend: MockBackend) -> None:
    """Lanes and their threads do not keep their engine alive, and end with it."""

    def use() -> None:
        engine = trtx.Runtime(None, mock_backend).deserialize_sync(shared_plan())
        engine.infer_sync({"x": SAMPLE})

    before = threading.active_count()
    assert sorted(text.split("#")[0] for text in collect(use)) == ["unclosed Engine", "unclosed Runtime"]
    assert threading.active_count() <= max(before, 2)  # the reaper may be new


def test_lent_buffer_lives_as_long_as_the_context_uses_it(mock_backend: MockBackend) -> None:
    with (
        trtx.Runtime(None, mock_backend) as runtime,
        runtime.deserialize_sync(shared_plan()) as engine,
        engine.create_execution_context() as context,
    ):
        buffer = runtime.device.allocate(64)
        seen = weakref.ref(buffer)
        context.set_tensor_address("x", buffer)
        del buffer
        gc.collect()
        assert seen() is not None
        assert "DeviceBuffer" in [item.kind for item in trtx.live_objects()]
        texts: list[str] = []
        with told(texts):
            context.set_tensor_address("x", 0x2000_0000_0100)  # replaced: nobody uses the buffer any more
            gc.collect()
            assert "DeviceBuffer" not in [item.kind for item in trtx.live_objects()]
        assert [text.split("#")[0] for text in texts] == ["unclosed DeviceBuffer"]


def test_lent_buffer_in_a_cycle_with_its_context(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the two is finalized first: the context goes before the memory that it was told to use."""
    log = record_destruction(mock_backend, monkeypatch)
    for flip in (False, True):
        log.clear()

        def make(flip: bool = flip) -> None:
            device = trtx.Device(0, backend=mock_backend)
            buffer = device.allocate(64)
            engine = trtx.Runtime(None, mock_backend).deserialize_sync(shared_plan())
            context: Any = engine.create_execution_context()
            context.set_tensor_address("x", buffer)
            context.ring = [context, buffer] if flip else [buffer, context]

        collect(make)
        assert log.index("execution context") < log.index("cuMemFree")


def test_collected_object_that_is_lent_goes_when_the_loan_ends(mock_backend: MockBackend) -> None:
    """Even if the borrower did not keep the object: what it stands for is still in use."""
    with trtx.Device(0, backend=mock_backend) as device, device.create_event() as borrower:
        buffer: Any = device.allocate(64)
        loan = buffer._handle.lend("somebody", borrower._handle)
        texts: list[str] = []
        with told(texts):
            del buffer
            gc.collect()
            assert "DeviceBuffer" in [item.kind for item in trtx.live_objects()]
            assert mock_backend.calls["cuMemFree"] == 0
            loan.end()
            assert "DeviceBuffer" not in [item.kind for item in trtx.live_objects()]
        assert mock_backend.calls["cuMemFree"] == 1
        assert len(texts) == 1


def test_borrowed_owner_lives_until_the_stream_is_done(mock_backend: MockBackend) -> None:
    class Foreign:
        """Stands for a torch stream."""

    with trtx.Device(0, backend=mock_backend) as device, device.create_stream() as real:
        foreign = Foreign()
        seen = weakref.ref(foreign)
        stream = trtx.Stream.from_handle(device, real.handle, owner=foreign)
        del foreign
        gate = Gate(mock_backend, device, stream)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del stream
            gc.collect()
        assert seen() is not None  # the reaper waits for the work
        gate.open()
        trtx.live_objects()
        gc.collect()
        assert seen() is None


def test_warnings_as_errors_are_seen_and_the_object_is_released(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append(args.exc_type))
    trtx.Device(0, backend=mock_backend)
    gc.collect()
    assert trtx.live_objects() == []
    assert unraisable == [ResourceWarning]


def test_failing_release_after_collection_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    backend = MockBackend(faults=[fail("cuStreamDestroy")])
    with caplog.at_level(logging.ERROR, "trtx_py"):
        collect(lambda: trtx.Device(0, backend=backend).create_stream())
    assert "after it was garbage collected failed" in caplog.text


def test_the_reaper_can_ask_what_is_open(mock_backend: MockBackend) -> None:
    """live_objects() waits for the reaper, but not when the reaper itself asks, as a log handler may."""
    answers: list[int] = []
    device: Any = trtx.Device(0, backend=mock_backend)
    release = device._handle.release

    def asking() -> None:
        answers.append(len(trtx.live_objects()))
        release()

    device._handle.release = asking
    release_later = [device]
    del device
    assert collect(release_later.clear) != []
    assert answers == [1]


def test_parent_collected_before_its_child_is_closed(mock_backend: MockBackend) -> None:
    """Only possible by force: the parent waits on the queue until the child has gone."""
    device = trtx.Device(0, backend=mock_backend)
    event = device.create_event()
    _process.graveyard.put(device._handle)
    assert [item.kind for item in trtx.live_objects()] == ["Device", "Event"]
    event.close()
    assert trtx.live_objects() == []
    assert device.closed


def test_aclose_of_a_tree_with_a_collected_part(mock_backend: MockBackend) -> None:
    tree: Tree = grow_tree(mock_backend)
    device = tree.device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        tree.buffer = tree.stream = None  # type: ignore[assignment]
        gc.collect()
        asyncio.run(device.aclose())
    assert device.closed
    assert not {"Stream", "Event", "DeviceBuffer", "PinnedBuffer"} & {item.kind for item in trtx.live_objects()}
    asyncio.run(tree.logger.aclose())
    assert trtx.live_objects() == []
