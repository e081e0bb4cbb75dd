"""The mock's refitter: new values for the weights of the model in the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trtx_py._errors import DTypeError, EngineError, ShapeError
from trtx_py._types import Array, DataType

from ._dtypes import trt_type
from ._seam import LiveObject, Seam

if TYPE_CHECKING:
    import onnx

    from ._engine import MockEngine

__all__ = ["MockRefitter"]

_REAL = frozenset({DataType.FLOAT, DataType.HALF, DataType.BF16})


def _error(text: str, log: tuple[str, ...]) -> EngineError:
    return EngineError(text, tensorrt_log=log)


def _described(tensor: onnx.TensorProto) -> str:
    dtype = trt_type(tensor.data_type)
    return f"{list(tensor.dims)} of {dtype.value if dtype else 'another type'}"


class MockRefitter(LiveObject):
    """BackendRefitter. Weights are the floating-point initializers; all that are not given stay.

    Args:
        marked: names of the only ones that can be changed; None is all.
    """

    kind = "refitter"

    def __init__(self, seam: Seam, engine: MockEngine, model: onnx.ModelProto, marked: Sequence[str] | None) -> None:
        super().__init__(seam, engine)
        self._engine = engine
        self._weights = {
            t.name: t
            for t in model.graph.initializer
            if trt_type(t.data_type) in _REAL and (marked is None or t.name in marked)
        }
        self._given: dict[str, Array] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._weights)

    @property
    def missing(self) -> tuple[str, ...]:
        return ()

    def set_weights(self, name: str, array: Array) -> None:
        tensor = self._weights[name]
        wanted, found = trt_type(tensor.data_type), DataType.from_numpy(array.dtype)
        if wanted is not found:
            raise DTypeError(f"weights {name!r} are {found.name}; expected {wanted.name if wanted else 'another type'}")
        count = int(np.prod(tensor.dims, dtype=np.int64))
        if array.size != count:
            raise ShapeError(f"weights {name!r} have {array.size} elements; expected {count}")
        self._given[name] = array

    def set_onnx(self, model: bytes, directory: str | None) -> None:
        """The weights of the same names. Raises EngineError for a model that lacks one, or has another shape."""
        import onnx

        other = onnx.ModelProto()
        other.ParseFromString(model)
        found = {tensor.name: tensor for tensor in other.graph.initializer}
        for name, tensor in self._weights.items():
            other_one = found.get(name)
            if other_one is None or _described(other_one) != _described(tensor):
                here = "nothing" if other_one is None else _described(other_one)
                raise EngineError(
                    f"the ONNX model does not match the engine: {name!r} has {_described(tensor)} there, {here} here"
                )
        for name in self._weights:
            self._given[name] = onnx.numpy_helper.to_array(found[name], directory or "")

    def refit(self) -> None:
        self._alive("refit", _error)
        self._seam.enter("refit", _error)
        for name, array in self._given.items():
            tensor = self._weights[name]
            for field in ("float_data", "int32_data"):
                tensor.ClearField(field)
            tensor.raw_data = array.tobytes()
        self._given = {}
        self._engine.take_weights()
