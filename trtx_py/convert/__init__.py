"""From any model to ONNX that TensorRT takes: ``await trtx_py.convert("model.pt", ...)``."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from ._convert import Convert, convert

if _TYPE_CHECKING:
    from ._types import (
        Comparison,
        ConversionProgress,
        ConversionReport,
        ConversionStep,
        ConversionTask,
        ConvertedModel,
        Converter,
        InputSpec,
        OperatorCheck,
        OutputComparison,
        Simplification,
    )

__all__ = [
    "Comparison",
    "ConversionProgress",
    "ConversionReport",
    "ConversionStep",
    "ConversionTask",
    "Convert",
    "ConvertedModel",
    "Converter",
    "InputSpec",
    "OperatorCheck",
    "OutputComparison",
    "Simplification",
    "convert",
]


if not _TYPE_CHECKING:  # a checker that saw this would believe in every name

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import _types

        value = globals()[name] = getattr(_types, name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
