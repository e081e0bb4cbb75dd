"""The scheduling core by example: order, starvation, shares, who is shed, deadlines, and when to look again."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Hashable, Iterable
from typing import Any

import pytest

import trtx_py as trtx
from trtx_py.serving._policy import Batch, BatchPolicy, Scheduler, State, Ticket

DELAY = 0.01


class Keeper:
    """Stands for a request's arrays."""


def scheduler(*, rows: int = 1000, lanes: int = 1, delay: float = DELAY, **policy: Any) -> Scheduler:
    return Scheduler(BatchPolicy(**policy), max_rows=rows, max_delay_s=delay, lanes=lanes)


def offer(core: Scheduler, name: str, now: float = 0.0, rows: int = 1, **options: Any) -> Ticket:
    ticket = Ticket(rows, payload=name, **options)
    core.offer(ticket, now)
    return ticket


def names(tickets: Iterable[Ticket]) -> str:
    return "".join(ticket.payload for ticket in tickets)


def open_all(core: Scheduler, now: float, capacity: int = 4) -> None:
    core.admit()
    while (found := core.next_group(now)) is not None:
        core.open(found[0], capacity, now)


def launch(core: Scheduler, now: float, capacity: int = 4) -> Batch | None:
    open_all(core, now, capacity)
    batch = core.due(now)
    if batch is not None:
        core.launched(batch)
    return batch


def drain(core: Scheduler, now: float, capacity: int = 1) -> str:
    """Launch all there is, one after another; who was in it, in that order."""
    order = ""
    while (batch := launch(core, now, capacity)) is not None:
        order += names(ticket for ticket in batch.tickets if ticket.state is State.RUNNING)
        core.done(batch)
    return order


def test_first_come_first_served() -> None:
    core = scheduler()
    for number, name in enumerate("abcde"):
        offer(core, name, number / 1000, rows=2)
    assert drain(core, 0.01, capacity=4) == "abcde"
    assert core.idle
    assert (core.waiting, core.waiting_rows, core.running, core.bytes_in_flight) == (0, 0, 0, 0)


def test_who_arrives_goes_into_the_open_batch() -> None:
    core = scheduler()
    core.started()  # the lane is taken
    first = offer(core, "a")
    open_all(core, 0.0)
    second = offer(core, "b", 0.001, rows=2)
    assert first.batch is second.batch is not None
    assert (first.offset, second.offset) == (0, 1)
    third = offer(core, "c", 0.002, rows=2)  # does not fit any more
    assert third.state is State.WAITING
    fourth = offer(core, "d", 0.003)  # would fit, and may not overtake
    assert fourth.state is State.WAITING


def test_a_free_lane_is_used_at_once_and_a_busy_one_after_the_delay() -> None:
    core = scheduler(depth=2)
    offer(core, "a")
    assert launch(core, 0.0) is not None
    offer(core, "b", 0.001)
    assert launch(core, 0.001) is None
    assert core.wake_at(0.001) == pytest.approx(0.001 + DELAY)
    assert launch(core, 0.0011 + DELAY) is not None
    offer(core, "c", 0.02)
    assert launch(core, 1.0) is None  # two batches of one lane are enough
    assert core.wake_at(1.0) == math.inf


def test_a_full_batch_does_not_wait() -> None:
    core = scheduler(depth=2)
    offer(core, "a")
    launch(core, 0.0)
    for name in "bcd":
        offer(core, name, 0.001)
    assert launch(core, 0.001) is None
    offer(core, "e", 0.001)
    batch = launch(core, 0.001)
    assert batch is not None
    assert names(batch.tickets) == "bcde"


def test_a_batch_that_is_still_written_is_not_launched() -> None:
    core = scheduler()
    offer(core, "a")
    open_all(core, 0.0)
    (batch,) = core.opened()
    batch.pending = 1
    assert core.due(5.0) is None
    batch.pending = 0
    assert core.due(5.0) is batch


def test_priorities() -> None:
    core = scheduler()
    for number, (name, priority) in enumerate([("a", 0), ("b", 5), ("c", -3), ("d", 5), ("e", 0)]):
        offer(core, name, number / 1e6, priority=priority)
    assert drain(core, 0.001) == "bdaec"


def test_starving_requests_go_before_all_others() -> None:
    core = scheduler(starvation_s=1.0)
    offer(core, "a", 0.0, priority=-1)
    offer(core, "b", 0.3, priority=0)
    offer(core, "c", 1.1, priority=9)
    offer(core, "d", 1.1, priority=9)
    assert drain(core, 1.2) == "acdb"
    offer(core, "a", 2.0, priority=-1)
    offer(core, "b", 2.1, priority=0)
    offer(core, "c", 3.3, priority=9)
    assert drain(core, 3.4) == "abc"  # the oldest first


def test_starving_tenants() -> None:
    core = scheduler(starvation_s=1.0, shares={"rich": 1e9})
    offer(core, "p", 0.0, tenant="poor")
    for _ in range(50):
        offer(core, "r", 0.5, tenant="rich")
    assert drain(core, 1.1)[0] == "p"


def test_a_group_of_low_priority_does_not_starve() -> None:
    """One lane, and a group of higher priority that always has an open batch."""
    core = scheduler(starvation_s=1.0)
    low = offer(core, "l", 0.0, group="low", priority=0)
    now = 0.0
    while now < 3.0 and low.state is not State.RUNNING:
        offer(core, "h", now, group="high", priority=1)
        batch = launch(core, now)
        assert batch is not None
        offer(core, "h", now, group="high", priority=1)
        open_all(core, now)
        core.done(batch)
        now += 0.1
    assert low.state in (State.RUNNING, State.ENDED)


def test_groups_are_never_mixed() -> None:
    core = scheduler()
    for number, name in enumerate("abcdef"):
        offer(core, name, number / 1e6, group=number % 2)
    found: list[tuple[Hashable, str]] = []
    while (batch := launch(core, 0.001)) is not None:
        found.append((batch.group, names(batch.tickets)))
        core.done(batch)
    assert found == [(0, "ace"), (1, "bdf")]


def test_equal_shares() -> None:
    core = scheduler()
    for _ in range(20):
        offer(core, "a", 0.0, tenant="a")
    for _ in range(20):
        offer(core, "b", 0.001, tenant="b")
    order = drain(core, 0.01)
    assert order[:20].count("a") == 10


def test_shares_follow_the_weights_in_rows() -> None:
    core = scheduler(shares={"a": 3.0, "b": 1.0})
    for _ in range(300):
        offer(core, "a", 0.0, tenant="a", rows=1)
    for _ in range(150):
        offer(core, "b", 0.0, tenant="b", rows=2)
    order = drain(core, 0.01, capacity=2)[:150]
    assert order.count("a") / (2 * order.count("b")) == pytest.approx(3.0, rel=0.1)


def test_who_was_away_has_no_credit() -> None:
    core = scheduler(shares={"a": 1.0})
    offer(core, "b", 0.0, tenant="b")
    drain(core, 0.0)
    for _ in range(100):
        offer(core, "a", 0.0, tenant="a")
    drain(core, 0.0)
    for _ in range(20):
        offer(core, "a", 0.0, tenant="a")
        offer(core, "b", 0.0, tenant="b")
    assert 8 <= drain(core, 0.0)[:20].count("b") <= 12


def test_priorities_go_before_shares() -> None:
    core = scheduler(shares={"rich": 100.0})
    offer(core, "r", 0.0, tenant="rich", priority=0)
    offer(core, "p", 0.0, tenant="poor", priority=1)
    assert drain(core, 0.001) == "pr"


# ---- admission ----


def test_wait_in_order() -> None:
    core = scheduler(rows=4, lanes=4)
    for name in "abcd":
        offer(core, name)
    big, small = offer(core, "e", rows=3), offer(core, "f")
    assert big.state is small.state is State.OUTSIDE
    assert core.waiting_rows == 4
    assert core.admit() == []
    assert launch(core, 0.0, capacity=2) is not None
    assert core.admit() == []  # there is room for f, but e was first
    assert launch(core, 0.0, capacity=2) is not None
    assert names(core.admit()) == "ef"
    assert core.waiting_rows == 4


def test_who_leaves_the_outside_lets_the_next_in() -> None:
    core = scheduler(rows=2)
    offer(core, "a", rows=2)
    outside = [offer(core, name, rows=2) for name in "bcd"]
    assert core.remove(outside[0])
    assert not core.remove(outside[0])
    batch = launch(core, 0.0)
    assert batch is not None
    assert names(core.admit()) == "c"
    assert not core.idle


def test_reject() -> None:
    core = scheduler(rows=2, overload="reject")
    offer(core, "a", rows=2)
    with pytest.raises(trtx.OverloadedError, match="2 rows"):
        offer(core, "b")
    assert (core.waiting, core.waiting_rows) == (1, 2)
    launch(core, 0.0)
    offer(core, "c", rows=2)


def test_the_budget_of_bytes() -> None:
    core = scheduler(overload="reject", max_bytes_in_flight=100)
    offer(core, "a", nbytes=60)
    with pytest.raises(trtx.OverloadedError, match="60 bytes"):
        offer(core, "b", nbytes=60)
    batch = launch(core, 0.0)
    assert batch is not None
    with pytest.raises(trtx.OverloadedError):  # launched, and not answered
        offer(core, "b", nbytes=60)
    core.done(batch)
    offer(core, "b", nbytes=60)
    assert core.bytes_in_flight == 60


@pytest.mark.parametrize("overload", ["wait", "reject", "shed_oldest"])
def test_what_could_never_fit(overload: str) -> None:
    core = scheduler(rows=4, overload=overload, max_bytes_in_flight=10)
    for options in ({"rows": 5}, {"nbytes": 11}):
        with pytest.raises(trtx.InvalidArgumentError, match="more than may wait at all"):
            offer(core, "a", **options)
    assert core.idle


def test_the_oldest_is_shed() -> None:
    core = scheduler(rows=3, overload="shed_oldest")
    tickets = [offer(core, name, number) for number, name in enumerate("abc")]
    new = Ticket(2, payload="d")
    shed = core.offer(new, 3.0)
    assert names(shed) == "ab"
    assert [ticket.state for ticket in tickets[:2]] == [State.ENDED] * 2
    assert drain(core, 3.0, capacity=2) == "cd"


def test_the_more_important_are_not_shed() -> None:
    core = scheduler(rows=2, overload="shed_oldest")
    offer(core, "a", 0.0, priority=5)
    offer(core, "b", 0.1, priority=1)
    assert names(core.offer(Ticket(1, priority=1, payload="c"), 0.2)) == "b"
    with pytest.raises(trtx.OverloadedError):
        core.offer(Ticket(1, priority=0, payload="d"), 0.3)
    assert names(core.offer(Ticket(1, priority=7, payload="e"), 0.4)) == "a"
    assert core.waiting_rows == 2


def test_those_in_an_open_batch_are_shed_too() -> None:
    core = scheduler(rows=2, overload="shed_oldest")
    core.started()
    offer(core, "a", 0.0)
    open_all(core, 0.0)
    offer(core, "b", 0.1)
    assert names(core.offer(Ticket(1, payload="c"), 0.2)) == "a"
    core.ended()
    assert drain(core, 0.3, capacity=4) == "bc"


def set_aside_all(core: Scheduler, now: float, capacity: int) -> None:
    """Open what the core lets the launcher open."""
    core.make_way(now)
    while (found := core.next_group(now)) is not None:
        batch = core.open(found[0], capacity, now)
        if core.may_set_aside(batch, now):
            core.set_aside(batch)


def test_those_in_batches_set_aside_are_shed_too() -> None:
    """The oldest are there; a large request needs several of them, and each of them must be told."""
    core = scheduler(rows=12, overload="shed_oldest", lanes=2)
    core.started()
    core.started()
    older = [offer(core, str(n), float(n)) for n in range(12)]
    set_aside_all(core, 12.0, capacity=4)
    assert len(core.opened()) == 3  # two aside, one open, nobody in line
    large = Ticket(8, payload="large")
    assert core.offer(large, 13.0) == older[:8]
    assert large.state is not State.ENDED
    assert core.waiting_rows == 12


def test_few_batches_are_set_aside() -> None:
    """What is in a batch has had its turn: the rest of the line stays in line, for priorities and shares."""
    core = scheduler(lanes=2)
    core.started()
    core.started()
    for _ in range(40):
        offer(core, "x")
    set_aside_all(core, 0.1, capacity=4)
    assert [len(batch.tickets) for batch in core.opened()] == [4, 4, 4]
    late = offer(core, "late", 0.2)
    first = offer(core, "first", 0.3, priority=1)
    assert (late.state, first.state) == (State.WAITING, State.WAITING)
    # The more important gets a batch beside the full ones, which is launched before them.
    set_aside_all(core, 0.3, capacity=4)
    assert first.state is State.PLACED
    assert late.state is State.WAITING
    assert core.due(0.3) is first.batch
    # And no other for who is less important than what is in that one.
    offer(core, "second", 0.4)
    set_aside_all(core, 0.4, capacity=4)
    assert len(core.opened()) == 4


@pytest.mark.parametrize("why", ["more important ones", "bytes that run", "too many rows"])
def test_nobody_is_shed_in_vain(why: str) -> None:
    core = scheduler(rows=4, overload="shed_oldest", max_bytes_in_flight=100)
    if why == "bytes that run":
        offer(core, "r", nbytes=90)
        launch(core, 0.0)
        kept = [offer(core, "a", 0.1, nbytes=5)]
        new = Ticket(1, nbytes=50)
    elif why == "more important ones":
        kept = [offer(core, "a", 0.0, rows=2, priority=0), offer(core, "b", 0.0, rows=2, priority=9)]
        new = Ticket(3, priority=0)
    else:
        kept = [offer(core, "a", 0.0, rows=1, priority=0), offer(core, "b", 0.0, rows=3, priority=9)]
        new = Ticket(2, priority=0)
    with pytest.raises(trtx.OverloadedError):
        core.offer(new, 0.2)
    assert all(ticket.state is not State.ENDED for ticket in kept)


# ---- deadlines ----


def test_late_requests_never_run() -> None:
    core = scheduler()
    core.started()
    offer(core, "a", 0.0, deadline=0.5)
    open_all(core, 0.0)
    offer(core, "b", 0.0, deadline=0.7)
    offer(core, "c", 0.0)
    offer(core, "d", 0.0, group=1, deadline=0.6)
    assert core.late(0.4) == []
    assert core.wake_at(0.4) == pytest.approx(0.5)
    assert names(core.late(0.65)) == "ad"
    core.ended()
    assert drain(core, 0.65, capacity=4) == "bc"
    assert core.late(9.0) == []  # b ran in time


def test_late_outside() -> None:
    core = scheduler(rows=1)
    offer(core, "a")
    offer(core, "b", deadline=1.0)
    assert core.wake_at(0.0) <= 1.0
    assert names(core.late(1.0)) == "b"
    launch(core, 1.0)
    assert core.admit() == []


def test_a_deadline_makes_a_batch_leave_early() -> None:
    core = scheduler(delay=10.0, depth=2)
    core.expected_s = 0.2
    offer(core, "a")
    launch(core, 0.0)
    offer(core, "b", 0.0, deadline=1.0)
    assert launch(core, 0.5) is None
    assert core.wake_at(0.5) == pytest.approx(0.8)
    assert launch(core, 0.8001) is not None


def test_answered_tickets_are_forgotten() -> None:
    """A deadline in an hour does not keep a request's arrays for an hour."""
    core = scheduler()
    seen = []
    for number in range(500):
        payload = Keeper()
        seen.append(weakref.ref(payload))
        core.offer(Ticket(1, deadline=3600.0, payload=payload), number / 1000)
        del payload
        batch = launch(core, number / 1000)
        assert batch is not None
        core.done(batch)
        del batch
        core.late(number / 1000)
    gc.collect()
    assert sum(ref() is not None for ref in seen) < 100


def test_cancelled_tickets_outside_are_forgotten() -> None:
    """They do not pile up behind one that does not fit for long."""
    core = scheduler(rows=1)
    offer(core, "a")
    head = offer(core, "b")
    seen = []
    for _ in range(500):
        keeper = Keeper()
        seen.append(weakref.ref(keeper))
        ticket = Ticket(1, payload=keeper)
        core.offer(ticket, 0.0)
        core.remove(ticket)
        del keeper, ticket
    gc.collect()
    assert sum(ref() is not None for ref in seen) < 100
    assert head.state is State.OUTSIDE


# ---- cancellation ----


def test_cancelled_rows_are_not_launched() -> None:
    core = scheduler()
    core.started()
    placed = offer(core, "a", rows=2)
    open_all(core, 0.0)
    waiting = offer(core, "b", rows=3)
    other = offer(core, "c")
    assert core.remove(placed)
    assert core.remove(waiting)
    assert core.waiting_rows == 1
    core.ended()
    assert [batch.live_rows for batch in core.empty()] == [0]
    assert drain(core, 0.0, capacity=4) == "c"
    assert not core.remove(other)
    assert core.idle


def test_a_running_ticket_cannot_be_taken_out() -> None:
    core = scheduler()
    ticket = offer(core, "a", nbytes=7)
    batch = launch(core, 0.0)
    assert batch is not None
    assert not core.remove(ticket)
    assert core.bytes_in_flight == 7
    core.done(batch)
    assert not core.remove(ticket)
    assert core.bytes_in_flight == 0


def test_everybody() -> None:
    core = scheduler(rows=3)
    core.started()
    offer(core, "a")
    open_all(core, 0.0, capacity=1)
    offer(core, "b")
    offer(core, "c", priority=1)
    offer(core, "d")
    assert sorted(names(core.everybody())) == list("abcd")
    for ticket in core.everybody():
        assert core.remove(ticket)
    core.empty()
    core.ended()
    assert core.idle
    assert core.everybody() == []


@pytest.mark.parametrize(
    "options",
    [
        {"overload": "drop"}, {"overload": None}, {"starvation_s": None}, {"starvation_s": -1}, {"starvation_s": "1"},
        {"starvation_s": math.nan}, {"shares": {"a": 0}}, {"shares": {"a": -1.0}}, {"shares": {"a": math.nan}},
        {"shares": {"a": math.inf}}, {"shares": {"a": "1"}}, {"shares": [("a", 1)]}, {"shares": None},
        {"max_bytes_in_flight": 0}, {"max_bytes_in_flight": 1.5}, {"batch_sizes": (0,)}, {"batch_sizes": (1.5,)},
        {"batch_sizes": 4}, {"batch_sizes": ()}, {"depth": 0}, {"depth": 17}, {"depth": "2"},
    ],
)  # fmt: skip
def test_bad_policies(options: dict[str, Any]) -> None:
    with pytest.raises(trtx.InvalidArgumentError):
        BatchPolicy(**options)


def test_a_policy_is_a_value() -> None:
    shares = {"a": 2.0}
    policy = BatchPolicy(shares=shares)
    assert policy == BatchPolicy(shares={"a": 2.0})
    with pytest.raises(AttributeError):
        policy.depth = 3  # type: ignore[misc]
