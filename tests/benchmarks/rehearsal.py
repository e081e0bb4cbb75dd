"""Stand-ins for GPU, driver bindings and TensorRT, so that every section can be run where there is none.

The bare side computes with ONNX Runtime on host memory, ours runs on the mock: outputs are real and are compared,
times mean nothing.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

import trtx_py as trtx
from mock_backend import MockBackend
from tests.gpu.kit import MockSide, load_kit

from .bare import BareRuntime, Shape
from .floor import LAUNCH, QUERY, WRITE, Api, Floor
from .loops import Loops
from .rig import Rig, Settings, SetupError
from .workloads import Workload

_SUCCESS, _STALE_HANDLE = 0, 400
Operation = Callable[[], None]


class StandInDriver:
    """The functions of cuda.bindings.driver that the benchmarks call, with their tuples. Device memory is host memory,
    and work is done when it is enqueued; a capture records it instead."""

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._memory: dict[int, Any] = {}
        self._recording: dict[int, list[Operation]] = {}
        self._graphs: dict[int, list[Operation]] = {}

    def enqueue(self, stream: int, operation: Operation) -> None:
        """Do it, or record it where ``stream`` is capturing."""
        recording = self._recording.get(int(stream))
        if recording is None:
            operation()
        else:
            recording.append(operation)

    def api(self) -> Api:
        """For the C loops."""

        def launch(execution: int, _stream: int) -> int:
            if execution not in self._graphs:
                return _STALE_HANDLE
            for operation in self._graphs[execution]:
                operation()
            return _SUCCESS

        def write(_stream: int, address: int, value: int, _flags: int) -> int:
            ctypes.c_uint32.from_address(address).value = value
            return _SUCCESS

        return Api(
            LAUNCH(launch), LAUNCH(lambda _event, _stream: _SUCCESS), QUERY(lambda _event: _SUCCESS), WRITE(write)
        )

    def _allocated(self, nbytes: int) -> tuple[int, int]:
        memory = ctypes.create_string_buffer(nbytes)
        self._memory[ctypes.addressof(memory)] = memory
        return _SUCCESS, ctypes.addressof(memory)

    def _freed(self, address: int) -> tuple[int]:
        del self._memory[int(address)]
        return (_SUCCESS,)

    def cuMemAlloc(self, nbytes: int) -> tuple[int, int]:
        return self._allocated(nbytes)

    def cuMemHostAlloc(self, nbytes: int, _flags: int) -> tuple[int, int]:
        return self._allocated(nbytes)

    def cuMemFree(self, address: int) -> tuple[int]:
        return self._freed(address)

    def cuMemFreeHost(self, address: int) -> tuple[int]:
        return self._freed(address)

    def cuMemHostGetDevicePointer(self, address: int, _flags: int) -> tuple[int, int]:
        return _SUCCESS, address

    def cuMemGetInfo(self) -> tuple[int, int, int]:
        total = 1 << 36
        return _SUCCESS, total - sum(ctypes.sizeof(memory) for memory in self._memory.values()), total

    def cuMemcpyHtoDAsync(self, to: int, source: int, nbytes: int, stream: int) -> tuple[int]:
        self.enqueue(stream, lambda: void(ctypes.memmove(to, source, nbytes)))
        return (_SUCCESS,)

    def cuMemcpyDtoHAsync(self, to: int, source: int, nbytes: int, stream: int) -> tuple[int]:
        return self.cuMemcpyHtoDAsync(to, source, nbytes, stream)

    def cuStreamBeginCapture(self, stream: int, _mode: int) -> tuple[int]:
        self._recording[stream] = []
        return (_SUCCESS,)

    def cuStreamEndCapture(self, stream: int) -> tuple[int, list[Operation]]:
        return _SUCCESS, self._recording.pop(stream)

    def cuGraphGetNodes(self, graph: list[Operation]) -> tuple[int, list[object], int]:
        return _SUCCESS, [], len(graph)

    def cuGraphInstantiate(self, graph: list[Operation], _flags: int) -> tuple[int, int]:
        number = next(self._numbers)
        self._graphs[number] = graph
        return _SUCCESS, number

    def cuGraphExecDestroy(self, execution: int) -> tuple[int]:
        del self._graphs[execution]
        return (_SUCCESS,)

    def __getattr__(self, name: str) -> Callable[..., tuple[int, ...]]:
        if name in ("cuStreamCreate", "cuEventCreate", "cuDeviceGet", "cuDevicePrimaryCtxRetain"):
            return lambda *_: (_SUCCESS, next(self._numbers))
        if name in (
            "cuInit", "cuCtxSetCurrent", "cuCtxSynchronize", "cuStreamSynchronize", "cuStreamDestroy", "cuEventRecord",
            "cuEventQuery", "cuEventDestroy", "cuGraphDestroy",
        ):  # fmt: skip
            return lambda *_: (_SUCCESS,)
        raise AttributeError(name)


def void(_value: object) -> None:
    """Drop a value."""


class StandInContext:
    """One execution context over an ONNX Runtime session."""

    active_optimization_profile = 0

    def __init__(self, driver: StandInDriver, session: Any) -> None:
        self._driver, self._session = driver, session
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> Shape:
        if name not in self._shapes:
            zeros = {i.name: np.zeros(self._shapes[i.name], _numpy(i)) for i in self._session.get_inputs()}
            names = [output.name for output in self._session.get_outputs()]
            for each, found in zip(names, self._session.run(names, zeros), strict=True):
                self._shapes[each] = found.shape
        return self._shapes[name]

    def execute_async_v3(self, stream: int) -> bool:
        self._driver.enqueue(stream, self._compute)
        return True

    def _compute(self) -> None:
        given = {i.name: self._view(i).copy() for i in self._session.get_inputs()}
        outputs = self._session.get_outputs()
        for output, found in zip(outputs, self._session.run([o.name for o in outputs], given), strict=True):
            self._view(output)[...] = found

    def _view(self, tensor: Any) -> np.ndarray:
        shape, dtype = self._shapes[tensor.name], _numpy(tensor)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        data = (ctypes.c_uint8 * nbytes).from_address(self._addresses[tensor.name])
        return np.frombuffer(memoryview(data), dtype).reshape(shape)


def _numpy(tensor: Any) -> np.dtype:
    return np.dtype({"tensor(float)": "float32", "tensor(int32)": "int32", "tensor(float16)": "float16"}[tensor.type])


class StandInEngine:
    """An ONNX model where TensorRT has a plan."""

    def __init__(self, driver: StandInDriver, model: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._driver = driver
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._tensors = [*self._session.get_inputs(), *self._session.get_outputs()]
        self.num_io_tensors = len(self._tensors)

    def get_tensor_name(self, number: int) -> str:
        return str(self._tensors[number].name)

    def get_tensor_dtype(self, name: str) -> Any:
        kinds = {"float32": "FLOAT", "int32": "INT32", "float16": "HALF"}
        return SimpleNamespace(name=kinds[_numpy(next(t for t in self._tensors if t.name == name)).name])

    def create_execution_context(self) -> StandInContext:
        return StandInContext(self._driver, self._session)


class StandInTensorRT:
    """The module tensorrt_dispatch, as far as the benchmarks go."""

    class Logger:
        ERROR = 1

        def __init__(self, _level: int) -> None: ...

    def __init__(self, driver: StandInDriver) -> None:
        self._driver = driver

    def Runtime(self, _logger: object) -> Any:
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda model: StandInEngine(self._driver, model))
        runtime.load_runtime = lambda _library: runtime
        return runtime


class RehearsalRig(Rig):
    """Small engines, so that a rehearsal takes seconds; every section is run."""

    workloads = (
        Workload("mlp.fp32.vcx", (1,), small=True),
        Workload("mnist_cnn.fp16.vcx", (8,)),
        Workload("bert_small.fp16.vcx", (1, 16)),
        Workload("scale_big.fp32.vcx", (2,), heavy=True),
    )
    capi = ()  # the library has no stand-ins: its own section runs on the mock
    large = (Workload("scale_big.fp32.vcx", (2,), heavy=True),)
    batched = (Workload("mnist_cnn.fp16.vcx", (8,)), Workload("mlp.fp32.vcx", (16,), small=True))
    lone = (Workload("mnist_cnn.fp16.vcx", (1,)), Workload("mlp.fp32.vcx", (1,), small=True))
    loaded = Workload("mlp.fp32.vcx", (1,))
    parallel = Workload("mnist_cnn.fp16.vcx", (8,))
    measured_memory = (Workload("mlp.fp32.vcx", (8,)),)
    torch = (Workload("resnet50.fp16.vcx", (1,)),)
    child_arguments = ("--rehearse",)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        kit = load_kit()
        if kit is None:
            raise SetupError("a rehearsal needs the GPU kit's folder, for its models: set TRTX_GPU_KIT")
        self.kit, self.lean_library = kit, "none"
        self._side, driver = MockSide(kit), StandInDriver()
        self._devices = MockBackend(devices=4)
        self.loops = Loops()
        self.runtime = self.open_runtime()
        self.bare = BareRuntime(self.lean_library, driver, StandInTensorRT(driver))
        self.floor = Floor(driver.api())

    def open_runtime(self) -> trtx.Runtime:
        return self._side.runtime()

    def pool_options(self) -> dict[str, Any]:
        return {"backend": self._devices}

    def plan_bytes(self, engine: str) -> bytes:
        return self.kit.model(engine)

    def plan(self, engine: str) -> Any:
        return self._side.plan(engine)
