"""The driver's memory against a model of it, whatever the order of calls."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mock_backend import MockBackend
from mock_backend._native import DeviceFaultError
from trtx_py._errors import CudaError

ALIGNMENT = 256
LIMIT = 1 << 14


def padded(size):
    return -(-size // ALIGNMENT) * ALIGNMENT


class Memory:
    """A device's memory, through the driver's calls."""

    def __init__(self, limit):
        self.backend = MockBackend(memory_bytes=limit)
        self.driver = self.backend.driver
        self.driver.cuInit(0)
        self.driver.cuCtxPushCurrent(self.driver.cuDevicePrimaryCtxRetain(0))

    def view(self, address, nbytes):
        return self.driver.device_view(address, nbytes, "test")

    def close(self):
        self.driver.cuCtxPopCurrent()
        self.driver.cuDevicePrimaryCtxRelease(0)
        self.backend.close()


class ArenaMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.memory = Memory(LIMIT)
        self.driver = self.memory.driver
        self.live = {}
        self.freed = {}

    def teardown(self):
        self.memory.close()

    @rule(size=st.integers(1, LIMIT // 3))
    def allocate(self, size):
        if sum(map(padded, self.live.values())) + padded(size) > LIMIT:
            with pytest.raises(CudaError) as caught:
                self.driver.cuMemAlloc(size)
            assert caught.value.code == 2
            return
        address = self.driver.cuMemAlloc(size)
        assert address % ALIGNMENT == 0
        assert address not in self.live
        assert address not in self.freed
        self.live[address] = size

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data):
        address = data.draw(st.sampled_from(sorted(self.live)))
        self.driver.cuMemFree(address)
        self.freed[address] = self.live.pop(address)

    @precondition(lambda self: self.freed)
    @rule(data=st.data())
    def stale_pointers_are_refused(self, data):
        address = data.draw(st.sampled_from(sorted(self.freed)))
        with pytest.raises(CudaError, match="double free"):
            self.driver.cuMemFree(address)
        with pytest.raises(DeviceFaultError, match="use after free"):
            self.memory.view(address, 1)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), value=st.integers(0, 255))
    def views_stay_inside(self, data, value):
        address = data.draw(st.sampled_from(sorted(self.live)))
        size = self.live[address]
        offset = data.draw(st.integers(0, size - 1))
        length = data.draw(st.integers(0, size + 300))
        if offset + length > size:
            with pytest.raises(DeviceFaultError, match="beyond") as caught:
                self.memory.view(address + offset, length)
            assert caught.value.args[0] == 700
        else:
            self.memory.view(address + offset, length)[:] = value

    @invariant()
    def books_agree(self):
        free, total = self.driver.cuMemGetInfo()
        assert total - free == sum(map(padded, self.live.values()))
        assert len(self.memory.backend.leaks()) == len(self.live)
        assert self.memory.backend.damage() == []


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=8))
def test_blocks_do_not_overlap(sizes):
    memory = Memory(1 << 20)
    spans = [(memory.driver.cuMemAlloc(size), size) for size in sizes]
    for index, (address, size) in enumerate(spans):
        memory.view(address, size)[:] = index
    for index, (address, size) in enumerate(spans):
        assert set(memory.view(address, size).tolist()) == {index}
    memory.close()


def test_a_view_outlives_its_block():
    memory = Memory(1 << 20)
    address = memory.driver.cuMemAlloc(16)
    view = memory.view(address, 16)
    memory.driver.cuMemFree(address)
    view[:] = 1  # as a kernel that is in the middle of it
    memory.close()


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=6))
def test_pinned_blocks_are_page_aligned_and_counted(sizes):
    memory = Memory(1 << 20)
    addresses = [memory.driver.cuMemHostAlloc(size, 0) for size in sizes]
    assert all(address % 4096 == 0 for address in addresses)
    assert len(memory.backend.leaks()) == len(sizes)
    assert memory.driver.mock.usage()["pinned_bytes"] == sum(sizes)
    for address in addresses:
        memory.driver.cuMemFreeHost(address)
    memory.backend.assert_clean()
    memory.close()


def test_limit_must_be_positive():
    with pytest.raises(ValueError, match="memory_bytes"):
        MockBackend(memory_bytes=0)


def test_there_are_at_most_eight_devices():
    with pytest.raises(ValueError, match="devices is 9; the mock has 0 to 8"):
        MockBackend(devices=9)
