"""What is measured against: C loops, synchronous Python, Python in a thread, and enqueue without a graph."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

from .bare import BareLane, BareRuntime, Shapes, checked
from .floor import Floor
from .loops import Loops
from .samples import CpuMeter, Round
from .workloads import Arrays


class Bench:
    """A lane with one captured place that the bare contenders of a workload share, one at a time.

    Attributes:
        flag: address of the number that the stream writes for ``c0_flag``; ``flag_device``: as the GPU sees it.
    """

    def __init__(self, runtime: BareRuntime, floor: Floor, engine: object, shapes: Shapes, inputs: Arrays) -> None:
        self.runtime, self.floor = runtime, floor
        self.lane = BareLane(runtime, engine, shapes)
        try:
            self.place = self.lane.places[0]
            self.lane.fill(inputs)
            self.graph = self.lane.capture(self.place)
            self.flag, data = runtime.pinned(4)
            data[...] = 0
            self.flag_device = int(checked(runtime.cu.cuMemHostGetDevicePointer(self.flag, 0)))
        except BaseException:
            self.lane.close()
            raise

    def close(self) -> None:
        self.lane.close()
        checked(self.runtime.cu.cuMemFreeHost(self.flag))

    def outputs_by(self, run: Callable[[], object], inputs: Arrays) -> Arrays:
        """Run once on poisoned outputs."""
        self.lane.fill(inputs)
        self.lane.poison()
        run()
        return self.lane.read(self.place)


class _Bare:
    """Times a function that runs one request."""

    name = ""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def _once(self) -> None:
        raise NotImplementedError

    def round(self, count: int) -> Round:
        once, clock, times = self._once, time.perf_counter_ns, [0] * count
        meter = CpuMeter()
        for i in range(count):
            begun = clock()
            once()
            times[i] = clock() - begun
        return meter.round(times)

    def outputs(self, inputs: Arrays) -> Arrays:
        return self._bench.outputs_by(lambda: self.round(1), inputs)


class C0Event(_Bare):
    """A C loop: graph launch, and a spin on an event."""

    name = "c0_event"

    def round(self, count: int) -> Round:
        bench = self._bench
        meter = CpuMeter()
        return meter.round(bench.floor.by_event(bench.graph, bench.lane.stream, bench.place.event, count))


class C0Flag(_Bare):
    """A C loop: graph launch, and a spin on a number that the stream writes into pinned memory."""

    name = "c0_flag"

    def round(self, count: int) -> Round:
        bench = self._bench
        meter = CpuMeter()
        return meter.round(bench.floor.by_flag(bench.graph, bench.lane.stream, bench.flag, bench.flag_device, count))


class P0(_Bare):
    """Synchronous Python: pinned copies, execute_async_v3, cuStreamSynchronize."""

    name = "p0"

    def _once(self) -> None:
        self._bench.lane.run(self._bench.place)


class EnqueueSpin(_Bare):
    """Synchronous Python without a graph, spinning on an event."""

    name = "enqueue_spin"

    def _once(self) -> None:
        self._bench.lane.run_spinning(self._bench.place)


class ToThread(_Bare):
    """``asyncio.to_thread(P0)``: what an async application does without this package."""

    def __init__(self, bench: Bench, loops: Loops, loop: str = "asyncio") -> None:
        super().__init__(bench)
        self._loops, self._loop = loops, loop
        self._ready = threading.local()
        self.name = f"to_thread {loop}"

    def _once(self) -> None:
        if not getattr(self._ready, "done", False):
            self._bench.runtime.make_current()
            self._ready.done = True
        self._bench.lane.run(self._bench.place)

    def round(self, count: int) -> Round:
        return self._loops.run(self._loop, self._round(count))

    async def _round(self, count: int) -> Round:
        once, clock, times = self._once, time.perf_counter_ns, [0] * count
        meter = CpuMeter()
        for i in range(count):
            begun = clock()
            await asyncio.to_thread(once)
            times[i] = clock() - begun
        return meter.round(times)
