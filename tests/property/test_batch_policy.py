"""A state machine over the scheduling core, in virtual time: whatever is offered, cancelled, launched and finished.

The model knows who was taken in, who is in which batch and who was answered. It opens and launches whenever it can, as
the batcher does, and holds the core to its promises after every step.

TRTX_PROPERTY_EXAMPLES sets the number of examples (default 200, some seconds).
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import trtx_py as trtx
from trtx_py.serving._lineup import Lineup
from trtx_py.serving._policy import Batch, BatchPolicy, Scheduler, State, Ticket

EXAMPLES = int(os.environ.get("TRTX_PROPERTY_EXAMPLES", "200"))
STEPS = 60
SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large),
    print_blob=True,
)

CAPACITY = 6
GROUPS = ("g0", "g1", "g2")
TENANTS = ("a", "b", "c")
SHARES = {"a": 4.0, "b": 0.5}
#: Rounding of sums of times.
EPS = 1e-9


class Serving(RuleBasedStateMachine):
    """The batcher's part: it asks the core in the order in which the batcher does."""

    core: Scheduler

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.tickets: list[Ticket] = []
        self.answers: dict[int, str] = {}
        self.refused: set[int] = set()
        self.running: list[Batch] = []
        self.others = 0  # lanes that something else occupies
        self.launched_at: dict[int, float] = {}
        self.was_due: dict[Batch, float] = {}  # of those who were set apart: their batch is due then all the same

    @initialize(
        overload=st.sampled_from(["wait", "reject", "shed_oldest"]),
        lanes=st.integers(1, 3),
        depth=st.integers(1, 3),
        delay=st.sampled_from([0.0, 0.5, 2.0]),
        starvation=st.sampled_from([0.0, 1.0, 5.0, 1000.0]),
        max_rows=st.integers(CAPACITY, 20),
        budget=st.sampled_from([None, 30, 100]),
        shares=st.sampled_from([{}, SHARES]),
        expected=st.sampled_from([0.0, 0.3]),
    )
    def begin(
        self, overload: str, lanes: int, depth: int, delay: float, starvation: float, max_rows: int, budget: int | None,
        shares: dict[str, float], expected: float,
    ) -> None:  # fmt: skip
        policy = BatchPolicy(
            overload=overload, starvation_s=starvation, depth=depth, max_bytes_in_flight=budget, shares=shares
        )
        self.core = Scheduler(policy, max_rows=max_rows, max_delay_s=delay, lanes=lanes)
        self.core.expected_s = expected
        self.budget = math.inf if budget is None else budget

    # ---- what the model does ----

    def answer(self, tickets: Iterable[Ticket], how: str) -> None:
        for ticket in tickets:
            assert id(ticket) not in self.answers, f"answered twice: {self.answers[id(ticket)]} and {how}"
            assert ticket.state is State.ENDED
            self.answers[id(ticket)] = how

    def waiting(self) -> list[Ticket]:
        return [ticket for ticket in self.tickets if ticket.state is State.WAITING]

    def pump(self) -> None:
        core = self.core
        late = core.late(self.now)
        assert all(ticket.deadline <= self.now for ticket in late)
        self.answer(late, "late")
        while True:
            progress = bool(core.admit())
            for batch in core.empty():
                assert not batch.live_rows
            progress |= self.open_batches()
            while (due := core.due(self.now)) is not None:
                self.launch(due)
                progress = True
            if not progress:
                return

    def open_batches(self) -> bool:
        core, opened = self.core, False
        core.make_way(self.now)
        while (found := core.next_group(self.now)) is not None:
            group, lead = found
            self.check_turn_of_groups(lead)
            before = [ticket for ticket in self.waiting() if ticket.group == group]
            batch = core.open(group, CAPACITY, self.now)
            assert batch.tickets[0] is lead
            self.check_order(before, batch.tickets)
            if core.may_set_aside(batch, self.now):
                core.set_aside(batch)
                event("set aside")
            opened = True
        return opened

    def starves(self, ticket: Ticket) -> bool:
        return ticket.arrived <= self.now - self.core.policy.starvation_s

    def check_turn_of_groups(self, lead: Ticket) -> None:
        taken = {batch.group for batch in self.core.opened()}
        others = [ticket for ticket in self.waiting() if ticket.group not in taken]
        if self.starves(lead):
            assert all(lead.arrived <= ticket.arrived for ticket in others if self.starves(ticket))
        else:
            assert not any(self.starves(ticket) for ticket in others)
            assert all(lead.priority >= ticket.priority for ticket in others)

    def check_order(self, before: list[Ticket], taken: list[Ticket]) -> None:
        """Each that was taken was the right one among those that were in line then."""
        assert all(ticket in before for ticket in taken)
        line = list(before)
        for ticket in taken:
            starving = [other for other in line if self.starves(other)]
            if starving:
                assert ticket.arrived == min(other.arrived for other in starving)
            else:
                assert ticket.priority == max(other.priority for other in line)
            own = [o for o in line if (o.priority, o.tenant) == (ticket.priority, ticket.tenant)]
            assert own[0] is ticket  # first come, first served
            line.remove(ticket)
        rows = sum(ticket.rows for ticket in taken)
        if line and rows < CAPACITY:
            assert max(ticket.rows for ticket in line) > CAPACITY - rows  # it stopped at one that did not fit

    def due(self, ticket: Ticket) -> float:
        """When its batch is launched though every lane is at work."""
        return min(ticket.arrived + self.core.max_delay_s, ticket.deadline - self.core.expected_s)

    def launch(self, batch: Batch) -> None:
        core = self.core
        assert core.running < core.lanes * core.policy.depth
        if core.running >= core.lanes:
            due = min((self.due(ticket) for ticket in batch.tickets), default=math.inf)
            assert batch.full or min(due, self.was_due.get(batch, math.inf)) <= self.now + EPS
        inside = core.launched(batch)
        assert inside, "a launch for nobody"
        assert not batch.pending
        for ticket in inside:
            assert ticket.state is State.RUNNING
            assert ticket.deadline > self.now
            assert id(ticket) not in self.launched_at
            self.launched_at[id(ticket)] = self.now
        self.running.append(batch)
        event("launched")

    def finish(self, batch: Batch) -> None:
        self.running.remove(batch)
        inside = [ticket for ticket in batch.tickets if ticket.state is State.RUNNING]
        self.core.done(batch)
        self.answer(inside, "done")

    # ---- what happens to it ----

    @rule(
        rows=st.integers(1, CAPACITY), group=st.sampled_from(GROUPS), priority=st.integers(-1, 2),
        tenant=st.sampled_from(TENANTS), nbytes=st.integers(0, 30),
        deadline=st.one_of(st.just(math.inf), st.floats(0.0, 10.0)), pumped=st.booleans(),
    )  # fmt: skip
    def offer(
        self, rows: int, group: str, priority: int, tenant: str, nbytes: int, deadline: float, pumped: bool
    ) -> None:
        core = self.core
        ticket = Ticket(rows, group, priority, tenant, self.now + deadline, nbytes)
        fits = core.waiting_rows + rows <= core.max_rows and core.bytes_in_flight + nbytes <= self.budget
        apart = core.apart  # whose rows are with their callers, and are not taken from them
        live = [o for o in self.tickets if o.state in (State.WAITING, State.PLACED) and o not in apart]
        try:
            shed = core.offer(ticket, self.now)
        except trtx.OverloadedError:
            event("refused")
            assert core.policy.overload != "wait"
            assert not fits
            assert ticket.state is State.ENDED
            assert all(other.state is not State.ENDED for other in live)  # nobody is given up in vain
            return
        self.tickets.append(ticket)
        self.answer(shed, "shed")
        if shed:
            event("shed")
            assert core.policy.overload == "shed_oldest"
            assert not fits
            assert all(other.priority <= priority for other in shed)
            spared = [other for other in live if other not in shed and other.priority <= priority]
            assert all(other.arrived >= max(o.arrived for o in shed) for other in spared)
        if ticket.state is State.OUTSIDE:
            event("outside")
            assert core.policy.overload == "wait"  # that nobody waits there for nothing is seen after the next look
        if pumped:
            self.pump()

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), pumped=st.booleans())
    def cancel(self, data: st.DataObject, pumped: bool) -> None:
        ticket = data.draw(st.sampled_from(self.tickets))
        before = ticket.state
        taken = self.core.remove(ticket)
        assert taken == (before in (State.OUTSIDE, State.WAITING, State.PLACED))
        if taken:
            event(f"cancelled {before.name}")
            self.answer([ticket], "cancelled")
        if pumped:
            self.pump()

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 3.0]))
    def advance(self, seconds: float) -> None:
        """Time passes, and the batcher looks whenever the core asked it to."""
        self.pump()
        end = self.now + seconds
        while (wake := self.core.wake_at(self.now)) <= end:
            assert wake > self.now, "asked to look again at once"
            self.now = wake
            self.pump()
        self.now = end
        self.pump()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), pumped=st.booleans())
    def end_of_a_batch(self, data: st.DataObject, pumped: bool) -> None:
        self.finish(data.draw(st.sampled_from(self.running)))
        if pumped:
            self.pump()

    @rule(begins=st.booleans())
    def lane_of_somebody_else(self, begins: bool) -> None:
        if begins and self.core.running < self.core.lanes:
            self.others += 1
            self.core.started()
        elif not begins and self.others:
            self.others -= 1
            self.core.ended()
            self.pump()

    @rule(group=st.sampled_from(GROUPS))
    def open_ahead(self, group: str) -> None:
        """More of a group is expected: a batch that stays open although nobody is in it."""
        known = any(ticket.group == group for ticket in self.tickets)
        if known and not self.core.in_line(group):
            self.core.open(group, CAPACITY, self.now).kept = True
            event("ahead")

    @precondition(lambda self: self.core.opened())
    @rule(data=st.data(), begins=st.booleans())
    def writing(self, data: st.DataObject, begins: bool) -> None:
        """Somebody begins or ends to write to a batch."""
        batch = data.draw(st.sampled_from(self.core.opened()))
        if begins and batch.live_rows:
            batch.pending += 1
        elif not begins and batch.pending:
            batch.pending -= 1
            self.pump()

    @precondition(lambda self: any(batch.live_rows for batch in self.core.opened()))
    @rule(data=st.data(), pumped=st.booleans())
    def slow_to_fill(self, data: st.DataObject, pumped: bool) -> None:
        """A batch goes without somebody's rows."""
        placed = [t for batch in self.core.opened() for t in batch.tickets if t.state is State.PLACED]
        ticket = data.draw(st.sampled_from(placed))
        assert ticket.batch is not None
        self.was_due[ticket.batch] = min(self.due(ticket), self.was_due.get(ticket.batch, math.inf))
        self.core.set_apart(ticket)
        event("set apart")
        if pumped:
            self.pump()

    @precondition(lambda self: self.core.apart)
    @rule(data=st.data(), pumped=st.booleans())
    def filled_at_last(self, data: st.DataObject, pumped: bool) -> None:
        self.come_back(data.draw(st.sampled_from(self.core.apart)))
        if pumped:
            self.pump()

    def come_back(self, old: Ticket) -> None:
        """It was accepted: it does not wait for room again, whoever does."""
        new = Ticket(old.rows, old.group, old.priority, old.tenant, old.deadline, old.nbytes)
        self.core.come_back(old, new, self.now)
        self.tickets.append(new)
        self.answer([old], "sent")
        assert new.state in (State.WAITING, State.PLACED)
        event("came back")

    # ---- what always holds ----

    @invariant()
    def counters_agree(self) -> None:
        core = self.core
        by_state: dict[State, list[Ticket]] = defaultdict(list)
        for ticket in self.tickets:
            by_state[ticket.state].append(ticket)
        inside = by_state[State.WAITING] + by_state[State.PLACED]
        assert core.waiting_rows == sum(ticket.rows for ticket in inside) <= core.max_rows
        assert core.waiting == len(inside)
        assert core.bytes_in_flight == sum(t.nbytes for t in inside + by_state[State.RUNNING]) <= self.budget
        assert core.running == len(self.running) + self.others <= core.lanes * core.policy.depth
        assert set(core.everybody() + core.apart) == set(inside + by_state[State.OUTSIDE])
        assert len(core.everybody() + core.apart) == len(inside + by_state[State.OUTSIDE])
        assert {id(ticket) for ticket in by_state[State.ENDED]} == self.answers.keys()

    @invariant()
    def rows_do_not_overlap(self) -> None:
        for batch in [*self.core.opened(), *self.running]:
            end = 0
            for ticket in batch.tickets:
                assert ticket.group == batch.group
                assert ticket.offset >= end
                end = ticket.offset + ticket.rows
            assert end <= batch.rows <= batch.capacity
            live = [t for t in batch.tickets if t.state in (State.PLACED, State.RUNNING)]
            assert batch.live_rows == sum(ticket.rows for ticket in live)

    @precondition(lambda self: self.tickets)
    @rule()
    def no_lane_is_idle_while_somebody_could_run(self) -> None:
        self.pump()
        core = self.core
        ready = [batch for batch in core.opened() if batch.live_rows and not batch.pending]
        used = {batch.group for batch in core.opened() if batch.live_rows or batch.pending}
        assert all(ticket.group in used for ticket in self.waiting())  # one that nobody is in keeps nobody waiting
        if core.running < core.lanes:
            assert not ready
        if core.running < core.lanes * core.policy.depth:
            for batch in ready:
                for ticket in batch.tickets:
                    if ticket.state is State.PLACED:
                        assert ticket.arrived + core.max_delay_s > self.now
                        assert core.wake_at(self.now) <= ticket.arrived + core.max_delay_s
        outside = [ticket for ticket in self.tickets if ticket.state is State.OUTSIDE]
        if outside:
            first = outside[0]
            assert core.waiting_rows + first.rows > core.max_rows or core.bytes_in_flight + first.nbytes > self.budget
        for ticket in outside + self.waiting():
            assert core.wake_at(self.now) <= ticket.deadline

    def teardown(self) -> None:
        """Draining: everything that was taken in is answered, and nothing is left."""
        if not hasattr(self, "core"):
            return
        core = self.core
        for batch in core.opened():
            batch.pending, batch.kept = 0, False
        for ticket in core.apart:
            self.come_back(ticket)
        for _ in range(self.others):
            core.ended()
        self.others = 0
        self.pump()
        while self.running:
            self.finish(self.running[0])
            self.pump()
        assert self.answers.keys() == {id(ticket) for ticket in self.tickets}
        assert core.idle
        assert (core.waiting, core.waiting_rows, core.running, core.bytes_in_flight) == (0, 0, 0, 0)
        assert core.everybody() == []
        assert core.opened() == []


def test_serving() -> None:
    run_state_machine_as_test(Serving, settings=SETTINGS)


class Line:
    """One lane that serves a batch each second, and callers who fill the queue again at once."""

    def __init__(self, capacity: int, **policy: Any) -> None:
        self.core = Scheduler(BatchPolicy(depth=1, **policy), max_rows=10**6, max_delay_s=0.0, lanes=1)
        self.capacity = capacity
        self.now = 0.0

    def offer(self, **options: Any) -> Ticket:
        ticket = Ticket(options.pop("rows", 1), **options)
        self.core.offer(ticket, self.now)
        return ticket

    def open_batches(self) -> None:
        while (found := self.core.next_group(self.now)) is not None:
            self.core.open(found[0], self.capacity, self.now)

    def begin(self) -> Batch:
        self.open_batches()
        batch = self.core.due(self.now)
        assert batch is not None
        self.core.launched(batch)
        return batch

    def end(self, batch: Batch) -> None:
        self.now += 1.0
        self.open_batches()
        self.core.done(batch)


@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0, 8.0]), min_size=2, max_size=5),
    rows=st.lists(st.integers(1, 4), min_size=5, max_size=5),
    data=st.data(),
)
@settings(max_examples=EXAMPLES, deadline=None, print_blob=True)
def test_fair_shares(weights: list[float], rows: list[int], data: st.DataObject) -> None:
    """Two who always wait are served in proportion to their weights, but for one request of each (fair queueing)."""
    names = [f"t{number}" for number in range(len(weights))]
    line = Line(8, shares=dict(zip(names, weights, strict=True)), starvation_s=1e9)
    backlog = dict.fromkeys(names, 0)
    served = dict.fromkeys(names, 0)
    for _ in range(data.draw(st.integers(20, 80))):
        for name, count in zip(names, rows, strict=False):
            while backlog[name] < 20:
                backlog[name] += 1
                line.offer(tenant=name, rows=count)
        batch = line.begin()
        for ticket in batch.tickets:
            served[ticket.tenant] += ticket.rows
            backlog[ticket.tenant] -= 1
        line.end(batch)
    owed = [served[name] / weight for name, weight in zip(names, weights, strict=True)]
    # what a batch was filled with at once lies between the two counts
    most = [(count + 8) / weight for count, weight in zip(rows, weights, strict=False)]
    for i in range(len(names)):
        for j in range(len(names)):
            assert abs(owed[i] - owed[j]) <= most[i] + most[j]


@given(
    floods=st.lists(
        st.tuples(st.sampled_from(GROUPS), st.integers(0, 5), st.sampled_from(TENANTS)), min_size=1, max_size=4
    ),
    group=st.sampled_from(GROUPS), starvation=st.sampled_from([1.0, 5.0, 20.0]), shares=st.sampled_from([{}, SHARES]),
    capacity=st.integers(1, 4),
)  # fmt: skip
@settings(max_examples=EXAMPLES, deadline=None, print_blob=True)
def test_nothing_starves(
    floods: list[tuple[str, int, str]], group: str, starvation: float, shares: dict[str, float], capacity: int
) -> None:
    """The least important of all, among more than the lane can serve: it waits for its patience, and a few batches.

    Whoever arrived before may go first, and so may a batch of its group that was put together before it starved.
    """
    line = Line(capacity, starvation_s=starvation, shares=shares)
    poor: Ticket | None = None
    flood: list[Ticket] = []
    for step in range(int(3 * starvation) + 60):
        for name, priority, tenant in floods:
            waiting = sum(t.state in (State.WAITING, State.PLACED) for t in flood[-50:] if t.group == name)
            for _ in range(max(0, 2 * capacity - waiting)):
                flood.append(line.offer(group=name, priority=priority, tenant=tenant))
        if step == 3:
            poor = line.offer(group=group, priority=-1, tenant="c")
        batch = line.begin()
        line.end(batch)
        if poor is not None and poor.state is State.ENDED:
            return
    raise AssertionError(f"still {poor and poor.state} after {line.now} s")


@given(st.data(), st.booleans())
@settings(max_examples=EXAMPLES, deadline=None, print_blob=True)
def test_the_line_is_what_looking_at_everybody_gives(data: st.DataObject, weighted: bool) -> None:
    """Who is next, found with heaps and bounds, is who is found by going through all that wait."""
    starvation_s = 10.0
    line = Lineup(BatchPolicy(shares=SHARES if weighted else {}, starvation_s=starvation_s))
    waiting: list[Ticket] = []
    now = 0.0
    for _ in range(data.draw(st.integers(1, 40))):
        now += data.draw(st.sampled_from([0.0, 0.5, 3.0]))
        step = data.draw(st.sampled_from(["come", "come", "come", "go", "next", "next"]))
        if step == "come":
            priority, tenant = data.draw(st.integers(0, 2)), data.draw(st.sampled_from(TENANTS))
            ticket = Ticket(data.draw(st.integers(1, 3)), "group", priority, tenant)
            ticket.arrived = now - data.draw(st.sampled_from([0.0, 0.0, 0.0, 4.0]))  # it waited outside before
            ticket.state = State.WAITING
            line.append(ticket)
            waiting.append(ticket)
            waiting.sort(key=lambda ticket: ticket.arrived)
        elif step == "go" and waiting:
            ticket = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            ticket.state = State.ENDED
            line.rows -= ticket.rows
        else:
            found = line.peek(now)
            assert (found is None) == (not waiting)
            assert line.rows == sum(ticket.rows for ticket in waiting)
            if found is None:
                continue
            assert found is next(t for t in waiting if (t.priority, t.tenant) == (found.priority, found.tenant))
            heads = {(t.priority, t.tenant): t for t in reversed(waiting)}.values()
            oldest = min(ticket.arrived for ticket in heads)
            if oldest <= now - starvation_s:
                assert found.arrived == oldest
            else:
                assert found.priority == max(ticket.priority for ticket in waiting)
                served = line._levels[found.priority]._served
                level = [ticket for ticket in heads if ticket.priority == found.priority]
                assert served[found.tenant] == min(served[ticket.tenant] for ticket in level)
            line.take(found)
            waiting.remove(found)
            found.state = State.PLACED
