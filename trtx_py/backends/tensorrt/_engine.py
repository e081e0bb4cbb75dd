"""Engine: what a deserialized plan says about itself."""

from __future__ import annotations

import warnings
from typing import Any

from ..._errors import EngineError
from ..._types import Shape, ShapeRange, TensorInfo, TensorMode
from .._flavours import NEWER_THAN_LEAN_8, parse_version
from ..protocols import LogSink
from ._context import Context
from ._guards import alive, data_type, location
from ._vendor import Vendor

_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1


class Engine:
    """Implements BackendEngine. Queries are answered from what was read once, when the engine was made.

    Source: nvinfer1::ICudaEngine
    """

    def __init__(self, vendor: Vendor, log: LogSink, handle: Any, *, title: str, lean_version: str | None) -> None:
        self._vendor = vendor
        self._log = log
        self._handle: Any = handle
        self._title = title
        self._lean_version = lean_version
        self._old_lean = lean_version is not None and parse_version(lean_version) < (10,)
        self._name = str(handle.name or "")
        self._num_layers = int(handle.num_layers)
        self._num_profiles = max(1, int(handle.num_optimization_profiles))
        self._io_tensors = tuple(self._describe(handle.get_tensor_name(i)) for i in range(handle.num_io_tensors))
        self._device_memory = tuple(self._read_device_memory(p) for p in (None, *range(self._num_profiles)))
        self._weights_bytes = self._read_weights_bytes()

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

    def create_context(self) -> Context:
        """Source: nvinfer1::ICudaEngine::createExecutionContext"""
        engine = alive(self._handle, "engine")
        with self._vendor.router.operation(self._log) as operation:
            handle = engine.create_execution_context()
            if handle is None:
                raise EngineError(
                    f"{self._title} could not create an execution context for the engine {self._name!r}, which needs "
                    f"{self.device_memory_bytes(None)} bytes of device memory for each; close others or free memory",
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
        with warnings.catch_warnings():
            # Deprecated since 10.1, and the one form that a lean library of 8.6 answers.
            warnings.simplefilter("ignore", DeprecationWarning)
            return int(engine.device_memory_size)

    def _read_weights_bytes(self) -> int:
        stats = self._vendor.members("EngineStat")
        if "TOTAL_WEIGHTS_SIZE" not in stats or not self._can("get_engine_stat"):
            return 0
        # -1 stands for "not known".
        return max(0, int(self._handle.get_engine_stat(stats["TOTAL_WEIGHTS_SIZE"])))
