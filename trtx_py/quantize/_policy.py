"""What a conversion may touch: PrecisionPolicy, and the words for precisions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from .._errors import InvalidArgumentError

#: Words that change the model on a strongly typed TensorRT.
CONVERTING = ("fp16", "bf16", "int8", "fp8", "int4-weights")
#: Of them those that quantize activations, and therefore need ranges.
CALIBRATED = ("int8", "fp8")

#: Operators that stay in FP32 in "fp16" and "bf16": sums over many elements, powers and logarithms, whose intermediate
#: values leave the range or the resolution of 16 bits, recurrences, which add up their errors, and what decides by
#: comparing floats.
SENSITIVE_OPERATORS = frozenset(
    """
    CumSum Exp GRU GroupNormalization InstanceNormalization LRN LSTM LayerNormalization Log LogSoftmax LpNormalization
    MeanVarianceNormalization NonMaxSuppression Pow RMSNormalization RNN Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMean ReduceProd ReduceSum ReduceSumSquare Softmax Softplus Sqrt
    """.split()
)

#: Of the sensitive operators those that make one number of another or of many, as layer normalization and softmax do
#: where an exporter wrote them out. Element-wise nodes between two of these stay in FP32 with them.
REDUCTIONS = SENSITIVE_OPERATORS & frozenset(
    """
    CumSum Exp Log Pow Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMean ReduceProd ReduceSum
    ReduceSumSquare Sqrt
    """.split()
)
#: Sums that nothing has been divided by: what reads one stays in FP32, since the sum may be more than FP16 can hold.
SUMS = frozenset({"CumSum", "ReduceL1", "ReduceProd", "ReduceSum", "ReduceSumSquare"})
RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
#: They hand on the numbers that they read.
LAYOUT = frozenset(
    """
    Concat DepthToSpace Dropout Expand Flatten Gather GatherElements GatherND Identity Reshape Slice SpaceToDepth Split
    Squeeze Tile Transpose Unsqueeze
    """.split()
)
ELEMENTWISE = frozenset({"Abs", "Add", "Clip", "Div", "Max", "Min", "Mul", "Neg", "Sub"})

#: Operators whose inputs are quantized in "int8" and "fp8".
QUANTIZED_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

_INT4_BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class PrecisionPolicy:
    """What stays as it is when a model is converted to a precision.

    Attributes:
        keep: names of ONNX nodes that stay in FP32.
        keep_operators: ONNX operators that stay in FP32 in "fp16" and "bf16"; None takes SENSITIVE_OPERATORS of
            ``trtx_py.quantize``. An empty set converts all that can be.
        quantized_operators: operators that "int8" and "fp8" quantize; None takes QUANTIZED_OPERATORS.
        max_relative_error: keep further nodes in FP32, those that add most error first, until every output is that
            close to FP32 on the calibration data: the norm of the difference divided by the norm of the FP32 output.
            Needs ``calibration``. None measures nothing.
        block_size: of "int4-weights": most weights along the summed axis that share one scale, 16 to 256; of these the
            largest that divides the axis is used, and one scale for each column where none does.

    Raises:
        InvalidArgumentError: a value of the wrong type or out of range.
    """

    keep: frozenset[str] = frozenset()
    keep_operators: frozenset[str] | None = None
    quantized_operators: frozenset[str] | None = None
    max_relative_error: float | None = None
    block_size: int = 128

    def __post_init__(self) -> None:
        for field in ("keep", "keep_operators", "quantized_operators"):
            given: Any = getattr(self, field)
            if given is None and field != "keep":
                continue
            if isinstance(given, str) or not isinstance(given, Iterable) or not all(isinstance(n, str) for n in given):
                raise InvalidArgumentError(f"{field} is {given!r}; expected a set of names")
            object.__setattr__(self, field, frozenset(given))
        if self.quantized_operators is not None and self.quantized_operators - QUANTIZED_OPERATORS:
            wrong = ", ".join(sorted(self.quantized_operators - QUANTIZED_OPERATORS))
            raise InvalidArgumentError(
                f"quantized_operators has {wrong}; expected some of {', '.join(sorted(QUANTIZED_OPERATORS))}"
            )
        limit: Any = self.max_relative_error
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < 1):
            raise InvalidArgumentError(f"max_relative_error is {limit!r}; expected a number between 0 and 1, or None")
        if self.block_size not in _INT4_BLOCKS or isinstance(self.block_size, bool):
            raise InvalidArgumentError(
                f"block_size is {self.block_size!r}; expected one of {', '.join(map(str, _INT4_BLOCKS))}"
            )

    @property
    def sensitive(self) -> frozenset[str]:
        """Operators that stay in FP32 in "fp16" and "bf16"."""
        return SENSITIVE_OPERATORS if self.keep_operators is None else self.keep_operators

    @property
    def quantized(self) -> frozenset[str]:
        """Operators that "int8" and "fp8" quantize."""
        return QUANTIZED_OPERATORS if self.quantized_operators is None else self.quantized_operators

    def described(self) -> dict[str, Any]:
        """What differs from the defaults, as plain values."""
        default = PrecisionPolicy()
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {name: value for name, value in found.items() if value != getattr(default, name)}
        return {name: sorted(v) if isinstance(v, frozenset) else v for name, v in changed.items()}
