"""Device memory of other libraries as inputs: torch, cupy, jax, numba, through DLPack and the CUDA array interface."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _native
from ._errors import CudaError, DTypeError, InvalidArgumentError
from ._types import Shape
from .backends.protocols import CU_EVENT_DISABLE_TIMING, STICKY_CUDA_ERRORS

if TYPE_CHECKING:
    from .cuda._device import DeviceAccess

#: DLDeviceType, where its numbers mean something here or in a message.
DL_CUDA, DL_CUDA_MANAGED = 2, 13
_DL_HOST = frozenset({1, 3, 11})  # plain, and page-locked for CUDA or ROCm: the host reads all of these
_DL_DEVICES = {
    4: "OpenCL", 7: "Vulkan", 8: "Metal", 9: "VPI", 10: "ROCm", 12: "extension", 14: "oneAPI", 15: "WebGPU",
    16: "Hexagon", 17: "MAIA", 18: "Trainium",
}  # fmt: skip

#: The newest DLPack whose tensors are understood here, as a producer wants to hear it.
DLPACK_VERSION = (1, 1)
_READ_ONLY, _PADDED = 1, 4  # bits of DLManagedTensorVersioned.flags

#: A stream that has no handle of its own, as both protocols write it; 0 is forbidden in both, being ambiguous.
LEGACY_DEFAULT_STREAM = 1

_DL_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex"}
_DL_NAMED = {
    (6, 8): "bool", (7, 8): "float8_e3m4", (8, 8): "float8_e4m3", (9, 8): "float8_e4m3b11fnuz",
    (10, 8): "float8_e4m3fn", (11, 8): "float8_e4m3fnuz", (12, 8): "float8_e5m2", (13, 8): "float8_e5m2fnuz",
    (14, 8): "float8_e8m0fnu",
}  # fmt: skip
_DL_SUBBYTE = frozenset({15, 16, 17})  # packed 6- and 4-bit floats
_DL_CODES = {name: code for code, name in _DL_NAMED.items()}
_NUMPY_CODES = {"i": 0, "u": 1, "f": 2, "c": 5}
_HOST_TYPES = (np.ndarray, np.generic, bool, int, float, list, tuple)


@dataclass(frozen=True)
class DeviceView:
    """A C-contiguous tensor in device memory that somebody else owns.

    Attributes:
        address: of the first element; 0 if the tensor is empty and its producer gave no pointer.
        nbytes: of all elements.
        read_only: the producer forbids writing.
        keep: what keeps the memory alive: hold it until the GPU has done what reads it.
    """

    address: int
    shape: Shape
    dtype: np.dtype[Any]
    nbytes: int
    read_only: bool
    keep: object = field(repr=False)


class EventCache:
    """Events that let one stream wait for another: free again as soon as that is enqueued, so few serve all.

    Thread-safe. Whoever makes it closes it before the device's context ends.
    """

    def __init__(self, access: DeviceAccess) -> None:
        self._access = access
        self._free: list[int] = []

    def order(self, before: int, after: int) -> None:
        """What is enqueued on ``after`` from now on waits for what ``before`` has to do now. Raises CudaError."""
        driver = self._access.driver
        with self._access.current:
            try:
                event = self._free.pop()
            except IndexError:
                event = driver.cuEventCreate(CU_EVENT_DISABLE_TIMING)
            try:
                driver.cuEventRecord(event, before)
                driver.cuStreamWaitEvent(after, event, 0)
            except BaseException:
                driver.cuEventDestroy(event)
                raise
            self._free.append(event)  # a wait holds on to what was recorded, not to the event

    def close(self) -> None:
        """Destroy the events. Source: cuEventDestroy"""
        with self._access.current:
            while self._free:
                self._access.driver.cuEventDestroy(self._free.pop())


def device_view(
    value: Any,
    access: DeviceAccess,
    ordinal: int,
    stream: int,
    *,
    name: str = "tensor",
    events: EventCache | None = None,
) -> DeviceView | None:
    """``value`` as memory of this device that is ready for work enqueued on ``stream``; None if it is a host object.

    To be called on the caller's own thread: producers such as torch order behind the stream that is current there.
    DLPack comes before the CUDA array interface, because its capsules also keep the memory alive.

    Args:
        access, ordinal: the device to work on.
        stream: CUstream that will read the memory, 0 for the default stream. It is made to wait for the producer.
        name: what error messages call the tensor, such as ``input 'image'``.
        events: for producers that only name their stream; without it an event is made each time.
    Raises:
        InvalidArgumentError: on another device, not C-contiguous, masked, or the producer refuses (its text is given).
        DTypeError: elements that numpy and ml_dtypes have no type for, or that are packed.
        CudaError: the device failed while the streams were ordered.
    """
    if isinstance(value, _HOST_TYPES):
        return None
    where = _ask(value, "__dlpack_device__", name)
    if where is not None and _ask(value, "__dlpack__", name) is not None:
        return _through_dlpack(value, where, ordinal, stream, name)
    interface = _ask(value, "__cuda_array_interface__", name)
    if interface is None:
        return None
    return _through_interface(value, interface, access, stream, name, events)


def _ask(value: Any, attribute: str, name: str) -> Any:
    """An attribute, None if there is none. Properties run code of the producer's, which may raise anything."""
    try:
        return getattr(value, attribute, None)
    except Exception as error:
        raise _refused(value, name, f"{attribute} failed", error) from error


def _refused(value: Any, name: str, what: str, error: Exception) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{name} is a {type(value).__name__} that does not hand out its device memory: {what} with "
        f"{type(error).__name__}: {error}"
    )


# DLPack


def _through_dlpack(value: Any, where: Any, ordinal: int, stream: int, name: str) -> DeviceView | None:
    try:
        kind, number = (int(part) for part in where())
    except Exception as error:
        raise _refused(value, name, "__dlpack_device__() failed", error) from error
    if kind in _DL_HOST:
        return None
    _check_device(value, kind, number, ordinal, name)
    tensor = _take(value, stream or LEGACY_DEFAULT_STREAM, name)
    _check_device(value, tensor.device_type, tensor.device_id, ordinal, name)
    dtype = _dlpack_dtype(tensor, value, name)
    return _checked_view(
        value, name, tensor.address, tensor.shape, dtype,
        strides=tensor.strides, unit=1, read_only=bool(tensor.flags & _READ_ONLY), keep=tensor,
    )  # fmt: skip


def _check_device(value: Any, kind: int, number: int, ordinal: int, name: str) -> None:
    if kind not in (DL_CUDA, DL_CUDA_MANAGED):
        known = _DL_DEVICES.get(kind)
        raise InvalidArgumentError(
            f"{name} is a {type(value).__name__} in {known or 'unknown'} memory (DLPack device type {kind}); "
            f"expected memory of CUDA device {ordinal} or a host array: copy it there first"
        )
    # Managed memory belongs to no device: its number is 0 or means nothing.
    if kind == DL_CUDA and number != ordinal:
        raise InvalidArgumentError(
            f"{name} is a {type(value).__name__} on CUDA device {number}; the engine is on device {ordinal}: "
            "copy it there first"
        )


def _take(value: Any, stream: int, name: str) -> _native.DLPackTensor:
    """The tensor of a producer's capsule; the producer makes ``stream`` wait for its own work."""
    try:
        try:
            capsule = value.__dlpack__(stream=stream, max_version=DLPACK_VERSION)
        except TypeError:  # a producer older than DLPack 1.0, or one that fails again in the same way
            capsule = value.__dlpack__(stream=stream)
        return _native.DLPackTensor(capsule)
    except Exception as error:
        raise _refused(value, name, "__dlpack__() failed", error) from error


def _dlpack_dtype(tensor: _native.DLPackTensor, value: Any, name: str) -> np.dtype[Any]:
    code, bits, lanes = tensor.code, tensor.bits, tensor.lanes
    if lanes != 1:
        raise DTypeError(
            f"{name} is a {type(value).__name__} whose elements are vectors of {lanes} lanes; expected plain numbers"
        )
    dtype = _numpy_type(code, bits)
    if dtype is None:
        packed = " packed," if code in _DL_SUBBYTE or tensor.flags & _PADDED else ""
        raise DTypeError(
            f"{name} is a {type(value).__name__} with elements of DLPack type code {code},{packed} {bits} bits; "
            "expected a type that numpy or ml_dtypes has: convert it first"
        )
    return dtype


@functools.cache
def _numpy_type(code: int, bits: int) -> np.dtype[Any] | None:
    name = _DL_NAMED.get((code, bits))
    if name is None and code in _DL_KINDS and bits % 8 == 0:
        name = f"{_DL_KINDS[code]}{bits}"
    return None if name is None else _type_named(name)


def _type_named(name: str) -> np.dtype[Any] | None:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        narrow = getattr(ml_dtypes, name, None)
        return None if narrow is None else np.dtype(narrow)


def dlpack_type(dtype: np.dtype[Any]) -> tuple[int, int] | None:
    """DLPack's type code and bits for a numpy dtype, None if it has none."""
    if not dtype.isnative:
        return None
    if dtype.name == "bfloat16":
        return 4, 16
    if dtype.name in _DL_CODES:
        return _DL_CODES[dtype.name]
    code, bits = _NUMPY_CODES.get(dtype.kind), dtype.itemsize * 8
    return None if code is None or bits > 128 or _numpy_type(code, bits) != dtype else (code, bits)


# The CUDA array interface


def _through_interface(
    value: Any, interface: Any, access: DeviceAccess, stream: int, name: str, events: EventCache | None
) -> DeviceView:
    what = f"{name} is a {type(value).__name__} whose __cuda_array_interface__"
    if not isinstance(interface, Mapping):
        raise InvalidArgumentError(f"{what} is a {type(interface).__name__}; expected a dict")
    try:
        version = operator.index(interface.get("version", 0))
        shape = tuple(operator.index(n) for n in interface["shape"])
        address, read_only = interface["data"]
        address, read_only = operator.index(address or 0), bool(read_only)
        given = interface.get("strides")
        strides = None if given is None else tuple(operator.index(n) for n in given)
        typestr = interface["typestr"]
        if not 0 <= address < 1 << 64:
            raise ValueError(f"{address} is no address")
        producer = interface.get("stream")
        producer = None if producer is None else operator.index(producer)
    except Exception as error:
        raise InvalidArgumentError(
            f"{what} cannot be read ({type(error).__name__}: {error}); expected shape, typestr, data and version"
        ) from error
    if not 0 <= version <= 3:
        raise InvalidArgumentError(f"{what} has version {version}; expected 0 to 3")
    if interface.get("mask") is not None:
        raise InvalidArgumentError(f"{what} has a mask; TensorRT has no masks: fill it first")
    if producer is not None and producer <= 0:
        raise InvalidArgumentError(
            f"{what} has stream {producer}; expected None, 1 (legacy default), 2 (per-thread) or a handle"
        )
    view = _checked_view(
        value, name, address, shape, _interface_dtype(typestr, what),
        strides=strides, unit=None, read_only=read_only, keep=(value, interface),
    )  # fmt: skip
    if producer is not None and view.nbytes and producer != (stream or LEGACY_DEFAULT_STREAM):
        _order(access, producer, stream, what, events)
    return view


def _interface_dtype(typestr: Any, what: str) -> np.dtype[Any]:
    try:
        dtype = np.dtype(typestr) if isinstance(typestr, str) else None
    except Exception:  # numpy raises TypeError, ValueError and SyntaxError
        dtype = None
    if dtype is None or dtype.kind not in "biufc":
        raise DTypeError(
            f"{what} has typestr {typestr!r}, which is no number type; it has none for bfloat16 and 8-bit floats: "
            "hand those over through DLPack"
        )
    return dtype


def _order(access: DeviceAccess, producer: int, stream: int, what: str, events: EventCache | None) -> None:
    cache = EventCache(access) if events is None else events
    try:
        cache.order(producer, stream)
    except CudaError as error:
        if error.code in STICKY_CUDA_ERRORS:
            raise
        raise InvalidArgumentError(f"{what} has stream {producer:#x}, which cannot be waited for: {error}") from error
    finally:
        if events is None:
            cache.close()


# Both


def _checked_view(
    value: Any,
    name: str,
    address: int,
    shape: Shape,
    dtype: np.dtype[Any],
    *,
    strides: tuple[int, ...] | None,
    unit: int | None,
    read_only: bool,
    keep: object,
) -> DeviceView:
    """``unit``: what strides count, in elements of DLPack; None for bytes."""
    if any(n < 0 for n in shape) or (strides is not None and len(strides) != len(shape)):
        raise InvalidArgumentError(
            f"{name} is a {type(value).__name__} of shape {shape} and strides {strides}; expected one stride for each "
            "dimension, none of them negative"
        )
    count = math.prod(shape)
    if strides is not None and count:
        step, dense = unit or dtype.itemsize, []
        for n in reversed(shape):
            dense.append(step)
            step *= n
        dense.reverse()
        if any(n != 1 and have != want for n, have, want in zip(shape, strides, dense, strict=True)):
            raise InvalidArgumentError(
                f"{name} is a {type(value).__name__} of shape {shape} on the device that is not C-contiguous: strides "
                f"{strides}, expected {tuple(dense)} in {'elements' if unit else 'bytes'}; hand over "
                "tensor.contiguous() (torch) or ascontiguousarray(array) (cupy, jax)"
            )
    if not address and count:
        raise InvalidArgumentError(
            f"{name} is a {type(value).__name__} of shape {shape} at a null pointer; expected the address of elements"
        )
    return DeviceView(address, shape, dtype, count * dtype.itemsize, read_only, keep)
