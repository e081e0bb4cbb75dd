"""Changes the weights of an engine."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ..._errors import DTypeError, EngineError, ShapeError
from ..._types import Array, DataType
from ...network._onnx_graph import packed_bytes
from ..protocols import LogSink
from ._guards import alive, created
from ._vendor import Vendor


class Refitter:
    """Implements BackendRefitter.

    Source: nvinfer1::IRefitter, nvonnxparser::IParserRefitter
    """

    def __init__(self, vendor: Vendor, log: LogSink, engine: Any) -> None:
        self._vendor = vendor
        self._log = log
        self._engine: Any = engine
        if not engine.refittable:
            raise EngineError(
                "the plan's weights cannot be changed: it was built without BuilderOptions(refit=...); build it again"
            )
        with vendor.router.operation(log) as operation:
            handle = vendor.module.Refitter(engine, vendor.logger)
            if not created(handle, operation):
                raise EngineError(f"{vendor.title} could not create a refitter", tensorrt_log=operation.lines)
        self._handle: Any = handle
        self._kept: dict[str, list[Any]] = {}  # TensorRT has bare pointers to the arrays
        self._parsers: list[Any] = []  # own the weights that they have set, be it before they failed

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(alive(self._handle, "refitter").get_all_weights())

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(alive(self._handle, "refitter").get_missing_weights())

    def set_weights(self, name: str, array: Array) -> None:
        refitter = alive(self._handle, "refitter")
        dtype = DataType.from_numpy(array.dtype)
        known = self._vendor.members("DataType")
        if dtype.name not in known:
            raise DTypeError(
                f"weights {name!r} are {dtype.name}, which {self._vendor.title} does not have; it has "
                f"{', '.join(known)}"
            )
        if hasattr(refitter, "get_weights_prototype"):  # since 10.0; before, TensorRT compares the sizes itself
            wanted = refitter.get_weights_prototype(name)
            if wanted.dtype.name != dtype.name:
                raise DTypeError(f"weights {name!r} are {dtype.name}; expected {wanted.dtype.name}")
            if int(wanted.size) != array.size:
                raise ShapeError(f"weights {name!r} have {array.size} elements; expected {wanted.size}")
        kept: Array = np.ascontiguousarray(array)
        if dtype is DataType.INT4:
            kept = np.frombuffer(packed_bytes(array, dtype), np.uint8)
        weights = self._vendor.module.Weights(known[dtype.name], kept.ctypes.data, array.size)
        with self._vendor.router.operation(self._log) as operation:
            if not refitter.set_named_weights(name, weights):
                raise ShapeError(
                    f"{self._vendor.title} refused {array.size} elements of {dtype.value} for the weights {name!r}; "
                    f"the log says: {' '.join(operation.lines) or '(nothing)'}"
                )
        self._kept[name] = [kept, weights]

    def set_onnx(self, model: bytes, directory: str | None) -> None:
        refitter = alive(self._handle, "refitter")
        make = getattr(self._vendor.module, "OnnxParserRefitter", None)
        if make is None:
            raise EngineError(
                f"{self._vendor.title} has no OnnxParserRefitter, which came with 10.0; give the weights by name: "
                "set_weights(name, array)"
            )
        with self._vendor.router.operation(self._log) as operation:
            parser = make(refitter, self._vendor.logger)
            self._parsers.append(parser)
            path = () if directory is None else (os.path.join(directory, "model.onnx"),)
            if not parser.refit_from_bytes(model, *path):
                issues = [str(parser.get_error(index)) for index in range(parser.num_errors)]
                raise EngineError(
                    f"{self._vendor.title} could not match the ONNX model with the engine: "
                    f"{'; '.join(issues) or 'the log says why'}",
                    tensorrt_log=operation.lines,
                )

    def refit(self) -> None:
        refitter = alive(self._handle, "refitter")
        missing = self.missing
        if missing:
            raise EngineError(f"these weights are missing: {', '.join(missing)}; give them with set_weights first")
        with self._vendor.router.operation(self._log) as operation:
            if not refitter.refit_cuda_engine():
                raise EngineError(f"{self._vendor.title} could not refit the engine", tensorrt_log=operation.lines)

    def destroy(self) -> None:
        """Idempotent."""
        with self._vendor.router.operation(self._log):
            self._parsers = []
            self._handle = None
            self._kept = {}
            self._engine = None
