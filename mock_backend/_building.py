"""A network that is built layer by layer, for the mock: lowered to ONNX, and typed and shaped by ONNX as it grows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtx_py._errors import BuilderError, TrtxError
from trtx_py._types import DataType
from trtx_py.network import TABLE, LayerRequest, OnnxGraph, TensorFacts

from ._dtypes import Dim, tensor_dims, trt_type
from ._shapes import infer

if TYPE_CHECKING:
    import onnx

__all__ = ["LayerGraph"]

_LIGHT_ELEMENTS = 256


class LayerGraph:
    """The ONNX graph of the layers so far, and what each of its tensors is.

    Attributes:
        outputs: the marked tensors, by the names that they are to have.
    """

    def __init__(self) -> None:
        self._graph = OnnxGraph()
        self._types: dict[str, onnx.ValueInfoProto] = {}
        self._small: dict[str, onnx.TensorProto] = {}
        #: For each tensor that shapes are computed with, the node that makes it.
        self._makers: dict[str, onnx.NodeProto] = {}
        self.outputs: dict[str, TensorFacts] = {}

    def add_input(self, facts: TensorFacts) -> None:
        self._graph.add_input(facts)
        value = self._graph.inputs[-1]
        self._types[facts.name] = value

    def add_layer(self, request: LayerRequest) -> tuple[TensorFacts, ...]:
        """Raises BuilderError for a layer that contradicts itself."""
        nodes, weights = len(self._graph.nodes), len(self._graph.initializers)
        self._graph.begin(request)
        try:
            TABLE[request.kind].lower(self._graph, request)
            self._keep_weights(self._graph.initializers[weights:])
            self._infer(self._graph.nodes[nodes:])
            if request.kind == "topk":
                self._keep_dims_of_topk(request)
            return tuple(self._facts(name) for name in request.outputs)
        except TrtxError:
            raise
        except Exception as error:  # of onnx's own kinds, which share no base
            raise BuilderError(f"{request} does not fit its inputs: {' '.join(str(error).split())}") from error

    def model(self, name: str) -> onnx.ModelProto:
        return self._graph.model(self.outputs, name)

    @property
    def num_layers(self) -> int:
        return len(self._graph.nodes)

    def _keep_weights(self, tensors: list[onnx.TensorProto]) -> None:
        import onnx

        for tensor in tensors:
            count = 1
            for n in tensor.dims:
                count *= n
            if count <= _LIGHT_ELEMENTS:
                self._small[tensor.name] = tensor
            self._types[tensor.name] = onnx.helper.make_tensor_value_info(
                tensor.name, tensor.data_type, list(tensor.dims)
            )

    def _infer(self, nodes: list[onnx.NodeProto]) -> None:
        """Types of what new nodes make: they alone are looked at, and what computes the shapes that they use."""
        import onnx

        made = {name for node in nodes for name in node.output}
        before = self._shape_nodes([name for node in nodes for name in node.input if name])
        everything = [*before, *nodes]
        inner = made | {name for node in before for name in node.output}
        outer = dict.fromkeys(name for node in everything for name in node.input if name and name not in inner)
        graph = onnx.helper.make_graph(
            everything,
            "layer",
            [self._types[name] for name in outer if name not in self._small],
            [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(n for node in nodes for n in node.output)],
            [self._small[name] for name in outer if name in self._small],
        )
        found = infer(self._graph.envelope(graph), strict=True).graph
        for value in (*found.value_info, *found.output):
            if value.name in made:
                self._types[value.name] = value
        for node in nodes:
            self._makers.update((name, node) for name in node.output if self._is_small_integer(name))

    def _keep_dims_of_topk(self, request: LayerRequest) -> None:
        """ONNX forgets all dimensions of a TopK along an axis that is known at run time only; TensorRT does not."""
        for name in request.outputs:
            dims = self._types[name].type.tensor_type.shape.dim
            given = self._types[request.input.name].type.tensor_type.shape.dim
            for axis, dim in enumerate(dims):
                if axis == request["axis"]:
                    dim.dim_value = request["k"]
                else:
                    dim.CopyFrom(given[axis])

    def _shape_nodes(self, names: list[str]) -> list[onnx.NodeProto]:
        """The nodes behind tensors that shapes are computed with, in the order in which they were added."""
        found: dict[int, onnx.NodeProto] = {}
        wanted = list(names)
        while wanted:
            node = self._makers.get(wanted.pop())
            if node is not None and id(node) not in found:
                found[id(node)] = node
                wanted.extend(node.input)
        return [node for node in self._graph.nodes if id(node) in found]

    def _is_small_integer(self, name: str) -> bool:
        facts = self._facts(name)
        return facts.dtype in (DataType.INT64, DataType.INT32) and facts.rank <= 1

    def _facts(self, name: str) -> TensorFacts:
        tensor = self._types[name].type.tensor_type if name in self._types else None
        dtype = trt_type(tensor.elem_type) if tensor is not None else None
        dims: tuple[Dim, ...] | None = tensor_dims(tensor) if tensor is not None else None
        if dtype is None or dims is None:
            raise BuilderError(f"type or rank of {name!r} cannot be told from its layer's inputs")
        return TensorFacts(name, dtype, tuple(n if isinstance(n, int) else -1 for n in dims))
