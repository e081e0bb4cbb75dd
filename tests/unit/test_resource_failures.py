"""Every native call fails once, at each of its occurrences: nothing may stay behind, and the error is typed."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, device_lost, fail
from tests.unit.ownership import PROFILE, SAMPLE, WEIGHTS, Gate, grow_tree, matmul_model, shared_plan

#: What gives something back: if the driver refuses that, the thing itself is lost, and nothing else may be.
RELEASES = frozenset("destroy cuMemFree cuMemFreeHost cuStreamDestroy cuEventDestroy cuDevicePrimaryCtxRelease".split())

#: What close() asks to see whether work is in flight; if that fails, it closes as if there were none, after waiting.
QUERIES = frozenset("cuStreamQuery cuEventQuery cuCtxPushCurrent cuCtxPopCurrent".split())


def serve(backend: MockBackend) -> None:
    """From the model to an answer and back to nothing."""

    async def main() -> None:
        async with trtx.open_engine(matmul_model(), backend, profiles=[PROFILE], cache=False) as engine:
            await engine.infer({"x": SAMPLE})
            result = await engine.infer_timed({"x": SAMPLE[:1]})
            np.testing.assert_allclose(result.outputs["y"], SAMPLE[:1] @ WEIGHTS, rtol=1e-5)
            engine.statistics()

    asyncio.run(main())


def open_everything(backend: MockBackend) -> None:
    """One of every object, used at the bare level."""
    plan = shared_plan()

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            logger = await stack.enter_async_context(trtx.Logger())
            builder = await stack.enter_async_context(trtx.Builder(logger, backend))
            parts = builder.create_network(), builder.create_config(), builder.create_optimization_profile()
            device = await stack.enter_async_context(trtx.Device(0, backend=backend))
            event, source, target = device.create_event(), device.allocate(64), device.allocate(64)
            pinned = device.allocate_pinned(64)
            runtime = await stack.enter_async_context(trtx.Runtime(logger, backend))
            context = (await runtime.deserialize(plan)).create_execution_context()
            stream = await stack.enter_async_context(device.create_stream())
            context.set_input_shape("x", (2, 4))
            context.set_tensor_address("x", source)
            context.set_tensor_address("y", target)
            source.copy_from_host(SAMPLE, stream)
            context.enqueue_v3(stream)
            event.record(stream)
            event.synchronize()
            np.testing.assert_allclose(target.copy_to_host((2, 3), "f4", stream), SAMPLE @ WEIGHTS, rtol=1e-5)
            assert not any(item.closed for item in (*parts, pinned))

    asyncio.run(main())


def calls_of(scenario: Callable[[MockBackend], None]) -> Counter[str]:
    backend = MockBackend()
    scenario(backend)
    backend.assert_clean()
    calls = backend.calls
    backend.close()
    return calls


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("scenario", [serve, open_everything], ids=lambda scenario: scenario.__name__)
def test_every_native_call_may_fail(scenario: Callable[[MockBackend], None]) -> None:
    counts = calls_of(scenario)
    assert {"create_runtime", "deserialize", "create_context", "cuMemAlloc", "execute", "destroy"} <= counts.keys()
    runs = 0
    for call, count in sorted(counts.items()):
        for nth in range(1, count + 1):
            where = f"{call} number {nth} of {count}"
            backend = MockBackend(faults=[fail(call, nth)])
            try:
                scenario(backend)
            except trtx.TrtxError as error:
                named = "fault injected" in str(error) or call == "execute"
            except Exception as error:  # the point of the test: nothing but typed errors
                raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
            else:
                named = call in QUERIES
            assert named, f"{where}: the failure was swallowed, or another one raised"
            left = trtx.live_objects()
            assert left == [], f"{where}: {left}"
            # what lay in a context that ended is told twice: as the object, and as its memory
            lost = [text for text in backend.leaks() if "still there when its context ended" not in text]
            if call in RELEASES:
                assert len(lost) <= 1, f"{where}: {lost}"
            elif call != "cuCtxPushCurrent":  # nothing of a device can be given back where it cannot be made current
                assert lost == [], f"{where}: {lost}"
            assert backend.damage() == [] or call in RELEASES, f"{where}: {backend.damage()}"
            backend.close()
            runs += 1
    assert runs == sum(counts.values())


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("call", ["cuMemAlloc", "cuMemcpyHtoDAsync", "execute", "cuStreamSynchronize", "cuEventRecord"])
def test_losing_the_device_leaves_nothing_open(call: str) -> None:
    """The lost context took its memory along; what is ours is closed all the same."""
    total = calls_of(serve)[call]
    for nth in range(1, total + 1):
        backend = MockBackend(faults=[device_lost(nth, call=call)])
        # The last wait is that of the lane that gives its staging memory back: closing has nothing to say about a loss.
        closing = call == "cuStreamSynchronize" and nth == total
        with contextlib.nullcontext() if closing else pytest.raises(trtx.TrtxError):
            serve(backend)
        assert trtx.live_objects() == []
        assert backend.leaks() == []
        backend.close()


def test_close_after_the_device_was_lost_is_quiet() -> None:
    """The error was raised where it happened; closing has nothing to add, and ends every loan."""
    backend = MockBackend()
    tree = grow_tree(backend)
    tree.context.set_input_shape("x", (2, 4))
    tree.context.set_tensor_address("x", tree.buffer)
    backend.inject(device_lost(call="cuMemcpyHtoDAsync"))
    with pytest.raises(trtx.CudaError):
        tree.buffer.copy_from_host(SAMPLE, tree.stream)
    tree.context.close()
    tree.close()
    assert trtx.live_objects() == []


def test_a_second_failure_while_giving_up_becomes_a_note(caplog: pytest.LogCaptureFixture) -> None:
    backend = MockBackend(faults=[fail("create_runtime"), fail("cuDevicePrimaryCtxRelease")])
    with pytest.raises(trtx.EngineError, match="create_runtime") as caught:
        trtx.Runtime(None, backend)
    assert trtx.live_objects() == []
    assert "cuDevicePrimaryCtxRelease" in caplog.text
    assert any("cuDevicePrimaryCtxRelease" in note for note in getattr(caught.value, "__notes__", [caplog.text]))


def test_work_that_fails_on_the_stream_ends_the_loans_of_the_context() -> None:
    backend = MockBackend(faults=[fail("execute")])
    tree = grow_tree(backend)
    output = tree.device.allocate(64)
    tree.context.set_input_shape("x", (2, 4))
    tree.context.set_tensor_address("x", tree.buffer)
    tree.context.set_tensor_address("y", output)
    gate = Gate(backend, tree.device, tree.stream)
    tree.context.enqueue_v3(tree.stream)
    with pytest.raises(trtx.BorrowedError, match="enqueue_v3 is not finished"):
        tree.context.close()
    with pytest.raises(trtx.BorrowedError, match="ExecutionContext"):
        tree.buffer.close()
    gate.open()
    asyncio.run(tree.context.aclose())
    output.close()
    tree.close()
    assert trtx.live_objects() == []
