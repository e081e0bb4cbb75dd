"""One-shot calls: models kept by content, arrays checked, results in the model's own types."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from mock_backend import MockBackend, fail, slow
from tests.unit.capi.kit import FLOAT16, FLOAT32, INT32, INT64, context, control, graph, ok, options, read
from tests.unit.capi.test_control_graphs import PAIR, external_model
from tests.unit.serving import (
    NONZERO,
    PATIENCE_S,
    GateClock,
    affine_model,
    identity_model,
    make_model,
    nonzero_model,
    pair_model,
)
from trtx_py.backends.registry import resolve_backend
from trtx_py.capi import _context
from trtx_py.capi._cache import ModelCache

pytestmark = pytest.mark.usefixtures("nothing_stays_open")


@pytest.fixture
def mock() -> Iterator[Any]:
    backend: Any = resolve_backend("mock", need="run")
    yield backend
    backend.clear_faults()


def array(name: str, dtype: int, values: np.ndarray) -> Any:
    return name, dtype, values.shape, memoryview(values.tobytes())


def outputs(answer: Any) -> dict[str, np.ndarray]:
    results, rows = ok(answer)
    kinds = {0: np.float32, 1: np.float16, 2: np.int32, 4: np.int64}
    found = {name: read(address, dims, kinds[dtype]) for name, dtype, dims, address, _ in rows}
    assert all(found[name].nbytes == nbytes for name, *_, nbytes in rows)
    del results
    return found


def call(owner: Any, model: bytes, *inputs: Any, **given: Any) -> Any:
    return control.run(owner, memoryview(model), None, inputs, options(**given))


X = np.arange(8, dtype=np.float32).reshape(2, 4)


def test_by_name_in_any_order() -> None:
    left, right, fixed = np.ones((2, 2), np.float32), np.full((2, 2), 4, np.float32), np.array([1, 2, 3], np.int32)
    rows = [array("right", FLOAT32, right), array("fixed", INT32, fixed), array("left", FLOAT32, left)]
    with context() as owner:
        found = outputs(call(owner, pair_model(), *rows, ranges=PAIR))
        assert found["total"].tolist() == [[5, 5], [5, 5]]
        assert found["same"].tolist() == [1, 2, 3]


def test_a_model_is_built_once_and_told_by_content_and_options() -> None:
    with context() as owner:
        for _ in range(3):
            assert np.array_equal(outputs(call(owner, affine_model(), array("x", FLOAT32, X)))["y"], 2 * X + 1)
        assert ok(control.context_statistics(owner))[6:] == (1, 2, 1)
        call(owner, affine_model(), array("x", FLOAT32, X), slots=3)
        assert ok(control.context_statistics(owner))[6:] == (2, 2, 2)


def test_weights_are_part_of_the_content() -> None:
    values = np.array([1, 2, 3], np.float32)
    model = external_model("w", 0, values)
    with context() as owner:
        for factor in (1, 5, 1):
            blob = memoryview((values * factor).tobytes())
            answer = control.run(owner, memoryview(model), blob, (array("x", FLOAT32, values),), options())
            assert np.array_equal(outputs(answer)["y"], values * (factor + 1))
        assert ok(control.context_statistics(owner))[6:] == (2, 1, 2)


def test_the_least_recently_used_model_goes() -> None:
    models = {n: identity_model(TensorProto.FLOAT, (n,)) for n in (1, 2, 3)}
    with context(cached=2) as owner:
        for n in (1, 2, 1, 3, 1, 2):
            outputs(call(owner, models[n], array("x", FLOAT32, np.ones(n, np.float32))))
        assert ok(control.context_statistics(owner))[6:] == (2, 2, 4)


def test_plans_too() -> None:
    with context() as owner, graph(owner, affine_model()) as made:
        plan = ok(control.graph_plan(made))
        for _ in range(2):
            assert np.array_equal(outputs(call(owner, plan, array("x", FLOAT32, X)))["y"], 2 * X + 1)
        assert ok(control.context_statistics(owner))[6:] == (1, 1, 1)
        assert call(owner, plan, array("x", FLOAT32, X), precision="fp16")[0] == 1
        answer = control.run(owner, memoryview(plan), memoryview(b"w"), (array("x", FLOAT32, X),), options())
        assert answer[0] == 1


def test_zeros() -> None:
    with context() as owner:
        found = outputs(control.run(owner, memoryview(pair_model()), None, None, options()))
        assert found["total"].shape == (1, 2)
        assert found["same"].shape == (3,)
        assert not found["total"].any()
        ranges = (("x", (3, 4), (4, 4), (8, 4)),)
        found = outputs(control.run(owner, memoryview(affine_model()), None, None, options(ranges)))
        assert found["y"].tolist() == [[1] * 4] * 3
        found = outputs(control.run(owner, memoryview(nonzero_model()), None, None, options((("x", *NONZERO["x"]),))))
        assert found["where"].shape == (1, 0)


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ([], 1),
        ([array("y", FLOAT32, X)], 4),
        ([array("x", FLOAT32, X), array("x", FLOAT32, X)], 1),
        ([array("x", INT32, X.astype(np.int32))], 6),
        ([array("x", FLOAT16, X.astype(np.float16))], 6),
        ([array("x", 11, X)], 1),
        ([("x", FLOAT32, (2, 4), memoryview(X.tobytes()[:-1]))], 8),
        ([("x", FLOAT32, (2, 4), memoryview(X.tobytes() + b"1"))], 8),
        ([("x", FLOAT32, (2, 4), memoryview(b""))], 8),
        ([array("x", FLOAT32, X.reshape(8))], 5),
        ([array("x", FLOAT32, X.reshape(4, 2))], 5),
        ([array("x", FLOAT32, np.zeros((33, 4), np.float32))], 5),
        ([("x", FLOAT32, (-2, -4), memoryview(X.tobytes()))], 5),
        ([("x", FLOAT32, (1 << 31, 1 << 31), memoryview(b""))], 5),
        ([("x", FLOAT32, (2**31 - 1,) * 8, memoryview(b""))], 5),
    ],
)
def test_inputs_are_checked(rows: Any, status: int) -> None:
    with context() as owner:
        found = call(owner, affine_model(), *rows)
        assert found[0] == status, found
        assert np.array_equal(outputs(call(owner, affine_model(), array("x", FLOAT32, X)))["y"], 2 * X + 1)


def test_any_alignment_will_do() -> None:
    raw = bytearray(X.nbytes + 1)
    raw[1:] = X.tobytes()
    with context() as owner:
        row = ("x", FLOAT32, (2, 4), memoryview(raw)[1:])
        for _ in range(4):  # the captured graph too
            assert np.array_equal(outputs(call(owner, affine_model(), row))["y"], 2 * X + 1)


def test_scalars_and_nothing() -> None:
    scalar = make_model(
        [helper.make_node("Neg", ["x"], ["y"])], [("x", TensorProto.FLOAT, [])], [("y", TensorProto.FLOAT, [])]
    )
    with context() as owner:
        assert outputs(call(owner, scalar, array("x", FLOAT32, np.array(2, np.float32))))["y"] == -2
        found = outputs(
            call(owner, identity_model(TensorProto.INT64, (0, 3)), array("x", INT64, np.empty((0, 3), np.int64)))
        )
        assert found["y"].shape == (0, 3)


def test_first_calls_at_once_build_once(mock: Any) -> None:
    mock.inject(slow("build_serialized_network", 0.2))
    with context() as owner:
        answers: list[Any] = []
        row = array("x", FLOAT32, X)
        threads = [threading.Thread(target=lambda: answers.append(call(owner, affine_model(), row))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(np.array_equal(outputs(answer)["y"], 2 * X + 1) for answer in answers)
        assert ok(control.context_statistics(owner))[6:] == (1, 5, 1)


def test_first_calls_at_once_fail_once_and_the_next_one_tries_again(mock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = mock.calls["build_serialized_network"]
    mock.inject(fail("build_serialized_network"))
    made = ModelCache._made

    def when_all_are_there(cache: ModelCache, key: str, entry: Any, make: Any) -> Any:
        def later() -> Any:
            deadline = time.monotonic() + PATIENCE_S
            while entry.users < 4 and time.monotonic() < deadline:
                time.sleep(0.001)
            return make()

        return made(cache, key, entry, later)

    with context() as owner:
        answers: list[Any] = []
        row = array("x", FLOAT32, X)
        with monkeypatch.context() as patch:
            patch.setattr(ModelCache, "_made", when_all_are_there)
            threads = [
                threading.Thread(target=lambda: answers.append(call(owner, affine_model(), row))) for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert [answer[0] for answer in answers] == [13] * 4
        assert len({answer[1] for answer in answers}) == 1
        assert mock.calls["build_serialized_network"] - before == 1
        outputs(call(owner, affine_model(), row))


def test_a_model_in_use_is_not_closed(mock: Any) -> None:
    models = {n: identity_model(TensorProto.FLOAT, (n,)) for n in range(1, 5)}
    with context(cached=1) as owner:
        wrong: list[object] = []

        def work(seed: int) -> None:
            for number in range(20):
                n = 1 + (seed + number) % 4
                x = np.arange(n, dtype=np.float32)
                answer = call(owner, models[n], array("x", FLOAT32, x))
                if answer[0] or not np.array_equal(outputs(answer)["y"], x):
                    wrong.append(answer)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert ok(control.context_statistics(owner))[6] == 1


@contextlib.contextmanager
def interrupted(clock: GateClock) -> Iterator[None]:
    """This thread gets a KeyboardInterrupt, once, when a kernel is held. A signal alone may come just before a wait."""
    told = threading.Event()

    def interrupt(*_: object) -> None:
        if not told.is_set():
            told.set()
            raise KeyboardInterrupt

    def send() -> None:
        clock.wait_reached_sync()
        while not told.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            told.wait(0.01)

    before = signal.signal(signal.SIGINT, interrupt)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("end", ["evicted", "context destroyed"])
@pytest.mark.parametrize("captured", [True, False])
def test_a_model_goes_when_the_gpu_is_done_with_an_interrupted_call(
    captured: bool, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = GateClock()
    backend = MockBackend(clock=clock)
    monkeypatch.setattr(_context, "named_mock", lambda _: backend)  # by no name could it have this clock
    row, other = array("x", FLOAT32, X), identity_model(TensorProto.FLOAT, (3,))

    with context(cached=1) as owner:
        outputs(call(owner, affine_model(), row, no_cuda_graphs=not captured))
        (entry,) = owner._cache._entries.values()
        deadline = time.monotonic() + PATIENCE_S
        while captured and not entry.graph.engine.statistics().graphs.captured:  # recurs, and is recorded beside it
            assert time.monotonic() < deadline
            outputs(call(owner, affine_model(), row, no_cuda_graphs=False))
        backend.inject(slow(seconds=1, count=1))
        with interrupted(clock):
            assert call(owner, affine_model(), row, no_cuda_graphs=not captured)[0] == 18
        if end == "evicted":
            ending = threading.Thread(target=lambda: call(owner, other, array("x", FLOAT32, np.ones(3, np.float32))))
        else:
            ending = threading.Thread(target=lambda: control.destroy_context(owner))
        ending.start()
        ending.join(0.2)  # who does not wait is done with it
        clock.open()
        ending.join(PATIENCE_S)
        assert entry.graph.engine.closed
    backend.assert_clean()
    backend.close()


def test_results_are_the_callers(tmp_path: Path) -> None:
    with context() as owner:
        kept = [ok(call(owner, affine_model(), array("x", FLOAT32, X + n))) for n in range(5)]
        for n, (_, rows) in enumerate(kept):
            assert np.array_equal(read(rows[0][3], rows[0][2], np.float32), 2 * (X + n) + 1)
        assert control.destroy_context(owner) == (0,)
        assert np.array_equal(read(kept[0][1][0][3], (2, 4), np.float32), 2 * X + 1)
        assert tmp_path.exists()
