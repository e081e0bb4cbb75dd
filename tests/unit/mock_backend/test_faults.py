"""Planned faults: every kind, at every kind of call."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import mock_backend
from mock_backend import Fault, MockBackend, VirtualClock, _faults, device_lost, fail, out_of_memory, process_lost, slow
from trtx_py._errors import (
    BackendUnavailableError,
    BuilderError,
    CudaError,
    EngineError,
    ExecutionError,
    InvalidArgumentError,
    ParserError,
    ShapeError,
)
from trtx_py._types import Severity

X = np.ones((2, 4), np.float32)


def by_keyword(make: Callable[..., Fault]) -> Callable[[str], Fault]:
    return lambda call: make(call=call)


def test_nth_call_fails_and_only_that(rig):
    rig.backend.inject(fail("cuMemAlloc", nth=2))
    rig.alloc(16)
    with pytest.raises(CudaError, match="fault injected into call 2 of cuMemAlloc") as caught:
        rig.driver.cuMemAlloc(16)
    assert (caught.value.code, caught.value.name) == (304, "CUDA_ERROR_OPERATING_SYSTEM")
    rig.alloc(16)
    assert rig.backend.calls["cuMemAlloc"] == 3


def test_count_and_for_ever(rig):
    rig.backend.inject(fail("cuEventCreate", error=1, count=2))
    for _ in range(2):
        with pytest.raises(CudaError):
            rig.driver.cuEventCreate(0)
    rig.new_event()
    rig.backend.inject(fail("cuEventCreate", error=1, count=None))
    for _ in range(5):
        with pytest.raises(CudaError):
            rig.driver.cuEventCreate(0)
    rig.backend.clear_faults()
    rig.new_event()


def test_injected_faults_count_from_the_injection(rig):
    for _ in range(3):
        rig.alloc(16)
    rig.backend.inject(fail("cuMemAlloc", nth=1))
    with pytest.raises(CudaError):
        rig.driver.cuMemAlloc(16)


def test_out_of_memory(rig_with):
    rig = rig_with(faults=[out_of_memory(nth=2), out_of_memory("cuMemHostAlloc")])
    rig.alloc(16)
    with pytest.raises(CudaError) as device:
        rig.driver.cuMemAlloc(16)
    with pytest.raises(CudaError) as host:
        rig.driver.cuMemHostAlloc(16, 0)
    assert (device.value.code, host.value.code) == (2, 2)


def test_slow_calls_take_time_and_succeed(rig_with):
    clock = VirtualClock()
    rig = rig_with(clock=clock, faults=[slow("cuMemAlloc", seconds=2.0), slow(seconds=0.5)])
    rig.alloc(16)
    assert clock.now_ns() == 2 * 10**9
    context = rig.ready(relu_model(), {"x": limits()})
    before = clock.now_ns()
    rig.run(context, x=X)
    allocations = 2  # the input's and the output's
    assert clock.now_ns() - before == allocations * 2 * 10**9 + 10**9 // 2


def limits():
    from trtx_py._types import ShapeRange

    return ShapeRange((1, 4), (2, 4), (8, 4))


def relu_model():
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], name="only")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def test_device_lost_surfaces_at_the_next_call(loose_rig):
    rig = loose_rig(faults=[device_lost(nth=2)])
    context = rig.ready(relu_model(), {"x": limits()})
    np.testing.assert_array_equal(rig.run(context, x=X)["y"], X)
    context.execute_async_v3(rig.stream)  # the launch itself is fine
    with pytest.raises(CudaError, match="call 2 of execute") as caught:
        rig.driver.cuStreamSynchronize(rig.stream)
    assert caught.value.code == 719
    with pytest.raises(ExecutionError) as refused:
        context.execute_async_v3(rig.stream)
    assert isinstance(refused.value.__cause__, CudaError)
    assert refused.value.__cause__.code == 719


def test_device_lost_in_a_driver_call(loose_rig):
    rig = loose_rig()
    rig.backend.inject(device_lost(call="cuStreamSynchronize", error=46))
    with pytest.raises(CudaError) as first:
        rig.driver.cuStreamSynchronize(rig.stream)
    with pytest.raises(CudaError) as later:
        rig.driver.cuMemGetInfo()
    assert (first.value.code, later.value.code) == (46, 46)


def test_a_sticky_code_is_sticky_without_being_told(loose_rig):
    rig = loose_rig(faults=[fail("cuMemGetInfo", error=700)])
    for _ in range(2):
        with pytest.raises(CudaError) as caught:
            rig.driver.cuMemGetInfo()
        assert caught.value.code == 700


def test_failed_kernel_drops_what_follows_on_the_stream(loose_rig):
    rig = loose_rig(faults=[fail("execute")])
    context = rig.ready(relu_model(), {"x": limits()})
    outputs = rig.bind(context, {"x": X})
    ran = []
    with rig.blocked(rig.stream):
        context.execute_async_v3(rig.stream)
        rig.driver.launch(rig.stream, lambda: ran.append(1), "after")
    with pytest.raises(CudaError):
        rig.driver.cuStreamSynchronize(rig.stream)
    assert ran == []
    assert set(outputs["y"][1].tolist()) == {0}


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("create_builder", BackendUnavailableError),
        ("create_network", BuilderError),
        ("parse_onnx", ParserError),
        ("build_serialized_network", BuilderError),
        ("create_runtime", EngineError),
        ("deserialize", EngineError),
        ("create_context", EngineError),
        ("device_memory_bytes", EngineError),
        ("set_profile", EngineError),
        ("set_input_shape", ShapeError),
        ("set_tensor_address", InvalidArgumentError),
        ("set_output_allocator", EngineError),
        ("get_tensor_shape", EngineError),
        ("execute_async_v3", ExecutionError),
    ],
)
def test_every_tensorrt_call_can_fail(rig_with, call, error):
    rig = rig_with(faults=[fail(call)])

    def everything():
        context = rig.ready(relu_model(), {"x": limits()})
        context.parent.device_memory_bytes(0)
        context.set_profile(0, rig.stream)
        rig.driver.cuStreamSynchronize(rig.stream)
        context.set_output_allocator("y", None)
        return rig.run(context, x=X)

    with pytest.raises(error, match=f"fault injected into call 1 of {call}") as caught:
        everything()
    assert caught.value.tensorrt_log
    assert any(severity is Severity.ERROR and call in text for severity, text in rig.lines)
    np.testing.assert_array_equal(everything()["y"], X)  # the second time it works


@pytest.mark.parametrize(
    "call",
    [
        "cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceTotalMem",
        "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent", "cuCtxGetCurrent", "cuMemGetInfo",
        "cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate", "cuEventCreate", "cuStreamSynchronize", "cuStreamQuery",
    ],
)  # fmt: skip
def test_every_driver_call_passes_the_fault_point(call):
    backend = MockBackend(faults=[fail(call, error=999)])
    driver = backend.driver

    def everything():
        driver.cuInit(0)
        driver.cuDriverGetVersion(), driver.cuDeviceGetCount()
        device = driver.cuDeviceGet(0)
        driver.cuDeviceGetName(device), driver.cuDeviceTotalMem(device), driver.cuDeviceGetAttribute(75, device)
        driver.cuCtxPushCurrent(driver.cuDevicePrimaryCtxRetain(device))
        driver.cuCtxGetCurrent(), driver.cuMemGetInfo(), driver.cuMemAlloc(1), driver.cuMemHostAlloc(1, 0)
        stream = driver.cuStreamCreate(0)
        driver.cuEventCreate(0)
        driver.cuStreamSynchronize(stream)
        driver.cuStreamQuery(stream)

    with pytest.raises(CudaError) as caught:
        everything()
    assert (caught.value.call, caught.value.code) == (call, 999)


@pytest.mark.parametrize("make", [Fault, fail, slow, out_of_memory, *map(by_keyword, (device_lost, process_lost))])
def test_calls_that_there_are_none_of_are_refused(make):
    with pytest.raises(ValueError, match=r"'cuGraphLaunhc': no call of the seam .* did you mean 'cuGraphLaunch'"):
        make("cuGraphLaunhc")
    with pytest.raises(ValueError, match=r"there are add_input, .*, build_serialized_network, .*, execute, "):
        make("?")
    with pytest.raises(ValueError, match="no call of the seam"):
        make("trtx_mock_launch")
    for call in (0.2, None, b"cuMemAlloc", ["cuMemAlloc"]):
        with pytest.raises(TypeError, match="expected the name of a call"):
            make(call)


def test_every_call_of_the_seam_can_be_struck():
    sources = Path(mock_backend.__file__).parent.glob("*.py")
    entered = {
        name for source in sources for name in re.findall(r'(?:seam\.enter|_building)\("(\w+)"', source.read_text())
    }
    assert entered == _faults._TENSORRT
    for call in entered | _faults._NATIVE:
        fail(call)


def test_faults_are_checked():
    for bad in ({"nth": 0}, {"count": 0}, {"delay_s": -1.0}):
        with pytest.raises(ValueError):
            Fault("cuMemAlloc", **bad)
