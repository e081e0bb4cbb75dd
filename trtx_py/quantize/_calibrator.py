"""Calibration data for TensorRT's own calibrators, which versions 8.6 to 10 have."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from .._errors import CalibrationError, InvalidArgumentError
from .._types import Array, Shape, TensorInfo
from ._cache_file import CacheFile
from ._calibration import Calibration


class TensorRTCalibrator:
    """Implements BackendCalibrator over a Calibration.

    Raises:
        InvalidArgumentError: the method is none of TensorRT's.
    """

    def __init__(self, calibration: Calibration, inputs: Sequence[TensorInfo], model_sha256: str, title: str) -> None:
        if calibration.method not in ("entropy", "minmax"):
            raise InvalidArgumentError(
                f"{title} calibrates by itself, by 'entropy' or 'minmax', and not by {calibration.method_key!r}; "
                "choose one of these, or convert the model with trtx_py.quantize.convert() and build it with "
                "precision=None"
            )
        self._calibration = calibration
        self._inputs = tuple(inputs)
        self._model = model_sha256

    @property
    def algorithm(self) -> str:
        return str(self._calibration.method)

    def batches(self) -> Iterator[Mapping[str, Array]]:
        """As many rows in each batch as in the first: of a last one with fewer TensorRT would read past the end."""
        shapes: Mapping[str, Shape] | None = None
        for batch in self._calibration.batches_for(self._inputs):
            found = {name: array.shape for name, array in batch.items()}
            if shapes is None:
                shapes = found
            if found == shapes:
                for name, array in batch.items():
                    if array.dtype.kind == "f" and not np.isfinite(array).all():
                        raise CalibrationError(
                            f"calibration data for input {name!r} have values that are not finite, of which TensorRT's "
                            "own calibrator would make a range; look for bad samples"
                        )
                yield batch
            elif {n: s[1:] for n, s in found.items()} != {n: s[1:] for n, s in shapes.items()}:
                raise CalibrationError(
                    f"calibration batches differ in shape ({shapes}, then {found}); TensorRT's own calibrator takes "
                    "one shape: give samples of one size"
                )

    def read_cache(self, title: str) -> bytes | None:
        return None if self._calibration.cache is None else self._file().read_blob(self._key(title))

    def write_cache(self, title: str, cache: bytes) -> None:
        if self._calibration.cache is not None:
            self._file().write_blob(self._key(title), cache)

    def _file(self) -> CacheFile:
        assert self._calibration.cache is not None
        return CacheFile(os.fspath(self._calibration.cache))

    def _key(self, title: str) -> str:
        return f"{self._model}:{self._calibration.key()}:{title}"
