"""Builder and Network: one build at a time, cancellable, and nothing of another builder's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import trtx_py as trtx
from mock_backend import MockBackend, fail
from tests.unit.ownership import PROFILE, matmul_model, until


class Kit:
    """A builder with a parsed network and a config with a profile."""

    def __init__(self, backend: MockBackend) -> None:
        self.backend = backend
        self.builder = trtx.Builder(None, backend)
        self.network = self.builder.create_network()
        self.network.parse_onnx(matmul_model())
        self.config = self.builder.create_config()
        with self.builder.create_optimization_profile() as profile:
            profile.set_shape("x", *PROFILE["x"])
            self.config.add_optimization_profile(profile)


@pytest.fixture
def kit(mock_backend: MockBackend) -> Iterator[Kit]:
    made = Kit(mock_backend)
    yield made
    made.network.close()
    made.config.close()
    made.builder.close()


class Held:
    """An ``on_progress`` that stops the build at its first step until ``go_on`` is set."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.steps: list[tuple[str, int, int]] = []

    def __call__(self, phase: str, step: int, steps: int) -> None:
        self.steps.append((phase, step, steps))
        self.reached.set()
        assert self.go_on.wait(30)

    async def until_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 30)


async def test_async_and_sync_twins_build_the_same(kit: Kit) -> None:
    first = await kit.builder.build_serialized_network(kit.network, kit.config)
    steps: list[Any] = []
    second = kit.builder.build_serialized_network_sync(
        kit.network, kit.config, on_progress=lambda *step: steps.append(step)
    )
    assert first.header == second.header
    assert steps
    assert all(isinstance(phase, str) and 0 <= step <= count for phase, step, count in steps)


async def test_one_build_at_a_time_and_nothing_closes_under_it(kit: Kit) -> None:
    held = Held()
    building = asyncio.create_task(kit.builder.build_serialized_network(kit.network, kit.config, on_progress=held))
    await held.until_reached()
    with pytest.raises(trtx.BorrowedError, match="building something else"):
        kit.builder.build_serialized_network_sync(kit.network, kit.config)
    for item in (kit.network, kit.config, kit.builder):
        with pytest.raises(trtx.BorrowedError) as caught:
            item.close()
        assert "a build" in caught.value.borrowers
    held.go_on.set()
    assert len(await building) > 0
    kit.builder.build_serialized_network_sync(kit.network, kit.config)


async def test_cancelled_build_stops_at_its_next_step(kit: Kit) -> None:
    held = Held()
    building = asyncio.create_task(kit.builder.build_serialized_network(kit.network, kit.config, on_progress=held))
    await held.until_reached()
    building.cancel()
    await asyncio.sleep(0)
    assert not building.done()  # the native build still runs
    held.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await building
    assert len(held.steps) == 1
    assert await kit.builder.build_serialized_network(kit.network, kit.config)


async def test_aclose_waits_for_the_build(mock_backend: MockBackend) -> None:
    kit, held = Kit(mock_backend), Held()
    building = asyncio.create_task(kit.builder.build_serialized_network(kit.network, kit.config, on_progress=held))
    await held.until_reached()
    closing = asyncio.create_task(kit.builder.aclose())
    await until(lambda: kit.builder.closed)
    assert mock_backend.calls["destroy"] == 0
    held.go_on.set()
    await closing
    assert isinstance(await building, trtx.Plan)
    assert mock_backend.calls["destroy"] == 2


def test_exception_in_on_progress_is_the_callers(kit: Kit) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("in on_progress")

    with pytest.raises((ZeroDivisionError, trtx.BuilderError)):
        kit.builder.build_serialized_network_sync(kit.network, kit.config, on_progress=broken)
    kit.builder.build_serialized_network_sync(kit.network, kit.config)


def test_parts_of_another_builder(kit: Kit) -> None:
    other = Kit(MockBackend())
    foreign = other.builder.create_optimization_profile()
    attempts: list[Callable[[], object]] = [
        lambda: kit.builder.build_serialized_network_sync(other.network, kit.config),
        lambda: kit.builder.build_serialized_network_sync(kit.network, other.config),
        lambda: kit.config.add_optimization_profile(foreign),
    ]
    for attempt in attempts:
        with pytest.raises(trtx.InvalidArgumentError, match="another builder"):
            attempt()
    for network, config in ((None, kit.config), (kit.network, None), (kit.config, kit.network)):
        with pytest.raises(trtx.InvalidArgumentError, match="of this builder"):
            kit.builder.build_serialized_network_sync(network, config)  # type: ignore[arg-type]
    asyncio.run(other.builder.aclose())


def test_network_is_filled_once(kit: Kit) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="has parsed a model before"):
        kit.network.parse_onnx(matmul_model())
    with kit.builder.create_network() as empty, pytest.raises(trtx.InvalidArgumentError, match="is empty"):
        kit.builder.build_serialized_network_sync(empty, kit.config)


def test_network_that_failed_to_parse_cannot_be_used(kit: Kit) -> None:
    kit.backend.inject(fail("parse_onnx"))
    with kit.builder.create_network() as network:
        with pytest.raises(trtx.ParserError):
            network.parse_onnx(matmul_model())
        with pytest.raises(trtx.InvalidArgumentError, match="failed to parse"):
            kit.builder.build_serialized_network_sync(network, kit.config)
        with pytest.raises(trtx.InvalidArgumentError, match="parsed a model before"):
            network.parse_onnx(matmul_model())


def test_a_file_that_cannot_be_read_leaves_the_network_empty(kit: Kit, tmp_path: Path) -> None:
    with kit.builder.create_network() as network:
        with pytest.raises(trtx.InvalidArgumentError, match="cannot be read"):
            network.parse_onnx(tmp_path / "missing.onnx")
        network.parse_onnx(matmul_model())
        assert [t.name for t in network.inputs + network.outputs] == ["x", "y"]
        assert network.num_layers == 1


async def test_two_parses_at_once(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first fills the network, the second is refused before it touches it."""
    with kit.builder.create_network() as network:
        entered, go_on = threading.Event(), threading.Event()
        parse = network._native.parse_onnx

        def held(*arguments: Any) -> None:
            entered.set()
            assert go_on.wait(30)
            parse(*arguments)

        monkeypatch.setattr(network._native, "parse_onnx", held)
        first = asyncio.create_task(network.parse_onnx_async(matmul_model()))
        assert await asyncio.to_thread(entered.wait, 30)
        with pytest.raises(trtx.BorrowedError, match="is parsing a model"):
            network.parse_onnx(matmul_model())
        with pytest.raises(trtx.BorrowedError, match="parse_onnx"):
            network.close()
        go_on.set()
        await first
        assert len(network.inputs) == 1


def test_failed_build_leaves_the_builder_usable(kit: Kit) -> None:
    kit.backend.inject(fail("build_serialized_network"))
    with pytest.raises(trtx.BuilderError) as caught:
        kit.builder.build_serialized_network_sync(kit.network, kit.config)
    assert caught.value.tensorrt_log
    kit.builder.build_serialized_network_sync(kit.network, kit.config)


def test_builder_without_a_device() -> None:
    """The mock builds without one, as RTX does."""
    backend = MockBackend(devices=0)
    with pytest.raises(trtx.TrtxError):
        trtx.Runtime(None, backend)
    assert trtx.live_objects() == []


@pytest.mark.parametrize("device", [-1, 1, 99, True, "0", 0.0, None])
def test_devices_that_are_not_there(device: Any, mock_backend: MockBackend) -> None:
    for kind in (trtx.Builder, trtx.Runtime):
        with pytest.raises(trtx.InvalidArgumentError, match="device"):
            kind(None, mock_backend, device=device)
    assert trtx.live_objects() == []


@pytest.mark.parametrize("on_progress", [5, "print", [print]])
async def test_progress_that_is_no_function(kit: Kit, on_progress: Any) -> None:
    before = kit.backend.calls
    with pytest.raises(trtx.InvalidArgumentError, match=r"on_progress is .*expected None or a function"):
        kit.builder.build_serialized_network_sync(kit.network, kit.config, on_progress=on_progress)
    with pytest.raises(trtx.InvalidArgumentError, match="on_progress is"):
        await kit.builder.build_serialized_network(kit.network, kit.config, on_progress=on_progress)
    assert kit.backend.calls == before


async def test_progress_that_raises_aborts_the_build(kit: Kit) -> None:
    steps = []

    def on_progress(phase: str, step: int, total: int) -> None:
        steps.append(step)
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        kit.builder.build_serialized_network_sync(kit.network, kit.config, on_progress=on_progress)
    with pytest.raises(LookupError, match="mine"):
        await kit.builder.build_serialized_network(kit.network, kit.config, on_progress=on_progress)
    assert len(steps) == 2
    assert isinstance(kit.builder.build_serialized_network_sync(kit.network, kit.config), trtx.Plan)
