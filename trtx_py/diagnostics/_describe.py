"""What a plan or an ONNX model is, without a GPU and without TensorRT."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

# Nothing that needs numpy is imported here: a diagnosis must be possible where that cannot be loaded.
if TYPE_CHECKING:
    from .._plan import PlanHeader
    from .._types import TensorInfo, TensorMode


@dataclass(frozen=True)
class ModelDescription:
    """A plan or an ONNX model.

    Attributes:
        path: of the file.
        kind: "plan" or "onnx".
        size_bytes: of the file.
        sha256: of a plan the checksum that it carries; of a model, with all its weights, what a plan built of it says.
        io_tensors: inputs and outputs; of a plan with the ranges of each profile. Empty for a raw plan.
        header: of a plan.
        operators: of a model: how many nodes of each operator.
        opsets: of a model, by domain; "" is ONNX's own.
        parameters: of a model: how many numbers its weights are.
        weights_by_type: of a model: how many of them are of each type.
        producer: what wrote the model.
    """

    path: str
    kind: str
    size_bytes: int
    sha256: str
    io_tensors: tuple[TensorInfo, ...]
    header: PlanHeader | None = None
    operators: Mapping[str, int] = field(default_factory=dict, hash=False)
    opsets: Mapping[str, int] = field(default_factory=dict, hash=False)
    parameters: int = 0
    weights_by_type: Mapping[str, int] = field(default_factory=dict, hash=False)
    producer: str = ""


def describe(path: str | os.PathLike[str]) -> ModelDescription:
    """Read a plan's header, or an ONNX model, and say what it is.

    Raises:
        PlanError, ParserError: it is damaged, or neither.
        InvalidArgumentError: it cannot be read.
    """
    from .._build import read_source
    from .._plan import Plan

    name = os.fspath(path)
    content = read_source(name)
    size = os.path.getsize(name)
    if isinstance(content, Plan):
        header = content.header
        return ModelDescription(name, "plan", size, content.sha256, header.io_tensors, header)
    return _describe_onnx(name, size)


def _describe_onnx(path: str, size: int) -> ModelDescription:
    import onnx

    from .._onnx_source import load_onnx
    from .._types import TensorMode

    source = load_onnx(path, None)
    model = onnx.ModelProto()
    model.ParseFromString(source.model)
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    types: Counter[str] = Counter()
    for tensor in graph.initializer:
        count = 1
        for n in tensor.dims:
            count *= n
        types[onnx.TensorProto.DataType.Name(tensor.data_type).lower()] += count
    tensors = [_tensor(value, TensorMode.INPUT) for value in graph.input if value.name not in weights]
    tensors += [_tensor(value, TensorMode.OUTPUT) for value in graph.output]
    return ModelDescription(
        path, "onnx", size, source.sha256, tuple(each for each in tensors if each is not None),
        operators=dict(Counter(node.op_type for node in graph.node).most_common()),
        opsets={each.domain: each.version for each in model.opset_import}, parameters=sum(types.values()),
        weights_by_type=dict(types), producer=" ".join(filter(None, [model.producer_name, model.producer_version])),
    )  # fmt: skip


_NAMES = {
    "FLOAT16": "HALF", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "FP8", "FLOAT4E2M1": "FP4",
    # Types that TensorRT narrows when it parses: what an engine takes.
    "DOUBLE": "FLOAT",
}  # fmt: skip


def _tensor(value: Any, mode: TensorMode) -> TensorInfo | None:
    """None for what TensorRT has no type for: strings, sequences."""
    import onnx

    from .._types import DataType, TensorInfo

    found = value.type.tensor_type
    name = onnx.TensorProto.DataType.Name(found.elem_type)
    dtype: Any = DataType.__members__.get(_NAMES.get(name, name))
    if dtype is None:
        return None
    shape = tuple(int(d.dim_value) if d.HasField("dim_value") else -1 for d in found.shape.dim)
    return TensorInfo(value.name, mode, dtype, shape)
