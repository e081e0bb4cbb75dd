"""Options of a build as values: what ``create_config`` and ``open_engine`` take."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ._arguments import checked_int, checked_path, replace_file
from ._errors import InvalidArgumentError

#: One optimization profile as a caller writes it: (min, opt, max) for each input.
ProfileRanges = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]


def _check_name(owner: str, field: str, value: Any, *, optional: bool = True) -> None:
    if value is None and optional:
        return
    if not isinstance(value, str) or not value.isidentifier():
        raise InvalidArgumentError(f"{owner}.{field} is {value!r}; expected the name of one of TensorRT's enumerators")


def _check_flag(owner: str, field: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InvalidArgumentError(f"{owner}.{field} is {value!r}; expected True or False")


def _names(owner: str, field: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InvalidArgumentError(f"{owner}.{field} is {value!r}; expected a sequence of names")
    found = tuple(value)
    for name in found:
        _check_name(owner, field, name, optional=False)
    return tuple(name.upper() for name in found)


@dataclass(frozen=True)
class DlaOptions:
    """Layers on a Deep Learning Accelerator, on machines that have one (Jetson; not TensorRT-RTX).

    Attributes:
        core: which one, from 0.
        gpu_fallback: layers that it cannot run go to the GPU; else they fail the build.
        managed_sram_bytes, local_dram_bytes, global_dram_bytes: its memory pools; None leaves TensorRT's defaults.
    """

    core: int = 0
    gpu_fallback: bool = True
    managed_sram_bytes: int | None = None
    local_dram_bytes: int | None = None
    global_dram_bytes: int | None = None

    def __post_init__(self) -> None:
        checked_int(self.core, "DlaOptions.core", minimum=0)
        _check_flag("DlaOptions", "gpu_fallback", self.gpu_fallback)
        for field in ("managed_sram_bytes", "local_dram_bytes", "global_dram_bytes"):
            if getattr(self, field) is not None:
                checked_int(getattr(self, field), f"DlaOptions.{field}", minimum=0, maximum=2**63 - 1)


@dataclass(frozen=True)
class TimingCache:
    """Times of kernels that were measured before, in a file (TensorRT; TensorRT-RTX has a runtime cache instead).

    Attributes:
        path: read before the build if it is there, and replaced as a whole after it.
        ignore_mismatch: take one from another GPU model or driver too.
        editable: keep what TensorRT needs to edit it (10 and later).
        require_hit: fail the build where something would have to be measured (10 and later).
    """

    path: str | os.PathLike[str]
    ignore_mismatch: bool = False
    editable: bool = False
    require_hit: bool = False

    def __post_init__(self) -> None:
        checked_path(self.path, "TimingCache.path")
        for field in ("ignore_mismatch", "editable", "require_hit"):
            _check_flag("TimingCache", field, getattr(self, field))

    def _read(self) -> bytes:
        """What was kept; nothing if there is no file yet. Raises OSError."""
        try:
            with open(self.path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            return b""

    def _replace(self, content: bytes, combined: Callable[[bytes], bytes]) -> None:
        """Keep ``content``; ``combined`` adds to it what others have kept meanwhile. Raises InvalidArgumentError."""
        replace_file(os.fspath(self.path), content, "timing cache")


@dataclass(frozen=True)
class BuilderOptions:
    """What a build is asked for. Whatever is None, empty or False is left to TensorRT.

    What the version at hand lacks or refuses fails the build, by name and version; nothing is dropped.

    Attributes:
        precision, calibration, precision_policy, require_precision: as in BuilderConfig.
        workspace_bytes, optimization_level, max_aux_streams, profile_sharing, compute_capabilities: as in
            BuilderConfig.
        profiles: optimization profiles: ``[{"x": (min, opt, max)}, ...]``.
        flags: further builder flags by the names of nvinfer1::BuilderFlag.
        tf32: True and False set and clear it; on GPUs that have TF32 TensorRT uses it by default.
        sparse_weights: use kernels for weights of which two in four are 0.
        refit: weights that can be changed in the engine: "all", "identical" (with the same values, which gives faster
            kernels) or "individual" (``refittable_weights`` alone).
        refittable_weights: names of weights, for refit="individual": those of the ONNX model's initializers, and in a
            network of layers "<layer>//kernel" and the like, or the name of a constant.
        strip_plan: leave the weights out of the plan; they are given by a Refitter. Needs ``refit``.
        weight_streaming: weights may lie on the host and be streamed in, see EngineOptions.weight_streaming_bytes.
        version_compatible: later versions of TensorRT can run the plan.
        embed_runtime: with ``version_compatible``: put the code that runs the plan into it. Such a plan can run
            anything: it loads with ``allow_host_code=True`` only.
        hardware_compatibility: "ampere_plus" or "same_compute_capability": GPUs that the plan runs on besides this.
        runtime_platform: "windows_amd64" builds for Windows.
        tactic_dram_bytes, tactic_shared_memory_bytes: memory pools of tactics.
        tactic_sources: where kernels may come from, by the names of nvinfer1::TacticSource.
        max_tactics: how many kernels are tried for a layer; timing_iterations: how often each is timed.
        tiling: "fast", "moderate" or "full"; tiling_l2_bytes: L2 cache that it may count on.
        preview_features: by the names of nvinfer1::PreviewFeature; True turns one on, False off.
        profiling_verbosity: "layer_names_only", "detailed" or "none": what the plan tells the engine inspector.
        engine_capability: "standard", "safety" or "dla_standalone".
        timing_cache: a TimingCache.
        dla: DlaOptions, for layers on an accelerator.
        plugin_libraries, plugin_creators: as in ``builder.load_plugins``, which has to be called before a model with
            such plugins is parsed; ``open_engine`` does.
        embed_plugins: put the plugin libraries into the plan, which then loads with ``allow_host_code=True`` only.
        account_memory: let TensorRT allocate through the builder's device, so that its statistics and budget know.
        threads: how many threads the builder may use.
    """

    precision: str | None = None
    calibration: Any | None = None
    precision_policy: Any | None = None
    require_precision: bool = False
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    max_aux_streams: int | None = None
    profile_sharing: bool = True
    compute_capabilities: tuple[str, ...] = ()
    profiles: Sequence[ProfileRanges] = ()
    flags: tuple[str, ...] = ()
    tf32: bool | None = None
    sparse_weights: bool = False
    refit: str | None = None
    refittable_weights: tuple[str, ...] = ()
    strip_plan: bool = False
    weight_streaming: bool = False
    version_compatible: bool = False
    embed_runtime: bool = True
    hardware_compatibility: str | None = None
    runtime_platform: str | None = None
    tactic_dram_bytes: int | None = None
    tactic_shared_memory_bytes: int | None = None
    tactic_sources: tuple[str, ...] | None = None
    max_tactics: int | None = None
    timing_iterations: int | None = None
    tiling: str | None = None
    tiling_l2_bytes: int | None = None
    preview_features: Mapping[str, bool] | None = None
    profiling_verbosity: str | None = None
    engine_capability: str | None = None
    timing_cache: TimingCache | None = None
    dla: DlaOptions | None = None
    plugin_libraries: tuple[str | os.PathLike[str], ...] = ()
    plugin_creators: tuple[Any, ...] = ()
    embed_plugins: bool = False
    account_memory: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        own = "BuilderOptions"
        for field in ("sparse_weights", "strip_plan", "weight_streaming", "version_compatible", "embed_runtime",
                      "embed_plugins", "account_memory"):  # fmt: skip
            _check_flag(own, field, getattr(self, field))
        if self.tf32 is not None:
            _check_flag(own, "tf32", self.tf32)
        for field in ("hardware_compatibility", "runtime_platform", "tiling", "profiling_verbosity",
                      "engine_capability"):  # fmt: skip
            _check_name(own, field, getattr(self, field))
        for field, (least, most) in _NUMBERS.items():
            if getattr(self, field) is not None:
                self._freeze(field, checked_int(getattr(self, field), f"{own}.{field}", minimum=least, maximum=most))
        if self.refit not in (None, *_REFIT_FLAGS):
            raise InvalidArgumentError(f"refit is {self.refit!r}; expected None or one of {', '.join(_REFIT_FLAGS)}")
        if self.tf32 is not None and self.precision in ("fp32", "tf32") and self.tf32 is not (self.precision == "tf32"):
            raise InvalidArgumentError(f"tf32 is {self.tf32} and precision {self.precision!r}, which says the contrary")
        names: object = self.refittable_weights
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise InvalidArgumentError(f"refittable_weights is {names!r}; expected a sequence of names")
        given = tuple(names)
        if not all(isinstance(name, str) and name for name in given):
            raise InvalidArgumentError(f"refittable_weights is {given}; expected names of weights")
        self._freeze("refittable_weights", given)
        if bool(self.refittable_weights) is not (self.refit == "individual"):
            raise InvalidArgumentError(
                f"refit is {self.refit!r} and refittable_weights {self.refittable_weights}; expected names together "
                'with refit="individual", and only then'
            )
        if self.strip_plan and self.refit is None:
            raise InvalidArgumentError('strip_plan leaves the weights out; give refit="all" or "identical" too')
        if not self.embed_runtime and not self.version_compatible:
            raise InvalidArgumentError("embed_runtime=False says something about version_compatible plans only")
        if self.embed_plugins and not self.plugin_libraries:
            raise InvalidArgumentError("embed_plugins has no plugin_libraries to embed")
        for field, kind in (("timing_cache", TimingCache), ("dla", DlaOptions)):
            value = getattr(self, field)
            if value is not None and not isinstance(value, kind):
                raise InvalidArgumentError(f"{field} is {type(value).__name__}; expected {kind.__name__}, or None")
        # Sequences and mappings of the caller's are copied: a frozen value is to stay what it was.
        self._freeze("profiles", _checked_profiles(self.profiles))
        capabilities: object = self.compute_capabilities
        if isinstance(capabilities, Iterable) and not isinstance(capabilities, str):
            self._freeze("compute_capabilities", tuple(capabilities))
        self._freeze("flags", _names(own, "flags", self.flags))
        if self.tactic_sources is not None:
            self._freeze("tactic_sources", _names(own, "tactic_sources", self.tactic_sources))
        if self.preview_features is not None:
            self._freeze("preview_features", _checked_features(self.preview_features))
        libraries = self.plugin_libraries
        if isinstance(libraries, (str, os.PathLike)) or not isinstance(libraries, Iterable):
            raise InvalidArgumentError(f"plugin_libraries is {libraries!r}; expected a sequence of paths")
        self._freeze("plugin_libraries", tuple(checked_path(one, "one of plugin_libraries") for one in libraries))
        creators: object = self.plugin_creators
        if isinstance(creators, str) or not isinstance(creators, Iterable):
            raise InvalidArgumentError(f"plugin_creators is {creators!r}; expected a sequence of plugin creators")
        self._freeze("plugin_creators", tuple(creators))

    def _freeze(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)

    @property
    def builder_flags(self) -> frozenset[str]:
        """Names of the flags of nvinfer1::BuilderFlag that all of this sets."""
        found = set(self.flags)
        for field, flag in _FLAGS.items():
            if getattr(self, field):
                found.add(flag)
        if self.refit is not None:
            found.add(_REFIT_FLAGS[self.refit])
        if not self.embed_runtime:
            found.add("EXCLUDE_LEAN_RUNTIME")
        if self.dla is not None and self.dla.gpu_fallback:
            found.add("GPU_FALLBACK")
        cache = self.timing_cache
        if cache is not None:
            found |= {flag for field, flag in _CACHE_FLAGS.items() if getattr(cache, field)}
        return frozenset(found)

    @property
    def further(self) -> dict[str, Any]:
        """What is asked for beyond BuilderConfig's own attributes, flags and profiles, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name in _FURTHER}
        left_out = (None, ())
        return {name: v for name, v in values.items() if v not in left_out and (v is not False or name == "tf32")}


_MOST_INT, _MOST_BYTES = 2**31 - 1, 2**63 - 1
#: Numbers, with the smallest and the largest that TensorRT's types hold.
_NUMBERS = {
    "workspace_bytes": (0, _MOST_BYTES), "tactic_dram_bytes": (0, _MOST_BYTES),
    "tactic_shared_memory_bytes": (0, _MOST_BYTES), "tiling_l2_bytes": (0, _MOST_BYTES),
    "max_tactics": (1, _MOST_INT), "timing_iterations": (1, _MOST_INT), "threads": (1, _MOST_INT),
}  # fmt: skip
_REFIT_FLAGS = {"all": "REFIT", "identical": "REFIT_IDENTICAL", "individual": "REFIT_INDIVIDUAL"}
_FLAGS = {
    "tf32": "TF32", "sparse_weights": "SPARSE_WEIGHTS", "strip_plan": "STRIP_PLAN",
    "weight_streaming": "WEIGHT_STREAMING", "version_compatible": "VERSION_COMPATIBLE",
}  # fmt: skip
_CACHE_FLAGS = {"editable": "EDITABLE_TIMING_CACHE", "require_hit": "ERROR_ON_TIMING_CACHE_MISS"}
_FURTHER = frozenset(
    {
        "tf32", "hardware_compatibility", "runtime_platform", "tactic_dram_bytes", "tactic_shared_memory_bytes",
        "tactic_sources", "max_tactics", "timing_iterations", "tiling", "tiling_l2_bytes", "preview_features",
        "profiling_verbosity", "engine_capability", "refittable_weights", "timing_cache", "dla", "plugin_libraries",
        "plugin_creators", "embed_plugins", "account_memory", "threads",
    }
)  # fmt: skip


def _checked_profiles(value: Any) -> tuple[Any, ...]:
    """Copies of all profiles. What they hold is checked by the config, which knows the number of each."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise InvalidArgumentError(
            f"profiles is {type(value).__name__}; expected a list of mappings: [{{'x': (min, opt, max)}}]"
        )
    return tuple(_copied(spec) for spec in value)


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copied(one) for name, one in value.items()}
    return tuple(_copied(one) for one in value) if isinstance(value, (list, tuple)) else value


def _checked_features(value: Any) -> dict[str, bool]:
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(f"preview_features is {value!r}; expected a mapping of names to True or False")
    for name, on in value.items():
        _check_name("BuilderOptions", "preview_features", name, optional=False)
        _check_flag("BuilderOptions", f"preview_features[{name!r}]", on)
    return {name.upper(): on for name, on in value.items()}


__all__ = ["BuilderOptions", "DlaOptions", "ProfileRanges", "TimingCache"]
