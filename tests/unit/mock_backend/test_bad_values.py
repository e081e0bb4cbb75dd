"""Values that cannot be computed fail the inference that sent them, and nothing else."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import trtx_py as trtx
from mock_backend import MockBackend
from trtx_py.backends.protocols import STICKY_CUDA_ERRORS

X = np.arange(4, dtype=np.float32).reshape(1, 4)


def gather(*, sized_by_data: bool = False) -> bytes:
    """y = x[:, i], then NonZero of it if the size of the output is to depend on data."""
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Gather", ["x", "i"], ["g"], axis=1)]
    nodes.append(helper.make_node("NonZero" if sized_by_data else "Relu", ["g"], ["y"]))
    result = value("y", TensorProto.INT64, [2, "n"]) if sized_by_data else value("y", TensorProto.FLOAT, [1, 1])
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, [1, 4]), value("i", TensorProto.INT64, [1])], [result]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


@pytest.mark.parametrize("lanes", [1, 2])
async def test_only_the_request_that_sent_them(mock_backend: MockBackend, lanes: int) -> None:
    async with trtx.open_engine(gather(), mock_backend, lanes=lanes) as engine:
        answers: list[Any] = await asyncio.gather(
            *(engine.infer({"x": X, "i": np.array([i])}) for i in (0, 99, 1, 2, 99, 3)), return_exceptions=True
        )
        again = await engine.infer({"x": X, "i": np.array([2])})
    for failed in (answers.pop(4), answers.pop(1)):
        assert isinstance(failed, trtx.ExecutionError)
        assert "99" in str(failed)  # what the evaluator said
        assert "out of" in str(failed)
    assert [float(answer["y"][0, 0]) for answer in answers] == [0, 1, 2, 3]
    assert again["y"] == 2


async def test_with_an_output_sized_by_data(mock_backend: MockBackend) -> None:
    async with trtx.open_engine(gather(sized_by_data=True), mock_backend, lanes=1) as engine:
        with pytest.raises(trtx.ExecutionError, match="99"):
            await engine.infer({"x": X, "i": np.array([99])})
        outputs = await engine.infer({"x": X, "i": np.array([3])})
    np.testing.assert_array_equal(outputs["y"], [[0], [0]])


def test_at_the_driver(rig: Any) -> None:
    """Queries say so again and again, a synchronization says so once; the context stays usable."""
    context = rig.ready(gather())
    rig.bind(context, {"x": X, "i": np.array([99])})
    event = rig.new_event()
    context.execute_async_v3(rig.stream)
    rig.driver.cuEventRecord(event, rig.stream)
    other = rig.new_stream()
    rig.driver.cuStreamSynchronize(other)
    with pytest.raises(trtx.CudaError, match="cannot compute these values") as caught:
        rig.driver.cuStreamSynchronize(rig.stream)
    assert caught.value.code not in STICKY_CUDA_ERRORS
    rig.driver.cuStreamSynchronize(rig.stream)
    assert rig.driver.cuEventQuery(event) == 0

    context.execute_async_v3(rig.stream)
    rig.driver.cuEventRecord(event, rig.stream)
    reached = threading.Event()
    rig.driver.launch(rig.stream, reached.set, "more work")
    assert reached.wait(30)
    for _ in range(2):
        with pytest.raises(trtx.CudaError, match="cuEventQuery"):
            rig.driver.cuEventQuery(event)
    with pytest.raises(trtx.CudaError, match="cuEventSynchronize"):
        rig.driver.cuEventSynchronize(event)
    rig.driver.cuStreamSynchronize(rig.stream)
    np.testing.assert_array_equal(rig.run(context, x=X, i=np.array([1]))["y"], [[1]])
