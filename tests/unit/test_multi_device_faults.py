"""Devices that fail under a MultiDevice: quarantine, moved work, recovery, and the end of the last one."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import Fault, MockBackend, device_lost, fail, process_lost, slow
from tests.unit.serving import PATIENCE_S, GateClock, affine, rows
from tests.unit.test_multi_device import pool_of

SOON = trtx.RecoveryPolicy(initial_s=0.0, jitter=0.0, attempts=3)


def states(pool: trtx.MultiDevice) -> list[str]:
    return [device.state for device in pool.statistics().devices]


async def until(pool: trtx.MultiDevice, device: int, state: str) -> None:
    with anyio.fail_after(30):
        while states(pool)[device] != state:  # noqa: ASYNC110 - nothing tells when
            await anyio.sleep(0.001)


def slow_loss(device: int) -> Fault:
    """The device's next kernel takes until the gate opens, and then breaks it."""
    return Fault("execute", error=719, delay_s=1.0, lose_device=True, device=device)


async def test_what_was_launched_fails_typed_and_the_device_is_taken_out() -> None:
    backend = MockBackend(devices=2, faults=[device_lost(device=1)])
    async with pool_of(backend, strategy="round_robin", recovery=None) as pool:
        await pool.infer({"x": rows(1)})
        with pytest.raises(trtx.DeviceLostError, match="device 1 failed while this request ran on it") as caught:
            await pool.infer({"x": rows(1)})
        assert (caught.value.device, caught.value.launched) == (1, True)
        assert isinstance(caught.value, trtx.ExecutionError)
        assert caught.value.__cause__ is not None
        await until(pool, 1, "lost")
        for _ in range(5):
            await pool.infer({"x": rows(1)})
        device = pool.statistics().devices[1]
        assert device.faults == 1
        assert "719" in str(device.cause)


@pytest.mark.parametrize("captured", [False, True])
async def test_queued_work_moves_unnoticed(captured: bool) -> None:
    clock = GateClock()
    backend = MockBackend(devices=2, clock=clock)
    async with pool_of(backend, strategy="round_robin", recovery=None, slots=1) as pool:
        if captured:
            await pool.warmup(3)
        inputs = [rows(2, seed) for seed in range(40)]
        backend.inject(slow_loss(1))
        tasks = [asyncio.create_task(pool.infer({"x": x})) for x in inputs]
        await clock.wait_reached()
        clock.open()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        lost = [each for each in outcomes if isinstance(each, BaseException)]
        assert len(lost) == 1, lost  # the one that ran
        assert isinstance(lost[0], trtx.DeviceLostError)
        assert lost[0].launched
        for x, outputs in zip(inputs, outcomes, strict=True):
            if not isinstance(outputs, BaseException):
                np.testing.assert_array_equal(outputs["y"], affine(x))
        statistics = pool.statistics()
        assert (statistics.completed, statistics.failed) == (39, 1)
        assert statistics.moved == statistics.devices[1].moved >= 18


async def test_a_launch_that_the_dead_context_refuses_moves() -> None:
    backend = MockBackend(devices=2)
    async with pool_of(backend, strategy="round_robin", recovery=None) as pool:
        await pool.warmup(3)
        backend.inject(device_lost(call="cuGraphLaunch", device=0))
        x = rows(2)  # the shape that was captured
        for _ in range(4):
            np.testing.assert_array_equal((await pool.infer({"x": x}))["y"], affine(x))
        assert pool.statistics().failed == 0
        assert states(pool)[0] != "serving"


async def test_a_held_slot_fails_with_its_device() -> None:
    backend = MockBackend(devices=2)
    async with pool_of(backend, strategy="round_robin", recovery=SOON) as pool:
        async with pool.alloc_inputs({"x": (2, 4)}) as well:
            well["x"][...] = rows(2)
            backend.inject(device_lost(device=1))

            async def on_the_other() -> None:
                async with pool.alloc_inputs({"x": (2, 4)}) as slot:
                    slot["x"][...] = rows(2)
                    await slot.infer()

            with pytest.raises(trtx.DeviceLostError, match="device 1 failed while a slot") as caught:
                await on_the_other()
            assert caught.value.device == 1
            np.testing.assert_array_equal((await well.infer())["y"], affine(rows(2)))
        await until(pool, 1, "serving")


async def test_an_ordinary_failure_is_the_requests_own() -> None:
    backend = MockBackend(devices=2)
    async with pool_of(backend, strategy="round_robin") as pool:
        backend.inject(fail("execute_async_v3", device=0))
        outcomes = await asyncio.gather(*(pool.infer({"x": rows(1)}) for _ in range(2)), return_exceptions=True)
        assert [type(each) for each in outcomes] == [trtx.ExecutionError, dict]
        assert states(pool) == ["serving", "serving"]
        assert pool.statistics().devices[0].failed == 1


@pytest.mark.parametrize("devices", [2, 4])
async def test_a_device_comes_back(devices: int) -> None:
    backend = MockBackend(devices=devices, faults=[device_lost(device=1)])
    async with pool_of(backend, strategy="round_robin", recovery=SOON) as pool:
        outcomes = await asyncio.gather(*(pool.infer({"x": rows(1)}) for _ in range(devices)), return_exceptions=True)
        assert sum(isinstance(each, trtx.DeviceLostError) for each in outcomes) == 1
        await until(pool, 1, "serving")
        device = pool.statistics().devices[1]
        assert (device.faults, device.attempts, device.recoveries) == (1, 1, 1)
        assert (device.cause, device.last_error) == (None, None)
        before = device.completed
        for seed in range(2 * devices):
            x = rows(1, seed)
            np.testing.assert_array_equal((await pool.infer({"x": x}))["y"], affine(x))
        assert pool.statistics().devices[1].completed == before + 2


async def test_attempts_are_counted_backed_off_and_bounded() -> None:
    backend = MockBackend(devices=2, faults=[device_lost(device=0)])
    policy = trtx.RecoveryPolicy(initial_s=0.001, factor=2.0, maximum_s=0.002, attempts=3)
    async with pool_of(backend, strategy="round_robin", recovery=policy) as pool:
        backend.inject(fail("deserialize", count=None, device=0))
        with pytest.raises(trtx.DeviceLostError):
            await pool.infer({"x": rows(1)})
        await until(pool, 0, "lost")
        device = pool.statistics().devices[0]
        assert (device.attempts, device.recoveries) == (3, 0)
        assert "deserialize" in str(device.last_error)
        await pool.infer({"x": rows(1)})


async def test_a_warm_up_that_fails_is_a_failed_attempt() -> None:
    backend = MockBackend(devices=2, faults=[device_lost(device=0), device_lost(nth=2, device=0)])
    async with pool_of(backend, strategy="round_robin", recovery=SOON) as pool:
        with pytest.raises(trtx.DeviceLostError):
            await pool.infer({"x": rows(1)})
        await until(pool, 0, "serving")
        device = pool.statistics().devices[0]
        assert (device.attempts, device.recoveries) == (2, 1)


async def test_a_context_that_others_hold_stays_broken() -> None:
    """Another library's retain keeps the primary context, and its error, alive."""
    backend = MockBackend(devices=2, faults=[device_lost(device=0)])
    policy = trtx.RecoveryPolicy(initial_s=0.0, attempts=2)
    with trtx.Device(0, backend=backend):
        async with pool_of(backend, strategy="round_robin", recovery=policy, checked=False) as pool:
            with pytest.raises(trtx.DeviceLostError):
                await pool.infer({"x": rows(1)})
            await until(pool, 0, "lost")
            assert "719" in str(pool.statistics().devices[0].last_error)
            await pool.infer({"x": rows(1)})
    backend.assert_clean()


async def test_a_kernel_that_breaks_the_process_ends_all_devices() -> None:
    """As measured on a GPU: nothing is in service any more, and no attempt helps."""
    backend = MockBackend(devices=2, faults=[process_lost(device=1)])
    async with pool_of(backend, strategy="round_robin", recovery=SOON) as pool:
        await pool.infer({"x": rows(1)})
        with pytest.raises(trtx.DeviceLostError):
            await pool.infer({"x": rows(1)})
        with pytest.raises(trtx.NoDeviceError) as caught:
            await pool.infer({"x": rows(1)})
        assert sorted(caught.value.causes) == [0, 1]
        for device in range(2):
            await until(pool, device, "lost")
            assert pool.statistics().devices[device].attempts == 3
        with pytest.raises(trtx.NoDeviceError, match="start a new process"):
            await pool.infer({"x": rows(1)})


async def test_without_any_device_requests_fail_at_once_with_every_cause() -> None:
    backend = MockBackend(devices=2, faults=[device_lost(device=0), device_lost(device=1, error=700)])
    async with pool_of(backend, recovery=None) as pool:
        for _ in range(2):
            with pytest.raises(trtx.DeviceLostError):
                await pool.infer({"x": rows(1)})
        for call in (pool.infer, pool.infer_many):
            with pytest.raises(trtx.NoDeviceError, match="no device in service") as caught:
                await call({"x": rows(1)})
            assert sorted(caught.value.causes) == [0, 1]
            assert "719" in str(caught.value)
            assert "700" in str(caught.value)
            assert not caught.value.launched


async def test_closing_ends_the_attempts() -> None:
    backend = MockBackend(devices=2, faults=[device_lost(device=0)])
    policy = trtx.RecoveryPolicy(initial_s=3600.0, maximum_s=3600.0, jitter=0.0)
    async with pool_of(backend, strategy="round_robin", recovery=policy) as pool:
        with pytest.raises(trtx.DeviceLostError):
            await pool.infer({"x": rows(1)})
        while pool.statistics().devices[0].next_attempt_s is None:  # noqa: ASYNC110 - nothing tells when
            await asyncio.sleep(0.001)
        assert states(pool)[0] == "quarantined"
        assert 3500 < (pool.statistics().devices[0].next_attempt_s or 0) <= 3600
        await pool.aclose()
        assert states(pool)[0] == "lost"


async def held_while_it_is_opened(pool: trtx.MultiDevice, backend: MockBackend, clock: GateClock) -> None:
    """Device 0, which its first inference breaks, is being opened again until the clock goes on."""
    backend.inject(slow("deserialize", 1.0, device=0))
    with pytest.raises(trtx.DeviceLostError):
        await pool.infer({"x": rows(1)})
    await clock.wait_reached()
    assert states(pool)[0] == "recovering"


async def test_closing_in_the_middle_of_an_attempt() -> None:
    clock = GateClock()
    backend = MockBackend(devices=2, clock=clock, faults=[device_lost(device=0)])
    async with pool_of(backend, strategy="round_robin", recovery=SOON) as pool:
        await held_while_it_is_opened(pool, backend, clock)
        closing = asyncio.create_task(pool.aclose())
        await asyncio.sleep(0)
        clock.open()
        await closing
    assert trtx.live_objects() == []


@pytest.mark.parametrize("how", [{"drain": False}, {"timeout_s": 0.0}])
async def test_an_attempt_does_not_hold_up_what_is_given_up(how: dict[str, Any]) -> None:
    """A device is being opened, which nothing can hurry; those who wait for another hear at once."""
    clock = GateClock()
    backend = MockBackend(devices=2, clock=clock, faults=[device_lost(device=0)])
    async with pool_of(backend, strategy="round_robin", recovery=SOON) as pool:
        await held_while_it_is_opened(pool, backend, clock)
        backend.inject(slow(seconds=1.0, device=1))
        tasks = [asyncio.create_task(pool.infer({"x": rows(1, seed)})) for seed in range(8)]
        await clock.wait_reached()
        closing = asyncio.create_task(pool.aclose(**how))
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_S / 3)
        assert done
        assert not closing.done()
        clock.open()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await closing
        dropped = sum(isinstance(each, trtx.ClosedError) for each in outcomes)
        assert pool.statistics().dropped == dropped >= 6
    assert trtx.live_objects() == []


# ---- infer_many ----


async def test_infer_many_moves_chunks_that_were_not_launched() -> None:
    backend = MockBackend(devices=3)
    async with pool_of(backend, recovery=None) as pool:
        await pool.infer_many({"x": rows(24)}, chunk_rows=2)
        backend.inject(device_lost(call="cuMemcpyHtoDAsync", device=1))
        x = rows(60, 3)
        outputs = await pool.infer_many({"x": x}, chunk_rows=3)  # not captured: copied, and enqueued
        np.testing.assert_array_equal(outputs["y"], affine(x))
        assert states(pool)[1] != "serving"
        assert pool.statistics().failed == 0


@pytest.mark.parametrize("retry", [False, True])
async def test_infer_many_runs_launched_chunks_again_only_if_told_to(retry: bool) -> None:
    backend = MockBackend(devices=2, faults=[device_lost(device=1)])
    async with pool_of(backend, recovery=None) as pool:
        x = rows(60)
        if retry:
            outputs = await pool.infer_many({"x": x}, chunk_rows=3, retry=True)
            np.testing.assert_array_equal(outputs["y"], affine(x))
        else:
            with pytest.raises(trtx.DeviceLostError) as caught:
                await pool.infer_many({"x": x}, chunk_rows=3)
            assert caught.value.launched
        assert states(pool)[0] == "serving"


async def test_rows_that_break_every_device_do_not_get_to_every_device() -> None:
    backend = MockBackend(devices=4, faults=[device_lost(device=device) for device in range(4)])
    async with pool_of(backend, recovery=None) as pool:
        with pytest.raises(trtx.DeviceLostError):
            await pool.infer_many({"x": rows(1)}, retry=True)
        assert states(pool).count("serving") == 2


# ---- on trio, and under load ----


def test_a_device_comes_back_on_trio() -> None:
    import trio

    async def main() -> None:
        backend = MockBackend(devices=2, faults=[device_lost(device=1)])
        async with pool_of(backend, strategy="round_robin", recovery=SOON) as pool:
            await pool.infer({"x": rows(1)})
            with pytest.raises(trtx.DeviceLostError):
                await pool.infer({"x": rows(1)})
            await until(pool, 1, "serving")
            x = rows(3)
            np.testing.assert_array_equal((await pool.infer_many({"x": x}))["y"], affine(x))

    trio.run(main)


async def test_losses_under_load_give_every_request_its_own_answer() -> None:
    backend = MockBackend(devices=3)
    async with pool_of(backend, recovery=SOON, lanes=2) as pool:
        await pool.warmup(1)
        answers = {"right": 0, "lost": 0}

        async def client(seed: int) -> None:
            for turn in range(30):
                x = rows(1 + (seed + turn) % 4, seed * 1000 + turn)
                try:
                    outputs = await pool.infer({"x": x})
                except (trtx.DeviceLostError, trtx.NoDeviceError):
                    answers["lost"] += 1
                    continue
                np.testing.assert_array_equal(outputs["y"], affine(x))
                answers["right"] += 1

        async def breaker() -> None:
            for turn in range(6):
                backend.inject(device_lost(device=turn % 3))
                await asyncio.sleep(0.01)

        await asyncio.gather(breaker(), *(client(seed) for seed in range(12)))
        backend.clear_faults()
        statistics = pool.statistics()
        assert answers["right"] + answers["lost"] == statistics.accepted == 360
        assert statistics.completed == answers["right"] > 0
        assert statistics.failed == answers["lost"]
        for device in range(3):
            await until(pool, device, "serving")
        assert all(not device.outstanding_requests for device in pool.statistics().devices)


@pytest.mark.parametrize("batching", [{}, {"batch_axis": 0, "max_delay_s": 0.001}])
async def test_batched_work_moves_too(batching: dict[str, Any]) -> None:
    backend = MockBackend(devices=2)
    async with pool_of(backend, batching=batching, strategy="round_robin", recovery=SOON) as pool:
        await pool.warmup(1)
        await asyncio.gather(*(pool.infer({"x": rows(1)}) for _ in range(20)))
        backend.inject(device_lost(device=1))
        inputs = [rows(1, seed) for seed in range(200)]
        outcomes = await asyncio.gather(*(pool.infer({"x": x}) for x in inputs), return_exceptions=True)
        lost = [each for each in outcomes if isinstance(each, BaseException)]
        assert all(isinstance(each, trtx.DeviceLostError) for each in lost), lost
        assert 1 <= len(lost) < 100
        for x, outputs in zip(inputs, outcomes, strict=True):
            if not isinstance(outputs, BaseException):
                np.testing.assert_array_equal(outputs["y"], affine(x))
        await until(pool, 1, "serving")
        x = rows(50, 7)
        np.testing.assert_array_equal((await pool.infer_many({"x": x}))["y"], affine(x))
        assert pool.statistics().devices[1].batcher is not None


async def test_batching_options_reach_each_batcher() -> None:
    backend = MockBackend(devices=2)
    async with pool_of(backend, batching={"max_batch_size": 4, "batch_axis": 0}) as pool:
        outputs = await pool.infer({"x": rows(2)}, priority=1, deadline_s=10.0, tenant="a")
        np.testing.assert_array_equal(outputs["y"], affine(rows(2)))
        x = rows(30)
        np.testing.assert_array_equal((await pool.infer_many({"x": x}, tenant="b"))["y"], affine(x))
        with pytest.raises(trtx.InvalidArgumentError, match="1 to 4"):
            await pool.infer_many({"x": x}, chunk_rows=5)
