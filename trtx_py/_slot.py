"""Slots: pinned memory of a lane that the caller fills, and the graph that was captured over it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _native
from ._aio import run_shielded
from ._arguments import checked_shape, checked_timeout
from ._capture import ON_LOOP_BYTES, ShapeKey
from ._errors import BorrowedError, ExecutionError, InvalidArgumentError, ShapeError, TrtxError
from ._graphs import ReroutedError
from ._inputs import Arrays
from ._loops import current_hub, finish, turn
from ._resource import Resource
from ._types import Array, Shape, TensorInfo, TensorLocation, TensorMode

if TYPE_CHECKING:
    from ._engine import Engine


#: Outputs up to this size are copied by the event loop, in turns; larger ones by a thread.
_IN_TURNS_BYTES = 1 << 20
_ATTEMPTS = 50
_COPY_S = 10.0


class Slot(Resource):
    """One pinned slot of one lane, from ``async with engine.alloc_inputs(...) as slot``.

    ``slot["x"]`` is the array of input "x" in pinned memory: what is written there needs no further copy on the host.
    The arrays belong to the slot: do not use them after it was closed. One inference at a time.
    """

    _engine: Engine
    _place: _native.Place
    _output_bytes: int
    _copying: threading.Semaphore
    _inputs: Mapping[str, Array]
    _outputs: Mapping[str, Array]

    def __init__(self) -> None:
        self._refuse_construction("engine.alloc_inputs(shapes)")

    @classmethod
    def _create(cls, engine: Engine, place: _native.Place) -> Slot:
        slot = cls.__new__(cls)
        try:
            with slot._opening(engine) as handle:
                device = [t for t in engine.io_tensors if t.location is TensorLocation.DEVICE]
                inputs = [t.name for t in device if t.mode is TensorMode.INPUT]
                outputs = [t.name for t in device if t.mode is TensorMode.OUTPUT]
                slot._engine, slot._place = engine, place
                slot._output_bytes = sum(view.nbytes for view in place.outputs)
                slot._inputs = MappingProxyType(dict(zip(inputs, place.inputs, strict=True)))
                slot._outputs = MappingProxyType(dict(zip(outputs, place.outputs, strict=True)))
                handle.release = place.release
                slot._copying = copying = threading.Semaphore(1)
                handle.busy = lambda: _in_use(place, copying)
                handle.drain = lambda: _await_idle(place, copying)
        except BaseException:
            place.release()
            raise
        return slot

    @property
    def inputs(self) -> Mapping[str, Array]:
        """The input arrays, to be written."""
        self._handle.require_open()
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, Array]:
        """The output arrays in pinned memory: of the last inference of this slot, until the next one."""
        self._handle.require_open()
        return self._outputs

    def __getitem__(self, name: str) -> Array:
        """The array of an input. Raises InvalidArgumentError if there is none of that name."""
        self._handle.require_open()
        try:
            return self._inputs[name]
        except KeyError:
            raise InvalidArgumentError(
                f"there is no input {name!r}; the engine has {', '.join(self._inputs) or 'none'}"
            ) from None

    async def infer(self, *, copy_outputs: bool = True) -> Arrays:
        """Run the engine on what the inputs hold now.

        Args:
            copy_outputs: True gives new arrays that the caller owns. False gives the slot's own, which the next
                inference of this slot overwrites and which end with it.
        Raises:
            BorrowedError: an inference of this slot is in flight already.
            ExecutionError, CudaError: it failed.
            ClosedError: the slot or its engine is closed.
        Cancellation: the result is dropped; the slot is busy until the GPU is done.
        Source: cuGraphLaunch
        """
        self._handle.require_open()
        at_once = copy_outputs and self._output_bytes <= ON_LOOP_BYTES
        wait = self._submit(current_hub(), copy=at_once)
        try:
            result: Arrays = await finish(wait)
        except RuntimeError as error:
            raise self._given_back(error) from error
        if at_once or not copy_outputs:
            return result
        # No turn of the loop lies between the result and here: nobody else can have the slot in the meantime.
        if self._output_bytes <= _IN_TURNS_BYTES:
            with self._reading():
                return await _copied_in_turns(result)
        self._begin_reading()
        return await run_shielded(
            lambda: {name: view.copy() for name, view in result.items()}, on_end=self._copying.release
        )

    def _begin_reading(self) -> None:
        """The outputs are being copied: no other inference, and no end of the slot, until ``_copying`` is released."""
        if not self._copying.acquire(blocking=False):
            raise self._busy()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        self._begin_reading()
        try:
            yield
        finally:
            self._copying.release()

    def infer_sync(self, *, copy_outputs: bool = True, timeout_s: float | None = None) -> Arrays:
        """As ``infer``, blocking this thread.

        Raises:
            TimeoutError: no result within ``timeout_s`` seconds; it is dropped, and the slot is busy until the GPU is
                done.
        """
        timeout = checked_timeout(timeout_s)
        self._handle.require_open()
        wait = self._submit(None, copy=copy_outputs)
        if not wait.block(0 if timeout is None else max(1, int(timeout * 1e9))):
            wait.cancel()
            raise TimeoutError(f"{self._handle}: no result within {timeout} s; it will be dropped")
        try:
            result: Arrays = wait.result()
        except RuntimeError as error:
            raise self._given_back(error) from error
        return result

    def _given_back(self, error: RuntimeError) -> TrtxError:
        self._handle.require_open()
        return ExecutionError(f"{self._handle}: the inference has no result: {error}")

    def _submit(self, hub: _native.Hub | None, *, copy: bool) -> _native.Wait:
        try:
            with self._reading():
                return self._place.submit(hub, copy)
        except RuntimeError:  # in flight, or done and not fetched yet
            raise self._busy() from None

    def _busy(self) -> BorrowedError:
        return BorrowedError(
            f"{self._handle} has an inference in flight; await it first, or take another slot",
            borrowers=[self._handle.describe()],
        )


async def _copied_in_turns(views: Mapping[str, Array]) -> Arrays:
    """New arrays, copied in pieces of 64 KB with a turn of the event loop after each: a thread costs more than that."""
    copies: Arrays = {}
    for name, view in views.items():
        copy = copies[name] = np.empty_like(view)
        source, target = view.reshape(-1).view(np.uint8), copy.reshape(-1).view(np.uint8)
        for start in range(0, source.size, ON_LOOP_BYTES):
            target[start : start + ON_LOOP_BYTES] = source[start : start + ON_LOOP_BYTES]
            await turn()
    return copies


def _in_use(place: _native.Place, copying: threading.Semaphore) -> str | None:
    if copying.acquire(blocking=False):
        copying.release()
        return "an inference of it is in flight" if place.in_flight else None
    return "outputs of its last inference are being copied"


def _await_idle(place: _native.Place, copying: threading.Semaphore) -> None:
    while place.in_flight:
        time.sleep(0.0002)
    copying.acquire(timeout=_COPY_S)  # and kept: a coroutine that was dropped while it copied gives it back in time


class SlotRequest:
    """What ``engine.alloc_inputs`` returns: ``async with`` it, or ``with`` it in a thread."""

    def __init__(self, engine: Engine, shapes: Mapping[str, Any]) -> None:
        engine._handle.require_open()
        self._engine = engine
        self._entered = False
        self._key = _checked(engine.io_tensors, shapes)
        self._slot: Slot | None = None

    async def __aenter__(self) -> Slot:
        self._begin()
        front = self._engine._front
        for _ in range(_ATTEMPTS):
            wait = front.acquire(self._key, current_hub())
            if wait is None:
                for request in front.capture_requests(self._key):
                    await request.wait()
                wait = front.acquire(self._key, current_hub())
            if wait is not None:  # else other shapes took its place already
                if wait.queued:
                    front.make_up(self._key)  # the slots that are out may be the caller's own
                with contextlib.suppress(ReroutedError):  # or while this one waited for a slot
                    return self._made(await finish(wait))
        raise self._evicted()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._slot is not None:
            await self._slot.__aexit__(exc_type, exc, traceback)

    def __enter__(self) -> Slot:
        self._begin()
        front = self._engine._front
        for _ in range(_ATTEMPTS):
            wait = front.acquire(self._key, None)
            if wait is None:
                for request in front.capture_requests(self._key):
                    request.wait_sync(None)
                wait = front.acquire(self._key, None)
            if wait is not None:
                if wait.queued:
                    front.make_up(self._key)
                wait.block(0)
                with contextlib.suppress(ReroutedError):
                    return self._made(wait.result())
        raise self._evicted()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._slot is not None:
            self._slot.__exit__(exc_type, exc, traceback)

    def _begin(self) -> None:
        self._engine._handle.require_open()
        if self._entered:
            raise InvalidArgumentError("alloc_inputs(...) is good for one `async with`; call it again for another slot")
        self._entered = True

    def _evicted(self) -> BorrowedError:
        return BorrowedError(
            f"the captured graph for {self._key} was given up for other shapes {_ATTEMPTS} times before a slot of it "
            "could be had; raise max_graphs, or use fewer shapes at once"
        )

    def _made(self, place: _native.Place) -> Slot:
        self._slot = Slot._create(self._engine, place)
        return self._slot


def _checked(tensors: tuple[TensorInfo, ...], given: Any) -> ShapeKey:
    inputs = [t for t in tensors if t.mode is TensorMode.INPUT]
    expected = "; ".join(str(t) for t in inputs)
    if not isinstance(given, Mapping) or given.keys() != {t.name for t in inputs}:
        found = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise InvalidArgumentError(f"alloc_inputs got {found}; expected a shape for each of {expected}")
    shapes: dict[str, Shape] = {}
    for tensor in inputs:
        if tensor.location is TensorLocation.HOST:
            raise InvalidArgumentError(
                f"{tensor} is read by TensorRT on the host, and a slot is for what is copied to the device; use infer()"
            )
        shape = checked_shape(given[tensor.name], f"shape of {tensor.name!r}")
        if len(shape) != len(tensor.shape) or any(w not in (-1, h) for w, h in zip(tensor.shape, shape, strict=True)):
            raise ShapeError(f"input {tensor.name!r}: shape {shape} does not fit; expected {tensor.shape}")
        shapes[tensor.name] = shape
    return ShapeKey(tuple(shapes.items()))
