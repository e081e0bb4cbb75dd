"""From a contender to something that requests can be sent to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio

from .._aio import run_shielded
from .._engine import Engine
from .._errors import BackendUnavailableError, PrecisionError
from .._slot import Slot
from .._types import Array, Shape, TensorInfo, TensorMode
from ..serving._batcher import DynamicBatcher
from ._bare import BareLane, BareLanes
from ._engines import EnginePool
from ._errors import NotAvailableError
from ._foreign import open_onnxruntime, open_torch
from ._load import Block, BlockingInfer, ClosedLoop, Infer, Inputs, Load, Work, run_closed, run_in_threads, run_open
from ._spec import SHARING, Contender

if TYPE_CHECKING:
    import onnx

#: How long a further slot of an engine is waited for: there are as many as there are.
_SLOT_S = 1.0
#: Bare loops that arrivals from outside may use at once; a closed loop has as many as clients.
_LANES_IN_OPEN_LOOP = 8


@dataclass(frozen=True)
class Target:
    """One contender, open.

    Attributes:
        load: what it is measured under.
        infer: for coroutines.
        calls: for threads, one for each.
        engine: what it runs on, if that is one of trtx_py.
        poison: turns on and off that outputs are overwritten before each run, where that can be done.
    """

    load: Load
    infer: Infer | None = None
    calls: Sequence[BlockingInfer] = ()
    engine: Engine | None = None
    poison: Callable[[bool], None] | None = None

    async def run(self, work: Work) -> Block:
        """One block of requests. Raises what the contender raises."""
        begun = time.process_time_ns()
        block = await self._run(work)
        block.cpu_ns = time.process_time_ns() - begun
        return block

    async def _run(self, work: Work) -> Block:
        if self.infer is None:
            return await run_in_threads(self.calls, work)
        if isinstance(self.load, ClosedLoop):
            return await run_closed(self.infer, work, self.load.clients)
        return await run_open(self.infer, work)


class Opener:
    """Opens contenders; what it opened is closed by the stack.

    Args:
        model: what ONNX Runtime runs; None if there is no ONNX model.
        tensors: of the engine.
    """

    def __init__(
        self, pool: EnginePool, stack: AsyncExitStack, model: onnx.ModelProto | None, tensors: Sequence[TensorInfo]
    ) -> None:
        self._pool, self._stack, self._model = pool, stack, model
        self._inputs = [tensor.name for tensor in tensors if tensor.mode is TensorMode.INPUT]
        self._outputs = [tensor.name for tensor in tensors if tensor.mode is TensorMode.OUTPUT]

    async def open(self, contender: Contender, load: Load, shapes: Mapping[str, Shape]) -> Target:
        """Raises NotAvailableError, saying why, for what cannot run here; anything else is an error."""
        try:
            return await self._opened(contender, load, shapes)
        except (BackendUnavailableError, PrecisionError) as error:
            raise NotAvailableError(" ".join(str(error).split())) from error

    async def _opened(self, contender: Contender, load: Load, shapes: Mapping[str, Shape]) -> Target:
        kind = contender.kind
        threads = load.clients if isinstance(load, ClosedLoop) else load.threads
        if kind == "call":
            return Target(load, contender.call)
        if kind == "torch":
            call = await run_shielded(lambda: open_torch(contender.module, self._inputs, self._outputs))
            return Target(load, calls=[call] * threads)
        if kind in ("onnxruntime", "onnxruntime_cuda"):
            call = await run_shielded(lambda: open_onnxruntime(kind, self._model))
            return Target(load, calls=[call] * threads)
        # Others keep an optimization profile, of which a plan may have one, or slots, which would be missed.
        private = kind not in SHARING
        engine = await self._pool.get(contender.precision, contender.options, private=private, source=contender.source)
        if kind == "engine":
            return Target(load, engine.infer, engine=engine)
        if kind == "sync":
            return Target(load, calls=[engine.infer_sync] * threads, engine=engine)
        if kind == "batcher":
            options: Mapping[str, Any] = contender.batcher
            batcher = await self._stack.enter_async_context(DynamicBatcher(engine, **options))
            return Target(load, batcher.infer, engine=engine)
        if kind == "slot":
            return Target(load, await self._slots(engine, shapes, threads), engine=engine)
        in_turn = isinstance(load, ClosedLoop) or kind == "bare"
        lanes = await self._lanes(engine, shapes, threads if in_turn else _LANES_IN_OPEN_LOOP)
        if kind == "bare":
            return Target(load, calls=[lane.run for lane in lanes.lanes], engine=engine, poison=lanes.poison)

        async def to_thread(inputs: Inputs) -> dict[str, Array]:
            return await asyncio.to_thread(lanes.run, inputs)

        return Target(load, to_thread, engine=engine, poison=lanes.poison)

    async def _lanes(self, engine: Engine, shapes: Mapping[str, Shape], count: int) -> BareLanes:
        lanes = await run_shielded(lambda: BareLanes(engine, shapes, count))
        self._stack.push_async_callback(run_shielded, lanes.close)
        return lanes

    async def _slots(self, engine: Engine, shapes: Mapping[str, Shape], wanted: int) -> Infer:
        """Slots that are held all the time, as a server would; requests beyond them wait for one."""
        free: asyncio.Queue[Slot] = asyncio.Queue()
        for number in range(wanted):
            slot: Slot | None = None
            with anyio.move_on_after(_SLOT_S if number else None):
                slot = await self._stack.enter_async_context(engine.alloc_inputs(shapes))
            if slot is None:
                break
            free.put_nowait(slot)

        async def infer(inputs: Inputs) -> Mapping[str, Array]:
            slot = await free.get()
            try:
                for name, array in inputs.items():
                    slot[name][...] = array
                return await slot.infer()
            finally:
                free.put_nowait(slot)

        return infer


def bare_reference(engine: Engine, shapes: Mapping[str, Shape], sets: Sequence[Inputs]) -> list[dict[str, Array]]:
    """Outputs of a bare loop, overwritten before each run; of ``infer_sync`` where there can be no bare loop."""
    try:
        lane = BareLane(engine, shapes)
    except NotAvailableError:
        return [dict(engine.infer_sync(inputs)) for inputs in sets]
    try:
        lane.poisoning = True
        return [lane.run(inputs) for inputs in sets]
    finally:
        lane.close()
