"""FP16 and BF16 on a CPU: FP32 arithmetic whose every result is rounded as the type rounds.

ONNX Runtime computes FP16 nodes in FP32 on most CPUs and drops the roundings between neighbours, and it has no BF16 for
most operators. What TensorRT does, 16-bit operands, FP32 sums and a result of 16 bits, is this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ._graph import Graph, is_standard, subgraphs

if TYPE_CHECKING:
    import onnx

#: Their results are numbers that were there before, so they are rounded already.
_EXACT = frozenset(
    """
    Abs Clip Concat Expand Flatten Gather GatherElements GatherND Identity Max MaxPool Min Neg Pad Relu Reshape Slice
    Split Squeeze Tile Transpose Unsqueeze Where
    """.split()
)
#: Attributes that name a type.
_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_datatype", "output_dtype", "precision"})


def rounding_model(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Mapping[str, str]]:
    """A model of FP32 nodes and roundings with the same inputs, outputs and numbers as an FP16 or BF16 one.

    A model without such tensors inside is returned as it is, and so is one where control flow or an operator of another
    domain has them. The second value has the name of the FP32 tensor with the same numbers for each 16-bit tensor.
    """
    from onnx import TensorProto

    low = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    if not _may_have(model, low):
        return model, {}
    graph = Graph(model)

    def is_low(name: str) -> bool:
        return graph.types.get(name) in low

    if not any(is_low(name) for node in graph.nodes for name in node.output):
        return model, {}
    if any(is_low(name) for name in graph.captured):
        return model, {}
    for node in graph.nodes:
        touched = any(is_low(name) for name in (*node.input, *node.output))
        unknown = any(name and name not in graph.types for name in node.output)
        if (touched and (not is_standard(node) or any(True for _ in subgraphs(node)))) or unknown:
            return model, {}
    return _Rounder(graph).run()


def _may_have(model: onnx.ModelProto, types: tuple[int, ...]) -> bool:
    graph = model.graph
    return (
        any(tensor.data_type in types for tensor in graph.initializer)
        or any(value.type.tensor_type.elem_type in types for value in graph.input)
        or any(
            (a.name in _TYPE_ATTRIBUTES and a.i in types) or (a.HasField("t") and a.t.data_type in types)
            for node in graph.node
            for a in node.attribute
        )
    )


class _Rounder:
    def __init__(self, graph: Graph) -> None:
        from onnx import TensorProto

        self._graph = graph
        self._low = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
        self._float = TensorProto.FLOAT
        self._wide: dict[str, str] = {}  # 16-bit tensor -> its float32 twin
        self._nodes: list[onnx.NodeProto] = []

    def run(self) -> tuple[onnx.ModelProto, Mapping[str, str]]:
        graph = self._graph
        for node in graph.nodes:
            inputs = [self._read(name) for name in node.input]
            self._rewrite(node, inputs)
        return graph.finish(self._nodes), self._wide

    def _is_low(self, name: str) -> bool:
        return self._graph.types.get(name) in self._low

    def _read(self, name: str) -> str:
        if not name or not self._is_low(name):
            return name
        if name not in self._wide:
            twin = self._wide[name] = self._graph.unused(f"{name}__wide")
            if name in self._graph.initializers:
                self._graph.add_initializer(twin, self._graph.array(name).astype(np.float32))
            else:
                self._cast(name, twin, self._float)
        return self._wide[name]

    def _rewrite(self, node: onnx.NodeProto, inputs: list[str]) -> None:
        import onnx
        from onnx import numpy_helper

        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for attribute in copy.attribute:
            if attribute.name in _TYPE_ATTRIBUTES and attribute.i in self._low:
                attribute.i = self._float
            if attribute.HasField("t") and attribute.t.data_type in self._low:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float32)))
        for index, name in enumerate(inputs):
            copy.input[index] = name
        self._nodes.append(copy)
        for index, name in enumerate(node.output):
            if not name or not self._is_low(name):
                continue
            elem = self._graph.types[name]
            raw = self._graph.unused(f"{name}__raw")
            copy.output[index] = raw
            wide = self._wide[name] = raw
            if node.op_type not in _EXACT:
                wide = self._wide[name] = self._graph.unused(f"{name}__wide")
                narrow = name if name in self._graph.outputs else self._graph.unused(f"{name}__narrow")
                self._cast(raw, narrow, elem)
                self._cast(narrow, wide, self._float)
            elif name in self._graph.outputs:
                self._cast(raw, name, elem)

    def _cast(self, source: str, target: str, to: int) -> None:
        from onnx import helper

        self._nodes.append(helper.make_node("Cast", [source], [target], name=f"cast {target}", to=to))
