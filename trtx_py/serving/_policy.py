"""What is launched when, and who has to wait: the batcher's decisions, without clock, event loop or device.

Times are seconds of one clock that only the caller reads; every method that needs to know gets ``now``. All of it is
synchronous and belongs to one thread.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any

from .._errors import InvalidArgumentError, OverloadedError
from ._lineup import (
    ENDED,
    NEVER,
    OUTSIDE,
    PLACED,
    RUNNING,
    WAITING,
    Batch,
    BatchPolicy,
    Guests,
    Lineup,
    State,
    Ticket,
)

__all__ = ["NEVER", "Batch", "BatchPolicy", "Guests", "Scheduler", "State", "Ticket"]

_NOBODY: tuple[Any, ...] = ()
#: Requests that have ended and are still listed, beyond as many as have not.
_SLACK = 64


class Scheduler:
    """Admission, order and launching of one batcher.

    At most one batch of each group is open: it has memory, and is not launched. Who arrives while it has room and
    nobody is in line goes straight into it. The caller opens a batch when it has memory for one (``next_group``,
    ``open``), launches what ``due`` names, and says how it went (``launched``, ``done``).

    Args:
        max_rows: how many rows may be accepted and not launched.
        max_delay_s: how long a request waits for others while all lanes are at work.
        lanes: how many batches run at once.
    """

    def __init__(self, policy: BatchPolicy, *, max_rows: int, max_delay_s: float, lanes: int) -> None:
        self.policy = policy
        self.max_rows = max_rows
        self.max_delay_s = max_delay_s
        self.lanes = lanes
        self.expected_s = 0.0  # of one batch, for deadlines; the caller keeps it up to date
        self.waiting_rows = 0  # accepted, not launched
        self.waiting = 0
        self.bytes_in_flight = 0  # accepted, not answered
        self.running = 0
        self.preparing = 0  # requests that are not offered yet, and things to be done before the end
        self._dated = 0  # deadlines that still matter
        self.max_bytes = NEVER if policy.max_bytes_in_flight is None else policy.max_bytes_in_flight
        self._outside: deque[Ticket] = deque()
        self._outside_count = self._outside_rows = 0
        self._lineups: dict[Any, Lineup] = {}
        self._open: dict[Any, Batch] = {}
        self._apart: dict[Ticket, None] = {}  # their callers have rows, and no batch waits for these
        self._aside: list[Batch] = []  # full ones, while another of the group is open
        self._deadlines: list[tuple[float, int, Ticket]] = []
        self._numbers = itertools.count()

    # ---- requests ----

    def offer(self, ticket: Ticket, now: float, *, wait: bool = False) -> Sequence[Ticket]:
        """Take a request in, or let it wait outside; returns those that were shed for it, which have ended.

        Args:
            wait: it may wait outside whatever the policy is: it is the continuation of one that was accepted.

        Raises:
            OverloadedError: there is no room, and the policy is not to wait; or nobody can be shed.
            InvalidArgumentError: it could never be taken: it alone exceeds a bound.
        """
        ticket.arrived = now
        if ticket.deadline != NEVER:
            self._remember_deadline(ticket)
        if (
            self._outside
            or self.waiting_rows + ticket.rows > self.max_rows
            or self.bytes_in_flight + ticket.nbytes > self.max_bytes
        ):
            return self._offer_when_full(ticket, wait)
        self._accept(ticket)
        return _NOBODY

    def come_back(self, apart: Ticket, ticket: Ticket, now: float) -> None:
        """What was set apart follows as ``ticket``, which has as many rows and bytes: it keeps its room.

        To wait outside for room once more could be for ever: nothing that runs need be left to make any.
        """
        self.remove(apart)
        ticket.arrived = now
        if ticket.deadline != NEVER:
            self._remember_deadline(ticket)
        self._accept(ticket)

    def _remember_deadline(self, ticket: Ticket) -> None:
        heapq.heappush(self._deadlines, (ticket.deadline, next(self._numbers), ticket))
        self._dated += 1
        if len(self._deadlines) > 2 * self._dated + _SLACK:  # most were answered long before their time
            self._deadlines = [entry for entry in self._deadlines if entry[2].state < RUNNING]
            heapq.heapify(self._deadlines)
            self._dated = len(self._deadlines)

    def fits(self, ticket: Ticket) -> bool:
        """There is room for it."""
        return (
            self.waiting_rows + ticket.rows <= self.max_rows and self.bytes_in_flight + ticket.nbytes <= self.max_bytes
        )

    def _offer_when_full(self, ticket: Ticket, wait: bool) -> list[Ticket]:
        if ticket.rows > self.max_rows or ticket.nbytes > self.max_bytes:
            self._forget(ticket)
            raise InvalidArgumentError(
                f"a request of {ticket.rows} rows and {ticket.nbytes} bytes is more than may wait at all: max_queue is "
                f"{self.max_rows} rows, max_bytes_in_flight {self.policy.max_bytes_in_flight}"
            )
        shed: list[Ticket] = []
        if wait or self.policy.overload == "wait":
            if len(self._outside) > 2 * self._outside_count + _SLACK:
                self._outside = deque(other for other in self._outside if other.state is OUTSIDE)
            self._outside_count += 1
            self._outside.append(ticket)
            self._outside_rows += ticket.rows
            return shed
        if self.policy.overload == "shed_oldest" and self._shedding_helps(ticket):
            while not self.fits(ticket) and (victim := self._victim(ticket.priority)) is not None:
                self.remove(victim)
                shed.append(victim)
        if not self.fits(ticket):
            self._forget(ticket)
            raise OverloadedError(
                f"{self.waiting_rows} rows and {self.bytes_in_flight} bytes are under way already (max_queue "
                f"{self.max_rows}, max_bytes_in_flight {self.policy.max_bytes_in_flight}); try again later"
            )
        self._accept(ticket)
        return shed

    def _shedding_helps(self, ticket: Ticket) -> bool:
        """There is enough that may be shed; else nobody is."""
        if ticket.rows == 1 and self.max_bytes == NEVER and self.waiting_rows <= self.max_rows:
            return True  # anyone will do
        shed = [other for other in self.everybody() if other.priority <= ticket.priority and other.state != OUTSIDE]
        return (
            self.waiting_rows + ticket.rows - sum(other.rows for other in shed) <= self.max_rows
            and self.bytes_in_flight + ticket.nbytes - sum(other.nbytes for other in shed) <= self.max_bytes
        )

    def _victim(self, priority: int) -> Ticket | None:
        found = [lineup.oldest_up_to(priority) for lineup in self._lineups.values()]
        found += [
            ticket
            for batch in self.opened()
            for ticket in batch.tickets
            if ticket.state is PLACED and ticket.priority <= priority
        ]
        return min((t for t in found if t is not None), key=lambda ticket: ticket.arrived, default=None)

    def _accept(self, ticket: Ticket) -> None:
        rows = ticket.rows
        self.waiting_rows += rows
        self.waiting += 1
        self.bytes_in_flight += ticket.nbytes
        group = ticket.group
        lineup = self._lineups.get(group)
        batch = self._open.get(group) if self._open else None
        if batch is not None and not batch.closed and (lineup is None or not lineup.rows):
            if batch.guests is not None:
                self.seal(batch)
            if batch.rows + rows <= batch.capacity:
                self._place(ticket, batch)
                return
            batch.closed = True
        if lineup is None:
            lineup = self._lineups[group] = Lineup(self.policy)
        ticket.state = WAITING
        lineup.append(ticket)

    def _place(self, ticket: Ticket, batch: Batch) -> None:
        ticket.state = PLACED
        ticket.batch = batch
        ticket.offset = batch.rows
        batch.rows += ticket.rows
        batch.live_rows += ticket.rows
        batch.tickets.append(ticket)
        arrived = ticket.arrived
        if arrived < batch.oldest:
            batch.oldest = arrived
        by = arrived + self.max_delay_s
        if ticket.deadline != NEVER:
            by = min(by, ticket.deadline - self.expected_s)
        if by < batch.launch_by:
            batch.launch_by = by

    # ---- guests ----

    def room_for_guests(self, batch: Batch) -> int:
        """Rows of an open batch that may be filled without tickets; 0 where bounds are near, or bytes are counted."""
        room = batch.capacity - batch.rows
        spacious = self.waiting_rows + 4 * batch.capacity <= self.max_rows and not self._outside
        return room if spacious and not batch.closed and self.max_bytes == NEVER else 0

    def room_for_more(self, batch: Batch) -> bool:
        """Another batch of the same group may be filled by guests beside this one, which is full."""
        lineup = self._lineups.get(batch.group)
        spacious = self.waiting_rows + 4 * batch.capacity <= self.max_rows and not self._outside
        few = len(self._aside) < self.lanes
        return few and spacious and not batch.pending and (lineup is None or not lineup.rows)

    def welcome(self, batch: Batch, guests: Guests, room: int) -> None:
        """Rows of ``guests`` are behind those of the tickets from now on, ``room`` of them at most."""
        batch.guests = guests
        batch.reserved = room
        self.waiting_rows += room

    def seal(self, batch: Batch) -> None:
        """No more guests: a ticket follows, or the launch. What they left of their room is free again."""
        guests = batch.guests
        if guests is None or batch.rows >= guests.stop:
            self._return_room(batch, 0 if guests is None else guests.live)
            return
        batch.rows = guests.stop
        self._return_room(batch, guests.live)
        if guests.oldest < batch.oldest:
            batch.oldest = guests.oldest

    def _return_room(self, batch: Batch, kept: int) -> None:
        self.waiting_rows -= batch.reserved - min(kept, batch.reserved)
        batch.reserved = min(kept, batch.reserved)

    def _look_at_guests(self, batch: Batch) -> None:
        guests = batch.guests
        if guests is not None and guests.live:
            oldest = guests.oldest
            batch.oldest = min(batch.oldest, oldest)
            batch.launch_by = min(batch.launch_by, oldest + self.max_delay_s)

    def admit(self) -> list[Ticket]:
        """Take in who waits outside, as far as there is room; returns them."""
        admitted: list[Ticket] = []
        outside = self._outside
        while outside:
            ticket = outside[0]
            if ticket.state is OUTSIDE:
                if not self.fits(ticket):
                    break
                self._outside_rows -= ticket.rows
                self._outside_count -= 1
                self._accept(ticket)
                admitted.append(ticket)
            outside.popleft()
        return admitted

    def remove(self, ticket: Ticket) -> bool:
        """Take a ticket out before its launch: it has ended, nothing ran. False: it was launched, or has ended."""
        state = ticket.state
        if state is RUNNING or state is ENDED:
            return False
        self._forget(ticket)
        if state is OUTSIDE:
            self._outside_rows -= ticket.rows
            self._outside_count -= 1
            return True
        self.waiting_rows -= ticket.rows
        self.waiting -= 1
        self.bytes_in_flight -= ticket.nbytes
        if state is WAITING:
            self._lineups[ticket.group].rows -= ticket.rows
        elif ticket.batch is not None:
            ticket.batch.live_rows -= ticket.rows
        else:
            del self._apart[ticket]
        return True

    def set_apart(self, ticket: Ticket) -> None:
        """Its caller fills its rows for long: its batch goes without it, and until it is removed it waits for nothing.

        It counts as waiting all the same. One that is not placed is new: its rows came in as a guest's.
        """
        batch, ticket.batch = ticket.batch, None
        if batch is not None:
            batch.live_rows -= ticket.rows
            batch.tickets.remove(ticket)
        else:
            ticket.state = PLACED
            self.waiting_rows += ticket.rows
            self.waiting += 1
            self.bytes_in_flight += ticket.nbytes
        self._apart[ticket] = None

    @property
    def apart(self) -> list[Ticket]:
        """Those that were set apart, and are not removed."""
        return list(self._apart)

    def _forget(self, ticket: Ticket) -> None:
        ticket.state = ENDED
        if ticket.deadline != NEVER:
            self._dated -= 1

    def late(self, now: float) -> list[Ticket]:
        """Take out those whose deadline has passed."""
        found: list[Ticket] = []
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= now:
            ticket = heapq.heappop(deadlines)[2]
            if ticket not in self._apart and self.remove(ticket):  # these count until they are sent, or left
                found.append(ticket)
        return found

    # ---- batches ----

    def next_group(self, now: float) -> tuple[Any, Ticket] | None:
        """The group that should get memory for a batch first, and who leads it; None: no open batch is missing."""
        best: Ticket | None = None
        patience = now - self.policy.starvation_s
        for group, lineup in list(self._lineups.items()):
            if not lineup.rows:
                if lineup.peek(now) is None and len(self._lineups) > 64:
                    del self._lineups[group]
            elif group not in self._open:
                head = lineup.peek(now)
                if head is not None and (best is None or _rank(head, patience) < _rank(best, patience)):
                    best = head
        return None if best is None else (best.group, best)

    def open(self, group: Any, capacity: int, now: float, memory: Any = None) -> Batch:
        """A batch with the first of those in line. The caller has seen to it that the first one fits."""
        batch = self._open[group] = Batch(group, capacity, memory)
        batch.opened = now
        lineup = self._lineups.get(group)
        if lineup is None:
            return batch
        queue = lineup.only_queue()
        if queue is not None:
            self._fill(batch, lineup, queue)
            return batch
        while lineup.rows:
            ticket = lineup.peek(now)
            if ticket is None:
                break
            if batch.rows + ticket.rows > capacity:
                batch.closed = True
                break
            lineup.take(ticket)
            self._place(ticket, batch)
        return batch

    def _fill(self, batch: Batch, lineup: Lineup, queue: deque[Ticket]) -> None:
        """First come, first served: most rows of most services come this way."""
        rows, capacity, tickets = 0, batch.capacity, batch.tickets
        deadline = NEVER
        while queue:
            ticket = queue[0]
            if ticket.state is WAITING:
                end = rows + ticket.rows
                if end > capacity:
                    batch.closed = True
                    break
                ticket.state = PLACED
                ticket.batch = batch
                ticket.offset = rows
                rows = end
                if ticket.deadline < deadline:
                    deadline = ticket.deadline
                tickets.append(ticket)
            queue.popleft()
        lineup.rows -= rows
        batch.rows = batch.live_rows = rows
        if tickets:
            batch.oldest = tickets[0].arrived
            batch.launch_by = min(batch.oldest + self.max_delay_s, deadline - self.expected_s)

    def due(self, now: float) -> Batch | None:
        """What to launch now: a lane is free, or it may go behind another because it is full or its time has come."""
        free = self.running < self.lanes
        if not free and self.saturated:
            return None
        found: list[Batch] = []
        for batch in self.opened():
            if batch.guests is not None:
                self._look_at_guests(batch)
            if batch.wanted and batch.written and (free or batch.full or batch.launch_by <= now):
                found.append(batch)
        if len(found) < 2:
            return found[0] if found else None
        patience = now - self.policy.starvation_s
        return min(found, key=lambda batch: self._urgency(batch, patience))

    @staticmethod
    def _urgency(batch: Batch, patience: float) -> tuple[int, float, float]:
        """As ``_rank``, by the most important ticket of a batch and the oldest."""
        if batch.oldest <= patience:
            return 0, 0.0, batch.oldest
        priorities = [ticket.priority for ticket in batch.tickets if ticket.state is PLACED]
        if batch.guests is not None and batch.guests.live:
            priorities.append(0)
        return 1, -max(priorities, default=0), batch.oldest

    def empty(self) -> list[Batch]:
        """Open batches that everybody has left and nobody writes to; they are closed, and their memory is free."""
        # A kept one waits for others as long as it is untouched; rows that somebody has left are not used again.
        left = [b for b in self.opened() if not b.wanted and not b.pending and (b.filled or not b.kept)]
        for batch in left:
            self._return_room(batch, 0)
            self._no_longer_open(batch)
        return left

    def _no_longer_open(self, batch: Batch) -> None:
        if self._open.get(batch.group) is batch:
            del self._open[batch.group]
        else:
            self._aside.remove(batch)

    def opened(self) -> list[Batch]:
        """The batches that are not launched."""
        return [*self._aside, *self._open.values()] if self._aside else list(self._open.values())

    def may_set_aside(self, batch: Batch, now: float) -> bool:
        """It is full, and others of its group wait: as many batches as there are lanes, and one more for who is more
        important. What is in a batch has had its turn: many of them would leave nothing to priorities and shares."""
        lineup = self._lineups.get(batch.group)
        head = lineup.peek(now) if batch.full and lineup is not None and lineup.rows else None
        if head is None:
            return False
        if len(self._aside) < self.lanes:
            return True
        inside = max((ticket.priority for ticket in batch.tickets if ticket.state is PLACED), default=0)
        return len(self._aside) == self.lanes and head.priority > inside

    def make_way(self, now: float) -> None:
        """Full batches that may be set aside are, so that others of their group can be opened."""
        for batch in list(self._open.values()):
            if batch.full and self.may_set_aside(batch, now):
                self.set_aside(batch)

    def set_aside(self, batch: Batch) -> None:
        """It is full and waits for its launch; another of its group may be opened."""
        del self._open[batch.group]
        self._aside.append(batch)

    def launched(self, batch: Batch) -> list[Ticket]:
        """It is on its way; returns those that are in it. The others were taken out before."""
        self._no_longer_open(batch)
        self.running += 1
        inside = batch.tickets
        if batch.live_rows < batch.rows:
            inside = [ticket for ticket in inside if ticket.state is PLACED]
        for ticket in inside:
            ticket.state = RUNNING
            if ticket.deadline != NEVER:
                self._dated -= 1
        self.waiting_rows -= batch.live_rows + batch.reserved
        batch.reserved = 0
        self.waiting -= len(inside)
        return inside

    def done(self, batch: Batch) -> None:
        """It has ended, one way or the other, and so have all who are in it."""
        self.running -= 1
        tickets, batch.tickets = batch.tickets, []  # no cycles: what they hold goes now
        for ticket in tickets:
            ticket.batch = None
            if ticket.state is RUNNING:
                ticket.state = ENDED
                self.bytes_in_flight -= ticket.nbytes

    def started(self, nbytes: int = 0) -> None:
        """Something that is no batch of this scheduler occupies a lane, until ``ended``."""
        self.running += 1
        self.bytes_in_flight += nbytes

    def ended(self, nbytes: int = 0) -> None:
        self.running -= 1
        self.bytes_in_flight -= nbytes

    def wake_at(self, now: float) -> float:
        """When to look again although nothing happens; infinity: not before something does."""
        wake = self._deadlines[0][0] if self._deadlines else NEVER
        if not self.saturated:
            for batch in self.opened():
                if now < batch.launch_by < wake:
                    wake = batch.launch_by
        return wake

    @property
    def saturated(self) -> bool:
        """Nothing can be launched before something ends."""
        return self.running >= self.lanes * self.policy.depth

    def is_open(self, group: Any) -> bool:
        """A batch of this group has memory, and is not launched."""
        return group in self._open

    @property
    def quiet(self) -> bool:
        """Nothing is under way, and no batch is open; cheaper to ask than ``idle``."""
        return not (self.running or self.waiting or self._open or self._outside_count or self.preparing or self._aside)

    @property
    def idle(self) -> bool:
        """Nothing is accepted or waits to be."""
        return not (self.running or self.waiting or self._outside_count or self.preparing) and not any(
            batch.wanted for batch in self.opened()
        )

    @property
    def stalled(self) -> bool:
        """Only callers that fill rows, and whoever waits for room that they take, keep it from being idle."""
        return (
            len(self._apart) == self.waiting
            and not (self.running or self.preparing)
            and not any(batch.wanted for batch in self.opened())
        )

    def in_line(self, group: Any) -> bool:
        """Somebody of this group waits, or is in an open batch."""
        lineup = self._lineups.get(group)
        aside = any(batch.group == group for batch in self._aside)
        return aside or group in self._open or (lineup is not None and lineup.rows > 0)

    @property
    def outside(self) -> int:
        """How many wait for room."""
        return self._outside_count

    def is_outside(self, group: Any) -> bool:
        """Somebody of this group waits for room."""
        return any(ticket.group == group and ticket.state is OUTSIDE for ticket in self._outside)

    def everybody(self) -> list[Ticket]:
        """Who could still be taken out: outside, in line, or in an open batch."""
        found = [ticket for ticket in self._outside if ticket.state is OUTSIDE]
        for lineup in self._lineups.values():
            found += lineup.everybody()
        for batch in self.opened():
            found += [ticket for ticket in batch.tickets if ticket.state is PLACED]
        return found


def _rank(ticket: Ticket, patience: float) -> tuple[int, float, float]:
    """Starving ones first, the oldest before the others; then by priority, then by age."""
    if ticket.arrived <= patience:
        return 0, 0.0, ticket.arrived
    return 1, -ticket.priority, ticket.arrived
