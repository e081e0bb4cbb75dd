"""Puts ``trtx_py`` in place without its facade."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any

_PACKAGE = "trtx_py"


class _Deferred(ModuleType):
    """A package whose submodules can be imported before it was executed itself.

    importlib.util.LazyLoader would execute it as soon as its ``__path__`` is read, which is how submodules are found.
    """

    def __getattr__(self, name: str) -> Any:
        if not (name.startswith("__") and name.endswith("__")):
            if name.startswith("_") and _states.get(self.__name__) == "reserved":
                # `from . import _native` in a submodule: to load the facade for it, which needs that submodule, would
                # be a circle. Public names are the facade's, also where a submodule is called so.
                with contextlib.suppress(ModuleNotFoundError):
                    return importlib.import_module(f"{self.__name__}.{name}")
            _load(self)
            return ModuleType.__getattribute__(self, name)  # what it has now, or makes at the first use
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


_lock = threading.RLock()
_states: dict[str, str] = {}


def _load(module: ModuleType) -> None:
    with _lock:
        # While it is being loaded it asks for its own submodules, which importlib then imports.
        if _states.get(module.__name__) != "reserved":
            return
        _states[module.__name__] = "loading"
        assert module.__spec__ is not None
        assert module.__spec__.loader is not None
        try:
            module.__spec__.loader.exec_module(module)
        except BaseException:
            _states[module.__name__] = "reserved"  # the next one to ask hears of it too
            raise
        _states[module.__name__] = "loaded"


def reserve() -> None:
    """Put ``trtx_py`` into ``sys.modules``, to be executed when one of its names is first used."""
    spec = importlib.util.find_spec(_PACKAGE) if _PACKAGE not in sys.modules else None
    if spec is None or spec.loader is None:
        return
    module = _Deferred(_PACKAGE)
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    module.__path__ = spec.submodule_search_locations or []
    module.__package__ = _PACKAGE
    _states[_PACKAGE] = "reserved"
    sys.modules[_PACKAGE] = module
