"""An ONNX model that is being rewritten: names, types, who reads what, and its weights as arrays."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .._errors import PrecisionError
from .._types import Array
from ._policy import RECURRENT

if TYPE_CHECKING:
    import onnx

#: Weights of more elements stand as inputs while types and opsets are worked out; smaller ones may decide a shape.
_LIGHT_ELEMENTS = 256
_STANDARD = ("", "ai.onnx")
#: The first IR version that may hold the types of an opset.
_IR_OF_OPSET = ((19, 9), (21, 10), (23, 11))


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The branches and bodies of a node of control flow."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _names_read(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield from node.input
        for inner in subgraphs(node):
            yield from _names_read(inner)
    for value in graph.output:  # a branch may hand out a tensor from outside as it is
        yield value.name


def whole_nodes(graph: onnx.GraphProto) -> frozenset[str]:
    """Names of the recurrent nodes and those of control flow, with all nodes inside: no conversion enters them."""
    found: set[str] = set()
    for node in graph.node:
        inner = [whole_nodes(body) | {n.name for n in body.node} for body in subgraphs(node)]
        if inner or node.op_type in RECURRENT:
            found |= {node.name}.union(*inner)
    return frozenset(found)


class Graph:
    """A copy of a model whose main graph can be rewritten.

    Constants of the main graph become initializers, local functions the nodes in them, and every node has a name.
    Nodes inside control flow are left as they are; what they read from outside is in ``captured``.

    Attributes:
        model: the copy.
        types: ONNX element type by tensor name; what could not be inferred is missing.
        ranks: number of dimensions by tensor name, where it is known.
        initializers: by name.
        consumers: nodes of the main graph that read a tensor, by its name.
        producers: the node of the main graph that makes a tensor, by its name.
        captured: tensors that subgraphs read.
        outputs: names of the graph's outputs.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx

        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        if self.model.functions:
            self._inline_functions()
        self._fold_constants()
        self._name_nodes()
        self._refresh()

    def _inline_functions(self) -> None:
        import onnx
        from onnx import inliner

        self.initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        try:
            flat = inliner.inline_local_functions(self._light(), convert_version=True)
        except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
            raise PrecisionError(
                f"the model's local functions cannot be put in place ({' '.join(str(error).split())[:300]}); inline "
                "them with onnx.inliner before the build"
            ) from error
        model = self.model
        for field, found in (("opset_import", flat.opset_import), ("functions", flat.functions)):
            model.ClearField(field)
            getattr(model, field).extend(found)
        del model.graph.node[:], model.graph.value_info[:]
        model.graph.node.extend(flat.graph.node)

    def _fold_constants(self) -> None:
        graph = self.model.graph
        results = {value.name for value in graph.output}
        kept = []
        for node in graph.node:
            tensor = next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)
            if node.op_type != "Constant" or tensor is None or node.output[0] in results:
                kept.append(node)
                continue
            folded = graph.initializer.add()
            folded.CopyFrom(tensor)
            folded.name = node.output[0]
        if len(kept) != len(graph.node):
            del graph.node[:]
            graph.node.extend(kept)
            self.model.ir_version = max(self.model.ir_version, 4)  # before it, weights had to be inputs too

    def _name_nodes(self) -> None:
        taken = {node.name for node in self.model.graph.node}
        seen: set[str] = set()
        for index, node in enumerate(self.model.graph.node):
            if not node.name or node.name in seen:
                name = f"{node.op_type}_{index}"
                while name in taken:
                    name += "_"
                node.name = name
                taken.add(name)
            seen.add(node.name)

    def _refresh(self) -> None:
        graph = self.model.graph
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self.producers: dict[str, onnx.NodeProto] = {}
        self.captured: set[str] = set()
        for node in graph.node:
            for name in node.input:
                self.consumers[name].append(node)
            for name in node.output:
                self.producers[name] = node
            for inner in subgraphs(node):
                self.captured.update(_names_read(inner))
        self.types, self.ranks = self._infer()

    def _infer(self) -> tuple[dict[str, int], dict[str, int]]:
        import onnx

        graph = self.model.graph
        types = {name: tensor.data_type for name, tensor in self.initializers.items()}
        ranks = {name: len(tensor.dims) for name, tensor in self.initializers.items()}
        found = onnx.shape_inference.infer_shapes(self._light()).graph
        for value in (*found.value_info, *found.output, *graph.input):
            if value.type.tensor_type.elem_type:
                types[value.name] = value.type.tensor_type.elem_type
                if value.type.tensor_type.HasField("shape"):
                    ranks[value.name] = len(value.type.tensor_type.shape.dim)
        return types, ranks

    def _light(self) -> onnx.ModelProto:
        """The model without its large weights, which are inputs of it: cheap to copy, and within protobuf's 2 GiB."""
        import onnx

        light = onnx.ModelProto()
        light.ir_version = max(self.model.ir_version, 4)
        light.opset_import.extend(self.model.opset_import)
        light.functions.extend(self.model.functions)
        graph = self.model.graph
        light.graph.name = graph.name or "graph"
        light.graph.node.extend(graph.node)
        light.graph.output.extend(graph.output)
        light.graph.input.extend(value for value in graph.input if value.name not in self.initializers)
        for name, tensor in self.initializers.items():
            if math.prod(tensor.dims) <= _LIGHT_ELEMENTS:
                light.graph.initializer.append(tensor)
            else:
                light.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
        return light

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """Nodes of the main graph, in order."""
        return list(self.model.graph.node)

    @property
    def opset(self) -> int:
        """Version of the standard operators that the model is written in."""
        return max((o.version for o in self.model.opset_import if o.domain in _STANDARD), default=1)

    def raise_opset(self, wanted: int, why: str) -> None:
        """Rewrite the model for a later opset, if its own is earlier. Raises PrecisionError where that fails."""
        import onnx
        from onnx import version_converter

        if self.opset < wanted:
            light = self._light()
            stand_ins = {v.name for v in light.graph.input} & self.initializers.keys()
            try:
                newer = version_converter.convert_version(light, wanted)
            except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
                raise PrecisionError(
                    f"the model is of opset {self.opset}, {why} needs opset {wanted}, and onnx's converter could not "
                    f"rewrite it ({' '.join(str(error).split())[:300]}); export the model with opset {wanted} or later"
                ) from error
            large = [tensor for name, tensor in self.initializers.items() if name in stand_ins]
            inputs = [value for value in newer.graph.input if value.name not in stand_ins]
            del newer.graph.input[:], newer.graph.value_info[:]
            newer.graph.input.extend(inputs)
            newer.graph.initializer.extend(large)
            others = [o for o in self.model.opset_import if o.domain not in _STANDARD]
            newer.opset_import.extend(o for o in others if o.domain not in {n.domain for n in newer.opset_import})
            newer.metadata_props.extend(self.model.metadata_props)
            self.model = newer
            self._fold_constants()
            self._name_nodes()
        for opset, ir_version in _IR_OF_OPSET:
            if wanted >= opset:
                self.model.ir_version = max(self.model.ir_version, ir_version)
        self._refresh()

    def array(self, name: str) -> Array:
        """An initializer's values."""
        from onnx import numpy_helper

        values: Array = numpy_helper.to_array(self.initializers[name])
        return values

    def unused(self, name: str) -> str:
        """``name``, or with a number behind it if there is such a tensor already; taken from now on."""
        candidate, number = name, 1
        while candidate in self.types or candidate in self.producers or candidate in self.consumers:
            number += 1
            candidate = f"{name}_{number}"
        self.types[candidate] = 0
        return candidate

    def add_initializer(self, name: str, values: Array | onnx.TensorProto) -> None:
        """Add a weight."""
        from onnx import numpy_helper

        tensor = numpy_helper.from_array(values, name) if isinstance(values, np.ndarray) else values
        tensor.name = name
        self.model.graph.initializer.append(tensor)
        self.initializers[name] = tensor
        self.types[name] = tensor.data_type

    def finish(self, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
        """The model with these nodes, without weights that nothing reads and without notes on inner types."""
        import onnx

        graph = self.model.graph
        copies = []
        for node in nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copies.append(copy)
        del graph.node[:], graph.value_info[:]
        graph.node.extend(copies)
        read = set(_names_read(graph))
        kept = [tensor for tensor in graph.initializer if tensor.name in read]
        if len(kept) != len(graph.initializer):
            # Popping from the end keeps references into the list valid, and copies no weights.
            for index in range(len(graph.initializer) - 1, -1, -1):
                if graph.initializer[index].name not in read:
                    del graph.initializer[index]
        gone = self.initializers.keys() - read
        inputs = [value for value in graph.input if value.name not in gone]
        if len(inputs) != len(graph.input):
            copied = [_copied(value) for value in inputs]
            del graph.input[:]
            graph.input.extend(copied)
        return self.model


def _copied(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def is_standard(node: onnx.NodeProto) -> bool:
    """The node's operator is one of ONNX itself."""
    return node.domain in _STANDARD
