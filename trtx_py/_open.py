"""From a model or a plan to a serving engine in one step."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from ._aio import run_shielded
from ._arguments import checked_path
from ._builder import Builder
from ._config import BuilderConfig
from ._engine import Engine, EngineOptions
from ._errors import InvalidArgumentError
from ._logger import Logger
from ._network import Network
from ._onnx_source import Weights
from ._plan import Plan, looks_like_plan
from ._resource import Resource
from ._runtime import Runtime
from ._types import ShapeRange, TensorInfo
from .backends.protocols import TensorRTBackend
from .backends.registry import resolve_backend

#: Default range of a dynamic leading axis, which is nearly always the batch, and of any other dynamic axis.
DEFAULT_BATCH_RANGE = (1, 8, 32)
DEFAULT_AXIS_RANGE = (1, 128, 512)

_R = TypeVar("_R", bound=Resource)

Source = Plan | bytes | bytearray | memoryview | str | os.PathLike[str]
Profiles = Sequence[Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]]

_BUILD_OPTIONS = frozenset(
    {
        "workspace_bytes",
        "optimization_level",
        "max_aux_streams",
        "profile_sharing",
        "compute_capabilities",
        "flags",
        "weights",
    }
)
_SERVING_OPTIONS = frozenset({"lanes", "noncontiguous"})
_LOAD_OPTIONS = _SERVING_OPTIONS | {"lean_library", "allow_host_code"}


@asynccontextmanager
async def open_engine(
    source: Source,
    backend: str | TensorRTBackend | None = None,
    device: int = 0,
    profiles: Profiles | None = None,
    precision: str | None = None,
    *,
    logger: Logger | None = None,
    **options: Any,
) -> AsyncIterator[Engine]:
    """``async with trtx.open_engine("model.onnx") as engine:`` builds if need be, loads, serves, closes all it made.

    Args:
        source: an ONNX model or a plan, as a path or as bytes; which of the two is told by the content.
        backend: a name, a backend object, or None: TRTX_BACKEND, else the best installed TensorRT that can serve this
            source here. Never the mock unless it is asked for.
        device: number of the GPU.
        profiles: for a model with dynamic axes, the shapes to serve: ``[{"x": (min, opt, max)}, ...]``. Without them
            every dynamic leading axis gets 1, 8, 32 and every other dynamic axis 1, 128, 512 (min, opt, max), which is
            logged at INFO. For a plan they must be left out: it has its own.
        precision: as ``BuilderConfig.precision``; for a plan it must be left out.
        logger: the caller's own; it stays open.
        **options: of the build: workspace_bytes, optimization_level, max_aux_streams, profile_sharing,
            compute_capabilities, flags (names), weights (external data); of loading: lanes, noncontiguous,
            lean_library, allow_host_code.

    Raises:
        BackendUnavailableError: no TensorRT here can serve this source; says what to install.
        ParserError, BuilderError, PlanError, VersionMismatchError, EngineError: as Builder and Runtime.
        InvalidArgumentError: unknown options, or options that do not apply to this kind of source.
    Cancellation: while building, the build is stopped; everything made so far is closed.
    """
    unknown = options.keys() - _BUILD_OPTIONS - _LOAD_OPTIONS
    if unknown:
        known = ", ".join(sorted(_BUILD_OPTIONS | _LOAD_OPTIONS))
        raise InvalidArgumentError(f"open_engine has no option {', '.join(sorted(unknown))}; it has {known}")
    # Before anything is read or built, which takes minutes at times.
    EngineOptions(**{key: options[key] for key in _SERVING_OPTIONS & options.keys()})
    lean_library = await run_shielded(lambda: _checked_lean_library(options.get("lean_library")))
    content = await run_shielded(lambda: _read(source))
    load = {key: value for key, value in options.items() if key in _LOAD_OPTIONS}
    build = {key: value for key, value in options.items() if key in _BUILD_OPTIONS}
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
            plan = await _build(content, chosen, logger, device, profiles, precision, build)
        serving = {key: load.pop(key) for key in _SERVING_OPTIONS & load.keys()}
        runtime = await _open(stack, lambda: Runtime(logger, chosen, device=device, **load))
        engine = await stack.enter_async_context(await runtime.deserialize(plan, **serving))
        yield engine


async def _open(stack: AsyncExitStack, make: Callable[[], _R]) -> _R:
    """What ``make`` constructs, which takes native libraries seconds at times, off the event loop; ``stack`` closes it.

    Cancellation: delivered once ``make`` has returned; what it made is closed.
    """
    made: list[_R] = []
    try:
        await run_shielded(lambda: made.append(make()))
    except BaseException:
        for resource in made:
            resource.close()
        raise
    await stack.enter_async_context(made[0])
    return made[0]


def _read(source: Source) -> Plan | bytes | str:
    """A Plan, the bytes of an ONNX model, or the path of one (its external data lies beside it)."""
    if isinstance(source, Plan):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        blob = bytes(source)
        return Plan(blob) if looks_like_plan(blob) else blob
    path = checked_path(source, "source", "a path, bytes or a Plan")
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError as error:
        raise InvalidArgumentError(f"source {path!r} cannot be read: {error.strerror}") from error
    return Plan.load(path) if looks_like_plan(start) else path


async def _build(
    model: bytes | str,
    backend: TensorRTBackend,
    logger: Logger | None,
    device: int,
    profiles: Profiles | None,
    precision: str | None,
    build: Mapping[str, Any],
) -> Plan:
    options = dict(build)
    weights: Weights | None = options.pop("weights", None)
    flags = _checked_flags(options.pop("flags", ()))
    async with AsyncExitStack() as stack:
        builder = await _open(stack, lambda: Builder(logger, backend, device=device))
        network = builder.create_network()
        await network.parse_onnx_async(model, weights)
        config = builder.create_config()
        config.precision = precision
        for name, value in options.items():
            setattr(config, name, value)
        for flag in flags:
            config.set_flag(flag)
        _add_profiles(builder, network, config, profiles)
        return await builder.build_serialized_network(network, config)


def _checked_lean_library(path: Any) -> str | None:
    if path is None:
        return None
    checked = checked_path(path, "lean_library")
    if not os.path.isfile(checked):
        raise InvalidArgumentError(
            f"lean_library {checked!r} is not a file; expected the path of TensorRT's libnvinfer_lean"
        )
    return checked


def _checked_flags(flags: Any) -> tuple[str, ...]:
    """The names in ``flags``; one name alone is one flag, not as many as it has letters."""
    if isinstance(flags, str):
        return (flags,)
    if not isinstance(flags, Iterable):
        raise InvalidArgumentError(f'flags is {flags!r}; expected names of nvinfer1::BuilderFlag such as ("TF32",)')
    return tuple(flags)


def _add_profiles(builder: Builder, network: Network, config: BuilderConfig, profiles: Profiles | None) -> None:
    wanted: Sequence[Mapping[str, Any]]
    if profiles is None:
        ranges = {t.name: default_range(t) for t in network.inputs if -1 in t.shape}
        if not ranges:
            return
        text = ", ".join(f"{name}: {limits}" for name, limits in ranges.items())
        builder._logger.info(f"no profiles given; the dynamic axes get the defaults {text}")
        wanted = [{name: (limits.min, limits.opt, limits.max) for name, limits in ranges.items()}]
    elif not isinstance(profiles, (list, tuple)):
        raise InvalidArgumentError(
            f"profiles is {type(profiles).__name__}; expected a list of mappings: [{{'x': (min, opt, max)}}]"
        )
    else:
        wanted = profiles
    known = {tensor.name for tensor in network.inputs}
    for number, spec in enumerate(wanted):
        if not isinstance(spec, Mapping):
            raise InvalidArgumentError(f"profile {number} is {type(spec).__name__}; expected {{'x': (min, opt, max)}}")
        with builder.create_optimization_profile() as profile:
            for name, limits in spec.items():
                if name not in known:
                    raise InvalidArgumentError(
                        f"profile {number} names {name!r}; the inputs are {', '.join(sorted(known))}"
                    )
                try:
                    minimum, optimum, maximum = limits
                except (TypeError, ValueError):
                    raise InvalidArgumentError(
                        f"profile {number}, {name!r}: {limits!r}; expected three shapes (min, opt, max)"
                    ) from None
                profile.set_shape(name, minimum, optimum, maximum)
            config.add_optimization_profile(profile)


def default_range(tensor: TensorInfo) -> ShapeRange:
    """The documented default for a dynamic input: DEFAULT_BATCH_RANGE in front, DEFAULT_AXIS_RANGE elsewhere."""
    columns = [
        (n, n, n) if n != -1 else (DEFAULT_BATCH_RANGE if axis == 0 else DEFAULT_AXIS_RANGE)
        for axis, n in enumerate(tensor.shape)
    ]
    low, best, high = zip(*columns, strict=True)
    return ShapeRange(low, best, high)
