"""One-shot calls: arrays by name in, arrays out, each in the model's own type."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from .._arguments import checked_shape, closest
from .._types import Array, Shape, TensorInfo
from ._dtypes import checked_dtype, converted, packed, unpacked
from ._graph import Graph
from ._memory import address_of
from ._models import GraphOptions
from ._status import Status, StatusError

#: (name, type, dims, content)
Given = tuple[str, int, Shape, memoryview]
#: (name, type, dims, address, bytes)
Result = tuple[str, int, Shape, int, int]


def key_of(model: memoryview, weights: memoryview | None, options: GraphOptions) -> str:
    """What names a model that was opened with these options."""
    digest = hashlib.sha256(f"{model.nbytes} {options}\n".encode("utf-8", "surrogatepass"))
    digest.update(model)
    if weights is not None:
        digest.update(weights)
    return digest.hexdigest()


def run(graph: Graph, given: tuple[Given, ...] | None) -> tuple[list[Array], tuple[Result, ...]]:
    """Run on these inputs, or on zeros: the arrays that the results are in, and where.

    Raises StatusError, ShapeError, and as Engine.infer.
    """
    inputs = _zeros(graph) if given is None else _checked(graph, given)
    found = graph.engine.infer_sync(inputs)
    arrays, rows = [], []
    for tensor in graph.outputs:
        dtype = graph.dtype(tensor.name)
        array = packed(found[tensor.name], dtype, f"output {tensor.name!r}")
        arrays.append(array)
        rows.append((tensor.name, int(dtype), tuple(found[tensor.name].shape), address_of(array), array.nbytes))
    return arrays, tuple(rows)


def _zeros(graph: Graph) -> dict[str, Array]:
    return {tensor.name: _zero(tensor) for tensor in graph.inputs}


def _zero(tensor: TensorInfo) -> Array:
    """1 for every axis that is not fixed, or the least that the profile admits; of a shape tensor the least values."""
    limits = tensor.ranges[0] if tensor.ranges else None
    if tensor.is_shape_tensor and limits is not None:
        return np.array(limits.min, tensor.dtype.numpy).reshape(tensor.shape)
    least = limits.min if limits is not None else (0,) * len(tensor.shape)
    shape = [max(1, low) if extent < 0 else extent for extent, low in zip(tensor.shape, least, strict=True)]
    return np.zeros(shape, tensor.dtype.numpy)


def _checked(graph: Graph, given: tuple[Given, ...]) -> dict[str, Array]:
    known = {tensor.name for tensor in graph.inputs}
    arrays: dict[str, Array] = {}
    for name, number, dims, content in given:
        if name not in known:
            close = closest(name, known)
            hint = f"did you mean {close!r}?" if close else f"it has {', '.join(sorted(known)) or 'none'}"
            raise StatusError(Status.NOT_FOUND, f"the model has no input {name!r}; {hint}")
        if name in arrays:
            raise StatusError(Status.INVALID_ARGUMENT, f"input {name!r} is given twice")
        arrays[name] = _array(graph, name, number, dims, content)
    missing = known - arrays.keys()
    if missing:
        raise StatusError(Status.INVALID_ARGUMENT, f"inputs are missing: {', '.join(sorted(missing))}")
    return arrays


def _array(graph: Graph, name: str, number: int, dims: Shape, content: memoryview) -> Array:
    dtype, wanted = checked_dtype(number, name), graph.dtype(name)
    if dtype != wanted:
        raise StatusError(
            Status.DTYPE, f"input {name!r} is {dtype.name.lower()}; the model has {wanted.name.lower()} there"
        )
    shape = checked_shape(dims, f"shape of input {name!r}")
    if math.prod(max(n, 1) for n in shape) >= 1 << 60:
        raise StatusError(Status.SHAPE, f"input {name!r}: {shape} is more than an address space holds")
    elements = converted(unpacked(content, dtype, shape, name), graph.engine_dtype(name), f"input {name!r}")
    # An interrupt may end the call before the lane has read them, and the memory is the caller's.
    kept: Array = elements.copy()
    return kept
