"""Device tensors of other libraries: what is recognised, refused, kept alive, and how streams are ordered."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.ownership import Gate
from trtx_py import _native
from trtx_py._interop import DeviceView, EventCache, device_view

# DLPack tensors as another library makes them: written against dlpack.h with ctypes, not with the code under test.


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("manager", ctypes.c_void_p), ("deleter", DELETER))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
NAMES = {Managed: b"dltensor", Versioned: b"dltensor_versioned"}


class Foreign:
    """A tensor of another library, of the newest DLPack; subclasses are older ones. Records what it is asked."""

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...] = (2, 3),
        *,
        code: int = 2,
        bits: int = 32,
        lanes: int = 1,
        strides: tuple[int, ...] | None = None,
        offset: int = 0,
        device: tuple[int, int] = (2, 0),
        version: int = 1,
        flags: int = 0,
        order: Callable[[int], None] | None = None,
    ) -> None:
        self.device = device
        self.streams: list[int] = []
        self.deleted = 0
        self._order = order
        numbers, pointer = ctypes.c_int64 * len(shape), ctypes.POINTER(ctypes.c_int64)
        dims = numbers(*shape)
        # What is cast stays alive with the pointer, and that with the structure.
        steps = pointer() if strides is None else ctypes.cast(numbers(*strides), pointer)
        self._deleter = DELETER(self._delete)
        self._tensor = Tensor(
            address, *device, len(shape), code, bits, lanes, ctypes.cast(dims, pointer), steps, offset
        )  # fmt: skip
        self._head = (version, 7, flags)

    def _delete(self, address: int) -> None:
        self.deleted += 1

    def capsule(self, kind: type[Managed | Versioned]) -> object:
        if kind is Managed:
            self.managed: Any = Managed(self._tensor, None, self._deleter)
        else:
            major, minor, flags = self._head
            self.managed = Versioned(major, minor, None, self._deleter, flags, self._tensor)
        return _new_capsule(ctypes.addressof(self.managed), NAMES[kind], None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int, max_version: tuple[int, int] | None = None) -> object:
        self.streams.append(stream)
        if self._order is not None:
            self._order(stream)
        return self.capsule(Managed if max_version is None else Versioned)


class Older(Foreign):
    """From before DLPack 1.0: does not know max_version."""

    def __dlpack__(self, *, stream: int) -> object:  # type: ignore[override]
        return super().__dlpack__(stream=stream)


class Interface:
    """A tensor that has nothing but the CUDA array interface."""

    def __init__(self, **interface: Any) -> None:
        self.__cuda_array_interface__ = interface


@pytest.fixture
def device(mock_backend: MockBackend) -> Iterator[trtx.Device]:
    with trtx.Device(0, backend=mock_backend) as made:
        yield made


@pytest.fixture
def stream(device: trtx.Device) -> Iterator[trtx.Stream]:
    with device.create_stream() as made:
        yield made


def view(value: Any, device: trtx.Device, stream: trtx.Stream, **options: Any) -> DeviceView:
    found = device_view(value, device._access, device.ordinal, stream.handle, name="input 'x'", **options)
    assert found is not None
    return found


# Recognition


@pytest.mark.parametrize("kind", [Foreign, Older])
def test_dlpack(kind: type[Foreign], device: trtx.Device, stream: trtx.Stream) -> None:
    tensor = kind(0x1000, strides=(3, 1), offset=64)
    found = view(tensor, device, stream)
    assert (found.address, found.shape, found.dtype, found.nbytes) == (0x1040, (2, 3), np.dtype("f4"), 24)
    assert tensor.streams == [stream.handle]
    assert not found.read_only
    assert tensor.deleted == 0
    del found
    assert tensor.deleted == 1


def test_default_stream_has_a_number_of_its_own(device: trtx.Device) -> None:
    tensor = Foreign(0x1000)
    assert device_view(tensor, device._access, 0, 0) is not None
    assert tensor.streams == [1]


def test_flags_and_managed_memory(device: trtx.Device, stream: trtx.Stream) -> None:
    assert view(Foreign(0x1000, flags=1), device, stream).read_only
    assert view(Foreign(0x1000, device=(13, 0)), device, stream).address == 0x1000


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_interface(version: int, device: trtx.Device, stream: trtx.Stream) -> None:
    given: dict[str, Any] = {"shape": (2, 3), "typestr": "<f4", "data": (0x1000, True)}
    if version:
        given |= {"version": version, "strides": (12, 4) if version < 3 else None, "mask": None, "stream": None}
    tensor = Interface(**given)
    found = view(tensor, device, stream)
    assert (found.address, found.shape, found.dtype, found.nbytes) == (0x1000, (2, 3), np.dtype("f4"), 24)
    assert found.read_only
    before = sys.getrefcount(tensor)
    del found
    assert sys.getrefcount(tensor) == before - 1


def test_dlpack_is_preferred(device: trtx.Device, stream: trtx.Stream) -> None:
    class Both(Foreign):
        __cuda_array_interface__ = None

    tensor = Both(0x1000)
    view(tensor, device, stream)
    assert tensor.streams


@pytest.mark.parametrize(
    "host",
    [
        np.zeros(3), np.float32(1), 1.5, [1, 2], None, "text", object(), memoryview(b"1234"),
        np.zeros(3).view(type("Sub", (np.ndarray,), {})),
        Foreign(0x1000, device=(1, 0)), Foreign(0x1000, device=(3, 0)),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_host_objects(host: Any, device: trtx.Device, stream: trtx.Stream) -> None:
    assert device_view(host, device._access, 0, stream.handle) is None


@pytest.mark.parametrize(
    ("code", "bits", "dtype"),
    [
        (0, 8, np.int8), (0, 32, np.int32), (0, 64, np.int64), (1, 8, np.uint8), (2, 16, np.float16),
        (2, 64, np.float64), (4, 16, ml_dtypes.bfloat16), (5, 64, np.complex64), (6, 8, np.bool_),
        (10, 8, ml_dtypes.float8_e4m3fn), (12, 8, ml_dtypes.float8_e5m2), (14, 8, ml_dtypes.float8_e8m0fnu),
    ],
)  # fmt: skip
def test_dtypes(code: int, bits: int, dtype: Any, device: trtx.Device, stream: trtx.Stream) -> None:
    found = view(Foreign(0x1000, code=code, bits=bits), device, stream)
    assert found.dtype == np.dtype(dtype)
    assert found.nbytes == 6 * bits // 8


# Shapes and strides


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((), None), ((), ()), ((1, 5), (99, 1)), ((5, 1), (1, 0)), ((2, 1, 3), (3, 77, 1)), ((0, 3), (1, 1))],
)
def test_contiguous(shape: Any, strides: Any, device: trtx.Device, stream: trtx.Stream) -> None:
    assert view(Foreign(0x1000, shape, strides=strides), device, stream).shape == shape
    given = None if strides is None else tuple(4 * n for n in strides)
    tensor = Interface(shape=shape, typestr="<f4", data=(0x1000, False), version=3, strides=given)
    assert view(tensor, device, stream).shape == shape


@pytest.mark.parametrize("strides", [(1, 2), (6, 1), (0, 1), (-3, 1)])
def test_not_contiguous(strides: Any, device: trtx.Device, stream: trtx.Stream) -> None:
    given = Foreign(0x1000, strides=strides)
    with pytest.raises(trtx.InvalidArgumentError) as caught:
        view(given, device, stream)
    for part in ("input 'x'", "Foreign", "(2, 3)", str(strides), "(3, 1) in elements", ".contiguous()"):
        assert part in str(caught.value)
    tensor = Interface(
        shape=(2, 3), typestr="<f4", data=(0x1000, False), version=2, strides=tuple(4 * n for n in strides)
    )
    with pytest.raises(trtx.InvalidArgumentError, match=r"expected \(12, 4\) in bytes"):
        view(tensor, device, stream)
    del caught
    gc.collect()  # the traceback held the tensor
    assert given.deleted == 1


def test_empty_tensors_may_have_no_address(device: trtx.Device, stream: trtx.Stream) -> None:
    assert view(Foreign(0, (0, 3)), device, stream).nbytes == 0
    for address in (0, None):
        tensor = Interface(shape=(3, 0), typestr="|b1", data=(address, False), version=3, stream=77)
        assert view(tensor, device, stream).address == 0
    with pytest.raises(trtx.InvalidArgumentError, match="null pointer"):
        view(Foreign(0), device, stream)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": (2, 1)}, "on CUDA device 1; the engine is on device 0"),
        ({"device": (10, 0)}, r"in ROCm memory \(DLPack device type 10\)"),
        ({"device": (99, 0)}, "in unknown memory"),
        ({"lanes": 4}, "vectors of 4 lanes"),
        ({"code": 17, "bits": 4}, "type code 17, packed, 4 bits"),
        ({"code": 3, "bits": 64}, "type code 3"),
        ({"code": 0, "bits": 24}, "type code 0"),
        ({"version": 2}, "follows DLPack 2.7; expected version 1"),
        ({"shape": (2, -3)}, "none of them negative"),
    ],
)
def test_what_dlpack_refuses(options: Any, message: str, device: trtx.Device, stream: trtx.Stream) -> None:
    tensor = Foreign(0x1000, **options)
    with pytest.raises(trtx.InvalidArgumentError, match=message) as caught:
        view(tensor, device, stream)
    assert "input 'x'" in str(caught.value)
    del caught
    gc.collect()
    assert tensor.deleted == len(tensor.streams)  # asked or not, nothing is left over


def test_what_the_producer_says_is_passed_on(device: trtx.Device, stream: trtx.Stream) -> None:
    class Grad(Foreign):
        def __dlpack__(self, **options: Any) -> object:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")

    class Lost(Foreign):
        def __dlpack_device__(self) -> tuple[int, int]:
            raise RuntimeError("no device")

    class Odd(Foreign):
        def __dlpack__(self, **options: Any) -> object:
            return "no capsule"

    class Property:
        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            raise RuntimeError("cannot get it on a Variable that requires grad")

    for value, message in (
        (Grad(1), r"BufferError: .*use tensor\.detach\(\)"),
        (Lost(1), "no device"),
        (Odd(1), "expected a capsule"),
        (Property(), "requires grad"),
    ):
        with pytest.raises(trtx.InvalidArgumentError, match=message):
            view(value, device, stream)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": 4}, "version 4; expected 0 to 3"),
        ({"mask": object()}, "mask"),
        ({"stream": 0}, "stream 0; expected None, 1"),
        ({"stream": -1}, "stream -1"),
        ({"stream": "s"}, "cannot be read"),
        ({"shape": None}, "cannot be read"),
        ({"data": 5}, "cannot be read"),
        ({"strides": (4,)}, "one stride for each"),
        ({"typestr": "<V2"}, "no number type.*DLPack"),
        ({"typestr": "nonsense"}, "no number type"),
        ({"typestr": None}, "no number type"),
    ],
)
def test_what_the_interface_refuses(changed: Any, message: str, device: trtx.Device, stream: trtx.Stream) -> None:
    given = {"shape": (2, 3), "typestr": "<f4", "data": (0x1000, False), "version": 3} | changed
    with pytest.raises(trtx.InvalidArgumentError, match=message):
        view(Interface(**given), device, stream)
    odd = Interface()
    odd.__cuda_array_interface__ = 5  # type: ignore[assignment]
    with pytest.raises(trtx.InvalidArgumentError, match="expected a dict"):
        view(odd, device, stream)


# Ordering


def interface_on(stream: int) -> Interface:
    return Interface(shape=(2, 3), typestr="<f4", data=(0x1000, False), version=3, stream=stream)


@pytest.mark.parametrize("cached", [False, True])
def test_our_stream_waits_for_the_named_one(
    cached: bool, device: trtx.Device, stream: trtx.Stream, mock_backend: MockBackend
) -> None:
    events = EventCache(device._access) if cached else None
    with device.create_stream() as theirs:
        for _ in range(3):
            gate = Gate(mock_backend, device, theirs)
            view(interface_on(theirs.handle), device, stream, events=events)
            assert not stream.query()
            gate.open()
            stream.synchronize()
        theirs.synchronize()
    if events is not None:
        assert len(events._free) == 1
        events.close()
    # mock_backend fails the test if an event is left


def test_no_ordering_where_none_is_asked(
    device: trtx.Device, stream: trtx.Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EventCache, "order", lambda *_: pytest.fail("an event was used"))
    view(Interface(shape=(1,), typestr="<f4", data=(0x1000, False), version=3), device, stream)
    view(interface_on(stream.handle), device, stream)  # our own
    empty = Interface(shape=(0,), typestr="<f4", data=(0, False), version=3, stream=7)
    view(empty, device, stream)
    device_view(interface_on(1), device._access, 0, 0)  # the default stream by both of its names


def test_legacy_default_stream(device: trtx.Device, stream: trtx.Stream) -> None:
    view(interface_on(1), device, stream)
    stream.synchronize()


def test_stream_that_does_not_exist(device: trtx.Device, stream: trtx.Stream) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=r"stream 0xbad, which cannot be waited for"):
        view(interface_on(0xBAD), device, stream)


def test_producer_orders_our_stream(device: trtx.Device, stream: trtx.Stream, mock_backend: MockBackend) -> None:
    """As torch does: it records an event on its current stream and lets the stream it is given wait."""
    driver = mock_backend.driver
    with device.create_stream() as theirs, device.create_event() as event:

        def order(consumer: int) -> None:
            event.record(theirs)
            with device.current():
                driver.cuStreamWaitEvent(consumer, event.handle, 0)

        gate = Gate(mock_backend, device, theirs)
        view(Foreign(0x1000, order=order), device, stream)
        assert not stream.query()
        gate.open()
        stream.synchronize()
        theirs.synchronize()


# Capsules of our own


@pytest.mark.parametrize("versioned", [False, True])
def test_numpy_reads_our_capsules(versioned: bool) -> None:
    """The layout is right in both directions: numpy is the other side."""
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    start = sys.getrefcount(array)

    class Producer:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

        def __dlpack__(self, **options: Any) -> object:
            return _native.dlpack_capsule(array.ctypes.data, 1, 0, array.shape, 2, 32, array, versioned)

    producer: Any = Producer()
    seen = np.from_dlpack(producer)
    np.testing.assert_array_equal(seen, array)
    assert np.shares_memory(seen, array)
    assert sys.getrefcount(array) == start + 1
    del seen
    assert sys.getrefcount(array) == start


@pytest.mark.parametrize("options", [{}, {"max_version": (1, 0)}])
def test_numpy_capsules_are_read(options: Any) -> None:
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)[:, ::2]
    try:
        capsule = array.__dlpack__(**options)
    except TypeError:
        pytest.skip("this numpy does not know max_version")
    start = sys.getrefcount(array)
    tensor = _native.DLPackTensor(capsule)
    assert (tensor.address, tensor.shape, tensor.strides) == (array.ctypes.data, (2, 2, 4), (12, 8, 1))
    assert (tensor.code, tensor.bits, tensor.lanes, tensor.device_type, tensor.device_id) == (0, 16, 1, 1, 0)
    with pytest.raises(BufferError, match="consumed before"):
        _native.DLPackTensor(capsule)
    del tensor
    assert sys.getrefcount(array) == start - 1


class Owner:
    def __init__(self, gone: list[int]) -> None:
        self._gone = gone

    def __del__(self) -> None:
        self._gone.append(threading.get_ident())


@pytest.mark.parametrize("versioned", [False, True])
def test_owner_goes_with_the_last_reference(versioned: bool) -> None:
    gone: list[int] = []
    capsule = _native.dlpack_capsule(1, 2, 0, (1,), 2, 32, Owner(gone), versioned)
    del capsule
    assert len(gone) == 1  # nobody took it
    capsule = _native.dlpack_capsule(1, 2, 0, (0, 4), 2, 32, Owner(gone), versioned)
    tensor = _native.DLPackTensor(capsule)
    assert (tensor.address, tensor.strides) == (0, (4, 1))
    del capsule
    assert len(gone) == 1
    del tensor
    assert len(gone) == 2


def test_deleter_may_be_called_without_the_gil() -> None:
    """By a native thread of the consumer's, which Python does not know."""
    gone: list[int] = []
    capsule = _native.dlpack_capsule(1, 2, 0, (1,), 2, 32, Owner(gone), False)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    rename = ctypes.pythonapi.PyCapsule_SetName
    rename.restype, rename.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_char_p)
    used = ctypes.c_char_p(b"used_dltensor")
    address = pointer(capsule, b"dltensor")
    assert rename(capsule, used) == 0
    raw = ctypes.cast(Managed.from_address(address).deleter, ctypes.c_void_p).value
    assert raw
    libc = ctypes.CDLL(None)
    thread = ctypes.c_ulong()
    assert libc.pthread_create(ctypes.byref(thread), None, ctypes.c_void_p(raw), ctypes.c_void_p(address)) == 0
    assert libc.pthread_join(thread, None) == 0  # CDLL calls run without the GIL
    assert len(gone) == 1
    assert gone[0] != threading.get_ident()


@pytest.mark.parametrize("shape", [(-1,), (2**40, 2**40), (1,) * 65, ("a",)])
def test_shapes_that_no_capsule_can_have(shape: Any) -> None:
    with pytest.raises((ValueError, OverflowError, TypeError)):
        _native.dlpack_capsule(1, 2, 0, shape, 2, 32, None, True)
