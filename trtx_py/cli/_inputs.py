"""Inputs of ``run`` and ``profile``: from files, and random where no file was given."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from ._app import options
from ._values import PAIR, SHAPES, Pair, Shape

if TYPE_CHECKING:
    from .. import Engine
    from .._types import Array

input_options = options(
    click.option("--input", "inputs", multiple=True, type=Pair(optional=True), metavar="NAME=FILE",
                 help="A .npy, image or raw file for an input, or one .npz for all. May be repeated; the rest is "
                 "random."),
    click.option("--shapes", type=SHAPES, metavar="X:SHAPE,...", help="Of inputs that no file tells the shape of."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
                 help="Of random inputs."),
    click.option("--range", "ranges", multiple=True, type=PAIR, metavar="NAME=LOW:HIGH",
                 help="Limits of a random input. May be repeated."),
)  # fmt: skip


def once(given: tuple[tuple[str, str], ...], option: str) -> dict[str, str]:
    """Values by name. Raises click.UsageError for a name with two, of which one would be forgotten."""
    found = dict(given)
    if len(found) < len(given):
        names = [name for name, _ in given]
        raise click.UsageError(f"{option}: {next(each for each in names if names.count(each) > 1)!r} has two values")
    return found


def limits_of(given: tuple[tuple[str, str], ...], option: str = "--range") -> dict[str, tuple[float, float]]:
    """Limits of random inputs by name. Raises click.UsageError."""
    found = {}
    for name, text in once(given, option).items():
        low, _, high = text.partition(":")
        try:
            found[name] = (float(low), float(high))
            if not -math.inf < found[name][0] < found[name][1] < math.inf:
                raise ValueError
        except ValueError:
            raise click.UsageError(f"{option} {name}={text}: expected LOW:HIGH, the first the smaller") from None
    return found


def inputs_for(
    engine: Engine, given: tuple[tuple[str, str], ...], shapes: dict[str, Shape], seed: int, limits: Any, images: Any
) -> dict[str, Array]:
    """All inputs of ``engine``. Raises InvalidArgumentError, DTypeError, ShapeError for files that do not fit."""
    import trtx_py as trtx

    from .._array_files import concrete_shapes, random_inputs, read_input, read_npz

    tensors = engine.io_tensors
    names = [tensor.name for tensor in tensors if tensor.mode is trtx.TensorMode.INPUT]
    read: dict[str, Array] = {}
    files: dict[str, str] = {}
    for name, path in given:
        if not name and path.lower().endswith(".npz"):
            read.update(read_npz(path))
        elif not name and len(names) != 1:
            raise trtx.InvalidArgumentError(f"{path!r} is for one of {', '.join(names)}; say NAME={path}")
        elif (name or names[0]) in files:
            raise trtx.InvalidArgumentError(f"--input: {name or names[0]!r} has two files; give one")
        else:
            files[name or names[0]] = path
    unknown = [name for name in [*read, *files, *limits] if name not in names]
    if unknown:
        raise trtx.InvalidArgumentError(f"there is no input {unknown[0]!r}; the inputs are {', '.join(names)}")
    wanted = concrete_shapes(tensors, {**shapes, **{name: array.shape for name, array in read.items()}})
    for tensor in tensors:
        if tensor.name in files:
            read[tensor.name] = read_input(files[tensor.name], tensor, wanted[tensor.name], images)
    rest = [tensor for tensor in tensors if tensor.name not in read]
    return {**random_inputs(rest, wanted, seed=seed, limits=limits), **read}
