"""The arena against a model of it, whatever the order of calls."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mock_backend._arena import ALIGNMENT, Arena, ArenaError
from mock_backend._pinned import PinnedMemory

LIMIT = 1 << 14


def padded(size):
    return -(-size // ALIGNMENT) * ALIGNMENT


class ArenaMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.arena = Arena(LIMIT)
        self.live = {}
        self.freed = {}

    @rule(size=st.integers(1, LIMIT // 3))
    def allocate(self, size):
        if sum(map(padded, self.live.values())) + padded(size) > LIMIT:
            with pytest.raises(ArenaError) as caught:
                self.arena.allocate(size)
            assert caught.value.reason == ArenaError.OUT_OF_MEMORY
            return
        address = self.arena.allocate(size)
        assert address % ALIGNMENT == 0
        assert address not in self.live
        assert address not in self.freed
        self.live[address] = size

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data):
        address = data.draw(st.sampled_from(sorted(self.live)))
        self.arena.free(address)
        self.freed[address] = self.live.pop(address)

    @precondition(lambda self: self.freed)
    @rule(data=st.data())
    def stale_pointers_are_refused(self, data):
        address = data.draw(st.sampled_from(sorted(self.freed)))
        with pytest.raises(ArenaError, match="double free"):
            self.arena.free(address)
        with pytest.raises(ArenaError, match="use after free"):
            self.arena.view(address, 1)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), value=st.integers(0, 255))
    def views_stay_inside(self, data, value):
        address = data.draw(st.sampled_from(sorted(self.live)))
        size = self.live[address]
        offset = data.draw(st.integers(0, size - 1))
        length = data.draw(st.integers(0, size + 300))
        if offset + length > size:
            with pytest.raises(ArenaError) as caught:
                self.arena.view(address + offset, length)
            assert caught.value.reason == ArenaError.ILLEGAL
        else:
            self.arena.view(address + offset, length)[:] = value

    @invariant()
    def books_agree(self):
        assert self.arena.used_bytes == sum(map(padded, self.live.values()))
        assert len(self.arena.leaks()) == len(self.live)
        assert self.arena.damage() == []


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=8))
def test_blocks_do_not_overlap(sizes):
    arena = Arena(1 << 20)
    spans = [(arena.allocate(size), size) for size in sizes]
    for index, (address, size) in enumerate(spans):
        arena.view(address, size)[:] = index
    for index, (address, size) in enumerate(spans):
        assert set(arena.view(address, size).tolist()) == {index}


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=6))
def test_pinned_blocks_are_page_aligned_and_counted(sizes):
    pinned = PinnedMemory()
    addresses = [pinned.allocate(size) for size in sizes]
    assert all(address % 4096 == 0 for address in addresses)
    assert len(pinned.leaks()) == len(sizes)
    for address, size in zip(addresses, sizes, strict=True):
        assert pinned.check(address, size)
        pinned.free(address)
    assert pinned.leaks() == []
    assert pinned.damage() == []


def test_limit_must_be_positive():
    with pytest.raises(ValueError, match="memory_bytes"):
        Arena(0)
