"""The runtime: plans become engines."""

from __future__ import annotations

import os
from typing import Any

from ._aio import run_shielded
from ._arguments import checked_path, replace_file
from ._engine import Engine
from ._errors import InvalidArgumentError, PlanError, VersionMismatchError
from ._logger import Logger, checked_logger, owner_of
from ._options import EngineOptions
from ._plan import Plan
from ._resource import Resource
from ._types import BackendInfo
from .backends._flavours import plan_fits
from .backends.protocols import TensorRTBackend
from .backends.registry import lean_library_for, resolve_backend
from .cuda._device import Device, checked_budget


class Runtime(Resource):
    """Loads plans onto one device.

    Args:
        logger: receives TensorRT's lines; None uses a default one that hands them to Python's ``logging``.
        backend: a name, a backend object, or None: TRTX_BACKEND, else the best installed TensorRT that can run here.
        device: number of the GPU.
        lean_library: path of a lean runtime library of the version that plans were built with, for plans that are
            version-compatible; also from TRTX_LEAN_LIBRARY, for flavours that load one.
        allow_host_code: load plans that carry code for the CPU. Such a plan can do whatever a program can: only for
            plans whose origin you trust.
        max_device_bytes: how much device memory everything below this runtime may take together, as far as it is known:
            weights, activation memory, buffers. What would exceed it raises MemoryBudgetError and leaves everything
            usable. None: as much as there is.
        runtime_cache: file with what TensorRT-RTX compiled before (see ``save_runtime_cache``); it need not exist yet.
            Flavours that compile nothing at run time log a warning and do without.

    Raises:
        BackendUnavailableError: nothing here can run; says what was looked for and what to install.
        InvalidArgumentError: there is no such device or library, or the budget is not a positive number.
        CudaError: the device cannot be used.

    Source: nvinfer1::IRuntime
    """

    def __init__(
        self,
        logger: Logger | None = None,
        backend: str | TensorRTBackend | None = None,
        device: int = 0,
        lean_library: str | os.PathLike[str] | None = None,
        allow_host_code: bool = False,
        *,
        max_device_bytes: int | None = None,
        runtime_cache: str | os.PathLike[str] | None = None,
        _owner: Resource | None = None,
        _kernels: bytes | None = None,
    ) -> None:
        budget = checked_budget(max_device_bytes)
        given = None if lean_library is None else checked_path(lean_library, "lean_library")
        self._backend = resolve_backend(backend, need="run", lean_library=given)
        self._cache_path = None if runtime_cache is None else checked_path(runtime_cache, "runtime_cache")
        cache = _kernels if self._cache_path is None else _read_cache(self._cache_path)
        lean = self._lean_library = lean_library_for(self._backend.info.flavour, given)
        self._logger = checked_logger(logger)
        self._allow_host_code = allow_host_code
        parent, internal = (owner_of(self._logger), False) if _owner is None else (_owner, True)
        opening = self._opening(parent, name=self._backend.info.name, internal=internal)
        with opening as handle, self._logger.attaching():
            self._device = Device._create(self._backend, device, parent=self, max_device_bytes=budget)
            with self._device._access.current:
                self._native = self._backend.create_runtime(
                    self._logger._sink(), device=device, lean_library=lean, allow_host_code=allow_host_code,
                    runtime_cache=cache,
                )  # fmt: skip
                handle.release = self._device._carry(self._native.destroy)

    def save_runtime_cache(self, path: str | os.PathLike[str] | None = None) -> bool:
        """Write what TensorRT-RTX has compiled so far, for ``Runtime(runtime_cache=path)`` of a later process.

        Args:
            path: None writes to where the cache was read from. The file is replaced as a whole.
        Returns:
            False if there is nothing to save: another flavour, or no execution context was made yet.
        Raises:
            InvalidArgumentError: there is no path, or it cannot be written.
        Source: nvinfer1::IRuntimeCache::serialize
        """
        self._handle.require_open()
        target = self._cache_path if path is None else checked_path(path, "path")
        if target is None:
            raise InvalidArgumentError("save_runtime_cache() needs a path: this runtime was made without runtime_cache")
        content = self._compiled_kernels()
        if content is None:
            return False
        replace_file(target, content, "runtime cache")
        return True

    def _compiled_kernels(self) -> bytes | None:
        """What TensorRT-RTX has compiled so far, None if there is nothing."""
        self._handle.require_open()
        with self._handle.lend("save_runtime_cache()"), self._device.current():
            return self._native.runtime_cache()

    @property
    def backend(self) -> BackendInfo:
        """Which TensorRT this is and what it can do."""
        return self._backend.info

    @property
    def version(self) -> str:
        """The TensorRT version that plans must fit: that of the lean library where one is loaded."""
        self._handle.require_open()
        return self._native.version

    @property
    def device(self) -> Device:
        """The device that engines are loaded onto; makes streams, events and buffers. Closed with this runtime only."""
        return self._device

    async def deserialize(
        self,
        plan: Plan | bytes | bytearray | memoryview | str | os.PathLike[str],
        **serving: Any,
    ) -> Engine:
        """Make an engine of a plan, off the event loop.

        Args:
            plan: a Plan, the bytes of one, or a path.
            **serving: how it serves, see EngineOptions: lanes, completion, slots, cuda_graphs, batch_axis, ...

        Raises:
            PlanError: damaged, not a plan, or carrying host code that is not allowed; TensorRT never saw it.
            VersionMismatchError: for another TensorRT version or GPU; names both.
            EngineError: TensorRT refused it; its own lines are in ``tensorrt_log``.
            MemoryBudgetError: it does not fit into ``max_device_bytes`` beside what is loaded.
            CudaError: for example too little device memory.
        Cancellation: delivered once TensorRT has returned; no engine results.
        Source: nvinfer1::IRuntime::deserializeCudaEngine
        """
        options = EngineOptions.of(serving)
        made: list[Engine] = []

        def work() -> None:
            made.append(self._deserialize(plan, options))

        try:
            await run_shielded(work)
        except BaseException:
            for engine in made:  # cancelled while TensorRT worked: nobody will ever close what it made
                if not engine.closed:  # unless the runtime's aclose() is at it
                    engine.close()
            raise
        return made[0]

    def deserialize_sync(
        self,
        plan: Plan | bytes | bytearray | memoryview | str | os.PathLike[str],
        **serving: Any,
    ) -> Engine:
        """As ``deserialize``, blocking this thread."""
        return self._deserialize(plan, EngineOptions.of(serving))

    def _deserialize(
        self, plan: Plan | bytes | bytearray | memoryview | str | os.PathLike[str], options: EngineOptions
    ) -> Engine:
        self._handle.require_open()
        checked = Plan.load(plan)
        host_code = checked._host_code()
        self._refuse_host_code(checked, host_code)
        self._refuse_other_version(checked, host_code)
        self._refuse_other_gpu(checked)
        with self._handle.lend("deserialize()"):
            return Engine._create(self, checked, options)

    def _refuse_host_code(self, plan: Plan, found: str | None) -> None:
        if found is None and plan.header.host_code:
            found = "its header says so"
        if found is not None and not self._allow_host_code:
            raise PlanError(
                f"{plan!r} carries code for the CPU ({found}), which would run with all rights of this process; "
                "if you trust where it comes from, make the Runtime with allow_host_code=True; "
                "otherwise build it with the flag EXCLUDE_LEAN_RUNTIME"
            )

    def _refuse_other_version(self, plan: Plan, host_code: str | None) -> None:
        header, native = plan.header, self._native
        reason = plan_fits(
            header.flavour, header.version, native.flavour, native.version, header.version_compatible, None,
            embedded_runtime=host_code is not None,
        )  # fmt: skip
        if reason is not None:
            raise VersionMismatchError(
                f"{plan!r} does not fit this runtime: {reason}",
                plan=f"{header.flavour} {header.version}",
                runtime=f"{native.flavour} {native.version}",
            )

    def _refuse_other_gpu(self, plan: Plan) -> None:
        built_for, here = plan.header.compute_capabilities, self._device.compute_capability
        if built_for and here not in built_for:
            raise VersionMismatchError(
                f"{plan!r} was built for compute capability {', '.join(built_for)}; {self._device.name} has {here}: "
                f'build it there, or with compute_capabilities=("{here}",)',
                plan=f"compute capability {', '.join(built_for)}",
                runtime=f"compute capability {here}",
            )


def _read_cache(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None  # the first process that uses it
    except OSError as error:
        raise InvalidArgumentError(f"runtime_cache {path!r} cannot be read: {error.strerror}") from error
