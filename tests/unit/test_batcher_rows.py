"""What a row is: other axes, unequal shapes, models that mix rows, rows that the caller fills, and large ones."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import anyio
import numpy as np
import pytest
from onnx import TensorProto, helper

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.batching import (
    ALONE,
    F32,
    NEVER_S,
    Skip,
    ask,
    ask_filled,
    ask_many,
    assert_settled,
    batching,
    held,
    length_plan,
    start,
    turns,
    until,
    wide_plan,
)
from tests.unit.serving import (
    NONZERO,
    PATIENCE_S,
    GateClock,
    Ranges,
    affine,
    build,
    make_model,
    nonzero_model,
    rows,
    serving,
)

INT = TensorProto.INT32


def node(operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Any:
    return helper.make_node(operator, list(inputs), list(outputs), **attributes)


@functools.cache
def columns_plan() -> trtx.Plan:
    """y = x + x with rows along axis 1 of (3, N), and its transpose t of (N, 3)."""
    model = make_model(
        [node("Add", ["x", "x"], ["y"]), node("Transpose", ["y"], ["t"], perm=[1, 0])],
        [("x", F32, [3, "N"])],
        [("y", F32, [3, "N"]), ("t", F32, ["N", 3])],
    )
    return build(model, [{"x": ((3, 1), (3, 4), (3, 8))}])


@functools.cache
def middle_plan() -> trtx.Plan:
    """y = x + x with rows along axis 1 of (2, N, 3)."""
    model = make_model([node("Add", ["x", "x"], ["y"])], [("x", F32, [2, "N", 3])], [("y", F32, [2, "N", 3])])
    return build(model, [{"x": ((2, 1, 3), (2, 4, 3), (2, 8, 3))}])


def lengths(count: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, length)).astype(np.float32)


async def ask_length(batcher: trtx.DynamicBatcher, count: int, length: int, seed: int = 0) -> None:
    x = lengths(count, length, seed)
    assert np.array_equal((await batcher.infer({"x": x}))["y"], affine(x))


# ---- axes ----


async def test_rows_along_other_axes(mock_backend: MockBackend) -> None:
    async def one(batcher: trtx.DynamicBatcher, count: int, seed: int) -> None:
        x = np.random.default_rng(seed).standard_normal((3, count)).astype(np.float32)
        for call in (batcher.infer, batcher.infer_many):
            found = await call({"x": x})
            assert np.array_equal(found["y"], x + x)
            assert np.array_equal(found["t"], (x + x).T)
            assert found["y"].flags.c_contiguous
        async with batcher.alloc_rows(count) as own:
            own["x"][...] = x
            found = await own.infer()
            assert np.array_equal(found["t"], (x + x).T)

    async with batching(mock_backend, columns_plan(), batch_axis={"x": 1, "y": 1}, max_delay_s=1.0) as batcher:
        await asyncio.gather(*(one(batcher, 1 + seed % 8, seed) for seed in range(30)))
        x = np.arange(90, dtype=np.float32).reshape(3, 30)
        found = await batcher.infer_many({"x": x})
        assert np.array_equal(found["y"], x + x)
        assert np.array_equal(found["t"], (x + x).T)
        await assert_settled(batcher)
        assert batcher.statistics().batches < batcher.statistics().completed


async def test_one_axis_for_all_tensors(mock_backend: MockBackend) -> None:
    async def one(batcher: trtx.DynamicBatcher, count: int, seed: int) -> None:
        x = np.random.default_rng(seed).standard_normal((2, count, 3)).astype(np.float32)
        assert np.array_equal((await batcher.infer({"x": x}))["y"], x + x)

    async with batching(mock_backend, middle_plan(), batch_axis=1) as batcher:
        await asyncio.gather(*(one(batcher, 1 + seed % 8, seed) for seed in range(30)))
        await assert_settled(batcher)


async def test_tensors_without_rows_are_refused(mock_backend: MockBackend) -> None:
    plan = build(
        make_model([node("Identity", ["x"], ["y"])], [("x", F32, ["N"])], [("y", F32, ["N"])]),
        [{"x": ((1,), (2,), (4,))}],
    )
    async with serving(mock_backend, plan) as engine:
        with pytest.raises(trtx.InvalidArgumentError, match="axis 1"):
            trtx.DynamicBatcher(engine, batch_axis=1)
        async with trtx.DynamicBatcher(engine) as batcher:
            found = await asyncio.gather(*(batcher.infer({"x": np.array([n], np.float32)}) for n in range(9)))
            assert [one["y"].tolist() for one in found] == [[n] for n in range(9)]


async def test_outputs_without_rows_are_noticed(mock_backend: MockBackend) -> None:
    """A declared axis is believed, but what comes out must have as many rows as went in."""
    async with batching(mock_backend, build(nonzero_model(), [NONZERO]), batch_axis=0) as batcher:
        with anyio.fail_after(PATIENCE_S):
            found = await asyncio.gather(
                *(batcher.infer({"x": np.ones(3, np.float32)}) for _ in range(4)), return_exceptions=True
            )
        assert all(isinstance(one, trtx.TrtxError) for one in found), found
        await assert_settled(batcher)


# ---- models that mix rows ----

MIXING: Mapping[str, tuple[list[Any], dict[str, np.ndarray]]] = {
    "softmax": ([node("Softmax", ["x"], ["y"], axis=0)], {}),
    "minus mean": ([node("ReduceMean", ["x", "axes"], ["m"], keepdims=1), node("Sub", ["x", "m"], ["y"])],
                   {"axes": np.array([0], np.int64)}),
    "cumulative": ([node("CumSum", ["x", "axis"], ["y"])], {"axis": np.array(0, np.int64)}),
    "reverse cumulative": ([node("CumSum", ["x", "axis"], ["y"], reverse=1)], {"axis": np.array(0, np.int64)}),
    "minus first": ([node("Gather", ["x", "first"], ["f"], axis=0), node("Sub", ["x", "f"], ["y"])],
                    {"first": np.array([0], np.int64)}),
    "maximum": ([node("ReduceMax", ["x", "axes"], ["m"], keepdims=1), node("Sub", ["x", "m"], ["y"])],
                {"axes": np.array([0], np.int64)}),
}  # fmt: skip


def mixing_plan(name: str, element: int = F32) -> trtx.Plan:
    nodes, weights = MIXING[name]
    return build(make_model(nodes, [("x", element, ["N", 4])], [("y", element, ["N", 4])], weights), [
        {"x": ((1, 4), (2, 4), (8, 4))}
    ])  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
async def test_a_model_that_mixes_rows_is_refused(mock_backend: MockBackend, name: str) -> None:
    async with serving(mock_backend, mixing_plan(name)) as engine:
        async with trtx.DynamicBatcher(engine) as batcher:
            with pytest.raises(trtx.InvalidArgumentError, match="mixes rows"):
                await batcher.infer({"x": rows(2)})
            found = await asyncio.gather(*(batcher.infer({"x": rows(1)}) for _ in range(3)), return_exceptions=True)
            assert all(isinstance(one, trtx.InvalidArgumentError) for one in found)
            with pytest.raises(trtx.InvalidArgumentError, match="mixes rows"):
                await batcher.warmup()
        async with trtx.DynamicBatcher(engine, batch_axis=0) as batcher:
            assert (await batcher.infer({"x": rows(2)}))["y"].shape == (2, 4)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("name", ["cumulative", "maximum", "minus first"])
async def test_a_model_of_integers_that_mixes_rows_is_refused(mock_backend: MockBackend, name: str, width: int) -> None:
    nodes, weights = MIXING[name]
    model = make_model(nodes, [("x", INT, ["N", width])], [("y", INT, ["N", width])], weights)
    async with batching(mock_backend, build(model, [{"x": ((1, width), (2, width), (8, width))}])) as batcher:
        with pytest.raises(trtx.InvalidArgumentError, match="mixes rows"):
            await batcher.infer({"x": np.ones((2, width), np.int32)})


async def test_a_model_that_gives_one_row_for_all_is_refused(mock_backend: MockBackend) -> None:
    model = make_model(
        [node("ReduceMean", ["x", "axes"], ["y"], keepdims=1)],
        [("x", F32, ["N", 4])],
        [("y", F32, [1, 4])],
        {"axes": np.array([0], np.int64)},
    )
    async with serving(mock_backend, build(model, [{"x": ((1, 4), (2, 4), (8, 4))}])) as engine:
        with pytest.raises(trtx.InvalidArgumentError):
            async with trtx.DynamicBatcher(engine) as batcher:
                await batcher.infer({"x": rows(2)})


# ---- groups ----


async def test_unequal_rows_are_never_mixed(mock_backend: MockBackend) -> None:
    async with batching(mock_backend, length_plan(), engine={"lanes": 2}) as batcher:
        for _ in range(3):
            await asyncio.gather(*(ask_length(batcher, 1 + n % 3, 1 + n % 7, n) for n in range(80)))
        await asyncio.gather(*(ask_length(batcher, 1, 32, n) for n in range(30)))
        await assert_settled(batcher)
        with pytest.raises(trtx.ShapeError):
            await ask_length(batcher, 1, 33)


async def test_graphs_for_a_shape_that_recurs(mock_backend: MockBackend) -> None:
    async with batching(mock_backend, length_plan()) as batcher:
        await batcher.warmup()
        before = batcher.engine.statistics().graphs.captures
        await asyncio.gather(*(ask_length(batcher, 1, 5, n) for n in range(3)))
        assert batcher.engine.statistics().graphs.captures == before

        async def until_captured() -> None:
            while batcher.engine.statistics().graphs.captures < before + 4:
                await asyncio.gather(*(ask_length(batcher, 1, 5, n) for n in range(3)))

        await asyncio.wait_for(until_captured(), 20)
        misses = batcher.engine.statistics().graphs.misses
        for _ in range(10):
            await asyncio.gather(*(ask_length(batcher, 3, 5, n) for n in range(3)))
        hits = batcher.engine.statistics().graphs
        assert hits.misses <= misses + 1  # one that was under way when its graph came
        await assert_settled(batcher)


async def test_groups_take_turns_with_few_graphs(mock_backend: MockBackend) -> None:
    """More shapes than graphs: they take them from each other, and the numbers stay right."""
    engine = {"max_graphs": 8, "lanes": 2}
    async with batching(mock_backend, length_plan(), engine=engine, max_batch_size=4) as batcher:
        for _ in range(15):
            for length in (3, 5, 7, 9):
                await asyncio.gather(*(ask_length(batcher, 1, length, n) for n in range(12)))
                await asyncio.gather(*(ask_length(batcher, 1 + n % 2, 3 + n % 7, n) for n in range(12)))
        await assert_settled(batcher)


async def test_many_shapes_do_not_pile_up(mock_backend: MockBackend) -> None:
    """Every length once: nothing is kept for those that do not come again."""
    plan = build(
        make_model([node("Identity", ["x"], ["y"])], [("x", F32, ["N", "L"])], [("y", F32, ["N", "L"])]),
        [{"x": ((1, 1), (4, 4), (8, 4000))}],
    )
    async with batching(mock_backend, plan, batch_axis=0) as batcher:
        for length in range(1, 400):
            x = np.full((3, length), length, np.float32)
            assert np.array_equal((await batcher.infer({"x": x}))["y"], x)
        assert len(batcher._groups.known) < 300
        kept = sum(
            array.nbytes for state in batcher._groups.known.values() for arrays in state.plain._free for array in arrays
        )
        assert kept < 200_000  # 2.5 MB if one batch of each were kept


# ---- padding ----


async def test_padding_and_cropping(mock_backend: MockBackend) -> None:
    def crop(outputs: dict[str, np.ndarray], inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {"y": outputs["y"][:, : inputs["x"].shape[1]]}

    async with batching(mock_backend, length_plan(), pad=trtx.pad_axis(1, 8), crop=crop) as batcher:
        await asyncio.gather(*(ask_length(batcher, 1 + n % 2, 1 + n % 8, n) for n in range(40)))
        x = lengths(30, 5)
        assert np.array_equal((await batcher.infer_many({"x": x}))["y"], affine(x))
        await assert_settled(batcher)
        s = batcher.statistics()
        assert s.batches < 40  # one group, though there were eight lengths


@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [
        ((1, 4), (2, 5), (2, 8)),
        ((1, 4), (2, 8), (2, 8)),
        ((1, 1), (2, 5), (2, 5)),
        ((2, 4), (2, 5), (2, 5)),  # it has no such axis
        ((0, 4), (3, 5), (4, 5)),
    ],
)
def test_pad_axis(arguments: tuple[int, int], given: tuple[int, ...], expected: tuple[int, ...]) -> None:
    x = np.ones(given, np.float32)
    padded = trtx.pad_axis(*arguments, value=7)({"x": x})["x"]
    assert padded.shape == expected
    assert padded.dtype == np.float32
    assert padded.sum() == x.sum() + 7 * (padded.size - x.size)


def test_pad_axis_to_sizes() -> None:
    pad = trtx.pad_axis(1, sizes=(16, 4))
    assert pad({"x": np.ones((1, 3))})["x"].shape == (1, 4)
    assert pad({"x": np.ones((1, 5))})["x"].shape == (1, 16)
    with pytest.raises(trtx.ShapeError, match="at most 16"):
        pad({"x": np.ones((1, 17))})
    for arguments in ({"axis": -1}, {"axis": 1, "multiple": 0}, {"axis": 1, "sizes": (0,)}):
        with pytest.raises(trtx.InvalidArgumentError):
            trtx.pad_axis(**arguments)  # pyright: ignore[reportArgumentType]


async def test_a_padding_function_that_fails(mock_backend: MockBackend) -> None:
    def pad(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        if inputs["x"][0, 0] < 0:
            raise KeyError("no")
        return inputs

    async with batching(mock_backend, length_plan(), pad=pad) as batcher:
        good, bad = np.ones((1, 4), np.float32), -np.ones((1, 4), np.float32)
        found = await asyncio.gather(
            *(batcher.infer({"x": bad if n == 3 else good}) for n in range(9)), return_exceptions=True
        )
        assert isinstance(found[3], trtx.InvalidArgumentError)
        assert "KeyError" in str(found[3])
        assert sum(isinstance(one, dict) for one in found) == 8
        await assert_settled(batcher)


# ---- profiles ----


@functools.cache
def four_plan() -> trtx.Plan:
    """y = 2 x + 1 for 4 to 8 rows."""
    from tests.unit.serving import affine_model

    ranges: Ranges = {"x": ((4, 4), (4, 4), (8, 4))}
    return build(affine_model(), [ranges])


async def test_a_profile_of_at_least_four_rows(mock_backend: MockBackend) -> None:
    async with batching(mock_backend, four_plan(), max_delay_s=1.0) as batcher:
        await ask(batcher, 1)
        await asyncio.gather(*(ask(batcher, 1 + n % 8, n) for n in range(30)))
        await ask_many(batcher, 17)
        await ask_filled(batcher, 1)
        await assert_settled(batcher)
        assert batcher.engine.statistics().failed == 0


async def test_a_fixed_number_of_rows(mock_backend: MockBackend) -> None:
    model = make_model([node("Add", ["x", "x"], ["y"])], [("x", F32, [4, 2])], [("y", F32, [4, 2])])
    async with batching(mock_backend, build(model)) as batcher:
        assert batcher.batch_sizes[-1] == 4
        x = np.arange(2, dtype=np.float32).reshape(1, 2)
        found = await asyncio.gather(*(batcher.infer({"x": x + n}) for n in range(10)))
        assert all(np.array_equal(one["y"], 2 * (x + n)) for n, one in enumerate(found))
        many = await batcher.infer_many({"x": np.tile(x, (11, 1))})
        assert np.array_equal(many["y"], np.tile(2 * x, (11, 1)))
        await assert_settled(batcher)


# ---- rows that the caller fills ----


async def test_filled_rows_share_a_launch() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE, max_delay_s=NEVER_S) as batcher:
        async with held(backend, clock, batcher):
            before = batcher.statistics().batches
            tasks = [start(ask_filled(batcher, 1 + n, n)) for n in range(3)] + [start(ask(batcher, 2, 9))]
            await turns()
            clock.open()
            await asyncio.gather(*tasks)
            assert batcher.statistics().batches - before == 1
        await assert_settled(batcher)
    backend.assert_clean()


async def test_filled_in_pinned_memory(mock_backend: MockBackend) -> None:
    """The very memory of the launch: nothing is copied on the way in."""
    async with batching(mock_backend, max_delay_s=NEVER_S) as batcher:
        await batcher.warmup()
        async with batcher.alloc_rows(2) as first, batcher.alloc_rows(3) as second:
            assert first["x"].shape == (2, 4)
            assert second["x"].ctypes.data == first["x"].ctypes.data + first["x"].nbytes
            first["x"][...], second["x"][...] = rows(2, 1), rows(3, 2)
            found = await asyncio.gather(first.infer(), second.infer())
        assert np.array_equal(found[0]["y"], affine(rows(2, 1)))
        assert np.array_equal(found[1]["y"], affine(rows(3, 2)))
        await assert_settled(batcher)


async def test_who_is_slow_to_fill_holds_nobody_up(mock_backend: MockBackend) -> None:
    async with batching(mock_backend, max_delay_s=10.0) as batcher:
        skip = Skip()
        await batcher.warmup()
        async with batcher.alloc_rows(2) as slow:
            slow["x"][0] = rows(2, 5)[0]
            others = [start(ask(batcher, 1, n)) for n in range(4)]
            await turns()
            assert not any(task.done() for task in others)  # they share its batch
            await skip.by(100.0)
            with anyio.fail_after(PATIENCE_S):
                await asyncio.gather(*others)
            slow["x"][1] = rows(2, 5)[1]  # what was written before is not lost
            others = [start(ask(batcher, 1, n)) for n in range(4)]
            found = await slow.infer()
            assert np.array_equal(found["y"], affine(rows(2, 5)))
            await skip.by(100.0)
            await asyncio.gather(*others)
        await assert_settled(batcher)


async def test_any_number_of_slow_fillers_block_nobody(mock_backend: MockBackend) -> None:
    async with batching(mock_backend, max_delay_s=10.0) as batcher:
        skip = Skip()
        await batcher.warmup()
        async with contextlib.AsyncExitStack() as stack:
            fillers = []
            with anyio.fail_after(10_000):  # of the clock that is moved
                for number in range(20):
                    own = await stack.enter_async_context(batcher.alloc_rows(2))
                    own["x"][...] = rows(2, number)
                    fillers.append(own)
                    await skip.by(100.0)
                others = [start(ask(batcher, 1, n)) for n in range(20)]
                await turns()
                await skip.by(100.0)
                await asyncio.gather(*others)
                for number, own in enumerate(fillers):
                    if number % 3:
                        found = await own.infer()
                        assert np.array_equal(found["y"], affine(rows(2, number)))
        await assert_settled(batcher)


async def test_detached_rows_are_not_rejected() -> None:
    """They were let in; that the queue is full when they are sent at last is no reason to refuse them."""
    clock = GateClock()
    backend = MockBackend(clock=clock)
    policy = trtx.BatchPolicy(overload="reject", depth=1)
    async with batching(backend, policy=policy, max_queue=10, max_delay_s=10.0) as batcher:
        skip = Skip()
        await batcher.warmup()
        async with batcher.alloc_rows(2) as own:
            own["x"][...] = rows(2)
            await skip.by(100.0)
            async with held(backend, clock, batcher):
                others = [start(ask(batcher, 4, n)) for n in range(2)]
                await turns()
                sent = start(own.infer())
                await turns()
                clock.open()
                assert np.array_equal((await sent)["y"], affine(rows(2)))
                await asyncio.gather(*others)
        await assert_settled(batcher)
    backend.assert_clean()


async def test_leaving_without_a_word(mock_backend: MockBackend) -> None:
    async with batching(mock_backend, max_delay_s=NEVER_S) as batcher:
        await batcher.warmup()
        async with batcher.alloc_rows(2) as own:
            other = start(ask(batcher, 3))
            await turns()
            assert not other.done()
        await other
        with pytest.raises(trtx.ClosedError):
            own["x"]
        with pytest.raises(trtx.ClosedError):
            await own.infer()
        with pytest.raises(RuntimeError, match="mine"):
            async with batcher.alloc_rows(2):
                raise RuntimeError("mine")
        await assert_settled(batcher)


async def test_rows_are_sent_once(mock_backend: MockBackend) -> None:
    async with batching(mock_backend) as batcher:
        request = batcher.alloc_rows(2)
        async with request as own:
            own["x"][...] = rows(2)
            await own.infer()
            with pytest.raises(trtx.BorrowedError, match="sent already"):
                await own.infer()
            with pytest.raises(trtx.BorrowedError):
                own["x"]
        with pytest.raises(trtx.InvalidArgumentError, match="one `async with`"):
            async with request:
                pass
        await assert_settled(batcher)


async def test_leaving_while_infer_waits() -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE) as batcher:
        async with held(backend, clock, batcher):
            async with batcher.alloc_rows(1) as own:
                own["x"][...] = rows(1)
                task = start(own.infer())
                await turns()
            await turns()
            clock.open()
            with anyio.fail_after(PATIENCE_S):
                found = (await asyncio.gather(task, return_exceptions=True))[0]
            assert isinstance(found, (trtx.TrtxError, dict)), found
        await assert_settled(batcher)
    backend.assert_clean()


@pytest.mark.parametrize("when", ["entering", "inside", "waiting"])
async def test_a_filler_is_cancelled(when: str) -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    async with batching(backend, policy=ALONE, max_batch_size=4, max_delay_s=NEVER_S) as batcher:
        async with held(backend, clock, batcher):
            others = [start(ask(batcher, 2, 1))]
            if when == "entering":
                others.append(start(ask(batcher, 2, 2)))  # their batch is full
            await turns()
            entered = asyncio.Event()

            async def fill() -> None:
                async with batcher.alloc_rows(2) as own:
                    entered.set()
                    own["x"][...] = rows(2)
                    if when == "inside":
                        await asyncio.sleep(NEVER_S)
                    await own.infer()

            task = start(fill())
            await turns()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()
            others.append(start(ask(batcher, 1, 3)))
            clock.open()
            await asyncio.gather(*others)
        await assert_settled(batcher)
    backend.assert_clean()


@pytest.mark.parametrize(
    ("count", "shapes", "error"),
    [
        (0, None, trtx.InvalidArgumentError), (9, None, trtx.ShapeError), (2, {"x": (3, 4)}, trtx.ShapeError),
        (2, {"z": (2, 4)}, trtx.InvalidArgumentError), (2, {"x": (2, 4, 1)}, trtx.ShapeError),
        (2, {"x": (2, 5)}, trtx.ShapeError), (2, {}, trtx.InvalidArgumentError),
        ("2", None, trtx.InvalidArgumentError), (2, [2, 4], trtx.InvalidArgumentError),
    ],
)  # fmt: skip
async def test_bad_rows_to_fill(mock_backend: MockBackend, count: Any, shapes: Any, error: type[Exception]) -> None:
    async with batching(mock_backend) as batcher:
        await batcher.warmup()
        with pytest.raises(error):
            async with batcher.alloc_rows(count, shapes):
                pass
        await ask(batcher)
        await assert_settled(batcher)


async def test_filling_shapes_that_are_dynamic(mock_backend: MockBackend) -> None:
    async with batching(mock_backend, length_plan(), max_delay_s=1.0) as batcher:
        with pytest.raises(trtx.InvalidArgumentError, match="shapes="):
            batcher.alloc_rows(2)
        for length in (5, 6):
            async with batcher.alloc_rows(2, {"x": (2, length)}) as own:
                own["x"][...] = lengths(2, length)
                assert np.array_equal((await own.infer())["y"], affine(lengths(2, length)))


# ---- large rows ----


def wide(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 32768)).astype(np.float32)


async def test_large_rows_are_copied_by_threads(mock_backend: MockBackend) -> None:
    async def one(batcher: trtx.DynamicBatcher, count: int, seed: int) -> None:
        x = wide(count, seed)
        assert np.array_equal((await batcher.infer({"x": x}))["y"], affine(x))

    async with batching(mock_backend, wide_plan(), engine={"lanes": 2}) as batcher:
        await asyncio.gather(*(one(batcher, 1 + seed % 8, seed) for seed in range(24)))
        x = wide(50, 3)
        assert np.array_equal((await batcher.infer_many({"x": x}))["y"], affine(x))
        await assert_settled(batcher)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("trtx_py-rows")]


class Held:
    """Holds the copies of a batcher's rows that are larger than the loop copies itself."""

    def __init__(self, batcher: trtx.DynamicBatcher, patch: pytest.MonkeyPatch) -> None:
        layout = batcher._layout
        write = layout.write
        self.reached = threading.Semaphore(0)
        self.gate = threading.Event()
        self.error: Exception | None = None
        main = threading.current_thread()

        def held_write(target: Any, start: int, arrays: Any, count: int) -> None:
            if threading.current_thread() is not main:
                self.reached.release()
                assert self.gate.wait(30)
                if self.error is not None:
                    raise self.error
            write(target, start, arrays, count)

        patch.setattr(layout, "write", held_write)

    async def wait_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.acquire, timeout=30)


async def queued_wide(batcher: trtx.DynamicBatcher, seeds: Sequence[int]) -> list[asyncio.Task[Any]]:
    """Requests that do not bypass: each has its place in a batch, and is copied."""
    return [start(batcher.infer({"x": wide(1, seed)})) for seed in seeds]


async def test_the_loop_does_not_spin_while_threads_copy(
    mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with batching(mock_backend, wide_plan(), max_delay_s=0.0) as batcher:
        await batcher.warmup()
        copies = Held(batcher, monkeypatch)
        tasks = await queued_wide(batcher, range(4))
        await copies.wait_reached()
        counted = 0
        pump = batcher._launcher.pump

        def counting() -> None:
            nonlocal counted
            counted += 1
            pump()

        monkeypatch.setattr(batcher._launcher, "pump", counting)
        try:
            await turns(200)
            assert counted < 20
        finally:
            copies.gate.set()
        found = await asyncio.gather(*tasks)
        assert all(np.array_equal(one["y"], affine(wide(1, seed))) for seed, one in enumerate(found))
        await assert_settled(batcher)


async def test_cancelled_while_threads_copy(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    async with batching(mock_backend, wide_plan()) as batcher:
        await batcher.warmup()
        copies = Held(batcher, monkeypatch)
        tasks = await queued_wide(batcher, range(6))
        await copies.wait_reached()
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks[::2], return_exceptions=True)
        copies.gate.set()
        for seed in (1, 3, 5):
            assert np.array_equal((await tasks[seed])["y"], affine(wide(1, seed)))
        await assert_settled(batcher)


async def test_copies_that_fail(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    async with batching(mock_backend, wide_plan()) as batcher:
        await batcher.warmup()
        copies = Held(batcher, monkeypatch)
        copies.error = ValueError("made up")
        copies.gate.set()
        tasks = await queued_wide(batcher, range(4))
        found = await asyncio.gather(*tasks, return_exceptions=True)
        failed = [one for one in found if isinstance(one, BaseException)]
        assert failed
        assert all(isinstance(error, trtx.TrtxError) and "made up" in str(error) for error in failed)
        copies.error = None
        x = wide(3, 1)
        assert np.array_equal((await batcher.infer({"x": x}))["y"], affine(x))
        await until(lambda: not batcher.statistics().waiting_rows)
        await assert_settled(batcher)


async def test_closed_while_threads_copy(mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    async with batching(mock_backend, wide_plan()) as batcher:
        await batcher.warmup()
        copies = Held(batcher, monkeypatch)
        tasks = await queued_wide(batcher, range(4))
        await copies.wait_reached()
        closing = start(batcher.aclose())
        await turns()
        assert not closing.done()
        copies.gate.set()
        found = await asyncio.gather(*tasks)
        assert all(np.array_equal(one["y"], affine(wide(1, seed))) for seed, one in enumerate(found))
        await closing
