"""libtrtxpy as a C program would use it: structs of the header, and a loop in C around trtxpy_dispatch."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import trtx_py.capi
from trtx_py._types import Array, Shape

from .floor import compile_library
from .samples import CpuMeter, Round
from .workloads import Arrays

_LOOP = Path(__file__).with_name("capi_loop.c")
_LIBRARY = Path(trtx_py.capi.__file__).with_name("libtrtxpy.so")
_MAX_RANK = 8


class CapiError(RuntimeError):
    """A call of the C ABI failed."""


class _Shape(ctypes.Structure):
    _fields_ = (("rank", ctypes.c_int32), ("reserved", ctypes.c_int32), ("dims", ctypes.c_int64 * _MAX_RANK))

    @classmethod
    def of(cls, shape: Shape) -> _Shape:
        return cls(len(shape), 0, (ctypes.c_int64 * _MAX_RANK)(*shape))

    @property
    def tuple(self) -> Shape:
        return tuple(self.dims[: self.rank])


class _ContextOptions(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t), ("backend", ctypes.c_char_p), ("device", ctypes.c_int32),
        ("completion", ctypes.c_int32), ("max_device_bytes", ctypes.c_uint64), ("lean_library", ctypes.c_char_p),
        ("max_cached_models", ctypes.c_uint32), ("allow_host_code", ctypes.c_uint32),
    )  # fmt: skip


class _NamedShape(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("shape", _Shape))


class _Binding(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("tensor", ctypes.c_void_p))


class _TensorInfo(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t), ("name", ctypes.c_char_p), ("dtype", ctypes.c_int32),
        ("engine_dtype", ctypes.c_int32), ("shape", _Shape),
    )  # fmt: skip


class _TensorDesc(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t), ("dtype", ctypes.c_int32), ("location", ctypes.c_int32), ("shape", _Shape),
    )  # fmt: skip


_DTYPES = {0: "float32", 1: "float16", 2: "int32", 4: "int64", 16: "bool"}
_INPUT, _OUTPUT = 0, 1


class Client:
    """The library in this process, with one context."""

    def __init__(self, backend: str, lean_library: str | None = None) -> None:
        self._lib = ctypes.CDLL(str(_LIBRARY))
        self._lib.trtxpy_last_error.restype = ctypes.c_char_p
        self._loop = compile_library(_LOOP)
        lean = lean_library.encode() if lean_library else None
        options = _ContextOptions(ctypes.sizeof(_ContextOptions), backend.encode(), 0, 0, 0, lean, 0, 0)
        self._context = ctypes.c_void_p()
        self.check("trtxpy_context_create", ctypes.byref(options), ctypes.byref(self._context))

    def check(self, function: str, *arguments: Any) -> None:
        status = getattr(self._lib, function)(*arguments)
        if status:
            raise CapiError(f"{function}: status {status}: {self._lib.trtxpy_last_error().decode()}")

    @contextlib.contextmanager
    def graph(self, content: bytes, *, is_plan: bool) -> Iterator[ctypes.c_void_p]:
        graph = ctypes.c_void_p()
        size = ctypes.c_size_t(len(content))
        if is_plan:
            self.check("trtxpy_graph_from_plan", self._context, content, size, None, ctypes.byref(graph))
        else:
            self.check(
                "trtxpy_graph_from_onnx", self._context, content, size, None, ctypes.c_size_t(0), None,
                ctypes.byref(graph),
            )  # fmt: skip
        try:
            yield graph
        finally:
            self.check("trtxpy_graph_destroy", graph)

    def names(self, graph: ctypes.c_void_p, direction: int) -> list[tuple[str, np.dtype[Any]]]:
        count = ctypes.c_size_t()
        self.check("trtxpy_graph_tensor_count", graph, direction, ctypes.byref(count))
        found = []
        for index in range(count.value):
            info = _TensorInfo(ctypes.sizeof(_TensorInfo))
            self.check("trtxpy_graph_tensor_info", graph, direction, ctypes.c_size_t(index), ctypes.byref(info))
            found.append((info.name.decode(), np.dtype(_DTYPES[info.dtype])))
        return found

    def view(self, tensor: int, dtype: np.dtype[Any]) -> Array:
        """The tensor's memory."""
        desc, data = _TensorDesc(ctypes.sizeof(_TensorDesc)), ctypes.c_void_p()
        self.check("trtxpy_tensor_describe", ctypes.c_void_p(tensor), ctypes.byref(desc))
        self.check("trtxpy_tensor_data", ctypes.c_void_p(tensor), ctypes.byref(data))
        shape = desc.shape.tuple
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        memory = memoryview((ctypes.c_uint8 * nbytes).from_address(data.value or 0))
        found: Array = np.frombuffer(memory, dtype).reshape(shape)
        return found

    def close(self) -> None:
        self.check("trtxpy_context_destroy", self._context)


class Dispatch:
    """trtxpy_dispatch from a C loop.

    Args:
        in_place: on the graph's own pinned tensors; else on tensors of the context, which are copied on the host.
        output_shapes: in the order of the graph's outputs; None asks the graph, which captures the shape.
    """

    def __init__(
        self,
        client: Client,
        graph: ctypes.c_void_p,
        shapes: Mapping[str, Shape],
        *,
        in_place: bool,
        output_shapes: Sequence[Shape] | None = None,
    ) -> None:
        self.name = f"trtxpy_dispatch {'in place' if in_place else 'copied'}"
        self._client, self._graph = client, graph
        inputs, outputs = client.names(graph, _INPUT), client.names(graph, _OUTPUT)
        named: list[Any] = [(name.encode(), _Shape.of(shapes[name])) for name, _ in inputs]
        given = (_NamedShape * len(inputs))(*named)
        self._tensors = (ctypes.c_void_p * (len(inputs) + len(outputs)))()
        tensors = ctypes.addressof(self._tensors)
        size = ctypes.sizeof(ctypes.c_void_p)
        counts = ctypes.c_size_t(len(inputs)), ctypes.c_size_t(len(outputs))
        if in_place:
            client.check(
                "trtxpy_graph_create_tensors", graph, given, counts[0], ctypes.c_void_p(tensors), counts[0],
                ctypes.c_void_p(tensors + size * len(inputs)), counts[1],
            )  # fmt: skip
        else:
            found = (_Shape * len(outputs))(*map(_Shape.of, output_shapes or ()))
            if output_shapes is None:
                client.check("trtxpy_graph_output_shapes", graph, given, counts[0], found, counts[1])
            wanted = [(_Shape.of(shapes[name]), dtype) for name, dtype in inputs]
            wanted += [(shape, dtype) for shape, (_, dtype) in zip(found, outputs, strict=True)]
            numbers = {np.dtype(name): number for number, name in _DTYPES.items()}
            for index, (shape, dtype) in enumerate(wanted):
                desc = _TensorDesc(ctypes.sizeof(_TensorDesc), numbers[dtype], 0, shape)
                where = ctypes.c_void_p(tensors + size * index)
                client.check("trtxpy_tensor_create", client._context, ctypes.byref(desc), where)
        bound: list[Any] = [
            (name.encode(), tensor) for (name, _), tensor in zip(inputs + outputs, self._tensors, strict=True)
        ]
        self._inputs = (_Binding * len(inputs))(*bound[: len(inputs)])
        self._outputs = (_Binding * len(outputs))(*bound[len(inputs) :])
        views = [client.view(tensor, dtype) for tensor, (_, dtype) in zip(self._tensors, inputs + outputs, strict=True)]
        self._given = {name: view for (name, _), view in zip(inputs, views, strict=False)}
        self._found = {name: view for (name, _), view in zip(outputs, views[len(inputs) :], strict=True)}
        self._function = ctypes.cast(client._lib.trtxpy_dispatch, ctypes.c_void_p)

    def fill(self, inputs: Arrays) -> None:
        for name, array in inputs.items():
            self._given[name][...] = array

    def round(self, count: int) -> Round:
        times = np.zeros(count, np.uint64)
        meter = CpuMeter()
        status = self._client._loop.capi_loop(
            self._function, self._graph, self._inputs, ctypes.c_size_t(len(self._inputs)), self._outputs,
            ctypes.c_size_t(len(self._outputs)), ctypes.c_size_t(count), ctypes.c_void_p(times.ctypes.data),
        )  # fmt: skip
        if status:
            raise CapiError(f"{self.name}: status {status}")
        return meter.round(times.astype(np.int64))

    def outputs(self, inputs: Arrays) -> Arrays:
        self.fill(inputs)
        for view in self._found.values():
            view.view(np.uint8)[...] = 0xA5
        self.round(1)
        return {name: view.copy() for name, view in self._found.items()}

    def close(self) -> None:
        self._given, self._found = {}, {}
        for tensor in self._tensors:
            self._client.check("trtxpy_tensor_destroy", ctypes.c_void_p(tensor))


class WithBurner:
    """A contender while another Python thread never lets go of the interpreter lock but when it must."""

    def __init__(self, inner: Dispatch) -> None:
        self.name = f"{inner.name}, lock burnt"
        self._inner = inner

    def outputs(self, inputs: Arrays) -> Arrays:
        return self._inner.outputs(inputs)

    def round(self, count: int) -> Round:
        ended = threading.Event()
        begun = threading.Event()

        def burn() -> None:
            begun.set()
            while not ended.is_set():
                sum(range(1000))

        burner = threading.Thread(target=burn)
        burner.start()
        begun.wait()
        try:
            return self._inner.round(count)
        finally:
            ended.set()
            burner.join()
