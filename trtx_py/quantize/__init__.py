"""Precision: models converted to FP16, BF16, INT8, FP8 and INT4 weights, calibrated, measured and compared.

``precision=`` of a build uses all of this; here it is for itself. Nothing in this package knows the objects above the
backend seam: it works on ONNX models and numbers.
"""

from ._calibration import Calibration
from ._collectors import (
    Collector,
    EntropyCollector,
    MinMaxCollector,
    PercentileCollector,
    entropy_threshold,
    percentile_threshold,
)
from ._compare import Comparison, OutputError, compare, compare_sync
from ._convert import ConvertedModel, convert
from ._measure import LayerError
from ._policy import QUANTIZED_OPERATORS, SENSITIVE_OPERATORS, PrecisionPolicy
from ._readers import CalibrationReader, ImageFolder

__all__ = [
    "QUANTIZED_OPERATORS",
    "SENSITIVE_OPERATORS",
    "Calibration",
    "CalibrationReader",
    "Collector",
    "Comparison",
    "ConvertedModel",
    "EntropyCollector",
    "ImageFolder",
    "LayerError",
    "MinMaxCollector",
    "OutputError",
    "PercentileCollector",
    "PrecisionPolicy",
    "compare",
    "compare_sync",
    "convert",
    "entropy_threshold",
    "percentile_threshold",
]

for _object in (Calibration, Comparison, ImageFolder, LayerError, OutputError, PrecisionPolicy, compare, compare_sync):
    # Names of the facade too, which imports this package only when one of them is asked for.
    _object.__module__ = "trtx_py"
