"""An engine opened from what a command was given: a plan, or a model that is built first."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import click

from ._app import options
from ._build_options import builder_options, taken
from ._session import Session
from ._values import FILE, KEPT, SIZE, Shape

if TYPE_CHECKING:
    from .. import Engine

loading_options = options(
    click.option("--lanes", type=click.IntRange(1, 64), default=1, show_default=True, metavar="N",
                 help="Inferences that may run at once."),
    click.option("--graphs/--no-graphs", default=True, show_default=True, help="Capture shapes as CUDA graphs."),
    click.option("--weight-streaming-bytes", type=SIZE, metavar="SIZE", help="Device memory for streamed weights."),
    click.option("--lean-library", type=FILE, metavar="FILE", help="Lean library for plans of an older version."),
    click.option("--allow-host-code", is_flag=True, help="Load plans that carry code for the CPU."),
    click.option("--max-device-memory", type=SIZE, metavar="SIZE", help="Device memory that all may take together."),
    click.option("--runtime-cache", type=KEPT, metavar="FILE",
                 help="What TensorRT-RTX compiled before; read, not written."),
    click.option("--engine-cache/--no-engine-cache", default=True, show_default=True,
                 help="Find a plan that was built before, and keep one that is built."),
)  # fmt: skip


def open_source(
    session: Session, source: str, given: dict[str, Any], shapes: dict[str, Shape] | None = None
) -> AbstractAsyncContextManager[Engine]:
    """``open_engine`` with the options of ``build_options`` and ``loading_options``.

    Args:
        shapes: what will be run, for which a model with dynamic axes gets a profile if no other was given.
    """
    import trtx_py as trtx

    return trtx.open_engine(source, session.backend, session.device, **open_arguments(source, given, shapes))


def open_arguments(source: str, given: dict[str, Any], shapes: dict[str, Shape] | None = None) -> dict[str, Any]:
    """What was said of the build and of loading, as ``open_engine`` takes it by name; the rest it decides itself."""
    build = taken(given)
    plan = is_plan(source)
    asked = builder_options(build, None if plan else _profile_shapes(source, shapes))
    said: dict[str, Any] = {
        "lanes": (given["lanes"], 1), "cuda_graphs": (given["graphs"], True), "cache": (given["engine_cache"], True),
        "allow_host_code": (given["allow_host_code"], False), "lean_library": (given["lean_library"], None),
        "weight_streaming_bytes": (given["weight_streaming_bytes"], None),
        "max_device_bytes": (given["max_device_memory"], None), "runtime_cache": (given["runtime_cache"], None),
    }  # fmt: skip
    found = {name: value for name, (value, usual) in said.items() if value != usual}
    if asked is not None:
        if plan:
            raise click.UsageError(f"{source} is a plan already; options of a build belong to its model")
        found["builder_options"] = asked
    if build["weights"] is not None:
        found["weights"] = build["weights"]
    return found


def is_plan(path: str) -> bool:
    """Told by the first bytes. Raises OSError."""
    from .._plan import looks_like_plan

    with open(path, "rb") as file:
        try:
            return looks_like_plan(file.read(16))
        except OSError as error:  # of reading, which does not name the file
            raise OSError(error.errno, error.strerror, path) from error


def _profile_shapes(path: str, shapes: dict[str, Shape] | None) -> dict[str, Shape] | None:
    """Shapes for a profile: only a model with dynamic axes has one, and it must name all of those inputs."""
    if not shapes:
        return None
    from ..diagnostics import describe

    found = describe(path)
    dynamic = {tensor.name for tensor in found.io_tensors if -1 in tensor.shape and tensor.mode.value == "input"}
    return {name: shape for name, shape in shapes.items() if name in dynamic} if dynamic <= shapes.keys() else None
