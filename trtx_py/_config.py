"""What a build is asked for: BuilderConfig and OptimizationProfile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ._arguments import checked_int, checked_shape
from ._builder_options import BuilderOptions
from ._errors import InvalidArgumentError, ShapeError
from ._precision import PrecisionRequest
from ._resource import Resource
from ._types import BuildOptions, ProfileSpec, ShapeRange

if TYPE_CHECKING:
    from ._builder import Builder
    from .quantize import Calibration, PrecisionPolicy

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8", "int4-weights")
#: Attributes of a config that BuilderOptions has too.
_SHARED = (
    "precision", "calibration", "precision_policy", "require_precision", "workspace_bytes", "optimization_level",
    "max_aux_streams", "profile_sharing", "compute_capabilities",
)  # fmt: skip


def checked_range(name: Any, minimum: Any, optimum: Any, maximum: Any) -> ShapeRange:
    """One range of a profile, of shapes or of a shape tensor's values; the build refuses negative dimensions."""
    if not isinstance(name, str) or not name:
        raise InvalidArgumentError(f"tensor name is {name!r}; expected a non-empty string")
    low, best, high = (
        checked_shape(value, f"{which} of {name!r}", minimum=-(2**31))
        for which, value in (("min", minimum), ("opt", optimum), ("max", maximum))
    )
    if not len(low) == len(best) == len(high):
        raise ShapeError(f"profile of {name!r}: min {low}, opt {best} and max {high} differ in rank")
    for index, (a, b, c) in enumerate(zip(low, best, high, strict=True)):
        if not a <= b <= c:
            raise ShapeError(
                f"profile of {name!r}: dimension {index} has min {a}, opt {b}, max {c}; expected min <= opt <= max"
            )
    return ShapeRange(low, best, high)


def _checked_flag(flag: Any) -> str:
    if not (isinstance(flag, str) and flag.isidentifier()):
        raise InvalidArgumentError(f'flag is {flag!r}; expected a name of nvinfer1::BuilderFlag such as "TF32"')
    return flag.upper()


def _checked_triple(number: int, name: str, limits: object) -> ShapeRange:
    given: Any = limits
    try:
        minimum, optimum, maximum = given
    except (TypeError, ValueError):
        raise InvalidArgumentError(
            f"profile {number}, {name!r}: {limits!r}; expected three shapes (min, opt, max)"
        ) from None
    return checked_range(name, minimum, optimum, maximum)


class OptimizationProfile(Resource):
    """The shapes that an engine will serve. Made by ``builder.create_optimization_profile()``.

    A config takes a copy of it; changing it afterwards is refused, because that change would do nothing.

    Source: nvinfer1::IOptimizationProfile
    """

    _ranges: dict[str, ShapeRange]
    _added: bool

    def __init__(self) -> None:
        self._refuse_construction("builder.create_optimization_profile()")

    @classmethod
    def _create(cls, builder: Builder) -> OptimizationProfile:
        profile = cls.__new__(cls)
        with profile._opening(builder):
            profile._ranges, profile._added = {}, False
        return profile

    def set_shape(self, name: str, min: Iterable[int], opt: Iterable[int], max: Iterable[int]) -> None:
        """Set the range of an input's shape, or of the values of a shape tensor (its name tells which).

        Raises:
            ShapeError: not integers, ranks differ, or min <= opt <= max does not hold.
            InvalidArgumentError: the profile was added to a config already.
        Source: nvinfer1::IOptimizationProfile::setDimensions, setShapeValuesV2
        """
        self._handle.require_open()
        if self._added:
            raise InvalidArgumentError(
                f"{self._handle} was added to a config, which holds a copy; create another profile"
            )
        self._ranges[name] = checked_range(name, min, opt, max)

    @property
    def ranges(self) -> Mapping[str, ShapeRange]:
        """What was set so far, by input name."""
        return MappingProxyType(self._ranges)


class BuilderConfig(Resource):
    """Options of a build. Made by ``builder.create_config()``. What the TensorRT at hand lacks fails the build by name.

    Attributes:
        workspace_bytes: scratch memory that a layer may use on the device, in bytes; None leaves TensorRT's default.
        precision: None keeps the model's own types. Words: "fp32", "tf32", "fp16", "bf16", "int8", "fp8",
            "int4-weights". The types of inputs and outputs stay. Where TensorRT is strongly typed (RTX, 11, the mock)
            the model is converted before the build, by casts or Q/DQ; where it is weakly typed builder flags allow it
            to TensorRT, which chooses for each layer.
        calibration: data for "int8" and "fp8", and for what ``precision_policy`` measures.
        precision_policy: what stays in FP32 when the model is converted.
        require_precision: fail the build with PrecisionError unless every convolution and matrix product computes in
            ``precision``, but for what the conversion kept in FP32 by its rules.
        compute_capabilities: GPU architectures to build for, such as ("8.9",); empty means the GPU at hand.
        optimization_level: 0 (fast build) to 5 (fast engine); None leaves the default.
        max_aux_streams: auxiliary streams inside the engine, 0 to 7; None leaves the choice to TensorRT.
        profile_sharing: let several execution contexts use one optimization profile (a choice on 8.6 only).

    Source: nvinfer1::IBuilderConfig
    """

    _workspace_bytes: int | None
    _precision: str | None
    _calibration: Calibration | None
    _precision_policy: PrecisionPolicy | None
    _require_precision: bool
    _compute_capabilities: tuple[str, ...]
    _flags: set[str]
    _optimization_level: int | None
    _max_aux_streams: int | None
    _profiles: list[ProfileSpec]
    _profile_sharing: bool
    _options: BuilderOptions

    def __init__(self) -> None:
        self._refuse_construction("builder.create_config()")

    @classmethod
    def _create(cls, builder: Builder, options: BuilderOptions | None = None) -> BuilderConfig:
        given: object = options
        if given is not None and not isinstance(given, BuilderOptions):
            raise InvalidArgumentError(f"options is {type(given).__name__}; expected trtx.BuilderOptions(...), or None")
        config = cls.__new__(cls)
        with config._opening(builder):
            config._workspace_bytes = config._precision = None
            config._calibration = config._precision_policy = None
            config._require_precision = False
            config._compute_capabilities = ()
            config._flags = set()
            config._optimization_level = config._max_aux_streams = None
            config._profiles = []
            config._profile_sharing = True
            config._options = BuilderOptions() if options is None else options
        try:
            config._take_options()
        except BaseException:
            config.close()
            raise
        return config

    def _take_options(self) -> None:
        options = self._options
        for name in _SHARED:
            setattr(self, name, getattr(options, name))
        self._flags.update(options.builder_flags)
        for number, spec in enumerate(options.profiles):
            given: object = spec
            if not isinstance(given, Mapping) or not given:
                raise InvalidArgumentError(f"profile {number} is {given!r}; expected {{'x': (min, opt, max)}}")
            self._profiles.append({name: _checked_triple(number, name, limits) for name, limits in spec.items()})

    @property
    def options(self) -> BuilderOptions:
        """What the config was made with; its own attributes, flags and profiles count where they were changed since."""
        return self._options

    @property
    def workspace_bytes(self) -> int | None:
        return self._workspace_bytes

    @workspace_bytes.setter
    def workspace_bytes(self, value: int | None) -> None:
        self._handle.require_open()
        self._workspace_bytes = None if value is None else checked_int(value, "workspace_bytes", minimum=0)

    @property
    def precision(self) -> str | None:
        return self._precision

    @precision.setter
    def precision(self, value: str | None) -> None:
        self._handle.require_open()
        if value is not None and value not in PRECISIONS:
            raise InvalidArgumentError(f"precision is {value!r}; expected None or one of {', '.join(PRECISIONS)}")
        self._precision = value

    @property
    def calibration(self) -> Calibration | None:
        return self._calibration

    @calibration.setter
    def calibration(self, value: Calibration | None) -> None:
        self._handle.require_open()
        if value is not None:
            from .quantize import Calibration

            if not isinstance(value, Calibration):
                raise InvalidArgumentError(
                    f"calibration is {type(value).__name__}; expected trtx_py.Calibration(data), or None"
                )
        self._calibration = value

    @property
    def precision_policy(self) -> PrecisionPolicy | None:
        return self._precision_policy

    @precision_policy.setter
    def precision_policy(self, value: PrecisionPolicy | None) -> None:
        self._handle.require_open()
        if value is not None:
            from .quantize import PrecisionPolicy

            if not isinstance(value, PrecisionPolicy):
                raise InvalidArgumentError(
                    f"precision_policy is {type(value).__name__}; expected trtx_py.PrecisionPolicy(...), or None"
                )
        self._precision_policy = value

    @property
    def require_precision(self) -> bool:
        return self._require_precision

    @require_precision.setter
    def require_precision(self, value: bool) -> None:
        self._handle.require_open()
        if not isinstance(value, bool):
            raise InvalidArgumentError(f"require_precision is {value!r}; expected True or False")
        self._require_precision = value

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        return self._compute_capabilities

    @compute_capabilities.setter
    def compute_capabilities(self, value: Iterable[str]) -> None:
        self._handle.require_open()
        given: Any = value
        if not isinstance(given, Iterable):
            raise InvalidArgumentError(
                f'compute_capabilities is {value!r}; expected text for each GPU architecture such as ("8.9",)'
            )
        wanted: tuple[Any, ...] = (given,) if isinstance(given, str) else tuple(given)
        for capability in wanted:
            # Not str(capability): a float has lost the difference between 12.1 and 12.10.
            parts = capability.split(".") if isinstance(capability, str) else []
            if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
                raise InvalidArgumentError(f'compute capability is {capability!r}; expected text such as "8.9"')
        self._compute_capabilities = wanted

    @property
    def optimization_level(self) -> int | None:
        return self._optimization_level

    @optimization_level.setter
    def optimization_level(self, value: int | None) -> None:
        self._handle.require_open()
        self._optimization_level = (
            None if value is None else checked_int(value, "optimization_level", minimum=0, maximum=5)
        )

    @property
    def max_aux_streams(self) -> int | None:
        return self._max_aux_streams

    @max_aux_streams.setter
    def max_aux_streams(self, value: int | None) -> None:
        self._handle.require_open()
        self._max_aux_streams = None if value is None else checked_int(value, "max_aux_streams", minimum=0, maximum=7)

    @property
    def profile_sharing(self) -> bool:
        return self._profile_sharing

    @profile_sharing.setter
    def profile_sharing(self, value: bool) -> None:
        self._handle.require_open()
        if not isinstance(value, bool):
            raise InvalidArgumentError(f"profile_sharing is {value!r}; expected True or False")
        self._profile_sharing = value

    @property
    def flags(self) -> frozenset[str]:
        """Names of the builder flags that are set."""
        return frozenset(self._flags)

    def set_flag(self, flag: str) -> None:
        """Set a builder flag by the name nvinfer1::BuilderFlag has for it, for example "TF32" or "VERSION_COMPATIBLE".

        Whether the TensorRT at hand has it is known, and said, when the build starts.
        """
        self._handle.require_open()
        self._flags.add(_checked_flag(flag))

    def clear_flag(self, flag: str) -> None:
        """Unset a builder flag; one that is not set is no error."""
        self._handle.require_open()
        name: object = flag
        if not isinstance(name, str):
            raise InvalidArgumentError(f'flag is {flag!r}; expected a name of nvinfer1::BuilderFlag such as "TF32"')
        self._flags.discard(name.upper())

    def add_optimization_profile(self, profile: OptimizationProfile) -> int:
        """Add a copy of ``profile``; returns its index in the engine.

        Raises:
            InvalidArgumentError: the profile is empty, or comes from another builder.
        Source: nvinfer1::IBuilderConfig::addOptimizationProfile
        """
        self._handle.require_open()
        if not isinstance(profile, OptimizationProfile):
            raise InvalidArgumentError(
                f"profile is {type(profile).__name__}; expected what builder.create_optimization_profile() returns"
            )
        profile._handle.require_open()
        if profile._parent is not self._parent:
            raise InvalidArgumentError(
                f"{profile._handle} comes from another builder than {self._handle}; make it from the same"
            )
        if not profile._ranges:
            raise InvalidArgumentError(
                f"{profile._handle} is empty; call set_shape for every input with a dynamic shape"
            )
        profile._added = True
        self._profiles.append(dict(profile._ranges))
        return len(self._profiles) - 1

    @property
    def optimization_profiles(self) -> tuple[ProfileSpec, ...]:
        """The profiles added so far, in order."""
        return tuple(self._profiles)

    def _precision_request(self) -> PrecisionRequest:
        return PrecisionRequest(self._precision, self._calibration, self._precision_policy, self._require_precision)

    def _snapshot(self) -> BuildOptions:
        self._handle.require_open()
        return BuildOptions(
            workspace_bytes=self._workspace_bytes,
            precision=self._precision,
            compute_capabilities=self._compute_capabilities,
            flags=tuple(sorted(self._flags)),
            optimization_level=self._optimization_level,
            max_aux_streams=self._max_aux_streams,
            profile_sharing=self._profile_sharing,
            profiles=tuple(self._profiles),
            further=self._options.further,
        )
