"""Engine: what a deserialized plan says about itself."""

from __future__ import annotations

from typing import Any

from ..._errors import EngineError, InvalidArgumentError
from ..._types import LayerPrecision, Shape, ShapeRange, TensorInfo, TensorMode
from .._flavours import NEWER_THAN_LEAN_8, parse_version, untried_profiler
from ..protocols import LogSink
from ._context import Context
from ._creation import ContextMaker
from ._guards import alive, data_type, deprecated_calls, location
from ._layers import inspected_precisions
from ._refitter import Refitter
from ._runtime_cache import RuntimeCache
from ._vendor import Vendor

_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1


class Engine:
    """Implements BackendEngine. Queries are answered from what was read once, when the engine was made.

    Source: nvinfer1::ICudaEngine
    """

    def __init__(
        self,
        vendor: Vendor,
        log: LogSink,
        handle: Any,
        *,
        title: str,
        lean_version: str | None,
        runtime_cache: RuntimeCache,
    ) -> None:
        self._vendor = vendor
        self._log = log
        self._handle: Any = handle
        self._title = title
        self._lean_version = lean_version
        lean = parse_version(lean_version) if lean_version is not None else None
        self._old_lean = lean is not None and lean < (10,)
        self._name = str(handle.name or "")
        self._num_layers = int(handle.num_layers)
        self._num_profiles = max(1, int(handle.num_optimization_profiles))
        self._io_tensors = tuple(self._describe(handle.get_tensor_name(i)) for i in range(handle.num_io_tensors))
        self._device_memory = tuple(self._read_device_memory(p) for p in (None, *range(self._num_profiles)))
        self._weights_bytes = self._read_weights_bytes()
        # Known to 8.6, and answered through its lean library (measured).
        self._num_aux_streams = int(handle.num_aux_streams) if self._can("num_aux_streams") else 0
        self._maker = ContextMaker(vendor, log, handle, lean=lean, cache=runtime_cache)

    @property
    def name(self) -> str:
        return self._name

    @property
    def io_tensors(self) -> tuple[TensorInfo, ...]:
        return self._io_tensors

    @property
    def num_profiles(self) -> int:
        return self._num_profiles

    @property
    def num_layers(self) -> int:
        return self._num_layers

    def layer_precisions(self) -> tuple[LayerPrecision, ...]:
        """Source: nvinfer1::ICudaEngine::createEngineInspector"""
        engine = alive(self._handle, "engine")
        formats = self._vendor.members("LayerInformationFormat")
        # A lean runtime has no inspector, and an old one behind a newer runtime must not be asked.
        if self._lean_version is not None or "JSON" not in formats or not hasattr(engine, "create_engine_inspector"):
            return ()
        with self._vendor.router.operation(self._log):
            inspector = engine.create_engine_inspector()
            if inspector is None:
                return ()
            return inspected_precisions(str(inspector.get_engine_information(formats["JSON"]) or ""))

    def create_refitter(self) -> Refitter:
        """Source: nvinfer1::createInferRefitter"""
        if self._lean_version is not None or not hasattr(self._vendor.module, "Refitter"):
            raise EngineError(
                f"{self._vendor.title} has no Refitter here (no lean runtime has one); load it with the full library"
            )
        return Refitter(self._vendor, self._log, alive(self._handle, "engine"))

    @property
    def weight_streaming_bytes(self) -> int:
        engine = alive(self._handle, "engine")
        # A lean library of 8.6 behind a newer runtime must not be asked for what came after it.
        if self._lean_version is not None and parse_version(self._lean_version) < (10,):
            return 0
        return int(getattr(engine, "streamable_weights_size", 0))

    def set_weight_streaming_budget(self, nbytes: int) -> None:
        """Source: nvinfer1::ICudaEngine::setWeightStreamingBudgetV2"""
        engine = alive(self._handle, "engine")
        if not self.weight_streaming_bytes:
            raise EngineError(
                f"weight_streaming_bytes is {nbytes}, and {self._title} can stream no weights of this plan: build it "
                "with BuilderOptions(weight_streaming=True), TensorRT 10 or later"
            )
        if not hasattr(engine, "weight_streaming_budget_v2"):
            raise EngineError(f"{self._title} has no weight_streaming_budget_v2; leave weight_streaming_bytes unset")
        with self._vendor.router.operation(self._log) as operation:
            engine.weight_streaming_budget_v2 = nbytes
            if int(engine.weight_streaming_budget_v2) != nbytes:
                raise EngineError(
                    f"{self._title} refused a budget of {nbytes} bytes for streamed weights; expected 0 to "
                    f"{self.weight_streaming_bytes}",
                    tensorrt_log=operation.lines,
                )

    @property
    def weights_bytes(self) -> int:
        return self._weights_bytes

    def device_memory_bytes(self, profile: int | None) -> int:
        """Source: ICudaEngine::getDeviceMemorySizeV2, getDeviceMemorySizeForProfileV2"""
        if profile is None:
            return self._device_memory[0]
        if not 0 <= profile < self._num_profiles:
            raise EngineError(f"there is no optimization profile {profile}; the engine has {self._num_profiles}")
        return self._device_memory[1 + profile]

    @property
    def user_managed_memory(self) -> bool:
        return self._maker.memory_setter is not None

    @property
    def num_aux_streams(self) -> int:
        """Source: nvinfer1::ICudaEngine::getNbAuxStreams"""
        return self._num_aux_streams

    @property
    def captures_itself(self) -> bool:
        """Source: nvinfer1::IRuntimeConfig::setCudaGraphStrategy"""
        return self._maker.captures_itself

    @property
    def untried_profiler(self) -> str | None:
        return untried_profiler(self._title, self._lean_version)

    def create_context(self, *, own_memory: bool = True, cuda_graphs: bool = True) -> Context:
        """Source: nvinfer1::ICudaEngine::createExecutionContext, createExecutionContextWithoutDeviceMemory"""
        engine = alive(self._handle, "engine")
        if not own_memory and not self.user_managed_memory:
            raise InvalidArgumentError(
                f"contexts of {self._title} allocate their activation memory themselves; create them with "
                f"own_memory=True"
            )
        with self._vendor.router.operation(self._log) as operation:
            handle, kept = self._maker.make(engine, own_memory=own_memory, cuda_graphs=cuda_graphs)
            if handle is None:
                needs = f"needs {self.device_memory_bytes(None)} bytes of device memory for each"
                raise EngineError(
                    f"{self._title} could not create an execution context for the engine {self._name!r}, which "
                    f"{needs if own_memory else 'was to get its memory later'}; close others or free memory",
                    tensorrt_log=operation.lines,
                )
            return Context(
                self._vendor,
                self._log,
                handle,
                tensors=self._io_tensors,
                num_profiles=self._num_profiles,
                title=self._title,
                lean_version=self._lean_version,
                num_aux_streams=self._num_aux_streams,
                memory_bytes=self.device_memory_bytes(None),
                memory_setter=None if own_memory else self._maker.memory_setter,
                kept=kept,
            )

    def destroy(self) -> None:
        """Idempotent. Contexts must have been destroyed before."""
        if self._handle is not None:
            with self._vendor.router.operation(self._log):
                self._handle = None

    def _can(self, method: str) -> bool:
        """This version has the method, and the library behind it knows it too."""
        if self._old_lean and method in NEWER_THAN_LEAN_8:
            return False  # before hasattr, which would call a property
        return hasattr(self._handle, method)

    def _describe(self, name: str) -> TensorInfo:
        engine = self._handle
        mode = TensorMode.INPUT if engine.get_tensor_mode(name).name == "INPUT" else TensorMode.OUTPUT
        shape = tuple(int(n) for n in engine.get_tensor_shape(name))
        is_shape_tensor = bool(engine.is_shape_inference_io(name))
        ranges: tuple[ShapeRange, ...] = ()
        if mode is TensorMode.INPUT:
            read = self._read_values if is_shape_tensor else self._read_shapes
            ranges = tuple(read(name, shape, profile) for profile in range(self._num_profiles))
        return TensorInfo(
            name=name,
            mode=mode,
            dtype=data_type(name, engine.get_tensor_dtype(name)),
            shape=shape,
            location=location(engine.get_tensor_location(name)),
            is_shape_tensor=is_shape_tensor,
            ranges=ranges,
        )

    def _read_shapes(self, name: str, shape: Shape, profile: int) -> ShapeRange:
        if -1 not in shape:
            return ShapeRange(shape, shape, shape)
        engine = self._handle
        if hasattr(engine, "get_tensor_profile_shape"):
            found = engine.get_tensor_profile_shape(name, profile)
        else:
            found = engine.get_profile_shape(profile, name)
        triple = [tuple(int(n) for n in dims) for dims in found]
        if len(triple) != 3 or any(len(dims) != len(shape) or min(dims, default=0) < 0 for dims in triple):
            raise EngineError(f"{self._title} gives no range for input {name!r} in optimization profile {profile}")
        return ShapeRange(*triple)

    def _read_values(self, name: str, shape: Shape, profile: int) -> ShapeRange:
        engine = self._handle
        found: Any = ()
        if self._can("get_tensor_profile_values"):
            # The bindings' signature names its parameters the other way round.
            found = engine.get_tensor_profile_values(profile, name)
        elif hasattr(engine, "get_profile_shape_input") and not self._old_lean:
            found = engine.get_profile_shape_input(profile, name)
        triple = [tuple(int(n) for n in values) for values in found]
        if len(triple) == 3:
            return ShapeRange(*triple)
        # Unknown ranges must not refuse anything: TensorRT itself checks values when it enqueues.
        count = 1
        for size in shape:
            count *= max(size, 1)
        return ShapeRange((_INT32_MIN,) * count, (1,) * count, (_INT32_MAX,) * count)

    def _read_device_memory(self, profile: int | None) -> int:
        engine = self._handle
        if profile is not None:
            for method in ("get_device_memory_size_for_profile_v2", "get_device_memory_size_for_profile"):
                if self._can(method):
                    return int(getattr(engine, method)(profile))
        if self._can("device_memory_size_v2"):
            return int(engine.device_memory_size_v2)
        with deprecated_calls():  # since 10.1, and the one form that a lean library of 8.6 answers
            return int(engine.device_memory_size)

    def _read_weights_bytes(self) -> int:
        stats = self._vendor.members("EngineStat")
        if "TOTAL_WEIGHTS_SIZE" not in stats or not self._can("get_engine_stat"):
            return 0
        # -1 stands for "not known".
        return max(0, int(self._handle.get_engine_stat(stats["TOTAL_WEIGHTS_SIZE"])))
