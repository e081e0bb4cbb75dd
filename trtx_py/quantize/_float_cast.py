"""FP16 and BF16: casts around the nodes that can compute in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ._graph import Graph, is_standard, subgraphs
from ._policy import ELEMENTWISE, LAYOUT, RECURRENT, REDUCTIONS, SUMS, PrecisionPolicy

if TYPE_CHECKING:
    import onnx

_LARGEST = {"fp16": 65504.0, "bf16": 3.3895313892515355e38}
#: Half of the smallest positive number: what is smaller becomes zero.
_SMALLEST = {"fp16": 2.0**-25, "bf16": 2.0**-134}
#: BF16 came to ONNX with opset 13, and to Conv and the pools with 22.
_OPSET = {"fp16": 7, "bf16": 22}
#: Operators that ONNX has in a type and TensorRT has not (TensorRT-RTX 1.7; measured).
_NOT_IN_TENSORRT = {
    "fp16": frozenset[str](),
    "bf16": frozenset({"ConvTranspose", "GlobalLpPool", "HardSwish", "LpPool", "Mish"}),
}
#: Their result is a type by name, or no float at all.
_OWN_TYPES = frozenset({"Cast", "CastLike", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Constant"})


@dataclass(frozen=True)
class Converted:
    """A converted model.

    Attributes:
        model: the model; inputs and outputs have the names and types that they had.
        changed: names of the nodes that compute in the precision now.
        kept: why each other node that computes with floats stayed in FP32, by its name.
        tensors: the name in ``model`` of each tensor of the FP32 model that has another there.
    """

    model: onnx.ModelProto
    changed: frozenset[str]
    kept: Mapping[str, str]
    tensors: Mapping[str, str]


def prepared_for_casts(model: onnx.ModelProto, word: str) -> Graph:
    """The model in the form that casts are put into. Raises PrecisionError if its opset is too old for ``word``."""
    graph = Graph(model)
    graph.raise_opset(_OPSET[word], f"precision={word!r}")
    return graph


def cast_floats(graph: Graph, word: str, policy: PrecisionPolicy) -> Converted:
    """Make ``word`` ("fp16" or "bf16") of a float32 model that ``prepared_for_casts`` gave.

    A node computes in 16 bits if its operator may, by the schema of its opset, is not one of the policy's sensitive
    ones nor an element-wise one between them, and has no constant that 16 bits cannot hold. Around the others stand
    casts. So each tensor has one type, whatever casts the model had before. Control flow and operators that ONNX does
    not know stay in FP32.
    """
    return _Caster(graph, word, policy).run()


class _Caster:
    def __init__(self, graph: Graph, word: str, policy: PrecisionPolicy) -> None:
        from onnx import TensorProto

        self._graph = graph
        self._word = word
        self._policy = policy
        self._to = TensorProto.FLOAT16 if word == "fp16" else TensorProto.BFLOAT16
        self._float = TensorProto.FLOAT
        self._kept: dict[str, str] = {}
        self._changed: set[str] = set()
        self._low: dict[str, str] = {}  # float32 tensor -> its 16-bit twin
        self._made_low: dict[str, str] = {}  # those of them that a node makes
        self._nodes: list[onnx.NodeProto] = []
        self._between = {**_between_reductions(graph, policy.sensitive), **_before_recurrent(graph, policy)}

    def run(self) -> Converted:
        wanted = {node.name: self._ports(node) for node in self._graph.nodes}
        needs_high = set(self._graph.outputs) | self._graph.captured
        for node in self._graph.nodes:
            ports = wanted[node.name]
            for index, name in enumerate(node.input):
                if ports is None or index not in ports[0]:
                    needs_high.add(name)
        for node in self._graph.nodes:
            ports = wanted[node.name]
            if ports is None:
                self._nodes.append(node)
            else:
                self._convert(node, ports, needs_high)
        return Converted(self._graph.finish(self._nodes), frozenset(self._changed), self._kept, self._made_low)

    def _ports(self, node: onnx.NodeProto) -> tuple[frozenset[int], frozenset[int]] | None:
        """Positions of the inputs and outputs to convert; None for a node that stays as it is."""
        floats = [n for n in (*node.input, *node.output) if n and self._graph.types.get(n) == self._float]
        if not floats:
            return None
        found = self._float_ports(node)
        reason = found if isinstance(found, str) else self._reason_to_keep(node)
        if reason:
            self._kept[node.name] = reason
            return None
        assert not isinstance(found, str)
        self._changed.add(node.name)
        return found

    def _float_ports(self, node: onnx.NodeProto) -> tuple[frozenset[int], frozenset[int]] | str:
        import onnx

        if node.op_type in _OWN_TYPES:
            return f"{node.op_type} names its types"
        if is_standard(node) and node.op_type in _NOT_IN_TENSORRT[self._word]:
            return f"TensorRT has no {node.op_type} in {self._word}"
        if any(True for _ in subgraphs(node)):
            return "control flow stays as it is"
        if not is_standard(node):
            return f"operator {node.op_type} of domain {node.domain!r} has no schema here"
        try:
            schema = onnx.defs.get_schema(node.op_type, self._graph.opset, "")
        except onnx.defs.SchemaError:
            return f"operator {node.op_type} has no schema in opset {self._graph.opset}"
        wanted = "tensor(float16)" if self._word == "fp16" else "tensor(bfloat16)"
        allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
        results = []
        for names, formals in ((node.input, schema.inputs), (node.output, schema.outputs)):
            ports = set()
            for index, name in enumerate(names):
                if not name:
                    continue
                if name not in self._graph.types:
                    return f"the type of {name!r} is not known"
                formal = formals[min(index, len(formals) - 1)]
                takes = allowed.get(formal.type_str)
                if self._graph.types[name] != self._float or takes is None:
                    continue  # no float, or a type that the schema fixes
                if wanted not in takes:
                    return f"operator {node.op_type} of opset {self._graph.opset} does not take {self._word}"
                ports.add(index)
            results.append(frozenset(ports))
        if not results[0] | results[1]:
            return f"operator {node.op_type} takes float32 alone"
        if results[1] and not results[0]:
            return f"operator {node.op_type} makes its floats of something else"
        return results[0], results[1]

    def _reason_to_keep(self, node: onnx.NodeProto) -> str:
        if node.name in self._policy.keep:
            return "the policy keeps it"
        if node.op_type in self._policy.sensitive:
            return f"operator {node.op_type} is sensitive"
        if node.name in self._between:
            return self._between[node.name]
        for name in node.input:
            if name in self._graph.initializers and self._graph.types[name] == self._float:
                reason = self._constant_problem(name)
                if reason:
                    return reason
        return ""

    def _constant_problem(self, name: str) -> str:
        values = np.abs(self._graph.array(name))
        finite = values[np.isfinite(values)]
        if finite.size and finite.max() > _LARGEST[self._word]:
            return f"constant {name!r} has {finite.max():.4g}, more than {self._word} can hold"
        if values.size == 1 and 0 < values.reshape(-1)[0] <= _SMALLEST[self._word]:
            return f"constant {name!r} is {values.reshape(-1)[0]:.4g}, which {self._word} makes zero"
        return ""

    def _convert(self, node: onnx.NodeProto, ports: tuple[Any, Any], needs_high: set[str]) -> None:
        import onnx

        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for index in ports[0]:
            copy.input[index] = self._twin(node.input[index])
        after = []
        for index in ports[1]:
            name = node.output[index]
            twin = self._graph.unused(f"{name}__{self._word}")
            self._low[name] = self._made_low[name] = twin
            copy.output[index] = twin
            if name in needs_high:
                after.append(self._cast(twin, name, self._float))
        self._nodes += [copy, *after]

    def _twin(self, name: str) -> str:
        if name not in self._low:
            twin = self._low[name] = self._graph.unused(f"{name}__{self._word}")
            if name in self._graph.initializers:
                self._graph.add_initializer(twin, _narrowed(self._graph.array(name), self._word))
            else:
                self._nodes.append(self._cast(name, twin, self._to))
        return self._low[name]

    def _cast(self, source: str, target: str, to: int) -> onnx.NodeProto:
        from onnx import helper

        return helper.make_node("Cast", [source], [target], name=f"cast {target}", to=to)


def _between_reductions(graph: Graph, sensitive: frozenset[str]) -> dict[str, str]:
    """Why each element-wise node that is part of a written-out normalization stays in FP32, by its name."""
    reductions, sums = REDUCTIONS & sensitive, SUMS & sensitive
    nodes = graph.nodes

    def made_by(name: str) -> onnx.NodeProto | None:
        return graph.producers.get(name)

    after: set[str] = set()
    for node in nodes:
        sources = [source for name in node.input if (source := made_by(name)) is not None]
        if node.op_type in ELEMENTWISE and any(s.op_type in reductions or s.name in after for s in sources):
            after.add(node.name)
    before: set[str] = set()
    for node in reversed(nodes):
        readers = [reader for name in node.output for reader in graph.consumers.get(name, ())]
        if node.op_type in ELEMENTWISE and any(r.op_type in reductions or r.name in before for r in readers):
            before.add(node.name)
    found = dict.fromkeys(after & before, "it stands between sensitive operators")
    for node in nodes:
        sources = [source for name in node.input if (source := made_by(name)) is not None]
        if node.op_type in ELEMENTWISE and any(source.op_type in sums for source in sources):
            found[node.name] = "it reads a sum, which may be more than 16 bits hold"
    return found


def _before_recurrent(graph: Graph, policy: PrecisionPolicy) -> dict[str, str]:
    """Why each node that makes what an FP32 recurrent node reads stays in FP32 too, by its name.

    A cast before a recurrent node, with at most a change of layout between, fails a build (TensorRT-RTX 1.7; measured).
    """
    readers = [
        node
        for node in graph.nodes
        if node.op_type in RECURRENT and (node.op_type in policy.sensitive or node.name in policy.keep)
    ]
    found: dict[str, str] = {}
    while readers:
        for name in readers.pop().input:
            source = graph.producers.get(name)
            if source is None or source.name in found:
                continue
            found[source.name] = "a recurrent node reads what it makes, and TensorRT takes no cast before one"
            if source.op_type in LAYOUT:
                readers.append(source)
    return found


def _narrowed(values: Any, word: str) -> Any:
    import ml_dtypes

    with np.errstate(over="ignore"):  # infinities stay; finite values that do not fit were looked for before
        return values.astype(np.float16 if word == "fp16" else ml_dtypes.bfloat16)
