from __future__ import annotations

import enum
import sys
from typing import Any

import pytest

from trtx_py._errors import BackendUnavailableError, CudaError
from trtx_py.backends import cuda_driver
from trtx_py.backends.cuda_driver import CudaBindingsDriver
from trtx_py.backends.protocols import CudaDriver


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_STUB_LIBRARY = 34
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803


class Handle:
    """Converts to int and nothing else, as the bindings' handles do."""

    def __init__(self, value: int) -> None:
        self.value = int(value)

    def __int__(self) -> int:
        return self.value


class CUdevice(Handle): ...


class CUcontext(Handle): ...


class CUstream(Handle): ...


class CUevent(Handle): ...


class CUdeviceptr(Handle): ...


class CUdevice_attribute(enum.IntEnum):  # noqa: N801  # the bindings' own name
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75


ANSWERS: dict[str, tuple[Any, ...]] = {
    "cuDriverGetVersion": (13000,),
    "cuDeviceGetCount": (2,),
    "cuDeviceGet": (CUdevice(1),),
    "cuDeviceGetName": (b"Fake GPU\0\0\0\0",),
    "cuDeviceTotalMem": (1 << 34,),
    "cuDeviceGetAttribute": (9,),
    "cuDevicePrimaryCtxRetain": (CUcontext(11),),
    "cuCtxPopCurrent": (CUcontext(12),),
    "cuCtxGetCurrent": (CUcontext(0),),
    "cuMemGetInfo": (1000, 2000),
    "cuMemAlloc": (CUdeviceptr(2**40),),
    "cuMemHostAlloc": (2**41,),
    "cuStreamCreate": (CUstream(21),),
    "cuEventCreate": (CUevent(31),),
    "cuEventElapsedTime": (1.5,),
}


class FakeBindings:
    """cuda.bindings.driver: every function returns a tuple that begins with a status."""

    CUdevice, CUcontext, CUstream, CUevent, CUdeviceptr = CUdevice, CUcontext, CUstream, CUevent, CUdeviceptr
    CUdevice_attribute = CUdevice_attribute

    def __init__(self) -> None:
        self.status: dict[str, Result] = {}
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def cuGetErrorString(self, status: Result) -> tuple[Result, bytes]:
        return Result.CUDA_SUCCESS, f"text of {int(status)}".encode()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append((name, args))
            status = self.status.get(name, Result.CUDA_SUCCESS)
            answers = ANSWERS.get(name, ())
            return (status, *answers) if status == 0 else (status, *(None for _ in answers))

        return call


CALLS: list[tuple[str, tuple[int, ...], Any, tuple[type, ...]]] = [
    # method, arguments, result, types of what the bindings get
    ("cuDriverGetVersion", (), 13000, ()),
    ("cuDeviceGetCount", (), 2, ()),
    ("cuDeviceGet", (1,), 1, (int,)),
    ("cuDeviceGetName", (1,), "Fake GPU", (int, CUdevice)),
    ("cuDeviceTotalMem", (1,), 1 << 34, (CUdevice,)),
    ("cuDeviceGetAttribute", (75, 1), 9, (CUdevice_attribute, CUdevice)),
    ("cuDevicePrimaryCtxRetain", (1,), 11, (CUdevice,)),
    ("cuDevicePrimaryCtxRelease", (1,), None, (CUdevice,)),
    ("cuCtxPushCurrent", (11,), None, (CUcontext,)),
    ("cuCtxPopCurrent", (), 12, ()),
    ("cuCtxGetCurrent", (), 0, ()),
    ("cuMemGetInfo", (), (1000, 2000), ()),
    ("cuMemAlloc", (64,), 2**40, (int,)),
    ("cuMemFree", (2**40,), None, (CUdeviceptr,)),
    ("cuMemHostAlloc", (64, 1), 2**41, (int, int)),
    ("cuMemFreeHost", (2**41,), None, (int,)),
    ("cuMemcpyHtoDAsync", (1, 2, 3, 4), None, (CUdeviceptr, int, int, CUstream)),
    ("cuMemcpyDtoHAsync", (1, 2, 3, 4), None, (int, CUdeviceptr, int, CUstream)),
    ("cuMemcpyDtoDAsync", (1, 2, 3, 4), None, (CUdeviceptr, CUdeviceptr, int, CUstream)),
    ("cuMemsetD8Async", (1, 255, 3, 4), None, (CUdeviceptr, int, int, CUstream)),
    ("cuStreamCreate", (1,), 21, (int,)),
    ("cuStreamDestroy", (21,), None, (CUstream,)),
    ("cuStreamSynchronize", (21,), None, (CUstream,)),
    ("cuStreamQuery", (21,), 0, (CUstream,)),
    ("cuStreamWaitEvent", (21, 31, 0), None, (CUstream, CUevent, int)),
    ("cuEventCreate", (2,), 31, (int,)),
    ("cuEventDestroy", (31,), None, (CUevent,)),
    ("cuEventRecord", (31, 21), None, (CUevent, CUstream)),
    ("cuEventQuery", (31,), 0, (CUevent,)),
    ("cuEventSynchronize", (31,), None, (CUevent,)),
    ("cuEventElapsedTime", (31, 32), 1.5, (CUevent, CUevent)),
]


def test_every_method_of_the_seam_is_tested() -> None:
    seam = {name for name in vars(CudaDriver) if name.startswith("cu")}
    assert seam - {"cuInit"} == {name for name, *_ in CALLS}


@pytest.mark.parametrize(("name", "args", "result", "types"), CALLS)
def test_handles_are_converted_both_ways(name: str, args: Any, result: Any, types: tuple[type, ...]) -> None:
    bindings = FakeBindings()
    driver = CudaBindingsDriver(bindings)
    answer = getattr(driver, name)(*args)
    assert answer == result
    assert type(answer) is type(result)
    called, given = bindings.calls[-1]
    assert called == name
    assert tuple(type(one) for one in given) == types
    if name != "cuDeviceGetName":
        assert tuple(int(one) for one in given) == args


@pytest.mark.parametrize(("name", "args", "result", "types"), CALLS)
def test_every_status_is_checked(name: str, args: Any, result: Any, types: Any) -> None:
    bindings = FakeBindings()
    driver = CudaBindingsDriver(bindings)
    bindings.status[name] = Result.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(CudaError) as caught:
        getattr(driver, name)(*args)
    error = caught.value
    assert (error.code, error.name, error.call) == (700, "CUDA_ERROR_ILLEGAL_ADDRESS", name)
    assert str(error) == f"{name} returned CUDA_ERROR_ILLEGAL_ADDRESS (700): text of 700"


@pytest.mark.parametrize("name", ["cuStreamQuery", "cuEventQuery"])
def test_queries_return_not_ready(name: str) -> None:
    bindings = FakeBindings()
    driver = CudaBindingsDriver(bindings)
    bindings.status[name] = Result.CUDA_ERROR_NOT_READY
    answer = getattr(driver, name)(1)
    assert answer == 600
    assert type(answer) is int


def test_unknown_attribute_is_a_cuda_error() -> None:
    with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_VALUE"):
        CudaBindingsDriver(FakeBindings()).cuDeviceGetAttribute(9999, 0)


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (Result.CUDA_ERROR_NO_DEVICE, "CUDA_VISIBLE_DEVICES"),
        (Result.CUDA_ERROR_STUB_LIBRARY, "stub"),
        (Result.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "update the driver"),
        (Result.CUDA_ERROR_OUT_OF_MEMORY, "install an NVIDIA driver"),
    ],
)
def test_failed_initialization_says_what_to_do(status: Result, says: str) -> None:
    bindings = FakeBindings()
    bindings.status["cuInit"] = status
    with pytest.raises(BackendUnavailableError, match=says) as caught:
        CudaBindingsDriver(bindings)
    assert status.name in str(caught.value)
    assert isinstance(caught.value.__cause__, CudaError)


def test_missing_driver_library() -> None:
    class NoLibrary(FakeBindings):
        def cuInit(self, flags: int) -> tuple[Result]:
            raise RuntimeError("library not found")

    with pytest.raises(BackendUnavailableError, match=r"libcuda\.so\.1.*library not found.*install an NVIDIA driver"):
        CudaBindingsDriver(NoLibrary())


def test_missing_and_broken_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "_shared", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(BackendUnavailableError, match="pip install cuda-bindings"):
        cuda_driver.shared_driver()

    def broken(name: str) -> Any:
        raise OSError("wrong ELF class")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(BackendUnavailableError, match=r"cannot be imported.*wrong ELF class"):
        cuda_driver.shared_driver()


def test_real_bindings_have_what_is_called() -> None:
    real = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
    for name, *_ in CALLS:
        assert callable(getattr(real, name))
    for name in ("CUdevice", "CUcontext", "CUstream", "CUevent", "CUdeviceptr"):
        assert int(getattr(real, name)(7)) == 7
    assert real.CUdevice_attribute(75).name == "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR"
