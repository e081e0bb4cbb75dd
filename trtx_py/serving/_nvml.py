"""How busy GPUs are, as NVML sees it: sampled by a thread at a bounded rate, never on the way of a request."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

from .._errors import BackendUnavailableError
from ._strategies import Load

_log = logging.getLogger("trtx_py")


def open_nvml(pci_bus_ids: Sequence[str]) -> tuple[Any, list[Any]]:
    """The pynvml module, initialized, and a handle for each device. Its numbers are not CUDA's: the bus decides.

    Raises BackendUnavailableError: not installed, no driver, or it does not know a device.
    """
    try:
        import pynvml
    except ImportError as error:
        raise BackendUnavailableError(
            "strategy 'utilisation' needs NVML's Python bindings: pip install 'trtx-py[nvml]', "
            "or use strategy 'least_loaded', which needs none"
        ) from error
    opened = False
    try:
        pynvml.nvmlInit()
        opened = True
        return pynvml, [pynvml.nvmlDeviceGetHandleByPciBusId(each.encode()) for each in pci_bus_ids]
    except pynvml.NVMLError as error:
        if opened:
            pynvml.nvmlShutdown()
        raise BackendUnavailableError(
            f"strategy 'utilisation': NVML cannot be used ({error}); use strategy 'least_loaded' instead"
        ) from error


class Sampler:
    """Writes ``load.utilisation`` every ``interval_s`` seconds, until it is stopped.

    A look that fails leaves None there, which the strategy does without; the first such is logged.
    """

    def __init__(self, nvml: Any, handles: Sequence[Any], loads: Sequence[Load], interval_s: float) -> None:
        self._nvml, self._handles, self._loads, self._interval_s = nvml, handles, loads, interval_s
        self._stopped = threading.Event()
        self._told = False
        self.look()
        self._thread = threading.Thread(target=self._run, name="trtx_py-nvml", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Ask once for each device."""
        for handle, load in zip(self._handles, self._loads, strict=True):
            try:
                load.utilisation = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100.0
            except self._nvml.NVMLError as error:
                load.utilisation = None
                if not self._told:
                    self._told = True
                    _log.warning("NVML does not tell how busy device %d is: %s", load.device, error)

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self.look()

    def stop(self) -> None:
        """End the thread, and NVML with it. Idempotent."""
        if not self._stopped.is_set():
            self._stopped.set()
            self._thread.join()
            self._nvml.nvmlShutdown()
