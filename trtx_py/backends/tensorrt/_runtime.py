"""Runtime: from a plan to an engine."""

from __future__ import annotations

from typing import Any

from ..._errors import EngineError, VersionMismatchError
from .._flavours import lean_library_refusal, plan_fits
from .._raw_plan import RawPlanHeader, find_host_code, read_raw_plan_header
from ..protocols import LogSink
from ._engine import Engine
from ._guards import alive, created
from ._lean import lean_library_version
from ._runtime_cache import RuntimeCache
from ._vendor import Vendor

#: parts of log lines by which TensorRT says that a plan was made for something else
_OTHER_VERSION = (
    "compute capability",
    "not compatible with",
    "Version tag",
    "serialization version",
    "expecting library",
)


class Runtime:
    """Implements BackendRuntime. The device's primary context is current in every calling thread.

    Args:
        lean_library: path of the library that really runs the plans, None for the runtime's own.
        allow_host_code: plans may bring code that runs on the CPU.
        device_text: the GPU, for messages.
        runtime_cache: what an earlier runtime's ``runtime_cache`` gave.
    Raises:
        EngineError: the lean library is missing, damaged, or one that this runtime must not load.
    Source: nvinfer1::IRuntime, IRuntime::loadRuntime, IRuntime::setEngineHostCodeAllowed
    """

    def __init__(
        self,
        vendor: Vendor,
        log: LogSink,
        *,
        lean_library: str | None,
        allow_host_code: bool,
        device_text: str,
        runtime_cache: bytes | None,
    ) -> None:
        self._vendor = vendor
        self._log = log
        self._allow_host_code = allow_host_code
        self._device_text = device_text
        self.lean_version: str | None = None
        if lean_library is not None:
            self.lean_version = _checked_lean_version(vendor, lean_library)
        self._outer: Any = None
        self._handle: Any = None
        with vendor.router.operation(log) as operation:
            handle: Any = vendor.module.Runtime(vendor.logger)
            if not created(handle, operation):
                raise EngineError(
                    f"{vendor.title} could not create a runtime on {device_text}", tensorrt_log=operation.lines
                )
            _allow_host_code(vendor, handle, allow_host_code)
            if lean_library is not None:
                # The lean runtime's code belongs to the outer one, which must outlive it.
                self._outer = handle
                handle = self._outer.load_runtime(lean_library)
                if not handle:
                    raise EngineError(
                        f"{vendor.title} could not load the lean library {lean_library} ({self.lean_version})",
                        tensorrt_log=operation.lines,
                    )
                _allow_host_code(vendor, handle, allow_host_code)
        self._handle = handle
        self._cache = RuntimeCache(vendor, log, runtime_cache)
        vendor.router.open(log)

    @property
    def flavour(self) -> str:
        return self._vendor.flavour.name

    @property
    def version(self) -> str:
        return self.lean_version or self._vendor.version

    @property
    def title(self) -> str:
        """For messages: "tensorrt_dispatch 10.16.1.11 with the lean library 8.6.0"."""
        lean = f" with the lean library {self.lean_version}" if self.lean_version else ""
        return self._vendor.title + lean

    def deserialize(self, plan: bytes | memoryview) -> Engine:
        """Source: nvinfer1::IRuntime::deserializeCudaEngine

        Raises:
            PlanError: the bytes are no whole plan.
            VersionMismatchError: it is for another version, flavour or GPU.
            EngineError: TensorRT refused it, or it brings host code that is not allowed.
        """
        runtime = alive(self._handle, "runtime")
        header = read_raw_plan_header(plan)
        self._check_fit(header, plan)
        with self._vendor.router.operation(self._log) as operation:
            try:
                handle = runtime.deserialize_cuda_engine(plan)
            except (TypeError, ValueError, RuntimeError) as error:
                raise EngineError(
                    f"{self.title} could not deserialize the plan ({header.length} bytes): {error}",
                    tensorrt_log=operation.lines,
                ) from error
            if handle is None:
                raise self._refused(header, tuple(operation.lines))
            return Engine(
                self._vendor,
                self._log,
                handle,
                title=self.title,
                lean_version=self.lean_version,
                runtime_cache=self._cache,
            )

    def runtime_cache(self) -> bytes | None:
        """Source: nvinfer1::IRuntimeCache::serialize"""
        alive(self._handle, "runtime")
        return self._cache.serialize()

    def _check_fit(self, header: RawPlanHeader, plan: bytes | memoryview) -> None:
        host_code = find_host_code(plan)
        reason = plan_fits(
            header.flavour,
            header.version,
            self.flavour,
            self._vendor.version,
            None,
            self.lean_version,
            embedded_runtime=host_code is not None,
        )
        if reason is not None:
            raise VersionMismatchError(reason, plan=f"{header.flavour} {header.version}", runtime=self.title)
        if host_code is not None and not self._allow_host_code:
            raise EngineError(
                f"the plan ({header.flavour} {header.version}) contains {host_code}, which would run in this process "
                f"with all its rights; if you trust where the plan comes from, pass allow_host_code=True"
            )

    def _refused(self, header: RawPlanHeader, lines: tuple[str, ...]) -> EngineError:
        text = "\n".join(lines)
        plan = f"{header.flavour} {header.version}"
        message = f"{self.title} refused the plan built with {plan} ({header.length} bytes)"
        if any(part in text for part in _OTHER_VERSION):
            return VersionMismatchError(
                f"{message} on {self._device_text}; rebuild it for this version and GPU",
                plan=plan,
                runtime=f"{self.title} on {self._device_text}",
                tensorrt_log=lines,
            )
        if "host code" in text.lower():
            return EngineError(
                f"{message}: it needs to run code of its own on the CPU; if you trust it, pass allow_host_code=True",
                tensorrt_log=lines,
            )
        return EngineError(f"{message} on {self._device_text}; the log says why", tensorrt_log=lines)

    def destroy(self) -> None:
        """Idempotent. Engines must have been destroyed before."""
        if self._handle is None:
            return
        with self._vendor.router.operation(self._log):
            self._cache.destroy()
            self._handle = None
            self._outer = None
        self._vendor.router.close(self._log)


def _checked_lean_version(vendor: Vendor, path: str) -> str:
    # The rules for the flavour come first: asking the library for its version loads it into the process.
    if not vendor.flavour.loads_lean_library:
        raise EngineError(lean_library_refusal(vendor.flavour.name, vendor.version, "8.6") or "")
    version = lean_library_version(path)
    refusal = lean_library_refusal(vendor.flavour.name, vendor.version, version)
    if refusal is not None:
        raise EngineError(refusal)
    return version


def _allow_host_code(vendor: Vendor, runtime: Any, allowed: bool) -> None:
    if hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = allowed
    elif allowed:
        raise EngineError(f"{vendor.title} cannot load plans with host code; leave allow_host_code unset")
