"""TensorRT and the driver with nothing between: what P0, C0 and the bare figures are made of. The only file here that
calls them."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "BOOL": "bool", "INT8": "int8", "UINT8": "uint8"}
_NON_BLOCKING, _NO_TIMING, _PORTABLE_MAPPED = 1, 2, 3


class BareError(RuntimeError):
    """TensorRT or the driver refused what the benchmark asked of it."""


def checked(result: Any) -> Any:
    """The value of a cuda.bindings call: None, one value, or a tuple. Raises BareError."""
    if int(result[0]) != 0:
        raise BareError(f"the CUDA driver returned {result[0]!r}")
    values = result[1:]
    return None if not values else values[0] if len(values) == 1 else values


class BareRuntime:
    """The bindings, the primary context and the runtime that loads the kit's plans.

    Args:
        lean_library: path of the lean runtime of the version that the plans were built with.
        cu, trt: stand in for cuda.bindings.driver and tensorrt_dispatch, in a rehearsal.
    """

    def __init__(self, lean_library: str, cu: Any = None, trt: Any = None) -> None:
        self.cu: Any = cu or importlib.import_module("cuda.bindings.driver")
        self.trt: Any = trt or importlib.import_module("tensorrt_dispatch")
        checked(self.cu.cuInit(0))
        self._device = checked(self.cu.cuDeviceGet(0))
        self._context = checked(self.cu.cuDevicePrimaryCtxRetain(self._device))
        self.make_current()
        self._logger = self.trt.Logger(self.trt.Logger.ERROR)
        self._runtime = self.trt.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = True
        self._lean = self._runtime.load_runtime(lean_library)
        if self._lean is None:
            raise BareError(f"load_runtime({lean_library!r}) returned None")

    def make_current(self) -> None:
        """For the calling thread: copies go through the driver, which wants a current context."""
        checked(self.cu.cuCtxSetCurrent(self._context))

    def deserialize(self, plan: bytes) -> Any:
        engine = self._lean.deserialize_cuda_engine(plan)
        if engine is None:
            raise BareError("deserialize_cuda_engine returned None")
        return engine

    def free_bytes(self) -> int:
        """Device memory that is free, after all work."""
        checked(self.cu.cuCtxSynchronize())
        return int(checked(self.cu.cuMemGetInfo())[0])

    def pinned(self, nbytes: int) -> tuple[int, np.ndarray]:
        """Address and bytes of page-locked memory."""
        address = int(checked(self.cu.cuMemHostAlloc(max(nbytes, 1), _PORTABLE_MAPPED)))
        memory: Any = (ctypes.c_uint8 * max(nbytes, 1)).from_address(address)
        return address, np.frombuffer(memory, np.uint8)


class Place:
    """Pinned inputs and outputs of one request, and, once captured, the graph that serves it."""

    def __init__(self, lane: BareLane) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.addresses: list[int] = []
        self.uploads: list[tuple[Any, int, int]] = []
        self.downloads: list[tuple[int, Any, int]] = []
        self.event_handle: Any = checked(lane.runtime.cu.cuEventCreate(_NO_TIMING))
        self.event = int(self.event_handle)
        self.graph = 0
        for name, (shape, dtype, device) in lane.tensors.items():
            nbytes = int(np.prod(shape)) * dtype.itemsize
            address, data = lane.runtime.pinned(nbytes)
            self.addresses.append(address)
            self.arrays[name] = data[:nbytes].view(dtype).reshape(shape)
            if name in lane.inputs:
                self.uploads.append((device, address, nbytes))
            else:
                self.downloads.append((address, device, nbytes))


def create_context(engine: Any) -> Any:
    context = engine.create_execution_context()
    if context is None:
        raise BareError("create_execution_context returned None")
    return context


class BareLane:
    """One context, stream and set of device buffers, with ``places`` pinned places. Used by one thread at a time."""

    def __init__(self, runtime: BareRuntime, engine: Any, shapes: Shapes, places: int = 1, context: Any = None) -> None:
        self.runtime, cu = runtime, runtime.cu
        self._context = context or create_context(engine)
        self._stream = checked(cu.cuStreamCreate(_NON_BLOCKING))
        self.stream = int(self._stream)
        self._choose_profile()
        self.tensors: dict[str, tuple[Shape, np.dtype, Any]] = {}
        self.inputs, self.outputs = list(shapes), []
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise BareError(f"set_input_shape({name!r}, {shape}) returned False")
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            shape = tuple(self._context.get_tensor_shape(name))
            if min(shape, default=1) < 0:
                raise BareError(f"{name} has the shape {shape}; the benchmarks know static outputs only")
            dtype = np.dtype(_DTYPES[engine.get_tensor_dtype(name).name])
            device = checked(cu.cuMemAlloc(max(int(np.prod(shape)) * dtype.itemsize, 1)))
            self._context.set_tensor_address(name, int(device))
            self.tensors[name] = shape, dtype, device
            if name not in shapes:
                self.outputs.append(name)
        self.places = [Place(self) for _ in range(places)]

    def _choose_profile(self) -> None:
        """A second context on a shared profile may begin without one: then every enqueue would return False."""
        if self._context.active_optimization_profile != 0:
            if not self._context.set_optimization_profile_async(0, self.stream):
                raise BareError("set_optimization_profile_async(0) returned False: others hold the plan's only profile")
            checked(self.runtime.cu.cuStreamSynchronize(self._stream))

    def enqueue(self, place: Place) -> None:
        """Copies in, kernels, copies out: what a program that calls TensorRT does for each request."""
        upload, download, stream = self.runtime.cu.cuMemcpyHtoDAsync, self.runtime.cu.cuMemcpyDtoHAsync, self._stream
        for device, address, nbytes in place.uploads:
            if upload(device, address, nbytes, stream)[0] != 0:
                raise BareError("cuMemcpyHtoDAsync failed")
        if not self._context.execute_async_v3(self.stream):
            raise BareError("execute_async_v3 returned False")
        for address, device, nbytes in place.downloads:
            if download(address, device, nbytes, stream)[0] != 0:
                raise BareError("cuMemcpyDtoHAsync failed")

    def run(self, place: Place) -> None:
        """P0: enqueue, and block in cuStreamSynchronize."""
        self.enqueue(place)
        if self.runtime.cu.cuStreamSynchronize(self._stream)[0] != 0:
            raise BareError("cuStreamSynchronize failed")

    def run_spinning(self, place: Place) -> None:
        """Enqueue, and spin on an event: what is fastest without a graph."""
        cu, event = self.runtime.cu, place.event_handle
        self.enqueue(place)
        if cu.cuEventRecord(event, self._stream)[0] != 0:
            raise BareError("cuEventRecord failed")
        query = cu.cuEventQuery
        while True:
            status = query(event)[0]
            if status == 0:
                return
            if status != 600:  # CUDA_ERROR_NOT_READY
                raise BareError(f"cuEventQuery returned {status!r}")

    def capture(self, place: Place) -> int:
        """The graph of one request, as the floor launches it. TensorRT has settled what shapes need: one run before."""
        cu = self.runtime.cu
        self.run(place)
        mode = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        checked(cu.cuStreamBeginCapture(self._stream, mode))
        try:
            self.enqueue(place)
        finally:
            graph = checked(cu.cuStreamEndCapture(self._stream))
        try:
            nodes = int(checked(cu.cuGraphGetNodes(graph))[-1])
            copies = len(place.uploads) + len(place.downloads)
            if nodes <= copies:
                raise BareError(f"the captured graph has {nodes} nodes, of which {copies} are copies: it is empty")
            place.graph = int(checked(cu.cuGraphInstantiate(graph, 0)))
        finally:
            checked(cu.cuGraphDestroy(graph))
        return place.graph

    def fill(self, inputs: Mapping[str, np.ndarray], place: Place | None = None) -> None:
        """Write the inputs of one place, or of all."""
        for each in [place] if place is not None else self.places:
            for name, array in inputs.items():
                each.arrays[name][...] = array

    def poison(self) -> None:
        """Make outputs of earlier runs unusable: NaN, or -1."""
        for place in self.places:
            for name in self.outputs:
                place.arrays[name].reshape(-1).view(np.uint8)[...] = 0xFF

    def read(self, place: Place) -> dict[str, np.ndarray]:
        """Copies of the outputs in a place."""
        return {name: place.arrays[name].copy() for name in self.outputs}

    def close(self) -> None:
        """Idempotent; goes on after a failure, and the first error counts."""
        cu = self.runtime.cu
        places, self.places = self.places, []
        tensors, self.tensors = self.tensors, {}
        with contextlib.ExitStack() as undo:
            if tensors:
                undo.callback(lambda: checked(cu.cuStreamDestroy(self._stream)))
            for _, _, device in tensors.values():
                undo.callback(lambda device: checked(cu.cuMemFree(device)), device)
            for place in places:
                undo.callback(lambda event: checked(cu.cuEventDestroy(event)), place.event_handle)
                for address in place.addresses:
                    undo.callback(lambda address: checked(cu.cuMemFreeHost(address)), address)
                if place.graph:
                    undo.callback(lambda graph: checked(cu.cuGraphExecDestroy(graph)), place.graph)
                place.arrays = {}
            self._context = None
            if tensors:
                checked(cu.cuStreamSynchronize(self._stream))


def load_seconds(runtime: BareRuntime, plan: bytes, shapes: Shapes) -> tuple[float, float]:
    """Seconds to deserialize and create a context, and to the first result; everything is closed again."""
    begun = time.perf_counter()
    engine = runtime.deserialize(plan)
    context = create_context(engine)
    ready = time.perf_counter() - begun
    lane = BareLane(runtime, engine, shapes, context=context)
    try:
        lane.run(lane.places[0])
        return ready, time.perf_counter() - begun
    finally:
        lane.close()
