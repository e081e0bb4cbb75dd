"""Values of shape tensors that make no sense are refused before anything is enqueued, and do no harm."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

import trtx_py as trtx
from mock_backend import MockBackend


async def test_a_reshape_that_does_not_fit(mock_backend: MockBackend) -> None:
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "reshape",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [6]),
            helper.make_tensor_value_info("shape", TensorProto.INT64, [2]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "columns"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = np.arange(6, dtype=np.float32)
    async with trtx.open_engine(
        model.SerializeToString(), mock_backend, profiles=[{"shape": ((1, 1), (2, 3), (6, 6))}]
    ) as engine:
        with pytest.raises(trtx.ShapeError, match="4,4"):
            await engine.infer({"x": x, "shape": [4, 4]})
        assert mock_backend.calls.get("execute", 0) == 0
        outputs = await engine.infer({"x": x, "shape": [2, 3]})
    np.testing.assert_array_equal(outputs["y"], x.reshape(2, 3))
