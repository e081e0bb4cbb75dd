"""Optimization profiles: checked against the network here, since TensorRT tells of a mistake only when it builds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..._errors import BuilderError, ShapeError
from ..._types import DataType, ProfileSpec, ShapeRange, TensorInfo
from ._guards import MAX_DIMENSION, checked_shape
from ._log_router import Operation
from ._vendor import Vendor

_INT32 = range(-(2**31), 2**31)
_INT64 = range(-(2**63), 2**63)


def add_profiles(
    vendor: Vendor,
    builder: Any,
    config: Any,
    inputs: Sequence[TensorInfo],
    profiles: Sequence[ProfileSpec],
    operation: Operation,
) -> list[Any]:
    """Create the profiles and add them to ``config``.

    Returns:
        The vendor's profiles, to be kept alive until the build is done.
    Raises:
        ShapeError: a profile names an unknown input, leaves a dynamic one out, or has ranges that do not fit it.
        BuilderError: the network needs a profile and there is none, or TensorRT refuses one.
    Source: nvinfer1::IOptimizationProfile, nvinfer1::IBuilderConfig::addOptimizationProfile
    """
    needing = [tensor for tensor in inputs if tensor.is_shape_tensor or -1 in tensor.shape]
    if needing and not profiles:
        names = ", ".join(str(tensor) for tensor in needing)
        raise BuilderError(f"the network has dynamic inputs ({names}) and no optimization profile; add one for them")
    by_name = {tensor.name: tensor for tensor in inputs}
    created = []
    for index, spec in enumerate(profiles):
        missing = [tensor.name for tensor in needing if tensor.name not in spec]
        if missing:
            raise ShapeError(f"profile {index} has no range for the dynamic input {', '.join(map(repr, missing))}")
        profile = builder.create_optimization_profile()
        for name, wanted in spec.items():
            if name not in by_name:
                raise ShapeError(
                    f"profile {index} has a range for {name!r}, which is no input; the inputs are "
                    f"{', '.join(map(repr, by_name)) or 'none'}"
                )
            _set_range(vendor, profile, index, by_name[name], wanted)
        # __bool__ is IOptimizationProfile::isValid
        if not profile or config.add_optimization_profile(profile) < 0:
            raise BuilderError(f"{vendor.title} refused profile {index}: {_text(spec)}", tensorrt_log=operation.lines)
        created.append(profile)
    return created


def _set_range(vendor: Vendor, profile: Any, index: int, tensor: TensorInfo, wanted: ShapeRange) -> None:
    triple = (tuple(wanted.min), tuple(wanted.opt), tuple(wanted.max))
    where = f"profile {index}, {tensor}"
    if len({len(part) for part in triple}) != 1:
        raise ShapeError(f"{where}: min, opt and max have different lengths: {_triple(wanted)}")
    if any(not low <= mid <= high for low, mid, high in zip(*triple, strict=True)):
        raise ShapeError(f"{where}: expected min <= opt <= max in every dimension, found {_triple(wanted)}")
    if tensor.is_shape_tensor:
        _check_values(vendor, where, tensor, wanted)
    else:
        _check_shapes(where, tensor, wanted)
    try:
        if tensor.is_shape_tensor:
            profile.set_shape_input(tensor.name, *(list(part) for part in triple))
        else:
            profile.set_shape(tensor.name, *triple)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ShapeError(f"{where}: {vendor.title} refused {_triple(wanted)}: {error}") from error


def _check_shapes(where: str, tensor: TensorInfo, wanted: ShapeRange) -> None:
    if len(wanted.min) != len(tensor.shape):
        raise ShapeError(f"{where}: expected {len(tensor.shape)} dimensions, found {_triple(wanted)}")
    for part in (wanted.min, wanted.opt, wanted.max):
        checked_shape(tensor.name, part)
    for axis, size in enumerate(tensor.shape):
        if size >= 0 and not wanted.min[axis] == wanted.opt[axis] == wanted.max[axis] == size:
            raise ShapeError(f"{where}: dimension {axis} is fixed at {size}, found {_triple(wanted)}")


def _check_values(vendor: Vendor, where: str, tensor: TensorInfo, wanted: ShapeRange) -> None:
    count = 1
    for size in tensor.shape:
        count *= size
    if 0 <= count <= MAX_DIMENSION and len(wanted.min) != count:
        raise ShapeError(f"{where}: a shape tensor of {count} values, found {_triple(wanted)}")
    wide = vendor.facts.int64_is_real and tensor.dtype is DataType.INT64
    allowed = _INT64 if wide else _INT32
    if any(value not in allowed for part in (wanted.min, wanted.opt, wanted.max) for value in part):
        raise ShapeError(f"{where}: {vendor.title} takes values of {64 if wide else 32} bits, found {_triple(wanted)}")


def _triple(wanted: ShapeRange) -> str:
    return f"min {list(wanted.min)}, opt {list(wanted.opt)}, max {list(wanted.max)}"


def _text(spec: ProfileSpec) -> str:
    return "; ".join(f"{name}: {_triple(wanted)}" for name, wanted in spec.items())
