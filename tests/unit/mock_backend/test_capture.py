"""Execution contexts in CUDA graphs: what may be captured, and what a replay goes by."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from onnx import helper

from trtx_py._errors import CudaError, EngineError, ExecutionError, InvalidArgumentError
from trtx_py._types import ShapeRange
from trtx_py.backends.protocols import CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as LOCAL

X = np.array([[-1, 2, -3, 4]] * 2, np.float32)


def capture(rig, *work):
    rig.driver.cuStreamBeginCapture(rig.stream, LOCAL)
    for step in work:
        step()
    graph = rig.driver.cuStreamEndCapture(rig.stream)
    made = rig.driver.cuGraphInstantiate(graph, 0)
    rig.driver.cuGraphDestroy(graph)
    rig.stack.callback(rig.driver.cuGraphExecDestroy, made)
    return made


def upload(rig, pointer, array):
    rig.driver.cuMemcpyHtoDAsync(pointer, array.ctypes.data, array.nbytes, rig.stream)


def download(rig, pointer, shape=(2, 4)):
    found = np.zeros(shape, np.float32)
    rig.driver.cuMemcpyDtoHAsync(found.ctypes.data, pointer, found.nbytes, rig.stream)
    return found


class Bound:
    """A context of a model y = relu(x) with its buffers, enqueued once."""

    def __init__(self, rig, models, context=None):
        self.context = context or rig.ready(models.relu(), models.N4)
        self.x, self.y = rig.alloc(128), rig.alloc(128)
        self.context.set_input_shape("x", (2, 4))
        self.context.set_tensor_address("x", self.x)
        self.context.set_tensor_address("y", self.y)
        upload(rig, self.x, X)
        self.context.execute_async_v3(rig.stream)
        rig.driver.cuStreamSynchronize(rig.stream)


@pytest.fixture(params=[True, False], ids=["compute", "zeros"])
def any_rig(request, rig_with):
    rig = rig_with(compute=request.param)
    rig.expected = lambda x: np.maximum(x, 0) if request.param else np.zeros_like(x)
    return rig


def test_a_replay_uses_what_is_in_memory_then(any_rig, models):
    rig = any_rig
    bound = Bound(rig, models)
    ran = rig.backend.calls["execute"]
    graph = capture(rig, lambda: bound.context.execute_async_v3(rig.stream))
    assert rig.backend.calls["execute"] == ran
    for scale in (1, -2):
        upload(rig, bound.x, X * scale)
        rig.driver.cuMemsetD8Async(bound.y, 1, 32, rig.stream)
        rig.driver.cuGraphLaunch(graph, rig.stream)
        np.testing.assert_array_equal(download(rig, bound.y), rig.expected(X * scale))
    assert rig.backend.calls["execute"] == ran + 2


@pytest.mark.parametrize("change", ["shape", "address", "never"])
def test_what_was_not_enqueued_before_is_not_captured(rig, models, change):
    bound = Bound(rig, models)
    if change == "shape":
        bound.context.set_input_shape("x", (3, 4))
    elif change == "address":
        bound.context.set_tensor_address("y", rig.alloc(128))
    else:
        context = rig.context_of(bound.context.parent)
        context.set_input_shape("x", (2, 4))
        context.set_tensor_address("x", bound.x)
        context.set_tensor_address("y", bound.y)
        bound.context = context
    rig.driver.cuStreamBeginCapture(rig.stream, LOCAL)
    with pytest.raises(ExecutionError, match="enqueue once before the capture") as caught:
        bound.context.execute_async_v3(rig.stream)
    assert isinstance(caught.value.__cause__, CudaError)
    with pytest.raises(CudaError) as ended:
        rig.driver.cuStreamEndCapture(rig.stream)
    assert ended.value.code == 901
    bound.context.execute_async_v3(rig.stream)
    rig.driver.cuStreamSynchronize(rig.stream)
    graph = capture(rig, lambda: bound.context.execute_async_v3(rig.stream))
    rig.driver.cuGraphLaunch(graph, rig.stream)
    rig.driver.cuStreamSynchronize(rig.stream)


@pytest.mark.parametrize("compute", [True, False])
def test_the_graph_of_a_context_that_was_used_otherwise_is_damage(loose_rig, models, compute):
    rig = loose_rig(compute=compute)
    bound = Bound(rig, models)
    graph = capture(rig, lambda: bound.context.execute_async_v3(rig.stream))
    bound.context.set_input_shape("x", (3, 4))
    rig.driver.cuGraphLaunch(graph, rig.stream)  # only set, not enqueued
    rig.driver.cuStreamSynchronize(rig.stream)
    assert rig.backend.damage() == []
    bound.context.execute_async_v3(rig.stream)
    for _ in range(2):
        rig.driver.cuGraphLaunch(graph, rig.stream)
    assert set(download(rig, bound.y).view(np.uint8).reshape(-1).tolist()) == {0xCB}
    (damage,) = rig.backend.damage()
    assert "enqueued with other settings after the capture" in damage


@pytest.mark.parametrize("compute", [True, False])
def test_the_graph_of_a_destroyed_context(loose_rig, models, compute):
    rig = loose_rig(compute=compute)
    bound = Bound(rig, models)
    graph = capture(rig, lambda: bound.context.execute_async_v3(rig.stream))
    bound.context.destroy()
    rig.driver.cuGraphLaunch(graph, rig.stream)
    with pytest.raises(CudaError, match=r"activation memory: use after free"):
        rig.driver.cuStreamSynchronize(rig.stream)


def test_values_on_the_host_are_those_of_the_capture(rig, models):
    node = helper.make_node("Expand", ["x", "s"], ["y"])
    model = models.make([node], [("x", "FLOAT", [1, 4]), ("s", "INT64", [2])], [("y", "FLOAT", ["a", "b"])])
    context = rig.ready(model, {"s": ShapeRange((1, 4), (2, 4), (6, 4))})
    sizes = np.array([5, 4], np.int64)
    outputs = rig.bind(context, {"x": X[:1], "s": sizes})
    context.execute_async_v3(rig.stream)
    graph = capture(rig, lambda: context.execute_async_v3(rig.stream))
    sizes[0] = 2
    rig.driver.cuGraphLaunch(graph, rig.stream)
    np.testing.assert_array_equal(download(rig, outputs["y"][0], (5, 4)), np.repeat(X[:1], 5, 0))
    rig.driver.cuStreamBeginCapture(rig.stream, LOCAL)
    with pytest.raises(ExecutionError, match="host values changed"):
        context.execute_async_v3(rig.stream)
    with pytest.raises(CudaError):
        rig.driver.cuStreamEndCapture(rig.stream)


def test_outputs_sized_by_data_are_not_captured(rig, models):
    node = helper.make_node("NonZero", ["x"], ["y"])
    context = rig.ready(models.make([node], [("x", "FLOAT", [4])], [("y", "INT64", [1, "K"])]))
    context.set_tensor_address("x", rig.alloc(16))
    rig.driver.cuStreamBeginCapture(rig.stream, LOCAL)
    with pytest.raises(ExecutionError, match="size depends on data"):
        context.execute_async_v3(rig.stream)
    with pytest.raises(CudaError):
        rig.driver.cuStreamEndCapture(rig.stream)


def test_a_callable_lives_as_long_as_its_graph(rig):
    class Kernel:
        runs = 0

        def __call__(self):
            self.runs += 1

        def __del__(self):
            gone.set()

    gone = threading.Event()
    kernel = Kernel()
    rig.driver.cuStreamBeginCapture(rig.stream, LOCAL)
    rig.driver.launch(rig.stream, kernel, "kernel")
    graph = rig.driver.cuStreamEndCapture(rig.stream)
    made = rig.driver.cuGraphInstantiate(graph, 0)
    for _ in range(3):
        rig.driver.cuGraphLaunch(made, rig.stream)
    rig.driver.cuStreamSynchronize(rig.stream)
    assert kernel.runs == 3
    del kernel
    rig.driver.cuGraphDestroy(graph)
    assert not gone.is_set()
    rig.driver.cuGraphExecDestroy(made)
    assert gone.is_set()


def test_memory_from_the_caller(any_rig, models):
    rig = any_rig
    engine = rig.engine(rig.build(models.relu(), models.N4))
    needed = engine.device_memory_bytes(None)
    assert engine.user_managed_memory
    assert (engine.num_aux_streams, engine.captures_itself) == (0, False)
    before = rig.driver.cuMemGetInfo()[0]
    context = engine.create_context(own_memory=False)
    rig.stack.callback(context.destroy)
    assert rig.driver.cuMemGetInfo()[0] == before
    memory = rig.alloc(needed + 512)
    if needed:
        with pytest.raises(ExecutionError, match="call set_device_memory"):
            Bound(rig, models, context)
        with pytest.raises(InvalidArgumentError, match="engine needs"):
            context.set_device_memory(memory, needed - 1)
    with pytest.raises(InvalidArgumentError, match="not aligned"):
        context.set_device_memory(memory + 1, needed)
    context.set_device_memory(memory, needed)
    bound = Bound(rig, models, context)
    np.testing.assert_array_equal(download(rig, bound.y), rig.expected(X))
    with pytest.raises(InvalidArgumentError, match="memory of its own"):
        rig.context_of(engine).set_device_memory(memory, needed)
    context.set_aux_streams([rig.new_stream()])
    for streams in ([0], [rig.stream, rig.stream]):
        with pytest.raises(InvalidArgumentError, match="auxiliary streams"):
            context.set_aux_streams(streams)


@pytest.mark.parametrize("compute", [True, False])
def test_two_contexts_on_one_memory_must_not_run_at_once(loose_rig, models, compute):
    rig = loose_rig(compute=compute)
    nodes = [helper.make_node("Relu", ["x"], ["t"]), helper.make_node("Neg", ["t"], ["y"])]
    model = models.make(nodes, [("x", "FLOAT", ["N", 4])], [("y", "FLOAT", ["N", 4])])
    engine = rig.engine(rig.build(model, models.N4))
    needed = engine.device_memory_bytes(None)
    memory = rig.alloc(needed)
    graphs = []
    for _ in range(2):
        context = engine.create_context(own_memory=False)
        context.set_device_memory(memory, needed)
        bound = Bound(rig, models, context)
        graphs.append(capture(rig, lambda bound=bound: bound.context.execute_async_v3(rig.stream)))
    other, event = rig.new_stream(), rig.new_event(2)
    rig.driver.cuGraphLaunch(graphs[0], rig.stream)
    rig.driver.cuEventRecord(event, rig.stream)
    rig.driver.cuStreamWaitEvent(other, event, 0)
    rig.driver.cuGraphLaunch(graphs[1], other)
    rig.driver.cuStreamSynchronize(other)
    assert rig.backend.damage() == []
    rig.driver.cuGraphLaunch(graphs[0], rig.stream)
    rig.driver.cuGraphLaunch(graphs[1], other)
    (damage,) = rig.backend.damage()
    assert "on streams that nothing orders" in damage
    rig.driver.cuStreamSynchronize(rig.stream)
    rig.driver.cuStreamSynchronize(other)


def test_a_change_of_profile_is_not_captured(rig, models):
    bound = Bound(rig, models)
    rig.driver.cuStreamBeginCapture(rig.stream, LOCAL)
    with pytest.raises(EngineError, match="UNSUPPORTED"):
        bound.context.set_profile(0, rig.stream)
    with pytest.raises(CudaError):
        rig.driver.cuStreamEndCapture(rig.stream)


def test_a_runtime_cache_is_not_used(rig):
    runtime = rig.backend.create_runtime(
        rig.log, device=0, lean_library=None, allow_host_code=False, runtime_cache=b"kernels"
    )
    assert runtime.runtime_cache() is None
    assert any("runtime cache" in text for _, text in rig.lines)
    runtime.destroy()
