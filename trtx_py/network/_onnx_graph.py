"""An ONNX graph in the making: what a network's layers are lowered to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._errors import InvalidArgumentError
from .._types import Array, DataType
from ._definition import LayerRequest, TensorFacts

if TYPE_CHECKING:
    import onnx

#: The version of ONNX's operators that layers are lowered to: the first with INT4, and with blocks of Q/DQ.
OPSET = 21
_IR_VERSION = 10
_MOST_NUMBERS = 1 << 26  # that are worked out at once: 512 MB as INT64
_MAX_BYTES = (2 << 30) - (1 << 20)  # a protobuf message ends at 2 GiB

_ELEMENT_TYPES = {
    DataType.FLOAT: "FLOAT", DataType.HALF: "FLOAT16", DataType.BF16: "BFLOAT16", DataType.INT8: "INT8",
    DataType.INT32: "INT32", DataType.INT64: "INT64", DataType.BOOL: "BOOL", DataType.UINT8: "UINT8",
    DataType.FP8: "FLOAT8E4M3FN", DataType.INT4: "INT4",
}  # fmt: skip


def element_type(dtype: DataType) -> int:
    """ONNX's number for a type. Raises InvalidArgumentError for one that opset 21 does not have."""
    import onnx

    if dtype not in _ELEMENT_TYPES:
        raise InvalidArgumentError(
            f"{dtype.value} has no type in ONNX opset {OPSET}, which a network of layers is written in; "
            f"it has {', '.join(known.value for known in _ELEMENT_TYPES)}"
        )
    return int(getattr(onnx.TensorProto, _ELEMENT_TYPES[dtype]))


def packed_bytes(array: Array, dtype: DataType) -> bytes:
    """The elements as ONNX and TensorRT keep them: 4-bit ones two to a byte, the first in the low half."""
    if dtype is not DataType.INT4:
        return array.tobytes()
    nibbles = array.reshape(-1).astype(np.int8).view(np.uint8) & 0x0F
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    return (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8).tobytes()


class OnnxGraph:
    """Nodes and weights, in the order in which layers were added.

    Attributes:
        nodes, initializers, inputs: as ModelProto has them.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self._layer = ""
        self._fresh = 0

    def add_input(self, facts: TensorFacts) -> None:
        import onnx

        dims = [n if n >= 0 else f"{facts.name}_{axis}" for axis, n in enumerate(facts.shape)]
        self.inputs.append(onnx.helper.make_tensor_value_info(facts.name, element_type(facts.dtype), dims))

    def begin(self, request: LayerRequest) -> None:
        """What is added from here on belongs to this layer."""
        self._layer = request.name
        self._fresh = 0

    def node(
        self, operator: str, inputs: Sequence[str], outputs: str | Sequence[str] | None = None, **attributes: Any
    ) -> str:
        """Add a node; the name of its first output, which is a new one where ``outputs`` is None.

        Attributes that are None are left out.
        """
        import onnx

        names = [outputs] if isinstance(outputs, str) else list(outputs) if outputs is not None else [self.fresh()]
        given = {key: value for key, value in attributes.items() if value is not None}
        made = onnx.helper.make_node(operator, list(inputs), names, name=f"{self._layer}//{len(self.nodes)}", **given)
        self.nodes.append(made)
        return names[0]

    def fresh(self) -> str:
        """A name that no tensor has."""
        self._fresh += 1
        return f"{self._layer}//t{self._fresh}"

    def constant(self, array: Array, name: str | None = None) -> str:
        """An initializer; its name."""
        import onnx

        dtype = DataType.from_numpy(array.dtype)
        tensor = onnx.TensorProto()
        tensor.name = name or self.fresh()
        tensor.data_type = element_type(dtype)
        tensor.dims.extend(array.shape)
        tensor.raw_data = packed_bytes(array, dtype)
        self.initializers.append(tensor)
        return tensor.name

    def check_size(self, shape: Sequence[int], what: str) -> None:
        """Raise InvalidArgumentError for numbers that are worked out now and do not fit into a model."""
        count = math.prod(shape)
        if count > _MOST_NUMBERS:
            raise InvalidArgumentError(
                f"layer {self._layer!r}: {what} of {list(shape)} is {count} numbers, and as ONNX, which the mock "
                f"computes with, they would all be in the model; expected {_MOST_NUMBERS} at most"
            )

    def ints(self, values: Iterable[int]) -> str:
        """A one-dimensional INT64 initializer."""
        return self.constant(np.array(list(values), np.int64))

    def scalar(self, value: float, dtype: DataType) -> str:
        return self.constant(np.array(value, dtype.numpy))

    def cast(self, tensor: str, dtype: DataType, output: str | None = None) -> str:
        return self.node("Cast", [tensor], output, to=element_type(dtype))

    def model(self, outputs: Mapping[str, TensorFacts], graph_name: str) -> onnx.ModelProto:
        """The model with these outputs, by the names that they are to have.

        Dimensions that only the run decides get a name of their own.
        """
        import onnx

        renamed = {facts.name: name for name, facts in outputs.items()}
        model = self.envelope(None)
        graph = model.graph
        graph.name = graph_name
        graph.input.extend(self.inputs)
        made_by_nodes = {name for node in self.nodes for name in node.output}
        for node in self.nodes:
            graph.node.append(node)
            for names in (graph.node[-1].input, graph.node[-1].output):
                for index, name in enumerate(names):
                    if name in renamed and name in made_by_nodes:
                        names[index] = renamed[name]
        graph.initializer.extend(self.initializers)
        for name, facts in outputs.items():
            if facts.name not in made_by_nodes:  # a constant, which cannot be an output by itself everywhere
                graph.node.append(onnx.helper.make_node("Identity", [facts.name], [name]))
            dims = [n if n >= 0 else f"{name}_{axis}" for axis, n in enumerate(facts.shape)]
            graph.output.append(onnx.helper.make_tensor_value_info(name, element_type(facts.dtype), dims))
        return model

    @staticmethod
    def envelope(graph: onnx.GraphProto | None) -> onnx.ModelProto:
        """A model of our version around a graph, or around an empty one."""
        import onnx

        model = onnx.ModelProto()
        model.ir_version = _IR_VERSION
        model.opset_import.append(onnx.helper.make_opsetid("", OPSET))
        if graph is not None:
            model.graph.CopyFrom(graph)
        return model


def serialized(model: onnx.ModelProto) -> bytes:
    """Raises InvalidArgumentError for more than one ModelProto can hold."""
    held = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if held > _MAX_BYTES:
        raise InvalidArgumentError(
            f"the network has {held} bytes of weights, and one ONNX model holds 2 GiB; "
            "parse a model with its weights in files beside it instead"
        )
    return bytes(model.SerializeToString(deterministic=True))
