"""MultiDevice on the mock's devices: opening, routing, infer_many, closing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trtx_py as trtx
from mock_backend import MockBackend, fail, out_of_memory, slow
from tests.unit.serving import (
    PAIR,
    GateClock,
    affine,
    affine_plan,
    build,
    identity_model,
    pair_model,
    rows,
)


@asynccontextmanager
async def pool_of(
    backend: MockBackend, plan: trtx.Plan | None = None, *, checked: bool = True, **options: Any
) -> AsyncIterator[trtx.MultiDevice]:
    """A pool on every device of ``backend``, y = 2 x + 1 by default; the backend is ``checked`` at the end."""
    pool = await trtx.MultiDevice.open(plan or affine_plan(), backend=backend, **options)
    try:
        async with pool:
            yield pool
    finally:
        await pool.aclose(drain=False)
    if checked:
        backend.assert_clean()
        backend.close()


def completed(pool: trtx.MultiDevice) -> list[int]:
    return [device.completed for device in pool.statistics().devices]


# ---- opening ----


async def test_opens_an_engine_on_every_device() -> None:
    async with pool_of(MockBackend(devices=3), lanes=2) as pool:
        assert pool.devices == (0, 1, 2)
        assert [tensor.name for tensor in pool.io_tensors] == ["x", "y"]
        tree = trtx.live_objects()
        assert [each.kind for each in tree if each.depth == 0] == ["MultiDevice"]
        assert sorted(each.kind for each in tree if each.depth == 1) == ["Runtime"] * 3
        assert sum(each.kind == "Engine" for each in tree) == 3
        x = rows(2)
        np.testing.assert_array_equal((await pool.infer({"x": x}))["y"], affine(x))


async def test_takes_the_devices_it_is_given_in_their_order() -> None:
    async with pool_of(MockBackend(devices=4), devices=[3, 1]) as pool:
        assert pool.devices == (3, 1)
        await asyncio.gather(*(pool.infer({"x": rows(1)}) for _ in range(4)))
        assert sum(completed(pool)) == 4


async def test_the_plan_is_read_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    path = tmp_path / "affine.plan"
    affine_plan().save(path)
    read: list[object] = []
    load = trtx.Plan.load

    def counted(source: Any) -> trtx.Plan:
        if not isinstance(source, trtx.Plan):
            read.append(source)
        return load(source)

    monkeypatch.setattr(trtx.Plan, "load", counted)
    async with pool_of(MockBackend(devices=2), path) as pool:
        await pool.infer({"x": rows(1)})
    assert read == [path]


async def test_devices_are_opened_at_the_same_time() -> None:
    clock = GateClock()
    backend = MockBackend(devices=2, clock=clock, faults=[slow("deserialize", 1.0)])
    opening = asyncio.create_task(trtx.MultiDevice.open(affine_plan(), backend=backend))
    await clock.wait_reached()
    await clock.wait_reached()  # the second is in it while the first is
    clock.open()
    async with await opening as pool:
        assert pool.devices == (0, 1)
    backend.close()


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (fail("deserialize", device=1), trtx.EngineError),
        (fail("create_runtime", device=1), trtx.EngineError),
        (out_of_memory("cuDevicePrimaryCtxRetain", device=1), trtx.CudaError),
    ],
)
async def test_where_one_device_fails_nothing_stays_open(fault: Any, kind: type[Exception]) -> None:
    backend = MockBackend(devices=3, faults=[fault])
    with pytest.raises(kind, match=r"^device 1: "):
        await trtx.MultiDevice.open(affine_plan(), backend=backend)
    assert trtx.live_objects() == []
    backend.assert_clean()
    backend.close()


async def test_cancelled_while_opening_nothing_stays_open() -> None:
    clock = GateClock()
    backend = MockBackend(devices=2, clock=clock, faults=[slow("deserialize", 1.0)])
    opening = asyncio.create_task(trtx.MultiDevice.open(affine_plan(), backend=backend))
    await clock.wait_reached()
    opening.cancel()
    clock.open()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert trtx.live_objects() == []
    backend.assert_clean()
    backend.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": [0, 2]}, "device 2 does not exist"),
        ({"devices": [0, 0]}, "twice"),
        ({"devices": []}, "expected ordinals"),
        ({"devices": 1}, "expected ordinals"),
        ({"devices": [True]}, "devices is True"),
        ({"strategy": "least_load"}, "did you mean 'least_loaded'"),
        ({"strategy": 3}, "expected one of"),
        ({"lane": 2}, "no option lane"),
        ({"lanes": 0}, "lanes is 0"),
        ({"recovery": 3}, "expected a RecoveryPolicy"),
        ({"sample_s": 0.0}, "sample_s"),
        ({"batching": {"max_batch": 1}}, "'max_batch', which .* did you mean 'max_batch_size'"),
        ({"batching": {"foo": 1}}, "'foo', which .* there are max_batch_size, max_delay_s, .*crop$"),
        ({"batching": {1: 1}}, "option 1, which DynamicBatcher has not"),
        ({"batching": {"engine": None}}, "option 'engine', which DynamicBatcher has not"),
        ({"batching": {"max_batch_size": 0}}, "max_batch_size is 0"),
        ({"batching": 5}, "batching is 5; expected a mapping"),
    ],
)
async def test_refuses_what_it_cannot_use(options: dict[str, Any], message: str) -> None:
    backend = MockBackend(devices=2)
    with pytest.raises(trtx.InvalidArgumentError, match=message):
        await trtx.MultiDevice.open(affine_plan(), backend=backend, **options)
    assert trtx.live_objects() == []
    backend.close()


async def test_no_device_is_a_typed_error() -> None:
    with pytest.raises(trtx.BackendUnavailableError):
        await trtx.MultiDevice.open(affine_plan(), backend=MockBackend(devices=0))


def test_is_made_by_open_alone() -> None:
    with pytest.raises(TypeError, match=r"MultiDevice\.open"):
        trtx.MultiDevice()


async def test_belongs_to_its_event_loop() -> None:
    async with pool_of(MockBackend(devices=2)) as pool:
        caught: list[BaseException] = []

        def elsewhere() -> None:
            try:
                asyncio.run(pool.infer({"x": rows(1)}))
            except BaseException as error:
                caught.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        await asyncio.to_thread(thread.join)
        assert isinstance(caught[0], trtx.InvalidArgumentError)
        assert "event loop" in str(caught[0])


# ---- one request ----


async def test_bad_inputs_are_the_callers_alone() -> None:
    async with pool_of(MockBackend(devices=2)) as pool:
        for inputs, kind in (
            ({"z": rows(1)}, trtx.InvalidArgumentError),
            ({"x": rows(9)}, trtx.ShapeError),
            (rows(1), trtx.InvalidArgumentError),
        ):
            with pytest.raises(kind):
                await pool.infer(inputs)  # type: ignore[arg-type]
        with pytest.raises(trtx.InvalidArgumentError, match="batching"):
            await pool.infer({"x": rows(1)}, priority=1)
        x = [[1, 2, 3, 4]]
        np.testing.assert_array_equal((await pool.infer({"x": x}))["y"], affine(np.asarray(x, np.float32)))
        statistics = pool.statistics()
        assert (statistics.accepted, statistics.completed, statistics.failed) == (4, 1, 3)
        assert all(device.state == "serving" for device in statistics.devices)


async def test_round_robin_takes_turns() -> None:
    async with pool_of(MockBackend(devices=3), strategy="round_robin") as pool:
        for _ in range(9):
            await pool.infer({"x": rows(1)})
        assert completed(pool) == [3, 3, 3]


async def test_least_loaded_leaves_a_busy_device_alone() -> None:
    clock = GateClock()
    backend = MockBackend(devices=2, clock=clock, faults=[slow(seconds=1.0, device=0)])
    async with pool_of(backend) as pool:
        held: list[asyncio.Task[Any]] = []
        while not pool.statistics().devices[0].outstanding_requests:
            held.append(asyncio.create_task(pool.infer({"x": rows(8)})))
            await asyncio.sleep(0)
        await clock.wait_reached()  # device 0 works until the gate opens
        loads = pool.statistics().devices
        assert loads[0].outstanding_rows == 8 * loads[0].outstanding_requests
        for _ in range(3):
            await pool.infer({"x": rows(1)})  # would wait for the gate on device 0
        clock.open()
        await asyncio.gather(*held)
        assert all(not device.outstanding_bytes for device in pool.statistics().devices)


async def test_a_callable_sees_the_loads_and_chooses() -> None:
    seen: list[tuple[Sequence[trtx.DeviceLoad], trtx.RequestInfo]] = []

    def last(candidates: Sequence[trtx.DeviceLoad], request: trtx.RequestInfo) -> int:
        seen.append((candidates, request))
        return len(candidates) - 1

    async with pool_of(MockBackend(devices=3), strategy=last) as pool:
        await pool.infer({"x": rows(2)})
        assert completed(pool) == [0, 0, 1]
    candidates, request = seen[0]
    assert [each.device for each in candidates] == [0, 1, 2]
    assert (request.rows, request.nbytes) == (2, 32)
    assert all(each.outstanding_requests == 0 and each.request_s > 0 for each in candidates)


@pytest.mark.parametrize("answer", [-1, 2, None, "0", True])
async def test_a_bad_answer_of_a_callable_is_a_typed_error(answer: Any) -> None:
    async with pool_of(MockBackend(devices=2), strategy=lambda loads, request: answer) as pool:
        with pytest.raises(trtx.InvalidArgumentError, match="expected an index"):
            await pool.infer({"x": rows(1)})
        assert pool.statistics().failed == 1


async def test_what_a_callable_raises_is_the_cause() -> None:
    def broken(loads: Sequence[trtx.DeviceLoad], request: trtx.RequestInfo) -> int:
        raise ZeroDivisionError("oh")

    async with pool_of(MockBackend(devices=2), strategy=broken) as pool:
        with pytest.raises(trtx.InvalidArgumentError, match=r"broken failed \(ZeroDivisionError: oh\)") as caught:
            await pool.infer({"x": rows(1)})
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


async def test_a_cancelled_request_is_nobodys() -> None:
    clock = GateClock()
    backend = MockBackend(devices=2, clock=clock, faults=[slow(seconds=1.0, count=1)])
    async with pool_of(backend) as pool:
        task = asyncio.create_task(pool.infer({"x": rows(1)}))
        await clock.wait_reached()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.statistics().cancelled == 1
        assert all(not device.outstanding_requests for device in pool.statistics().devices)
        clock.open()


async def test_warmup_reaches_every_device() -> None:
    backend = MockBackend(devices=2)
    async with pool_of(backend) as pool:
        await pool.warmup(2)
        engines = [device.engine for device in pool.statistics().devices]
        assert [engine.completed for engine in engines] == [2, 2]


async def test_slots_are_spread_and_stay_on_their_device() -> None:
    async with pool_of(MockBackend(devices=2), slots=2) as pool, AsyncExitStack() as held:
        slots = [await held.enter_async_context(pool.alloc_inputs({"x": (2, 4)})) for _ in range(4)]
        loads = pool.statistics().devices
        assert [(each.outstanding_requests, each.outstanding_rows, each.outstanding_bytes) for each in loads] == [
            (2, 4, 64)
        ] * 2
        for seed, slot in enumerate(slots):
            slot["x"][...] = rows(2, seed)
        for seed, outputs in enumerate(await asyncio.gather(*(slot.infer() for slot in slots))):
            np.testing.assert_array_equal(outputs["y"], affine(rows(2, seed)))
        await held.aclose()
        assert all(not each.outstanding_requests for each in pool.statistics().devices)
        with pytest.raises(trtx.ShapeError):
            async with pool.alloc_inputs({"x": (9, 4)}):
                pass
        with pytest.raises(trtx.InvalidArgumentError):
            async with pool.alloc_inputs({"z": (1, 4)}):
                pass
        assert (pool.statistics().completed, pool.statistics().failed) == (4, 2)


def test_on_trio() -> None:
    import trio

    async def main() -> None:
        async with pool_of(MockBackend(devices=2), strategy="round_robin") as pool:
            x = rows(20)
            np.testing.assert_array_equal((await pool.infer_many({"x": x}, chunk_rows=3))["y"], affine(x))
            np.testing.assert_array_equal((await pool.infer({"x": x[:2]}))["y"], affine(x[:2]))
            assert all(completed(pool))

    trio.run(main)


# ---- infer_many ----


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 60),
    chunk_rows=st.none() | st.integers(1, 8),
    devices=st.integers(1, 4),
    lanes=st.integers(1, 2),
    strategy=st.sampled_from(["least_loaded", "round_robin"]),
    seed=st.integers(0, 1000),
)
def test_infer_many_keeps_the_order_of_rows(
    count: int, chunk_rows: int | None, devices: int, lanes: int, strategy: str, seed: int
) -> None:
    async def main() -> None:
        async with pool_of(MockBackend(devices=devices), strategy=strategy, lanes=lanes) as pool:
            x = rows(count, seed)
            outputs = await pool.infer_many({"x": x}, chunk_rows=chunk_rows)
            np.testing.assert_array_equal(outputs["y"], affine(x))
            size = chunk_rows or min(8, -(-count // devices))
            assert sum(completed(pool)) == -(-count // size)

    asyncio.run(main())


async def test_infer_many_uses_all_devices_and_a_slow_one_less() -> None:
    clock = GateClock()
    backend = MockBackend(devices=3, clock=clock, faults=[slow(seconds=1.0, device=2)])
    async with pool_of(backend) as pool:
        x = rows(200)
        task = asyncio.create_task(pool.infer_many({"x": x}, chunk_rows=2))
        await clock.wait_reached()
        # all but the two that device 2 holds: a lane, and one more
        while sum(completed(pool)) < 100 - 2:  # noqa: ASYNC110 - nothing tells when
            await asyncio.sleep(0)
        clock.open()
        np.testing.assert_array_equal((await task)["y"], affine(x))
        # The other two had as many at first; who of them is faster has more of the rest.
        found = completed(pool)
        assert found[2] == min(found) == 2
        assert sum(found[:2]) == 100 - 2


async def test_infer_many_of_several_tensors() -> None:
    plan = build(pair_model(), [PAIR])
    async with pool_of(MockBackend(devices=2), plan) as pool:
        with pytest.raises(trtx.InvalidArgumentError, match="output 'same' has no axis of rows"):
            await pool.infer_many({"left": np.ones((4, 2), "f4")})


async def test_infer_many_of_an_engine_with_a_fixed_batch() -> None:
    plan = build(identity_model(1, (2, 3)))
    async with pool_of(MockBackend(devices=2), plan) as pool:
        x = np.arange(24, dtype=np.float32).reshape(8, 3)
        np.testing.assert_array_equal((await pool.infer_many({"x": x}))["y"], x)
        assert sum(completed(pool)) == 4
        with pytest.raises(trtx.ShapeError, match="2 at a time"):
            await pool.infer_many({"x": x[:3]})


@pytest.mark.parametrize(
    ("inputs", "options", "kind", "message"),
    [
        ({}, {}, trtx.InvalidArgumentError, "'x' is missing"),
        (None, {}, trtx.InvalidArgumentError, "expected arrays by input name"),
        ({"x": np.zeros((0, 4), "f4")}, {}, trtx.ShapeError, "0 rows"),
        ({"x": np.float32(1)}, {}, trtx.ShapeError, "0 rows"),
        ({"x": np.zeros((3, 4), "f4")}, {"chunk_rows": 9}, trtx.InvalidArgumentError, "1 to 8"),
        ({"x": np.zeros((3, 4), "f4")}, {"chunk_rows": 0}, trtx.InvalidArgumentError, "at least 1"),
        ({"x": np.zeros((30, 4), "f8")}, {}, trtx.DTypeError, "float64"),
        ({"x": np.zeros((30, 5), "f4")}, {}, trtx.ShapeError, "5"),
    ],
)
async def test_infer_many_refuses(inputs: Any, options: Any, kind: type[Exception], message: str) -> None:
    async with pool_of(MockBackend(devices=2)) as pool:
        with pytest.raises(kind, match=message):
            await pool.infer_many(inputs, **options)
        await pool.infer({"x": rows(1)})


async def test_infer_many_cancelled_cancels_all() -> None:
    clock = GateClock()
    backend = MockBackend(devices=2, clock=clock, faults=[slow(seconds=1.0)])
    async with pool_of(backend) as pool:
        task = asyncio.create_task(pool.infer_many({"x": rows(64)}, chunk_rows=1))
        await clock.wait_reached()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        statistics = pool.statistics()
        assert (statistics.cancelled, statistics.outstanding) == (1, 0)
        assert all(not device.outstanding_requests for device in statistics.devices)
        clock.open()


# ---- closing ----


async def test_aclose_finishes_what_was_accepted() -> None:
    clock = GateClock()
    backend = MockBackend(devices=2, clock=clock, faults=[slow(seconds=1.0, count=2)])
    async with pool_of(backend) as pool:
        tasks = [asyncio.create_task(pool.infer({"x": rows(1, seed)})) for seed in range(20)]
        await clock.wait_reached()
        closing = asyncio.create_task(pool.aclose())
        await asyncio.sleep(0)
        with pytest.raises(trtx.ClosedError, match="closing"):
            await pool.infer({"x": rows(1)})
        assert not closing.done()
        clock.open()
        results = await asyncio.gather(*tasks)
        await closing
        for seed, outputs in enumerate(results):
            np.testing.assert_array_equal(outputs["y"], affine(rows(1, seed)))
        statistics = pool.statistics()
        assert (statistics.completed, statistics.dropped, statistics.outstanding) == (20, 0, 0)


@pytest.mark.parametrize("how", [{"drain": False}, {"timeout_s": 0.0}])
async def test_aclose_gives_up_what_is_not_launched(how: dict[str, Any]) -> None:
    clock = GateClock()
    backend = MockBackend(devices=2, clock=clock, faults=[slow(seconds=1.0, count=2)])
    async with pool_of(backend, strategy="round_robin") as pool:
        tasks = [asyncio.create_task(pool.infer({"x": rows(1, seed)})) for seed in range(20)]
        many = asyncio.create_task(pool.infer_many({"x": rows(40)}, chunk_rows=1))
        await clock.wait_reached()
        await clock.wait_reached()
        closing = asyncio.create_task(pool.aclose(**how))
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        clock.open()
        outcomes = await asyncio.gather(*tasks, many, return_exceptions=True)
        await closing
        dropped = [each for each in outcomes if isinstance(each, trtx.ClosedError)]
        statistics = pool.statistics()
        assert done
        assert statistics.dropped == len(dropped) >= 18
        assert statistics.completed == 21 - len(dropped)
        assert statistics.outstanding == 0


async def test_close_refuses_while_work_is_outstanding() -> None:
    clock = GateClock()
    backend = MockBackend(devices=2, clock=clock, faults=[slow(seconds=1.0, count=1)])
    async with pool_of(backend) as pool:
        task = asyncio.create_task(pool.infer({"x": rows(1)}))
        await clock.wait_reached()
        with pytest.raises(trtx.BorrowedError, match="1 requests outstanding"):
            pool.close()
        clock.open()
        await task
        pool.close()
        assert pool.closed
        with pytest.raises(trtx.ClosedError):
            await pool.infer({"x": rows(1)})


async def test_aclose_is_idempotent_and_concurrent() -> None:
    backend = MockBackend(devices=2)
    async with pool_of(backend) as pool:
        await pool.infer({"x": rows(1)})
        await asyncio.gather(pool.aclose(), pool.aclose(drain=False))
        await pool.aclose()
        assert pool.statistics().completed == 1
