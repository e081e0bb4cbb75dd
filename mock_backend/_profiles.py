"""Optimization profiles: what a build accepts, and the ranges an engine then shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trtx_py._errors import BuilderError
from trtx_py._types import ProfileSpec, ShapeRange, TensorInfo

from ._dtypes import Dim

__all__ = ["check_profiles", "ranges_by_input"]


def check_profiles(
    inputs: Sequence[TensorInfo], dims: dict[str, tuple[Dim, ...]], profiles: Sequence[ProfileSpec]
) -> None:
    """Raise BuilderError, in TensorRT's words plus the next step, for profiles that do not fit the network."""
    needing = [t for t in inputs if t.is_shape_tensor or -1 in t.shape]
    if needing and not profiles:
        names = ", ".join(str(t) for t in needing)
        raise BuilderError(
            "Network has dynamic or shape inputs, but no optimization profile has been defined: "
            f"{names}. Add a profile with min, opt and max for each of them"
        )
    known = {t.name: t for t in inputs}
    for index, profile in enumerate(profiles):
        unknown = sorted(set(profile) - set(known))
        if unknown:
            raise BuilderError(
                f"profile {index} names {', '.join(map(repr, unknown))}, which the network does not have; "
                f"its inputs are {', '.join(map(repr, known))}"
            )
        missing = [t.name for t in needing if t.name not in profile]
        if missing:
            raise BuilderError(
                f"profile {index} has no range for {', '.join(map(repr, missing))}; "
                "every dynamic input and every shape tensor needs one in each profile"
            )
        for name, limits in profile.items():
            _check_range(known[name], limits, index)
        _check_named(dims, profile, index)


def _check_range(info: TensorInfo, limits: ShapeRange, index: int) -> None:
    what = "values" if info.is_shape_tensor else "dimensions"
    expected = math.prod(info.shape) if info.is_shape_tensor else len(info.shape)
    for role, row in (("min", limits.min), ("opt", limits.opt), ("max", limits.max)):
        if len(row) != expected:
            raise BuilderError(f"{info} has {expected} {what}, but profile {index} gives {len(row)} as {role}: {row}")
    if not all(a <= b <= c for a, b, c in zip(limits.min, limits.opt, limits.max, strict=True)):
        raise BuilderError(
            f"profile {index} of {info} must satisfy MIN<=OPT<=MAX, but has min {limits.min}, opt {limits.opt}, "
            f"max {limits.max}"
        )
    if info.is_shape_tensor:
        return
    if min(limits.min, default=0) < 0:
        raise BuilderError(f"profile {index} of {info} has a negative dimension: min {limits.min}")
    for axis, size in enumerate(info.shape):
        found = (limits.min[axis], limits.opt[axis], limits.max[axis])
        if size >= 0 and found != (size, size, size):
            raise BuilderError(
                f"Dimension mismatch for tensor {info.name} and profile {index}. At dimension axis {axis}, profile has "
                f"min={found[0]}, opt={found[1]}, max={found[2]} but tensor has {size}; only dynamic axes may vary"
            )


def _check_named(dims: dict[str, tuple[Dim, ...]], profile: ProfileSpec, index: int) -> None:
    """Dimensions of one name are one size; measured, TensorRT checks this for the OPT shapes when it builds."""
    seen: dict[str, tuple[int, str]] = {}
    for name, limits in profile.items():
        if len(dims.get(name, ())) != len(limits.opt):
            continue
        for axis, dim in enumerate(dims[name]):
            # also "?", which exporters write for any unknown size: measured with tensorrt-rtx 1.7
            if not isinstance(dim, str):
                continue
            size = limits.opt[axis]
            first, where = seen.setdefault(dim, (size, name))
            if first != size:
                raise BuilderError(
                    f"Profile kOPT values are not self-consistent. Dimensions with name {dim} must be equal: "
                    f"{where} has {first}, {name} has {size} in profile {index}"
                )


def ranges_by_input(inputs: Sequence[TensorInfo], profiles: Sequence[ProfileSpec]) -> dict[str, tuple[ShapeRange, ...]]:
    """For each input one range per profile; a fixed input, or a build without profiles, has its own shape as range."""
    found: dict[str, tuple[ShapeRange, ...]] = {}
    for info in inputs:
        fixed = ShapeRange(info.shape, info.shape, info.shape)
        found[info.name] = tuple(profile.get(info.name, fixed) for profile in profiles) or (fixed,)
    return found
