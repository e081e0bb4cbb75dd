"""Requests of equal row shapes, and the memory that their batches are put together in."""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np

from .. import _native
from .._capture import ON_LOOP_BYTES, CaptureRefusedError, NotCapturableError, agree
from .._errors import BorrowedError, ClosedError, InvalidArgumentError, MemoryBudgetError, TrtxError
from .._types import Array
from ._loop import AsyncioLoop, Loop
from ._memory import GraphPool, Memory, PlainPool, capture_pool
from ._rows import Group, RowLayout, without

if TYPE_CHECKING:
    from .._engine import Engine

_log = logging.getLogger("trtx_py")

#: After so many batches a group that has no graphs is worth capturing; after so many times as many once more, if that
#: failed and may succeed another time.
_RECURS = 8
_AGAIN = 8
#: Groups that are remembered; the one that was used least goes.
_MOST_GROUPS = 64
_SPARE = 2


def own_copy(error: TrtxError) -> TrtxError:
    """The same error for one of several who get it: each raises its own, with a traceback of its own."""
    kind = error.__class__  # their constructors take different arguments
    clone: TrtxError
    try:
        clone = kind.__new__(kind)
    except TypeError:  # it inherits from MemoryError too, and Python wants the constructor of the first base
        clone = Exception.__new__(kind)
    clone.args = error.args
    clone.__dict__.update(copy.copy(error.__dict__))
    clone.__cause__ = error.__cause__
    return clone


class GraphPools:
    """The graphs that a batcher has borrowed from its engine. Refers to neither."""

    def __init__(self) -> None:
        self._pools: list[GraphPool] = []
        self.closed = False

    def add(self, pool: GraphPool) -> None:
        """Raises ClosedError, and gives the graphs back, once closed."""
        if self.closed:
            pool.close()
            raise ClosedError("the batcher was closed while graphs were captured for it")
        self._pools = [known for known in self._pools if not known.given_back]
        self._pools.append(pool)

    def settle(self) -> None:
        """Wait until the GPU is done with what was launched. What callers are filling outlives the engine then."""
        for pool in self._pools:
            pool.settle()

    def close(self) -> None:
        """Give everything back, but for what callers are filling: that when they leave. Nothing runs. Idempotent."""
        self.closed = True
        for pool in self._pools:
            pool.end()


@dataclass
class _State:
    """One group.

    Attributes:
        sizes: the numbers of rows that a profile admits, ascending.
        plain: for batches that have no graphs, or no slot because callers are slow to fill theirs.
        graphs: None until they are captured.
        batches: since it was last tried to capture them, or they were given up.
        refused: there can be none.
        worth: batches that make graphs worth capturing.
        gate: the short way in, where there is one.
    """

    sizes: tuple[int, ...]
    plain: PlainPool
    gate: _native.RowGate | None
    graphs: GraphPool | None = None
    batches: int = 0
    used: int = 0
    capturing: bool = False
    refused: bool = False
    worth: int = _RECURS

    def later(self) -> None:
        """Graphs could not be had now: after many more batches it is tried again."""
        self.batches = 0
        self.worth *= _AGAIN


@dataclass
class _Preparation:
    """Of a group that several ask for at once."""

    over: anyio.Event
    error: TrtxError | None = None


class Groups:
    """All groups of one batcher.

    Args:
        sizes: numbers of rows to have graphs for, ascending.
        depth: batches that each lane may have at once.
        independent: the caller says that rows do not influence each other; else it is tried out.
        in_line: is anybody of this group waiting?
        short: requests may come in through a RowGate.
    """

    def __init__(
        self,
        engine: Engine,
        layout: RowLayout,
        sizes: Sequence[int],
        depth: int,
        *,
        independent: bool,
        in_line: Callable[[Any], bool],
        short: bool,
    ) -> None:
        self._engine, self._layout, self.sizes, self._depth = engine, layout, tuple(sizes), depth
        self._independent, self._in_line, self._short = independent, in_line, short
        self.known: dict[Group, _State] = {}
        self.pools = GraphPools()
        self._preparing: dict[Group, _Preparation] = {}
        self._refusal: InvalidArgumentError | None = None  # this model is not to be batched
        self._uses = 0
        options = engine._options
        self._lanes = options.lanes
        self._families = max(1, options.max_graphs // len(self.sizes))
        self._capturable = options.cuda_graphs

    def largest(self, group: Group) -> int:
        """The most rows that one batch can have."""
        return self.known[group].sizes[-1]

    def smallest(self, group: Group, rows: int) -> int:
        """With how many rows so many are run."""
        return next(size for size in self.known[group].sizes if size >= rows)

    def may_bypass(self, group: Group, rows: int) -> bool:
        """So many rows need no padding, and are served by a graph if anything of the group is."""
        return rows in self.known[group].sizes

    def may_go_alone(self, inputs: Mapping[str, Any]) -> bool:
        """Nothing that only a batcher looks at stands against it: how many rows there are, and that they are none of a
        model that mixes rows."""
        return bool(self.known) and self._layout.has_at_most(inputs, self.sizes[-1])

    def gate(self, group: Group) -> _native.RowGate | None:
        """The short way in."""
        state = self.known.get(group)
        return state.gate if state is not None else None

    async def prepare_first(self, loop: Loop) -> None:
        """The group of the engine's optimal shapes."""
        shapes = []
        for tensor, axis in zip(self._layout.inputs, self._layout.input_axes, strict=True):
            shape = tensor.ranges[0].opt if tensor.ranges else tensor.shape
            shapes.append(without(shape, axis))
        await self.prepare(tuple(shapes), loop)

    async def prepare(self, group: Group, loop: Loop) -> None:
        """See what a group needs, once. The first group gets its graphs here, others when they recur.

        Raises InvalidArgumentError (the model mixes rows), ShapeError, and what the engine raises.
        """
        if self._refusal is not None:
            raise own_copy(self._refusal)
        while group not in self.known:
            under_way = self._preparing.get(group)
            if under_way is not None:
                await under_way.over.wait()  # all who wait go on in the same turn of the loop, into the same batch
                if under_way.error is not None:
                    raise own_copy(under_way.error)
                continue  # or its caller was cancelled: then it is this one's turn
            mine = self._preparing[group] = _Preparation(anyio.Event())
            try:
                state = await self._prepared(group, loop)
                self._make_room()
                self.known[group] = state
            except TrtxError as error:
                mine.error = error
                raise
            finally:
                del self._preparing[group]
                mine.over.set()

    async def _prepared(self, group: Group, loop: Loop) -> _State:
        sizes = tuple(self._layout.sizes(group, self.sizes))
        if not self._independent:
            await self._try_out(group, sizes)
            self._independent = True
        limit = self._lanes * self._depth + _SPARE
        plain = PlainPool(self._engine, self._layout, group, sizes, time.perf_counter, limit)
        state = _State(sizes, plain, self._gate(group, loop))
        if not any(known.graphs is not None for known in self.known.values()):
            await self._capture(group, state)
        self._uses += 1
        state.used = self._uses
        return state

    def _gate(self, group: Group, loop: Loop) -> _native.RowGate | None:
        formats = self._layout.formats
        if not self._short or not self._layout.leading or formats is None or not isinstance(loop, AsyncioLoop):
            return None
        inputs = tuple(
            (tensor.name, letter, tensor.dtype.numpy.itemsize, shape)
            for tensor, letter, shape in zip(self._layout.inputs, formats, group, strict=True)
        )
        outputs = tuple(tensor.name for tensor in self._layout.outputs)
        return _native.RowGate(inputs, outputs, loop.native, asyncio.CancelledError, ON_LOOP_BYTES)

    def _make_room(self) -> None:
        """Shapes come and go: forget the group that was used least, of those that nobody is in."""
        if len(self.known) < _MOST_GROUPS:
            return
        idle = [
            group
            for group, state in self.known.items()
            if not self._in_line(group) and not state.capturing and not self._is_used(state)
        ]
        if idle:
            state = self.known.pop(min(idle, key=lambda group: self.known[group].used))
            if state.graphs is not None:
                state.graphs.close()

    @staticmethod
    def _is_used(state: _State) -> bool:
        return state.plain.in_use or (state.graphs is not None and state.graphs.in_use)

    async def _capture(self, group: Group, state: _State) -> None:
        if not self._capturable or state.refused:
            return
        try:
            pool = await capture_pool(self._engine, self._layout, group, state.sizes, self._depth)
        except (CaptureRefusedError, BorrowedError, MemoryBudgetError):
            state.later()  # until then batches go as ordinary requests
            return
        except NotCapturableError:
            state.refused = True  # for ever
            return
        self.pools.add(pool)
        state.graphs = pool

    def memory(self, group: Group) -> Memory | None:
        """For the next batch; None: all that there may be is in use."""
        state = self.known[group]
        memory: Memory | None
        if state.graphs is None:
            memory = state.plain.take()
        else:
            memory = state.graphs.take()
            if memory is None and state.graphs.withheld:
                memory = state.plain.take()  # callers hold slots and may do so for long
        if memory is not None:
            self._uses += 1
            state.used = self._uses
            state.batches += 1
        return memory

    def crowded(self, group: Group) -> bool:
        """Callers that are slow to fill rows hold so many batches that the next ones get rows of their own."""
        return self.known[group].plain.crowded

    def wants_graphs(self, group: Group) -> bool:
        """It recurs, and has none; ``capture`` brings them, beside the requests."""
        state = self.known[group]
        return (
            state.graphs is None
            and not any(known.capturing for known in self.known.values())  # one at a time: it takes slots and time
            and self._capturable
            and self._layout.leading
            and not state.refused
            and state.batches >= state.worth
        )

    def begin_capture(self, group: Group) -> None:
        """``capture`` follows."""
        self.known[group].capturing = True

    async def capture(self, group: Group) -> None:
        """Graphs for a group that recurs; if there are too many, the one that was used least gives its own up."""
        state = self.known[group]  # it is not forgotten while this is due
        try:
            held = [known for known in self.known.values() if known.graphs is not None]
            if len(held) >= self._families:
                idle = [known for known in held if not self._is_used(known)]
                if not idle:
                    state.batches = 0  # later
                    return
                victim = min(idle, key=lambda known: known.used)
                assert victim.graphs is not None
                victim.graphs.close()
                victim.graphs, victim.batches = None, 0
            await self._capture(group, state)
        except Exception as error:  # nobody's request: batches go on without graphs
            state.later()
            if not self.pools.closed and not self._engine.closed:
                _log.warning("no CUDA graphs for batches of %s: %s", group, error)
        finally:
            state.capturing = False

    async def _try_out(self, group: Group, sizes: Sequence[int]) -> None:
        """Do a row's outputs change when the others do? The first, one in the middle and the last are looked at."""
        rows = next((size for size in sizes if size > 2), sizes[-1])
        shapes = self._layout.shapes(group, rows)
        random = np.random.default_rng(0)
        first = {t.name: _some(random, shapes[t.name], t.dtype.numpy) for t in self._layout.inputs}
        expected = await self._engine.infer(first)
        self._layout.check_outputs(expected, rows)
        if rows == 1:
            return
        trials = itertools.product(sorted({0, rows // 2, rows - 1}), (_unlike, np.zeros_like))
        for kept, change in trials:
            other = {name: change(array) for name, array in first.items()}
            for tensor, axis in zip(self._layout.inputs, self._layout.input_axes, strict=True):
                row = (*(slice(None),) * axis, slice(kept, kept + 1))
                other[tensor.name][row] = first[tensor.name][row]
            found = await self._engine.infer(other)
            for name in expected:
                if not agree(self._row(expected, name, kept), self._row(found, name, kept)):
                    self._refusal = InvalidArgumentError(
                        f"output {name!r} of row {kept} changed when other rows of the batch did: this model mixes "
                        "rows, and requests that share a batch would change each other. Declare batch_axis if that is "
                        "intended, else use the engine itself"
                    )
                    raise self._refusal

    def _row(self, outputs: Mapping[str, Array], name: str, row: int) -> Array:
        return self._layout.cut({name: outputs[name]}, row, row + 1)[name]


def _some(random: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Numbers in [0, 1), or 0 and 1 where they are whole: they may be indices."""
    if dtype.kind in "fV":
        return random.random(shape).astype(dtype)
    return random.integers(0, 2, shape).astype(dtype)


def _unlike(array: Array) -> Array:
    """Numbers of the same kind, every one of them another."""
    if array.dtype.kind in "fV":
        return (1.5 - array.astype(np.float64)).astype(array.dtype)
    return (1 - array.astype(np.int64)).astype(array.dtype)
