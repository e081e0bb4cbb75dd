"""Records of what is allocated, budgets, and memory in the order of a stream."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, fail, slow
from tests.unit.ownership import SAMPLE, matmul_model, shared_plan
from tests.unit.serving import GateClock, affine, affine_plan, rows, serving, without_pools
from trtx_py.cuda._memory import CountedMemory

_OUT_OF_MEMORY, _INVALID_VALUE, _INVALID_HANDLE, _ILLEGAL_ADDRESS = 2, 1, 400, 700


class FakeDriver:
    """What CountedMemory asks of a driver; knows how much is allocated, and what was called."""

    def __init__(self, *, pools: int | None = 1, reuses_addresses: bool = False) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.sizes: dict[int, int] = {}
        self.most = 0
        self.refuse: dict[str, int] = {}
        self._pools = pools
        self._reuses = reuses_addresses
        self._addresses = itertools.count(4096, 256)
        self._lock = threading.Lock()

    def _called(self, name: str, *arguments: int) -> None:
        self.calls.append((name, *arguments))
        if name in self.refuse:
            raise trtx.CudaError(self.refuse[name], f"CUDA_ERROR_{self.refuse[name]}", name)

    def _allocate(self, nbytes: int) -> int:
        with self._lock:
            address = min(set(range(1, len(self.sizes) + 2)) - set(self.sizes)) if self._reuses else 0
            address = address or next(self._addresses)
            self.sizes[address] = nbytes
            self.most = max(self.most, sum(self.sizes.values()))
            return address

    def _free(self, address: int) -> None:
        with self._lock:
            del self.sizes[address]

    def cuMemAlloc(self, nbytes: int) -> int:
        self._called("cuMemAlloc", nbytes)
        return self._allocate(nbytes)

    def cuMemFree(self, address: int) -> None:
        self._called("cuMemFree", address)
        self._free(address)

    def cuMemAllocAsync(self, nbytes: int, stream: int) -> int:
        self._called("cuMemAllocAsync", nbytes, stream)
        return self._allocate(nbytes)

    def cuMemFreeAsync(self, address: int, stream: int) -> None:
        self._called("cuMemFreeAsync", address, stream)
        self._free(address)

    def cuMemHostAlloc(self, nbytes: int, flags: int) -> int:
        self._called("cuMemHostAlloc", nbytes, flags)
        return self._allocate(nbytes)

    def cuMemFreeHost(self, address: int) -> None:
        self._called("cuMemFreeHost", address)
        self._free(address)

    def cuStreamSynchronize(self, stream: int) -> None:
        self._called("cuStreamSynchronize", stream)

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> int:
        self._called("cuDeviceGetAttribute", attribute, device)
        if self._pools is None:
            raise trtx.CudaError(_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "cuDeviceGetAttribute")
        return self._pools


def counted(driver: FakeDriver, max_bytes: int | None = None, device: int | None = 0) -> CountedMemory:
    stand_in: Any = driver
    return CountedMemory(stand_in, device, max_bytes)


# records


def test_every_allocation_has_a_record_until_it_is_freed() -> None:
    memory = counted(FakeDriver())
    before, started = time.time(), time.monotonic()
    small = memory.allocate_device(10, owner="staging of lane 1")
    pinned = memory.allocate_pinned(20)
    weights = memory.reserve(30, "weights of Engine#1")
    ordered = memory.allocate_ordered(20, 7, owner="scratch")
    records = memory.allocations()
    assert [(r.kind, r.nbytes, r.owner, r.address) for r in records] == [
        ("tensorrt", 30, "weights of Engine#1", 0),
        ("pinned", 20, "", pinned),
        ("device", 20, "scratch", ordered),
        ("device", 10, "staging of lane 1", small),
    ]
    assert all(before <= r.wall_s <= time.time() and started <= r.monotonic_s <= time.monotonic() for r in records)
    memory.free_device(small, 10)
    memory.free_pinned(pinned, 20)
    memory.free_ordered(ordered, 20, 7)
    assert [r.nbytes for r in memory.allocations()] == [30]
    weights.release()
    assert memory.allocations() == ()


def test_reservations_count_as_device_memory_until_released_once() -> None:
    memory = counted(FakeDriver(), 100)
    first, second = memory.reserve(40, "weights"), memory.reserve(60, "a context")
    assert memory.device_statistics() == trtx.MemoryStatistics(100, 100, 2, 2, 100)
    first.release()
    first.release()
    assert memory.device_statistics() == trtx.MemoryStatistics(60, 100, 2, 1, 100)
    second.release()
    assert memory.device_statistics() == trtx.MemoryStatistics(0, 100, 2, 0, 100)
    assert memory.pinned_statistics() == trtx.MemoryStatistics(0, 0, 0, 0)


def test_an_address_given_out_again_while_it_is_being_freed_keeps_its_record() -> None:
    driver = FakeDriver(reuses_addresses=True)
    memory = counted(driver)
    first = memory.allocate_device(10, owner="first")
    free, taken = driver.cuMemFree, []

    def free_and_allocate(address: int) -> None:  # what another thread may do before free_device goes on
        free(address)
        taken.append(memory.allocate_device(20, owner="second"))

    driver.cuMemFree = free_and_allocate  # type: ignore[method-assign]
    memory.free_device(first, 10)
    assert taken == [first]
    assert [(r.owner, r.nbytes) for r in memory.allocations()] == [("second", 20)]
    assert memory.device_statistics().current_bytes == 20


def test_what_is_not_allocated_is_the_drivers_to_refuse_and_not_counted() -> None:
    driver = FakeDriver()
    memory = counted(driver)
    driver.refuse["cuMemFree"] = _INVALID_VALUE
    with pytest.raises(trtx.CudaError):
        memory.free_device(12345, 10)
    assert memory.device_statistics() == trtx.MemoryStatistics(0, 0, 0, 0)


# budgets


def test_exactly_the_budget_fits_and_one_byte_more_does_not() -> None:
    driver = FakeDriver()
    memory = counted(driver, 1000)
    address = memory.allocate_device(400, owner="activations of lane 1")
    memory.require(600, "a plan")
    weights = memory.reserve(600, "weights of Engine#1")
    calls = list(driver.calls)
    attempts: list[Callable[[], Any]] = [
        lambda: memory.allocate_device(1, owner="a buffer"),
        lambda: memory.allocate_ordered(1, 7, owner="a buffer"),
        lambda: memory.reserve(1, "a buffer"),
        lambda: memory.require(1, "a buffer"),
    ]
    for attempt in attempts:
        with pytest.raises(trtx.MemoryBudgetError, match="a buffer needs 1 bytes") as caught:
            attempt()
        error = caught.value
        assert (error.requested_bytes, error.used_bytes, error.budget_bytes) == (1, 1000, 1000)
    assert [call for call in driver.calls if "Alloc" in call[0]] == calls  # refused before the driver is asked
    assert memory.device_statistics() == trtx.MemoryStatistics(1000, 1000, 2, 2, 1000)
    memory.allocate_device(0)
    memory.allocate_pinned(5000)  # host memory, which the budget is not about
    memory.free_device(address, 400)
    memory.allocate_device(400)
    weights.release()
    memory.require(600, "a plan")


def test_the_error_names_what_does_not_fit_the_biggest_owners_and_the_next_step() -> None:
    memory = counted(FakeDriver(), 5000)
    owners = ("weights", 2000), ("small", 1), ("", 100), ("lane 1", 300), ("lane 2", 400), ("lane 1", 200)
    for owner, nbytes in owners:
        memory.allocate_device(nbytes, owner=owner)
    memory.allocate_pinned(9999, owner="pinned")
    with pytest.raises(trtx.MemoryBudgetError) as caught:
        memory.allocate_device(2000, owner="an execution context of Engine#2")
    assert str(caught.value) == (
        "an execution context of Engine#2 needs 2,000 bytes of device memory and does not fit: 3,001 bytes are in use "
        "(2,000 by weights, 500 by lane 1, 400 by lane 2, 101 by others) of the budget of 5,000 bytes; close what is "
        "not needed (device.memory_allocations() lists what there is) or raise max_device_bytes"
    )
    with pytest.raises(trtx.MemoryBudgetError, match=r"an allocation .*: 0 bytes are in use of the budget"):
        counted(FakeDriver(), 10).allocate_device(11)


def test_it_is_the_error_that_callers_look_for_when_memory_runs_out() -> None:
    assert issubclass(trtx.MemoryBudgetError, trtx.ExecutionError)
    assert issubclass(trtx.MemoryBudgetError, MemoryError)
    assert not issubclass(trtx.MemoryBudgetError, trtx.CudaError)


@pytest.mark.parametrize("name", ["cuMemAlloc", "cuMemAllocAsync"])
def test_a_failed_allocation_gives_its_budget_back(name: str) -> None:
    driver = FakeDriver()
    memory = counted(driver, 100)
    driver.refuse[name] = _OUT_OF_MEMORY
    for _ in range(3):
        with pytest.raises(trtx.CudaError):
            memory.allocate_device(100) if name == "cuMemAlloc" else memory.allocate_ordered(100, 7)
    assert memory.device_statistics() == trtx.MemoryStatistics(0, 0, 0, 0, 100)
    del driver.refuse[name]
    memory.allocate_device(100)


def test_threads_together_never_exceed_the_budget() -> None:
    driver, budget = FakeDriver(), 1000
    memory = counted(driver, budget)
    refused = [0] * 8

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(300):
            nbytes = chance.randrange(1, 400)
            try:
                if chance.random() < 0.5:
                    address = memory.allocate_ordered(nbytes, number)
                    memory.free_ordered(address, nbytes, number)
                else:
                    address = memory.allocate_device(nbytes)
                    memory.free_device(address, nbytes)
            except trtx.MemoryBudgetError:
                refused[number] += 1

    blocks = [memory.allocate_device(100) for _ in range(7)]  # so that some are refused, however the threads run
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(refused) > 0
    assert driver.most <= budget
    for block in blocks:
        memory.free_device(block, 100)
    final = memory.device_statistics()
    assert (final.current_bytes, final.live, memory.allocations(), driver.sizes) == (0, 0, (), {})
    assert final.peak_bytes <= budget
    memory.require(budget, "all of it")


def test_threads_that_allocate_at_once_share_the_budget() -> None:
    """All have passed the check before the first allocation is made: a check without a claim would admit them all."""
    driver = FakeDriver()
    memory = counted(driver, 300)
    together = threading.Barrier(3)
    allocate, admitted = driver.cuMemAlloc, []

    def slowly(nbytes: int) -> int:
        together.wait(30)
        return allocate(nbytes)

    driver.cuMemAlloc = slowly  # type: ignore[method-assign]

    def work() -> None:
        try:
            admitted.append(memory.allocate_device(100))
        except trtx.MemoryBudgetError:
            admitted.append(0)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(address > 0 for address in admitted) == 3
    assert driver.most == 300


# memory in the order of a stream


def test_ordered_memory_comes_from_the_pool_and_goes_back_in_order() -> None:
    driver = FakeDriver()
    memory = counted(driver, device=3)
    address = memory.allocate_ordered(0, 7)
    memory.free_ordered(address, 0, 7)
    memory.allocate_ordered(16, 7)
    assert driver.calls == [
        ("cuDeviceGetAttribute", 115, 3),
        ("cuMemAllocAsync", 1, 7),
        ("cuMemFreeAsync", address, 7),
        ("cuMemAllocAsync", 16, 7),
    ]


@pytest.mark.parametrize(("pools", "device"), [(0, 0), (None, 0), (1, None)])
def test_without_pools_freeing_waits_for_the_stream(pools: int | None, device: int | None) -> None:
    driver = FakeDriver(pools=pools)
    memory = counted(driver, device=device)
    address = memory.allocate_ordered(16, 7)
    memory.free_ordered(address, 16, 7)
    assert [call for call in driver.calls if call[0] != "cuDeviceGetAttribute"] == [
        ("cuMemAlloc", 16),
        ("cuStreamSynchronize", 7),
        ("cuMemFree", address),
    ]


def test_without_pools_memory_that_may_be_in_use_is_not_freed() -> None:
    driver = FakeDriver(pools=0)
    memory = counted(driver)
    address = memory.allocate_ordered(16, 7)
    driver.refuse["cuStreamSynchronize"] = _INVALID_HANDLE
    with pytest.raises(trtx.CudaError):
        memory.free_ordered(address, 16, 7)
    assert memory.device_statistics().current_bytes == 16
    driver.refuse["cuStreamSynchronize"] = _ILLEGAL_ADDRESS  # the device is lost, and all of its memory
    with pytest.raises(trtx.CudaError):
        memory.free_ordered(address, 16, 7)
    assert memory.device_statistics().current_bytes == 0
    assert "cuMemFree" not in [call[0] for call in driver.calls]


def test_another_failure_of_the_question_is_not_taken_for_an_answer() -> None:
    driver = FakeDriver()
    memory = counted(driver)
    driver.refuse["cuDeviceGetAttribute"] = _ILLEGAL_ADDRESS
    with pytest.raises(trtx.CudaError):
        memory.allocate_ordered(16, 7)
    del driver.refuse["cuDeviceGetAttribute"]
    memory.allocate_ordered(16, 7)
    assert driver.calls[-1] == ("cuMemAllocAsync", 16, 7)


def test_ordered_memory_on_a_device(mock_backend: MockBackend) -> None:
    with trtx.Device(0, backend=mock_backend, max_device_bytes=100) as device, device.create_stream() as stream:
        memory = device._access.memory
        with device.current():
            address = memory.allocate_ordered(100, stream.handle, owner="scratch")
            mock_backend.driver.cuMemsetD8Async(address, 1, 100, stream.handle)
            assert [record.owner for record in device.memory_allocations()] == ["scratch"]
            with pytest.raises(trtx.MemoryBudgetError):
                memory.allocate_ordered(1, stream.handle)
            memory.free_ordered(address, 100, stream.handle)
        assert device.memory_allocations() == ()
        stream.synchronize()


def test_a_free_that_failed_is_over_unless_the_stream_could_not_be_waited_for() -> None:
    for pools in (0, 1):
        driver = FakeDriver(pools=pools)
        memory = counted(driver)
        address = memory.allocate_ordered(16, 7)
        assert memory.has(address)
        assert not memory.has(address + 1)
        driver.refuse = dict.fromkeys(("cuStreamSynchronize", "cuMemFreeAsync"), _INVALID_HANDLE)
        with pytest.raises(trtx.CudaError):
            memory.free_ordered(address, 16, 7)
        assert memory.has(address) == (pools == 0)
        driver.refuse = {}
        if memory.has(address):
            memory.free_ordered(address, 16, 7)
        assert not memory.has(address)
        assert memory.device_statistics().current_bytes == 0


# staging: device and pinned memory of what a lane enqueues


def staged(engine: trtx.Engine) -> list[tuple[str, int]]:
    return sorted((r.kind, r.nbytes) for r in engine.runtime.device.memory_allocations() if "enqueues" in r.owner)


async def test_staging_is_kept_and_grows_in_the_order_of_the_stream() -> None:
    """What would wait for the whole device is not called while requests are served."""
    backend = MockBackend()
    async with serving(backend, cuda_graphs=False) as engine:
        await engine.infer({"x": rows(2)})
        first = backend.calls
        for count in (2, 1, 2):
            await engine.infer({"x": rows(count)})
        assert not [call for call in backend.calls - first if "Alloc" in call or "Free" in call]
        await engine.infer({"x": rows(6)})
        grown = backend.calls - first
        assert {call: count for call, count in grown.items() if "Alloc" in call or "Free" in call} == {
            "cuMemAllocAsync": 2, "cuMemFreeAsync": 2, "cuMemHostAlloc": 2
        }  # fmt: skip
        assert grown["cuStreamSynchronize"] == 4  # once for each request, never to grow
    assert backend.calls["cuMemFreeAsync"] == backend.calls["cuMemAllocAsync"] == 4
    backend.assert_clean()


async def test_staging_is_accounted_while_it_grows() -> None:
    backend = MockBackend()
    async with serving(backend, cuda_graphs=False) as engine:
        grown = {
            2: [("device", 2), ("pinned", 2)],
            6: [("device", 6), ("pinned", 2), ("pinned", 6)],
            7: [("device", 7), ("pinned", 7)],  # 2 and 6 together are more
            4: [("device", 7), ("pinned", 7)],
            8: [("device", 8), ("pinned", 7), ("pinned", 8)],
        }
        others: set[int] = set()
        for count, expected in grown.items():
            assert np.array_equal((await engine.infer({"x": rows(count)}))["y"], affine(rows(count)))
            assert staged(engine) == sorted(2 * [(kind, 16 * number) for kind, number in expected])
            (lane,) = (item for item in trtx.live_objects() if item.kind == "Lane")
            pinned = sum(16 * number for kind, number in expected if kind == "pinned")
            assert lane.host_bytes == 2 * pinned
            others.add(lane.device_bytes - sum(nbytes for kind, nbytes in staged(engine) if kind == "device"))
        assert len(others) == 1  # the activations
        device = engine.statistics().device_memory
    assert engine.statistics().device_memory.current_bytes == engine.statistics().pinned_memory.current_bytes == 0
    assert device.current_bytes == device.peak_bytes  # the old was given back before the new was asked for
    backend.assert_clean()


async def test_a_budget_holds_for_what_grows() -> None:
    backend = MockBackend()
    async with serving(backend, cuda_graphs=False) as engine:
        await engine.infer({"x": rows(6)})
        enough_for_6 = engine.statistics().device_memory.peak_bytes
    with trtx.Runtime(None, backend, max_device_bytes=enough_for_6) as runtime:
        async with await runtime.deserialize(affine_plan(), cuda_graphs=False) as engine:
            for count in (2, 6):
                await engine.infer({"x": rows(count)})
            for _ in range(2):
                with pytest.raises(trtx.MemoryBudgetError, match=r"a tensor that .* enqueues"):
                    await engine.infer({"x": rows(8)})
                assert np.array_equal((await engine.infer({"x": rows(6, 1)}))["y"], affine(rows(6, 1)))
            assert engine.statistics().device_memory.current_bytes == enough_for_6
        assert runtime.device.memory_statistics().current_bytes == 0
    backend.assert_clean()


async def test_pinned_memory_that_cannot_be_freed_costs_no_other() -> None:
    backend = MockBackend()
    async with serving(backend, cuda_graphs=False) as engine:
        for count in (2, 6):
            await engine.infer({"x": rows(count)})
        backend.inject(fail("cuMemFreeHost"))
        with pytest.raises(trtx.CudaError, match="cuMemFreeHost"):
            await engine.aclose()
    assert engine.statistics().pinned_memory.current_bytes == 0
    assert len(backend.leaks()) == 1
    assert backend.damage() == []


async def test_closing_waits_until_the_pool_has_its_memory_back() -> None:
    """The driver's pool gives memory to others only once the stream was waited for behind the free."""
    backend = MockBackend()
    order: list[str] = []

    def told(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: int) -> Any:
            order.append(name)
            return call(*arguments)

        return called

    async with serving(backend, cuda_graphs=False) as engine:
        await engine.infer({"x": rows(2)})
        with pytest.MonkeyPatch.context() as patched:
            for name in ("cuMemFreeAsync", "cuStreamSynchronize", "cuMemFreeHost", "cuStreamDestroy"):
                patched.setattr(backend.driver, name, told(name, getattr(backend.driver, name)))
            await engine.aclose()
    assert order[-5:] == [*2 * ["cuMemFreeAsync"], "cuStreamSynchronize", *2 * ["cuMemFreeHost"]]
    backend.assert_clean()


@pytest.mark.parametrize("pools", [True, False])
async def test_memory_that_grows_in_front_of_unfinished_work_is_freed_behind_it(
    pools: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request fails after its kernels were enqueued, and so does waiting for them; the next one needs more."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with serving(backend, cuda_graphs=False) as engine:
        if not pools:
            without_pools(backend, monkeypatch)
        for count in (2, 6):
            await engine.infer({"x": rows(count)})
        backend.inject(slow("execute", 1, count=1))
        backend.inject(fail("cuStreamSynchronize", count=2))
        with pytest.raises(trtx.CudaError, match="cuStreamSynchronize"):
            await engine.infer({"x": rows(6)})
        await clock.wait_reached()  # its kernels have begun
        task = asyncio.create_task(engine.infer({"x": rows(7)}))  # 2 and 6 are too much to keep: pinned memory goes too
        await asyncio.sleep(0.02)
        assert not task.done()
        clock.open()
        assert np.array_equal((await task)["y"], affine(rows(7)))
    backend.assert_clean()


async def test_waiting_that_fails_costs_no_memory_without_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers that could not be waited for are those that serve the next request."""
    backend = MockBackend()
    without_pools(backend, monkeypatch)
    async with serving(backend, cuda_graphs=False) as engine:
        await engine.infer({"x": rows(2)})
        before, kept = staged(engine), backend.calls
        backend.inject(fail("cuStreamSynchronize"))
        with pytest.raises(trtx.CudaError, match="cuStreamSynchronize"):
            await engine.infer({"x": rows(8)})
        assert staged(engine) == before
        assert (backend.calls - kept)["cuMemAlloc"] == 0
        for count in (2, 8):
            assert np.array_equal((await engine.infer({"x": rows(count)}))["y"], affine(rows(count)))
    assert engine.statistics().device_memory.current_bytes == 0
    backend.assert_clean()


# devices, runtimes, engines


def test_device_with_a_budget(mock_backend: MockBackend) -> None:
    with trtx.Device(0, backend=mock_backend, max_device_bytes=100) as device:
        assert device.memory_statistics() == trtx.MemoryStatistics(0, 0, 0, 0, 100)
        assert device.pinned_statistics().budget_bytes is None
        with device.allocate(60), device.allocate_pinned(500):
            with pytest.raises(trtx.MemoryBudgetError):
                device.allocate(41)
            assert {item.kind for item in trtx.live_objects()} == {"Device", "DeviceBuffer", "PinnedBuffer"}
            device.allocate(40).close()
        device.allocate(100).close()
        assert device.memory_statistics() == trtx.MemoryStatistics(0, 100, 3, 0, 100)
    assert device.memory_statistics().peak_bytes == 100
    with pytest.raises(trtx.ClosedError):
        device.memory_allocations()


@pytest.mark.parametrize("budget", [0, -1, 1.5, "1", True])
async def test_budgets_that_cannot_be(budget: Any, mock_backend: MockBackend) -> None:
    calls = mock_backend.calls
    for make in (trtx.Device, trtx.Runtime):
        with pytest.raises(trtx.InvalidArgumentError, match="max_device_bytes"):
            make(backend=mock_backend, max_device_bytes=budget)
    with pytest.raises(trtx.InvalidArgumentError, match="max_device_bytes"):
        async with trtx.open_engine("no such file", mock_backend, max_device_bytes=budget):
            pass
    assert mock_backend.calls == calls  # found out before anything was made
    assert trtx.live_objects() == []


def test_two_devices_have_budgets_of_their_own(mock_backend: MockBackend) -> None:
    with (
        trtx.Device(0, backend=mock_backend, max_device_bytes=100) as one,
        trtx.Device(0, backend=mock_backend, max_device_bytes=100) as other,
        one.allocate(100),
        other.allocate(100),
    ):
        assert one.memory_statistics() == other.memory_statistics()


def test_a_driver_without_memory_leaves_the_budget(mock_backend_factory: Any) -> None:
    backend = mock_backend_factory(faults=[fail("cuMemAlloc")])
    with trtx.Device(0, backend=backend, max_device_bytes=100) as device:
        with pytest.raises(trtx.CudaError):
            device.allocate(100)
        device.allocate(100).close()


async def test_an_engine_within_its_budget_serves(mock_backend: MockBackend) -> None:
    with trtx.Runtime(None, mock_backend, max_device_bytes=1 << 30) as runtime:
        async with await runtime.deserialize(shared_plan()) as engine:
            await engine.infer({"x": SAMPLE})
            used = runtime.device.memory_statistics()
            assert used.budget_bytes == 1 << 30
            listed = [record for record in runtime.device.memory_allocations() if record.kind != "pinned"]
            assert sum(record.nbytes for record in listed) == used.current_bytes > 0
            assert len(listed) == used.live
        assert runtime.device.memory_statistics().current_bytes == 0
        assert runtime.device.memory_allocations() == ()


async def test_an_engine_beyond_the_budget_leaves_nothing_and_everything_usable(mock_backend: MockBackend) -> None:
    with trtx.Runtime(None, mock_backend, max_device_bytes=8) as runtime:
        for _ in range(2):
            with pytest.raises(trtx.MemoryBudgetError):
                async with await runtime.deserialize(shared_plan()) as engine:
                    await engine.infer({"x": SAMPLE})
            assert runtime.device.memory_statistics().current_bytes == 0
            assert runtime.device.pinned_statistics().current_bytes == 0
        runtime.device.allocate(8).close()
        assert {item.kind for item in trtx.live_objects()} == {"Runtime", "Device"}


async def test_open_engine_hands_the_budget_on(mock_backend: MockBackend) -> None:
    profiles = [{"x": ((1, 4), (2, 4), (8, 4))}]
    with pytest.raises(trtx.MemoryBudgetError):
        async with trtx.open_engine(matmul_model(), mock_backend, profiles=profiles, max_device_bytes=8) as engine:
            await engine.infer({"x": SAMPLE})
    assert trtx.live_objects() == []
    async with trtx.open_engine(matmul_model(), mock_backend, profiles=profiles, max_device_bytes=1 << 30) as engine:
        await engine.infer({"x": SAMPLE})
        assert engine.statistics().device_memory.budget_bytes == 1 << 30
