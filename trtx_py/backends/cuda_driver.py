"""The CUDA driver seam over libcuda itself."""

from __future__ import annotations

import threading

from .._errors import BackendUnavailableError, CudaError
from .._native import Driver, load_driver_api

_DRIVER = "install an NVIDIA driver, and in a container start it with GPU access"
#: no GPU, a stub of the library, or parts that do not belong together
_INIT_NEXT_STEPS = {
    34: f"only a stub of libcuda was found; {_DRIVER}",
    35: "the driver is too old; update it",
    100: "the driver sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES",
    803: "driver and CUDA libraries do not belong together; update the driver, or remove the CUDA compat libraries",
}


class NativeDriver(Driver):
    """Implements CudaDriver. Initializes the driver (cuInit) when it is made.

    Args:
        api: a function table in the place of libcuda's, in tests.
    Raises:
        BackendUnavailableError: no driver library, no GPU, or a driver that is too old.
    """

    def __init__(self, api: object | None = None) -> None:
        super().__init__(_load() if api is None else api)
        try:
            self.cuInit(0)
        except CudaError as error:
            step = _INIT_NEXT_STEPS.get(error.code, _DRIVER)
            raise BackendUnavailableError(f"the CUDA driver cannot be used: {error.message}; {step}") from error


def _load() -> object:
    try:
        return load_driver_api()
    except OSError as error:
        reason = str(error)
        if "has no symbol" in reason:
            step = "; update the NVIDIA driver (470 or newer), or remove the library that hides it"
        else:  # a forked child is told what to do
            step = "" if "forked" in reason else f"; {_DRIVER}"
        raise BackendUnavailableError(f"the CUDA driver library cannot be used: {reason}{step}") from error


_lock = threading.Lock()
_shared: NativeDriver | None = None


def shared_driver() -> NativeDriver:
    """The process's one driver. Raises BackendUnavailableError; initializes again on the next call."""
    global _shared
    with _lock:
        if _shared is None:
            _shared = NativeDriver()
        return _shared
