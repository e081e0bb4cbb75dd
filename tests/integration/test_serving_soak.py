"""A soak of the batcher on the mock: many callers, faults at random, devices that go away, callers that leave.

TRTX_SOAK_S says for how long it runs at least, TRTX_SOAK_REQUESTS how many requests it makes at least; 15 s and any
number if they are unset. scripts/test-long has 600 s and a million requests. Nothing is said about how fast they are.

Every answer is compared with numpy, every request has one answer, the batchers' counts say the same as their callers,
each kind of fault has struck, devices that were lost serve again, and nothing is left or grows.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import io
import itertools
import logging
import os
import random
import resource
import statistics
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import Fault, MockBackend, device_lost, fail, slow
from tests.unit.batching import answered
from tests.unit.serving import N4, affine, affine_model, build

SECONDS = float(os.environ.get("TRTX_SOAK_S", "15"))
REQUESTS = int(os.environ.get("TRTX_SOAK_REQUESTS", "0"))
CALLERS = 64
#: How many requests one engine serves; some serve few, so that there are many beginnings and ends.
LIFE = 3000
_SHORT = 150
#: How lives end: in good health, in one of four ways; with the death of a lane that launches or of a device that
#: computes; or of several devices, each of which is lost and comes back.
ENDINGS = ("drain", "lane", "engine", "pool", "drop", "device", "timeout")
SIZES = (1, 1, 1, 1, 2, 3, 8)
_SAMPLES = 4096
_PAGE = os.sysconf("SC_PAGE_SIZE")
#: What a life may take on the slowest machine; one that hangs is noticed by this.
_PATIENCE_S = 300
#: One life in so many is watched by tracemalloc, which makes it slow.
_TRACED = 9
#: Bounds for what grows, far above an allocator's own fluctuation: blocks of pymalloc's, and resident memory, over half
#: of the time; and how many objects a life leaves behind (what free lists and ONNX Runtime's sessions keep is about a
#: thousand; one for each request would be more than this).
_BLOCKS, _RESIDENT, _LEFT = 20_000, 32 << 20, LIFE
#: How long callers who were refused wait at last before they ask again.
_PAUSE_AT_MOST_S = 0.032
_RECOVERY = trtx.RecoveryPolicy(initial_s=0.001, maximum_s=0.01, jitter=0.0, attempts=20)


class Server(Protocol):
    """A batcher, or several devices with one each."""

    async def infer(
        self, inputs: Any, *, priority: int = 0, deadline_s: float | None = None, tenant: str = ""
    ) -> Any: ...
    async def infer_many(self, inputs: Any, *, tenant: str = "") -> Any: ...


@dataclass
class Soak:
    """What happened.

    Attributes:
        asked: requests that were made.
        leavers: those whose caller was to leave before the answer came.
        outcomes: how they ended, as their callers saw it.
        struck: faults that took effect, by kind.
        reopened: devices that served again after they had been lost.
        trouble: what the event loop was told and nobody else: exceptions that nobody looked at.
        resident, blocks: after each life, with the requests made so far.
        left: objects that each life that was watched left behind.
    """

    random: random.Random
    samples: np.ndarray
    expected: np.ndarray
    begun: float
    asked: int = 0
    leavers: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    struck: Counter[str] = field(default_factory=Counter)
    reopened: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    trouble: list[str] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return time.monotonic() - self.begun >= SECONDS and self.asked >= REQUESTS

    def noticed(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.trouble.append(f"{context.get('message')}: {context.get('exception')!r}")


class Life:
    """An engine with its batcher, or a pool of devices, and the callers that use it."""

    def __init__(self, soak: Soak, backend: MockBackend, server: Server) -> None:
        self.soak, self.backend, self.server = soak, backend, server
        self.requests = 0
        self.enough = soak.random.choice([_SHORT, _SHORT, LIFE])
        self.outcomes: Counter[str] = Counter()
        self.fate = asyncio.Event()  # what was to happen to it has happened
        self.lost = False

    @property
    def over(self) -> bool:
        return self.lost or (self.fate.is_set() and self.requests >= self.enough)

    async def one(self, kind: str, count: int, start: int) -> None:
        """One request; its answer must be its own."""
        soak, server = self.soak, self.server
        x = soak.samples[start : start + count]
        tenant = "ab"[start % 2]
        if kind == "rows" and isinstance(server, trtx.DynamicBatcher):
            async with server.alloc_rows(count, tenant=tenant) as own:
                own["x"][...] = x
                if start % 16 == 0:
                    await asyncio.sleep(0.005)  # slow to fill: others go on without these
                found = await own.infer()
        elif kind == "many":
            found = await server.infer_many({"x": x}, tenant=tenant)
        elif kind == "deadline":
            found = await server.infer({"x": x}, deadline_s=0.005 * (start % 5), priority=start % 3)
        elif kind == "plain":
            found = await server.infer({"x": x})
        else:
            found = await server.infer({"x": x}, tenant=tenant, priority=start % 2)
        assert np.array_equal(found["y"], soak.expected[start : start + count]), "somebody else's numbers"

    async def ask(self, kind: str, count: int, start: int, leave: int | None = None) -> str:
        """One request, whose caller leaves after so many turns of the loop; how it ended."""
        self.soak.asked += 1
        self.requests += 1
        request: Awaitable[None] = self.one(kind, count, start)
        if leave is not None:
            self.soak.leavers += 1
            request = task = asyncio.ensure_future(request)
            for _ in range(leave):
                await asyncio.sleep(0)
            task.cancel()
        how = await self.ending(request)
        self.outcomes[how] += 1
        return how

    @staticmethod
    async def ending(request: Awaitable[None]) -> str:
        """Errors that no fault explains end the soak."""
        try:
            await request
        except asyncio.CancelledError:
            return "cancelled"
        except trtx.OverloadedError:
            return "overloaded"
        except trtx.DeadlineExceededError:
            return "late"
        except trtx.ClosedError:
            return "closed"
        except trtx.ExecutionError:
            return "failed"
        return "answered"

    async def caller(self, seed: float) -> None:
        """Request after request; a third of them is given up, at any moment of their way."""
        chance, pause = random.Random(seed), 0.0
        while not self.over:
            kind = chance.choices(["plain", "infer", "many", "rows", "deadline"], [6, 6, 3, 2, 2])[0]
            count = chance.choice(SIZES) if kind != "many" else chance.randint(1, 40)
            leave = chance.choice([1, 1, 2, 3, 5, 8, 20, 50]) if chance.random() < 1 / 3 else None
            how = await self.ask(kind, count, chance.randrange(_SAMPLES - count), leave)
            # What a client would do. Who asks again at once keeps the loop so busy with refusals that a lane's thread
            # gets the interpreter once in 5 ms, and little is answered.
            pause = min(max(0.001, 2 * pause), _PAUSE_AT_MOST_S) if how in ("overloaded", "failed") else 0.0
            if pause:
                await asyncio.sleep(pause)

    async def strike(self, kind: str, fault: Fault) -> None:
        """Plan a fault, and wait until it has had its effect."""
        aim = self.backend.calls[fault.call] + fault.nth
        self.backend.inject(fault)
        while self.backend.calls[fault.call] < aim:  # noqa: ASYNC110 - nothing tells when
            await asyncio.sleep(0.001)
        self.soak.struck[kind] += 1

    async def misfortune(self, ending: str, *, graphs: bool) -> None:
        """Slow kernels and launches that fail; and, if that is to be, the end of a lane or of the device."""
        chance = random.Random(self.soak.random.random())
        kinds = {
            "slow": lambda: slow(seconds=0.003, nth=chance.randint(1, 5), count=2),
            "launch": lambda: fail("cuGraphLaunch" if graphs else "execute_async_v3", chance.randint(1, 5)),
        }
        while self.requests < self.enough:
            await asyncio.sleep(chance.uniform(0.002, 0.03))
            kind = chance.choice(list(kinds))
            await self.strike(kind if graphs or kind == "slow" else "enqueue", kinds[kind]())
        if ending == "lane":
            await self.strike(ending, device_lost(chance.randint(1, 5), call="cuEventRecord"))
        elif ending == "device":
            await self.strike(ending, device_lost(chance.randint(1, 5)))
        self.lost = ending in ("lane", "device")
        self.fate.set()

    async def losses(self, pool: trtx.MultiDevice) -> None:
        """One device after the other is lost, and each comes back while the other serves."""
        for device in (0, 1, 0):
            before = pool.statistics().devices[device]
            self.backend.inject(slow(seconds=0.003, count=2))
            self.backend.inject(device_lost(self.soak.random.randint(1, 5), device=device))
            while True:
                now = pool.statistics().devices[device]
                assert now.state != "lost", now
                if now.recoveries > before.recoveries:
                    break
                await asyncio.sleep(0.001)
            assert now.faults == before.faults + 1
            self.soak.struck["one of several devices"] += 1
            while pool.statistics().devices[device].completed <= now.completed:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            self.soak.reopened["one of several devices"] += 1
        self.fate.set()

    async def run(self, trouble: Any) -> list[asyncio.Task[str]]:
        """Serve until it is over; the requests that are still to be answered then."""
        assert await self.ask("plain", 1, 0) == "answered"
        task = asyncio.create_task(trouble)
        seeds = [self.soak.random.random() for _ in range(CALLERS)]
        await asyncio.gather(task, *map(self.caller, seeds))
        self.backend.clear_faults()
        last = [asyncio.create_task(self.ask("infer", 1, number)) for number in range(20)]
        await asyncio.sleep(0)
        return last


def agree(life: Life, s: trtx.BatcherStatistics) -> None:
    """A batcher counts what its callers saw; who was cancelled may have missed the answer."""
    assert s.accepted == answered(s), s
    assert (s.waiting, s.waiting_rows, s.running_batches, s.bytes_in_flight) == (0, 0, 0, 0), s
    seen, missed = life.outcomes, life.outcomes["cancelled"]
    for counted, how in (
        (s.completed, "answered"), (s.failed, "failed"), (s.late, "late"), (s.rejected + s.shed, "overloaded"),
    ):  # fmt: skip
        assert seen[how] <= counted <= seen[how] + missed, (how, seen, s)
    assert s.accepted + s.rejected <= life.requests, (seen, s)
    assert s.cancelled <= missed
    assert s.dropped <= seen["closed"] + missed


async def batcher_life(soak: Soak, plan: trtx.Plan, backend: MockBackend, ending: str) -> None:
    """One engine: open, serve, close."""
    chance = soak.random
    policy = trtx.BatchPolicy(
        overload=chance.choice(["wait", "reject", "shed_oldest"]),
        depth=chance.choice([1, 2, 3]),
        shares={"a": 2.0},
        max_bytes_in_flight=chance.choice([None, None, 4000]),
        starvation_s=0.05,
    )
    graphs = chance.random() < 0.75
    async with trtx.Runtime(None, backend) as runtime:
        engine = await runtime.deserialize(plan, lanes=chance.choice([1, 2, 3]), cuda_graphs=graphs)
        async with engine:
            batcher = trtx.DynamicBatcher(
                engine, max_queue=chance.choice([8, 16, 100, 4096]), policy=policy, batch_axis=0,
                max_delay_s=chance.choice([0.0, 0.002]),
            )  # fmt: skip
            life = Life(soak, backend, batcher)
            last = await life.run(life.misfortune(ending, graphs=graphs))
            if ending == "drop":
                await batcher.aclose(drain=False)
            elif ending == "timeout":
                await batcher.aclose(timeout_s=0.0001)
            elif ending == "engine":
                await engine.aclose()
            else:
                await batcher.aclose()
            await asyncio.gather(*last)
            if ending in ("drain", "engine"):
                assert all(task.result() in ("answered", "overloaded") for task in last), life.outcomes
            agree(life, batcher.statistics())
        memory = engine.statistics()
        assert memory.device_memory.current_bytes == memory.pinned_memory.current_bytes == 0
    soak.outcomes += life.outcomes


async def pool_life(soak: Soak, plan: trtx.Plan, backend: MockBackend) -> None:
    """Two devices, each of which is lost and comes back."""
    chance = soak.random
    async with await trtx.MultiDevice.open(
        plan, backend=backend, recovery=_RECOVERY, strategy=chance.choice(["least_loaded", "round_robin"]),
        batching={"batch_axis": 0, "max_queue": chance.choice([100, 4096])}, lanes=chance.choice([1, 2]),
    ) as pool:  # fmt: skip
        life = Life(soak, backend, pool)
        last = await life.run(life.losses(pool))
        await pool.aclose()
        await asyncio.gather(*last)
        s = pool.statistics()
    assert s.accepted == s.completed + s.failed + s.cancelled + s.dropped == life.requests - life.outcomes["closed"], s
    assert s.outstanding == 0
    assert life.outcomes["answered"] <= s.completed <= life.outcomes["answered"] + life.outcomes["cancelled"]
    for device in s.devices:
        assert device.batcher is not None
        assert device.batcher.accepted == answered(device.batcher), device
        assert device.outstanding_requests == 0
    soak.outcomes += life.outcomes


@contextlib.asynccontextmanager
async def watched(soak: Soak, number: int) -> AsyncIterator[None]:
    """See what a life leaves behind."""
    traced = number % _TRACED == _TRACED - 1  # not the first one, which imports what is imported late
    if traced:
        gc.collect()
        tracemalloc.start()
    try:
        yield
        left: tracemalloc.Snapshot | None = None
        for _ in range(50 if traced else 1):  # what has finalizers goes in two steps, and some of it in a thread
            gc.collect()
            left = tracemalloc.take_snapshot() if traced else None
            if left is not None and len(left.traces) < _LEFT:
                break
            await asyncio.sleep(0.01)
        if left is not None:
            soak.left.append(len(left.traces))
            if soak.left[-1] >= _LEFT:
                print(f"life {number} left:", *left.statistics("lineno")[:10], sep="\n")
    finally:
        if traced:
            tracemalloc.stop()
    assert trtx.live_objects() == []
    soak.resident.append(resident_bytes())
    soak.blocks.append(sys.getallocatedblocks())


def stacks() -> str:
    """Where every task and every thread is."""
    found = io.StringIO()
    for task in asyncio.all_tasks():
        found.write(f"{task.get_name()}\n")
        waits: Any = task.get_coro()
        while getattr(waits, "cr_frame", None) is not None:
            found.write(f"  {waits.cr_frame.f_code.co_filename}:{waits.cr_frame.f_lineno} {waits.__qualname__}\n")
            waits = waits.cr_await
        found.write(f"  {waits!r}\n")
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        found.write(file.read())
    return found.getvalue()


async def soaked(soak: Soak) -> None:
    asyncio.get_running_loop().set_exception_handler(soak.noticed)
    plan = build(affine_model(), [N4])
    # A machine with a device for lives with one, and one with two. They stay: what was lost is opened again.
    machines = {False: MockBackend(), True: MockBackend(devices=2)}
    before = ""
    for number, ending in enumerate(itertools.cycle(ENDINGS)):
        if number >= 2 * len(ENDINGS) and soak.over:
            break
        backend = machines[ending == "pool"]
        async with watched(soak, number):
            life = pool_life(soak, plan, backend) if ending == "pool" else batcher_life(soak, plan, backend, ending)
            task = asyncio.ensure_future(life)
            await asyncio.wait([task], timeout=_PATIENCE_S)
            if not task.done():
                where = stacks()
                task.cancel()
                pytest.fail(f"life {number}, which was to end with {ending!r}, hangs ({soak.trouble}):\n{where}")
            await task
        if ending != "pool":
            soak.reopened[before] += 1  # it has served: its first request was answered
            before = ending
        soak.ended[ending] += 1
        assert backend.leaks() == []
        assert backend.damage() == []
        assert soak.trouble == []
    for backend in machines.values():
        backend.close()


def resident_bytes() -> int:
    """What this process occupies at this moment."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:  # the peak is all that there is elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def growth(values: list[int]) -> float:
    """From the second quarter to the last, by their medians: caches are full by then, and outliers do not count."""
    quarter = len(values) // 4
    return statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter])


def test_soak() -> None:
    samples = np.random.default_rng(0).standard_normal((_SAMPLES, 4)).astype(np.float32)
    soak = Soak(random.Random(0), samples, affine(samples), time.monotonic())
    logging.disable()  # pytest keeps each record, and all that it refers to
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            asyncio.run(soaked(soak))
    finally:
        logging.disable(logging.NOTSET)
    taken = time.monotonic() - soak.begun
    print(f"\n{soak.asked} requests in {taken:.0f} s: {dict(soak.outcomes)}")
    print(f"lives {dict(soak.ended)}, faults {dict(soak.struck)}, served again after {dict(soak.reopened)}")
    blocks, resident = growth(soak.blocks), growth(soak.resident)
    print(f"growth: {blocks:.0f} blocks, {resident / 2**20:.1f} MiB; lives that were watched left {soak.left} objects")
    assert sum(soak.outcomes.values()) == soak.asked >= REQUESTS
    assert 0.3 < soak.leavers / soak.asked < 0.36
    # Many of these are too late, or were refused before: of some lives nearly all.
    assert soak.outcomes["cancelled"] / (soak.asked - soak.outcomes["overloaded"]) > 0.05
    assert soak.outcomes["cancelled"] <= soak.leavers
    for how in ("answered", "overloaded", "late", "failed", "closed"):
        assert soak.outcomes[how] > 0, (how, soak.outcomes)
    assert soak.struck.keys() == {"slow", "launch", "enqueue", "lane", "device", "one of several devices"}
    assert min(soak.reopened[how] for how in ("lane", "device", "one of several devices")) > 0
    assert soak.ended.keys() == set(ENDINGS)
    assert blocks < _BLOCKS, soak.blocks
    assert resident < _RESIDENT, soak.resident
    assert statistics.median(soak.left) < _LEFT, soak.left
