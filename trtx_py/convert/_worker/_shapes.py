"""When ONNX's shape inference may follow values too. Runs in other interpreters, and in the mock: imports nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

#: Entries of a vector. What carries shapes has a few; half a million take 0.2 s and 90 MB.
_LONGEST = 1 << 19


def follows_values(model: Any) -> bool:
    """``data_prop=`` for a model: false if one of its vectors is long.

    Propagation makes an object for each entry of a vector that it meets, whatever is in it: 2.2 GB for 16 million
    samples of sound, and no end of memory for a model of a hundred bytes that declares 2**31 of them.
    """
    return all(length <= _LONGEST for length in _lengths(model.graph))


def _lengths(graph: Any) -> Iterator[int]:
    for values in (graph.input, graph.output, graph.value_info):
        for value in values:
            dims = value.type.tensor_type.shape.dim
            if len(dims) == 1:
                yield dims[0].dim_value  # 0 where it has a name or nothing
    for tensor in graph.initializer:
        if len(tensor.dims) == 1:
            yield tensor.dims[0]
