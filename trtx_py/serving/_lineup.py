"""Requests on their way into batches, and the order in which they wait. Times are seconds of the caller's clock."""

from __future__ import annotations

import bisect
import enum
import heapq
import itertools
import operator
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from .._arguments import checked_int, checked_timeout
from .._errors import InvalidArgumentError

_OVERLOADS = ("wait", "reject", "shed_oldest")
NEVER = float("inf")


@dataclass(frozen=True)
class BatchPolicy:
    """How a DynamicBatcher admits and orders requests.

    Attributes:
        overload: what happens to a request when ``max_queue`` rows wait already, or ``max_bytes_in_flight`` is reached.
            "wait": ``infer`` waits for room, first come, first served, which an ``async for`` producer feels. "reject":
            OverloadedError. "shed_oldest": the request that has waited longest, of those that are no more important,
            gets OverloadedError instead.
        starvation_s: a request that has waited this long goes before all that are more important, or whose tenant is
            owed more.
        shares: weights of tenants that compete at the same priority; 1 for those that are not named.
        max_bytes_in_flight: how many bytes of inputs may be accepted and not answered. None: only ``max_queue`` counts.
        batch_sizes: numbers of rows for which a graph is captured; a batch is padded to the next one. None: powers of
            two, and the largest batch.
        depth: how many batches each lane may have: the one that runs, and those that were launched behind it because
            they were full or somebody's delay was over.
    """

    overload: str = "wait"
    starvation_s: float = 1.0
    shares: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    max_bytes_in_flight: int | None = None
    batch_sizes: tuple[int, ...] | None = None
    depth: int = 2

    def __post_init__(self) -> None:
        if self.overload not in _OVERLOADS:
            raise InvalidArgumentError(f"overload is {self.overload!r}; expected one of {', '.join(_OVERLOADS)}")
        if checked_timeout(self.starvation_s) is None:
            raise InvalidArgumentError("starvation_s is None; expected seconds")
        if not isinstance(self.shares, Mapping):
            raise InvalidArgumentError(
                f"shares is {type(self.shares).__name__}; expected a mapping of tenant to weight"
            )
        for tenant, weight in self.shares.items():
            if not _is_weight(weight):
                raise InvalidArgumentError(f"the share of tenant {tenant!r} is {weight!r}; expected a positive number")
        if self.max_bytes_in_flight is not None:
            checked_int(self.max_bytes_in_flight, "max_bytes_in_flight", minimum=1)
        if self.batch_sizes is not None:
            if not _is_sequence(self.batch_sizes):
                raise InvalidArgumentError(f"batch_sizes is {self.batch_sizes!r}; expected numbers of rows, or None")
            for size in self.batch_sizes:
                checked_int(size, "batch_sizes", minimum=1)
        checked_int(self.depth, "depth", minimum=1, maximum=16)


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < NEVER


def _is_sequence(value: object) -> bool:
    return isinstance(value, (tuple, list)) and bool(value)


class State(enum.IntEnum):
    """Where a ticket is."""

    OUTSIDE = 0  # not accepted yet: it waits for room
    WAITING = 1
    PLACED = 2  # it has rows of a batch that is not launched
    RUNNING = 3
    ENDED = 4


OUTSIDE, WAITING, PLACED, RUNNING, ENDED = State


class Ticket:
    """One request: so many rows that stay together.

    Attributes:
        group: requests of one batch have equal groups.
        priority: the higher goes first.
        deadline: when the launch is of no more use; infinity: never.
        offset: its first row in its batch, once it has one.
        payload: the batcher's; nothing here looks at it.
    """

    __slots__ = ("arrived", "batch", "deadline", "group", "nbytes", "offset", "payload", "priority", "rows", "state",
                 "tenant")  # fmt: skip

    def __init__(
        self,
        rows: int,
        group: Any = None,
        priority: int = 0,
        tenant: str = "",
        deadline: float = NEVER,
        nbytes: int = 0,
        payload: Any = None,
    ) -> None:
        self.rows = rows
        self.group = group
        self.priority = priority
        self.tenant = tenant
        self.deadline = deadline
        self.nbytes = nbytes
        self.payload = payload
        self.arrived = 0.0
        self.state = OUTSIDE
        self.batch: Batch | None = None
        self.offset = 0


class Guests(Protocol):
    """Rows that came into a batch's memory without tickets. They are all alike: no priority, no deadline, no tenant.

    Attributes:
        stop: behind the last row that was written.
        end: behind the last row that somebody waits for.
        live: rows that somebody waits for.
        oldest: when the first of those came; infinity if there is none.
        filling: requests whose rows are still being written.
    """

    @property
    def stop(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def live(self) -> int: ...
    @property
    def oldest(self) -> float: ...
    @property
    def filling(self) -> int: ...


class Batch:
    """Rows that are launched together.

    Attributes:
        rows: how far tickets fill it, those that were taken out included.
        live_rows: of tickets that are still in it.
        pending: inputs that are still being written: it is not launched before they are.
        memory: the batcher's; nothing here looks at it.
        guests: who came in behind the tickets without one.
        reserved: rows that count as waiting for guests, whether they have come or not.
        kept: it stays open although nobody is in it.
        opened: when it was opened.
        warned: it has waited long enough for callers that fill rows, and goes without in the next turn of the loop.
    """

    __slots__ = ("capacity", "closed", "group", "guests", "kept", "launch_by", "live_rows", "memory", "oldest",
                 "opened", "pending", "reserved", "rows", "tickets", "warned")  # fmt: skip

    def __init__(self, group: Any, capacity: int, memory: Any = None) -> None:
        self.group = group
        self.capacity = capacity
        self.memory = memory
        self.tickets: list[Ticket] = []
        self.rows = 0
        self.live_rows = 0
        self.pending = 0
        self.oldest = NEVER
        self.launch_by = NEVER
        self.guests: Guests | None = None
        self.reserved = 0
        self.kept = False
        self.opened = 0.0
        self.warned = False
        self.closed = False  # the next ticket in line did not fit

    @property
    def full(self) -> bool:
        """Nobody else gets in."""
        return self.closed or self.filled >= self.capacity

    @property
    def filled(self) -> int:
        """Rows that are written or about to be."""
        return self.rows if self.guests is None else max(self.rows, self.guests.stop)

    @property
    def written(self) -> bool:
        """Nobody writes to it any more."""
        return not self.pending and (self.guests is None or not self.guests.filling)

    @property
    def wanted(self) -> int:
        """Rows that somebody waits for."""
        return self.live_rows if self.guests is None else self.live_rows + self.guests.live

    @property
    def end(self) -> int:
        """Behind the last row that somebody waits for."""
        last = max((t.offset + t.rows for t in self.tickets if t.state in (PLACED, RUNNING)), default=0)
        return last if self.guests is None or not self.guests.live else max(last, self.guests.end)


_arrival = operator.attrgetter("arrived")


class Tenants:
    """The tickets of one priority, by tenant. The tenant that was served least for its weight comes first."""

    __slots__ = ("_floor", "_queues", "_served", "_shares", "_turns")

    def __init__(self, shares: Mapping[str, float]) -> None:
        self._shares = shares
        self._queues: dict[str, deque[Ticket]] = {}
        self._served: dict[str, float] = {}
        self._floor = 0.0  # of whoever was chosen last: who comes back after a pause has no credit from it
        # A heap with one entry for each queue: what the tenant was served, and its first ticket's arrival. Both only
        # grow, so an entry that is out of date stands too far in front, and is put right when it gets there.
        self._turns: list[tuple[float, float, str]] = []

    def __len__(self) -> int:
        """Tenants with tickets, and perhaps some whose last one has just gone."""
        return len(self._queues)

    def append(self, ticket: Ticket) -> deque[Ticket]:
        """Returns the queue that it stands in."""
        tenant = ticket.tenant
        queue = self._queues.get(tenant)
        if not queue:
            served = self._served[tenant] = max(self._served.get(tenant, 0.0), self._floor)
            if queue is None:
                queue = self._queues[tenant] = deque()
                heapq.heappush(self._turns, (served, ticket.arrived, tenant))
        if queue and queue[-1].arrived > ticket.arrived:  # it waited outside, and others did not
            bisect.insort(queue, ticket, key=_arrival)
        else:
            queue.append(ticket)
        return queue

    def heads(self) -> Iterator[Ticket]:
        """The first ticket of each tenant."""
        return (head for head in map(_head, self._queues.values()) if head is not None)

    def everybody(self) -> Iterator[Ticket]:
        """All that wait."""
        return (ticket for queue in self._queues.values() for ticket in queue if ticket.state is WAITING)

    def only_queue(self) -> deque[Ticket] | None:
        """Of the one tenant that there is; None if there are others."""
        return next(iter(self._queues.values())) if len(self._queues) == 1 else None

    def next(self) -> Ticket | None:
        """Whose turn it is; None: nobody waits."""
        turns = self._turns
        while turns:
            served, arrived, tenant = turns[0]
            head = _head(self._queues[tenant])
            if head is None:
                self._forget_first()
            elif head.arrived == arrived and self._served[tenant] == served:
                return head
            else:
                heapq.heapreplace(turns, (self._served[tenant], head.arrived, tenant))
        return None

    def _forget_first(self) -> None:
        """The tenant whose turn it would be has no tickets any more."""
        del self._queues[heapq.heappop(self._turns)[2]]
        if len(self._served) > 4096:  # tenants come and go: only those who wait are owed anything
            self._served = {name: served for name, served in self._served.items() if name in self._queues}

    def take(self, ticket: Ticket) -> None:
        """Remove a ticket that ``heads`` or ``next`` gave."""
        tenant = ticket.tenant
        queue = self._queues[tenant]
        queue.popleft()
        if len(self._queues) > 1 or self._shares:
            self._floor = self._served[tenant]
            self._served[tenant] += ticket.rows / self._shares.get(tenant, 1.0)
        if not queue and self._turns[0][2] == tenant:
            self._forget_first()


def _head(queue: deque[Ticket]) -> Ticket | None:
    while queue and queue[0].state is not WAITING:  # was taken out
        queue.popleft()
    return queue[0] if queue else None


class Lineup:
    """The waiting tickets of one group."""

    __slots__ = ("_last", "_levels", "_order", "_policy", "_since", "rows")

    def __init__(self, policy: BatchPolicy) -> None:
        self._policy = policy
        self._levels: dict[int, Tenants] = {}
        self._order: list[int] = []  # priorities, the highest first
        self._last: deque[Ticket] = deque()  # where the last ticket went
        self._since = NEVER  # nobody who waits arrived before this
        self.rows = 0

    def append(self, ticket: Ticket) -> None:
        self.rows += ticket.rows
        if ticket.arrived < self._since:
            self._since = ticket.arrived
        last = self._last
        if last:  # one that is not empty is still in its place
            other = last[-1]
            if other.priority == ticket.priority and other.tenant == ticket.tenant and other.arrived <= ticket.arrived:
                last.append(ticket)
                return
        level = self._levels.get(ticket.priority)
        if level is None:
            level = self._levels[ticket.priority] = Tenants(self._policy.shares)
            self._order = sorted(self._levels, reverse=True)
        self._last = level.append(ticket)

    def peek(self, now: float) -> Ticket | None:
        """Who goes next: whoever starves, else the most important, among them whose tenant was served least."""
        first: Ticket | None = None
        for priority in self._order:
            first = self._levels[priority].next()
            if first is not None:
                break
        if first is None:
            if len(self._order) > 64:
                self._levels, self._order = {}, []
            return None
        patience = now - self._policy.starvation_s
        if self._since > patience:
            return first
        oldest = min(self._heads(self._order), key=_arrival)
        self._since = oldest.arrived
        return oldest if oldest.arrived <= patience else first

    def _heads(self, priorities: Iterable[int]) -> Iterator[Ticket]:
        return itertools.chain.from_iterable(self._levels[priority].heads() for priority in priorities)

    def only_queue(self) -> deque[Ticket] | None:
        """All there is, in order, where one tenant waits at one priority, and shares do not count; else None."""
        if len(self._order) != 1 or self._policy.shares:
            return None
        return self._levels[self._order[0]].only_queue()

    def take(self, ticket: Ticket) -> None:
        """Remove what ``peek`` gave."""
        self._levels[ticket.priority].take(ticket)
        self.rows -= ticket.rows

    def everybody(self) -> Iterator[Ticket]:
        """All that wait."""
        return itertools.chain.from_iterable(level.everybody() for level in self._levels.values())

    def oldest_up_to(self, priority: int) -> Ticket | None:
        """Whoever waits longest, of those that are no more important than this."""
        return min(self._heads(own for own in self._order if own <= priority), key=_arrival, default=None)
