"""Small models and the units that the fuzz targets begin with: python make_seeds.py FOLDER

FOLDER/models: what fuzz_calls and fuzz_plan open. FOLDER/model, FOLDER/calls, FOLDER/dlpack: units; plans are made by
fuzz_plan itself, with the library.
"""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).resolve().parent
CONTROL = 16


def model(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any] | None = None, opset: int = 17
) -> bytes:
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights or [])
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10).SerializeToString()
    )


def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def more() -> dict[str, bytes]:
    node = helper.make_node
    w = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    b = numpy_helper.from_array(np.zeros(3, np.float32), "b")
    k = numpy_helper.from_array(np.ones((1, 1, 3, 3), np.float32), "k")
    u4 = helper.make_tensor("u", TensorProto.UINT4, [3], [1, 2, 15])
    then = helper.make_graph([node("Add", ["x", "x"], ["t"])], "then", [], [value("t", [3])])
    other = helper.make_graph([node("Neg", ["x"], ["e"])], "else", [], [value("e", [3])])
    return {
        "gemm.onnx": model(
            [node("Gemm", ["x", "w", "b"], ["y"])], [value("x", ["n", 4])], [value("y", ["n", 3])], [w, b]
        ),
        "relu.onnx": model([node("Relu", ["x"], ["y"])], [value("x", [1, 4])], [value("y", [1, 4])]),
        "conv.onnx": model(
            [node("Conv", ["x", "k"], ["y"], pads=[1, 1, 1, 1])], [value("x", [1, 1, "h", "w"])],
            [value("y", [1, 1, "h", "w"])], [k],
        ),
        "reshape.onnx": model(
            [node("Shape", ["x"], ["s"]), node("Reshape", ["x", "s"], ["y"])], [value("x", ["a", "b"])],
            [value("y", ["a", "b"])],
        ),
        "cast.onnx": model(
            [node("Cast", ["x"], ["y"], to=TensorProto.INT8)], [value("x", [4])], [value("y", [4], TensorProto.INT8)]
        ),
        "uint8.onnx": model(
            [node("Add", ["x", "x"], ["y"])], [value("x", [5], TensorProto.UINT8)], [value("y", [5], TensorProto.UINT8)]
        ),
        "uint64.onnx": model(
            [node("Add", ["x", "x"], ["y"])], [value("x", [2], TensorProto.UINT64)],
            [value("y", [2], TensorProto.UINT64)],
        ),
        "uint4.onnx": model(
            [node("Cast", ["u"], ["c"], to=TensorProto.INT32), node("Add", ["c", "x"], ["y"])],
            [value("x", [3], TensorProto.INT32)], [value("y", [3], TensorProto.INT32)], [u4], opset=21,
        ),
        "int4.onnx": model([node("Identity", ["x"], ["y"])], [value("x", [5], TensorProto.INT4)],
                           [value("y", [5], TensorProto.INT4)], opset=21),
        "half.onnx": model([node("Abs", ["x"], ["y"])], [value("x", [2], TensorProto.FLOAT16)],
                           [value("y", [2], TensorProto.FLOAT16)]),
        "bfloat.onnx": model([node("Abs", ["x"], ["y"])], [value("x", [2], TensorProto.BFLOAT16)],
                             [value("y", [2], TensorProto.BFLOAT16)]),
        "bool.onnx": model([node("Not", ["x"], ["y"])], [value("x", ["n"], TensorProto.BOOL)],
                           [value("y", ["n"], TensorProto.BOOL)]),
        "empty.onnx": model([node("Add", ["x", "x"], ["y"])], [value("x", [0, 4])], [value("y", [0, 4])]),
        "if.onnx": model([node("If", ["c"], ["y"], then_branch=then, else_branch=other)],
                         [value("c", [], TensorProto.BOOL), value("x", [3])], [value("y", [3])]),
        "constant.onnx": model([node("Constant", [], ["y"], value=b)], [], [value("y", [3])]),
    }  # fmt: skip


def control(*values: int) -> bytes:
    return bytes(values).ljust(CONTROL, b"\0")


def main() -> None:
    folder = Path(sys.argv[1])
    models = folder / "models"
    subprocess.run([sys.executable, HERE.parent / "library" / "make_models.py", models], check=True)
    for name, content in more().items():
        (models / name).write_bytes(content)
    units = folder / "model"
    units.mkdir(parents=True, exist_ok=True)
    blob = (models / "weights.bin").read_bytes()
    choose = random.Random(1)
    for path in sorted(models.glob("*.onnx")):
        weights = blob if path.name == "external.onnx" else b""
        for mode in range(4):
            ending = control(mode | 64 * (mode == 0), len(weights), 0, 3, 3, 9 + 32 * (mode == 0))
            (units / f"{path.stem}_{mode}").write_bytes(path.read_bytes() + weights + ending)
        # half of a model, and no weights for one that needs them
        (units / f"{path.stem}_cut").write_bytes(path.read_bytes()[: path.stat().st_size // 2] + control(0))
    (units / "no_weights").write_bytes((models / "external.onnx").read_bytes() + control(0))
    for name, most in (("calls", 600), ("dlpack", 120)):
        (folder / name).mkdir(exist_ok=True)
        for number in range(24):
            (folder / name / f"random_{number}").write_bytes(choose.randbytes(choose.randrange(16, most)))
    # a DLManagedTensor that is right: see fuzz_dlpack.c
    right = struct.pack("<BBBHBBBBBB", 2, 32, 1, 0, 1, 0, 2, 1, 1, 0) + struct.pack("<qq", 3, 4)
    (folder / "dlpack" / "right").write_bytes(right)


main()
