"""Execution contexts: what they refuse, and the order of things on streams."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from trtx_py._errors import CudaError, EngineError, ExecutionError, InvalidArgumentError, ShapeError
from trtx_py._types import ShapeRange

X = np.array([[-1, 2, -3, 4]] * 2, np.float32)


@pytest.fixture
def context(rig, models):
    return rig.ready(models.relu(), models.N4)


def test_numbers(rig, context):
    np.testing.assert_array_equal(rig.run(context, x=X)["y"], np.maximum(X, 0))


def test_without_computing_outputs_are_zero(rig_with, models):
    rig = rig_with(compute=False)
    y = rig.run(rig.ready(models.relu(), models.N4), x=X)["y"]
    assert y.shape == (2, 4)
    assert not y.any()


def test_shape_outside_the_profile_is_refused_by_execute_alone(rig, context):
    outputs = rig.bind(context, {"x": X})
    context.set_input_shape("x", (9, 4))
    with pytest.raises(ExecutionError, match=r"\(9, 4\).*outside optimization profile 0.*\[1, 4\]\.\.\[8, 4\]"):
        context.execute_async_v3(rig.stream)
    assert outputs


def test_shapes_that_cannot_be(rig, context):
    with pytest.raises(ShapeError, match="2 dimensions"):
        context.set_input_shape("x", (4,))
    with pytest.raises(ShapeError, match="static dimension"):
        context.set_input_shape("x", (2, 5))
    with pytest.raises(InvalidArgumentError, match="inputs are 'x'"):
        context.set_input_shape("y", (2, 4))
    with pytest.raises(InvalidArgumentError, match="no tensor 'z'"):
        context.set_tensor_address("z", 0)


def test_shapes_before_and_after(rig, context):
    assert context.get_tensor_shape("x") == (-1, 4)
    assert context.get_tensor_shape("y") == (-1, 4)
    context.set_input_shape("x", (3, 4))
    assert context.get_tensor_shape("y") == (3, 4)


def test_what_is_not_set(rig, context):
    with pytest.raises(ExecutionError, match="shape of input 'x'"):
        context.execute_async_v3(rig.stream)
    context.set_input_shape("x", (2, 4))
    with pytest.raises(ExecutionError, match="no address is set for tensor 'x'"):
        context.execute_async_v3(rig.stream)
    context.set_tensor_address("x", rig.alloc(32))
    with pytest.raises(ExecutionError, match="no address is set for tensor 'y'"):
        context.execute_async_v3(rig.stream)
    context.set_tensor_address("y", rig.alloc(64) + 16)
    with pytest.raises(ExecutionError, match="not aligned"):
        context.execute_async_v3(rig.stream)
    assert rig.backend.calls["execute"] == 0


@pytest.mark.parametrize("name", ["x", "y"])
def test_too_small_a_buffer_is_an_illegal_access(loose_rig, models, name):
    rig = loose_rig()
    context = rig.ready(models.relu(), models.N4)
    rig.bind(context, {"x": X})
    context.set_tensor_address(name, rig.driver.cuMemAlloc(31))
    context.execute_async_v3(rig.stream)
    with pytest.raises(CudaError, match="1 bytes beyond device block") as caught:
        rig.driver.cuStreamSynchronize(rig.stream)
    assert caught.value.code == 700
    with pytest.raises(CudaError):
        rig.driver.cuMemAlloc(16)


def test_everything_is_a_snapshot(rig, context):
    outputs = rig.bind(context, {"x": X})
    with rig.blocked(rig.stream):
        context.execute_async_v3(rig.stream)
        context.set_tensor_address("x", rig.alloc(256))
        context.set_tensor_address("y", rig.alloc(256))
        context.set_input_shape("x", (1, 4))
    pointer, raw = outputs["y"]
    rig.driver.cuMemcpyDtoHAsync(raw.ctypes.data, pointer, raw.nbytes, rig.stream)
    np.testing.assert_array_equal(raw.view(np.float32).reshape(2, 4), np.maximum(X, 0))


def test_one_context_on_two_streams(rig, context):
    rig.bind(context, {"x": X})
    other = rig.new_stream()
    with rig.blocked(rig.stream):
        context.execute_async_v3(rig.stream)
        with pytest.raises(ExecutionError, match="one context per stream"):
            context.execute_async_v3(other)
        context.execute_async_v3(rig.stream)  # the same stream is in order
        event = rig.new_event(2)
        rig.driver.cuEventRecord(event, rig.stream)
        rig.driver.cuStreamWaitEvent(other, event, 0)
        context.execute_async_v3(other)  # and so is one that waits
    rig.driver.cuStreamSynchronize(other)
    assert rig.backend.calls["execute"] == 3


def test_shared_profile(rig, models):
    engine = rig.engine(rig.build(models.relu(), models.N4))
    contexts = [rig.context_of(engine) for _ in range(3)]
    assert [c.active_profile for c in contexts] == [0, 0, 0]
    for context in contexts:
        np.testing.assert_array_equal(rig.run(context, x=X)["y"], np.maximum(X, 0))


def test_profile_that_is_not_shared(rig, models):
    other = {"x": ShapeRange((1, 4), (1, 4), (2, 4))}
    engine = rig.engine(rig.build(models.relu(), models.N4, other, profile_sharing=False))
    first, second = engine.create_context(), rig.context_of(engine)
    assert (first.active_profile, second.active_profile) == (0, -1)
    with pytest.raises(ExecutionError, match="has no optimization profile"):
        second.execute_async_v3(rig.stream)
    with pytest.raises(EngineError, match="in use by another context"):
        second.set_profile(0, rig.stream)
    second.set_profile(1, rig.stream)
    rig.driver.cuStreamSynchronize(rig.stream)
    np.testing.assert_array_equal(rig.run(second, x=X)["y"], np.maximum(X, 0))
    first.destroy()
    second.set_profile(0, rig.stream)
    assert second.active_profile == 0


def test_backend_can_turn_sharing_off(rig_with, models):
    engine_rig = rig_with(profile_sharing=False)
    engine = engine_rig.engine(engine_rig.build(models.relu(), models.N4))
    assert [engine_rig.context_of(engine).active_profile for _ in range(2)] == [0, -1]


def test_change_of_profile_must_be_synchronized(rig, models):
    context = rig.ready(models.relu(), models.N4, {"x": ShapeRange((9, 4), (9, 4), (99, 4))})
    context.set_input_shape("x", (2, 4))
    context.set_profile(1, rig.stream)
    assert context.get_tensor_shape("x") == (-1, 4)
    with pytest.raises(EngineError, match="synchronize its stream"):
        context.set_input_shape("x", (9, 4))
    rig.driver.cuStreamSynchronize(rig.stream)
    context.set_input_shape("x", (9, 4))
    with pytest.raises(EngineError, match="no optimization profile 2"):
        context.set_profile(2, rig.stream)


def test_shape_tensor_is_read_on_the_host(rig, models):
    node = helper.make_node("Expand", ["x", "s"], ["y"])
    model = models.make([node], [("x", "FLOAT", [1, 4]), ("s", "INT64", [2])], [("y", "FLOAT", ["a", "b"])])
    context = rig.ready(model, {"s": ShapeRange((1, 4), (2, 4), (6, 4))})
    assert context.get_tensor_shape("y")[0] == -1  # the values are not known yet
    sizes = np.array([5, 4], np.int64)
    outputs = rig.bind(context, {"x": X[:1], "s": sizes})
    assert context.get_tensor_shape("y") == (5, 4)
    with rig.blocked(rig.stream):
        context.execute_async_v3(rig.stream)
        sizes[0] = 1  # read when it was enqueued
    pointer, raw = outputs["y"]
    rig.driver.cuMemcpyDtoHAsync(raw.ctypes.data, pointer, raw.nbytes, rig.stream)
    np.testing.assert_array_equal(raw.view(np.float32).reshape(5, 4), np.repeat(X[:1], 5, 0))
    sizes[0] = 7
    with pytest.raises(ExecutionError, match=r"values \(7, 4\).*outside profile 0"):
        context.execute_async_v3(rig.stream)
    context.set_tensor_address("s", rig.alloc(16))
    with pytest.raises(ExecutionError, match="device address"):
        context.execute_async_v3(rig.stream)


class Allocator:
    def __init__(self, rig, refuse=False):
        self.rig, self.refuse, self.asked, self.shape, self.address = rig, refuse, [], None, 0

    def reallocate(self, name, current, nbytes, alignment):
        self.asked.append((name, nbytes))
        self.address = 0 if self.refuse else self.rig.alloc(nbytes)
        return self.address

    def notify_shape(self, name, shape):
        self.shape = shape


def nonzero(models):
    node = helper.make_node("NonZero", ["x"], ["y"])
    return models.make([node], [("x", "FLOAT", ["N"])], [("y", "INT64", [1, "M"])])


def test_size_that_depends_on_data(rig, models):
    context = rig.ready(nonzero(models), {"x": ShapeRange((1,), (4,), (8,))})
    values = np.array([0, 1, 0, 2, 3], np.float32)
    source = rig.alloc(20)
    rig.driver.cuMemcpyHtoDAsync(source, values.ctypes.data, 20, rig.stream)
    context.set_input_shape("x", (5,))
    context.set_tensor_address("x", source)
    assert context.get_tensor_shape("y") == (1, -1)
    with pytest.raises(ExecutionError, match="set an output allocator"):
        context.execute_async_v3(rig.stream)
    allocator = Allocator(rig)
    context.set_output_allocator("y", allocator)
    context.execute_async_v3(rig.stream)
    assert allocator.shape == (1, 3)
    assert allocator.asked == [("y", 24)]
    found = np.zeros(3, np.int64)
    rig.driver.cuMemcpyDtoHAsync(found.ctypes.data, allocator.address, 24, rig.stream)
    assert found.tolist() == [1, 3, 4]
    context.set_output_allocator("y", Allocator(rig, refuse=True))
    with pytest.raises(ExecutionError, match="had no 24 bytes"):
        context.execute_async_v3(rig.stream)


def test_allocator_of_a_known_size(rig, context):
    allocator = Allocator(rig)
    rig.bind(context, {"x": X})
    context.set_output_allocator("y", allocator)
    context.execute_async_v3(rig.stream)
    assert (allocator.shape, allocator.asked) == ((2, 4), [("y", 32)])
    with pytest.raises(InvalidArgumentError, match="is an input"):
        context.set_output_allocator("x", allocator)


def test_dimensions_of_one_name_are_equal(rig, models):
    node = helper.make_node("Add", ["x", "w"], ["y"])
    model = models.make([node], [("x", "FLOAT", ["N"]), ("w", "FLOAT", ["N"])], [("y", "FLOAT", ["N"])])
    limits = ShapeRange((1,), (2,), (8,))
    context = rig.ready(model, {"x": limits, "w": limits})
    memory = rig.alloc(256)
    for name, size in (("x", 1), ("w", 4)):
        context.set_input_shape(name, (size,))
        context.set_tensor_address(name, memory)
    context.set_tensor_address("y", memory)
    with pytest.raises(ExecutionError, match="dimensions with name N must be equal: x has 1, w has 4"):
        context.execute_async_v3(rig.stream)


def test_shapes_that_contradict_each_other(rig, models):
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    model = models.make([node], [("a", "FLOAT", [2, "K"]), ("b", "FLOAT", ["L", 2])], [("y", "FLOAT", [2, 2])])
    limits = {"a": ShapeRange((2, 1), (2, 2), (2, 8)), "b": ShapeRange((1, 2), (2, 2), (8, 2))}
    context = rig.ready(model, limits)
    context.set_input_shape("a", (2, 3))
    context.set_input_shape("b", (4, 2))
    with pytest.raises(ShapeError, match="do not fit together"):
        context.get_tensor_shape("y")


def test_activation_memory_is_taken_and_given_back(rig, models):
    nodes = [helper.make_node("Relu", ["x"], ["t"]), helper.make_node("Neg", ["t"], ["y"])]
    model = models.make(nodes, [("x", "FLOAT", ["N", 1024])], [("y", "FLOAT", ["N", 1024])])
    profiles = [{"x": ShapeRange((1, 1024), (1, 1024), (n, 1024))} for n in (4, 64)]
    engine = rig.engine(rig.build(model, *profiles))
    assert engine.device_memory_bytes(0) == 4 * 4096
    assert engine.device_memory_bytes(1) == engine.device_memory_bytes(None) == 64 * 4096
    with pytest.raises(EngineError, match="profiles 0 to 1"):
        engine.device_memory_bytes(2)
    before = rig.driver.cuMemGetInfo()[0]
    context = engine.create_context()
    assert before - rig.driver.cuMemGetInfo()[0] == 64 * 4096
    context.destroy()
    assert rig.driver.cuMemGetInfo()[0] == before


def test_no_memory_for_a_context(rig_with, models):
    rig = rig_with(memory_bytes=1 << 16)
    nodes = [helper.make_node("Relu", ["x"], ["t"]), helper.make_node("Neg", ["t"], ["y"])]
    engine = rig.engine(rig.build(models.make(nodes, [("x", "FLOAT", [100_000])], [("y", "FLOAT", [100_000])])))
    with pytest.raises(EngineError, match="activation memory") as caught:
        engine.create_context()
    assert isinstance(caught.value.__cause__, CudaError)


def test_context_destroyed_under_work(loose_rig, models):
    rig = loose_rig()
    context = rig.ready(models.relu(), models.N4)
    rig.bind(context, {"x": X})
    with rig.blocked(rig.stream):
        context.execute_async_v3(rig.stream)
        context.destroy()
    with pytest.raises(CudaError, match="activation memory"):
        rig.driver.cuStreamSynchronize(rig.stream)


def test_wrong_orders_of_destruction_are_damage(loose_rig, models):
    rig = loose_rig()
    context = rig.ready(models.relu(), models.N4)
    engine = context.parent
    engine.destroy()
    with pytest.raises(ExecutionError, match=r"engine 'test_graph'.*was destroyed"):
        context.execute_async_v3(rig.stream)
    with pytest.raises(EngineError, match="destroyed twice"):
        engine.destroy()
    found = "\n".join(rig.backend.damage())
    assert "was destroyed before execution context" in found
    assert "was destroyed twice" in found


def test_open_objects_are_leaks(loose_rig, models):
    rig = loose_rig()
    rig.ready(models.relu(), models.N4)
    leaks = "\n".join(rig.backend.leaks())
    assert all(kind in leaks for kind in ("builder", "network", "runtime", "engine", "execution context", "stream"))


def test_wrong_device_is_refused(rig_with, models):
    rig = rig_with(devices=2)
    context = rig.ready(models.relu(), models.N4)
    rig.bind(context, {"x": X})
    rig.driver.cuCtxPushCurrent(rig.driver.cuDevicePrimaryCtxRetain(1))
    with pytest.raises(ExecutionError, match=r"device 1 is current, but .* is on device 0"):
        context.execute_async_v3(rig.stream)
    rig.driver.cuCtxPopCurrent()
    rig.driver.cuDevicePrimaryCtxRelease(1)
