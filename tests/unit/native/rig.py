"""A lane or two on the C mock, with graphs that copy an input to an output: what the tests of the hot path share."""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from mock_backend._native import Mock
from trtx_py import _native

#: What runs a coroutine on asyncio's own loop, and on uvloop's: not every environment of the unit tests has that.
LOOPS: dict[str, Any] = {"asyncio": asyncio.run}
with suppress(ImportError):
    import uvloop

    LOOPS["uvloop"] = uvloop.run

LATENCY, BALANCED, EFFICIENT = 0, 1, 2
MODES = (LATENCY, BALANCED, EFFICIENT)
FOREVER_NS = 0
#: Long enough to be reached by nothing but a hang.
PATIENCE_NS = 20_000_000_000
HOT_NS = 2_000_000
WIDTH = 4


class RefusedError(RuntimeError):
    """What the port's refuse() raises."""


class FailedError(RuntimeError):
    """What the port's fail() makes."""

    def __init__(self, status: int, call: str) -> None:
        super().__init__(f"{status} {call}")
        self.status, self.call = status, call


def refuse() -> None:
    raise RefusedError("closed")


class Gate:
    """A kernel that holds its stream until it is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()

    def __call__(self) -> None:
        assert self._open.wait(60), "nobody opened the gate"

    def open(self) -> None:
        self._open.set()


class Lane:
    """A native lane, and what was captured for it."""

    def __init__(self, rig: Rig, slots: int, mode: int) -> None:
        self.rig = rig
        self.stream = rig.driver.cuStreamCreate(1)
        self.native = _native.Lane(rig.api, rig.context, self.stream, slots, rig.watcher, mode)
        self.gate: Gate | None = None

    def hold(self) -> Gate:
        """Nothing that is launched from now on runs before the gate is opened."""
        gate = Gate()
        code, _ = self.rig.mock.launch(self.stream, 0, gate)
        assert code == 0
        self.rig.gates.append(gate)
        return gate

    def rest(self) -> None:
        """Wait until nothing is in flight, and somebody has seen it."""
        self.rig.driver.cuStreamSynchronize(self.stream)
        while self.native.poll():  # as it is while the watcher looks
            time.sleep(0)
        self.native.statistics()  # takes the lock under which the watcher, who may have seen the last one, tells of it

    def bucket(
        self,
        width: int = WIDTH,
        *,
        slots: Sequence[int] | None = None,
        on_loop: bool = True,
        format: str | None = "f",
        kernel: Callable[[], None] | None = None,
    ) -> Any:
        """A bucket for x: float32[1, width] whose output y is a copy of x, with a place on each of ``slots``."""
        bucket = _native.Bucket(self.native, (("x", format, (1, width)),), ("y",), on_loop)
        for slot in range(self.native.slots) if slots is None else slots:
            self.add_place(bucket, slot, width, kernel)
        return bucket

    def add_place(
        self, bucket: _native.Bucket, slot: int, width: int = WIDTH, kernel: Callable[[], None] | None = None
    ) -> None:
        """Capture a graph for one slot, and add it."""
        driver, nbytes = self.rig.driver, width * 4
        x_pinned, x = self.rig.pinned(nbytes)
        y_pinned, y = self.rig.pinned(nbytes)
        x_device, y_device = self.rig.device(nbytes), self.rig.device(nbytes)
        driver.cuStreamBeginCapture(self.stream, 2)
        driver.cuMemcpyHtoDAsync(x_device, x_pinned, nbytes, self.stream)
        driver.cuMemcpyDtoDAsync(y_device, x_device, nbytes, self.stream)
        if kernel is not None:
            code, _ = self.rig.mock.launch(self.stream, 0, kernel)
            assert code == 0
        driver.cuMemcpyDtoHAsync(y_pinned, y_device, nbytes, self.stream)
        graph = driver.cuStreamEndCapture(self.stream)
        execution = driver.cuGraphInstantiate(graph, 0)
        driver.cuGraphDestroy(graph)
        self.rig.executables.append(execution)
        bucket.add_place(slot, execution, (x,), (y,))


class Rig:
    """One mock device with its context current, and everything that was made on it."""

    def __init__(self, *, instant: bool = False) -> None:
        self.mock = Mock(instant=instant)
        self.mock.select()
        self.api = self.mock.api
        self.driver = _native.Driver(self.api)
        self.driver.cuInit(0)
        self.context = self.driver.cuDevicePrimaryCtxRetain(0)
        self.driver.cuCtxPushCurrent(self.context)
        self.watcher = _native.Watcher()
        self.lanes: list[Lane] = []
        self.gates: list[Gate] = []
        self.executables: list[int] = []
        self._pinned: list[int] = []
        self._device: list[int] = []

    def lane(self, slots: int = 2, mode: int = LATENCY) -> Lane:
        """Make a lane."""
        lane = Lane(self, slots, mode)
        self.lanes.append(lane)
        return lane

    def port(self, *buckets: _native.Bucket, max_hot_ns: int = HOT_NS) -> Any:
        """A port with these buckets."""
        port = _native.Port(np.ndarray, ("x",), refuse, FailedError, max_hot_ns)
        for bucket in buckets:
            port.add(bucket)
        return port

    def pinned(self, nbytes: int) -> tuple[int, np.ndarray[Any, Any]]:
        """Pinned memory and a view of it as float32[1, n]."""
        address = self.driver.cuMemHostAlloc(nbytes, 0)
        self._pinned.append(address)
        memory = (ctypes.c_char * nbytes).from_address(address)
        return address, np.frombuffer(memoryview(memory).cast("B"), np.float32).reshape(1, -1)

    def device(self, nbytes: int) -> int:
        """Device memory."""
        address = self.driver.cuMemAlloc(nbytes)
        self._device.append(address)
        return address

    def fault(self, call: str, error: int, *, nth: int = 1, count: int = 1, lose: bool = False) -> None:
        """The next calls of a driver function fail."""
        self.mock.inject(call, nth, count, error, 0, lose)

    def close(self, *, sound: bool = True) -> None:
        """End everything; every lane must come to rest. sound: the device lived to the end."""
        for gate in self.gates:
            gate.open()
        self.mock.clear_faults()
        for lane in self.lanes:
            if sound:
                self.driver.cuStreamSynchronize(lane.stream)
            until = time.monotonic() + 20
            while not lane.native.close():  # also while the watcher looks
                assert time.monotonic() < until, lane.native.statistics()
        self.watcher.close()
        if not sound:
            return
        for executable in self.executables:
            self.driver.cuGraphExecDestroy(executable)
        for address in self._pinned:
            self.driver.cuMemFreeHost(address)
        for address in self._device:
            self.driver.cuMemFree(address)
        for lane in self.lanes:
            self.driver.cuStreamDestroy(lane.stream)
        self.driver.cuDevicePrimaryCtxRelease(0)
        assert self.mock.leaks() == []
        assert self.mock.damage() == []


@contextmanager
def rig(*, instant: bool = False, sound: bool = True) -> Iterator[Rig]:
    """A Rig that is closed at the end of the block."""
    made = Rig(instant=instant)
    try:
        yield made
    except BaseException:
        for gate in made.gates:
            gate.open()
        raise
    made.close(sound=sound)


def sample(value: float = 1.0, width: int = WIDTH) -> np.ndarray[Any, Any]:
    """An input."""
    return np.full((1, width), value, np.float32)


def submit(port: _native.Port, value: float = 1.0, hub: _native.Hub | None = None) -> Any:
    """A request that the port takes."""
    wait = port.submit({"x": sample(value)}, hub)
    assert wait is not None
    return wait


def at_rest(port: _native.Port) -> bool:
    """Every request that was ever taken has ended in exactly one way."""
    return port.completed + port.failed + port.cancelled == port.hits and port.in_flight == 0 and port.queued == 0
