"""Calibration: from data to the ranges of activations, with a cache."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from .._arguments import checked_int, checked_path, checked_shape
from .._errors import BuilderError, CalibrationError, InvalidArgumentError
from .._types import Array, Shape, TensorInfo
from ._cache_file import LARGEST_RANGE, CacheFile
from ._collectors import (
    Collector,
    EntropyCollector,
    MinMaxCollector,
    PercentileCollector,
    checked_percent,
    checked_values,
)
from ._readers import Batch, CalibrationReader, ImageFolder, add_to_digest, batches_of, copied
from ._reference import Runner

if TYPE_CHECKING:
    import onnx

METHODS = ("entropy", "minmax", "percentile")

Data = (
    Mapping[str, Array]
    | Array
    | str
    | os.PathLike[str]
    | Sequence[str | os.PathLike[str]]
    | ImageFolder
    | CalibrationReader
    | Iterable[Batch]
)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Data that show an INT8 or FP8 build which values the activations take, and how ranges follow from them.

    Attributes:
        data: arrays by input name (or one array, for a model with one input) with the samples along the first axis; a
            file, a folder or a list of files, .npy (one sample each, or several along the first axis), .bin or .raw
            (samples one after the other, in the input's dtype) or images; an ``ImageFolder``; or any iterable of
            batches, such as a CalibrationReader of your own.
        method: "entropy" (smallest Kullback-Leibler divergence), "minmax", "percentile", or a Collector of your own:
            something that makes one when it is called without arguments.
        batches: use no more than that many batches; None uses all.
        batch_size: samples in a batch, where the model's first axis is dynamic.
        percentile: of magnitudes, for method "percentile".
        cache: a file that keeps the ranges, by model, data and method: the next build with the same three does not
            run the model. A method of your own is known by its name and source, so it must be a class or function of
            a module. None keeps nothing.
        shape: of one sample without its batch, where the model leaves it open and files do not tell.

    Ranges come from the FP32 model, run by ONNX Runtime on the CPU; where TensorRT is weakly typed (8.6 to 10) its own
    calibrator gets the same batches, for "entropy" and "minmax".

    Raises:
        InvalidArgumentError: a value of the wrong type or out of range.
    """

    data: Data = field(repr=False)
    method: str | Callable[[], Collector] = "entropy"
    batches: int | None = None
    batch_size: int = 8
    percentile: float = 99.99
    cache: str | os.PathLike[str] | None = None
    shape: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not callable(self.method) and self.method not in METHODS:
            raise InvalidArgumentError(
                f"calibration method is {self.method!r}; expected one of {', '.join(METHODS)}, or something that makes "
                "a Collector"
            )
        if self.batches is not None:
            checked_int(self.batches, "batches", minimum=1)
        checked_int(self.batch_size, "batch_size", minimum=1)
        checked_percent(self.percentile)
        if self.cache is not None:
            object.__setattr__(self, "cache", checked_path(self.cache, "calibration cache"))
            if callable(self.method) and _named(self.method) is None:
                raise InvalidArgumentError(
                    f"calibration method is {self.method_key}, which a cache cannot tell from others of that name; "
                    "give a class or function that stands in a module, or leave cache out"
                )
        if isinstance(self.data, Iterator):
            # It can be read only once, and is needed for the key and for the ranges.
            object.__setattr__(self, "data", [copied(batch) for batch in islice(self.data, self.batches)])
        if self.shape is not None:
            object.__setattr__(self, "shape", checked_shape(self.shape, "shape of a sample"))

    def batches_for(self, inputs: Sequence[TensorInfo]) -> Iterable[Batch]:
        """The checked batches for a model with these inputs. Raises as ``thresholds``, for the data alone."""
        shape: Shape | None = None if self.shape is None else tuple(self.shape)
        return batches_of(self.data, inputs, batch_size=self.batch_size, limit=self.batches, shape=shape)

    @property
    def method_key(self) -> str:
        """The method as text, for cache keys."""
        if callable(self.method):
            named: Any = self.method
            return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', repr(named))}"
        return f"percentile {self.percentile}" if self.method == "percentile" else self.method

    def key(self) -> str:
        """SHA-256 over the options and the data, of files their content: the same for the same calibration.

        Raises InvalidArgumentError for data that cannot be read.
        """
        options = (self.method_key, self.batches, self.batch_size, self.shape)
        digest = hashlib.sha256(repr(options).encode())
        if callable(self.method):
            digest.update(_source(self.method).encode())
        add_to_digest(digest, self.data, self.batches)
        return digest.hexdigest()

    def _collector(self) -> Collector:
        if callable(self.method):
            try:
                made: Any = self.method()
            except TypeError as error:
                raise InvalidArgumentError(
                    f"calibration method {self.method_key} cannot be called without arguments ({error}); expected "
                    "something that makes a Collector"
                ) from error
            if not all(callable(getattr(made, name, None)) for name in ("collect", "threshold")):
                raise InvalidArgumentError(
                    f"calibration method {self.method_key} made {made!r:.80}; expected a Collector, which has "
                    "collect(values) and threshold()"
                )
            return made  # type: ignore[no-any-return]
        makers: Mapping[str, Callable[[], Collector]] = {
            "entropy": EntropyCollector,
            "minmax": MinMaxCollector,
            "percentile": partial(PercentileCollector, self.percentile),
        }
        return makers[self.method]()


def _named(method: Any) -> str | None:
    """Where a class or function stands in its module; None for what has no place of its own there."""
    name, module = getattr(method, "__qualname__", None), sys.modules.get(getattr(method, "__module__", None) or "")
    found: Any = module
    for part in (name or "").split("."):
        found = getattr(found, part, None)
    return name if module is not None and found is method else None


def _source(method: Any) -> str:
    """Its text, so that a cache notices a change; empty where Python does not know it."""
    try:
        return inspect.getsource(method)
    except (OSError, TypeError):
        return ""


def thresholds(
    calibration: Calibration,
    model: onnx.ModelProto,
    tensors: Sequence[str],
    inputs: Sequence[TensorInfo],
    *,
    model_sha256: str,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """The magnitude to clip each of ``tensors`` at, by name.

    Args:
        model: the FP32 model; ``tensors`` are inner tensors or inputs of it.
        model_sha256: what the cache knows the model by.
        cancelled: asked before each batch; True ends the calibration with BuilderError.
    Raises:
        CalibrationError: no data, values that are not finite, a collector that gives no range, or a cache file that is
            something else.
        InvalidArgumentError, DTypeError, ShapeError: the data are not such as the model takes.
        BackendUnavailableError: onnxruntime is not installed.
    """
    batches = calibration.batches_for(inputs)
    if calibration.cache is None:
        return _measure(calibration, model, tensors, batches, cancelled)
    cache = CacheFile(os.fspath(calibration.cache))
    key = f"{model_sha256}:{calibration.key()}"
    known = cache.read_ranges(key)
    if known is not None and known.keys() >= set(tensors):
        return {name: known[name] for name in tensors}
    found = _measure(calibration, model, tensors, batches, cancelled)
    cache.write_ranges(key, found)
    return found


def _measure(
    calibration: Calibration,
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Iterable[Batch],
    cancelled: Callable[[], bool],
) -> dict[str, float]:
    runner = Runner(model, tensors)
    collectors = {name: calibration._collector() for name in tensors}
    for batch in batches:
        if cancelled():
            raise BuilderError("the build was cancelled while it calibrated")
        values = {**runner.run(batch), **batch}
        for name, collector in collectors.items():
            collector.collect(checked_values(name, values[name]))
    return {name: _checked_threshold(name, collector) for name, collector in collectors.items()}


def _checked_threshold(name: str, collector: Collector) -> float:
    found: Any = collector.threshold()
    number = isinstance(found, (int, float, np.integer, np.floating)) and not isinstance(found, bool)
    if not number or not 0 <= found <= LARGEST_RANGE:
        raise CalibrationError(
            f"{type(collector).__name__} gave the threshold {found!r} for tensor {name!r}; expected a number of 0 or "
            "more, within float32"
        )
    return float(found)
