"""Output shapes for concrete input shapes and shape-tensor values."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from trtx_py._types import Array, Shape, TensorInfo, TensorMode

from ._dtypes import tensor_dims, trt_type
from ._graph import all_nodes, data_dependent, without_weights
from ._numerics import Numerics

if TYPE_CHECKING:
    import onnx

__all__ = ["ShapeResolver", "infer"]

_CACHED = 512
_Key = tuple[tuple[str, Shape | None, bytes | None], ...]


def infer(model: onnx.ModelProto, *, strict: bool = False) -> onnx.ModelProto:
    """ONNX shape inference with value propagation, where no vector is too long for that.

    With ``strict`` it raises onnx.shape_inference.InferenceError.
    """
    from onnx import shape_inference

    return shape_inference.infer_shapes(model, check_type=strict, strict_mode=strict, data_prop=_follows_values(model))


def _follows_values(model: onnx.ModelProto) -> bool:
    from trtx_py.convert._worker._shapes import follows_values  # not at the top: it brings what converts models

    return follows_values(model)


class ShapeResolver:
    """Shapes of one model's outputs. Thread-safe; remembers the latest few hundred answers.

    Args:
        model: with weights.
        tensors: I/O as the engine declares it; the rank of an output comes from here.
        numerics: asked to run on zeros where inference leaves a hole that does not depend on data; None forbids that.
    """

    def __init__(self, model: onnx.ModelProto, tensors: tuple[TensorInfo, ...], numerics: Numerics | None) -> None:
        self._light = without_weights(model)
        self._inputs = {t.name: t for t in tensors if t.mode is TensorMode.INPUT}
        self._outputs = {t.name: t for t in tensors if t.mode is TensorMode.OUTPUT}
        self._dependent = data_dependent(model.graph)
        self._branches = any(node.op_type in ("If", "Loop") for node in all_nodes(model.graph.node))
        self._numerics = numerics
        self._lock = threading.Lock()
        self._known: OrderedDict[_Key, dict[str, Shape]] = OrderedDict()

    def resolve(self, shapes: Mapping[str, Shape | None], values: Mapping[str, Array]) -> dict[str, Shape]:
        """Shape of each output; -1 where it depends on data or on an input whose shape is None or incomplete.

        Args:
            shapes: by input name; None for an input that has no shape yet.
            values: of shape tensors, as far as they are known.
        Raises ValueError if the shapes contradict each other somewhere in the model.
        """
        key = tuple(
            (name, shapes.get(name), values[name].tobytes() if name in values else None) for name in self._inputs
        )
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return dict(self._known[key])
        found = self._compute(shapes, values)
        with self._lock:
            self._known[key] = found
            if len(self._known) > _CACHED:
                self._known.popitem(last=False)
        return dict(found)

    def working_set_bytes(self, shapes: Mapping[str, Shape | None], values: Mapping[str, Array]) -> int:
        """Estimate of a context's activation memory: the most that the intermediates around one node take.

        Tensors that inference cannot size count as nothing; TensorRT's own figure also has its tactics' scratch.
        """
        inferred = infer(self._fixed(shapes, values))
        sizes: dict[str, int] = {}
        for value in inferred.graph.value_info:
            dims = tensor_dims(value.type.tensor_type)
            dtype = trt_type(value.type.tensor_type.elem_type)
            if dims is None or dtype is None:
                continue
            count = 1
            for dim in dims:
                count *= dim if isinstance(dim, int) else 0
            sizes[value.name] = -(-((count * dtype.bits + 7) // 8) // 512) * 512
        names = ({*node.input, *node.output} for node in inferred.graph.node)
        return max((sum(sizes.get(name, 0) for name in group) for group in names), default=0)

    def _fixed(self, shapes: Mapping[str, Shape | None], values: Mapping[str, Array]) -> onnx.ModelProto:
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self._light)
        graph = model.graph
        for value in list(graph.input):
            if value.name not in self._inputs:
                continue
            if value.name in values:
                elem = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
                graph.initializer.append(onnx.numpy_helper.from_array(values[value.name].astype(elem), value.name))
                graph.input.remove(value)
                continue
            shape = shapes.get(value.name)
            if shape is not None:
                for position, size in enumerate(shape):
                    if size >= 0:
                        value.type.tensor_type.shape.dim[position].dim_value = size
        for output in graph.output:
            # declared sizes are hints for people; only what follows from the inputs counts here
            output.type.tensor_type.ClearField("shape")
        return model

    def _compute(self, shapes: Mapping[str, Shape | None], values: Mapping[str, Array]) -> dict[str, Shape]:
        from onnx import shape_inference

        fixed = self._fixed(shapes, values)
        complete = all(name in values or self._is_complete(info, shapes) for name, info in self._inputs.items())
        try:
            inferred = shape_inference.infer_shapes(fixed, strict_mode=complete, data_prop=_follows_values(fixed))
        except shape_inference.InferenceError as error:
            # strict inference also fails on sound models, inside operators that are functions: running decides
            if self._numerics is None:
                raise ValueError(" ".join(str(error).split())) from error
            return self._dry_run(shapes, values)
        results: dict[str, Shape] = {}
        for output in inferred.graph.output:
            dims = tensor_dims(output.type.tensor_type)
            declared = self._outputs[output.name].shape
            if dims is None:
                dims = (None,) * len(declared)
            if len(dims) == len(declared):
                dims = tuple(
                    d if isinstance(d, int) else (s if s >= 0 else d) for d, s in zip(dims, declared, strict=True)
                )
            results[output.name] = tuple(d if isinstance(d, int) else -1 for d in dims)
        holes = [n for n, shape in results.items() if -1 in shape and n not in self._dependent]
        # Zeros may take another branch, or another number of turns, than the inputs will.
        if complete and self._numerics is not None and not self._branches and (holes or values):
            # With shape tensors this is also the check that their values make sense (a Reshape of 6 elements to 4 x 4),
            # which TensorRT makes before it enqueues anything and shape inference does not make at all.
            ran = self._dry_run(shapes, values)
            results.update({name: ran[name] for name in holes})
        return results

    @staticmethod
    def _is_complete(info: TensorInfo, shapes: Mapping[str, Shape | None]) -> bool:
        """True if nothing about this input is missing; a shape tensor without values always misses something."""
        shape = shapes.get(info.name)
        return shape is not None and min(shape, default=0) >= 0 and not info.is_shape_tensor

    def _dry_run(self, shapes: Mapping[str, Shape | None], values: Mapping[str, Array]) -> dict[str, Shape]:
        if self._numerics is None:
            raise ValueError("the shape of an output cannot be computed without running the model")
        feeds: dict[str, Array] = {}
        for name, info in self._inputs.items():
            dtype = info.dtype.numpy
            shape = shapes.get(name) or ()
            feeds[name] = values[name] if name in values else np.zeros(shape, dtype)
        try:
            return {name: array.shape for name, array in self._numerics.run(feeds).items()}
        except Exception as error:  # the runners' exceptions share no base
            raise ValueError(f"the model cannot run with these shapes: {error}") from error
