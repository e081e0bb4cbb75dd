"""An engine on the mock that takes no time: what is left is what this package costs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

import trtx_py as trtx
from mock_backend import MockBackend

SHAPE = (1, 64)


def small_model() -> bytes:
    """y = x + x, 64 float32."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    model: Any = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def build(backend: MockBackend) -> trtx.Plan:
    """The plan of ``small_model``."""
    with (
        trtx.Builder(backend=backend) as builder,
        builder.create_network() as network,
        builder.create_config() as config,
    ):
        network.parse_onnx(small_model())
        return builder.build_serialized_network_sync(network, config)


@contextlib.contextmanager
def serving(*, compute: bool = False, **options: Any) -> Iterator[trtx.Engine]:
    """An engine of the mock; ``compute=False`` gives zeros."""
    backend = MockBackend(compute=compute)
    with trtx.Runtime(backend=backend) as runtime, runtime.deserialize_sync(build(backend), **options) as engine:
        yield engine


def inputs() -> dict[str, np.ndarray]:
    return {"x": np.linspace(-1, 1, SHAPE[1], dtype=np.float32).reshape(SHAPE)}
