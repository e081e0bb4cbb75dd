"""The rarer options of a build. Each is honoured, or refused by name and version."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from typing import Any

from ..._builder_options import DlaOptions, TimingCache
from ..._errors import BuilderError, InvalidArgumentError
from ..._types import Severity
from ..protocols import DeviceMemory, LogSink
from ._allocator import make_allocator
from ._log_router import Operation
from ._plugins import load_plugins
from ._vendor import Vendor

#: option -> attribute of IBuilderConfig and the enumeration of its values
_ENUMERATORS = {
    "hardware_compatibility": ("hardware_compatibility_level", "HardwareCompatibilityLevel"),
    "runtime_platform": ("runtime_platform", "RuntimePlatform"),
    "tiling": ("tiling_optimization_level", "TilingOptimizationLevel"),
    "profiling_verbosity": ("profiling_verbosity", "ProfilingVerbosity"),
    "engine_capability": ("engine_capability", "EngineCapability"),
}
_NUMBERS = {
    "max_tactics": "max_num_tactics",
    "timing_iterations": "avg_timing_iterations",
    "tiling_l2_bytes": "l2_limit_for_tiling",
}
_POOLS = {"tactic_dram_bytes": "TACTIC_DRAM", "tactic_shared_memory_bytes": "TACTIC_SHARED_MEMORY"}
_DLA_POOLS = {
    "managed_sram_bytes": "DLA_MANAGED_SRAM",
    "local_dram_bytes": "DLA_LOCAL_DRAM",
    "global_dram_bytes": "DLA_GLOBAL_DRAM",
}


class AdvancedOptions:
    """Sets the options that are given, and undoes after the build what concerns the builder.

    Args:
        wanted: BuilderOptions.further.
        memory: where device memory is counted; None where there is no device.
    Source: nvinfer1::IBuilderConfig, nvinfer1::IBuilder
    """

    def __init__(
        self,
        vendor: Vendor,
        log: LogSink,
        builder: Any,
        config: Any,
        wanted: Mapping[str, Any],
        memory: DeviceMemory | None,
        network: Any,
    ) -> None:
        self._vendor = vendor
        self._log = log
        self._builder = builder
        self._config = config
        self._memory = memory
        self._network = network
        self._cache: Any = None
        self._allocator: Any = None
        self._threads: int | None = None
        self._wanted = wanted

    def apply(self, operation: Operation) -> None:
        """Raises BuilderError for what this version does not have, or refuses."""
        for name, value in self._wanted.items():
            if name in _ENUMERATORS:
                self._set_enumerator(name, value)
            elif name in _NUMBERS:
                self._set(name, _NUMBERS[name], value)
            elif name in _POOLS:
                self._set_pool(name, _POOLS[name], value)
            else:
                getattr(self, f"_apply_{name}")(value, operation)

    def finish(self, *, built: bool) -> None:
        """The build has ended: what it found out is kept, what concerned it alone is undone."""
        if self._threads is not None:
            self._builder.max_threads = self._threads
        if self._allocator is not None:
            self._builder.gpu_allocator = None
        if built and self._cache is not None:
            try:
                self._save_timing_cache(self._wanted["timing_cache"])
            except InvalidArgumentError as error:  # the plan is worth more than the times that it took to find it
                self._log(Severity.WARNING, f"{error.message}; the next build measures again")
        self._cache = None

    def _lacks(self, what: str, name: str, step: str = "") -> BuilderError:
        return BuilderError(f"{self._vendor.title} has no {what}; leave {name} unset{step}")

    def _set(self, name: str, attribute: str, value: Any) -> None:
        if not hasattr(self._config, attribute):
            raise self._lacks(attribute, name)
        setattr(self._config, attribute, value)
        found = getattr(self._config, attribute)
        if found != value:
            raise BuilderError(
                f"{self._vendor.title} refused {name}: {getattr(value, 'name', value)} was asked for, it stays with "
                f"{getattr(found, 'name', found)}; leave {name} unset"
            )

    def _set_enumerator(self, name: str, value: str) -> None:
        attribute, enumeration = _ENUMERATORS[name]
        known = self._vendor.members(enumeration)
        if not known:
            raise self._lacks(enumeration, name)
        if value.upper() not in known:
            raise BuilderError(
                f"{self._vendor.title} has no {enumeration}.{value.upper()}; for {name} it has {', '.join(known)}"
            )
        self._set(name, attribute, known[value.upper()])

    def _set_pool(self, name: str, pool: str, nbytes: int) -> None:
        known = self._vendor.members("MemoryPoolType")
        if pool not in known:
            raise self._lacks(f"memory pool {pool}", name)
        self._config.set_memory_pool_limit(known[pool], nbytes)
        found = self._config.get_memory_pool_limit(known[pool])
        if found != nbytes:
            raise BuilderError(f"{self._vendor.title} refused {name}: {nbytes} bytes were asked for, it keeps {found}")

    def _apply_tf32(self, on: bool, operation: Operation) -> None:
        flag = self._vendor.members("BuilderFlag").get("TF32")
        if flag is None:
            raise self._lacks("builder flag TF32", "tf32")
        if not on:
            self._config.clear_flag(flag)

    def _apply_tactic_sources(self, names: tuple[str, ...], operation: Operation) -> None:
        known = self._vendor.members("TacticSource")
        missing = [name for name in names if name not in known]
        if missing or not hasattr(self._config, "set_tactic_sources"):
            raise BuilderError(
                f"{self._vendor.title} has no tactic source {', '.join(missing)}; it has {', '.join(known) or 'none'}"
            )
        if not self._config.set_tactic_sources(sum(1 << int(known[name]) for name in names)):
            raise BuilderError(
                f"{self._vendor.title} refused the tactic sources {', '.join(names) or '(none)'}",
                tensorrt_log=operation.lines,
            )

    def _apply_preview_features(self, features: Mapping[str, bool], operation: Operation) -> None:
        known = self._vendor.members("PreviewFeature")
        for name, on in features.items():
            if name not in known:
                raise BuilderError(
                    f"{self._vendor.title} has no preview feature {name}; it has {', '.join(known) or 'none'}"
                )
            self._config.set_preview_feature(known[name], on)
            found = getattr(self._config, "get_preview_feature", None)
            if found is not None and bool(found(known[name])) is not on:
                raise BuilderError(
                    f"{self._vendor.title} refused to turn the preview feature {name} {'on' if on else 'off'}",
                    tensorrt_log=operation.lines,
                )

    def _apply_refittable_weights(self, names: tuple[str, ...], operation: Operation) -> None:
        """Source: nvinfer1::INetworkDefinition::markWeightsRefittable"""
        if not hasattr(self._network, "mark_weights_refittable"):
            raise self._lacks(
                "INetworkDefinition::markWeightsRefittable", "refittable_weights", ', and use refit="all"'
            )
        for name in names:
            if not self._network.mark_weights_refittable(name):
                raise BuilderError(
                    f"{self._vendor.title} has no weights {name!r} in this network, which refittable_weights names",
                    tensorrt_log=operation.lines,
                )

    def _apply_timing_cache(self, wanted: TimingCache, operation: Operation) -> None:
        if self._vendor.flavour.can_target:
            raise BuilderError(
                f"{self._vendor.title} has no timing cache (its own does nothing); leave timing_cache unset, and keep "
                "the kernels that it compiles with Runtime(runtime_cache=path)"
            )
        path = os.fspath(wanted.path)
        try:
            content = wanted._read()
        except OSError as error:
            raise BuilderError(f"timing cache {path!r} cannot be read: {error.strerror}") from error
        cache = self._config.create_timing_cache(content)
        if cache is None or not self._config.set_timing_cache(cache, wanted.ignore_mismatch):
            if not content:
                raise BuilderError(f"{self._vendor.title} made no timing cache", tensorrt_log=operation.lines)
            self._log(
                Severity.WARNING,
                f"{self._vendor.title} refused the timing cache {path!r}: another version, GPU or driver wrote it, or "
                "it is damaged; everything is measured again, and the file replaced",
            )
            cache = self._config.create_timing_cache(b"")
            self._config.set_timing_cache(cache, False)
        self._cache = cache

    def _save_timing_cache(self, wanted: TimingCache) -> None:
        cache = self._config.get_timing_cache() or self._cache
        content = cache.serialize()
        if content is None:
            return

        def combined(other: bytes) -> bytes:
            more = self._config.create_timing_cache(other)
            if more is None or not cache.combine(more, wanted.ignore_mismatch):
                return bytes(content)  # the other one is of no use here
            return bytes(cache.serialize())

        wanted._replace(bytes(content), combined)

    def _apply_dla(self, wanted: DlaOptions, operation: Operation) -> None:
        cores = int(getattr(self._builder, "num_DLA_cores", 0))
        if wanted.core >= cores:
            raise BuilderError(
                f"{self._vendor.title} finds {cores} DLA cores here, and number {wanted.core} was asked for; "
                "leave dla unset"
            )
        self._config.default_device_type = self._vendor.module.DeviceType.DLA
        self._set("dla.core", "DLA_core", wanted.core)
        for field, pool in _DLA_POOLS.items():
            nbytes = getattr(wanted, field)
            if nbytes is not None:
                self._set_pool(f"dla.{field}", pool, nbytes)

    def _apply_plugin_libraries(self, paths: tuple[str, ...], operation: Operation) -> None:
        load_plugins(self._vendor, paths, (), operation)

    def _apply_plugin_creators(self, creators: tuple[Any, ...], operation: Operation) -> None:
        load_plugins(self._vendor, (), creators, operation)

    def _apply_embed_plugins(self, on: bool, operation: Operation) -> None:
        if not hasattr(self._config, "plugins_to_serialize"):
            raise self._lacks("plugins_to_serialize", "embed_plugins")
        self._config.plugins_to_serialize = list(self._wanted["plugin_libraries"])

    def _apply_account_memory(self, on: bool, operation: Operation) -> None:
        if self._memory is None:
            raise BuilderError("account_memory counts on a device, and there is no GPU or driver here; leave it unset")
        allocator = make_allocator(self._vendor, self._memory)
        # TensorRT keeps a bare pointer, also in what outlives the build.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(allocator))
        self._builder.gpu_allocator = self._allocator = allocator

    def _apply_threads(self, count: int, operation: Operation) -> None:
        if not hasattr(self._builder, "max_threads"):
            raise self._lacks("max_threads", "threads")
        self._threads = int(self._builder.max_threads)
        self._builder.max_threads = count
        if self._builder.max_threads != count:
            raise BuilderError(f"{self._vendor.title} refused {count} threads; it uses {self._builder.max_threads}")
