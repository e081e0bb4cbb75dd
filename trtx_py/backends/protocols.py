"""The two seams. Everything above talks to these Protocols and never asks what stands behind them.

CUDA driver seam: the driver API's own names and handles, as integers. Every method raises CudaError for a status other
than CUDA_SUCCESS, except the two queries, which return the status when it is CUDA_SUCCESS or CUDA_ERROR_NOT_READY.

TensorRT seam: builder, network, runtime, engine and context, with nvinfer1's notions and without its version
differences. Failures that TensorRT reports as None or False are typed errors here. Nothing at this level owns anything:
who may close what, and when, is decided by the objects above.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from .._types import BackendInfo, BuildOptions, DataType, Severity, Shape, TensorInfo

CUDA_SUCCESS = 0
CUDA_ERROR_INVALID_VALUE = 1
CUDA_ERROR_OUT_OF_MEMORY = 2
CUDA_ERROR_NOT_INITIALIZED = 3
CUDA_ERROR_NO_DEVICE = 100
CUDA_ERROR_INVALID_DEVICE = 101
CUDA_ERROR_INVALID_HANDLE = 400
CUDA_ERROR_NOT_READY = 600
CUDA_ERROR_ILLEGAL_ADDRESS = 700
CUDA_ERROR_LAUNCH_FAILED = 719
CUDA_ERROR_DEVICE_UNAVAILABLE = 46
CUDA_ERROR_UNKNOWN = 999

#: Errors after which a CUDA context is unusable: every later call on it returns the same.
STICKY_CUDA_ERRORS = frozenset({46, 214, 220, 700, 702, 709, 714, 715, 716, 717, 718, 719, 999})

CU_STREAM_NON_BLOCKING = 1
CU_EVENT_DEFAULT = 0
CU_EVENT_DISABLE_TIMING = 2
CU_MEMHOSTALLOC_PORTABLE = 1

CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76

#: Receives every line TensorRT logs; may be called from any thread.
LogSink = Callable[[Severity, str], None]


class CudaDriver(Protocol):
    """The part of the CUDA driver API that trtx_py uses. Handles and device pointers are integers."""

    def cuInit(self, flags: int) -> None: ...
    def cuDriverGetVersion(self) -> int: ...
    def cuDeviceGetCount(self) -> int: ...
    def cuDeviceGet(self, ordinal: int) -> int: ...
    def cuDeviceGetName(self, device: int) -> str: ...
    def cuDeviceTotalMem(self, device: int) -> int: ...
    def cuDeviceGetAttribute(self, attribute: int, device: int) -> int: ...
    def cuDevicePrimaryCtxRetain(self, device: int) -> int: ...
    def cuDevicePrimaryCtxRelease(self, device: int) -> None: ...
    def cuCtxPushCurrent(self, context: int) -> None: ...
    def cuCtxPopCurrent(self) -> int: ...
    def cuCtxGetCurrent(self) -> int: ...
    def cuMemGetInfo(self) -> tuple[int, int]: ...
    def cuMemAlloc(self, bytesize: int) -> int: ...
    def cuMemFree(self, dptr: int) -> None: ...
    def cuMemHostAlloc(self, bytesize: int, flags: int) -> int: ...
    def cuMemFreeHost(self, pointer: int) -> None: ...
    def cuMemcpyHtoDAsync(self, dst_device: int, src_host: int, byte_count: int, stream: int) -> None: ...
    def cuMemcpyDtoHAsync(self, dst_host: int, src_device: int, byte_count: int, stream: int) -> None: ...
    def cuMemcpyDtoDAsync(self, dst_device: int, src_device: int, byte_count: int, stream: int) -> None: ...
    def cuMemsetD8Async(self, dst_device: int, value: int, count: int, stream: int) -> None: ...
    def cuStreamCreate(self, flags: int) -> int: ...
    def cuStreamDestroy(self, stream: int) -> None: ...
    def cuStreamSynchronize(self, stream: int) -> None: ...
    def cuStreamQuery(self, stream: int) -> int: ...
    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> None: ...
    def cuEventCreate(self, flags: int) -> int: ...
    def cuEventDestroy(self, event: int) -> None: ...
    def cuEventRecord(self, event: int, stream: int) -> None: ...
    def cuEventQuery(self, event: int) -> int: ...
    def cuEventSynchronize(self, event: int) -> None: ...
    def cuEventElapsedTime(self, start: int, end: int) -> float: ...


class OutputAllocator(Protocol):
    """Gives memory for an output whose size is known only while the engine runs.

    Source: nvinfer1::IOutputAllocator
    """

    def reallocate(self, name: str, current: int, nbytes: int, alignment: int) -> int:
        """Device pointer to at least ``nbytes`` bytes, or 0 if there is none; the old memory may be reused."""
        ...

    def notify_shape(self, name: str, shape: Shape) -> None:
        """The output's shape is known; its data is there once the stream reaches the end of the enqueue."""
        ...


class BuildProgress(Protocol):
    """Source: nvinfer1::IProgressMonitor"""

    def phase_start(self, phase: str, parent: str | None, steps: int) -> None: ...
    def step_complete(self, phase: str, step: int) -> bool:
        """False asks TensorRT to abort the build."""
        ...

    def phase_finish(self, phase: str) -> None: ...


class BackendContext(Protocol):
    """Source: nvinfer1::IExecutionContext. Used by one thread at a time."""

    @property
    def active_profile(self) -> int:
        """Index of the optimization profile in use, -1 if the context could not get one."""
        ...

    def set_profile(self, index: int, stream: int) -> None:
        """Select a profile; complete only once ``stream`` has been synchronized. Forgets all input shapes.

        Raises EngineError if the profile is taken by another context and the plan does not share profiles.
        """
        ...

    def set_input_shape(self, name: str, shape: Shape) -> None: ...
    def set_tensor_address(self, name: str, address: int) -> None: ...
    def set_output_allocator(self, name: str, allocator: OutputAllocator | None) -> None:
        """Raises EngineError where the runtime cannot carry the callback (10.16 into the 8.6 lean library)."""
        ...

    def get_tensor_shape(self, name: str) -> Shape:
        """Shape for the inputs set so far; -1 in a dimension that depends on data or on inputs not set yet.

        Host shape tensors must have their address set before: their values are read here.
        """
        ...

    def execute_async_v3(self, stream: int) -> None:
        """Enqueue one inference. Raises ExecutionError if TensorRT refuses; then nothing was enqueued."""
        ...

    def destroy(self) -> None: ...


class BackendEngine(Protocol):
    """Source: nvinfer1::ICudaEngine. Thread-safe for queries."""

    @property
    def name(self) -> str: ...
    @property
    def io_tensors(self) -> tuple[TensorInfo, ...]: ...
    @property
    def num_profiles(self) -> int:
        """At least 1: an engine without dynamic shapes has one profile with fixed ranges."""
        ...

    @property
    def num_layers(self) -> int: ...
    def device_memory_bytes(self, profile: int | None) -> int:
        """Activation memory of one context: for one profile, or the most that any profile needs."""
        ...

    @property
    def weights_bytes(self) -> int:
        """Device memory the weights take, 0 if the library does not tell."""
        ...

    def create_context(self) -> BackendContext: ...
    def destroy(self) -> None: ...


class BackendRuntime(Protocol):
    """Source: nvinfer1::IRuntime"""

    @property
    def flavour(self) -> str: ...
    @property
    def version(self) -> str:
        """Version that plans must fit: that of the lean library where one is loaded."""
        ...

    def deserialize(self, plan: bytes | memoryview) -> BackendEngine:
        """``plan`` has passed every check that is possible without TensorRT. Raises EngineError."""
        ...

    def destroy(self) -> None: ...


class BackendNetwork(Protocol):
    """Source: nvinfer1::INetworkDefinition and nvonnxparser::IParser"""

    def parse_onnx(self, model: bytes, directory: str | None) -> None:
        """Parse a serialized ModelProto; ``directory`` is where its external data lies, None if it has none.

        Raises ParserError with every issue; the network must then be destroyed.
        """
        ...

    @property
    def inputs(self) -> tuple[TensorInfo, ...]: ...
    @property
    def outputs(self) -> tuple[TensorInfo, ...]: ...
    @property
    def num_layers(self) -> int: ...
    def destroy(self) -> None: ...


class BackendBuilder(Protocol):
    """Source: nvinfer1::IBuilder. One build at a time."""

    def create_network(self) -> BackendNetwork: ...
    def build_serialized_network(self, network: Any, options: BuildOptions, progress: BuildProgress | None) -> bytes:
        """Blocks, without the interpreter lock, until the plan is there. ``network`` came from this builder.

        Raises BuilderError; also when ``progress`` aborted the build.
        """
        ...

    def destroy(self) -> None: ...


class TensorRTBackend(Protocol):
    """One member of the TensorRT family, or a stand-in for it."""

    @property
    def info(self) -> BackendInfo: ...
    @property
    def driver(self) -> CudaDriver:
        """Raises BackendUnavailableError where there is no usable driver."""
        ...

    def create_builder(self, log: LogSink) -> BackendBuilder:
        """Raises BackendUnavailableError if this flavour cannot build."""
        ...

    def create_runtime(
        self, log: LogSink, *, device: int, lean_library: str | None, allow_host_code: bool
    ) -> BackendRuntime:
        """The device's primary context is current in this thread. Raises BackendUnavailableError, EngineError."""
        ...


__all__ = [
    "BackendBuilder",
    "BackendContext",
    "BackendEngine",
    "BackendNetwork",
    "BackendRuntime",
    "BuildProgress",
    "CudaDriver",
    "DataType",
    "LogSink",
    "OutputAllocator",
    "TensorRTBackend",
]
