"""The bare loop: TensorRT and the driver with no serving code between, on one thread."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._context import ExecutionContext
from .._engine import Engine
from .._errors import BorrowedError
from .._types import Array, Shape, TensorLocation, TensorMode
from ._errors import NotAvailableError
from ._load import Inputs


class BareLane:
    """One context, stream, and set of pinned and device buffers. Used by one thread at a time; ``close`` it.

    Raises:
        NotAvailableError: an output's size depends on data, a tensor lies on the host, or others hold the plan's
            profiles.
    """

    def __init__(self, engine: Engine, shapes: Mapping[str, Shape]) -> None:
        self._device = engine.runtime.device
        self._driver = self._device._driver
        self._undo = contextlib.ExitStack()
        self._context: ExecutionContext | None = None
        self._inputs: list[tuple[str, Array, int, int, int]] = []
        self._outputs: list[tuple[str, Array, int, int, int]] = []
        #: Overwrite the outputs before each run, here and on the device: what is not computed is noticed.
        self.poisoning = False
        try:
            self._open(engine, shapes)
        except BaseException:
            self.close()
            raise

    def _open(self, engine: Engine, shapes: Mapping[str, Shape]) -> None:
        enter: Any = self._undo.enter_context
        stream = enter(self._device.create_stream())
        try:
            context = self._context = engine.create_execution_context()
        except BorrowedError as error:
            raise NotAvailableError(f"no execution context is left for a bare loop: {error}") from error
        for tensor in engine.io_tensors:
            if tensor.location is TensorLocation.HOST or tensor.is_shape_tensor:
                raise NotAvailableError(f"{tensor} lies on the host: the bare loop knows tensors on the device only")
        for name, shape in shapes.items():
            context.set_input_shape(name, shape)
        for tensor in engine.io_tensors:
            shape = context.get_tensor_shape(tensor.name)
            if -1 in shape:
                raise NotAvailableError(f"{tensor}: its size depends on data, and the bare loop has fixed buffers")
            nbytes = tensor.dtype.nbytes(shape)
            buffer = enter(self._device.allocate(max(nbytes, 1)))
            pinned = enter(self._device.allocate_pinned(max(nbytes, 1)))
            context.set_tensor_address(tensor.name, buffer)
            place = (tensor.name, pinned.array(shape, tensor.dtype.numpy), pinned.address, buffer.address, nbytes)
            (self._inputs if tensor.mode is TensorMode.INPUT else self._outputs).append(place)
        self._stream_handle = stream.handle
        # What ours checks at each enqueue was checked above, once: a bare loop would not do it again.
        self._execute = context._execution.open_context().execute_async_v3

    def run(self, inputs: Inputs) -> dict[str, Array]:
        """Copy in, enqueue, copy out, synchronize; new arrays, which the caller owns."""
        driver, stream = self._driver, self._stream_handle
        for name, array, _, _, _ in self._inputs:
            array[...] = inputs[name]
        if self.poisoning:
            self._poison()
        with self._device._access.current:
            for _, _, host, device, nbytes in self._inputs:
                driver.cuMemcpyHtoDAsync(device, host, nbytes, stream)
            self._execute(stream)
            for _, _, host, device, nbytes in self._outputs:
                driver.cuMemcpyDtoHAsync(host, device, nbytes, stream)
            driver.cuStreamSynchronize(stream)
        return {name: array.copy() for name, array, _, _, _ in self._outputs}

    def _poison(self) -> None:
        with self._device._access.current:
            for _, array, _, device, nbytes in self._outputs:
                array.reshape(-1).view(np.uint8)[...] = 0xFF
                self._driver.cuMemsetD8Async(device, 0xFF, nbytes, self._stream_handle)

    def close(self) -> None:
        """Idempotent."""
        self._inputs.clear()  # views of pinned memory
        self._outputs.clear()
        context, self._context = self._context, None
        if context is not None:
            context.close()  # before the buffers whose addresses it has
        self._undo.close()


class BareLanes:
    """Several lanes for any number of threads: who finds none free waits. ``close`` waits for those in use."""

    def __init__(self, engine: Engine, shapes: Mapping[str, Shape], count: int) -> None:
        self.lanes: list[BareLane] = []
        self._free: queue.SimpleQueue[BareLane] = queue.SimpleQueue()
        try:
            for _ in range(count):
                lane = BareLane(engine, shapes)
                self.lanes.append(lane)
                self._free.put(lane)
        except BaseException:
            self.close()
            raise

    def run(self, inputs: Inputs) -> dict[str, Array]:
        """As ``BareLane.run``, on whichever lane is free."""
        lane = self._free.get()
        try:
            return lane.run(inputs)
        finally:
            self._free.put(lane)

    def poison(self, on: bool) -> None:
        """Whether outputs are overwritten before each run."""
        for lane in self.lanes:
            lane.poisoning = on

    def close(self) -> None:
        """Idempotent. A thread that a cancelled ``asyncio.to_thread`` left behind may still be at work."""
        lanes, self.lanes = self.lanes, []
        for _ in lanes:
            self._free.get().close()
