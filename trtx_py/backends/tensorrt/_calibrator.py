"""TensorRT's own INT8 calibrators, fed with host batches. Versions 8.6 to 10 have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ..._errors import BuilderError, InvalidArgumentError
from ..._types import Array, TensorInfo
from ..protocols import BackendCalibrator, CudaDriver
from ._vendor import Vendor

_CLASSES = {"entropy": "IInt8EntropyCalibrator2", "minmax": "IInt8MinMaxCalibrator"}


_T = TypeVar("_T")


class Feeder:
    """Gives TensorRT one batch after the other in device memory, and keeps what went wrong.

    Attributes:
        failure: what a batch or the cache raised; TensorRT was told that there are no more batches then.
        shapes: of the first batch, by input name; calibration runs with these.
    """

    def __init__(self, source: BackendCalibrator, driver: CudaDriver, title: str) -> None:
        self.failure: BaseException | None = None
        self._source = source
        self._driver = driver
        self._title = title
        self._batches: Iterator[Mapping[str, Array]] = iter(source.batches())
        self._first: Mapping[str, Array] | None = next(self._batches)  # there is one, or it has raised
        self.shapes = {name: array.shape for name, array in self._first.items()}
        self._memory: dict[str, int] = {}

    @property
    def rows(self) -> int:
        """Entries of the first axis."""
        return next((shape[0] for shape in self.shapes.values() if shape), 1)

    def next_batch(self, names: Sequence[str]) -> list[int] | None:
        """Device pointers for the inputs in this order; None after the last batch."""
        return self._guarded(lambda: self._upload(names))

    def read_cache(self) -> bytes | None:
        return self._guarded(lambda: self._source.read_cache(self._title))

    def write_cache(self, cache: bytes) -> None:
        self._guarded(lambda: self._source.write_cache(self._title, cache))

    def release(self) -> None:
        """Free the device memory. The device is current."""
        while self._memory:
            self._driver.cuMemFree(self._memory.popitem()[1])

    def _guarded(self, call: Callable[[], _T]) -> _T | None:
        if self.failure is not None:
            return None
        try:
            return call()
        except BaseException as error:  # must not travel through TensorRT's frames
            self.failure = error
            return None

    def _upload(self, names: Sequence[str]) -> list[int] | None:
        batch = self._first if self._first is not None else next(self._batches, None)
        self._first = None
        if batch is None:
            return None
        for name in names:
            if name not in batch:
                raise InvalidArgumentError(f"calibration has no data for input {name!r}; it has {', '.join(batch)}")
            if name not in self._memory:
                self._memory[name] = self._driver.cuMemAlloc(max(batch[name].nbytes, 1))
            if batch[name].nbytes:
                self._driver.cuMemcpyHtoDAsync(self._memory[name], batch[name].ctypes.data, batch[name].nbytes, 0)
        self._driver.cuStreamSynchronize(0)
        return [self._memory[name] for name in names]


def add_calibrator(
    vendor: Vendor,
    config: Any,
    builder: Any,
    inputs: Sequence[TensorInfo],
    source: BackendCalibrator,
    driver: CudaDriver,
) -> tuple[Feeder, Any]:
    """Set the calibrator, and for dynamic inputs the profile that calibration runs with.

    Returns:
        What feeds it, and the native objects that must outlive the build.
    Raises:
        BuilderError: this version has no such calibrator.
        InvalidArgumentError, CalibrationError, ...: the data have no first batch.
    Source: nvinfer1::IInt8EntropyCalibrator2, IInt8MinMaxCalibrator, IBuilderConfig::setInt8Calibrator
    """
    name = _CLASSES[source.algorithm]
    base: Any = getattr(vendor.module, name, None)
    if base is None or not hasattr(config, "int8_calibrator"):
        raise BuilderError(
            f"{vendor.title} has no {name}; convert the model with trtx_py.quantize.convert(), and build it with "
            "precision=None"
        )
    feeder = Feeder(source, driver, f"{vendor.title} {source.algorithm}")

    class Calibrator(base):  # type: ignore[misc]  # the base is known only at run time
        def __init__(self) -> None:
            base.__init__(self)

        def get_batch_size(self) -> int:
            return feeder.rows

        def get_batch(self, names: Sequence[str]) -> list[int] | None:
            return feeder.next_batch(names)

        def read_calibration_cache(self) -> bytes | None:
            return feeder.read_cache()

        def write_calibration_cache(self, cache: Any) -> None:
            feeder.write_cache(bytes(cache))

    calibrator = Calibrator()
    config.int8_calibrator = calibrator
    profile = None
    if any(-1 in tensor.shape for tensor in inputs):
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            shape = feeder.shapes[tensor.name]
            profile.set_shape(tensor.name, shape, shape, shape)
        config.set_calibration_profile(profile)
    return feeder, (calibrator, profile)
