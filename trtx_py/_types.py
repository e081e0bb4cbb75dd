"""Values that cross the seams: enums and frozen dataclasses. Imports nothing of this package but errors."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ._errors import DTypeError

Shape = tuple[int, ...]
Array = npt.NDArray[Any]


class Severity(enum.IntEnum):
    """Source: nvinfer1::ILogger::Severity"""

    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class DataType(enum.Enum):
    """Element type of a tensor, by TensorRT's own names.

    Source: nvinfer1::DataType
    """

    FLOAT = "float32"
    HALF = "float16"
    BF16 = "bfloat16"
    INT8 = "int8"
    INT32 = "int32"
    INT64 = "int64"
    BOOL = "bool"
    UINT8 = "uint8"
    FP8 = "float8_e4m3fn"
    INT4 = "int4"
    FP4 = "float4_e2m1fn"
    E8M0 = "float8_e8m0fnu"

    @property
    def bits(self) -> int:
        """Bits that one element takes in device memory; 4-bit types are packed two to a byte."""
        return _BITS[self]

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype of host arrays; bfloat16 and the 8- and 4-bit floats come from ml_dtypes."""
        if self in _ML_DTYPES:
            import ml_dtypes

            narrow: np.dtype[Any] = np.dtype(getattr(ml_dtypes, self.value))
            return narrow
        return np.dtype(self.value)

    @classmethod
    def from_numpy(cls, dtype: npt.DTypeLike) -> DataType:
        """Raises DTypeError for a dtype that TensorRT does not have (float64, strings, ...)."""
        name = np.dtype(dtype).name
        try:
            return cls(name)
        except ValueError:
            known = ", ".join(d.value for d in cls)
            raise DTypeError(f"TensorRT has no element type for {name}; it has {known}") from None

    def nbytes(self, shape: Shape) -> int:
        """Bytes of a dense tensor of this type; a dimension of -1 is an error."""
        count = 1
        for n in shape:
            if n < 0:
                raise ValueError(f"shape {shape} is not complete")
            count *= n
        return (count * self.bits + 7) // 8


_BITS = {
    DataType.FLOAT: 32, DataType.HALF: 16, DataType.BF16: 16, DataType.INT8: 8, DataType.INT32: 32,
    DataType.INT64: 64, DataType.BOOL: 8, DataType.UINT8: 8, DataType.FP8: 8, DataType.INT4: 4,
    DataType.FP4: 4, DataType.E8M0: 8,
}  # fmt: skip
_ML_DTYPES = frozenset({DataType.BF16, DataType.FP8, DataType.INT4, DataType.FP4, DataType.E8M0})


class TensorMode(enum.Enum):
    """Source: nvinfer1::TensorIOMode"""

    INPUT = "input"
    OUTPUT = "output"


class TensorLocation(enum.Enum):
    """Where TensorRT reads or writes a tensor. Shape tensors are read on the host.

    Source: nvinfer1::TensorLocation
    """

    DEVICE = "device"
    HOST = "host"


@dataclass(frozen=True)
class ShapeRange:
    """What one optimization profile allows for one input: shapes, or the values of a shape tensor.

    Source: nvinfer1::ICudaEngine::getProfileShape, getProfileTensorValuesV2
    """

    min: Shape
    opt: Shape
    max: Shape

    def admits(self, shape: Shape) -> bool:
        """True if ``shape`` has the rank of the range and lies inside it in every dimension."""
        return len(shape) == len(self.min) and all(
            low <= n <= high for low, n, high in zip(self.min, shape, self.max, strict=True)
        )

    def __str__(self) -> str:
        return f"{list(self.min)}..{list(self.max)}"


#: One optimization profile: a range for each input that has one.
ProfileSpec = Mapping[str, ShapeRange]


@dataclass(frozen=True)
class TensorInfo:
    """One I/O tensor of a network or an engine.

    Attributes:
        name: as in the model.
        mode: input or output.
        dtype: element type on the device (or host, for a shape tensor).
        shape: -1 for a dimension that is known only at run time.
        location: HOST for shape tensors, whose values TensorRT reads on the CPU.
        is_shape_tensor: its values, not its shape, are bounded by the profiles.
        ranges: one entry for each optimization profile, in order: shapes, or values where ``is_shape_tensor``.
            Empty for outputs and for networks.
    """

    name: str
    mode: TensorMode
    dtype: DataType
    shape: Shape
    location: TensorLocation = TensorLocation.DEVICE
    is_shape_tensor: bool = False
    ranges: tuple[ShapeRange, ...] = ()

    def __str__(self) -> str:
        dims = "x".join("?" if n < 0 else str(n) for n in self.shape) or "scalar"
        return f"{self.mode.value} {self.name!r} {self.dtype.value} [{dims}]"


#: Kinds of layers that multiply, which is where a precision is felt; names of nvinfer1::LayerType.
MULTIPLYING = frozenset({"CONVOLUTION", "DECONVOLUTION", "EINSUM", "FULLY_CONNECTED", "MATRIX_MULTIPLY"})


@dataclass(frozen=True)
class LayerPrecision:
    """The element types that one layer works with.

    Attributes:
        name: TensorRT's for it, made from the ONNX node's; a fused layer has the names of all it was made of.
        kind: by the names of nvinfer1::LayerType, such as "CONVOLUTION"; an ONNX operator in capitals where there is no
            layer of its own; "" if it is not known.
        inputs: type of each input tensor. A tensor that comes out of DEQUANTIZE counts as what went into it, which is
            what TensorRT computes with.
        outputs: type of each output tensor.
    """

    name: str
    kind: str
    inputs: tuple[DataType, ...]
    outputs: tuple[DataType, ...]

    @property
    def multiplies(self) -> bool:
        """It is a convolution or a matrix product, or has one inside."""
        return self.kind in MULTIPLYING

    @property
    def dtype(self) -> DataType | None:
        """The narrowest type that it computes in; None if it has no float or quantized tensor."""
        floats = [t for t in (*self.inputs[:2], *self.outputs) if t in _COMPUTED]
        if len(self.inputs) > 1 and self.multiplies:
            floats = [t for t in self.inputs[:2] if t in _COMPUTED] or floats
        return min(floats, key=lambda t: t.bits, default=None)

    def computes_in(self, precision: str) -> bool:
        """Whether that is what the word means: both operands of a product, for INT4 the weights alone."""
        wanted = _MEANT[precision]
        operands = [t for t in self.inputs[:2] if t in _COMPUTED]
        if precision == "int4-weights":
            return wanted in operands
        return bool(operands) and all(t is wanted for t in operands)


_COMPUTED = frozenset(
    {DataType.FLOAT, DataType.HALF, DataType.BF16, DataType.INT8, DataType.FP8, DataType.INT4, DataType.FP4}
)
_MEANT = {
    "fp32": DataType.FLOAT, "tf32": DataType.FLOAT, "fp16": DataType.HALF, "bf16": DataType.BF16,
    "int8": DataType.INT8, "fp8": DataType.FP8, "int4-weights": DataType.INT4,
}  # fmt: skip


@dataclass(frozen=True)
class BuildOptions:
    """A snapshot of a BuilderConfig, taken when a build starts; what a backend cannot honour it must refuse.

    Attributes:
        workspace_bytes: scratch memory a layer may use on the device; None leaves TensorRT's default.
        precision: None keeps the model's own types; otherwise one of "fp32", "tf32", "fp16", "bf16", "int8", "fp8",
            "int4-weights".
        compute_capabilities: GPU architectures to build for, such as "8.9"; empty means the GPU at hand.
        flags: names of nvinfer1::BuilderFlag members to set.
        optimization_level: 0 (fast build) to 5 (fast engine), or None.
        max_aux_streams: None leaves the choice to TensorRT.
        profile_sharing: allow several execution contexts on one optimization profile (8.6; later versions always do).
        calibrator: what TensorRT's own calibrator asks for batches ("int8" on 8.6 to 10): a BackendCalibrator.
        inspectable: keep in the plan what the engine inspector needs to tell each layer's types.
        further: what else was asked for, by the names of BuilderOptions.
        memory: a DeviceMemory that counts what is allocated on the builder's device; None without a device.
    """

    workspace_bytes: int | None = None
    precision: str | None = None
    compute_capabilities: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    optimization_level: int | None = None
    max_aux_streams: int | None = None
    profile_sharing: bool = True
    profiles: tuple[ProfileSpec, ...] = field(default=())
    calibrator: Any | None = field(default=None, compare=False, repr=False)
    inspectable: bool = False
    further: Mapping[str, Any] = field(default_factory=dict)
    memory: Any | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class BackendInfo:
    """What a backend is and can do here.

    Attributes:
        name: the name it is chosen by, for example "tensorrt_rtx".
        flavour: the TensorRT family member behind it; plans carry it. The mock's is "mock".
        version: of that library, for example "1.7.1.116".
        can_build: it has a builder and a parser.
        can_run: it has a runtime and a driver to run on.
        strongly_typed: precisions come from the model, not from builder flags.
        needs_compute_capability: building without a GPU needs ``BuilderConfig.compute_capabilities``.
    """

    name: str
    flavour: str
    version: str
    can_build: bool
    can_run: bool
    strongly_typed: bool
    needs_compute_capability: bool = False
