"""ONNX models with integer types that TensorRT lacks, retyped to ones that carry them.

uint32 and uint64 become int64; int8, uint8, int4 and uint4 become int32. The whole graph changes, not its borders only:
TensorRT would refuse every operator in between. Results that do not fit the type they stand for are found when they
are handed over; nothing wraps around silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .._errors import ParserError
from .._onnx_source import _fields
from ._dtypes import CARRIERS, DType

if TYPE_CHECKING:
    import onnx

#: The numbers of onnx.TensorProto.DataType.
_ONNX = {
    DType.FLOAT32: 1, DType.FLOAT16: 10, DType.INT32: 6, DType.UINT32: 12, DType.INT64: 7, DType.UINT64: 13,
    DType.INT8: 3, DType.UINT8: 2, DType.INT4: 22, DType.UINT4: 21, DType.BOOL: 9, DType.BFLOAT16: 16,
    DType.FLOAT8: 17,
}  # fmt: skip
_OF_ONNX = {number: dtype for dtype, number in _ONNX.items()}
_INT = 2  # onnx.AttributeProto.INT
#: Operators to which 8- and 4-bit types mean quantization: TensorRT has those types for them.
_QUANTIZED = frozenset(
    {
        "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger",
        "ConvInteger", "MatMulNBits", "TRT_INT4DequantizeLinear", "TRT_INT4QuantizeLinear",
    }
)  # fmt: skip
#: Attributes that hold an element type, whatever the operator.
_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "output_datatype"})


#: Operators whose results are numbers that they were given, or that are made by no arithmetic.
_MOVES = frozenset(
    """
    ArgMax ArgMin Clip Compress Concat Constant ConstantOfShape DepthToSpace Expand EyeLike Flatten Gather
    GatherElements GatherND Identity If Loop Max MaxPool Min NonZero OneHot Pad ReduceMax ReduceMin Relu Reshape
    ReverseSequence Scan Sign Slice SpaceToDepth Split Squeeze Tile TopK Transpose Trilu Unique Unsqueeze Where
    """.split()
)


def computes_in_8_bits(model: onnx.ModelProto) -> bool:
    """Whether 8-bit integers come out of arithmetic, or of casts that they may not fit, where nothing is quantized.

    What becomes of numbers that do not fit is then nothing to rely on, even where TensorRT takes such a model.
    """
    import onnx

    narrow = (_ONNX[DType.INT8], _ONNX[DType.UINT8])
    messages = list(_messages(model))
    if any(message.DESCRIPTOR.name == "NodeProto" and message.op_type in _QUANTIZED for message in messages):
        return False
    if not any(_type_of(message) in narrow for message in messages):
        return False
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return False  # the parser will say what is wrong with it
    messages = list(_messages(inferred))
    types = {
        message.name: message.type.tensor_type.elem_type
        for message in messages
        if message.DESCRIPTOR.name == "ValueInfoProto"
    }
    return any(
        message.op_type not in _MOVES and any(types.get(name) in narrow for name in message.output)
        for message in messages
        if message.DESCRIPTOR.name == "NodeProto"
    )


def _type_of(message: Any) -> int:
    """The element type that a message tells of; 0 if it tells of none."""
    kind = message.DESCRIPTOR.name
    if kind == "TensorProto":
        return int(message.data_type)
    if kind == "Tensor":  # of TypeProto
        return int(message.elem_type)
    return int(message.i) if kind == "AttributeProto" and message.name in _TYPE_ATTRIBUTES else 0


def io_types(model: onnx.ModelProto) -> dict[str, DType]:
    """What the model calls the types of its inputs and outputs, by name; without those that the C ABI has not."""
    values = (*model.graph.input, *model.graph.output)
    found = {value.name: _OF_ONNX.get(value.type.tensor_type.elem_type) for value in values}
    return {name: dtype for name, dtype in found.items() if dtype is not None}


def carry(model: onnx.ModelProto) -> bool:
    """Retype the model, all of whose weights are inside, in place; False if there is nothing to retype.

    Where something is quantized, 8- and 4-bit types stay what they are. Raises OverflowError for a constant of uint64
    that int64 cannot hold, ParserError for one whose elements are fewer or more than its shape says.
    """
    messages = list(_messages(model))
    nodes = [message for message in messages if message.DESCRIPTOR.name == "NodeProto"]
    quantized = any(node.op_type in _QUANTIZED for node in nodes)
    carriers = {
        _ONNX[dtype]: carrier
        for dtype, carrier in CARRIERS.items()
        if not quantized or dtype in (DType.UINT32, DType.UINT64)
    }
    names = _type_attributes(messages)
    changed = False
    for message in messages:
        kind = message.DESCRIPTOR.name
        if kind == "TensorProto" and message.data_type in carriers:
            _retype_tensor(message, carriers[message.data_type])
        elif kind in ("Tensor", "SparseTensor") and message.elem_type in carriers:  # of TypeProto
            message.elem_type = _ONNX[carriers[message.elem_type]]
        elif kind == "AttributeProto" and message.type == _INT and message.name in names and message.i in carriers:
            message.i = _ONNX[carriers[message.i]]
        else:
            continue
        changed = True
    return changed


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, repeated in _fields(message)[1]:
        if repeated:
            for part in getattr(message, field):
                yield from _messages(part)
        elif message.HasField(field):
            yield from _messages(getattr(message, field))


def _type_attributes(messages: list[Any]) -> frozenset[str]:
    """Names of attributes that hold types, those of functions too, which hand theirs on under other names."""
    names = _TYPE_ATTRIBUTES
    while True:
        handed_on = {
            message.ref_attr_name
            for message in messages
            if message.DESCRIPTOR.name == "AttributeProto" and message.ref_attr_name and message.name in names
        }
        if handed_on <= names:
            return names
        names |= handed_on


def _retype_tensor(tensor: onnx.TensorProto, carrier: DType) -> None:
    from onnx import numpy_helper

    try:
        values = np.asarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError) as error:
        raise ParserError(f"tensor {tensor.name!r} is damaged: {error}; export the model again") from error
    limit = np.iinfo(carrier.numpy).max
    if values.dtype == np.uint64 and values.size and int(values.max()) > limit:
        raise OverflowError(f"tensor {tensor.name!r} holds {int(values.max())}, which {carrier.numpy} cannot hold")
    made = numpy_helper.from_array(values.astype(carrier.numpy).reshape(values.shape), tensor.name)
    made.doc_string = tensor.doc_string
    tensor.CopyFrom(made)


def carried_types(own: Mapping[str, DType], engine: Mapping[str, DType]) -> dict[str, DType]:
    """The types that tensors stand for, of those that the engine has in a carrier."""
    return {name: dtype for name, dtype in own.items() if name in engine and CARRIERS.get(dtype) is engine[name]}
