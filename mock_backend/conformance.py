"""A conformance suite for backends: the same test body for the mock, for a GPU and for your own implementation.

Subclass in a test module and say how a backend is made::

    class TestMine(DriverConformance):
        def make_backend(self) -> TensorRTBackend:
            return MyBackend()

DriverConformance needs ``backend.driver`` and a device; RuntimeConformance also a builder and a runtime for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from trtx_py._errors import BuilderError, CudaError, EngineError, ExecutionError, ParserError, TrtxError
from trtx_py._types import BuildOptions, ProfileSpec, Severity, ShapeRange, TensorMode
from trtx_py.backends.protocols import (
    CUDA_ERROR_INVALID_VALUE,
    CUDA_ERROR_NOT_READY,
    CUDA_ERROR_OUT_OF_MEMORY,
    CUDA_SUCCESS,
    BackendContext,
    BackendEngine,
    CudaDriver,
    TensorRTBackend,
)

__all__ = ["DriverConformance", "RuntimeConformance"]

_INVALID_HANDLE = 400
_INVALID_CONTEXT = 201
_NON_BLOCKING = 1


class _Suite:
    """What both suites share: a backend and a current context."""

    #: Ordinal of the device to use.
    device = 0

    def make_backend(self) -> TensorRTBackend:
        """A backend to test; called once for each test. Override it."""
        raise NotImplementedError("a conformance suite needs make_backend()")

    @pytest.fixture
    def backend(self) -> TensorRTBackend:
        return self.make_backend()

    @pytest.fixture
    def driver(self, backend: TensorRTBackend) -> Iterator[CudaDriver]:
        """The backend's driver with the device's primary context current."""
        driver = backend.driver
        driver.cuInit(0)
        context = driver.cuDevicePrimaryCtxRetain(self.device)
        driver.cuCtxPushCurrent(context)
        yield driver
        driver.cuCtxPopCurrent()
        driver.cuDevicePrimaryCtxRelease(self.device)

    @pytest.fixture
    def stream(self, driver: CudaDriver) -> Iterator[int]:
        """A non-blocking stream."""
        handle = driver.cuStreamCreate(_NON_BLOCKING)
        yield handle
        driver.cuStreamSynchronize(handle)
        driver.cuStreamDestroy(handle)


@contextlib.contextmanager
def _device_memory(driver: CudaDriver, nbytes: int) -> Iterator[int]:
    pointer = driver.cuMemAlloc(nbytes)
    try:
        yield pointer
    finally:
        driver.cuMemFree(pointer)


def _ramp(nbytes: int) -> npt.NDArray[np.uint8]:
    return (np.arange(nbytes) % 251).astype(np.uint8)


class DriverConformance(_Suite):
    """Rules of the CUDA driver seam."""

    #: False where a destroyed handle is undefined behaviour, as it is on a real driver.
    checks_destroyed_handles = True

    def test_device_is_described(self, driver: CudaDriver) -> None:
        assert driver.cuDeviceGetCount() > self.device
        device = driver.cuDeviceGet(self.device)
        assert driver.cuDeviceGetName(device)
        assert driver.cuDeviceTotalMem(device) > 0
        assert driver.cuDeviceGetAttribute(75, device) >= 1
        assert driver.cuDriverGetVersion() >= 11000

    def test_memory_info_counts_an_allocation(self, driver: CudaDriver) -> None:
        before, total = driver.cuMemGetInfo()
        with _device_memory(driver, 64 << 20):
            during, same_total = driver.cuMemGetInfo()
        assert during <= before
        assert total == same_total

    @pytest.mark.parametrize("nbytes", [1, 255, 4096, 1 << 20])
    def test_round_trip(self, driver: CudaDriver, stream: int, nbytes: int) -> None:
        sent = _ramp(nbytes)
        received = np.zeros_like(sent)
        with _device_memory(driver, nbytes) as first, _device_memory(driver, nbytes) as second:
            assert first % 256 == 0
            driver.cuMemcpyHtoDAsync(first, sent.ctypes.data, nbytes, stream)
            driver.cuMemcpyDtoDAsync(second, first, nbytes, stream)
            driver.cuMemcpyDtoHAsync(received.ctypes.data, second, nbytes, stream)
            driver.cuStreamSynchronize(stream)
        np.testing.assert_array_equal(received, sent)

    def test_pinned_round_trip(self, driver: CudaDriver, stream: int) -> None:
        import ctypes

        host = driver.cuMemHostAlloc(512, 0)
        try:
            ctypes.memset(host, 0x5A, 256)
            ctypes.memset(host + 256, 0, 256)
            with _device_memory(driver, 256) as pointer:
                driver.cuMemcpyHtoDAsync(pointer, host, 256, stream)
                driver.cuMemcpyDtoHAsync(host + 256, pointer, 256, stream)
                driver.cuStreamSynchronize(stream)
            assert ctypes.string_at(host + 256, 256) == b"\x5a" * 256
        finally:
            driver.cuMemFreeHost(host)

    def test_memset(self, driver: CudaDriver, stream: int) -> None:
        received = np.zeros(100, np.uint8)
        with _device_memory(driver, 100) as pointer:
            driver.cuMemsetD8Async(pointer, 7, 100, stream)
            driver.cuMemsetD8Async(pointer + 10, 9, 5, stream)
            driver.cuMemcpyDtoHAsync(received.ctypes.data, pointer, 100, stream)
            driver.cuStreamSynchronize(stream)
        assert received.tolist() == [7] * 10 + [9] * 5 + [7] * 85

    def test_stream_keeps_order(self, driver: CudaDriver, stream: int) -> None:
        received = np.zeros(1 << 16, np.uint8)
        with _device_memory(driver, received.nbytes) as pointer:
            for value in range(50):
                driver.cuMemsetD8Async(pointer, value, received.nbytes, stream)
            driver.cuMemcpyDtoHAsync(received.ctypes.data, pointer, received.nbytes, stream)
            driver.cuStreamSynchronize(stream)
        assert set(received.tolist()) == {49}

    def test_event_orders_two_streams(self, driver: CudaDriver, stream: int) -> None:
        other = driver.cuStreamCreate(_NON_BLOCKING)
        event = driver.cuEventCreate(2)
        received = np.zeros(1 << 20, np.uint8)
        with _device_memory(driver, received.nbytes) as pointer:
            for value in range(1, 11):
                driver.cuMemsetD8Async(pointer, value, received.nbytes, stream)
            driver.cuEventRecord(event, stream)
            driver.cuStreamWaitEvent(other, event, 0)
            driver.cuMemcpyDtoHAsync(received.ctypes.data, pointer, received.nbytes, other)
            driver.cuStreamSynchronize(other)
            assert set(received.tolist()) == {10}
            assert driver.cuEventQuery(event) == CUDA_SUCCESS
        driver.cuEventDestroy(event)
        driver.cuStreamDestroy(other)

    def test_queries_agree_with_synchronize(self, driver: CudaDriver, stream: int) -> None:
        event = driver.cuEventCreate(0)
        assert driver.cuEventQuery(event) == CUDA_SUCCESS  # an event that was never recorded is complete
        with _device_memory(driver, 1 << 20) as pointer:
            driver.cuMemsetD8Async(pointer, 1, 1 << 20, stream)
            driver.cuEventRecord(event, stream)
            assert driver.cuStreamQuery(stream) in (CUDA_SUCCESS, CUDA_ERROR_NOT_READY)
            driver.cuEventSynchronize(event)
            assert driver.cuEventQuery(event) == CUDA_SUCCESS
            driver.cuStreamSynchronize(stream)
            assert driver.cuStreamQuery(stream) == CUDA_SUCCESS
        driver.cuEventDestroy(event)

    def test_elapsed_time(self, driver: CudaDriver, stream: int) -> None:
        start, end, silent = driver.cuEventCreate(0), driver.cuEventCreate(0), driver.cuEventCreate(2)
        with pytest.raises(CudaError) as unrecorded:
            driver.cuEventElapsedTime(start, end)
        assert unrecorded.value.code == _INVALID_HANDLE
        driver.cuEventRecord(start, stream)
        with _device_memory(driver, 1 << 20) as pointer:
            driver.cuMemsetD8Async(pointer, 1, 1 << 20, stream)
            driver.cuEventRecord(end, stream)
            driver.cuEventRecord(silent, stream)
            driver.cuStreamSynchronize(stream)
        assert driver.cuEventElapsedTime(start, end) >= 0
        with pytest.raises(CudaError) as untimed:
            driver.cuEventElapsedTime(start, silent)
        assert untimed.value.code == _INVALID_HANDLE
        for event in (start, end, silent):
            driver.cuEventDestroy(event)

    def test_null_stream_works(self, driver: CudaDriver) -> None:
        received = np.zeros(16, np.uint8)
        with _device_memory(driver, 16) as pointer:
            driver.cuMemsetD8Async(pointer, 3, 16, 0)
            driver.cuMemcpyDtoHAsync(received.ctypes.data, pointer, 16, 0)
            driver.cuStreamSynchronize(0)
        assert received.tolist() == [3] * 16

    def test_double_free_is_refused(self, driver: CudaDriver) -> None:
        pointer = driver.cuMemAlloc(64)
        driver.cuMemFree(pointer)
        with pytest.raises(CudaError) as caught:
            driver.cuMemFree(pointer)
        assert caught.value.code == CUDA_ERROR_INVALID_VALUE
        assert caught.value.call == "cuMemFree"

    def test_zero_bytes_are_refused(self, driver: CudaDriver) -> None:
        with pytest.raises(CudaError) as caught:
            driver.cuMemAlloc(0)
        assert caught.value.code == CUDA_ERROR_INVALID_VALUE

    def test_out_of_memory_leaves_the_context_usable(self, driver: CudaDriver) -> None:
        with pytest.raises(CudaError) as caught:
            driver.cuMemAlloc(1 << 45)
        assert caught.value.code == CUDA_ERROR_OUT_OF_MEMORY
        with _device_memory(driver, 64):
            pass

    def test_destroyed_handles_are_refused(self, driver: CudaDriver) -> None:
        if not self.checks_destroyed_handles:
            pytest.skip("a destroyed handle is undefined behaviour on this driver")
        stream, event = driver.cuStreamCreate(_NON_BLOCKING), driver.cuEventCreate(0)
        driver.cuStreamDestroy(stream)
        driver.cuEventDestroy(event)
        with pytest.raises(CudaError) as stale_stream:
            driver.cuStreamSynchronize(stream)
        with pytest.raises(CudaError) as stale_event:
            driver.cuEventSynchronize(event)
        assert {stale_stream.value.code, stale_event.value.code} == {_INVALID_HANDLE}

    def test_a_thread_needs_a_current_context(self, driver: CudaDriver) -> None:
        import threading

        codes: list[int] = []

        def work() -> None:
            try:
                driver.cuMemAlloc(64)
            except CudaError as error:
                codes.append(error.code)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert codes == [_INVALID_CONTEXT]


class RuntimeConformance(_Suite):
    """Rules of the TensorRT seam, for backends that build and run on the same machine."""

    @pytest.fixture
    def lines(self) -> list[tuple[Severity, str]]:
        """What the backend logs."""
        return []

    @staticmethod
    def _model(*, operator: str = "Relu", elem: str = "FLOAT") -> bytes:
        import onnx
        from onnx import helper

        kind = getattr(onnx.TensorProto, elem)
        value = [helper.make_tensor_value_info(name, kind, ["N", 4]) for name in ("x", "y")]
        node = helper.make_node(operator, ["x"], ["y"], name="only")
        graph = helper.make_graph([node], "one_node", value[:1], value[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        data: bytes = model.SerializeToString()
        return data

    def _build(self, backend: TensorRTBackend, lines: list[Any], profiles: tuple[ProfileSpec, ...]) -> bytes:
        builder = backend.create_builder(lambda severity, text: lines.append((severity, text)))
        try:
            network = builder.create_network()
            try:
                network.parse_onnx(self._model(), None)
                return bytes(builder.build_serialized_network(network, BuildOptions(profiles=profiles), None))
            finally:
                network.destroy()
        finally:
            builder.destroy()

    @contextlib.contextmanager
    def _engine(self, backend: TensorRTBackend, lines: list[Any]) -> Iterator[BackendEngine]:
        plan = self._build(backend, lines, ({"x": ShapeRange((1, 4), (2, 4), (8, 4))},))
        runtime = backend.create_runtime(
            lambda severity, text: lines.append((severity, text)),
            device=self.device,
            lean_library=None,
            allow_host_code=True,
        )
        try:
            engine = runtime.deserialize(plan)
            try:
                yield engine
            finally:
                engine.destroy()
        finally:
            runtime.destroy()

    @contextlib.contextmanager
    def _context(self, engine: BackendEngine) -> Iterator[BackendContext]:
        context = engine.create_context()
        try:
            yield context
        finally:
            context.destroy()

    def test_unknown_operator_is_named(self, backend: TensorRTBackend, lines: list[Any]) -> None:
        builder = backend.create_builder(lambda severity, text: lines.append((severity, text)))
        network = builder.create_network()
        with pytest.raises(ParserError) as caught:
            network.parse_onnx(self._model(operator="Det"), None)
        network.destroy()
        builder.destroy()
        assert [(issue.node, issue.operator) for issue in caught.value.issues] == [("only", "Det")]

    def test_dynamic_input_needs_a_profile(self, backend: TensorRTBackend, lines: list[Any]) -> None:
        with pytest.raises(BuilderError, match="profile"):
            self._build(backend, lines, ())
        assert any(severity <= Severity.ERROR for severity, _ in lines)

    def test_profile_must_be_ordered(self, backend: TensorRTBackend, lines: list[Any]) -> None:
        with pytest.raises(BuilderError):
            self._build(backend, lines, ({"x": ShapeRange((4, 4), (2, 4), (8, 4))},))

    def test_engine_describes_itself(self, backend: TensorRTBackend, driver: CudaDriver, lines: list[Any]) -> None:
        with self._engine(backend, lines) as engine:
            tensors = {t.name: t for t in engine.io_tensors}
            assert tensors["x"].mode is TensorMode.INPUT
            assert tensors["y"].mode is TensorMode.OUTPUT
            assert tensors["x"].shape == (-1, 4)
            assert tensors["x"].ranges == (ShapeRange((1, 4), (2, 4), (8, 4)),)
            assert engine.num_profiles == 1
            assert engine.device_memory_bytes(0) <= engine.device_memory_bytes(None)

    def test_inference(self, backend: TensorRTBackend, driver: CudaDriver, stream: int, lines: list[Any]) -> None:
        sent = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
        received = np.zeros_like(sent)
        with (
            self._engine(backend, lines) as engine,
            self._context(engine) as context,
            _device_memory(driver, sent.nbytes) as source,
            _device_memory(driver, sent.nbytes) as target,
        ):
            assert context.active_profile == 0
            context.set_input_shape("x", (3, 4))
            assert context.get_tensor_shape("y") == (3, 4)
            context.set_tensor_address("x", source)
            context.set_tensor_address("y", target)
            driver.cuMemcpyHtoDAsync(source, sent.ctypes.data, sent.nbytes, stream)
            context.execute_async_v3(stream)
            driver.cuMemcpyDtoHAsync(received.ctypes.data, target, received.nbytes, stream)
            driver.cuStreamSynchronize(stream)
        np.testing.assert_array_equal(received, np.maximum(sent, 0))

    def test_execute_refuses_what_is_not_set(
        self, backend: TensorRTBackend, driver: CudaDriver, stream: int, lines: list[Any]
    ) -> None:
        with self._engine(backend, lines) as engine, self._context(engine) as context:
            with pytest.raises(ExecutionError):
                context.execute_async_v3(stream)
            driver.cuStreamSynchronize(stream)

    def test_execute_refuses_a_shape_outside_the_profile(
        self, backend: TensorRTBackend, driver: CudaDriver, stream: int, lines: list[Any]
    ) -> None:
        with (
            self._engine(backend, lines) as engine,
            self._context(engine) as context,
            _device_memory(driver, 4096) as memory,
        ):
            context.set_tensor_address("x", memory)
            context.set_tensor_address("y", memory + 2048)

            def run() -> None:
                # TensorRT refuses in the second call; a stricter backend may do so in the first
                context.set_input_shape("x", (9, 4))
                context.execute_async_v3(stream)

            with pytest.raises(TrtxError):
                run()
            driver.cuStreamSynchronize(stream)

    def test_bytes_that_are_no_plan(self, backend: TensorRTBackend, driver: CudaDriver, lines: list[Any]) -> None:
        runtime = backend.create_runtime(
            lambda severity, text: lines.append((severity, text)),
            device=self.device,
            lean_library=None,
            allow_host_code=False,
        )
        with pytest.raises(EngineError):
            runtime.deserialize(b"no plan at all" * 10)
        runtime.destroy()
