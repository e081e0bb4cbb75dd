"""libtrtxpy inside this process, through ctypes: what tests of the C ABI need of it, and no Python of trtx_py's."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p, sizeof
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

LIBRARY = Path(__file__).parents[1] / "trtx_py" / "capi" / "libtrtxpy.so"
MAX_RANK = 8

Shape = tuple[int, ...]
Array = np.ndarray[Any, Any]
T = TypeVar("T", bound="_Handle")

#: By the numbers of trtxpy_dtype.
DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype(np.float32), 1: np.dtype(np.float16), 2: np.dtype(np.int32), 3: np.dtype(np.uint32),
    4: np.dtype(np.int64), 5: np.dtype(np.uint64), 6: np.dtype(np.int8), 7: np.dtype(np.uint8),
    8: np.dtype(ml_dtypes.int4), 9: np.dtype(ml_dtypes.uint4), 16: np.dtype(np.bool_),
    17: np.dtype(ml_dtypes.bfloat16), 18: np.dtype(ml_dtypes.float8_e4m3fn),
}  # fmt: skip
NUMBERS = {dtype: number for number, dtype in DTYPES.items()}
_PACKED = (8, 9)
_HOST = 0


class CapiError(Exception):
    """A call failed: the status's name without TRTXPY_, and the last error."""

    def __init__(self, function: str, status: str, text: str) -> None:
        super().__init__(f"{function}: {status}: {text}")
        self.status, self.text = status, text


class _Shape(ctypes.Structure):
    _fields_ = (("rank", c_int32), ("reserved", c_int32), ("dims", c_int64 * MAX_RANK))

    @classmethod
    def of(cls, shape: Sequence[int]) -> _Shape:
        # of more axes than there can be the library hears the number
        return cls(len(shape), 0, (c_int64 * MAX_RANK)(*shape[:MAX_RANK]))

    @property
    def tuple(self) -> Shape:
        return tuple(self.dims[: self.rank])


class _ContextOptions(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t), ("backend", c_char_p), ("device", c_int32), ("completion", c_int32),
        ("max_device_bytes", c_uint64), ("lean_library", c_char_p), ("max_cached_models", c_uint32),
        ("allow_host_code", c_uint32),
    )  # fmt: skip


class _Range(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("min", _Shape), ("opt", _Shape), ("max", _Shape))


class _GraphOptions(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t), ("ranges", POINTER(_Range)), ("range_count", c_size_t), ("precision", c_char_p),
        ("optimization_level", c_int32), ("lanes", c_uint32), ("slots", c_uint32), ("max_graphs", c_uint32),
        ("no_cuda_graphs", c_uint32), ("reserved", c_uint32),
    )  # fmt: skip


class _TensorInfo(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t), ("name", c_char_p), ("dtype", c_int32), ("engine_dtype", c_int32),
        ("shape", _Shape),
    )  # fmt: skip


class _TensorDesc(ctypes.Structure):
    _fields_ = (("struct_size", c_size_t), ("dtype", c_int32), ("location", c_int32), ("shape", _Shape))


class _NamedShape(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("shape", _Shape))


class _Binding(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("tensor", c_void_p))


class _DispatchOptions(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t), ("timeout_ns", c_uint64), ("resize_outputs", c_uint32), ("reserved", c_uint32),
    )  # fmt: skip


class _GraphStatistics(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t), ("submitted", c_uint64), ("completed", c_uint64), ("failed", c_uint64),
        ("cancelled", c_uint64), ("captured", c_uint64), ("uncaptured", c_uint64), ("zero_copy", c_uint64),
        ("in_flight", c_uint64), ("queued", c_uint64), ("shapes", c_uint64), ("slots", c_uint64),
    )  # fmt: skip


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "trtxpy_context_create": (POINTER(_ContextOptions), POINTER(c_void_p)),
    "trtxpy_context_destroy": (c_void_p,),
    "trtxpy_graph_from_onnx": (
        c_void_p, c_char_p, c_size_t, c_char_p, c_size_t, POINTER(_GraphOptions), POINTER(c_void_p),
    ),
    "trtxpy_graph_from_plan": (c_void_p, c_char_p, c_size_t, POINTER(_GraphOptions), POINTER(c_void_p)),
    "trtxpy_graph_destroy": (c_void_p,),
    "trtxpy_graph_get_plan": (c_void_p, c_void_p, POINTER(c_size_t)),
    "trtxpy_graph_tensor_count": (c_void_p, c_int32, POINTER(c_size_t)),
    "trtxpy_graph_tensor_info": (c_void_p, c_int32, c_size_t, POINTER(_TensorInfo)),
    "trtxpy_graph_output_shapes": (c_void_p, POINTER(_NamedShape), c_size_t, POINTER(_Shape), c_size_t),
    "trtxpy_graph_get_statistics": (c_void_p, POINTER(_GraphStatistics)),
    "trtxpy_tensor_create": (c_void_p, POINTER(_TensorDesc), POINTER(c_void_p)),
    "trtxpy_tensor_destroy": (c_void_p,),
    "trtxpy_tensor_describe": (c_void_p, POINTER(_TensorDesc)),
    "trtxpy_tensor_bytes": (c_void_p, POINTER(c_size_t)),
    "trtxpy_tensor_write": (c_void_p, c_char_p, c_size_t),
    "trtxpy_tensor_read": (c_void_p, c_void_p, c_size_t),
    "trtxpy_dispatch": (
        c_void_p, POINTER(_Binding), c_size_t, POINTER(_Binding), c_size_t, POINTER(_DispatchOptions),
    ),
    "trtxpy_live_objects": (POINTER(c_size_t),),
}  # fmt: skip


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    library.trtxpy_last_error.restype = c_char_p
    library.trtxpy_status_name.restype, library.trtxpy_status_name.argtypes = c_char_p, (c_int32,)
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library


def call(function: str, *arguments: Any) -> None:
    """Raises CapiError unless it returns TRTXPY_OK."""
    library = _library()
    status = getattr(library, function)(*arguments)
    if status:
        text = library.trtxpy_last_error()
        raise CapiError(function, status_name(status), text.decode())


def status_name(status: int) -> str:
    """Without TRTXPY_."""
    return str(_library().trtxpy_status_name(status).decode().removeprefix("TRTXPY_"))


def live_objects() -> int:
    """Objects of the library that are open."""
    count = c_size_t()
    call("trtxpy_live_objects", byref(count))
    return count.value


def to_bytes(array: Array) -> bytes:
    """Elements as the library has them: 4-bit types two to a byte, the first in the low half."""
    if NUMBERS[array.dtype] not in _PACKED:
        return array.tobytes()
    flat = array.astype(np.int8).reshape(-1).view(np.uint8) & 15
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return bytes(flat[0::2] | flat[1::2] << 4)


def from_bytes(content: bytes, dtype: np.dtype[Any], shape: Shape) -> Array:
    """The inverse. Raises AssertionError if an unused half is not 0, or a bool neither 0 nor 1."""
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.frombuffer(content, np.uint8)
    if dtype == np.bool_:
        assert (raw <= 1).all(), f"a bool is {raw.max()}"
    if NUMBERS[dtype] not in _PACKED:
        return np.frombuffer(content, dtype).reshape(shape)
    halves = np.stack([raw & 15, raw >> 4], axis=-1).reshape(-1)
    assert not halves[count:].any(), "the last high half is not 0"
    numbers = halves[:count].astype(np.int8)
    if dtype == ml_dtypes.int4:
        numbers[numbers >= 8] -= 16
    return numbers.astype(dtype).reshape(shape)


class _Handle:
    _destroy = ""

    def __init__(self, handle: c_void_p) -> None:
        self.handle = handle

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        call(self._destroy, self.handle)


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output of a graph."""

    name: str
    dtype: np.dtype[Any]
    engine_dtype: np.dtype[Any]
    shape: Shape


#: By input: the least, the best and the greatest shape.
Ranges = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]


class Context(_Handle):
    _destroy = "trtxpy_context_destroy"

    def __init__(self, backend: str = "mock") -> None:
        options = _ContextOptions(struct_size=sizeof(_ContextOptions), backend=backend.encode())
        handle = c_void_p()
        call("trtxpy_context_create", byref(options), byref(handle))
        super().__init__(handle)

    def graph(self, model: bytes, weights: bytes | None = None, ranges: Ranges | None = None) -> Graph:
        """trtxpy_graph_from_onnx."""
        options = _GraphOptions(struct_size=sizeof(_GraphOptions), optimization_level=-1)
        if ranges is not None:
            rows = [_Range(name.encode(), *map(_Shape.of, limits)) for name, limits in ranges.items()]
            options.ranges, options.range_count = (_Range * len(rows))(*rows), len(rows)
        handle = c_void_p()
        call(
            "trtxpy_graph_from_onnx", self.handle, model, len(model), weights, len(weights or b""), byref(options),
            byref(handle),
        )  # fmt: skip
        return Graph(self, handle)

    def graph_from_plan(self, plan: bytes) -> Graph:
        """trtxpy_graph_from_plan."""
        handle = c_void_p()
        call("trtxpy_graph_from_plan", self.handle, plan, len(plan), None, byref(handle))
        return Graph(self, handle)

    def tensor(self, dtype: np.dtype[Any], shape: Sequence[int], location: int = _HOST) -> Tensor:
        """trtxpy_tensor_create."""
        desc = _TensorDesc(sizeof(_TensorDesc), NUMBERS[dtype], location, _Shape.of(shape))
        handle = c_void_p()
        call("trtxpy_tensor_create", self.handle, byref(desc), byref(handle))
        return Tensor(handle)

    def tensor_of(self, array: Array, location: int = _HOST) -> Tensor:
        """A tensor that holds the array."""
        made = self.tensor(array.dtype, array.shape, location)
        try:
            made.write(array)
        except BaseException:
            made.close()
            raise
        return made


class Tensor(_Handle):
    _destroy = "trtxpy_tensor_destroy"

    def describe(self) -> tuple[np.dtype[Any], Shape]:
        desc = _TensorDesc(struct_size=sizeof(_TensorDesc))
        call("trtxpy_tensor_describe", self.handle, byref(desc))
        return DTYPES[desc.dtype], desc.shape.tuple

    def write(self, array: Array) -> None:
        content = to_bytes(array)
        call("trtxpy_tensor_write", self.handle, content, len(content))

    def read(self) -> Array:
        """In its own type and shape, which a dispatch may have changed."""
        dtype, shape = self.describe()
        size = c_size_t()
        call("trtxpy_tensor_bytes", self.handle, byref(size))
        content = ctypes.create_string_buffer(size.value)
        call("trtxpy_tensor_read", self.handle, content, size)
        return from_bytes(content.raw, dtype, shape)


class Graph(_Handle):
    _destroy = "trtxpy_graph_destroy"

    def __init__(self, context: Context, handle: c_void_p) -> None:
        super().__init__(handle)
        self._context = context
        self.inputs, self.outputs = tuple(self._ports(0)), tuple(self._ports(1))

    def _ports(self, direction: int) -> Iterator[Port]:
        count = c_size_t()
        call("trtxpy_graph_tensor_count", self.handle, direction, byref(count))
        for index in range(count.value):
            info = _TensorInfo(struct_size=sizeof(_TensorInfo))
            call("trtxpy_graph_tensor_info", self.handle, direction, index, byref(info))
            yield Port(info.name.decode(), DTYPES[info.dtype], DTYPES[info.engine_dtype], info.shape.tuple)

    def run(self, inputs: Mapping[str, Array], location: int = _HOST) -> dict[str, Array]:
        """Dispatch on new tensors; the outputs begin without elements and are resized."""
        made: list[Tensor] = []
        try:
            given = [(name, self._context.tensor_of(array, location)) for name, array in inputs.items()]
            made += [tensor for _, tensor in given]
            results = [(port.name, self._context.tensor(port.dtype, (0,), location)) for port in self.outputs]
            made += [tensor for _, tensor in results]
            self.dispatch(given, results)
            return {name: tensor.read() for name, tensor in results}
        finally:
            for tensor in made:
                tensor.close()

    def dispatch(
        self, inputs: Sequence[tuple[str, Tensor]], outputs: Sequence[tuple[str, Tensor]], *, resize: bool = True
    ) -> None:
        """trtxpy_dispatch."""
        given, results = _bindings(inputs), _bindings(outputs)
        options = _DispatchOptions(sizeof(_DispatchOptions), 0, int(resize), 0)
        call("trtxpy_dispatch", self.handle, given, len(given), results, len(results), byref(options))

    def output_shapes(self, inputs: Mapping[str, Sequence[int]]) -> list[Shape]:
        """trtxpy_graph_output_shapes."""
        given = (_NamedShape * len(inputs))(*(_NamedShape(name.encode(), _Shape.of(s)) for name, s in inputs.items()))
        shapes = (_Shape * len(self.outputs))()
        call("trtxpy_graph_output_shapes", self.handle, given, len(given), shapes, len(shapes))
        return [shape.tuple for shape in shapes]

    def plan(self) -> bytes:
        """trtxpy_graph_get_plan."""
        size = c_size_t()
        call("trtxpy_graph_get_plan", self.handle, None, byref(size))
        content = ctypes.create_string_buffer(size.value)
        call("trtxpy_graph_get_plan", self.handle, content, byref(size))
        return content.raw

    def statistics(self) -> dict[str, int]:
        """trtxpy_graph_get_statistics."""
        found = _GraphStatistics(struct_size=sizeof(_GraphStatistics))
        call("trtxpy_graph_get_statistics", self.handle, byref(found))
        return {name: getattr(found, name) for name, *_ in _GraphStatistics._fields_[1:]}


def _bindings(rows: Sequence[tuple[str, Tensor]]) -> Any:
    return (_Binding * len(rows))(*(_Binding(name.encode(), tensor.handle) for name, tensor in rows))
