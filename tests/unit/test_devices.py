"""device_count, device_properties, and the mock's several devices."""

from __future__ import annotations

import pytest

import trtx_py as trtx
from mock_backend import MockBackend, device_lost, fail, process_lost, slow
from mock_backend.joined import JoinedBackend
from tests.unit.serving import GateClock, affine_plan, rows
from trtx_py.backends import cuda_driver
from trtx_py.backends._named_mocks import named_mock
from trtx_py.cuda import _properties


def test_counts_the_mocks_devices() -> None:
    assert trtx.device_count("mock") == 1
    assert trtx.device_count(MockBackend(devices=4)) == 4
    assert trtx.device_count(MockBackend(devices=0)) == 0
    named = named_mock("mock:devices=3")
    assert named is not None
    assert trtx.device_count(named) == 3


def test_goes_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTX_BACKEND", "mock")
    assert trtx.device_count() == 1
    assert trtx.device_properties(0).name == "Mock GPU 0"


def test_without_a_driver_there_are_none_and_properties_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> object:
        raise trtx.BackendUnavailableError("the CUDA driver library cannot be used; install an NVIDIA driver")

    monkeypatch.delenv("TRTX_BACKEND", raising=False)
    monkeypatch.setattr(cuda_driver, "shared_driver", missing)
    assert trtx.device_count() == 0
    assert trtx.device_count("tensorrt") == 0
    with pytest.raises(trtx.BackendUnavailableError, match="install an NVIDIA driver"):
        trtx.device_properties(0)


def test_another_failure_of_the_driver_is_no_count() -> None:
    backend = MockBackend(faults=[fail("cuDeviceGetCount", error=999)])
    with pytest.raises(trtx.CudaError, match="999"):
        trtx.device_count(backend)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="no backend 'mick'"):
        trtx.device_count("mick")


def test_describes_each_device() -> None:
    backend = MockBackend(devices=3, memory_bytes=1 << 20, compute_capability="9.0")
    found = [trtx.device_properties(device, backend) for device in range(3)]
    assert [each.ordinal for each in found] == [0, 1, 2]
    assert {(each.compute_capability, each.total_bytes, each.numa_node) for each in found} == {("9.0", 1 << 20, None)}
    assert [each.pci_bus_id for each in found] == [f"00000000:0{n}:00.0" for n in (1, 2, 3)]
    assert found[2].uuid == "GPU-4d6f636b-0000-0000-0000-000000000002"
    assert backend.driver.mock.usage()["retained_contexts"] == 0
    with pytest.raises(AttributeError):
        found[0].name = "x"  # type: ignore[misc]


@pytest.mark.parametrize("device", [3, -1, "0", True])
def test_refuses_a_device_that_is_not_there(device: object) -> None:
    with pytest.raises(trtx.InvalidArgumentError):
        trtx.device_properties(device, MockBackend(devices=3))  # type: ignore[arg-type]


def test_the_numa_node_of_a_driver_that_does_not_know_comes_from_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def kernel(pci: str) -> int:
        asked.append(pci)
        return 1

    backend = MockBackend()
    answer = backend.driver.cuDeviceGetAttribute

    def without(attribute: int, device: int) -> int:
        if attribute == 134:
            raise trtx.CudaError(1, "CUDA_ERROR_INVALID_VALUE", "cuDeviceGetAttribute")
        return answer(attribute, device)

    monkeypatch.setattr(backend.driver, "cuDeviceGetAttribute", without)
    monkeypatch.setattr(_properties, "_numa_node_of_kernel", kernel)
    assert trtx.device_properties(0, backend).numa_node == 1
    assert asked == ["00000000:01:00.0"]


def test_the_kernel_may_not_say_either() -> None:
    assert _properties._numa_node_of_kernel("00000000:ff:1f.7") == -1


def test_joined_backends_have_the_mocks_devices() -> None:
    mock = MockBackend(devices=2)
    assert trtx.device_count(JoinedBackend(MockBackend(), mock)) == 2


# ---- faults by device ----


def test_a_fault_strikes_its_device_alone() -> None:
    backend = MockBackend(devices=2, faults=[fail("cuMemAlloc", nth=2, device=1)])
    with trtx.Device(0, backend=backend) as first, trtx.Device(1, backend=backend) as second:
        buffers = [first.allocate(64) for _ in range(3)] + [second.allocate(64)]
        with pytest.raises(trtx.CudaError, match="fault injected"):
            second.allocate(64)
        buffers += [first.allocate(64), second.allocate(64)]
        for buffer in buffers:
            buffer.close()
    backend.assert_clean()


def test_calls_that_name_a_device_are_on_it() -> None:
    backend = MockBackend(devices=2, faults=[fail("cuDevicePrimaryCtxRetain", device=1, count=None)])
    trtx.Device(0, backend=backend).close()
    with pytest.raises(trtx.CudaError, match="cuDevicePrimaryCtxRetain"):
        trtx.Device(1, backend=backend)


def test_seam_calls_have_faults_by_device_too() -> None:
    backend = MockBackend(devices=2, faults=[fail("deserialize", nth=2, device=1)])
    for device, fails in ((0, False), (1, False), (0, False), (1, True), (1, False)):
        with trtx.Runtime(None, backend, device=device) as runtime:
            if fails:
                with pytest.raises(trtx.EngineError, match="fault injected"):
                    runtime.deserialize_sync(affine_plan())
            else:
                runtime.deserialize_sync(affine_plan()).close()
    backend.assert_clean()


def test_a_lost_device_leaves_the_others_and_takes_its_memory() -> None:
    backend = MockBackend(devices=2, faults=[device_lost(device=1)])
    with (
        trtx.Runtime(None, backend, device=0) as well,
        trtx.Runtime(None, backend, device=1) as lost,
        well.deserialize_sync(affine_plan()) as good,
        lost.deserialize_sync(affine_plan()) as bad,
    ):
        with pytest.raises(trtx.CudaError, match="719"):
            bad.infer_sync({"x": rows(1)})
        good.infer_sync({"x": rows(1)})
        with pytest.raises(trtx.DeviceLostError, match="is dead") as caught:
            bad.infer_sync({"x": rows(1)})
        assert not caught.value.launched
    backend.assert_clean()


def test_a_delay_is_its_devices_alone() -> None:
    clock = GateClock()
    backend = MockBackend(devices=2, clock=clock, faults=[slow("cuMemAlloc", 1.0, device=1)])
    with trtx.Device(0, backend=backend) as device, device.allocate(64):
        assert not clock.reached.acquire(blocking=False)


@pytest.mark.parametrize("device", [2, 8])
def test_a_fault_on_a_device_that_is_not_there_is_refused(device: int) -> None:
    with pytest.raises(ValueError, match="no fault can be planned"):
        MockBackend(devices=2).inject(fail("cuMemAlloc", device=device))


def test_a_lost_process_has_no_device_left() -> None:
    backend = MockBackend(devices=2, faults=[process_lost(device=1)])
    with (
        trtx.Runtime(None, backend, device=0) as well,
        trtx.Runtime(None, backend, device=1) as lost,
        well.deserialize_sync(affine_plan()) as good,
        lost.deserialize_sync(affine_plan()) as bad,
    ):
        good.infer_sync({"x": rows(1)})
        with pytest.raises(trtx.CudaError, match="700"):
            bad.infer_sync({"x": rows(1)})
        with pytest.raises(trtx.CudaError, match="700") as caught:
            good.infer_sync({"x": rows(1)})
        assert not caught.value.launched
    for device in range(2):  # released by all, and still
        with pytest.raises(trtx.CudaError, match="start a new process"):
            trtx.Device(device, backend=backend)
    backend.assert_clean()


def test_only_the_driver_can_lose_a_process() -> None:
    with pytest.raises(ValueError, match="lose_process"):
        process_lost(call="deserialize")


# ---- launched or not ----


def test_an_error_before_the_launch_says_so() -> None:
    for fault, launched in (
        (fail("cuMemcpyHtoDAsync"), False),
        (fail("execute_async_v3"), True),
        (fail("execute"), True),
        (fail("cuMemcpyDtoHAsync"), True),
    ):
        backend = MockBackend(faults=[fault])
        with trtx.Runtime(None, backend) as runtime, runtime.deserialize_sync(affine_plan()) as engine:
            with pytest.raises(trtx.ExecutionError) as caught:
                engine.infer_sync({"x": rows(1)})
            assert caught.value.launched is launched, fault
