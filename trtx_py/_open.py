"""From a model or a plan to a serving engine in one step."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from ._aio import run_shielded
from ._arguments import checked_path
from ._build import BUILD_OPTIONS, BuildRequest, Profiles, Source, open_in, read_source
from ._engine import Engine
from ._errors import InvalidArgumentError
from ._logger import Logger
from ._options import EngineOptions, serving_options
from ._plan import Plan
from ._runtime import Runtime
from .backends.protocols import TensorRTBackend
from .backends.registry import resolve_backend
from .cache._cache import EngineCache, cache_of
from .convert._opening import model_for_engine
from .cuda._device import checked_budget

_SERVING_OPTIONS = serving_options()
_LOAD_OPTIONS = _SERVING_OPTIONS | {"lean_library", "allow_host_code", "max_device_bytes", "runtime_cache"}


@asynccontextmanager
async def open_engine(
    source: Source,
    backend: str | TensorRTBackend | None = None,
    device: int = 0,
    profiles: Profiles | None = None,
    precision: str | None = None,
    *,
    logger: Logger | None = None,
    cache: bool | EngineCache | str | os.PathLike[str] = True,
    conversion: Mapping[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Engine]:
    """``async with trtx.open_engine("model.onnx") as engine:`` builds if need be, loads, serves, closes all it made.

    Args:
        source: an ONNX model or a plan, as a path or as bytes, or a model of another framework, which is converted
            first; which of them is told by the content.
        backend: a name, a backend object, or None: TRTX_BACKEND, else the best installed TensorRT that can serve this
            source here. Never the mock unless it is asked for.
        device: number of the GPU.
        profiles: for a model with dynamic axes, the shapes to serve: ``[{"x": (min, opt, max)}, ...]``. Without them
            every dynamic leading axis gets 1, 8, 32 and every other dynamic axis 1, 128, 512 (min, opt, max), which is
            logged at INFO. For a plan they must be left out: it has its own.
        precision: as ``BuilderConfig.precision``; for a plan it must be left out.
        logger: the caller's own; it stays open.
        cache: where plans are kept that were built before: an EngineCache, the path of its folder, True for the
            default one (TRTX_CACHE_DIR, else ~/.cache/trtx_py), False for none. A folder that cannot be written, or a
            default one that must not be trusted, is a logged warning, and the plan is built.
        conversion: arguments of ``convert``, for a source that is converted: ``{"inputs": {"x": (1, 3, 224, 224)}}``.
            An ONNX model is converted only if they are given. Nothing of a conversion is cached.
        **options: of the build: workspace_bytes, optimization_level, max_aux_streams, profile_sharing,
            compute_capabilities, flags (names), weights (external data), calibration, precision_policy,
            require_precision, builder_options (a BuilderOptions, with these and all others); of loading: lean_library,
            allow_host_code, max_device_bytes, runtime_cache; of serving: those of EngineOptions.

    Raises:
        BackendUnavailableError: no TensorRT here can serve this source; says what to install.
        ConversionError: the source is of another framework and could not be converted; says what is missing.
        ParserError, BuilderError, PlanError, VersionMismatchError, EngineError: as Builder and Runtime.
        MemoryBudgetError: it does not fit into ``max_device_bytes``.
        CacheError: the folder that ``cache`` names can be written by others, or is a symbolic link.
        InvalidArgumentError: unknown options, or options that do not apply to this kind of source.
    Cancellation: while building, the build is stopped; everything made so far is closed. Other opens that wait for
        the same plan go on: one of them builds it.
    """
    unknown = options.keys() - BUILD_OPTIONS - _LOAD_OPTIONS
    if unknown:
        known = ", ".join(sorted(BUILD_OPTIONS | _LOAD_OPTIONS))
        raise InvalidArgumentError(f"open_engine has no option {', '.join(sorted(unknown))}; it has {known}")
    # Before anything is read or built, which takes minutes at times.
    EngineOptions.of({key: options[key] for key in _SERVING_OPTIONS & options.keys()})
    checked_budget(options.get("max_device_bytes"))
    kept = await run_shielded(lambda: cache_of(cache))
    lean_library = await run_shielded(lambda: _checked_lean_library(options.get("lean_library")))
    model = await model_for_engine(source, conversion)
    content = await run_shielded(lambda: read_source(model))
    load = {key: value for key, value in options.items() if key in _LOAD_OPTIONS}
    build = {key: value for key, value in options.items() if key in BUILD_OPTIONS}
    async with AsyncExitStack() as stack:
        if isinstance(content, Plan):
            given = [*build, *(["profiles"] if profiles is not None else []), *(["precision"] if precision else [])]
            if given:
                raise InvalidArgumentError(
                    f"{', '.join(given)}: these belong to a build, and the source is a plan already"
                )
            plan = content
            chosen = await run_shielded(
                lambda: resolve_backend(
                    backend, need="run", plan_flavour=plan.header.flavour, plan_version=plan.header.version,
                    lean_library=lean_library,
                )
            )  # fmt: skip
        else:
            chosen = await run_shielded(lambda: resolve_backend(backend, need="both", lean_library=lean_library))
            request = BuildRequest(content, chosen, device, profiles, precision, build, logger)
            plan = (await request.build()).plan if kept is None else await kept._obtain(request)
        serving = {key: load.pop(key) for key in _SERVING_OPTIONS & load.keys()}
        kernels = None
        if kept is not None and load.get("runtime_cache") is None:
            kernels = await run_shielded(lambda: kept._kernels(plan, chosen, device))
        content_of_kernels = None if kernels is None else kernels.content
        runtime = await open_in(
            stack, lambda: Runtime(logger, chosen, device=device, _kernels=content_of_kernels, **load)
        )
        if kernels is not None:
            stack.push_async_callback(kernels.save, runtime)
        engine = await stack.enter_async_context(await runtime.deserialize(plan, **serving))
        yield engine


def _checked_lean_library(path: Any) -> str | None:
    if path is None:
        return None
    checked = checked_path(path, "lean_library")
    if not os.path.isfile(checked):
        raise InvalidArgumentError(
            f"lean_library {checked!r} is not a file; expected the path of TensorRT's libnvinfer_lean"
        )
    return checked
