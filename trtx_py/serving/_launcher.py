"""What a batcher does in its event loop: opening batches, writing rows, launching; and time, and the end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import _native
from .._capture import ON_LOOP_BYTES
from .._errors import (
    ClosedError,
    DeadlineExceededError,
    OverloadedError,
    TrtxError,
)
from ._copier import Copier
from ._groups import Groups, own_copy
from ._jobs import Job
from ._loop import Loop, Timer
from ._memory import Memory, Run
from ._policy import NEVER, Batch, Scheduler, State, Ticket
from ._results import SMOOTHING, Results, seats_of, unexpected
from ._rows import RowLayout
from ._statistics import BatcherStatistics, Counts, Histograms

if TYPE_CHECKING:
    from .._engine import Engine
    from ._filling import BatchRows
    from ._many import NativeWay

_LOOK_AGAIN_S = 0.001


class Launcher:
    """Used in the batcher's event loop only.

    Args:
        name: the batcher's, for messages.
        on_idle: called when something has ended.

    Attributes:
        loop: set before anything else is called.
        native: requests of many rows that go another way, and make room for others.
        gate: the short way into a batch that takes rows now.
        lone: the last launch was one request, and nobody else was there.
        pump_soon: the loop will look what can be launched.
        on_batch: told of each batch that has its result, with the rows that were wanted of it; for the profiler.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        layout: RowLayout,
        scheduler: Scheduler,
        groups: Groups,
        copier: Copier,
        on_idle: Callable[[], None],
    ) -> None:
        self._engine, self._name, self._layout = engine, name, layout
        self._scheduler, self._groups, self._copier, self._on_idle = scheduler, groups, copier, on_idle
        self.loop: Loop | None = None
        self.native: NativeWay | None = None
        self.gate: _native.RowGate | None = None
        self.lone = True
        self.pump_soon = False
        self.on_batch: Callable[[Run, int], None] | None = None
        self.counts = Counts()
        self._timer: Timer | None = None
        self._timer_s = NEVER
        self._starved = False
        self.histograms = Histograms()
        self._results = Results(self, engine, name, layout, scheduler, groups, on_idle)

    def statistics(self) -> BatcherStatistics:
        """A snapshot."""
        scheduler = self._scheduler
        loads: list[Any] = [batch.guests for batch in scheduler.opened() if batch.guests is not None]
        reserved = sum(batch.reserved for batch in scheduler.opened())
        return BatcherStatistics(
            **vars(self.counts),
            waiting=scheduler.waiting + sum(load.wanted for load in loads),
            waiting_rows=scheduler.waiting_rows - reserved + sum(load.live for load in loads),
            running_batches=scheduler.running,
            bytes_in_flight=scheduler.bytes_in_flight,
            **{name: histogram.snapshot() for name, histogram in vars(self.histograms).items()},
        )

    def bypassed(self, rows: int, taken_s: float) -> None:
        """Count a request that went to the engine directly."""
        self.counts.completed += 1
        self.counts.bypassed += 1
        self.counts.rows_completed += rows
        self.histograms.gpu_s.observe(taken_s)
        self.histograms.completion_s.observe(taken_s)

    def chunks_done(self, rows: int, size: int, padding: int, queue_s: NDArray[Any], gpu_s: NDArray[Any]) -> None:
        """Count batches that native threads launched, all of ``size`` rows but for the rest."""
        self.counts.batches += len(gpu_s)
        self.counts.rows_completed += rows
        self.counts.padding_rows += padding
        if not len(gpu_s):
            return
        self.histograms.queue_s.observe_all(queue_s)
        self.histograms.gpu_s.observe_all(gpu_s)
        self.histograms.completion_s.observe_all(queue_s + gpu_s)
        full, rest = divmod(rows, size)
        self.histograms.batch_rows.observe(size, full)
        if rest:
            self.histograms.batch_rows.observe(rest)
        weight = 1 - (1 - SMOOTHING) ** len(gpu_s)
        self._scheduler.expected_s += weight * (float(gpu_s.mean()) - self._scheduler.expected_s)

    # ---- coming in and going ----

    def offer(self, ticket: Ticket, *, wait: bool = False, instead: Ticket | None = None) -> None:
        """Raises OverloadedError, InvalidArgumentError.

        Args:
            wait: as ``Scheduler.offer`` has it.
            instead: of what was set apart: it has room already.
        """
        scheduler, loop = self._scheduler, self.loop
        assert loop is not None
        gate = self._groups.gate(ticket.group)
        if gate is not None and gate.load is not None:
            self._shut(gate)  # what comes after this ticket comes after it
        shed: Sequence[Ticket] = ()
        try:
            if instead is None:
                if not scheduler.fits(ticket):
                    self.dismiss()  # what is kept for nobody in particular has room
                shed = scheduler.offer(ticket, loop.now(), wait=wait)
            else:
                scheduler.come_back(instead, ticket, loop.now())
        except OverloadedError:
            self.counts.rejected += 1
            raise
        for other in shed:
            error = OverloadedError(f"{self._name}: the request was given up for later ones; try again later")
            self.fail(other, error, "shed")
        if ticket.payload.start == 0 and ticket.payload.account.admit():
            self.counts.accepted += 1
        if ticket.state is State.PLACED:
            self._write(ticket)
        self.lone = False
        if not self.pump_soon and (shed or self._matters(ticket)):
            self.soon()

    def _matters(self, ticket: Ticket) -> bool:
        """Its coming changes what can be launched, or when.

        To look for each of many that come one by one costs more than everything else that is done for them; whatever
        ends looks for all.
        """
        scheduler = self._scheduler
        if ticket.deadline != NEVER:
            return True
        if ticket.state is State.OUTSIDE:
            # Else what runs looks when it ends. Native work does not end soon if it is not told that others wait.
            return not scheduler.running or (self.native is not None and self.native.at_work)
        batch = ticket.batch
        if batch is None:
            return not scheduler.saturated or not (self._starved or scheduler.is_open(ticket.group))
        if scheduler.running < scheduler.lanes or len(batch.tickets) == 1:
            return True
        return batch.full and not scheduler.saturated

    def came(self, load: _native.Load | None) -> None:
        """Rows came in by a gate, or were filled. As ``_matters``."""
        if self.pump_soon or load is None:
            return
        scheduler = self._scheduler
        if scheduler.running >= scheduler.lanes and load.wanted > 1 and load.stop < load.capacity:
            assert self.loop is not None
            if load.filling or load.oldest + scheduler.max_delay_s > self.loop.now():
                return  # there is a timer for the first of them
        self.soon()

    def left(self, seat: _native.Seat) -> None:
        """Its caller does not wait any more; if it was taken out, that counts, and the others may go without it."""
        if seat.cancelled():
            self.counts.cancelled += 1
            self.soon()

    def take_out(self, ticket: Ticket) -> bool:
        """Before the launch: nothing runs for it. False: it was launched, or has ended."""
        taken = self._scheduler.remove(ticket)
        if taken:
            self.soon()
        return taken

    def fail(self, ticket: Ticket, error: BaseException, how: str = "failed") -> None:
        """It ends with an error."""
        job: Job = ticket.payload
        self.counts.end(job.account, how)
        if job.filler is not None and not job.filler.sent:
            job.filler.refuse(error)
        elif not job.outcome.done():
            job.outcome.set_exception(error)

    # ---- writing rows ----

    def _write(self, ticket: Ticket) -> None:
        """Bring a ticket's rows into its batch's memory."""
        batch, job = ticket.batch, ticket.payload
        assert batch is not None
        if job.filler is not None:
            job.filler.granted(batch)
        elif ticket.nbytes <= ON_LOOP_BYTES:
            try:
                self._layout.write(batch.memory.inputs, ticket.offset, job.arrays, ticket.rows)
            except Exception as error:  # the others of this batch are not to suffer from it
                self._not_written(ticket, error)
        else:
            self._copy(ticket, batch)

    def _copy(self, ticket: Ticket, batch: Batch) -> None:
        """Large rows are copied by threads; the batch waits for them."""
        loop, memory = self.loop, batch.memory
        assert loop is not None

        def done(error: Exception | None) -> None:
            loop.soon_threadsafe(lambda: self._copied(ticket, batch, error))

        pieces = self._copier.copy(
            self._layout, memory.inputs, ticket.offset, ticket.payload.arrays, ticket.rows, ticket.nbytes, done
        )
        batch.pending += pieces
        memory.users += pieces

    def _copied(self, ticket: Ticket, batch: Batch, error: Exception | None) -> None:
        batch.pending -= 1
        batch.memory.release()
        if error is not None:
            self._not_written(ticket, error)
        if not batch.pending:
            self.pump()

    def _not_written(self, ticket: Ticket, error: Exception) -> None:
        if self._scheduler.remove(ticket):
            self.fail(ticket, unexpected(f"{self._name}: the inputs could not be copied", error))

    # ---- the short way in ----

    def _invite(self, batch: Batch) -> None:
        """Let requests write into this batch themselves, behind those who are in it."""
        gate = self._groups.gate(batch.group)
        if gate is None or gate.load is not None or batch.guests is not None:
            return
        room = self._scheduler.room_for_guests(batch)
        if room > 0:
            load = gate.open(tuple(batch.memory.inputs), batch.rows, batch.rows + room)
            self._scheduler.welcome(batch, load, room)
            self.gate = gate

    def _uninvite(self, batch: Batch) -> None:
        """No more requests into this batch."""
        gate = self._groups.gate(batch.group)
        if gate is not None and gate.load is batch.guests:
            self._shut(gate)

    def next_load(self, gate: _native.RowGate) -> bool:
        """The batch behind the gate is full: open the next one already, while nobody else is in line."""
        load, scheduler = gate.load, self._scheduler
        if load is None or load.stop < load.capacity:
            return False  # it was something else that did not fit
        batch = next((batch for batch in scheduler.opened() if batch.guests is load), None)
        if batch is None or not scheduler.room_for_more(batch):
            return False
        memory = self._groups.memory(batch.group)
        if memory is None:
            return False
        assert self.loop is not None
        self._shut(gate)
        scheduler.set_aside(batch)
        following = scheduler.open(batch.group, memory.capacity, self.loop.now(), memory)
        following.kept = True
        self._invite(following)
        return self.gate is not None

    def is_open(self, seat: _native.Seat) -> bool:
        """Its batch is not launched."""
        return any(seat in seats_of(batch) for batch in self._scheduler.opened())

    def _shut(self, gate: _native.RowGate) -> None:
        gate.shut()
        if self.gate is gate:
            self.gate = None

    def _anticipate(self, batch: Batch) -> None:
        """More of the same will come, all at once: have the next batch open for them."""
        group, scheduler = batch.group, self._scheduler
        if self._groups.gate(group) is None or scheduler.in_line(group) or scheduler.preparing or scheduler.outside:
            return
        memory = self._groups.memory(group)
        if memory is not None:
            assert self.loop is not None
            following = scheduler.open(group, memory.capacity, self.loop.now(), memory)
            following.kept = True
            self._invite(following)

    def dismiss(self) -> None:
        """Give up batches that are open for nobody in particular."""
        for batch in self._scheduler.opened():
            if batch.kept and not batch.wanted:
                batch.kept = False
                self._uninvite(batch)
        self._release_empty()

    def _release_empty(self) -> None:
        for batch in self._scheduler.empty():
            self._uninvite(batch)
            batch.memory.release()

    # ---- launching ----

    def soon(self) -> None:
        """Look what can be launched, once everybody who is about to ask in this turn of the loop has."""
        if not self.pump_soon and self.loop is not None:
            self.pump_soon = True
            try:
                self.loop.soon(self.pump)
            except RuntimeError:  # the loop is closed, and a task of it collected
                return

    def pump(self) -> None:
        loop, scheduler = self.loop, self._scheduler
        assert loop is not None
        self.pump_soon = self._starved = False
        now = loop.now()
        for ticket in scheduler.late(now):
            late, waited = now - ticket.deadline, now - ticket.arrived
            error = DeadlineExceededError(
                f"{self._name}: not launched by its deadline, {late:.4f} s ago, after {waited:.4f} s in line; see "
                "deadline_s"
            )
            self.fail(ticket, error, "late")
        try:
            while self._step(now):
                pass
        except Exception as error:  # nobody called this: those who wait would never hear of it
            failure = unexpected(f"{self._name}: no batch could be put together", error)
            self._end_all(lambda: own_copy(failure), "failed")
        if self.native is not None:
            self.native.look()
        self._arm(now)
        self._on_idle()

    def _step(self, now: float) -> bool:
        """One round of admitting, opening and launching; False: nothing more can be done now."""
        scheduler = self._scheduler
        if scheduler.outside:
            self.dismiss()  # what is kept for others takes room from these
        else:
            self._release_empty()
        admitted = scheduler.admit()
        for ticket in admitted:
            if ticket.state is State.PLACED:
                self._write(ticket)
        self._go_without(now)
        progress = bool(admitted)
        scheduler.make_way(now)
        while (found := scheduler.next_group(now)) is not None:
            group = found[0]
            memory = self._groups.memory(group)
            if memory is None:
                self.dismiss()
                memory = self._groups.memory(group)
            if memory is None:
                self._starved = True
                break
            batch = scheduler.open(group, memory.capacity, now, memory)
            for ticket in list(batch.tickets):
                self._write(ticket)
            if scheduler.may_set_aside(batch, now):
                scheduler.set_aside(batch)  # and the next of the line into another
            else:
                self._invite(batch)
            progress = True
        while (due := scheduler.due(now)) is not None:
            self._launch(due, now)
            progress = True
            if self._groups.wants_graphs(due.group):
                assert self.loop is not None
                self._groups.begin_capture(due.group)
                self.dismiss()  # graphs are recorded in slots that nobody holds
                self._scheduler.preparing += 1
                self.loop.spawn(self._capture(due.group))
        return progress

    async def _capture(self, group: Any) -> None:
        try:
            await self._groups.capture(group)
        finally:
            self._scheduler.preparing -= 1
            self._on_idle()

    def _go_without(self, now: float) -> None:
        """Who is slow to fill rows keeps a batch that could be launched waiting for twice its delay, and no longer."""
        for batch in self._scheduler.opened():
            if batch.written or batch.warned or now < self._patience(batch):
                continue
            if _slow_tickets(batch) or _slow_guests(batch):
                assert self.loop is not None
                batch.warned = True
                # After those who only had no turn of the loop yet: in a long turn many batches end, and each of them
                # looks here.
                self.loop.soon(functools.partial(self._leave_behind, batch))

    def _leave_behind(self, batch: Batch) -> None:
        batch.warned = False
        if batch in self._scheduler.opened():
            for filler in _slow_tickets(batch):
                filler.detach()
            for filler in _slow_guests(batch):
                filler.withhold(batch)
            self.soon()

    def _patience(self, batch: Batch) -> float:
        """Until when a batch waits for callers that fill rows."""
        return max(batch.launch_by, batch.opened) + self._scheduler.max_delay_s

    def _launch(self, batch: Batch, now: float) -> None:
        scheduler, loop = self._scheduler, self.loop
        assert loop is not None
        memory: Memory = batch.memory
        self._uninvite(batch)
        tickets = scheduler.launched(batch)
        if batch.guests is None and batch.live_rows < batch.rows:
            try:
                self._close_gaps(batch, tickets)
            except Exception as error:  # some rows may have been moved, and others not: none can be run any more
                self._results.end(batch, tickets, unexpected(f"{self._name}: not launched", error))
                return
        wanted = batch.wanted
        for ticket in tickets:
            self.histograms.queue_s.observe(now - ticket.arrived)
        if batch.guests is not None:
            self.histograms.queue_s.observe_all(now - np.frombuffer(batch.guests.arrivals()))  # type: ignore[attr-defined]
        self.histograms.batch_rows.observe(wanted)
        end = batch.end
        try:
            memory = batch.memory = memory.where_it_is_free(end)
            running = memory.launch(end)
        except Exception as error:
            failure = error if isinstance(error, TrtxError) else unexpected(f"{self._name}: not launched", error)
            loop.spawn(self._results.recover(batch, tickets, failure))
            return
        loop.spawn(self._results.finish(batch, tickets, wanted, running))
        if not self.lone:
            self._anticipate(batch)

    def _close_gaps(self, batch: Batch, tickets: list[Ticket]) -> None:
        """Rows were taken out: the others move together if a smaller graph will do then."""
        memory: Memory = batch.memory
        if memory.shared or memory.size_for(batch.live_rows) == memory.size_for(batch.end):
            return  # somebody still writes to it, or there is nothing to be won
        start = 0
        for ticket in tickets:
            if ticket.offset != start:
                rows = self._layout.part(memory.inputs, ticket.offset, ticket.offset + ticket.rows)
                self._layout.write(memory.inputs, start, rows, ticket.rows)
                ticket.offset = start
            start += ticket.rows

    # ---- time, and the end ----

    def _arm(self, now: float) -> None:
        scheduler = self._scheduler
        wake = scheduler.wake_at(now)
        if self._starved:
            wake = min(wake, now + _LOOK_AGAIN_S)  # others have all slots, and do not say when they give one back
        for batch in scheduler.opened():
            if not batch.written and (_slow_tickets(batch) or _slow_guests(batch)):
                wake = min(wake, max(self._patience(batch), now))
        if wake == self._timer_s:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_s = wake
        if wake != NEVER:
            assert self.loop is not None
            self._timer = self.loop.later(wake, self._on_time)

    def _on_time(self) -> None:
        self._timer, self._timer_s = None, NEVER
        self.pump()

    def drop_all(self) -> None:
        """Give up what is not launched, and what callers have not sent."""
        self._end_all(self._closed, "dropped")
        self.drop_apart()
        if self.native is not None:
            self.native.drop(self._closed)
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._timer_s = None, NEVER
        self._on_idle()

    def drop_apart(self) -> None:
        """Give up what callers have not sent and no batch waits for."""
        for ticket in self._scheduler.apart:
            self.drop(ticket)
        self.soon()  # there may be room for others

    def drop(self, ticket: Ticket) -> None:
        """Give up one that is not launched."""
        if self._scheduler.remove(ticket):
            self.fail(ticket, self._closed(), "dropped")

    def _end_all(self, error: Callable[[], TrtxError], how: str) -> None:
        """What is not launched ends with an error."""
        for batch in self._scheduler.opened():
            self._uninvite(batch)
            for filler in _slow_guests(batch):
                ticket = filler.withhold(batch)
                self._scheduler.remove(ticket)
                self.fail(ticket, error(), how)
            for seat in seats_of(batch):
                setattr(self.counts, how, getattr(self.counts, how) + 1)
                seat.set_exception(error())
        for ticket in self._scheduler.everybody():
            if self._scheduler.remove(ticket):
                self.fail(ticket, error(), how)
        self.dismiss()

    def _closed(self) -> ClosedError:
        return ClosedError(f"{self._name} was closed before the request was launched")


def _slow_tickets(batch: Batch) -> list[BatchRows]:
    """Callers with tickets that have not filled their rows."""
    fillers = [ticket.payload.filler for ticket in batch.tickets]
    return [filler for filler in fillers if filler is not None and filler.slow]


def _slow_guests(batch: Batch) -> list[BatchRows]:
    """Callers without tickets that have not."""
    load: Any = batch.guests
    return [] if load is None or not load.filling else load.fillers()
