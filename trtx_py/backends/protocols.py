"""The two seams. Everything above talks to these Protocols and never asks what stands behind them.

CUDA driver seam: the driver API's own names and handles, as integers. Every method raises CudaError for a status other
than CUDA_SUCCESS, except the two queries, which return the status when it is CUDA_SUCCESS or CUDA_ERROR_NOT_READY.

TensorRT seam: builder, network, runtime, engine and context, with nvinfer1's notions and without its version
differences. Failures that TensorRT reports as None or False are typed errors here. Nothing at this level owns anything:
who may close what, and when, is decided by the objects above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from .._errors import CudaError
from .._types import Array, BackendInfo, BuildOptions, DataType, LayerPrecision, Severity, Shape, TensorInfo

if TYPE_CHECKING:
    from ..network import LayerRequest, TensorFacts

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

#: Errors after which a CUDA context is unusable, as cuda.h of CUDA 13.0 has it. "Leaves the process in an inconsistent
#: state" or "must be terminated": 226, 700, 702, 714 to 719, 721, 810, 911; "the context cannot be used anymore": 709,
#: 710. Of the others (device unavailable, uncorrectable ECC and NVLink errors, unknown) it does not say; nothing that
#: follows can be trusted. The native code has the same list: trtx_is_sticky.
STICKY_CUDA_ERRORS = frozenset(
    {46, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911, 999}
)

CU_STREAM_NON_BLOCKING = 1
CU_EVENT_DEFAULT = 0
CU_EVENT_DISABLE_TIMING = 2
CU_MEMHOSTALLOC_PORTABLE = 1
CU_STREAM_CAPTURE_MODE_GLOBAL = 0
CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1
CU_STREAM_CAPTURE_MODE_RELAXED = 2
CU_STREAM_CAPTURE_STATUS_NONE = 0
CU_STREAM_CAPTURE_STATUS_ACTIVE = 1
CU_STREAM_CAPTURE_STATUS_INVALIDATED = 2

CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76

#: Receives every line TensorRT logs; may be called from any thread.
LogSink = Callable[[Severity, str], None]


class CudaDriver(Protocol):
    """The part of the CUDA driver API that trtx_py uses. Handles and device pointers are integers."""

    @property
    def api(self) -> object:
        """The same functions for native code: a capsule ``trtx_cuda_api`` with the table of capi/src/cuda_api.h."""
        ...

    def _error(self, call: str, code: int, /) -> CudaError:
        """What a method raises for ``code``; for statuses that native code met, too."""
        ...

    def cuInit(self, flags: int, /) -> None: ...
    def cuDriverGetVersion(self) -> int: ...
    def cuDeviceGetCount(self) -> int: ...
    def cuDeviceGet(self, ordinal: int, /) -> int: ...
    def cuDeviceGetName(self, device: int, /) -> str: ...
    def cuDeviceTotalMem(self, device: int, /) -> int: ...
    def cuDeviceGetAttribute(self, attribute: int, device: int, /) -> int: ...
    def cuDeviceGetUuid(self, device: int, /) -> bytes: ...
    def cuDevicePrimaryCtxRetain(self, device: int, /) -> int: ...
    def cuDevicePrimaryCtxRelease(self, device: int, /) -> None: ...
    def cuCtxPushCurrent(self, context: int, /) -> None: ...
    def cuCtxPopCurrent(self) -> int: ...
    def cuCtxGetCurrent(self) -> int: ...
    def cuMemGetInfo(self) -> tuple[int, int]: ...
    def cuMemAlloc(self, bytesize: int, /) -> int: ...
    def cuMemFree(self, dptr: int, /) -> None: ...
    def cuMemAllocAsync(self, bytesize: int, stream: int, /) -> int: ...
    def cuMemFreeAsync(self, dptr: int, stream: int, /) -> None: ...
    def cuMemHostAlloc(self, bytesize: int, flags: int, /) -> int: ...
    def cuMemFreeHost(self, pointer: int, /) -> None: ...
    def cuMemcpyHtoDAsync(self, dst_device: int, src_host: int, byte_count: int, stream: int, /) -> None: ...
    def cuMemcpyDtoHAsync(self, dst_host: int, src_device: int, byte_count: int, stream: int, /) -> None: ...
    def cuMemcpyDtoDAsync(self, dst_device: int, src_device: int, byte_count: int, stream: int, /) -> None: ...
    def cuMemsetD8Async(self, dst_device: int, value: int, count: int, stream: int, /) -> None: ...
    def cuStreamCreate(self, flags: int, /) -> int: ...
    def cuStreamDestroy(self, stream: int, /) -> None: ...
    def cuStreamSynchronize(self, stream: int, /) -> None: ...
    def cuStreamQuery(self, stream: int, /) -> int: ...
    def cuStreamWaitEvent(self, stream: int, event: int, flags: int, /) -> None: ...
    def cuEventCreate(self, flags: int, /) -> int: ...
    def cuEventDestroy(self, event: int, /) -> None: ...
    def cuEventRecord(self, event: int, stream: int, /) -> None: ...
    def cuEventQuery(self, event: int, /) -> int: ...
    def cuEventSynchronize(self, event: int, /) -> None: ...
    def cuEventElapsedTime(self, start: int, end: int, /) -> float: ...
    def cuThreadExchangeStreamCaptureMode(self, mode: int, /) -> int:
        """Sets the calling thread's mode; returns the one before."""
        ...

    def cuStreamBeginCapture(self, stream: int, mode: int, /) -> None: ...
    def cuStreamEndCapture(self, stream: int, /) -> int: ...
    def cuStreamIsCapturing(self, stream: int, /) -> int:
        """One of CU_STREAM_CAPTURE_STATUS_*."""
        ...

    def cuGraphInstantiate(self, graph: int, flags: int, /) -> int: ...
    def cuGraphGetNodes(self, graph: int, /) -> int:
        """How many nodes the graph has."""
        ...

    def cuGraphLaunch(self, exec_: int, stream: int, /) -> None: ...
    def cuGraphExecDestroy(self, exec_: int, /) -> None: ...
    def cuGraphDestroy(self, graph: int, /) -> None: ...


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


class LayerProfiler(Protocol):
    """Is told how long each layer took. Source: nvinfer1::IProfiler"""

    def report_layer_time(self, layer: str, ms: float) -> None: ...


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

    def set_device_memory(self, address: int, nbytes: int) -> None:
        """Give a context made with ``own_memory=False`` its activation memory, before it runs and between its runs.

        ``nbytes`` is at least the engine's ``device_memory_bytes(None)``, ``address`` a multiple of 256. The memory is
        the caller's: it must stay until what was enqueued with it is done. Contexts that never run at the same time may
        share it. Raises InvalidArgumentError for less, or if the context has memory of its own.
        """
        ...

    def set_aux_streams(self, streams: Sequence[int]) -> None:
        """Streams for the parallel branches inside the engine; TensorRT makes those that are missing itself.

        They are ordered after and before the stream of each enqueue by TensorRT, and must outlive the context's work.
        Of more than the engine's ``num_aux_streams`` the first are used. Raises InvalidArgumentError for the default
        stream (0) and for a stream named twice.
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
        """Enqueue one inference, or record it where ``stream`` is being captured.

        Raises ExecutionError if TensorRT refuses: nothing was enqueued, and a capture has to be given up. The first
        enqueue after a shape was set, even one that the context had before, may make calls that only a relaxed capture
        permits (8.6, measured): enqueue once outside the capture first.
        """
        ...

    def set_profiler(self, profiler: LayerProfiler | None) -> None:
        """Have every enqueue from now on time its layers, which disturbs them; an enqueue cannot be captured then.

        None ends that. Raises EngineError where the runtime cannot carry the callback.
        Source: nvinfer1::IExecutionContext::setProfiler, setEnqueueEmitsProfile(false)
        """
        ...

    def report_to_profiler(self) -> None:
        """Tell the profiler the layers of the latest enqueue, in the order they ran; its stream is synchronized.

        Raises EngineError without a profiler, or if TensorRT refuses; what the profiler raised, if it did.
        Source: nvinfer1::IExecutionContext::reportToProfiler
        """
        ...

    def destroy(self) -> None: ...


class BackendRefitter(Protocol):
    """Source: nvinfer1::IRefitter. Used by one thread at a time."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def missing(self) -> tuple[str, ...]: ...
    def set_weights(self, name: str, array: Array) -> None:
        """``array`` is C-contiguous and stays as it is. Raises DTypeError, ShapeError."""
        ...

    def set_onnx(self, model: bytes, directory: str | None) -> None: ...
    def refit(self) -> None:
        """The engine has no contexts. Raises EngineError."""
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
    def layer_precisions(self) -> tuple[LayerPrecision, ...]:
        """What each layer computes in, by the engine inspector; empty if the plan or the library does not tell."""
        ...

    def create_refitter(self) -> BackendRefitter:
        """Raises EngineError for a plan that was not built to be refitted. Source: nvinfer1::createInferRefitter"""
        ...

    @property
    def weight_streaming_bytes(self) -> int:
        """Weights that may stay on the host and be streamed in, 0 if the plan was not built for that."""
        ...

    def set_weight_streaming_budget(self, nbytes: int) -> None:
        """How much device memory these weights may take; before the first context. Raises EngineError.

        Source: nvinfer1::ICudaEngine::setWeightStreamingBudgetV2
        """
        ...

    def device_memory_bytes(self, profile: int | None) -> int:
        """Activation memory of one context: for one profile, or the most that any profile needs."""
        ...

    @property
    def weights_bytes(self) -> int:
        """Device memory the weights take, 0 if the library does not tell."""
        ...

    @property
    def user_managed_memory(self) -> bool:
        """Contexts can be made with ``own_memory=False``."""
        ...

    @property
    def num_aux_streams(self) -> int:
        """Most streams besides the caller's that one inference uses, 0 if none or if the library does not tell."""
        ...

    @property
    def captures_itself(self) -> bool:
        """Contexts capture and replay CUDA graphs of their own inside ``execute_async_v3`` (TensorRT-RTX since 1.2).

        Callers do not capture those then: kernels that TensorRT is still compiling would never enter the capture.
        """
        ...

    @property
    def untried_profiler(self) -> str | None:
        """Why it is not known whether a context's profiler lives here: try it in a process of its own first.

        None: it is known; ``set_profiler`` works, or refuses.
        """
        ...

    def create_context(self, *, own_memory: bool = True, cuda_graphs: bool = True) -> BackendContext:
        """A new context, in profile 0 where no other holds it.

        Args:
            own_memory: it allocates its activation memory; else it has none and gets some by ``set_device_memory``.
            cuda_graphs: whether it may capture graphs itself, where the engine's contexts can.
        Raises:
            EngineError: TensorRT could not make one.
            InvalidArgumentError: ``own_memory=False`` where ``user_managed_memory`` is False.
        """
        ...

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

    def runtime_cache(self) -> bytes | None:
        """Kernels compiled so far, for a later ``create_runtime``; the device is current.

        None where plans hold compiled kernels, and before the first context. Raises EngineError.
        """
        ...

    def destroy(self) -> None: ...


class BackendNetwork(Protocol):
    """Source: nvinfer1::INetworkDefinition and nvonnxparser::IParser"""

    def parse_onnx(self, model: bytes, directory: str | None) -> None:
        """Parse a serialized ModelProto; ``directory`` is where its external data lies, None if it has none.

        Raises ParserError with every issue; the network must then be destroyed.
        """
        ...

    def add_input(self, facts: TensorFacts) -> None: ...
    def add_layer(self, request: LayerRequest) -> tuple[TensorFacts, ...]:
        """Add a layer of ``trtx_py.network.TABLE``; its outputs, as typed and shaped by TensorRT.

        Raises BuilderError, naming the layer, for what this version does not have or refuses; the network must then
        be destroyed.
        """
        ...

    def mark_output(self, facts: TensorFacts, name: str) -> None: ...
    def unmark_output(self, facts: TensorFacts) -> None: ...
    def set_layer_type(self, request: LayerRequest, output: int | None, dtype: DataType) -> None:
        """Constrain the type of one output, or what the layer computes in. Raises BuilderError where typing is strong.

        Source: nvinfer1::ILayer::setPrecision, setOutputType
        """
        ...

    @property
    def inputs(self) -> tuple[TensorInfo, ...]: ...
    @property
    def outputs(self) -> tuple[TensorInfo, ...]: ...
    @property
    def num_layers(self) -> int: ...
    def layer_precisions(self) -> tuple[LayerPrecision, ...]:
        """What each layer will compute in, as far as the network decides that: all of it where typing is strong."""
        ...

    def destroy(self) -> None: ...


class BackendCalibrator(Protocol):
    """Source: nvinfer1::IInt8Calibrator. What BuildOptions.calibrator is."""

    @property
    def algorithm(self) -> str:
        """ "entropy" or "minmax"."""
        ...

    def batches(self) -> Iterator[Mapping[str, Array]]:
        """Host arrays for each input by name, all batches with the same number of rows."""
        ...

    def read_cache(self, title: str) -> bytes | None:
        """What ``write_cache`` was given for the same model, data and TensorRT (``title``); None if nothing was."""
        ...

    def write_cache(self, title: str, cache: bytes) -> None: ...


class DeviceMemory(Protocol):
    """Device memory that is counted, and bounded by a budget. What BuildOptions.memory is. Thread-safe."""

    def allocate_device(self, nbytes: int, *, owner: str = "") -> int:
        """Raises MemoryBudgetError, CudaError. The device must be current."""
        ...

    def free_device(self, address: int, nbytes: int) -> None: ...


class BackendBuilder(Protocol):
    """Source: nvinfer1::IBuilder. One build at a time."""

    def create_network(self) -> BackendNetwork: ...
    def load_plugins(self, libraries: Sequence[str], creators: Sequence[object]) -> None:
        """Raises BuilderError. Source: nvinfer1::IPluginRegistry"""
        ...

    def build_serialized_network(
        self, network: Any, options: BuildOptions, progress: BuildProgress | None
    ) -> bytes | memoryview:
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
        self,
        log: LogSink,
        *,
        device: int,
        lean_library: str | None,
        allow_host_code: bool,
        runtime_cache: bytes | None = None,
    ) -> BackendRuntime:
        """The device's primary context is current in this thread. Raises BackendUnavailableError, EngineError.

        ``runtime_cache`` is what ``BackendRuntime.runtime_cache`` gave, here or in another process. It only saves time:
        one that does not fit this version, GPU or driver, or is given where there is no such cache, is a logged
        warning, and the kernels are compiled anew.
        """
        ...


class DescribesPlans(Protocol):
    """What a backend has if its plans may be kept in an engine cache; one without it is built with every time."""

    def plan_settings(self) -> Mapping[str, Any] | None:
        """All that its plans depend on besides ``info``, the GPU and the build's options; None if that is unknown.

        Numbers, text, and lists and mappings of them. Two backends with the same settings and ``info`` build the same.
        """
        ...


__all__ = [
    "BackendBuilder",
    "BackendCalibrator",
    "BackendContext",
    "BackendEngine",
    "BackendNetwork",
    "BackendRefitter",
    "BackendRuntime",
    "BuildProgress",
    "CudaDriver",
    "DataType",
    "DescribesPlans",
    "DeviceMemory",
    "LayerProfiler",
    "LogSink",
    "OutputAllocator",
    "TensorRTBackend",
]
