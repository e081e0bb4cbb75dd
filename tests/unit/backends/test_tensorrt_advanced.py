"""The rarer options with stand-ins for 8.6, 10 and 11: each is set, or refused by name and version."""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from tests.unit.backends.fake_vendor import FakeConfig, FakeVendor, Severity, members
from trtx_py._errors import BuilderError, DTypeError, EngineError, MemoryBudgetError, ShapeError
from trtx_py._types import BuildOptions, ShapeRange
from trtx_py.backends.tensorrt import TensorRTFamilyBackend
from trtx_py.backends.tensorrt._allocator import CountedAllocations
from trtx_py.backends.tensorrt._refitter import Refitter
from trtx_py.backends.tensorrt._vendor import Vendor

V8, V10, V11 = "8.6.0", "10.9.0.34", "11.4.0.106"
PROFILE = {"x": ShapeRange((1, 4), (2, 4), (8, 4))}


class TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> Any:
        return self.content + b"+measured"


class Config86(FakeConfig):
    """IBuilderConfig of 8.6: what is not here, it does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.hardware_compatibility_level = 0
        self.avg_timing_iterations = 1
        self.profiling_verbosity = self.engine_capability = 0
        self.default_device_type: Any = None
        self.DLA_core = -1
        self.plugins_to_serialize: list[str] = []
        self.tactics: int | None = None
        self.cache: Any = None
        self.refuses_cache = False

    def set_tactic_sources(self, mask: int) -> bool:
        self.tactics = mask
        return mask != 0

    def create_timing_cache(self, content: bytes) -> TimingCache:
        return TimingCache(content)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        if self.refuses_cache and cache.content:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.cache


class Config10(Config86):
    def __init__(self) -> None:
        super().__init__()
        self.tiling_optimization_level = self.l2_limit_for_tiling = self.runtime_platform = 0
        self.max_num_tactics = -1


class Registry:
    def __init__(self) -> None:
        self.libraries: list[str] = []
        self.creators: list[Any] = []

    def load_library(self, path: str) -> Any:
        if "missing" in path:
            return None
        self.libraries.append(path)
        return object()


class Registry10(Registry):
    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators.append(creator)
        return True


class Fixture:
    def __init__(self, version: str) -> None:
        self.vendor: Any = FakeVendor(version)
        vendor: Any = self.vendor
        major = int(version.split(".")[0])
        sources = ("CUBLAS", "CUBLAS_LT", "CUDNN") if major < 11 else ()
        vendor.TacticSource = members("TacticSource", *sources, "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
        vendor.DeviceType = members("DeviceType", "GPU", "DLA")
        vendor.EngineCapability = members("EngineCapability", "STANDARD", "SAFETY", "DLA_STANDALONE")
        vendor.ProfilingVerbosity = members("ProfilingVerbosity", "LAYER_NAMES_ONLY", "NONE", "DETAILED")
        pools = ("WORKSPACE", "DLA_MANAGED_SRAM", "DLA_LOCAL_DRAM", "DLA_GLOBAL_DRAM", "TACTIC_DRAM")
        vendor.MemoryPoolType = members("MemoryPoolType", *pools, *(("TACTIC_SHARED_MEMORY",) if major >= 10 else ()))
        levels = ("NONE", "AMPERE_PLUS", *(("SAME_COMPUTE_CAPABILITY",) if major >= 10 else ()))
        vendor.HardwareCompatibilityLevel = members("HardwareCompatibilityLevel", *levels)
        if major >= 10:
            vendor.TilingOptimizationLevel = members("TilingOptimizationLevel", "NONE", "FAST", "MODERATE", "FULL")
            vendor.RuntimePlatform = members("RuntimePlatform", "SAME_AS_BUILD", "WINDOWS_AMD64")
            vendor.INetworkDefinition = type("INetworkDefinition", (), {"add_plugin_v3": None})
            vendor.IPluginCreatorV3One = type("IPluginCreatorV3One", (), {"__init__": lambda self: None})
        vendor.IGpuAllocator = type("IGpuAllocator", (), {"__init__": lambda self: None})
        self.registry = Registry10() if major >= 10 else Registry()
        vendor.get_plugin_registry = lambda: self.registry
        self.config_class: Any = Config86 if major < 10 else Config10
        vendor.Builder.create_builder_config = lambda builder: self._configure()
        vendor.Builder.max_threads, vendor.Builder.num_DLA_cores = 1, 0
        vendor.__name__ = "tensorrt"
        self.lines: list[str] = []
        backend = TensorRTFamilyBackend("tensorrt", module=vendor)
        self.builder = backend.create_builder(lambda severity, line: self.lines.append(line))

    def _configure(self) -> Any:
        config = self.config_class()
        self.vendor.configs.append(config)
        return config

    def build(self, memory: Any = None, **options: Any) -> Any:
        further = trtx.BuilderOptions(**options).further
        network = self.builder.create_network()
        network.parse_onnx(b"model", None)
        wanted = BuildOptions(profiles=(PROFILE,), profile_sharing=False, further=further, memory=memory)
        self.builder.build_serialized_network(network, wanted, None)
        return self.vendor.configs[-1]


def test_options_reach_the_configuration() -> None:
    config = Fixture(V10).build(
        hardware_compatibility="ampere_plus", runtime_platform="windows_amd64", tiling="full", tiling_l2_bytes=1 << 20,
        max_tactics=4, timing_iterations=3, profiling_verbosity="detailed", engine_capability="safety",
        tactic_dram_bytes=5, tactic_shared_memory_bytes=6, tactic_sources=("cublas", "JIT_CONVOLUTIONS"), tf32=False,
        preview_features={"ALIASED_PLUGIN_IO_10_03": True}, threads=3,
    )  # fmt: skip
    assert config.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert config.runtime_platform.name == "WINDOWS_AMD64"
    assert (config.tiling_optimization_level.name, config.l2_limit_for_tiling) == ("FULL", 1 << 20)
    assert (config.max_num_tactics, config.avg_timing_iterations) == (4, 3)
    assert (config.profiling_verbosity.name, config.engine_capability.name) == ("DETAILED", "SAFETY")
    assert {pool.name: size for pool, size in config.pools.items()} == {"TACTIC_DRAM": 5, "TACTIC_SHARED_MEMORY": 6}
    assert config.tactics == 0b10001
    assert {flag.name for flag in config.cleared} == {"TF32"}
    assert config.features == {"ALIASED_PLUGIN_IO_10_03": True}


LACKING: list[tuple[str, dict[str, Any], str]] = [
    (V8, {"tiling": "fast"}, "tensorrt 8.6.0 has no TilingOptimizationLevel; leave tiling unset"),
    (V8, {"tiling_l2_bytes": 1}, "tensorrt 8.6.0 has no l2_limit_for_tiling"),
    (V8, {"max_tactics": 1}, "tensorrt 8.6.0 has no max_num_tactics"),
    (V8, {"runtime_platform": "windows_amd64"}, "tensorrt 8.6.0 has no RuntimePlatform"),
    (V8, {"tactic_shared_memory_bytes": 1}, "tensorrt 8.6.0 has no memory pool TACTIC_SHARED_MEMORY"),
    (V8, {"hardware_compatibility": "same_compute_capability"}, "no HardwareCompatibilityLevel.SAME_COMPUTE"),
    (V8, {"preview_features": {"ALIASED_PLUGIN_IO_10_03": True}}, "has no preview feature ALIASED_PLUGIN_IO_10_03"),
    (V8, {"plugin_creators": (object(),)}, "tensorrt 8.6.0 has no IPluginCreatorV3One, which came with 10.0"),
    (V11, {"tactic_sources": ("CUBLAS",)}, "tensorrt 11.4.0.106 has no tactic source CUBLAS; it has EDGE_MASK"),
    (V10, {"dla": trtx.DlaOptions()}, "finds 0 DLA cores here, and number 0 was asked for"),
    (V10, {"account_memory": True}, "there is no GPU or driver here"),
    (V10, {"plugin_libraries": ("/missing.so",)}, "could not load the plugin library '/missing.so'"),
    (V10, {"plugin_creators": (object(),)}, "is no tensorrt.IPluginCreatorV3One"),
]  # fmt: skip


@pytest.mark.parametrize(("version", "options", "says"), LACKING, ids=[f"{v} {s}" for v, _, s in LACKING])
def test_what_a_version_lacks_is_refused_by_name(version: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(BuilderError, match=says):
        Fixture(version).build(**options)


def test_value_that_does_not_stick_is_refused() -> None:
    class Deaf(Config10):
        @property
        def max_num_tactics(self) -> int:
            return -1

        @max_num_tactics.setter
        def max_num_tactics(self, value: int) -> None: ...

    fixture = Fixture(V10)
    fixture.config_class = Deaf
    with pytest.raises(BuilderError, match=r"refused max_tactics: 4 was asked for, it stays with -1"):
        fixture.build(max_tactics=4)


def test_preview_feature_that_does_not_stick_is_refused() -> None:
    class Deaf(Config10):
        def get_preview_feature(self, feature: Any) -> bool:
            return False

    fixture = Fixture(V10)
    fixture.config_class = Deaf
    fixture.build(preview_features={"ALIASED_PLUGIN_IO_10_03": False})
    with pytest.raises(BuilderError, match="refused to turn the preview feature ALIASED_PLUGIN_IO_10_03 on"):
        fixture.build(preview_features={"ALIASED_PLUGIN_IO_10_03": True})


def test_single_weights_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = Fixture(V10)
    marked: list[str] = []

    def mark(network: Any, name: str) -> bool:
        marked.append(name)
        return name != "nope"

    with pytest.raises(BuilderError, match=r"has no INetworkDefinition::markWeightsRefittable.*use refit=\"all\""):
        fixture.build(refit="individual", refittable_weights=("w",))
    monkeypatch.setattr(type(fixture.builder.create_network().native), "mark_weights_refittable", mark, raising=False)
    fixture.build(refit="individual", refittable_weights=("w", "b"))
    assert marked == ["w", "b"]
    with pytest.raises(BuilderError, match="has no weights 'nope' in this network"):
        fixture.build(refit="individual", refittable_weights=("nope",))


def test_network_made_during_a_build_has_no_recorder() -> None:
    """Of the builder's; with one, it ends the process when it is destroyed after a parser."""
    fixture = Fixture(V10)
    recorder = object()
    fixture.vendor.Builder.create_network = lambda builder, flags: SimpleNamespace(error_recorder=recorder)
    assert fixture.builder.create_network().native.error_recorder is None


def test_timing_cache_that_cannot_be_saved_does_not_cost_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: trtx.TimingCache, content: bytes, combined: Any) -> None:
        raise trtx.InvalidArgumentError("timing cache cannot be saved: the disk is full")

    monkeypatch.setattr(trtx.TimingCache, "_replace", full)
    fixture = Fixture(V10)
    fixture.build(timing_cache=trtx.TimingCache(tmp_path / "timings"))
    assert any("the disk is full; the next build measures again" in line for line in fixture.lines)


def test_threads_are_put_back_even_after_a_failure() -> None:
    fixture = Fixture(V10)
    seen: list[int] = []
    fixture.vendor.during_build = lambda config: seen.append(fixture.builder._handle.max_threads)
    fixture.build(threads=3)
    fixture.vendor.build_result = None
    with pytest.raises(BuilderError):
        fixture.build(threads=4)
    assert seen == [3, 4]
    assert fixture.builder._handle.max_threads == 1


def test_dla() -> None:
    fixture = Fixture(V8)
    fixture.vendor.Builder.num_DLA_cores = 2
    config = fixture.build(dla=trtx.DlaOptions(1, managed_sram_bytes=7))
    assert (config.default_device_type.name, config.DLA_core) == ("DLA", 1)
    assert {pool.name: size for pool, size in config.pools.items()} == {"DLA_MANAGED_SRAM": 7}


@pytest.mark.parametrize("version", [V8, V10, V11])
def test_timing_cache_is_read_and_replaced(version: str, tmp_path: Path) -> None:
    fixture, path = Fixture(version), tmp_path / "timings"
    fixture.build(timing_cache=trtx.TimingCache(path))
    assert path.read_bytes() == b"+measured"
    config = fixture.build(timing_cache=trtx.TimingCache(path))
    assert config.cache.content == b"+measured"
    assert path.read_bytes() == b"+measured+measured"
    fixture.vendor.build_result = None
    with pytest.raises(BuilderError):
        fixture.build(timing_cache=trtx.TimingCache(path))
    assert path.read_bytes() == b"+measured+measured"


def test_timing_cache_of_another_gpu_is_measured_again(tmp_path: Path) -> None:
    class Refusing(Config10):
        def __init__(self) -> None:
            super().__init__()
            self.refuses_cache = True

    fixture, path = Fixture(V10), tmp_path / "timings"
    fixture.config_class = Refusing
    path.write_bytes(b"other")
    fixture.build(timing_cache=trtx.TimingCache(path))
    assert any("refused the timing cache" in line for line in fixture.lines)
    assert path.read_bytes() == b"+measured"
    with pytest.raises(BuilderError, match="cannot be read"):
        fixture.build(timing_cache=trtx.TimingCache(tmp_path))


def test_plugins_are_registered_once(tmp_path: Path) -> None:
    fixture = Fixture("10.9.0.35")  # the registry is the process's: a version that no other test has
    creator = fixture.vendor.IPluginCreatorV3One()
    creator.name, creator.plugin_version, creator.plugin_namespace = "Frob", "1", ""
    fixture.build(plugin_libraries=("/a.so",), plugin_creators=(creator,))
    config = fixture.build(plugin_libraries=("/a.so",), embed_plugins=True, plugin_creators=(creator,))
    assert fixture.registry.libraries == ["/a.so"]
    assert fixture.registry.creators == [creator]
    assert config.plugins_to_serialize == ["/a.so"]
    twin = fixture.vendor.IPluginCreatorV3One()
    twin.name, twin.plugin_version, twin.plugin_namespace = "Frob", "1", ""
    with pytest.raises(BuilderError, match="has a plugin named 'Frob', version '1', already"):
        fixture.build(plugin_creators=(twin,))


# Memory


class Memory:
    def __init__(self) -> None:
        self.live: dict[int, int] = {}

    def allocate_device(self, nbytes: int, *, owner: str = "") -> int:
        if nbytes > 1000:
            raise MemoryBudgetError("full", requested_bytes=nbytes, used_bytes=0, budget_bytes=1000)
        address = 4096 + 256 * len(self.live)
        self.live[address] = nbytes
        return address

    def free_device(self, address: int, nbytes: int) -> None:
        assert self.live.pop(address) == nbytes


def test_memory_is_counted_where_it_is_asked_to_be() -> None:
    fixture, memory = Fixture(V10), Memory()

    def allocate(config: Any) -> None:
        allocator = fixture.builder._handle.gpu_allocator
        first, second = allocator.allocate(100, 256, 0), allocator.allocate_async(200, 256, 0, 0)
        assert memory.live == {first: 100, second: 200}
        assert allocator.allocate(2000, 256, 0) == 0  # the budget
        assert allocator.reallocate(first, 256, 300) == 0
        assert allocator.deallocate(first)
        assert allocator.deallocate_async(second, 0)
        assert not allocator.deallocate(first)

    fixture.vendor.during_build = allocate
    fixture.build(memory=memory, account_memory=True)
    assert memory.live == {}
    assert fixture.builder._handle.gpu_allocator is None


def test_allocator_raises_nothing_through_c() -> None:
    class Broken(Memory):
        def free_device(self, address: int, nbytes: int) -> None:
            raise trtx.EngineError("gone")

    counted = CountedAllocations(Broken())
    assert counted.allocate(0, 256) == 0
    assert counted.allocate(8, 512) == 0
    assert counted.free(0)
    assert not counted.free(counted.allocate(8, 256))


# Errors


def test_codes_of_the_error_recorder() -> None:
    vendor: Any = FakeVendor(V10)
    vendor.IErrorRecorder = type("IErrorRecorder", (), {"__init__": lambda self: None})
    backend = TensorRTFamilyBackend("tensorrt", module=vendor)
    builder = backend.create_builder(lambda severity, line: None)

    def fail(config: Any) -> None:
        builder._handle.error_recorder.report_error(SimpleNamespace(name="INVALID_CONFIG"), "the tiles do not fit")

    vendor.during_build, vendor.build_result = fail, None
    vendor.log_during_build = [(Severity.WARNING, "careful")]
    network = builder.create_network()
    network.parse_onnx(b"model", None)
    with pytest.raises(BuilderError) as caught:
        builder.build_serialized_network(network, BuildOptions(profiles=(PROFILE,)), None)
    assert caught.value.codes == ("INVALID_CONFIG",)
    assert caught.value.tensorrt_log == ("careful", "the tiles do not fit")
    assert builder._handle.error_recorder is None


# Refitting


class FakeRefitter:
    def __init__(self, engine: Any, logger: Any) -> None:
        self.set: dict[str, Any] = {}
        self.works = True

    def get_all_weights(self) -> list[str]:
        return ["w", "b"]

    def get_missing_weights(self) -> list[str]:
        return [] if self.set else ["w"]

    def set_named_weights(self, name: str, weights: Any) -> bool:
        self.set[name] = weights
        return bool(weights.count == 3)

    def refit_cuda_engine(self) -> bool:
        return self.works


class FakeRefitter10(FakeRefitter):
    def get_weights_prototype(self, name: str) -> Any:
        return SimpleNamespace(dtype=SimpleNamespace(name="FLOAT"), size=3)


class FakeParserRefitter:
    num_errors = 1

    def __init__(self, refitter: Any, logger: Any) -> None:
        self.refitter = refitter

    def refit_from_bytes(self, model: bytes, path: str | None = None) -> bool:
        self.refitter.set["w"] = (model, path)
        return model != b"other"

    def get_error(self, index: int) -> str:
        return "w has another shape"


def make_refitter(version: str) -> tuple[Any, Refitter]:
    from trtx_py.backends._flavours import flavour_named

    module: Any = FakeVendor(version)
    module.Weights = lambda dtype, pointer, count: SimpleNamespace(dtype=dtype, pointer=pointer, count=count)
    module.Refitter = FakeRefitter if version == V8 else FakeRefitter10
    if version != V8:
        module.OnnxParserRefitter = FakeParserRefitter
    vendor = Vendor(flavour_named("tensorrt"), module)
    refitter = Refitter(vendor, lambda severity, line: None, SimpleNamespace(refittable=True))
    return refitter._handle, refitter


@pytest.mark.parametrize("version", [V8, V10, V11])
def test_weights_by_name(version: str) -> None:
    native, refitter = make_refitter(version)
    assert (refitter.names, refitter.missing) == (("w", "b"), ("w",))
    with pytest.raises(EngineError, match="these weights are missing: w"):
        refitter.refit()
    with pytest.raises(ShapeError, match="4 elements"):
        refitter.set_weights("w", np.zeros(4, np.float32))
    if version != V8:
        with pytest.raises(DTypeError, match="are HALF; expected FLOAT"):
            refitter.set_weights("w", np.zeros(3, np.float16))
    refitter.set_weights("w", np.zeros(3, np.float32))
    refitter.refit()
    native.works = False
    with pytest.raises(EngineError, match="could not refit"):
        refitter.refit()
    refitter.destroy()
    refitter.destroy()


def test_what_a_failed_model_has_set_stays_until_the_refitter_is_gone(tmp_path: Path) -> None:
    """TensorRT has pointers to weights that the parser owns, also to those it set before it failed."""
    refitter = make_refitter(V10)[1]
    refitter.set_onnx(b"model", None)
    first = weakref.ref(refitter._parsers[0])
    with pytest.raises(EngineError):
        refitter.set_onnx(b"other", None)
    assert first() is not None
    assert len(refitter._parsers) == 2
    refitter.destroy()
    assert first() is None


def test_weights_of_four_bits() -> None:
    import ml_dtypes

    with pytest.raises(DTypeError, match=r"'w' are INT4, which tensorrt 8\.6\.0 does not have; it has FLOAT"):
        make_refitter(V8)[1].set_weights("w", np.zeros(3, ml_dtypes.int4))
    native, refitter = make_refitter(V10)
    known = refitter._vendor.members("DataType")
    refitter._vendor.module.DataType = members("DataType", *known, "INT4")
    native.get_weights_prototype = lambda name: SimpleNamespace(dtype=SimpleNamespace(name="INT4"), size=3)
    refitter.set_weights("w", np.array([1, -1, 2], ml_dtypes.int4))
    weights = native.set["w"]
    assert (weights.count, ctypes.string_at(weights.pointer, 2)) == (3, b"\xf1\x02")


def test_weights_of_a_model(tmp_path: Path) -> None:
    native, refitter = make_refitter(V10)
    refitter.set_onnx(b"model", str(tmp_path))
    assert native.set == {"w": (b"model", str(tmp_path / "model.onnx"))}
    refitter.refit()
    with pytest.raises(EngineError, match="could not match the ONNX model with the engine: w has another shape"):
        refitter.set_onnx(b"other", None)
    with pytest.raises(EngineError, match=r"tensorrt 8\.6\.0 has no OnnxParserRefitter, which came with 10\.0"):
        make_refitter(V8)[1].set_onnx(b"model", None)


def test_engine_that_was_not_built_for_it() -> None:
    from trtx_py.backends._flavours import flavour_named

    vendor = Vendor(flavour_named("tensorrt"), FakeVendor(V10))
    with pytest.raises(EngineError, match="built without BuilderOptions"):
        Refitter(vendor, lambda severity, line: None, SimpleNamespace(refittable=False))
