"""builder.build_stream: every step in order, the plan at the end, and a build that stops when nobody watches."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, fail
from tests.unit.ownership import until
from tests.unit.test_builder import Held, Kit


@pytest.fixture
def kit(mock_backend: MockBackend) -> Iterator[Kit]:
    made = Kit(mock_backend)
    yield made
    made.network.close()
    made.config.close()
    made.builder.close()


def expected_steps(kit: Kit) -> list[trtx.BuildStep]:
    steps: list[trtx.BuildStep] = []
    kit.builder.build_serialized_network_sync(
        kit.network, kit.config, on_progress=lambda *step: steps.append(trtx.BuildStep(*step))
    )
    return steps


async def test_every_step_once_and_then_the_plan(kit: Kit) -> None:
    wanted = await asyncio.to_thread(expected_steps, kit)
    async with kit.builder.build_stream(kit.network, kit.config) as stream:
        found = [step async for step in stream]
        assert found == wanted
        assert len(stream.plan) > 0
    assert stream.plan.header.flavour == "mock"


def test_on_trio(kit: Kit) -> None:
    async def main() -> int:
        async with kit.builder.build_stream(kit.network, kit.config) as stream:
            return len([step async for step in stream])

    assert anyio.run(main, backend="trio") > 0


async def test_error_of_the_build_is_raised_once(kit: Kit) -> None:
    kit.backend.inject(fail("build_serialized_network"))
    async with kit.builder.build_stream(kit.network, kit.config) as stream:
        with pytest.raises(trtx.BuilderError):
            async for _ in stream:
                pass
        with pytest.raises(trtx.InvalidArgumentError, match="there is no plan: the build failed"):
            _ = stream.plan


class Slow:
    """Makes the mock wait at every step until it is let go."""

    def __init__(self, kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on, self.steps = threading.Semaphore(0), 0
        native = kit.builder._native
        build = native.build_serialized_network

        def slowly(network: Any, options: Any, progress: Any) -> Any:
            complete = progress.step_complete

            def step_complete(phase: str, step: int) -> bool:
                self.steps += 1
                assert self.go_on.acquire(timeout=30)
                return bool(complete(phase, step))

            progress.step_complete = step_complete
            return build(network, options, progress)

        monkeypatch.setattr(native, "build_serialized_network", slowly)


async def test_leaving_early_stops_the_build(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    total = len(await asyncio.to_thread(expected_steps, kit))
    slow = Slow(kit, monkeypatch)
    slow.go_on.release()
    async with kit.builder.build_stream(kit.network, kit.config) as stream:
        async for _ in stream:
            break
        asyncio.get_running_loop().call_later(0.05, slow.go_on.release)  # after the block was left
    assert slow.steps <= 2 < total  # the one that was seen, and perhaps the next, which had begun
    with pytest.raises(trtx.InvalidArgumentError, match="the build failed"):
        _ = stream.plan
    kit.network.close()  # nothing holds it any more
    kit.network = kit.builder.create_network()


async def test_cancellation_waits_until_the_build_has_stopped(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(kit, monkeypatch)

    async def watch() -> None:
        async with kit.builder.build_stream(kit.network, kit.config) as stream:
            async for _ in stream:
                pass

    task = asyncio.create_task(watch())
    await until(lambda: slow.steps > 0)
    task.cancel()
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    slow.go_on.release()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert slow.steps == 1


async def test_several_may_watch(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step goes to one of them, and all of them see the end."""
    wanted = await asyncio.to_thread(expected_steps, kit)
    slow = Slow(kit, monkeypatch)
    found: list[trtx.BuildStep] = []

    async def watch(stream: trtx.BuildStream) -> None:
        async for step in stream:
            found.append(step)
            slow.go_on.release()

    slow.go_on.release()
    async with kit.builder.build_stream(kit.network, kit.config) as stream:
        await asyncio.wait_for(asyncio.gather(watch(stream), watch(stream), watch(stream)), 20)
        assert stream.plan
    assert found == wanted


def test_build_stops_when_its_loop_is_closed(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    total = len(expected_steps(kit))
    slow = Slow(kit, monkeypatch)
    loop = asyncio.new_event_loop()
    stream = kit.builder.build_stream(kit.network, kit.config)
    loop.run_until_complete(stream.__aenter__())
    loop.close()
    for _ in range(total):
        slow.go_on.release()
    deadline = time.monotonic() + 20
    while kit.builder._building.locked() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not kit.builder._building.locked()
    assert slow.steps <= 2 < total


async def test_a_stream_is_used_once_and_with_async_with(kit: Kit) -> None:
    stream = kit.builder.build_stream(kit.network, kit.config)
    with pytest.raises(trtx.InvalidArgumentError, match="has not been started"):
        await stream.__anext__()
    with pytest.raises(trtx.InvalidArgumentError, match="iterate to its end first"):
        _ = stream.plan
    async with stream:
        pass
    with pytest.raises(trtx.InvalidArgumentError, match="started before"):
        await stream.__aenter__()


async def test_one_build_at_a_time(kit: Kit) -> None:
    held = Held()
    building = asyncio.create_task(kit.builder.build_serialized_network(kit.network, kit.config, on_progress=held))
    await held.until_reached()
    async with kit.builder.build_stream(kit.network, kit.config) as stream:
        with pytest.raises(trtx.BorrowedError, match="building something else"):
            await stream.__anext__()
    held.go_on.set()
    await building
