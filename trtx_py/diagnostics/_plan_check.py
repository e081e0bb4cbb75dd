"""Whether a plan runs on this machine, told from its header."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .._errors import TrtxError
from ..backends._flavours import FLAVOURS, plan_fits
from ._types import FlavourStatus, Gpu, PlanVerdict

if TYPE_CHECKING:
    from .._plan import PlanHeader


def check_plan(path: str, flavours: Sequence[FlavourStatus], gpus: Sequence[Gpu]) -> PlanVerdict:
    """Never raises for what is wrong with the plan: that is what was asked."""
    try:
        from .._plan import Plan

        header = Plan.load(path).header
    except (TrtxError, ImportError) as error:
        return PlanVerdict(path, "", (), (), (str(error),))
    built = f"{header.flavour} {header.version}"
    if header.flavour not in FLAVOURS and (header.flavour == "mock" or header.flavour.endswith("+mock")):
        return PlanVerdict(path, built, header.compute_capabilities, (header.flavour,), ())
    problems = []
    architecture = _other_architecture(header, gpus)
    if architecture is not None:
        problems.append(architecture)
    runs_on = []
    installed = [flavour for flavour in flavours if flavour.version is not None]
    for flavour in installed:
        reason = _refusal(header, flavour)
        if reason is not None:
            problems.append(reason)
        elif flavour.runs and architecture is None:
            runs_on.append(flavour.name)
        elif not flavour.runs:
            problems += [f"{flavour.name} {flavour.version} would take it, and cannot run here: {each}"
                         for each in flavour.problems[-1:]]  # fmt: skip
    if not installed:
        takers = [flavour for flavour in FLAVOURS.values() if flavour.plan_flavour == header.flavour]
        names = " or ".join(flavour.packages[0] for flavour in takers) or header.flavour
        problems.append(f"built with {built}, and no TensorRT is installed here: install {names} {header.version}")
    if header.host_code:
        problems.append("it carries code for the CPU, so it loads with allow_host_code=True only")
    return PlanVerdict(path, built, header.compute_capabilities, tuple(runs_on), tuple(dict.fromkeys(problems)))


def _refusal(header: PlanHeader, flavour: FlavourStatus) -> str | None:
    from ..backends.registry import lean_library_for
    from ..backends.tensorrt._lean import lean_library_version

    assert flavour.version is not None
    lean = lean_library_for(flavour.name, None)
    lean_version = None
    if lean is not None and os.path.isfile(lean):
        try:
            lean_version = lean_library_version(lean)
        except TrtxError as error:
            return str(error)
    reason = plan_fits(
        header.flavour, header.version, flavour.name, flavour.version, header.version_compatible, lean_version,
        embedded_runtime=header.host_code,
    )  # fmt: skip
    if reason is None and not FLAVOURS[flavour.name].own_runtime and lean_version is None and not header.host_code:
        return (
            f"{flavour.name} {flavour.version} has no runtime of its own: set TRTX_LEAN_LIBRARY to the path of a "
            f"TensorRT {header.version} lean library"
        )
    return reason


def _other_architecture(header: PlanHeader, gpus: Sequence[Gpu]) -> str | None:
    wanted = header.compute_capabilities
    if not wanted or not gpus:
        return None
    here = [gpu.compute_capability for gpu in gpus]
    compatible = str(header.build_options.get("hardware_compatibility") or "").lower()
    if set(here) & set(wanted):
        return None
    if compatible == "ampere_plus" and any(int(each.split(".")[0]) >= 8 for each in here):
        return None
    names = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in gpus)
    return (
        f"built for compute capability {' and '.join(wanted)}, and here is {names}: build it again on this machine, or "
        f"with --compute-capability {here[0]} (TensorRT-RTX) or --hardware-compatibility"
    )
