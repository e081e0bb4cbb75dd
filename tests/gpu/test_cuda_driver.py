"""The public conformance suite on the real CUDA driver, and the objects over the driver on both sides."""

from __future__ import annotations

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend.conformance import DriverConformance
from tests.gpu.kit import BACKEND, Side, run
from trtx_py.backends.protocols import TensorRTBackend
from trtx_py.backends.registry import resolve_backend


@pytest.mark.gpu
class TestRealDriver(DriverConformance):
    checks_destroyed_handles = False

    def make_backend(self) -> TensorRTBackend:
        return resolve_backend(BACKEND, need="run")


def test_buffers_round_trip(side: Side) -> None:
    sent = np.random.default_rng(1).standard_normal(100_003).astype(np.float32)
    with side.runtime() as runtime:
        device = runtime.device
        with device.create_stream() as stream, device.allocate(sent.nbytes) as buffer:
            assert device.memory_statistics().current_bytes == sent.nbytes
            buffer.copy_from_host(sent, stream)
            np.testing.assert_array_equal(buffer.copy_to_host(sent.shape, np.float32, stream), sent)
            with pytest.raises(trtx.ShapeError):
                buffer.copy_from_host(np.zeros(sent.size + 1, np.float32), stream)
        assert device.memory_statistics().current_bytes == 0


def test_pinned_memory_is_an_array(side: Side) -> None:
    with side.runtime() as runtime, runtime.device.allocate_pinned(4096) as pinned:
        view = pinned.array((1024,), np.float32)
        view[:] = 3
        assert float(pinned.array((1024,), np.float32).sum()) == 3072
        assert runtime.device.pinned_statistics().current_bytes == 4096
        del view


def test_events_order_streams_and_measure(side: Side) -> None:
    sent = np.arange(1 << 20, dtype=np.uint8)

    async def body() -> None:
        async with side.runtime() as runtime:
            device = runtime.device
            with (
                device.create_stream() as first,
                device.create_stream() as second,
                device.create_event() as start,
                device.create_event() as end,
                device.allocate(sent.nbytes) as buffer,
            ):
                assert start.query()  # nothing recorded
                start.record(first)
                buffer.copy_from_host(sent, first)
                end.record(first)
                second.wait(end)
                np.testing.assert_array_equal(buffer.copy_to_host(sent.shape, np.uint8, second), sent)
                await second.wait_idle()
                end.synchronize()
                assert end.query()
                assert start.elapsed_ms(end) > 0

    run(body())


def test_too_much_memory_is_an_error_and_no_more(side: Side) -> None:
    with side.runtime() as runtime:
        with pytest.raises(trtx.CudaError) as caught:
            runtime.device.allocate(1 << 45)
        assert caught.value.name == "CUDA_ERROR_OUT_OF_MEMORY"
        with runtime.device.allocate(1024):
            assert runtime.device.memory_statistics().current_bytes == 1024
