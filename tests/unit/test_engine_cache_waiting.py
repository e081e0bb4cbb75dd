"""One builds while the others wait: tasks, processes, and processes that are killed."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import mock_backend._builder as builder_module
import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.ownership import matmul_model
from trtx_py import _onnx_source as source_module
from trtx_py.cache._lock import try_lock

ROOT = Path(__file__).parents[2]


class Gate:
    """Holds builds until it is opened; a build that is cancelled does not wait for that."""

    def __init__(self) -> None:
        self.builds = 0
        self.opened = threading.Event()
        self._arrived = threading.Semaphore(0)

    def report(self, builder: Any, network: Any, progress: Any) -> None:
        self.builds += 1
        self._arrived.release()
        while not self.opened.wait(0.01):
            if not progress.step_complete("held", 0):
                raise trtx.BuilderError("the build was cancelled")

    async def building(self) -> None:
        assert await asyncio.to_thread(self._arrived.acquire, timeout=30)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()
    monkeypatch.setattr(builder_module.MockBuilder, "_report", lambda *arguments: made.report(*arguments))
    yield made
    made.opened.set()


class Waiting(logging.Handler):
    """Counts who says that he waits for another's build."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._seen = threading.Semaphore(0)

    def emit(self, record: logging.LogRecord) -> None:
        if "waiting for it" in record.getMessage():
            self._seen.release()

    async def one(self) -> None:
        assert await asyncio.to_thread(self._seen.acquire, timeout=30)


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    handler, logger = Waiting(), logging.getLogger("trtx_py.cache")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture
def cache(tmp_path: Path) -> trtx.EngineCache:
    return trtx.EngineCache(tmp_path / "cache")


def assert_nothing_is_left(cache: trtx.EngineCache, plans: int) -> None:
    """No temporary file, no lock, and nothing damaged."""
    names = {folder: sorted(os.listdir(os.path.join(cache.root, folder))) for folder in ("plans", "locks")}
    assert len(names["plans"]) == plans
    assert all(not name.startswith(".") for name in names["plans"])
    assert names["locks"] == []
    assert cache.verify().removed == {}
    assert len(cache.list()) == plans


# Tasks


async def test_tasks_that_want_the_same_plan_build_it_once(
    cache: trtx.EngineCache, mock_backend: MockBackend, gate: Gate, waiting: Waiting
) -> None:
    tasks = [asyncio.create_task(cache.plan(matmul_model(), mock_backend)) for _ in range(5)]
    await gate.building()
    for _ in range(4):
        await waiting.one()
    gate.opened.set()
    plans = await asyncio.gather(*tasks)
    assert gate.builds == 1
    assert all(plan == plans[0] for plan in plans)
    assert_nothing_is_left(cache, 1)


async def test_who_waits_can_be_cancelled_and_the_build_goes_on(
    cache: trtx.EngineCache, mock_backend: MockBackend, gate: Gate, waiting: Waiting
) -> None:
    builder = asyncio.create_task(cache.plan(matmul_model(), mock_backend))
    await gate.building()
    waiter = asyncio.create_task(cache.plan(matmul_model(), mock_backend))
    await waiting.one()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert not builder.done()  # nothing but the gate ends it
    gate.opened.set()
    assert len(await builder) > 0
    assert gate.builds == 1
    assert_nothing_is_left(cache, 1)


async def test_who_hashes_can_be_cancelled(
    cache: trtx.EngineCache, mock_backend: MockBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = tmp_path / "m.onnx", threading.Semaphore(0)
    path.write_bytes(matmul_model())

    class Endless(io.BytesIO):
        """As long as nobody gives up."""

        def read(self, size: int | None = -1) -> bytes:
            asked.release()
            return b"x"

    monkeypatch.setattr(source_module, "_open_model", lambda path: Endless())
    task = asyncio.create_task(cache.plan(path, mock_backend))
    assert await asyncio.to_thread(asked.acquire, timeout=30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 30)
    assert mock_backend.calls["build_serialized_network"] == 0


async def test_when_the_builder_is_cancelled_one_of_those_who_wait_builds(
    cache: trtx.EngineCache, mock_backend: MockBackend, gate: Gate, waiting: Waiting
) -> None:
    builder = asyncio.create_task(cache.plan(matmul_model(), mock_backend))
    await gate.building()
    waiters = [asyncio.create_task(cache.plan(matmul_model(), mock_backend)) for _ in range(2)]
    for _ in waiters:
        await waiting.one()
    builder.cancel()
    with pytest.raises(asyncio.CancelledError):
        await builder
    assert cache.list() == ()
    await gate.building()
    gate.opened.set()
    first, second = await asyncio.gather(*waiters)
    assert first == second
    assert gate.builds == 2
    assert_nothing_is_left(cache, 1)


async def test_build_that_fails_lets_the_next_one_try(
    cache: trtx.EngineCache, mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[int] = []

    def report(*arguments: Any) -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise trtx.BuilderError("no tactic")

    monkeypatch.setattr(builder_module.MockBuilder, "_report", report)
    with pytest.raises(trtx.BuilderError, match="no tactic"):
        await cache.plan(matmul_model(), mock_backend)
    assert_nothing_is_left(cache, 0)
    await cache.plan(matmul_model(), mock_backend)
    assert_nothing_is_left(cache, 1)


async def test_different_plans_do_not_wait_for_each_other(
    cache: trtx.EngineCache, mock_backend: MockBackend, gate: Gate
) -> None:
    tasks = [
        asyncio.create_task(cache.plan(matmul_model(), mock_backend, optimization_level=level)) for level in range(3)
    ]
    for _ in tasks:
        await gate.building()
    gate.opened.set()
    await asyncio.gather(*tasks)
    assert_nothing_is_left(cache, 3)


def test_trio(cache: trtx.EngineCache, mock_backend: MockBackend) -> None:
    async def both() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(cache.plan, matmul_model(), mock_backend)

    trio.run(both)
    assert mock_backend.calls["build_serialized_network"] == 1
    assert_nothing_is_left(cache, 1)


# Processes

PROGRAM = """
import asyncio, logging, os, sys
import trtx_py as trtx
import trtx_py.cache._entry as entry
import mock_backend._builder as builder
from mock_backend import MockBackend
from tests.unit.ownership import matmul_model

role, root = sys.argv[1:]

def say(word):
    print(word, flush=True)

class Told(logging.Handler):
    def emit(self, record):
        if "waiting for it" in record.getMessage():
            say("waiting")

logging.getLogger("trtx_py.cache").addHandler(Told())
logging.getLogger("trtx_py.cache").setLevel(logging.INFO)

def held(*arguments):
    say("building")
    sys.stdin.readline()

fsync = os.fsync

def held_while_writing(fd):
    fsync(fd)
    say("writing")
    sys.stdin.readline()

if role in ("build", "fork"):
    builder.MockBuilder._report = held
if role == "write":
    entry.os.fsync = held_while_writing
if role == "fork":
    def held(*arguments):
        if os.fork() == 0:
            say("forked")
            sys.stdin.readline()
            os._exit(0)
        sys.stdin.readline()
    builder.MockBuilder._report = held

async def main():
    backend = MockBackend()
    plan = await trtx.EngineCache(root).plan(matmul_model(), backend)
    say(f"built {backend.calls['build_serialized_network']} {plan.sha256}")

if role == "late":
    sys.stdin.readline()  # what it imports is imported by now
asyncio.run(main())
"""


class Process:
    """``PROGRAM`` in one role; lines it prints are awaited, a line that it is sent lets it go on."""

    def __init__(self, role: str, cache: trtx.EngineCache) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM, role, cache.root],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip

    def line(self) -> str:
        assert self.child.stdout is not None
        return self.child.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write("\n")
        self.child.stdin.flush()

    def kill(self) -> None:
        self.child.kill()
        self.child.wait(30)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:
            assert self.child.poll() is not None or self.child.wait(30) is not None
        self.child.communicate(timeout=30)


def test_two_processes_build_once(cache: trtx.EngineCache) -> None:
    with Process("build", cache) as first, Process("build", cache) as second:
        lines = {first: first.line()}
        assert lines[first] in ("building", "waiting")
        lines[second] = second.line()
        assert sorted(lines.values()) == ["building", "waiting"]
        builder, waiter = sorted(lines, key=lambda each: lines[each])
        builder.go_on()
        built, found = builder.line().split(), waiter.line().split()
    assert (built[:2], found[:2]) == (["built", "1"], ["built", "0"])
    assert built[2] == found[2]
    assert_nothing_is_left(cache, 1)


@pytest.mark.parametrize("moment", ["build", "write"])
def test_builder_that_is_killed_leaves_no_entry_and_no_lock(cache: trtx.EngineCache, moment: str) -> None:
    with Process(moment, cache) as killed, Process("late", cache) as next_one:
        assert killed.line() == ("building" if moment == "build" else "writing")
        next_one.go_on()
        assert next_one.line() == "waiting"
        killed.kill()
        assert cache.list() == ()
        assert next_one.line().startswith("built 1 ")
        assert next_one.child.wait(30) == 0
    assert_nothing_is_left(cache, 1)


def test_what_a_killed_builder_left_goes_with_the_next_look(cache: trtx.EngineCache) -> None:
    with Process("write", cache) as killed:
        assert killed.line() == "writing"
        assert cache.prune().removed == {}  # it is at work
        killed.kill()
    (left,) = os.listdir(os.path.join(cache.root, "plans"))
    report = cache.verify()
    assert report.removed == {f"plans/{left}": "left by a process that was killed"}
    assert_nothing_is_left(cache, 0)


async def test_what_killed_builders_left_goes_whenever_a_plan_is_added(
    cache: trtx.EngineCache, mock_backend: MockBackend
) -> None:
    await cache.plan(matmul_model(), mock_backend)
    left, at_work = (Path(cache.root, "plans", f".{digit * 64}.{'0' * 16}.tmp") for digit in "ab")
    for path in (left, at_work):
        path.write_bytes(bytes(1000))
    held = try_lock(os.path.join(cache.root, "locks", f"{'b' * 64}.lock"))
    assert held is not None
    with held:
        await cache.plan(matmul_model(), mock_backend, optimization_level=1)
    assert (left.exists(), at_work.exists()) == (False, True)


@pytest.mark.parametrize("operation", ["prune", "verify", "clear"])
def test_locks_of_killed_builders_go_and_others_stay(cache: trtx.EngineCache, operation: str) -> None:
    locks = Path(cache.root, "locks")
    locks.mkdir(0o700, parents=True)
    Path(cache.root).chmod(0o700)
    for name in (f"{'a' * 64}.lock", "not-ours", "not-ours.lock"):
        (locks / name).touch()
    held = try_lock(str(locks / f"{'b' * 64}.lock"))
    assert held is not None
    with held:
        getattr(cache, operation)()
        assert sorted(os.listdir(locks)) == [f"{'b' * 64}.lock", "not-ours", "not-ours.lock"]


def test_child_that_was_forked_does_not_hold_the_lock_of_its_parent(cache: trtx.EngineCache) -> None:
    with Process("fork", cache) as parent, Process("late", cache) as next_one:
        assert parent.line() == "forked"
        parent.kill()  # the child lives on
        next_one.go_on()
        assert next_one.line().startswith("built 1 ")


def test_lock_is_one_at_a_time_and_leaves_no_file(tmp_path: Path) -> None:
    path = str(tmp_path / "key.lock")
    held = try_lock(path)
    assert held is not None
    assert try_lock(path) is None
    held.release()
    held.release()
    assert not os.path.exists(path)
    again = try_lock(path)
    assert again is not None
    os.unlink(path)  # somebody cleans up
    other = try_lock(path)
    assert other is not None  # it is another file, and another lock
    again.release()
    assert try_lock(path) is None  # and not the first one's to remove
    other.release()
    assert not os.path.exists(path)
