"""Facts about an ONNX graph: shape tensors, data-dependent shapes, a light copy without weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

__all__ = [
    "all_nodes",
    "data_dependent",
    "operands_not_constant",
    "shape_tensors",
    "subgraphs",
    "weight_tensors",
    "without_weights",
]

#: Operand positions whose values decide the shape of an output: TensorRT needs them on the host.
_SHAPE_OPERANDS: dict[str, tuple[int, ...]] = {
    "BlackmanWindow": (0,), "ConstantOfShape": (0,), "CumSum": (1,), "Expand": (1,), "HammingWindow": (0,),
    "HannWindow": (0,), "Loop": (0,), "OneHot": (1,), "Pad": (1, 3), "Range": (0, 1, 2), "Reshape": (1,),
    "Resize": (2, 3), "Slice": (1, 2, 3, 4), "Split": (1,), "Tile": (1,), "TopK": (1,), "Upsample": (1,),
}  # fmt: skip

#: Operand positions that the parser of tensorrt-rtx 1.7 takes only if they can be folded into constants (measured).
_CONSTANT_OPERANDS: dict[str, tuple[int, ...]] = {
    "Dropout": (2,), "ReduceL1": (1,), "ReduceL2": (1,), "ReduceLogSum": (1,), "ReduceLogSumExp": (1,),
    "ReduceMax": (1,), "ReduceMean": (1,), "ReduceMin": (1,), "ReduceProd": (1,), "ReduceSum": (1,),
    "ReduceSumSquare": (1,), "STFT": (1, 3), "Squeeze": (1,), "Unsqueeze": (1,),
}  # fmt: skip

#: Operators whose output values come from the shapes of their inputs, not from their values.
_SHAPE_READERS = frozenset({"Shape", "Size"})

#: Operators whose output shape is known only once their input values are.
_DATA_DEPENDENT = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})

_LIGHT_ELEMENTS = 256


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Graphs in the attributes of a node: branches and loop bodies."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """``nodes`` and the nodes of their subgraphs, outer ones first."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from all_nodes(graph.node)


def shape_tensors(graph: onnx.GraphProto) -> set[str]:
    """Names of graph inputs whose values decide a shape, so that TensorRT reads them on the host.

    A backward slice from every shape-determining operand; it stops at Shape and Size, whose results need no values.
    """
    return _inputs_behind(graph, _sources(graph), [name for _, name in _operands(graph, _SHAPE_OPERANDS)])


def operands_not_constant(graph: onnx.GraphProto) -> list[tuple[onnx.NodeProto, str]]:
    """Nodes with an operand that TensorRT needs as a constant and that a graph input decides; with its name."""
    sources = _sources(graph)
    wanted = _operands(graph, _CONSTANT_OPERANDS)
    return [(node, name) for node, name in wanted if _inputs_behind(graph, sources, [name])]


def _operands(graph: onnx.GraphProto, positions: Mapping[str, tuple[int, ...]]) -> list[tuple[onnx.NodeProto, str]]:
    return [
        (node, node.input[position])
        for node in all_nodes(graph.node)
        for position in positions.get(node.op_type, ())
        if position < len(node.input) and node.input[position]
    ]


def _sources(graph: onnx.GraphProto) -> dict[str, set[str]]:
    """For each tensor the tensors that its values are made from."""
    sources: dict[str, set[str]] = defaultdict(set)
    for node in all_nodes(graph.node):
        if node.op_type in _SHAPE_READERS:
            continue
        for output in node.output:
            sources[output].update(name for name in node.input if name)
        if node.op_type == "Loop":
            # values that a body carries start as the loop's own operands
            for body in subgraphs(node):
                for inner, outer in zip(body.input, node.input, strict=False):
                    sources[inner.name].add(outer)
        for inner_graph in subgraphs(node):
            for output in node.output:
                sources[output].update(value.name for value in inner_graph.output)
    return sources


def _inputs_behind(graph: onnx.GraphProto, sources: Mapping[str, set[str]], names: Iterable[str]) -> set[str]:
    wanted, seen = list(names), set[str]()
    while wanted:
        name = wanted.pop()
        if name not in seen:
            seen.add(name)
            wanted.extend(sources.get(name, ()))
    weights = {tensor.name for tensor in graph.initializer}
    return {value.name for value in graph.input if value.name in seen and value.name not in weights}


def data_dependent(graph: onnx.GraphProto) -> set[str]:
    """Names of tensors whose shape may depend on data: outputs of NonZero and its like, and what follows from them.

    A superset: where shape inference finds a size in spite of this, the size is right.
    """
    found: set[str] = set()
    for node in graph.node:  # ONNX keeps nodes in topological order
        inner = any(n.op_type in _DATA_DEPENDENT for g in subgraphs(node) for n in all_nodes(g.node))
        if node.op_type in _DATA_DEPENDENT or inner or any(name in found for name in node.input):
            found.update(node.output)
    return found


def weight_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initializers and the tensors of Constant nodes."""
    yield from graph.initializer
    for node in graph.node:
        constant = _constant(node)
        if constant is not None:
            yield constant


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    if node.op_type != "Constant":
        return None
    return next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)


def _count(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims)


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose large initializers are typed graph inputs instead: cheap to copy, and enough to infer shapes."""
    import onnx

    graph = model.graph
    light = onnx.ModelProto()
    light.ir_version = max(model.ir_version, 4)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    light.graph.name = graph.name
    for node in graph.node:
        constant = _constant(node)
        if constant is None or _count(constant) <= _LIGHT_ELEMENTS:
            light.graph.node.append(node)
        else:
            light.graph.input.append(
                onnx.helper.make_tensor_value_info(node.output[0], constant.data_type, list(constant.dims))
            )
    light.graph.output.extend(graph.output)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    light.graph.input.extend(value for value in graph.input if value.name not in weights)
    for name, tensor in weights.items():
        if _count(tensor) <= _LIGHT_ELEMENTS:
            light.graph.initializer.append(tensor)
        else:
            light.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    return light
