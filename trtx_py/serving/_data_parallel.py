"""One large request over several devices: cut along axis 0, put together again in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import numpy as np

from .._aio import run_shielded
from .._errors import ExecutionError, InvalidArgumentError, ShapeError
from .._inputs import Arrays
from .._types import TensorInfo, TensorMode
from ._member import Member
from ._strategies import RequestInfo

#: Larger results are written by a thread: the event loop has others to serve.
_ON_LOOP_BYTES = 1 << 20


@dataclass
class Chunk:
    """Rows that go to one device together.

    Attributes:
        lost: how many devices failed while it ran on them.
    """

    start: int
    stop: int
    lost: int = 0


class RowCutter:
    """How an engine's inputs are cut into rows along axis 0, and its outputs put together.

    Inputs and outputs whose first axis is dynamic have a row for each item; where none is, all are taken to, and chunks
    have exactly as many rows as the engine. Other inputs go whole to every chunk.
    """

    def __init__(self, tensors: Sequence[TensorInfo]) -> None:
        inputs = [t for t in tensors if t.mode is TensorMode.INPUT]
        outputs = [t for t in tensors if t.mode is TensorMode.OUTPUT]
        dynamic = [t for t in inputs if t.shape and t.shape[0] == -1 and not t.is_shape_tensor]
        self._dtypes = {t.name: t.dtype for t in inputs}
        self.fixed = 0
        self.refusal: str | None = None
        if dynamic:
            self.cut = tuple(t.name for t in dynamic)
            self.most = max(
                min(t.ranges[profile].max[0] for t in dynamic if t.ranges) for profile in range(_profiles(dynamic))
            )
            whole = [t.name for t in outputs if not t.shape or t.shape[0] != -1]
            if whole:
                self.refusal = f"output {whole[0]!r} has no axis of rows"
            return
        self.cut = tuple(t.name for t in inputs)
        sizes = {t.shape[0] if t.shape else 0 for t in (*inputs, *outputs)}
        self.fixed = self.most = max(sizes, default=0)
        if len(sizes) != 1 or self.fixed < 1:
            self.refusal = "its inputs and outputs have no first axis in common"

    def rows(self, inputs: Mapping[str, Any]) -> int:
        """How many rows these inputs have; 1 where that cannot be said. Cheap."""
        for name in self.cut:
            shape = getattr(inputs.get(name), "shape", None)
            return shape[0] if shape else 1
        return 1

    def request_of(self, shapes: Mapping[str, Sequence[int]]) -> RequestInfo:
        """A request of these shapes; what cannot be read is left to the engine to refuse."""
        try:
            nbytes = sum(self._dtypes[name].nbytes(tuple(shape)) for name, shape in shapes.items())
            return RequestInfo(int(shapes[self.cut[0]][0]), nbytes)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            return RequestInfo(1, 0)

    def require_rows(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """The inputs, with those that are cut as arrays, and how many rows they have.

        Raises InvalidArgumentError, ShapeError.
        """
        if self.refusal is not None:
            raise InvalidArgumentError(f"infer_many cannot cut this engine's work into rows: {self.refusal}; use infer")
        if not isinstance(inputs, Mapping):
            raise InvalidArgumentError(f"inputs is {type(inputs).__name__}; expected arrays by input name")
        missing = [name for name in self.cut if name not in inputs]
        if missing:
            raise InvalidArgumentError(f"input {missing[0]!r} is missing; expected {', '.join(map(repr, self.cut))}")
        given = {**inputs, **{name: np.asarray(inputs[name]) for name in self.cut}}
        counts = {name: given[name].shape[0] if given[name].ndim else 0 for name in self.cut}
        rows = counts[self.cut[0]]
        for name, count in counts.items():
            if count != rows or not count:
                raise ShapeError(
                    f"input {name!r} has {count} rows (axis 0 of {given[name].shape}); expected at least one, "
                    f"and as many in every input ({self.cut[0]!r} has {rows})"
                )
        if self.fixed and rows % self.fixed:
            raise ShapeError(
                f"{rows} rows: this engine takes {self.fixed} at a time; pad the inputs to a multiple of it"
            )
        return given, rows

    def chunks(self, rows: int, chunk_rows: int | None, limit: int, devices: int) -> deque[Chunk]:
        """The pieces, in order.

        Args:
            chunk_rows: what the caller wants.
            limit: rows of a batch, where there is a batcher; else what the engine takes.
        """
        most = min(self.most, limit)
        if self.fixed:
            if chunk_rows not in (None, self.fixed):
                raise InvalidArgumentError(f"chunk_rows is {chunk_rows}; this engine takes {self.fixed} rows at a time")
            size = self.fixed
        elif chunk_rows is None:
            size = min(most, -(-rows // devices))  # a small request is for all devices too
        elif chunk_rows > most:
            raise InvalidArgumentError(f"chunk_rows is {chunk_rows}; expected 1 to {most}, what one launch takes here")
        else:
            size = chunk_rows
        return deque(Chunk(start, min(start + size, rows)) for start in range(0, rows, size))

    def part(self, inputs: Mapping[str, Any], chunk: Chunk) -> dict[str, Any]:
        """The inputs of one chunk: views."""
        return {**inputs, **{name: inputs[name][chunk.start : chunk.stop] for name in self.cut}}


def _profiles(tensors: Sequence[TensorInfo]) -> int:
    return max(len(t.ranges) for t in tensors)


class Gathering:
    """The results of all chunks, in arrays of the whole."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.outputs: Arrays = {}

    async def take(self, chunk: Chunk, outputs: Arrays) -> None:
        """Write one chunk's. Raises ExecutionError if they do not fit those of others."""
        count = chunk.stop - chunk.start
        for name, array in outputs.items():
            target = self.outputs.get(name)
            if target is None and array.ndim and array.shape[0] == count:
                target = self.outputs[name] = np.empty((self._rows, *array.shape[1:]), array.dtype)
            if target is None or array.shape != (count, *target.shape[1:]):
                expected = (count, *(target.shape[1:] if target is not None else ()))
                raise ExecutionError(
                    f"output {name!r} of rows {chunk.start} to {chunk.stop - 1} has shape {array.shape}; expected "
                    f"{expected}, to put it together with the other rows: infer_many is for outputs of one row each"
                )
        nbytes = sum(array.nbytes for array in outputs.values())
        if nbytes <= _ON_LOOP_BYTES:
            self._write(chunk, outputs)
        else:
            await run_shielded(lambda: self._write(chunk, outputs))

    def _write(self, chunk: Chunk, outputs: Arrays) -> None:
        for name, array in outputs.items():
            self.outputs[name][chunk.start : chunk.stop] = array


class Spread:
    """Workers for each device, which take the next chunk whenever they are free: a slow device takes fewer.

    Args:
        pending: what is to be done; a chunk that is to go elsewhere is put back.
        serving: the devices that can serve now. Raises NoDeviceError if there is none.
        run: one chunk on one device; False: it is to go elsewhere, and this device takes no more.
    """

    def __init__(
        self,
        pending: deque[Chunk],
        serving: Callable[[], Sequence[Member]],
        run: Callable[[Member, Chunk], Awaitable[bool]],
    ) -> None:
        self._pending, self._serving, self._run_on = pending, serving, run
        self._error: Exception | None = None

    async def run(self) -> None:
        """Until all is done. The first error ends all of it. Cancellation: cancels all."""
        while self._pending:  # again, where devices failed and gave their chunks back
            members = sorted(self._serving(), key=lambda member: member.load.seconds)
            async with anyio.create_task_group() as group:
                for turn in range(max(member.width for member in members)):
                    for member in members:
                        if turn < member.width:
                            group.start_soon(self._work, member, group.cancel_scope)
            if self._error is not None:
                raise self._error

    async def _work(self, member: Member, scope: anyio.CancelScope) -> None:
        try:
            while self._pending:
                chunk = self._pending.popleft()
                if not await self._run_on(member, chunk):
                    self._pending.appendleft(chunk)
                    return
        except Exception as error:  # out of the task group, which would wrap it
            if self._error is None:
                self._error = error
            scope.cancel()
