"""Activation memory: what TensorRT enqueues kernel by kernel shares none with graphs launched in between."""

from __future__ import annotations

from typing import Any

import pytest

import trtx_py as trtx
from mock_backend import MockBackend
from mock_backend._context import MockContext
from tests.unit.serving import affine, rows, serving


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch, mock_backend: MockBackend) -> dict[bool, list[int]]:
    """Addresses that contexts compute at: by whether the stream was captured."""
    found: dict[bool, list[int]] = {True: [], False: []}
    execute = MockContext.execute_async_v3

    def watched(context: MockContext, stream: int) -> Any:
        capturing = mock_backend.driver.cuStreamIsCapturing(stream) != 0
        assert context._memory is not None
        found[capturing].append(context._memory.address)
        return execute(context, stream)

    monkeypatch.setattr(MockContext, "execute_async_v3", watched)
    return found


@pytest.mark.asyncio
async def test_what_is_enqueued_has_memory_of_its_own(mock_backend: MockBackend, blocks: dict[bool, list[int]]) -> None:
    async with serving(mock_backend) as engine:
        for count in (3, 5):
            for number in range(4):
                x = rows(count, number)
                assert ((await engine.infer({"x": x}))["y"] == affine(x)).all()
            async with engine.alloc_inputs({"x": (count, 4)}):
                pass
            await engine.infer_timed({"x": rows(count, 9)})  # enqueued, while graphs are there
        assert engine.statistics().graphs.captured == 2
        enqueued = blocks[False]
        # Each capture is preceded by a run in the graphs' own memory whose result does not matter.
        settling = [address for address in enqueued if address in blocks[True]]
        assert len(settling) == 2
        assert len(enqueued) > 4
        assert len(set(enqueued) - set(blocks[True])) >= 1
        assert len(set(blocks[True])) == 1  # shared by all graphs of the lane


@pytest.mark.asyncio
async def test_the_block_goes_when_a_shape_was_captured(mock_backend: MockBackend) -> None:
    async with serving(mock_backend) as engine:
        device = engine._runtime.device

        def activations() -> int:
            return sum("activations" in each.owner for each in device.memory_allocations())

        await engine.infer({"x": rows(3, 0)})
        assert activations() == 1
        async with engine.alloc_inputs({"x": (3, 4)}):
            assert activations() == 1  # the graphs'
        await engine.infer_timed({"x": rows(3, 1)})
        assert activations() == 2
    assert isinstance(device, trtx.Device)
