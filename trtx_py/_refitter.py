"""New weights for an engine that is there already."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy.typing as npt

from ._aio import run_shielded
from ._arguments import closest
from ._errors import BorrowedError, InvalidArgumentError
from ._onnx_source import Weights, load_onnx
from ._resource import Resource
from .backends.protocols import BackendRefitter
from .network._checks import array

if TYPE_CHECKING:
    from ._engine import Engine


class Refitter(Resource):
    """Changes the weights of an engine. Made by ``engine.create_refitter()``, and owned by it.

    The plan must have been built with ``BuilderOptions(refit=...)``. Give weights by name, or an ONNX model of the same
    architecture, then call ``refit``. Nothing may use the engine meanwhile, and nothing may have used it: contexts and
    captured graphs know the old weights. So refit first, then infer.

    Source: nvinfer1::IRefitter, nvonnxparser::IParserRefitter
    """

    _engine: Engine
    _native: BackendRefitter
    _changing: threading.Lock

    def __init__(self) -> None:
        self._refuse_construction("engine.create_refitter()")

    @classmethod
    def _create(cls, engine: Engine) -> Refitter:
        refitter = cls.__new__(cls)
        device = engine._runtime.device
        with refitter._opening(engine) as handle:
            with engine._runtime._logger.attaching(), device.current():
                refitter._native = engine._native.create_refitter()
            handle.release = device._carry(refitter._native.destroy)
            refitter._engine = engine
            refitter._changing = threading.Lock()
        return refitter

    @contextlib.contextmanager
    def _used(self, what: str) -> Iterator[None]:
        """One use at a time: TensorRT reads the arrays that were given while another thread refits."""
        self._handle.require_open()
        if not self._changing.acquire(blocking=False):
            raise BorrowedError(f"{self._handle} is in use on another thread; wait for that before {what}")
        try:
            with self._handle.lend(what), self._engine._runtime._logger.attaching():
                yield
        finally:
            self._changing.release()

    @property
    def names(self) -> tuple[str, ...]:
        """Weights that can be set. Source: nvinfer1::IRefitter::getAllWeights"""
        self._handle.require_open()
        return self._native.names

    @property
    def missing(self) -> tuple[str, ...]:
        """Weights that must be set before ``refit``: all of a stripped plan's, and what others are computed with.

        Source: nvinfer1::IRefitter::getMissingWeights
        """
        self._handle.require_open()
        return self._native.missing

    def set_weights(self, name: str, weights: npt.ArrayLike) -> None:
        """Give one array, of the size and type that the weights have; it is copied.

        Raises:
            InvalidArgumentError: there are no weights of that name.
            BorrowedError: another thread uses the refitter, which is one thread's at a time.
            ShapeError, DTypeError: another size or type.
        Source: nvinfer1::IRefitter::setNamedWeights
        """
        self._handle.require_open()
        if name not in self._native.names:
            close = closest(str(name), self._native.names)
            hint = f"did you mean {close!r}?" if close else f"there are {', '.join(self._native.names) or 'none'}"
            raise InvalidArgumentError(f"{self._engine!r} has no weights {name!r}; {hint}")
        with self._used("set_weights()"):
            self._native.set_weights(name, array(weights, f"weights {name!r}"))

    def set_onnx(
        self, source: str | os.PathLike[str] | bytes | bytearray | memoryview, weights: Weights | None = None
    ) -> None:
        """Take all weights from an ONNX model of the same architecture, as ``network.parse_onnx`` takes it.

        Raises:
            EngineError: TensorRT cannot match it with the engine; a version without IParserRefitter names itself.
            ParserError, InvalidArgumentError: as ``parse_onnx``.
        Source: nvonnxparser::IParserRefitter::refitFromBytes
        """
        self._handle.require_open()
        loaded = load_onnx(source, weights)
        device = self._engine._runtime.device
        with self._used("set_onnx()"), device.current():
            self._native.set_onnx(loaded.model, loaded.directory)

    def refit(self) -> None:
        """Put what was given into the engine. Blocks; in a coroutine use ``await refitter.refit_async()``.

        Raises:
            EngineError: weights are missing, named, or TensorRT refused.
            BorrowedError: the engine has been used: it has execution contexts, which know the old weights; or another
                thread uses the refitter.
        Source: nvinfer1::IRefitter::refitCudaEngine
        """
        self._handle.require_open()
        engine = self._engine
        others = [child.describe() for child in engine._handle.children.values() if child is not self._handle]
        if others:
            raise BorrowedError(
                f"{engine!r} has been used, and what it made knows the old weights: refit before the first inference, "
                "or deserialize the plan again",
                borrowers=others,
            )
        with self._used("refit()"), engine._runtime.device.current():
            self._native.refit()

    async def refit_async(self) -> None:
        """As ``refit``, off the event loop. Cancellation: delivered once TensorRT has returned."""
        await run_shielded(self.refit)
