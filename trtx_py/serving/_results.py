"""How batches end: results go to those who wait for them, and what fails is taken apart."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _native
from .._errors import ClosedError, CudaError, ExecutionError, TrtxError
from .._types import Array
from ..backends.protocols import STICKY_CUDA_ERRORS
from ._groups import Groups, own_copy
from ._jobs import Job
from ._memory import Run, infer_accepted
from ._policy import Batch, Scheduler, Ticket
from ._rows import RowLayout

if TYPE_CHECKING:
    from .._engine import Engine
    from ._launcher import Launcher

#: How much the time that a batch is expected to take follows the last one.
SMOOTHING = 0.2


class Results:
    """What follows a launch. Used in the batcher's event loop only.

    Args:
        name: the batcher's, for messages.
        on_idle: called when something has ended.
    """

    def __init__(
        self,
        launcher: Launcher,
        engine: Engine,
        name: str,
        layout: RowLayout,
        scheduler: Scheduler,
        groups: Groups,
        on_idle: Callable[[], None],
    ) -> None:
        self._launcher, self._engine, self._name, self._layout = launcher, engine, name, layout
        self._scheduler, self._groups, self._on_idle = scheduler, groups, on_idle
        self._outputs = tuple(tensor.name for tensor in layout.outputs)

    async def finish(self, batch: Batch, tickets: list[Ticket], wanted: int, running: Coroutine[Any, Any, Run]) -> None:
        try:
            run = await running
            self._layout.check_outputs(run.outputs, run.size)
            self._deliver(batch, tickets, run, wanted)
        except TrtxError as error:
            await self.recover(batch, tickets, error)
        except Exception as error:  # the batch's callers must not wait for ever
            self.end(batch, tickets, unexpected(f"{self._name}: the batch's results could not be handed out", error))
        except BaseException:  # the event loop ends
            self.end(batch, tickets, ClosedError(f"{self._name}: the event loop ended before the result was there"))
            raise
        else:
            self._give_back(batch)
            if not self._scheduler.idle:
                self._launcher.pump()
            elif self._launcher.lone:
                self._launcher.dismiss()

    def _deliver(self, batch: Batch, tickets: list[Ticket], run: Run, wanted: int) -> None:
        loop, counts, scheduler = self._launcher.loop, self._launcher.counts, self._scheduler
        assert loop is not None
        now = loop.now()
        counts.batches += 1
        counts.padding_rows += run.size - wanted
        self._launcher.histograms.gpu_s.observe(run.gpu_s)
        if self._launcher.on_batch is not None:
            self._launcher.on_batch(run, wanted)
        scheduler.expected_s += SMOOTHING * (run.gpu_s - scheduler.expected_s)
        cut, outputs, observe = self._layout.cut, run.outputs, self._launcher.histograms.completion_s.observe
        for ticket in tickets:
            job: Job = ticket.payload
            if job.outcome.done() or job.account.counted:
                continue  # nobody waits for it any more
            observe(now - ticket.arrived)
            counts.rows_completed += ticket.rows
            if job.parts is None:
                job.account.counted = True
                counts.completed += 1
                job.outcome.set_result(cut(outputs, ticket.offset, ticket.offset + ticket.rows))
            else:
                job.parts.take(outputs, ticket.offset, ticket.rows, job.start)
                self._advance(ticket)
        came = 0
        if batch.guests is not None:
            load: Any = batch.guests
            arrivals = load.arrivals()
            came, rows = load.deliver(tuple(outputs[name] for name in self._outputs))
            self._launcher.histograms.completion_s.observe_all(now - np.frombuffer(arrivals))
            counts.completed += came
            counts.failed += len(arrivals) // 8 - came  # no memory for their results
            counts.rows_completed += rows
        self._launcher.lone = len(tickets) + came <= 1 and not scheduler.waiting

    def _advance(self, ticket: Ticket) -> None:
        """Part of a request is done: its next part follows."""
        parts = ticket.payload.parts
        parts.tickets.discard(ticket)
        if parts.outcome.done():
            self._launcher.counts.end(parts, "completed")
        elif parts.advance is not None:
            try:
                parts.advance()
            except TrtxError as error:
                parts.outcome.set_exception(error)

    async def recover(self, batch: Batch, tickets: list[Ticket], error: TrtxError) -> None:
        """A batch failed: if the device lives and it may have been one request's fault, each gets another chance."""
        alone = len(tickets) + len(seats_of(batch)) < 2
        if alone or _is_sticky(error) or not isinstance(error, ExecutionError):
            self.end(batch, tickets, error)
            return
        try:
            await self._isolate(batch, tickets)
        except BaseException:  # the event loop ends
            self.end(batch, tickets, ClosedError(f"{self._name}: the event loop ended before the result was there"))
            raise

    async def _isolate(self, batch: Batch, tickets: list[Ticket]) -> None:
        """Each request of a batch alone, so that one does not spoil the others."""
        try:
            for ticket in tickets:
                job: Job = ticket.payload
                if job.outcome.done() or job.account.counted:
                    continue
                try:
                    outputs = await self._alone(batch, ticket.offset, ticket.rows)
                except TrtxError as error:
                    self._launcher.fail(ticket, error)
                    continue
                self._launcher.counts.rows_completed += ticket.rows
                if job.parts is None:
                    self._launcher.counts.end(job.account, "completed")
                job.give(outputs)
                if job.parts is not None:
                    self._advance(ticket)
            for seat in seats_of(batch):
                try:
                    outputs = await self._alone(batch, seat.offset, seat.rows)
                except TrtxError as error:
                    self._launcher.counts.failed += not seat.done()
                    seat.set_exception(error)
                    continue
                if not seat.done():
                    self._launcher.counts.completed += 1
                    self._launcher.counts.rows_completed += seat.rows
                    seat.set_result(outputs)
        except Exception as error:
            self.end(batch, tickets, unexpected(f"{self._name}: the batch's results could not be handed out", error))
            return
        self._give_back(batch)
        self._launcher.soon()

    async def _alone(self, batch: Batch, offset: int, rows: int) -> dict[str, Array]:
        """Some rows of a batch's memory, padded as a batch would be."""
        size = self._groups.smallest(batch.group, rows)
        shapes = self._layout.shapes(batch.group, size)
        given: list[Array] = [np.zeros(shapes[t.name], t.dtype.numpy) for t in self._layout.inputs]
        self._layout.write(given, 0, self._layout.part(batch.memory.inputs, offset, offset + rows), rows)
        names = [tensor.name for tensor in self._layout.inputs]
        outputs: Mapping[str, Array] = await infer_accepted(self._engine, dict(zip(names, given, strict=True)))
        return self._layout.cut(outputs, 0, rows)

    def end(self, batch: Batch, tickets: Sequence[Ticket], error: TrtxError) -> None:
        """The batch has no result."""
        for ticket in tickets:
            self._launcher.fail(ticket, own_copy(error))
        for seat in seats_of(batch):
            self._launcher.counts.failed += 1
            seat.set_exception(own_copy(error))
        self._give_back(batch)
        self._launcher.soon()

    def _give_back(self, batch: Batch) -> None:
        batch.memory.release()
        self._scheduler.done(batch)
        self._on_idle()


def seats_of(batch: Batch) -> list[_native.Seat]:
    """Who waits in a batch and came the short way."""
    load: Any = batch.guests
    seats: list[_native.Seat] = [] if load is None else load.seats()
    return seats


def unexpected(what: str, error: BaseException) -> ExecutionError:
    """Of an error that is none of ours."""
    failure = ExecutionError(f"{what} ({type(error).__name__}: {error})")
    failure.__cause__ = error
    return failure


def _is_sticky(error: BaseException) -> bool:
    """The device is lost: another attempt would fail as well."""
    links = [error, error.__cause__]
    return any(isinstance(link, CudaError) and link.code in STICKY_CUDA_ERRORS for link in links)
