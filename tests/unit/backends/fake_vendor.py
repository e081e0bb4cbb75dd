"""Stand-ins for vendor modules: each has exactly the attributes that its version has, and records what it was asked."""

from __future__ import annotations

import enum
import struct
import warnings
import weakref
from types import SimpleNamespace
from typing import Any


def make_plan(magic: bytes = b"ftrt", version: tuple[int, int, int, int] = (8, 6, 0, 12), body: bytes = b"") -> bytes:
    """Bytes with a valid raw plan header."""
    length = 32 + len(body)
    return magic + bytes(4) + struct.pack("<Q", 1) + struct.pack("<Q", length) + bytes(version) + bytes(4) + body


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


def members(name: str, *names: str) -> Any:
    return enum.IntEnum(name, {one: value for value, one in enumerate(names)})


class ILogger:
    def __init__(self) -> None:
        self.ready = True


class Tensor:
    def __init__(self, name: str, dtype: Any, shape: tuple[int, ...], is_shape_tensor: bool = False) -> None:
        self.name, self.dtype, self.shape, self.is_shape_tensor = name, dtype, shape, is_shape_tensor


class Layer:
    def __init__(self, kind: str, *outputs: Tensor) -> None:
        self.type = SimpleNamespace(name=kind)
        self.outputs = outputs
        self.num_outputs = len(outputs)

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]


class FakeNetwork:
    def __init__(self, flags: int, layers: list[Layer], inputs: list[Tensor]) -> None:
        self.flags, self.layers, self.inputs = flags, layers, inputs
        self.num_layers, self.num_inputs, self.num_outputs = len(layers), len(inputs), 1

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.layers[-1].get_output(0)

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]


class FakeProfile:
    valid = True

    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}
        self.values: dict[str, Any] = {}

    def __bool__(self) -> bool:
        return self.valid

    def set_shape(self, name: str, low: Any, mid: Any, high: Any) -> None:
        self.shapes[name] = (low, mid, high)

    def set_shape_input(self, name: str, low: Any, mid: Any, high: Any) -> None:
        self.values[name] = (low, mid, high)


class FakeConfig:
    """Attributes that only some versions have are set by the factory."""

    def __init__(self) -> None:
        self.flags: set[Any] = set()
        self.cleared: set[Any] = set()
        self.refused: set[str] = set()
        self.features: dict[str, bool] = {}
        self.profiles: list[FakeProfile] = []
        self.pools: dict[Any, int] = {}
        self.builder_optimization_level = 3
        self.max_aux_streams = -1

    def set_flag(self, flag: Any) -> None:
        if flag.name not in self.refused:
            self.flags.add(flag)

    def get_flag(self, flag: Any) -> bool:
        return flag in self.flags

    def clear_flag(self, flag: Any) -> None:
        self.cleared.add(flag)

    def set_preview_feature(self, feature: Any, on: bool) -> None:
        self.features[feature.name] = on

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.pools[pool] = size

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self.pools[pool]

    def add_optimization_profile(self, profile: FakeProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1


class FakeEngine:
    """An engine with the methods of 8.6; newer ones are in FakeEngine10."""

    name = "fake"
    num_layers = 3
    device_memory_size = 1000

    def __init__(self, vendor: FakeVendor) -> None:
        self.vendor = vendor
        self.num_optimization_profiles = 2
        self.tensors = [
            ("x", "INPUT", (-1, 4), "DEVICE", False),
            ("s", "INPUT", (2,), "HOST", True),
            ("y", "OUTPUT", (-1, 4), "DEVICE", False),
        ]
        self.num_io_tensors = len(self.tensors)

    def _find(self, name: str) -> Any:
        return next(one for one in self.tensors if one[0] == name)

    def get_tensor_name(self, index: int) -> str:
        return self.tensors[index][0]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name=self._find(name)[1])

    def get_tensor_shape(self, name: str) -> Any:
        return self._find(name)[2]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.vendor.DataType.INT32 if name == "s" else self.vendor.DataType.FLOAT

    def get_tensor_location(self, name: str) -> Any:
        return SimpleNamespace(name=self._find(name)[3])

    def is_shape_inference_io(self, name: str) -> bool:
        return bool(self._find(name)[4])

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return [(1, 4), (2, 4), (8, 4)] if profile == 0 else [(9, 4), (9, 4), (256, 4)]

    num_aux_streams = 2

    def made(self, *how: Any) -> Any:
        self.vendor.contexts_made.append(how)
        return self.vendor.next_context


class FakeEngine86(FakeEngine):
    def create_execution_context(self) -> Any:
        return self.made()

    def create_execution_context_without_device_memory(self) -> Any:
        return self.made("without memory")

    def get_profile_shape_input(self, profile: int, name: str) -> Any:
        return [[1, 1], [2, 2], [profile + 3, 3]]


class FakeEngine11(FakeEngine):
    def create_execution_context(self, how: Any = None) -> Any:
        if how is None:
            return self.made()
        self.vendor.newer_than_8("create_execution_context(strategy)")
        return self.made(how)

    @property
    def device_memory_size_v2(self) -> int:
        self.vendor.newer_than_8("device_memory_size_v2")
        return 2000

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        self.vendor.newer_than_8("get_device_memory_size_for_profile_v2")
        return 100 + profile

    def get_engine_stat(self, stat: Any) -> int:
        self.vendor.newer_than_8("get_engine_stat")
        return 4242

    def get_tensor_profile_values(self, profile: int, name: str) -> Any:
        self.vendor.newer_than_8("get_tensor_profile_values")
        return [[1, 1], [2, 2], [profile + 3, 3]]


class FakeEngine10(FakeEngine11):
    def create_execution_context_without_device_memory(self) -> Any:
        warnings.warn("use create_execution_context", DeprecationWarning, stacklevel=2)
        return self.made("without memory")


class FakeRuntimeCache:
    """IRuntimeCache of TensorRT-RTX 1.7."""

    def __init__(self) -> None:
        self.content = b""
        self.serializes = True

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"kernels"):
            return False
        self.content = blob
        return True

    def serialize(self) -> Any:
        return self.content + b"+new" if self.serializes else None

    def reset(self) -> bool:
        self.content = b""
        return True


class FakeRuntimeConfig:
    """IRuntimeConfig of TensorRT-RTX 1.7. Setting the property gives no answer, as in the bindings."""

    def __init__(self, vendor: FakeVendor) -> None:
        self.vendor = vendor
        self.strategy = vendor.ExecutionContextAllocationStrategy["STATIC"]
        if hasattr(vendor, "CudaGraphStrategy"):
            self.graphs = vendor.CudaGraphStrategy["DISABLED"]
        self.dynamic_shapes_kernel_specialization_strategy = vendor.DynamicShapesKernelSpecializationStrategy["LAZY"]
        self.cache: weakref.ref[FakeRuntimeCache] | None = None

    @property
    def cuda_graph_strategy(self) -> Any:
        return self.graphs

    @cuda_graph_strategy.setter
    def cuda_graph_strategy(self, strategy: Any) -> None:
        if self.vendor.takes_graph_strategy:
            self.graphs = strategy

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def get_execution_context_allocation_strategy(self) -> Any:
        return self.strategy

    def create_runtime_cache(self) -> Any:
        if not self.vendor.makes_cache:
            return None
        cache = FakeRuntimeCache()
        self.vendor.caches.append(weakref.ref(cache))
        return cache

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        if self.vendor.takes_cache:
            self.cache = weakref.ref(cache)
        return self.vendor.takes_cache

    def get_runtime_cache(self) -> Any:
        raise AssertionError("the bindings hand out a second owner of the cache")


class FakeEngineRTX(FakeEngine11):
    def create_runtime_config(self) -> Any:
        return FakeRuntimeConfig(self.vendor) if self.vendor.makes_config else None

    def create_execution_context(self, how: Any = None) -> Any:
        # TensorRT has a bare pointer to the configuration, and through it to the cache.
        self.vendor.config = weakref.ref(how)
        return self.made(how.strategy.name, how.graphs.name if hasattr(how, "graphs") else None)


class FakeContextCalls:
    """What every version's context has; how it takes activation memory is in the classes below."""

    vendor: Any = None

    def __init__(self) -> None:
        self.active_optimization_profile = 0
        self.answers = True
        self.log: list[tuple[Any, ...]] = []
        self.allocators: dict[str, Any] = {}
        self.during_enqueue: Any = None
        self.during_setting: Any = None

    def set_aux_streams(self, aux_streams: Any) -> None:
        self.log.append(("aux", aux_streams))
        if self.during_setting is not None:
            self.during_setting()

    def take_memory(self, *memory: int) -> None:
        self.log.append(("memory", *memory))
        if self.during_setting is not None:
            self.during_setting()

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.log.append(("profile", index, stream))
        if self.answers and self.active_optimization_profile >= 0:
            self.active_optimization_profile = index
        return self.answers

    def set_input_shape(self, name: str, shape: Any) -> bool:
        self.log.append(("shape", name, shape))
        return self.answers

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.log.append(("address", name, address))
        return self.answers

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self.allocators[name] = allocator
        return self.answers

    def get_tensor_shape(self, name: str) -> Any:
        if not self.answers:
            raise ValueError("__len__() should return >= 0")
        return (2, 4)

    def execute_async_v3(self, stream: int) -> bool:
        self.log.append(("execute", stream))
        if self.during_enqueue is not None:
            self.during_enqueue(self)
        return self.answers


def _set_device_memory_property(context: Any, memory: int) -> None:
    warnings.warn("use set_device_memory", DeprecationWarning, stacklevel=2)
    context.take_memory(memory)


class FakeContext86(FakeContextCalls):
    device_memory = property(fset=_set_device_memory_property)


class FakeContext11(FakeContextCalls):
    def set_device_memory(self, memory: int, size: int) -> None:
        if self.vendor is not None:
            self.vendor.newer_than_8("set_device_memory")
        self.take_memory(memory, size)


class FakeContext(FakeContext11):
    """10.1 and later."""

    device_memory = property(fset=_set_device_memory_property)


class FakeVendor:
    """A vendor module of one version. ``kind`` is "full", "lean", "dispatch" or "rtx" (with its version number)."""

    def __init__(self, version: str, kind: str = "full") -> None:
        self.__version__ = version
        major = int(version.split(".")[0]) if kind != "rtx" else 11
        self.behind_old_lean = False
        self.reached: list[str] = []
        self.build_result: Any = b"plan"
        self.log_during_build: list[tuple[Severity, str]] = []
        self.during_build: Any = None
        self.configs: list[FakeConfig] = []
        self.networks: list[FakeNetwork] = []
        self.runtimes: list[Any] = []
        self.contexts_made: list[tuple[Any, ...]] = []
        self.engine_class: Any = {8: FakeEngine86, 10: FakeEngine10, 11: FakeEngine11}[major]
        self.IExecutionContext: Any = {8: FakeContext86, 10: FakeContext, 11: FakeContext11}[major]
        self.deserialized: Any = "engine"
        self.log_during_deserialize: list[tuple[Severity, str]] = []
        self.log_at_creation: list[tuple[Severity, str]] = []
        self.next_context: Any = self.IExecutionContext()
        self.next_context.vendor = self
        self.ILogger = ILogger
        self.DataType = members("DataType", "FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "FP8", "BF16", "INT64")
        self.IOutputAllocator = type("IOutputAllocator", (), {"__init__": lambda self: None})
        self.Runtime = self._runtime_class()
        self.model_layers = [Layer("MATRIX_MULTIPLY", Tensor("y", self.DataType.FLOAT, (-1, 4)))]
        self.model_inputs = [Tensor("x", self.DataType.FLOAT, (-1, 4))]
        self.parse_errors: list[Any] = []
        if major >= 10:
            self.EngineStat = members("EngineStat", "TOTAL_WEIGHTS_SIZE")
            self.ExecutionContextAllocationStrategy: Any = members(
                "ExecutionContextAllocationStrategy", "STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"
            )
        if kind in ("full", "rtx"):
            self._add_builder(major)
        if kind == "rtx":
            self._add_runtime_config()

    def _add_runtime_config(self) -> None:
        self.engine_class, self.IExecutionContext = FakeEngineRTX, FakeContext
        self.next_context = FakeContext()
        self.IRuntimeConfig, self.IRuntimeCache = FakeRuntimeConfig, FakeRuntimeCache
        self.CudaGraphStrategy: Any = members("CudaGraphStrategy", "DISABLED", "WHOLE_GRAPH_CAPTURE")
        self.DynamicShapesKernelSpecializationStrategy: Any = members(
            "DynamicShapesKernelSpecializationStrategy", "LAZY", "EAGER", "NONE"
        )
        self.makes_config = self.makes_cache = self.takes_cache = self.takes_graph_strategy = True
        self.caches: list[weakref.ref[FakeRuntimeCache]] = []
        self.config: Any = None

    def newer_than_8(self, what: str) -> None:
        assert not self.behind_old_lean, f"{what} reaches past the end of an 8.6 lean library"
        self.reached.append(what)

    def say_at_creation(self, logger: Any) -> None:
        for severity, line in self.log_at_creation:
            logger.log(severity, line)

    def _add_builder(self, major: int) -> None:
        creation = {8: ("EXPLICIT_BATCH",), 10: ("EXPLICIT_BATCH", "STRONGLY_TYPED"), 11: ("STRONGLY_TYPED",)}
        self.NetworkDefinitionCreationFlag = members("NetworkDefinitionCreationFlag", *creation[major])
        precision = {8: ("FP16", "INT8", "FP8"), 10: ("FP16", "INT8", "FP8", "BF16", "INT4"), 11: ()}
        self.BuilderFlag = members("BuilderFlag", "TF32", "REFIT", "VERSION_COMPATIBLE", *precision[major])
        features = {8: ("FASTER_DYNAMIC_SHAPES_0805", "PROFILE_SHARING_0806"), 10: ("ALIASED_PLUGIN_IO_10_03",)}
        self.PreviewFeature = members("PreviewFeature", *features.get(major, ("ALIASED_PLUGIN_IO_10_03",)))
        self.MemoryPoolType = members("MemoryPoolType", "WORKSPACE")
        if major >= 10:
            self.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
        vendor = self

        class Builder:
            def __init__(self, logger: Any) -> None:
                self.logger = logger
                vendor.say_at_creation(logger)

            def create_network(self, flags: int) -> FakeNetwork:
                network = FakeNetwork(flags, vendor.model_layers, vendor.model_inputs)
                vendor.networks.append(network)
                return network

            def create_builder_config(self) -> FakeConfig:
                config = FakeConfig()
                vendor.configs.append(config)
                return config

            def create_optimization_profile(self) -> FakeProfile:
                return FakeProfile()

            def build_serialized_network(self, network: FakeNetwork, config: FakeConfig) -> Any:
                for severity, line in vendor.log_during_build:
                    self.logger.log(severity, line)
                if vendor.during_build is not None:
                    vendor.during_build(config)
                return vendor.build_result

        class OnnxParser:
            def __init__(self, network: FakeNetwork, logger: Any) -> None:
                self.num_errors = len(vendor.parse_errors)

            def parse(self, model: bytes, path: str | None = None) -> bool:
                vendor.parsed = (model, path)
                return not vendor.parse_errors

            def get_error(self, index: int) -> Any:
                return vendor.parse_errors[index]

        self.Builder, self.OnnxParser = Builder, OnnxParser
        self.parsed: Any = None

    def _runtime_class(self) -> Any:
        vendor = self

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger
                self.engine_host_code_allowed = False
                vendor.runtimes.append(self)
                vendor.say_at_creation(logger)

            def load_runtime(self, path: str) -> Any:
                self.loaded = path
                return Runtime(self.logger)

            def deserialize_cuda_engine(self, plan: Any) -> Any:
                for severity, line in vendor.log_during_deserialize:
                    self.logger.log(severity, line)
                return vendor.engine_class(vendor) if vendor.deserialized == "engine" else vendor.deserialized

        return Runtime


class FakeDriver:
    """The three questions that a backend asks before it makes a runtime."""

    def __init__(self, *capabilities: tuple[int, int]) -> None:
        self.capabilities = capabilities

    def cuDeviceGetCount(self) -> int:
        return len(self.capabilities)

    def cuDeviceGet(self, ordinal: int) -> int:
        return ordinal

    def cuDeviceGetName(self, device: int) -> str:
        return "Fake GPU"

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> int:
        return self.capabilities[device][attribute - 75]
