"""What still runs on the GPU or in a thread when nobody waits for it: nothing that it uses goes before it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, slow
from tests.unit.batching import ALONE, start, turns, until, wide_plan
from tests.unit.serving import N4, PATIENCE_S, GateClock, affine, affine_model, affine_plan, rows, serving
from trtx_py import _slot
from trtx_py._graphs import GraphCache
from trtx_py._resource import State
from trtx_py._site import LaneSite
from trtx_py.cuda import _array, _stream
from trtx_py.serving import _copier
from trtx_py.serving._memory import GraphPool

X3 = {"x": (3, 4)}
ROOT = Path(__file__).resolve().parents[2]
every_completion = pytest.mark.parametrize("completion", ["latency", "efficient"])


class Gate:
    """A backend whose kernels are held on demand, and who is seen to wait for them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock = GateClock()
        self.backend = MockBackend(clock=self.clock)
        self._waits = threading.Event()
        for place, name in ((LaneSite, "rest"), (GraphPool, "settle"), (_slot, "_await_idle")):
            patch.setattr(place, name, self._seen(getattr(place, name)))

    def _seen(self, function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            self._waits.set()
            function(*arguments)

        return call

    @property
    def waits(self) -> bool:
        """Somebody waits for the GPU, or for what uses a slot."""
        return self._waits.is_set()

    def hold(self) -> None:
        """The next kernel runs until the end of ``awaited``."""
        self.backend.inject(slow(count=1))
        self.forget()

    def forget(self) -> None:
        """What was closed before waited for something else."""
        self._waits.clear()

    async def launched(self) -> None:
        await self.clock.wait_reached()

    async def awaited(self, closing: asyncio.Task[Any]) -> None:
        """``closing`` comes to where it waits for the GPU, which it does not leave before the kernel has ended."""
        await until(lambda: closing.done() or self._waits.is_set() or self.backend.damage())
        await turns()
        assert not closing.done(), "it was closed under a running kernel"
        assert self.backend.damage() == []
        self.clock.open()
        with anyio.fail_after(PATIENCE_S):
            await closing

    async def finished(self, closing: asyncio.Task[Any]) -> None:
        """``closing`` comes to its end, and not before the kernel."""
        await turns(100)
        assert not closing.done(), "it was closed under a running kernel"
        self.clock.open()
        with anyio.fail_after(PATIENCE_S):
            await closing
        assert self.backend.damage() == []

    def finish_in_thread(self, closing: threading.Thread) -> None:
        closing.start()
        while closing.is_alive() and not self._waits.wait(0.001):
            pass
        self.clock.open()
        closing.join(PATIENCE_S)
        assert not closing.is_alive()
        assert self.backend.damage() == []


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Everything is closed and whole at the end."""
    made = Gate(monkeypatch)
    yield made
    made.clock.open()
    gc.collect()
    assert trtx.live_objects() == []
    made.backend.assert_clean()
    made.backend.close()


async def given_up(gate: Gate, call: Coroutine[Any, Any, Any]) -> None:
    """``call`` has launched something, which is held, and is cancelled."""
    gate.hold()
    task = start(call)
    await gate.launched()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


@contextlib.asynccontextmanager
async def captured(gate: Gate, **options: Any) -> AsyncIterator[trtx.Engine]:
    async with serving(gate.backend, **{"slots": 2, **options}) as engine:
        async with engine.alloc_inputs(X3):
            pass
        yield engine


async def give_up(gate: Gate, engine: trtx.Engine, how: str) -> list[Any]:
    """A request on a captured graph that nobody waits for any more, one way or another. Returns what is kept open."""
    if how == "infer":
        await given_up(gate, engine.infer({"x": rows(3)}))
        return []
    slot = await engine.alloc_inputs(X3).__aenter__()
    if how == "slot":
        await given_up(gate, slot.infer())
        return [slot]
    gate.hold()
    if how == "timeout":
        with pytest.raises(TimeoutError):
            slot.infer_sync(timeout_s=0.001)
    else:
        call = slot.infer()
        call.send(None)
        call.close()
    await gate.launched()
    return [slot]


def assert_nothing_is_allocated(engine: trtx.Engine) -> None:
    found = engine.statistics()
    assert (found.running, found.device_memory.current_bytes, found.pinned_memory.current_bytes) == (0, 0, 0)


WAYS = ["infer", "slot", "timeout", "dropped"]


@every_completion
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("of", ["engine", "runtime"])
async def test_closing(gate: Gate, completion: str, how: str, of: str) -> None:
    async with captured(gate, completion=completion) as engine:
        kept = await give_up(gate, engine, how)
        assert engine.statistics().running == 1
        await gate.awaited(start((engine if of == "engine" else engine.runtime).aclose()))
        assert all(slot.closed for slot in kept)
        assert_nothing_is_allocated(engine)


@every_completion
async def test_closing_without_a_loop(gate: Gate, completion: str) -> None:
    """``close()`` refuses for what is waited for; what is not is no obstacle, and is seen out."""
    async with captured(gate, completion=completion) as engine:
        await give_up(gate, engine, "infer")
        await gate.awaited(start(asyncio.to_thread(engine.close)))
        assert_nothing_is_allocated(engine)


async def test_closing_that_is_interrupted(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while ``close()`` waits for the GPU ends this call. The closing goes on, and can be waited for."""
    rest, interrupts = LaneSite.rest, [KeyboardInterrupt()]

    def interrupted(site: LaneSite) -> None:
        if interrupts:
            raise interrupts.pop()
        rest(site)

    async with captured(gate) as engine:
        await give_up(gate, engine, "infer")
        monkeypatch.setattr(LaneSite, "rest", gate._seen(interrupted))
        with pytest.raises(KeyboardInterrupt):
            engine.close()
        await gate.awaited(start(engine.aclose()))
        assert_nothing_is_allocated(engine)


@every_completion
@pytest.mark.parametrize("how", WAYS)
async def test_a_forgotten_engine(gate: Gate, completion: str, how: str) -> None:
    """The reaper waits as ``close`` does."""
    async with trtx.Runtime(None, gate.backend) as runtime:
        made = [await runtime.deserialize(affine_plan(), slots=2, completion=completion)]
        async with made[0].alloc_inputs(X3):
            pass
        kept = await give_up(gate, made[0], how)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            made.clear()
            kept.clear()
            gc.collect()
        await gate.awaited(start(asyncio.to_thread(trtx.live_objects)))
        assert [found.kind for found in trtx.live_objects()] == ["Runtime", "Device"]


@every_completion
def test_a_loop_that_ends(gate: Gate, completion: str) -> None:
    """Everything that it ran is cancelled, and it is gone; then the engine is closed elsewhere."""
    made: list[Any] = []

    async def body() -> None:
        runtime = trtx.Runtime(None, gate.backend)
        engine = await runtime.deserialize(affine_plan(), slots=2, completion=completion)
        made.extend((engine, runtime))
        async with engine.alloc_inputs(X3):
            pass
        gate.hold()
        made.append(start(engine.infer({"x": rows(3)})))
        await gate.launched()

    asyncio.run(body())
    assert made.pop().cancelled()

    async def after() -> None:
        await gate.awaited(start(asyncio.to_thread(lambda: [one.close() for one in made])))

    asyncio.run(after())


async def test_weights_are_not_changed(gate: Gate) -> None:
    with (
        trtx.Builder(None, gate.backend) as builder,
        builder.create_network() as network,
        builder.create_config(trtx.BuilderOptions(refit="all", profiles=[N4])) as config,
    ):
        network.parse_onnx(affine_model())
        plan = builder.build_serialized_network_sync(network, config)
    async with captured(gate, plan=plan) as engine:
        refitter = engine.create_refitter()
        await give_up(gate, engine, "infer")
        with pytest.raises(trtx.BorrowedError, match="has been used"):
            refitter.refit()
        await gate.awaited(start(engine.aclose()))


async def test_a_profile_is_not_taken_away(gate: Gate) -> None:
    """One context at a time has the profile, and what was cancelled computes in it."""
    async with captured(gate, plan=affine_plan(sharing=False)) as engine:
        await give_up(gate, engine, "infer")
        with pytest.raises(trtx.BorrowedError, match="under way"):
            engine.create_execution_context()
        assert gate.backend.damage() == []
        gate.clock.open()
        await until(lambda: not engine.statistics().running)
        engine.create_execution_context().close()


@every_completion
@pytest.mark.parametrize("how", ["infer", "slot", "dropped"])
async def test_a_graph_is_not_evicted(gate: Gate, monkeypatch: pytest.MonkeyPatch, completion: str, how: str) -> None:
    """There is room for one, and another shape is captured: what is given up in flight stays until it has ended."""
    looked: list[int] = []
    tidy = GraphCache.tidy

    def seen(cache: GraphCache) -> None:
        tidy(cache)
        looked.append(len(cache._captured) + len(cache._retired))

    monkeypatch.setattr(GraphCache, "tidy", seen)
    async with captured(gate, completion=completion, max_graphs=1) as engine:
        async with engine.alloc_inputs(X3), engine.alloc_inputs({"x": (2, 4)}):
            pass  # in use, so that both of them are there for now
        for slot in await give_up(gate, engine, how):
            slot._handle.release()  # given back in flight, as the end of a loop has it
        del looked[:]
        await until(lambda: len(looked) > 2)
        assert looked[-1] == 2
        gate.clock.open()
        await until(lambda: looked[-1] == 1)
        assert np.array_equal((await engine.infer({"x": rows(3)}))["y"], affine(rows(3)))


# ---- what stays on the device ----


class Source:
    """Device memory of another library, by the CUDA array interface."""

    def __init__(self, device: trtx.Device, values: np.ndarray) -> None:
        driver = self._driver = device._driver
        self._current = device.current()
        self.address = driver.cuMemAlloc(values.nbytes)
        stream = driver.cuStreamCreate(1)
        driver.cuMemcpyHtoDAsync(self.address, values.ctypes.data, values.nbytes, stream)
        driver.cuStreamSynchronize(stream)
        driver.cuStreamDestroy(stream)
        self.__cuda_array_interface__ = {
            "version": 3, "shape": values.shape, "typestr": values.dtype.str, "data": (self.address, True),
            "strides": None, "stream": None,
        }  # fmt: skip

    def __del__(self) -> None:
        with self._current:
            self._driver.cuMemFree(self.address)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("of", ["device", "host"])
async def test_device_inputs_and_outputs(gate: Gate, own: bool, of: str) -> None:
    """Those of a cancelled request, which nobody else has, stay until the GPU has read and written them."""
    async with captured(gate) as engine:
        device = engine.runtime.device
        with device.create_stream() as stream, device.current():
            source: Any = trtx.DeviceArray.from_host(device, rows(3), stream)
            if not own:
                source = Source(device, rows(3))
            call = engine.infer_on_device if of == "device" else engine.infer
            gone = weakref.ref(source)
            gate.hold()
            task = start(call({"x": source}))
            del source
            await gate.launched()
            task.cancel()
            await asyncio.wait([task])
            del task
            gc.collect()
            assert gone() is not None or own  # of our own array the memory stays, not the object
            assert gate.backend.damage() == []
            gate.clock.open()
            await until(lambda: not engine.statistics().running)
            gc.collect()
            await until(lambda: gone() is None)


# ---- batchers ----


@contextlib.asynccontextmanager
async def batching(gate: Gate, plan: trtx.Plan | None = None, **options: Any) -> AsyncIterator[trtx.DynamicBatcher]:
    async with (
        serving(gate.backend, plan, max_graphs=4) as engine,
        trtx.DynamicBatcher(engine, policy=ALONE, max_batch_size=8, **options) as batcher,
    ):
        await batcher.warmup()
        yield batcher


async def all_of_a_batch(gate: Gate, batcher: trtx.DynamicBatcher) -> None:
    """Several requests in one launch, all of which are cancelled then."""
    batcher._launcher.lone = False
    gate.hold()
    tasks = [start(batcher.infer({"x": rows(1, n)})) for n in range(3)]
    await gate.launched()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def fill(batcher: trtx.DynamicBatcher) -> None:
    async with batcher.alloc_rows(2) as own:
        own["x"][...] = rows(2)
        await own.infer()


async def filled(gate: Gate, batcher: trtx.DynamicBatcher) -> None:
    """Rows that were filled in place."""
    batcher._launcher.lone = False
    await given_up(gate, fill(batcher))


async def many(gate: Gate, batcher: trtx.DynamicBatcher) -> None:
    """Batches that a thread launches."""
    await given_up(gate, batcher.infer_many({"x": rows(800)}))


async def lone(gate: Gate, batcher: trtx.DynamicBatcher) -> None:
    """One request alone, which went to the engine."""
    await given_up(gate, batcher.infer({"x": rows(2)}))


BATCHES = [all_of_a_batch, filled, many, lone]


@pytest.mark.parametrize("how", BATCHES)
@pytest.mark.parametrize("of", ["batcher", "engine", "both"])
async def test_closing_a_batcher(gate: Gate, how: Any, of: str) -> None:
    async with batching(gate) as batcher:
        await how(gate, batcher)
        engine = batcher.engine
        closing = {"batcher": batcher.aclose, "engine": engine.aclose}.get(of)

        async def both() -> None:
            await batcher.aclose(drain=False)
            await engine.aclose()

        await gate.finished(start((closing or both)()))
        if of == "batcher":  # its slots are the engine's again
            assert np.array_equal((await engine.infer({"x": rows(8)}))["y"], affine(rows(8)))
            async with trtx.DynamicBatcher(engine) as other:
                found = await other.infer_many({"x": rows(100)})
                assert np.array_equal(found["y"], affine(rows(100)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of tasks without a loop
@pytest.mark.parametrize("how", BATCHES)
def test_a_batchers_loop_that_is_closed_in_the_middle(gate: Gate, how: Any) -> None:
    """Nothing was cancelled, nothing is resumed: what was begun is seen out by who closes."""
    loop = asyncio.new_event_loop()
    made: list[Any] = []

    async def body() -> None:
        runtime = trtx.Runtime(None, gate.backend)
        engine = await runtime.deserialize(affine_plan(), max_graphs=4)
        batcher = trtx.DynamicBatcher(engine, policy=ALONE, max_batch_size=8)
        made.extend((batcher, engine, runtime))
        await batcher.warmup()
        batcher._launcher.lone = how is lone
        gate.hold()
        calls = {
            all_of_a_batch: lambda: batcher.infer({"x": rows(3)}),
            lone: lambda: batcher.infer({"x": rows(3)}),
            many: lambda: batcher.infer_many({"x": rows(80000)}),
            filled: lambda: fill(batcher),
        }
        made.append(start(calls[how]()))
        await until(lambda: gate.clock.reached.acquire(blocking=False))

    loop.run_until_complete(body())
    task = made.pop()
    loop.close()
    try:
        closing = threading.Thread(target=lambda: [one.close() for one in made])
        gate.finish_in_thread(closing)
    finally:
        task._log_destroy_pending = False


async def test_rows_that_are_still_copied(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads write a cancelled request's large rows: the memory stays until they have."""
    begun, ended, awaited = threading.Event(), threading.Event(), threading.Event()
    write, close = _copier._write, _copier.Copier.close

    def slowly(*arguments: Any) -> None:
        begun.set()
        assert ended.wait(PATIENCE_S)
        write(*arguments)

    def seen(copier: _copier.Copier) -> None:
        awaited.set()
        close(copier)

    monkeypatch.setattr(_copier, "_write", slowly)
    monkeypatch.setattr(_copier.Copier, "close", seen)
    async with batching(gate, wide_plan()) as batcher:
        engine = batcher.engine
        batcher._launcher.lone = False
        task = start(batcher.infer({"x": np.zeros((2, 32768), np.float32)}))
        await until(begun.is_set)
        task.cancel()
        await asyncio.wait([task])
        closing = start(engine.aclose())
        try:
            await until(lambda: closing.done() or awaited.is_set())
            assert engine.statistics().pinned_memory.current_bytes
        finally:
            ended.set()
            await closing
        assert_nothing_is_allocated(engine)


async def test_two_closers(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """One closes the batcher. Meanwhile the other closes the engine, whose lanes are younger, and would go first."""
    async with serving(mock_backend) as engine:
        batcher = trtx.DynamicBatcher(engine)
        await batcher.warmup()
        other = threading.Thread(target=lambda: asyncio.run(engine.aclose()))
        settle, kept = GraphPool.settle, []

        def late(pool: GraphPool) -> None:
            if other.ident is None:
                other.start()
                other.join(0.2)  # who does not wait is done with it
                kept.append(engine.statistics().pinned_memory.current_bytes)
            settle(pool)

        monkeypatch.setattr(GraphPool, "settle", late)
        await batcher.aclose()
        await asyncio.to_thread(other.join)
        assert engine.closed
        assert len(kept) == 1
        assert kept[0] > 0


async def test_two_closers_of_a_slot(mock_backend: MockBackend) -> None:
    """The first waits for other things yet; the second finds what the first one keeps from use, and goes on."""
    async with serving(mock_backend, slots=2) as engine:
        slot = await engine.alloc_inputs(X3).__aenter__()
        drain, held, go_on = engine._handle.drain, threading.Event(), threading.Event()
        assert drain is not None

        def slowly() -> None:
            held.set()
            assert go_on.wait(PATIENCE_S)
            drain()

        engine._handle.drain = slowly
        first = start(engine.aclose())
        await until(held.is_set)
        second = start(engine.runtime.aclose())
        await until(lambda: engine.runtime._handle.state is State.CLOSING)
        go_on.set()
        with anyio.fail_after(_slot._COPY_S / 2):
            await asyncio.wait([first, second])
        assert slot.closed


_STANDS = """
import asyncio, sys
import trtx_py as trtx
from mock_backend import MockBackend, slow
from tests.unit.serving import rows, serving

async def main():
    global held, engine, batcher, tasks
    backend = MockBackend()
    held = serving(backend)
    engine = await held.__aenter__()
    batcher = trtx.DynamicBatcher(engine)
    await batcher.infer({"x": rows(1)})
    backend.inject(slow(seconds=0.02, count=5))
    if sys.argv[1] == "infer":
        tasks = [asyncio.ensure_future(batcher.infer({"x": rows(1)})) for _ in range(40)]
    else:
        tasks = [asyncio.ensure_future(batcher.infer_many({"x": rows(100)}))]
    while not batcher.statistics().running_batches and not batcher.statistics().waiting:
        await asyncio.sleep(0)

loop = asyncio.new_event_loop()
loop.run_until_complete(main())
print("left")
"""


@pytest.mark.parametrize("how", ["infer", "infer_many"])
def test_a_process_ends_although_its_loop_stands(how: str) -> None:
    """Nothing is brought to an end in a loop that nobody runs any more, and its requests are not waited for."""
    done = subprocess.run(
        [sys.executable, "-c", _STANDS, how], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout == "left\n", done.stderr
    assert done.returncode == 0, done.stderr
    assert "damage" not in done.stderr
    assert "at exit failed" not in done.stderr


# ---- coroutines that are dropped while a thread works for them ----


class Worker:
    """What ``run_shielded`` runs in its thread is held until ``end``."""

    def __init__(self, patch: pytest.MonkeyPatch, module: Any) -> None:
        self.begun, self._ended = threading.Event(), threading.Event()
        run = module.run_shielded

        def held(function: Callable[[], Any], *arguments: Any, **options: Any) -> Any:
            def slowly() -> Any:
                self.begun.set()
                assert self._ended.wait(PATIENCE_S)
                return function()

            return run(slowly, *arguments, **options)

        patch.setattr(module, "run_shielded", held)

    async def dropped(self, call: Coroutine[Any, Any, Any]) -> None:
        """``call`` has begun its work, and is gone as with a loop that is closed."""
        with anyio.fail_after(PATIENCE_S):
            while not self.begun.is_set():
                call.send(None)
                await asyncio.sleep(0)
        call.close()

    def end(self) -> None:
        self._ended.set()


async def test_outputs_that_are_still_copied(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_slot, "ON_LOOP_BYTES", 1)
    monkeypatch.setattr(_slot, "_IN_TURNS_BYTES", 1)
    worker = Worker(monkeypatch, _slot)
    async with captured(gate) as engine, engine.alloc_inputs(X3) as slot:
        gate.forget()
        await worker.dropped(slot.infer())
        with pytest.raises(trtx.BorrowedError, match="being copied"):
            slot.close()
        closing = start(slot.aclose())
        await until(lambda: closing.done() or gate.waits)
        await turns()
        assert not closing.done()
        worker.end()
        await closing


@pytest.mark.parametrize("what", ["array", "stream"])
async def test_what_a_thread_is_in(gate: Gate, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    worker = Worker(monkeypatch, _array if what == "array" else _stream)
    async with trtx.Runtime(None, gate.backend) as runtime:
        with runtime.device.create_stream() as stream:
            used: Any = trtx.DeviceArray.from_host(runtime.device, rows(3), stream) if what == "array" else stream
            await worker.dropped(used.to_host() if what == "array" else used.wait_idle())
            assert used._handle.loans
            worker.end()
            await until(lambda: not used._handle.loans)
            used.close()
