"""From a model to a plan in one step: what ``open_engine`` and the engine cache build with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ._aio import run_shielded
from ._arguments import checked_path
from ._builder import Builder
from ._builder_options import BuilderOptions
from ._config import BuilderConfig
from ._errors import InvalidArgumentError
from ._logger import Logger
from ._network import Network
from ._onnx_source import Weights
from ._plain_file import open_plain
from ._plan import Plan, looks_like_plan
from ._resource import Resource
from ._types import ShapeRange, TensorInfo
from .backends.protocols import TensorRTBackend

#: Default range of a dynamic leading axis, which is nearly always the batch, and of any other dynamic axis.
DEFAULT_BATCH_RANGE = (1, 8, 32)
DEFAULT_AXIS_RANGE = (1, 128, 512)

Source = Plan | bytes | bytearray | memoryview | str | os.PathLike[str]
Profiles = Sequence[Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]]

#: What a build takes besides profiles and precision. Each needs its rule in trtx_py/cache/_key.py.
BUILD_OPTIONS = frozenset(
    {
        "workspace_bytes",
        "optimization_level",
        "max_aux_streams",
        "profile_sharing",
        "compute_capabilities",
        "flags",
        "weights",
        "calibration",
        "precision_policy",
        "require_precision",
        "builder_options",
    }
)

_R = TypeVar("_R", bound=Resource)


@dataclass(frozen=True)
class BuildRequest:
    """A model, and how to build it.

    Attributes:
        model: serialized, or the path of a file that has its external data beside it.
        backend: what builds it.
        device: number of the GPU.
        profiles: None for the defaults.
        precision: as ``BuilderConfig.precision``.
        options: those of BUILD_OPTIONS.
        logger: the caller's own, which stays open.
    """

    model: bytes | str
    backend: TensorRTBackend
    device: int = 0
    profiles: Profiles | None = None
    precision: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    logger: Logger | None = None

    async def build(self) -> Built:
        """Raises as Builder. Cancellation: the build is stopped; everything made so far is closed."""
        options = dict(self.options)
        weights: Weights | None = options.pop("weights", None)
        flags = _checked_flags(options.pop("flags", ()))
        async with AsyncExitStack() as stack:
            builder = await open_in(stack, lambda: Builder(self.logger, self.backend, device=self.device))
            advanced = options.pop("builder_options", None)
            if isinstance(advanced, BuilderOptions) and (advanced.plugin_libraries or advanced.plugin_creators):
                builder.load_plugins(advanced.plugin_libraries, advanced.plugin_creators)
            network = builder.create_network()
            await network.parse_onnx_async(self.model, weights)
            source = network._parsed()
            config = builder.create_config(advanced)
            if self.precision is not None:
                config.precision = self.precision
            for name, value in options.items():
                setattr(config, name, value)
            for flag in flags:
                config.set_flag(flag)
            if self.profiles is not None or not config.optimization_profiles:
                add_profiles(builder, network, config, self.profiles)
            plan = await builder.build_serialized_network(network, config)
            return Built(plan, source.sha256, source.directory is not None)


@dataclass(frozen=True)
class Built:
    """A plan, and what it was made of.

    Attributes:
        plan: what was built.
        model_sha256: of the model as it was read, with all its weights.
        read_again: TensorRT has read the weights from their files once more, after they were hashed.
    """

    plan: Plan
    model_sha256: str
    read_again: bool


async def open_in(stack: AsyncExitStack, make: Callable[[], _R]) -> _R:
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


def read_source(source: Source) -> Plan | bytes | str:
    """A Plan, the bytes of an ONNX model, or the path of one (its external data lies beside it)."""
    if isinstance(source, Plan):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        blob = bytes(source)
        return Plan(blob) if looks_like_plan(blob) else blob
    path = checked_path(source, "source", "a path, bytes or a Plan")
    try:
        with open_plain(path) as file:
            start = file.read(16)
    except OSError as error:
        raise InvalidArgumentError(f"source {path!r} cannot be read: {error.strerror}") from error
    return Plan.load(path) if looks_like_plan(start) else path


def _checked_flags(flags: Any) -> tuple[str, ...]:
    """The names in ``flags``; one name alone is one flag, not as many as it has letters."""
    if isinstance(flags, str):
        return (flags,)
    if not isinstance(flags, Iterable):
        raise InvalidArgumentError(f'flags is {flags!r}; expected names of nvinfer1::BuilderFlag such as ("TF32",)')
    return tuple(flags)


def add_profiles(builder: Builder, network: Network, config: BuilderConfig, profiles: Profiles | None) -> None:
    """Those given, or the documented defaults where the model has dynamic axes and none are given."""
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
