"""The kernels that TensorRT-RTX compiled at run time, kept over the life of a process."""

from __future__ import annotations

import threading
from typing import Any

from ..._errors import ClosedError, EngineError
from ..._types import Severity
from ..protocols import LogSink
from ._vendor import Vendor


class RuntimeCache:
    """One runtime's cache, attached to every context of its engines. Thread-safe.

    The object that TensorRT fills comes from an engine's configuration, so it is made with the first context. Nothing
    in TensorRT or its bindings keeps it alive for the contexts that use it: it must outlive them all.

    No machine here runs TensorRT-RTX: written by the signatures of the bindings of 1.7, run with stand-ins only.

    Args:
        content: what ``serialize`` gave, here or in another process.
    Source: nvinfer1::IRuntimeCache
    """

    def __init__(self, vendor: Vendor, log: LogSink, content: bytes | None) -> None:
        self._vendor = vendor
        self._log = log
        self._content = content
        self._lock = threading.Lock()
        self._handle: Any = None
        self._closed = False
        self._supported = hasattr(vendor.module, "IRuntimeCache")
        if content is not None and not self._supported:
            self._log(
                Severity.WARNING,
                f"{vendor.title} has no runtime cache, because its plans hold compiled kernels: the one given is not "
                f"used",
            )

    def attach(self, config: Any) -> None:
        """Let a context made with this IRuntimeConfig use the cache. The device is current. What fails is logged."""
        if not self._supported:
            return
        with self._lock:
            if self._closed:
                raise ClosedError("the runtime is destroyed; nothing can be asked of it any more")
            if self._handle is None:
                self._handle = self._make(config)
            if self._handle is not None and not config.set_runtime_cache(self._handle):
                self._warn("did not take the runtime cache for a context; its kernels are compiled anew")

    def serialize(self) -> bytes | None:
        """The content now, None if no context has been made. The device is current. Raises EngineError."""
        with self._lock:
            if self._handle is None:
                return None
            with self._vendor.router.operation(self._log) as operation:
                memory = self._handle.serialize()
                if memory is None:
                    raise EngineError(
                        f"{self._vendor.title} could not serialize its runtime cache; the log says why",
                        tensorrt_log=operation.lines,
                    )
                return bytes(memory)

    def destroy(self) -> None:
        """Idempotent. Contexts must have been destroyed before."""
        with self._lock:
            self._closed = True
            self._handle = None

    def _make(self, config: Any) -> Any:
        handle = config.create_runtime_cache()
        if handle is None:
            self._warn("could not create a runtime cache; kernels are compiled anew")
        elif self._content is not None:
            # Checked by TensorRT against its version, the GPU and the driver; a mismatch leaves the cache empty.
            if not handle.deserialize(self._content):
                self._warn("refused the runtime cache given, made elsewhere or damaged; kernels are compiled anew")
            self._content = None
        return handle

    def _warn(self, what: str) -> None:
        self._log(Severity.WARNING, f"{self._vendor.title} {what}")
