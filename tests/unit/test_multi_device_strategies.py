"""Strategies and what they go by: loads, estimates, and how busy NVML finds a GPU."""

from __future__ import annotations

import logging
import sys
import types
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.serving import affine_plan, rows
from tests.unit.test_multi_device import completed, pool_of
from trtx_py.serving._strategies import LeastLoaded, LeastUtilised, Load, RoundRobin, make_chooser
from trtx_py.serving._supervisor import RecoveryPolicy

REQUEST = trtx.RequestInfo(rows=1, nbytes=1000)
sizes = st.integers(0, 1 << 30)
times = st.floats(1e-6, 10.0)


def loads_of(count: int) -> list[Load]:
    costs: dict[int, float] = {}
    return [Load(device, costs) for device in range(count)]


@given(st.lists(st.tuples(st.integers(0, 100), sizes), max_size=30), st.randoms())
def test_what_is_begun_and_ended_leaves_nothing(requests: list[tuple[int, int]], random: Any) -> None:
    load = Load(0)
    begun = [(count, nbytes, load.begin(count, nbytes)) for count, nbytes in requests]
    assert (load.requests, load.nbytes) == (len(requests), sum(nbytes for _, nbytes in requests))
    random.shuffle(begun)
    for moment, (count, nbytes, cost) in enumerate(begun):
        assert load.seconds > 0
        load.end(count, nbytes, cost, None if moment % 2 else 0.0, float(moment))
    assert (load.requests, load.rows, load.nbytes, load.seconds) == (0, 0, 0, 0.0)


@given(st.lists(times, min_size=1, max_size=50), sizes)
def test_an_estimate_stays_within_what_was_measured(samples: list[float], nbytes: int) -> None:
    load, now = Load(0), 0.0
    for sample in samples:
        cost = load.begin(1, nbytes)
        load.end(1, nbytes, cost, now, now + sample)
        now += sample
    assert min(samples) * 0.999 <= load.cost(nbytes) <= max(samples) * 1.001


def test_requests_behind_each_other_cost_their_own_time() -> None:
    load = Load(0)
    costs = [load.begin(1, 100) for _ in range(3)]
    for moment, cost in enumerate(costs, start=1):
        load.end(1, 100, cost, 0.0, float(moment))  # all were given at 0, and ended at 1, 2, 3
    assert load.cost(100) == pytest.approx(1.0)


def test_a_slow_first_request_is_forgotten_soon() -> None:
    load = Load(0)
    load.end(1, 100, load.begin(1, 100), 0.0, 5.0)  # kernels were loaded
    for moment in range(12):
        load.end(1, 100, load.begin(1, 100), 10.0 + moment, 10.001 + moment)
    assert load.cost(100) < 0.01


def test_what_one_device_learned_is_where_another_begins() -> None:
    first, second = loads_of(2)
    first.end(1, 100, first.begin(1, 100), 0.0, 2.0)
    assert second.cost(100) == 2.0
    second.end(1, 100, second.begin(1, 100), 0.0, 3.0)
    assert second.cost(100) == 3.0


@given(st.integers(2, 8), st.lists(sizes, max_size=60), st.sampled_from(["least_loaded", "round_robin", "utilisation"]))
def test_every_strategy_answers_with_a_candidate(count: int, requests: list[int], name: str) -> None:
    choose, loads = make_chooser(name, 0.1), loads_of(count)
    for nbytes in requests:
        index = choose(loads, trtx.RequestInfo(rows=1, nbytes=nbytes))
        assert 0 <= index < count
        loads[index].begin(1, nbytes)


@given(st.integers(2, 8), st.integers(1, 50))
def test_round_robin_is_even(count: int, turns: int) -> None:
    choose, loads = RoundRobin(), loads_of(count)
    chosen = [choose(loads, REQUEST) for _ in range(count * turns)]
    assert all(chosen.count(index) == turns for index in range(count))


@given(st.integers(2, 8), st.lists(st.integers(1, 1 << 24), min_size=1, max_size=80))
def test_least_loaded_never_lets_one_fall_behind_by_more_than_a_request(count: int, requests: list[int]) -> None:
    choose, loads = LeastLoaded(), loads_of(count)
    largest = 0.0
    for nbytes in requests:
        index = choose(loads, trtx.RequestInfo(rows=1, nbytes=nbytes))
        largest = max(largest, loads[index].cost(nbytes))
        assert loads[index].seconds == min(load.seconds for load in loads)
        loads[index].begin(1, nbytes)
    assert max(load.seconds for load in loads) - min(load.seconds for load in loads) <= largest * 1.001


@given(st.integers(2, 6), st.integers(1, 40))
def test_least_loaded_takes_turns_where_all_are_idle(count: int, turns: int) -> None:
    choose, loads = LeastLoaded(), loads_of(count)
    chosen = [choose(loads, REQUEST) for _ in range(count * turns)]
    assert all(chosen.count(index) == turns for index in range(count))


def measured(load: Load, nbytes: int, seconds: float) -> None:
    for moment in range(60):
        load.end(1, nbytes, load.begin(1, nbytes), moment * 100.0, moment * 100.0 + seconds)


def test_least_loaded_goes_by_work_and_not_by_count() -> None:
    choose, (first, second) = LeastLoaded(), loads_of(2)
    first.begin(64, 1 << 24)  # one large request here, three small ones there
    for _ in range(3):
        second.begin(1, 1000)
    assert choose([first, second], REQUEST) == 1


def test_least_loaded_gives_a_slow_device_less_and_not_nothing() -> None:
    choose, loads = LeastLoaded(), loads_of(2)
    measured(loads[0], 1000, 0.001)
    measured(loads[1], 1000, 0.100)
    chosen = []
    for _ in range(20):
        index = choose(loads, REQUEST)
        loads[index].begin(1, 1000)
        chosen.append(index)
    assert 0 < chosen.count(1) < chosen.count(0)


def test_least_utilised_counts_in_what_was_sent_since() -> None:
    choose, loads = LeastUtilised(0.1), loads_of(2)
    loads[0].utilisation, loads[1].utilisation = 0.2, 0.5
    measured(loads[0], 1000, 0.02)
    measured(loads[1], 1000, 0.02)
    chosen = []
    for _ in range(4):
        index = choose(loads, REQUEST)
        loads[index].begin(1, 1000)
        chosen.append(index)
    assert chosen == [0, 0, 1, 0]


def test_least_utilised_does_without_what_nvml_does_not_tell() -> None:
    choose, loads = LeastUtilised(0.1), loads_of(2)
    loads[0].utilisation = 0.0
    loads[0].begin(1, 1 << 24)
    assert choose(loads, REQUEST) == 1


# ---- NVML ----


class FakeNvml(types.ModuleType):
    """pynvml, with GPUs in the other order than CUDA's."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.busy = {b"00000000:01:00.0": 90, b"00000000:02:00.0": 10}
        self.opened = 0
        self.broken = False

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetHandleByPciBusId(self, bus: bytes) -> bytes:
        if bus not in self.busy:
            raise self.NVMLError("Not Found")
        return bus

    def nvmlDeviceGetUtilizationRates(self, handle: bytes) -> Any:
        if self.broken:
            raise self.NVMLError("GPU is lost")
        return types.SimpleNamespace(gpu=self.busy[handle], memory=0)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


async def test_utilisation_prefers_the_idle_gpu(nvml: FakeNvml) -> None:
    async with pool_of(MockBackend(devices=2), strategy="utilisation", sample_s=60.0) as pool:
        await pool.infer({"x": rows(1)})
        assert completed(pool) == [0, 1]
        assert [device.utilisation for device in pool.statistics().devices] == [0.9, 0.1]
        assert nvml.opened == 1
    assert nvml.opened == 0


async def test_utilisation_is_looked_at_again(nvml: FakeNvml) -> None:
    import asyncio

    async with pool_of(MockBackend(devices=2), strategy="utilisation", sample_s=0.01) as pool:
        nvml.busy[b"00000000:01:00.0"] = 0
        while pool.statistics().devices[0].utilisation != 0.0:  # noqa: ASYNC110 - nothing tells when
            await asyncio.sleep(0.001)


async def test_a_look_that_fails_is_told_once_and_done_without(
    nvml: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    nvml.broken = True
    with caplog.at_level(logging.WARNING, "trtx_py"):
        async with pool_of(MockBackend(devices=2), strategy="utilisation") as pool:
            for _ in range(2):
                await pool.infer({"x": rows(1)})
            assert sum(completed(pool)) == 2
            assert pool.statistics().devices[0].utilisation is None
    assert caplog.text.count("NVML does not tell") == 1


@pytest.mark.parametrize("missing", [False, True])
async def test_without_nvml_opening_is_a_typed_error(
    nvml: FakeNvml, missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.busy.clear()  # it knows none of the devices
    if missing:
        monkeypatch.setitem(sys.modules, "pynvml", None)
    backend = MockBackend(devices=2)
    with pytest.raises(trtx.BackendUnavailableError, match=r"nvml\]" if missing else "Not Found") as caught:
        await trtx.MultiDevice.open(affine_plan(), backend=backend, strategy="utilisation")
    assert "least_loaded" in str(caught.value)
    assert nvml.opened == 0
    assert trtx.live_objects() == []
    backend.assert_clean()
    backend.close()


# ---- backing off ----


@given(
    st.floats(0.0, 100.0), st.floats(0.0, 100.0), st.floats(1.0, 10.0), st.floats(0.0, 1.0), st.integers(1, 200),
    st.floats(0.0, 1.0),
)  # fmt: skip
def test_waits_grow_and_are_bounded(
    initial: float, maximum: float, factor: float, jitter: float, attempt: int, draw: float
) -> None:
    policy = RecoveryPolicy(initial_s=initial, maximum_s=maximum, factor=factor, jitter=jitter)
    delay = policy.delay_s(attempt, draw)
    assert 0.0 <= delay <= maximum
    assert delay >= min(initial, maximum) * (1 - jitter) * 0.999
    assert policy.delay_s(attempt + 1, draw) >= delay * 0.999


def test_waits_double() -> None:
    policy = RecoveryPolicy(initial_s=1.0, maximum_s=5.0, jitter=0.5)
    assert [policy.delay_s(attempt, 0.0) for attempt in (1, 2, 3, 4)] == [1.0, 2.0, 4.0, 5.0]
    assert policy.delay_s(2, 1.0) == 1.0


@pytest.mark.parametrize(
    "wrong",
    [{"initial_s": -1}, {"maximum_s": "1"}, {"factor": 0.5}, {"jitter": 1.5}, {"attempts": 0},
     {"initial_s": float("nan")}, {"initial_s": True}],
)  # fmt: skip
def test_a_policy_refuses_what_is_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=next(iter(wrong))):
        RecoveryPolicy(**wrong)
