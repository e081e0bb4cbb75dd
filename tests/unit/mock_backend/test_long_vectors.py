"""Models with vectors of many entries: shape inference that follows values would make an object for each of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

import trtx_py as trtx
from mock_backend import MockBackend
from trtx_py.convert._worker._shapes import _LONGEST, follows_values

_ROOT = Path(__file__).resolve().parents[3]
_BUILD = """
import asyncio, resource, sys
import numpy, onnx, onnxruntime  # before the limit, which counts address space
import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.mock_backend.test_long_vectors import cast_and_reshape

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)

async def main():
    backend = MockBackend()
    async with trtx.Builder(None, backend) as builder, builder.create_network() as network:
        network.parse_onnx(cast_and_reshape(2**31 - 1))
        print([tensor.shape for tensor in network.inputs])

asyncio.run(main())
"""


def cast_and_reshape(length: int | str) -> bytes:
    """y = (x as whole numbers) with an axis before: the shape is computed."""
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=TensorProto.INT32),
        helper.make_node("Shape", ["c"], ["s"]),
        helper.make_node("Concat", ["one", "s"], ["t"], axis=0),
        helper.make_node("Reshape", ["c", "t"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [length])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, ["rows", "length"])
    graph = helper.make_graph(nodes, "g", [x], [y], [helper.make_tensor("one", TensorProto.INT64, [1], [1])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def test_a_small_model_of_a_huge_vector_takes_little_memory() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _BUILD], capture_output=True, text=True, timeout=120, cwd=_ROOT, check=False
    )
    assert ran.stdout == "[(2147483647,)]\n", ran.stderr[-2000:]


@pytest.mark.parametrize("length", [5, _LONGEST, _LONGEST + 1])
async def test_computed_shapes_are_known_all_the_same(length: int, mock_backend: MockBackend) -> None:
    profile = {"x": ((1,), (8,), (2 * _LONGEST,))}
    async with trtx.open_engine(cast_and_reshape("n"), mock_backend, profiles=[profile], cache=False) as engine:
        x = np.arange(length, dtype=np.float32)
        assert np.array_equal((await engine.infer({"x": x}))["y"], x.astype(np.int32)[None])


def test_what_is_long() -> None:
    import onnx

    for length, follows in ((_LONGEST, True), (_LONGEST + 1, False), ("n", True)):
        model = onnx.load_from_string(cast_and_reshape(length))
        assert follows_values(model) is follows
        model.graph.input[0].type.tensor_type.shape.dim.add().dim_value = 9  # no vector
        assert follows_values(model)
    model = onnx.load_from_string(cast_and_reshape(5))
    model.graph.initializer.add(dims=[_LONGEST + 1], name="long", data_type=1)
    assert not follows_values(model)
