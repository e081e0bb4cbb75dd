"""The CUDA driver seam over cuda-python (cuda.bindings.driver, 12.x and 13.x)."""

from __future__ import annotations

import importlib
import threading
from typing import Any

from .._errors import BackendUnavailableError, CudaError
from .protocols import CUDA_ERROR_NOT_READY, CUDA_SUCCESS

_INSTALL = "pip install cuda-bindings (of the CUDA major version that the driver supports)"
_DRIVER = "install an NVIDIA driver, and in a container start it with GPU access"
#: no driver library, a stub of one, or one older than the bindings
_INIT_NEXT_STEPS = {
    34: f"only a stub of libcuda was found; {_DRIVER}",
    35: "the driver is older than this CUDA version needs; update the driver, or install older cuda-bindings",
    100: "the driver sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES",
    803: "driver and CUDA libraries do not belong together; update the driver, or remove the CUDA compat libraries",
}
_DEVICE_NAME_BYTES = 256


class CudaBindingsDriver:
    """Implements CudaDriver. Initializes the driver (cuInit) when it is made.

    Args:
        module: stands in for ``cuda.bindings.driver``, in tests.
    Raises:
        BackendUnavailableError: no bindings, no driver library, no GPU, or a driver that is too old.
    """

    def __init__(self, module: object | None = None) -> None:
        cu: Any = module if module is not None else _import_bindings()
        self._cu = cu
        # CUdevice and the rest convert to int and back; the function is looked up once, here.
        self._device, self._context = cu.CUdevice, cu.CUcontext
        self._stream, self._event, self._pointer = cu.CUstream, cu.CUevent, cu.CUdeviceptr
        try:
            self.cuInit(0)
        except CudaError as error:
            step = _INIT_NEXT_STEPS.get(error.code, _DRIVER)
            raise BackendUnavailableError(f"the CUDA driver cannot be used: {error.message}; {step}") from error
        except Exception as error:  # cuda-pathfinder's DynamicLibNotFoundError and whatever a loader raises
            raise BackendUnavailableError(
                f"the CUDA driver library was not found (looked for libcuda.so.1, or nvcuda.dll on Windows; "
                f"{type(error).__name__}: {error}); {_DRIVER}"
            ) from error

    def cuInit(self, flags: int) -> None:
        self._check("cuInit", self._cu.cuInit(flags))

    def cuDriverGetVersion(self) -> int:
        return int(self._value("cuDriverGetVersion", self._cu.cuDriverGetVersion()))

    def cuDeviceGetCount(self) -> int:
        return int(self._value("cuDeviceGetCount", self._cu.cuDeviceGetCount()))

    def cuDeviceGet(self, ordinal: int) -> int:
        return int(self._value("cuDeviceGet", self._cu.cuDeviceGet(ordinal)))

    def cuDeviceGetName(self, device: int) -> str:
        name = self._value("cuDeviceGetName", self._cu.cuDeviceGetName(_DEVICE_NAME_BYTES, self._device(device)))
        return bytes(name).split(b"\0", 1)[0].decode("utf-8", "replace")

    def cuDeviceTotalMem(self, device: int) -> int:
        return int(self._value("cuDeviceTotalMem", self._cu.cuDeviceTotalMem(self._device(device))))

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> int:
        try:
            member = self._cu.CUdevice_attribute(attribute)
        except ValueError as error:
            raise CudaError(1, "CUDA_ERROR_INVALID_VALUE", "cuDeviceGetAttribute", str(error)) from error
        return int(self._value("cuDeviceGetAttribute", self._cu.cuDeviceGetAttribute(member, self._device(device))))

    def cuDevicePrimaryCtxRetain(self, device: int) -> int:
        return int(self._value("cuDevicePrimaryCtxRetain", self._cu.cuDevicePrimaryCtxRetain(self._device(device))))

    def cuDevicePrimaryCtxRelease(self, device: int) -> None:
        self._check("cuDevicePrimaryCtxRelease", self._cu.cuDevicePrimaryCtxRelease(self._device(device)))

    def cuCtxPushCurrent(self, context: int) -> None:
        self._check("cuCtxPushCurrent", self._cu.cuCtxPushCurrent(self._context(context)))

    def cuCtxPopCurrent(self) -> int:
        return int(self._value("cuCtxPopCurrent", self._cu.cuCtxPopCurrent()))

    def cuCtxGetCurrent(self) -> int:
        return int(self._value("cuCtxGetCurrent", self._cu.cuCtxGetCurrent()))

    def cuMemGetInfo(self) -> tuple[int, int]:
        result = self._cu.cuMemGetInfo()
        self._check("cuMemGetInfo", result)
        return int(result[1]), int(result[2])

    def cuMemAlloc(self, bytesize: int) -> int:
        return int(self._value("cuMemAlloc", self._cu.cuMemAlloc(bytesize)))

    def cuMemFree(self, dptr: int) -> None:
        self._check("cuMemFree", self._cu.cuMemFree(self._pointer(dptr)))

    def cuMemHostAlloc(self, bytesize: int, flags: int) -> int:
        return int(self._value("cuMemHostAlloc", self._cu.cuMemHostAlloc(bytesize, flags)))

    def cuMemFreeHost(self, pointer: int) -> None:
        self._check("cuMemFreeHost", self._cu.cuMemFreeHost(pointer))

    def cuMemcpyHtoDAsync(self, dst_device: int, src_host: int, byte_count: int, stream: int) -> None:
        result = self._cu.cuMemcpyHtoDAsync(self._pointer(dst_device), src_host, byte_count, self._stream(stream))
        self._check("cuMemcpyHtoDAsync", result)

    def cuMemcpyDtoHAsync(self, dst_host: int, src_device: int, byte_count: int, stream: int) -> None:
        result = self._cu.cuMemcpyDtoHAsync(dst_host, self._pointer(src_device), byte_count, self._stream(stream))
        self._check("cuMemcpyDtoHAsync", result)

    def cuMemcpyDtoDAsync(self, dst_device: int, src_device: int, byte_count: int, stream: int) -> None:
        destination, source = self._pointer(dst_device), self._pointer(src_device)
        result = self._cu.cuMemcpyDtoDAsync(destination, source, byte_count, self._stream(stream))
        self._check("cuMemcpyDtoDAsync", result)

    def cuMemsetD8Async(self, dst_device: int, value: int, count: int, stream: int) -> None:
        result = self._cu.cuMemsetD8Async(self._pointer(dst_device), value, count, self._stream(stream))
        self._check("cuMemsetD8Async", result)

    def cuStreamCreate(self, flags: int) -> int:
        return int(self._value("cuStreamCreate", self._cu.cuStreamCreate(flags)))

    def cuStreamDestroy(self, stream: int) -> None:
        self._check("cuStreamDestroy", self._cu.cuStreamDestroy(self._stream(stream)))

    def cuStreamSynchronize(self, stream: int) -> None:
        self._check("cuStreamSynchronize", self._cu.cuStreamSynchronize(self._stream(stream)))

    def cuStreamQuery(self, stream: int) -> int:
        return self._status("cuStreamQuery", self._cu.cuStreamQuery(self._stream(stream)))

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        result = self._cu.cuStreamWaitEvent(self._stream(stream), self._event(event), flags)
        self._check("cuStreamWaitEvent", result)

    def cuEventCreate(self, flags: int) -> int:
        return int(self._value("cuEventCreate", self._cu.cuEventCreate(flags)))

    def cuEventDestroy(self, event: int) -> None:
        self._check("cuEventDestroy", self._cu.cuEventDestroy(self._event(event)))

    def cuEventRecord(self, event: int, stream: int) -> None:
        self._check("cuEventRecord", self._cu.cuEventRecord(self._event(event), self._stream(stream)))

    def cuEventQuery(self, event: int) -> int:
        return self._status("cuEventQuery", self._cu.cuEventQuery(self._event(event)))

    def cuEventSynchronize(self, event: int) -> None:
        self._check("cuEventSynchronize", self._cu.cuEventSynchronize(self._event(event)))

    def cuEventElapsedTime(self, start: int, end: int) -> float:
        result = self._cu.cuEventElapsedTime(self._event(start), self._event(end))
        return float(self._value("cuEventElapsedTime", result))

    def _status(self, call: str, result: Any) -> int:
        code = int(result[0])
        if code == CUDA_ERROR_NOT_READY:
            return code
        self._check(call, result)
        return CUDA_SUCCESS

    def _value(self, call: str, result: Any) -> Any:
        self._check(call, result)
        return result[1]

    def _check(self, call: str, result: Any) -> None:
        if int(result[0]) != CUDA_SUCCESS:
            raise self._error(call, result[0])

    def _error(self, call: str, status: Any) -> CudaError:
        code = int(status)
        name = getattr(status, "name", f"CUresult {code}")
        lookup, text = self._cu.cuGetErrorString(status)
        detail = text.decode("utf-8", "replace") if int(lookup) == CUDA_SUCCESS and isinstance(text, bytes) else ""
        return CudaError(code, name, call, detail)


_lock = threading.Lock()
_shared: CudaBindingsDriver | None = None


def shared_driver() -> CudaBindingsDriver:
    """The process's one driver. Raises BackendUnavailableError; tries again on the next call."""
    global _shared
    with _lock:
        if _shared is None:
            _shared = CudaBindingsDriver()
        return _shared


def _import_bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"cuda-python is not installed: no module named {error.name}; {_INSTALL}"
        ) from error
    except Exception as error:  # an extension module built for something else: ImportError, OSError, RuntimeError
        raise BackendUnavailableError(
            f"cuda-python is installed but cuda.bindings.driver cannot be imported "
            f"({type(error).__name__}: {error}); reinstall it: {_INSTALL}"
        ) from error
