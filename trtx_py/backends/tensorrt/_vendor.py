"""Imports a vendor module on first use and keeps, for the life of the process, what belongs to it."""

from __future__ import annotations

import ctypes
import importlib
import threading
from typing import Any

from ..._errors import BackendUnavailableError
from .._flavours import Flavour, VersionFacts, flavour_named, oldest_version, version_facts
from ._log_router import LogRouter
from ._recorder import make_recorder

_lock = threading.Lock()
_loaded: dict[str, Vendor] = {}


class Vendor:
    """A vendor module with its version facts, its log router, and the one logger and error recorder it will ever get.

    Attributes:
        module: the imported module, untyped.
        version: as the module tells it.
    """

    def __init__(self, flavour: Flavour, module: Any) -> None:
        version = str(getattr(module, "__version__", ""))
        facts = version_facts(flavour.name, version) if version[:1].isdigit() else None
        if facts is None:
            raise BackendUnavailableError(
                f"{flavour.name} {version or '(without a version)'} is installed; {oldest_version(flavour.name)} is "
                f"the oldest version that is supported; {flavour.install_hint}"
            )
        self.flavour = flavour
        self.module = module
        self.version = version
        self.facts: VersionFacts = facts
        self.router = LogRouter()
        self.logger: Any = _make_logger(module, self.router)
        self.recorder: Any = make_recorder(module, self.router)
        # TensorRT keeps bare pointers to both, and logs from destructors that run while Python shuts down.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.logger))
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.recorder))

    @property
    def title(self) -> str:
        """For messages: "tensorrt_rtx 1.7.1.116"."""
        return f"{self.flavour.name} {self.version}"

    def members(self, enum: str) -> dict[str, Any]:
        """Members of a vendor enum by name; empty if this version has no such enum."""
        return dict(getattr(getattr(self.module, enum, None), "__members__", {}))


def load_vendor(name: str) -> Vendor:
    """Import a flavour's module, once per process.

    Raises:
        BackendUnavailableError: not installed, its libraries cannot be loaded, or too old.
    """
    with _lock:
        if name not in _loaded:
            flavour = flavour_named(name)
            _loaded[name] = Vendor(flavour, _import(flavour))
        return _loaded[name]


def _import(flavour: Flavour) -> Any:
    for name in flavour.bindings:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise _broken(flavour, error) from error
        except Exception as error:  # vendor packages load shared libraries at import and raise whatever that gives
            raise _broken(flavour, error) from error
    raise BackendUnavailableError(
        f"{flavour.name} is not installed: no module named {' or '.join(flavour.bindings)}; {flavour.install_hint}"
    )


def _broken(flavour: Flavour, error: Exception) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"{flavour.name} is installed but cannot be loaded ({type(error).__name__}: {error}); "
        f"check that its libraries and the CUDA version it was made for are here, or reinstall: {flavour.install_hint}"
    )


def _make_logger(module: Any, router: LogRouter) -> Any:
    class RoutedLogger(module.ILogger):  # type: ignore[misc]  # the base is known only at run time
        def __init__(self) -> None:
            # The bindings require the base to be initialized by name, not through super().
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            router.emit(int(severity), message)

    return RoutedLogger()
