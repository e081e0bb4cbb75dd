"""DeviceArray: values, ordering, who keeps the memory, and what closing its device does."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend, device_lost, fail
from tests.unit.ownership import Gate, until
from trtx_py import _native
from trtx_py._interop import device_view
from trtx_py.cuda._array import DeviceArray, Written

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def device(mock_backend: MockBackend) -> Iterator[trtx.Device]:
    with trtx.Device(0, backend=mock_backend) as made:
        yield made


@pytest.fixture
def stream(device: trtx.Device) -> Iterator[trtx.Stream]:
    with device.create_stream() as made:
        yield made


class Pending:
    """An array whose writing is held up on a stream until ``finish`` is called."""

    def __init__(self, backend: MockBackend, device: trtx.Device, stream: trtx.Stream) -> None:
        self.gate = Gate(backend, device, stream)
        self.array = DeviceArray._create(device, VALUES.shape, VALUES.dtype)
        driver = backend.driver
        self.work = Written(device._access)
        with device.current():
            driver.cuMemsetD8Async(self.array.address, 0, self.array.nbytes, stream.handle)
        self.work.record(stream.handle)
        self.array._written_by(self.work)
        self._stream = stream

    def finish(self) -> None:
        self.gate.open()
        self._stream.synchronize()


@pytest.fixture
def pending(mock_backend: MockBackend, device: trtx.Device, stream: trtx.Stream) -> Iterator[Pending]:
    made = Pending(mock_backend, device, stream)
    yield made
    made.finish()
    made.array.close()


def take(array: DeviceArray, **options: Any) -> _native.DLPackTensor:
    """What a consumer of DLPack does."""
    return _native.DLPackTensor(array.__dlpack__(**options))


def refuses_all_use(array: DeviceArray) -> None:
    for name in ("address", "ready", "__cuda_array_interface__"):
        with pytest.raises(trtx.ClosedError, match="DeviceArray"):
            getattr(array, name)
    for call in (array.copy_to_host, array.synchronize, array.__dlpack__):
        with pytest.raises(trtx.ClosedError, match="DeviceArray"):
            call()


# What it is


@pytest.mark.parametrize(
    "values", [VALUES, np.array(3.5), np.zeros((0, 4), np.int8), VALUES.T, np.ones(3, ml_dtypes.bfloat16)], ids=repr
)
def test_values(values: Any, device: trtx.Device, stream: trtx.Stream) -> None:
    with DeviceArray.from_host(device, values, stream) as array:
        assert (array.shape, array.dtype, array.nbytes) == (values.shape, values.dtype, values.nbytes)
        assert (array.ndim, array.size, array.device) == (values.ndim, values.size, device)
        assert array.ready
        back = array.copy_to_host()
        assert back.dtype == values.dtype
        np.testing.assert_array_equal(back, values)
        assert str(values.dtype) in repr(array)
        assert array.address > 0


async def test_to_host(device: trtx.Device, stream: trtx.Stream) -> None:
    async with DeviceArray.from_host(device, VALUES, stream) as array:
        np.testing.assert_array_equal(await array.to_host(), VALUES)
        both = await asyncio.gather(array.to_host(), array.to_host())
        np.testing.assert_array_equal(both, [VALUES, VALUES])
    assert array.closed


def test_what_it_is_not(device: trtx.Device, stream: trtx.Stream, mock_backend: MockBackend) -> None:
    array = DeviceArray.from_host(device, VALUES, stream)
    assert len(array) == 2
    scalar = DeviceArray.from_host(device, 1.0, stream)
    for wrong in (lambda: len(scalar), lambda: bool(array), lambda: pickle.dumps(array), DeviceArray):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(trtx.InvalidArgumentError, match="copy_to_host"):
        np.asarray(array)
    for given in (object(), [[1], [2, 3]]):
        with pytest.raises(trtx.InvalidArgumentError):
            DeviceArray.from_host(device, given, stream)  # type: ignore[arg-type]
    with pytest.raises(trtx.InvalidArgumentError, match="expected a Device"):
        DeviceArray.from_host(object(), VALUES, stream)  # type: ignore[arg-type]


def test_memory_is_counted(device: trtx.Device, stream: trtx.Stream) -> None:
    with DeviceArray.from_host(device, VALUES, stream):
        assert device.memory_statistics().current_bytes == 24
        listed = [item for item in trtx.live_objects() if item.kind == "DeviceArray"]
        assert [(item.device_bytes, item.owner) for item in listed] == [(24, str(device._handle))]
        assert __file__ in listed[0].made_at
    assert device.memory_statistics().current_bytes == 0


def test_dropping_it_frees_it_without_a_warning(device: trtx.Device, stream: trtx.Stream) -> None:
    for _ in range(3):
        DeviceArray.from_host(device, VALUES, stream)
    trtx.live_objects()  # waits for the reaper
    assert device.memory_statistics().live == 0


def test_a_dropped_array_is_no_obstacle(mock_backend: MockBackend) -> None:
    """Whether the reaper has come by or not: nobody could do anything about it."""
    for _ in range(20):
        device = trtx.Device(0, backend=mock_backend)
        with device.create_stream() as stream:
            DeviceArray.from_host(device, VALUES, stream)
        device.close()


def test_nothing_is_left_where_memory_is_short(mock_backend_factory: Any) -> None:
    backend = mock_backend_factory(faults=[fail("cuMemAlloc"), fail("cuMemcpyHtoDAsync")])
    with trtx.Device(0, backend=backend) as device, device.create_stream() as stream:
        for call in ("cuMemAlloc", "cuMemcpyHtoDAsync"):
            with pytest.raises(trtx.CudaError) as caught:
                DeviceArray.from_host(device, VALUES, stream)
            assert caught.value.call == call
        assert device.memory_statistics().live == 0
        assert len(trtx.live_objects()) == 2


# Work that is not over


def test_pending(pending: Pending) -> None:
    array = pending.array
    assert not array.ready
    copied: list[Any] = []
    reading = threading.Thread(target=lambda: copied.append(array.copy_to_host()))
    reading.start()
    while not array._handle.loans:
        pass
    with pytest.raises(trtx.BorrowedError, match="DeviceArray"):
        array.device.close()
    assert not copied
    pending.gate.open()
    reading.join()
    np.testing.assert_array_equal(copied[0], np.zeros((2, 3)))
    array.synchronize()
    assert array.ready


def test_close_never_waits_and_the_memory_goes_later(pending: Pending, device: trtx.Device) -> None:
    pending.array.close()
    pending.array.close()
    assert pending.array.closed
    assert device.memory_statistics().live == 1  # the reaper waits for the work
    pending.finish()
    trtx.live_objects()
    assert device.memory_statistics().live == 0


async def test_aclose_waits(pending: Pending, device: trtx.Device) -> None:
    closing = asyncio.create_task(pending.array.aclose())
    await until(lambda: pending.array.closed)
    assert not closing.done()
    pending.finish()
    await closing
    await pending.array.aclose()
    assert device.memory_statistics().live == 0


async def test_cancelling_to_host(pending: Pending) -> None:
    reading = asyncio.create_task(pending.array.to_host())
    await until(lambda: bool(pending.array._handle.loans))
    reading.cancel()
    await asyncio.sleep(0)
    assert not reading.done()
    pending.gate.open()
    with pytest.raises(asyncio.CancelledError):
        await reading
    pending.array.close()


@pytest.mark.parametrize("asked", [True, False])
def test_export_lets_the_consumer_wait(asked: bool, pending: Pending, device: trtx.Device) -> None:
    with device.create_stream() as theirs:
        tensor = take(pending.array, stream=theirs.handle if asked else -1)
        assert theirs.query() is not asked
        pending.gate.open()
        theirs.synchronize()
        del tensor


def test_our_own_stream_waits_for_an_array_of_ours(pending: Pending, device: trtx.Device) -> None:
    """As when one engine's result is the next one's input."""
    with device.create_stream() as theirs:
        found = device_view(pending.array, device._access, 0, theirs.handle)
        assert found is not None
        assert found.address == pending.array.address
        assert not theirs.query()
        pending.gate.open()
        theirs.synchronize()


def test_stream_in_the_interface(pending: Pending, stream: trtx.Stream) -> None:
    assert pending.array.__cuda_array_interface__["stream"] == stream.handle
    pending.finish()
    assert pending.array.__cuda_array_interface__["stream"] is None


def test_lost_device(mock_backend_factory: Any) -> None:
    backend = mock_backend_factory(faults=[device_lost(call="cuMemcpyDtoHAsync")])
    device = trtx.Device(0, backend=backend)
    stream = device.create_stream()
    array = DeviceArray.from_host(device, VALUES, stream)
    consumer = take(array)
    for _ in range(2):
        with pytest.raises(trtx.CudaError):
            array.copy_to_host()
    array.close()
    stream.close()
    del consumer
    gc.collect()
    trtx.live_objects()
    device.close()


async def test_consumer_of_a_lost_device(mock_backend_factory: Any) -> None:
    """The memory went with the device: nothing is left to outlive it, and nothing is freed twice."""
    backend = mock_backend_factory(faults=[device_lost(call="cuMemcpyDtoHAsync")])
    device = trtx.Device(0, backend=backend)
    stream = device.create_stream()
    array = DeviceArray.from_host(device, VALUES, stream)
    consumer = take(array)
    with pytest.raises(trtx.CudaError):
        array.copy_to_host()
    await device.aclose()
    assert stream.closed
    del consumer
    gc.collect()
    assert trtx.live_objects() == []


EXIT = """
import threading, numpy as np, trtx_py as trtx
from mock_backend import MockBackend
from trtx_py import _native
from trtx_py.cuda._array import DeviceArray
device = trtx.Device(0, backend=MockBackend())
stream = device.create_stream()
array = DeviceArray.from_host(device, np.ones(4), stream)
consumers = [_native.DLPackTensor(array.__dlpack__()) for _ in range(3)]
threading.current_thread().keep = consumers  # goes when the interpreter takes modules apart
array.copy_to_host()
print("end")
"""


def test_interpreter_exit_with_everything_open() -> None:
    """Consumers let go after our last word; they find a deleter that leaves everything alone."""
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore::ResourceWarning", "-c", EXIT],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout.split(), result.stderr) == (0, ["end"], "")


# Exports


def test_interface(device: trtx.Device, stream: trtx.Stream) -> None:
    with DeviceArray.from_host(device, VALUES, stream) as array:
        assert array.__cuda_array_interface__ == {
            "version": 3, "shape": (2, 3), "typestr": "<f4", "data": (array.address, False), "strides": None,
            "stream": None,
        }  # fmt: skip
    with DeviceArray.from_host(device, np.zeros((0, 2), "i1"), stream) as array:
        assert array.__cuda_array_interface__["data"] == (0, False)
    for narrow in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        with DeviceArray.from_host(device, VALUES.astype(narrow), stream) as array:
            with pytest.raises(trtx.DTypeError, match="through DLPack"):
                _ = array.__cuda_array_interface__
            assert take(array).bits == array.dtype.itemsize * 8


@pytest.mark.parametrize("dtype", ["bool", "int8", "int32", "int64", "uint8", "float16", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("max_version", [None, (1, 0), (0, 8)])
def test_dlpack(dtype: str, max_version: Any, device: trtx.Device, stream: trtx.Stream) -> None:
    values = VALUES.astype(trtx.DataType(dtype).numpy)
    with DeviceArray.from_host(device, values, stream) as array:
        capsule: Any = array.__dlpack__(stream=stream.handle, max_version=max_version)
        versioned = max_version is not None and max_version[0] >= 1
        assert ("dltensor_versioned" in repr(capsule)) is versioned
        del capsule
        found = device_view(array, device._access, 0, stream.handle)
        assert found is not None
        assert (found.address, found.shape, found.dtype) == (array.address, array.shape, array.dtype)
        assert array.__dlpack_device__() == (2, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stream": 0}, "ambiguous"),
        ({"dl_device": (1, 0)}, "copy_to_host"),
        ({"dl_device": (2, 1)}, r"\(2, 1\)"),
        ({"copy": True}, "copy is True"),
    ],
)
def test_exports_that_are_refused(options: Any, message: str, device: trtx.Device, stream: trtx.Stream) -> None:
    with DeviceArray.from_host(device, VALUES, stream) as array:
        with pytest.raises(trtx.InvalidArgumentError, match=message) as caught:
            take(array, **options)
        assert isinstance(caught.value, BufferError)  # what the array API standard asks for
        with pytest.raises(trtx.InvalidArgumentError, match="stream"):
            take(array, stream=-2)
        take(array, dl_device=(2, 0), copy=False)


@pytest.mark.parametrize("how", ["drop", "close"])
def test_consumer_keeps_the_memory(how: str, device: trtx.Device, stream: trtx.Stream) -> None:
    array = DeviceArray.from_host(device, VALUES, stream)
    consumers = [take(array), take(array, max_version=(1, 0))]
    if how == "close":
        array.close()
        refuses_all_use(array)
    del array
    gc.collect()
    while consumers:
        trtx.live_objects()
        assert device.memory_statistics().live == 1
        with pytest.raises(trtx.BorrowedError, match=r"DeviceArray.*in use through DLPack"):
            device.close()
        consumers.pop()
    trtx.live_objects()
    assert device.memory_statistics().live == 0


@pytest.mark.parametrize("dropped", [True, False])
async def test_consumer_outlives_the_device(dropped: bool, mock_backend: MockBackend) -> None:
    driver = mock_backend.driver
    device = trtx.Device(0, backend=mock_backend)
    access = device._access
    stream = device.create_stream()
    arrays = [DeviceArray.from_host(device, VALUES, stream)]
    consumer = take(arrays[0])
    await device.aclose()
    if dropped:
        arrays.clear()
    else:
        assert arrays[0].closed
        refuses_all_use(arrays[0])
    (left,) = trtx.live_objects()
    assert (left.kind, left.owner, left.device_bytes) == ("DeviceArray", None, 24)
    assert "in use through DLPack" in left.label
    assert __file__ in left.made_at
    host = np.empty_like(VALUES)
    with access.current:  # the consumer's work goes on
        driver.cuMemcpyDtoHAsync(host.ctypes.data, consumer.address, host.nbytes, 0)
        driver.cuStreamSynchronize(0)
    np.testing.assert_array_equal(host, VALUES)
    del consumer
    assert trtx.live_objects() == []
    assert access.memory.device_statistics().live == 0


async def test_a_runtime_closes_its_arrays(mock_backend: MockBackend) -> None:
    async with trtx.Runtime(None, mock_backend) as runtime:
        stream = runtime.device.create_stream()
        array = DeviceArray.from_host(runtime.device, VALUES, stream)
        with pytest.raises(trtx.BorrowedError, match="DeviceArray"):
            runtime.close()
    assert array.closed
    with pytest.raises(trtx.ClosedError):
        await array.to_host()


def test_consumers_that_leave_on_many_threads_at_once(mock_backend: MockBackend) -> None:
    """While the device closes: each array is freed once, whoever is last."""
    for _ in range(30):
        device = trtx.Device(0, backend=mock_backend)
        access, stream = device._access, device.create_stream()
        arrays = [DeviceArray.from_host(device, VALUES, stream) for _ in range(4)]
        tensors = [[take(array)] for array in arrays]
        begin = threading.Barrier(len(tensors) + 1)

        def drop(held: list[Any], begin: threading.Barrier = begin) -> None:
            begin.wait()
            held.clear()

        threads = [threading.Thread(target=drop, args=(held,)) for held in tensors]
        for thread in threads:
            thread.start()
        begin.wait()
        asyncio.run(device.aclose())
        for thread in threads:
            thread.join()
        arrays.clear()
        assert trtx.live_objects() == []
        assert access.memory.device_statistics().live == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_frees_nothing(device: trtx.Device, stream: trtx.Stream) -> None:
    array = DeviceArray.from_host(device, VALUES, stream)
    consumer = take(array)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            del consumer
            with pytest.raises(trtx.ClosedError, match="forked"):
                array.copy_to_host()
            array.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(array.copy_to_host(), VALUES)
    del consumer
