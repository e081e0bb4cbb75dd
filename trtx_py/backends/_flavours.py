"""The one table of version facts about the TensorRT family. Pure: imports no vendor module.

Everything that differs between members and versions and that code must know *before* it calls into TensorRT is here;
what can be asked of the imported module (which enum members exist) is asked there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .._errors import InvalidArgumentError

Version = tuple[int, ...]
Typing = Literal["weak", "optional", "strong"]
ProfileSharing = Literal["preview", "always"]


@dataclass(frozen=True)
class Flavour:
    """One member of the family.

    Attributes:
        name: the name it is chosen by, and its import name.
        bindings: import names to try, in order; the second is what the bindings wheel alone provides.
        packages: what to install for it, as pip knows it.
        plan_flavour: the flavour that plans carry which it can load.
        can_build: has a builder and an ONNX parser.
        own_runtime: can run plans without loading another library (tensorrt_dispatch cannot).
        loads_lean_library: ``load_runtime`` works for libraries one can get.
        can_target: builds for named compute capabilities, also where no GPU is.
        runs_on: compute capabilities its runtime accepts, as "major.minor" or "major.x"; empty: TensorRT decides.
    """

    name: str
    bindings: tuple[str, ...]
    packages: tuple[str, ...]
    plan_flavour: str
    can_build: bool
    own_runtime: bool = True
    loads_lean_library: bool = True
    can_target: bool = False
    runs_on: tuple[str, ...] = ()

    def runs_on_capability(self, major: int, minor: int) -> bool:
        """True if this flavour's runtime accepts a GPU of that compute capability."""
        return not self.runs_on or f"{major}.{minor}" in self.runs_on or f"{major}.x" in self.runs_on

    @property
    def install_hint(self) -> str:
        """The command that installs it."""
        return " or ".join(f"pip install {package}" for package in self.packages)


@dataclass(frozen=True)
class VersionFacts:
    """What a version of a flavour does differently.

    Attributes:
        since: first version these facts hold for.
        typing: "weak" takes precisions from builder flags, "strong" from the model; "optional" has both.
        explicit_batch_flag: networks need ``NetworkDefinitionCreationFlag.EXPLICIT_BATCH``.
        precision_flags: builder flags that choose a precision.
        int64_is_real: INT64 tensors stay INT64; before, they were cast to INT32.
        profile_sharing: "preview" needs ``PreviewFeature.PROFILE_SHARING_0806``; "always" shares by default.
        progress_monitor: ``IProgressMonitor`` exists, so a build can be watched and aborted.
        lean_majors: major versions of lean libraries that ``load_runtime`` may be given. Others end the process
            without a message (11.4 loading 8.6, measured).
    """

    since: Version
    typing: Typing
    explicit_batch_flag: bool
    precision_flags: frozenset[str]
    int64_is_real: bool
    profile_sharing: ProfileSharing
    progress_monitor: bool
    lean_majors: frozenset[int]


FLAVOURS: dict[str, Flavour] = {
    flavour.name: flavour
    for flavour in (
        Flavour(
            name="tensorrt",
            bindings=("tensorrt", "tensorrt_bindings"),
            packages=("tensorrt",),
            plan_flavour="tensorrt",
            can_build=True,
        ),
        Flavour(
            name="tensorrt_rtx",
            bindings=("tensorrt_rtx", "tensorrt_rtx_bindings"),
            packages=("tensorrt-rtx",),
            plan_flavour="tensorrt_rtx",
            can_build=True,
            loads_lean_library=False,
            can_target=True,
            runs_on=("7.5", "8.0", "8.6", "8.9", "12.x"),
        ),
        Flavour(
            name="tensorrt_lean",
            bindings=("tensorrt_lean", "tensorrt_lean_bindings"),
            packages=("tensorrt-lean-cu13", "tensorrt-lean-cu12"),
            plan_flavour="tensorrt",
            can_build=False,
        ),
        Flavour(
            name="tensorrt_dispatch",
            bindings=("tensorrt_dispatch", "tensorrt_dispatch_bindings"),
            packages=("tensorrt-dispatch-cu13", "tensorrt-dispatch-cu12"),
            plan_flavour="tensorrt",
            can_build=False,
            own_runtime=False,
        ),
    )
}

_CLASSIC = (
    VersionFacts(
        since=(8, 6),
        typing="weak",
        explicit_batch_flag=True,
        precision_flags=frozenset({"FP16", "INT8", "FP8"}),
        int64_is_real=False,
        profile_sharing="preview",
        progress_monitor=False,
        lean_majors=frozenset({8}),
    ),
    VersionFacts(
        since=(10, 0),
        typing="optional",
        explicit_batch_flag=False,
        precision_flags=frozenset({"FP16", "BF16", "INT8", "FP8", "INT4", "FP4"}),
        int64_is_real=True,
        profile_sharing="always",
        progress_monitor=True,
        lean_majors=frozenset({8, 10}),
    ),
    VersionFacts(
        since=(11, 0),
        typing="strong",
        explicit_batch_flag=False,
        precision_flags=frozenset(),
        int64_is_real=True,
        profile_sharing="always",
        progress_monitor=True,
        lean_majors=frozenset({10, 11}),
    ),
)
_RTX = (
    VersionFacts(
        since=(1, 0),
        typing="strong",
        explicit_batch_flag=False,
        precision_flags=frozenset(),
        int64_is_real=True,
        profile_sharing="always",
        progress_monitor=True,
        lean_majors=frozenset(),
    ),
)

#: Engine and runtime methods younger than 8.6: called through a lean library older than 10 they would reach past the
#: end of what that library implements. Nothing here may be called until a probe on a GPU has shown that it survives.
NEWER_THAN_LEAN_8 = frozenset(
    {
        "device_memory_size_v2",
        "get_device_memory_size_for_profile",
        "get_device_memory_size_for_profile_v2",
        "get_engine_stat",
        "get_tensor_profile_values",
    }
)

#: Lean libraries older than this know activation memory by its address alone (setDeviceMemory, not V2).
SIZED_DEVICE_MEMORY_SINCE_LEAN: Version = (10, 1)

#: Lean libraries older than this do not survive Python callbacks from a newer runtime (IOutputAllocator, measured).
CALLBACKS_SAFE_SINCE_LEAN: Version = (10,)

#: A runtime and an older lean library through which an IProfiler was measured to live: on an H200, driver 580.159.04,
#: layers added up to 0.99 of the GPU time for resnet50 (fp16, int8) and bert_small.
PROFILER_LIVES: frozenset[tuple[str, Version, Version]] = frozenset({("tensorrt_dispatch", (10, 16, 1, 11), (8, 6, 0))})


def parse_version(text: str) -> Version:
    """The leading numbers of a version: ``"8.6.0.12"`` gives ``(8, 6, 0, 12)``, ``"10.16.1.dev0"`` ``(10, 16, 1)``.

    Raises InvalidArgumentError if there is none.
    """
    found = re.match(r"\s*\d+(\.\d+)*", text)
    if found is None:
        raise InvalidArgumentError(f"{text!r} is not a version; expected numbers with dots, such as '8.6.0.12'")
    return tuple(int(part) for part in found.group().split("."))


def flavour_named(name: str) -> Flavour:
    """Raises InvalidArgumentError, with the known names, if there is no such flavour."""
    try:
        return FLAVOURS[name]
    except KeyError:
        raise InvalidArgumentError(
            f"{name!r} is no TensorRT flavour; known are {', '.join(sorted(FLAVOURS))}"
        ) from None


def version_facts(flavour: str, version: str) -> VersionFacts | None:
    """Facts for this version, None if it is older than all that are known and must be refused."""
    table = _RTX if flavour == "tensorrt_rtx" else _CLASSIC
    flavour_named(flavour)
    number = parse_version(version)
    known = [facts for facts in table if facts.since <= number]
    return known[-1] if known else None


def oldest_version(flavour: str) -> str:
    """The oldest version of a flavour that the table knows."""
    return ".".join(map(str, (_RTX if flavour == "tensorrt_rtx" else _CLASSIC)[0].since))


def lean_library_refusal(flavour: str, version: str, lean_version: str) -> str | None:
    """Why this runtime must not load a lean library of that version, None if it may."""
    member = flavour_named(flavour)
    runtime = f"{flavour} {version}"
    if not member.loads_lean_library:
        return (
            f"{runtime} loads no lean library: none is distributed for it, and its plans are not those of tensorrt; "
            f"open the plan with tensorrt_dispatch or tensorrt instead, or leave lean_library unset"
        )
    facts = version_facts(flavour, version)
    if facts is None:
        return f"{runtime} is older than {oldest_version(flavour)}, the oldest version that is supported"
    lean = parse_version(lean_version)
    if lean[0] not in facts.lean_majors:
        fitting = " or ".join(f"{major}.x" for major in sorted(facts.lean_majors))
        hint = " Install tensorrt-dispatch-cu13 10.16 to run plans of 8.6." if lean[0] == 8 else ""
        return (
            f"{runtime} cannot load the lean library {lean_version}: loading one of another generation ends the "
            f"process; it takes lean libraries of {fitting}.{hint}"
        )
    if lean[:2] > parse_version(version)[:2]:
        return f"{runtime} cannot load the newer lean library {lean_version}; install a runtime as new as that"
    return None


def output_allocator_refusal(runtime: str, lean_version: str | None) -> str | None:
    """Why an output allocator cannot be used, None if it can."""
    if lean_version is None or parse_version(lean_version) >= CALLBACKS_SAFE_SINCE_LEAN:
        return None
    return (
        f"{runtime} cannot carry an IOutputAllocator into the lean library {lean_version}: the process would end; "
        f"bind a buffer of the output's maximum size instead, or rebuild the plan with TensorRT 10 or later"
    )


def untried_profiler(runtime: str, lean_version: str | None) -> str | None:
    """Why it is not known whether an IProfiler lives here, None if it does.

    IProfiler has had the same two virtual functions since 8.6 and, unlike IOutputAllocator, no version of its own, so
    that it passes where the other ends the process: measured for PROFILER_LIVES, and taken for granted nowhere else.

    Args:
        runtime: name and version, such as "tensorrt_dispatch 10.16.1.11".
    """
    if lean_version is None or parse_version(lean_version) >= CALLBACKS_SAFE_SINCE_LEAN:
        return None
    name, _, version = runtime.partition(" ")
    if version and (name, parse_version(version), parse_version(lean_version)) in PROFILER_LIVES:
        return None
    return f"nobody has tried an IProfiler of {runtime} in the lean library {lean_version}"


def plan_fits(
    plan_flavour: str,
    plan_version: str,
    runtime_flavour: str,
    runtime_version: str,
    version_compatible: bool | None,
    lean_library_version: str | None,
    *,
    embedded_runtime: bool | None = None,
) -> str | None:
    """Whether a runtime can take a plan, as far as that can be known without TensorRT.

    Args:
        version_compatible: built with ``BuilderFlag.VERSION_COMPATIBLE``; None if unknown.
        lean_library_version: version of the lean library that the runtime loads, None if it loads none.
        embedded_runtime: the plan carries its own lean runtime (no ``EXCLUDE_LEAN_RUNTIME``); None if unknown.
    Returns:
        None if it fits or if only TensorRT can tell, else why not: both versions and the next step.
    """
    plan_text = f"plan built with {plan_flavour} {plan_version}"
    runtime = f"{runtime_flavour} {runtime_version}"
    if lean_library_version is not None:
        runtime += f" with the lean library {lean_library_version}"
    wanted = FLAVOURS[runtime_flavour].plan_flavour if runtime_flavour in FLAVOURS else runtime_flavour
    if plan_flavour != wanted:
        return f"{plan_text} does not run on {runtime}: {_next_step_for_flavour(plan_flavour, wanted)}"
    if lean_library_version is not None and runtime_flavour in FLAVOURS:
        refusal = lean_library_refusal(runtime_flavour, runtime_version, lean_library_version)
        if refusal is not None:
            return refusal
    plan = parse_version(plan_version)
    here = parse_version(lean_library_version or runtime_version)
    common = min(len(plan), len(here))
    if plan[:common] == here[:common]:
        return None
    if plan[:common] > here[:common]:
        return f"{plan_text} is newer than {runtime}: install version {plan_version} or later, or rebuild the plan"
    if version_compatible is False:
        return (
            f"{plan_text} needs exactly that version, and here is {runtime}: "
            f"rebuild it here, or build it with the flag VERSION_COMPATIBLE"
        )
    if plan[0] == here[0]:
        return None
    if lean_library_version is not None:
        return (
            f"{plan_text} does not run on {runtime}: a lean library runs plans of its own major version; "
            f"pass a lean library of version {plan[0]}.{plan[1]}"
        )
    if embedded_runtime or (version_compatible and embedded_runtime is None):
        return None
    return (
        f"{plan_text} does not run on {runtime} alone: pass lean_library= (or TRTX_LEAN_LIBRARY) with the path of "
        f"a TensorRT {plan[0]}.{plan[1]} lean library, or rebuild the plan with version {runtime_version}"
    )


def _next_step_for_flavour(plan_flavour: str, wanted: str) -> str:
    if plan_flavour.endswith("mock"):
        return f"it runs on the mock only; choose backend={plan_flavour!r}, or rebuild it for this runtime"
    if wanted.endswith("mock"):
        return f"the mock runs its own plans only; choose backend={plan_flavour!r}, or rebuild the plan with {wanted!r}"
    takers = [flavour.name for flavour in FLAVOURS.values() if flavour.plan_flavour == plan_flavour]
    names = " or ".join(takers) or "the library it was built with"
    return f"it takes plans of {wanted}; open the plan with {names}, or rebuild it with {wanted}"
