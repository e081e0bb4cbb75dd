"""Plugins: libraries that hold them, and creators written in Python. Registered for the life of the process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from ..._errors import BuilderError
from ._log_router import Operation
from ._vendor import Vendor

_lock = threading.Lock()
#: By vendor module, which has one registry for the whole process: libraries that are loaded, creators by their name.
_loaded: dict[str, set[str]] = {}
_creators: dict[str, dict[tuple[str, str, str], Any]] = {}


def load_plugins(vendor: Vendor, libraries: Sequence[str], creators: Sequence[Any], operation: Operation) -> None:
    """Load what is not loaded yet, and register what is not registered yet.

    Raises BuilderError for a library or a creator that TensorRT does not take, naming it.
    Source: nvinfer1::IPluginRegistry::loadLibrary, registerCreator
    """
    module = vendor.module
    if not hasattr(module, "get_plugin_registry"):
        raise BuilderError(f"{vendor.title} has no plugin registry; leave plugin_libraries and plugin_creators unset")
    registry = module.get_plugin_registry()
    with _lock:
        known = _loaded.setdefault(vendor.title, set())
        for path in libraries:
            if path in known:
                continue
            if not hasattr(registry, "load_library"):
                raise BuilderError(f"{vendor.title} has no IPluginRegistry::loadLibrary; leave plugin_libraries unset")
            if registry.load_library(path) is None:
                raise BuilderError(
                    f"{vendor.title} could not load the plugin library {path!r}; the log says why",
                    tensorrt_log=operation.lines,
                )
            known.add(path)
        for creator in creators:
            _register(vendor, registry, creator, operation)


def _register(vendor: Vendor, registry: Any, creator: Any, operation: Operation) -> None:
    base = getattr(vendor.module, "IPluginCreatorV3One", None)
    if base is None or not hasattr(registry, "register_creator"):
        raise BuilderError(
            f"{vendor.title} has no IPluginCreatorV3One, which came with 10.0; leave plugin_creators unset"
        )
    if not hasattr(getattr(vendor.module, "INetworkDefinition", None), "add_plugin_v3"):
        # Measured with tensorrt-rtx 1.7: it takes the creator, and the parser that then uses it ends the process.
        raise BuilderError(
            f"{vendor.title} has no addPluginV3 in its bindings, so plugins written in Python do not work there; leave "
            "plugin_creators unset, and use plugin_libraries"
        )
    if not isinstance(creator, base):
        raise BuilderError(
            f"{vendor.title}: plugin creator {creator!r} is no {vendor.module.__name__}.IPluginCreatorV3One; derive "
            "its class from that"
        )
    key = (str(creator.name), str(creator.plugin_version), str(creator.plugin_namespace))
    taken = _creators.setdefault(vendor.title, {})
    if taken.get(key) is creator:
        return
    if key in taken or not registry.register_creator(creator, key[2]):
        raise BuilderError(
            f"{vendor.title} has a plugin named {key[0]!r}, version {key[1]!r}, already; give this creator another "
            "version or namespace",
            tensorrt_log=operation.lines,
        )
    taken[key] = creator  # TensorRT has a bare pointer to it
