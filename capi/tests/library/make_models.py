"""Writes the small ONNX models of the C tests into a folder: python make_models.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def model(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any] | None = None) -> bytes:
    graph = helper.make_graph(nodes, "test", inputs, outputs, weights or [])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def external() -> tuple[bytes, bytes]:
    """y = x + w, with w outside of the model."""
    w = np.arange(4, dtype=np.float32)
    tensor = numpy_helper.from_array(w, "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", "weights.bin"), ("offset", "16"), ("length", "16")):
        tensor.external_data.add(key=key, value=text)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "outside", [value("x", [2, 4])], [value("y", [2, 4])], [tensor]
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(made.SerializeToString()), bytes(16) + w.tobytes()


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    add = helper.make_node
    files = {
        # y = x + x at any number of rows
        "double.onnx": model([add("Add", ["x", "x"], ["y"])], [value("x", ["n", 4])], [value("y", ["n", 4])]),
        # sum = a + b, difference = a - b
        "two.onnx": model(
            [add("Add", ["a", "b"], ["sum"]), add("Sub", ["a", "b"], ["difference"])],
            [value("a", [3]), value("b", [3])],
            [value("sum", [3]), value("difference", [3])],
        ),
        "scalar.onnx": model([add("Add", ["x", "x"], ["y"])], [value("x", [])], [value("y", [])]),
        "unsigned.onnx": model(
            [add("Sub", ["a", "b"], ["y"])],
            [value("a", [3], TensorProto.UINT32), value("b", [3], TensorProto.UINT32)],
            [value("y", [3], TensorProto.UINT32)],
        ),
        # as many outputs as x has values that are not 0
        "nonzero.onnx": model(
            [add("NonZero", ["x"], ["y"])], [value("x", [6])], [value("y", [1, "m"], TensorProto.INT64)]
        ),
    }
    files["external.onnx"], files["weights.bin"] = external()
    for name, content in files.items():
        (folder / name).write_bytes(content)


main()
