"""Sets of contenders for the usual questions. They can be joined with ``+`` and measured in one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .._arguments import checked_int
from .._errors import InvalidArgumentError
from ._load import ClosedLoop, Load
from ._spec import Contender, Kind

_Options = Mapping[str, object]


def batch_sweep(
    batches: Iterable[int] = (1, 2, 4, 8, 16, 32), *, kind: Kind = "engine", precision: str | None = None,
    options: _Options | None = None, load: Load | None = None,
) -> tuple[Contender, ...]:  # fmt: skip
    """One contender for each size of a request, each compared with the first: throughput over batch size."""
    found = _listed(batches, "batches")
    label = f" {precision}" if precision else ""
    return tuple(
        Contender(f"{kind}{label} b{batch}", kind, batch, precision, options or {}, load=load, versus=_first(
            f"{kind}{label} b{found[0]}", f"{kind}{label} b{batch}"))
        for batch in found
    )  # fmt: skip


def precision_comparison(
    precisions: Iterable[str | None] = (None, "fp16"), *, batch: int = 1, options: _Options | None = None,
    build: Mapping[str, _Options] | None = None, tolerance: Mapping[str, float] | None = None,
    load: Load | None = None,
) -> tuple[Contender, ...]:  # fmt: skip
    """The same ONNX model built in several precisions; accuracy stands beside speed in the result.

    Args:
        precisions: as for ``open_engine``; None is the model's own.
        build: further options of ``open_engine`` by precision, such as ``{"int8": {"calibration": ...}}``.
        tolerance: relative error that is accepted, by precision.
    """
    found = list(precisions)
    if not found:
        raise InvalidArgumentError("precisions are empty; expected at least one, such as 'fp16'")
    named = [(precision or "as is", precision) for precision in found]
    return tuple(
        Contender(
            f"{word} b{batch}", "engine", batch, precision, {**(options or {}), **((build or {}).get(word, {}))},
            load=load, tolerance=(tolerance or {}).get(word),
            versus=_first(f"{named[0][0]} b{batch}", f"{word} b{batch}"),
        )
        for word, precision in named
    )  # fmt: skip


def graphs_on_off(
    *, batch: int = 1, precision: str | None = None, options: _Options | None = None, load: Load | None = None
) -> tuple[Contender, ...]:
    """An engine that captures CUDA graphs, and one that enqueues every request."""
    without, with_graphs = f"graphs off b{batch}", f"graphs on b{batch}"
    return (
        Contender(without, "engine", batch, precision, {**(options or {}), "cuda_graphs": False}, load=load),
        Contender(
            with_graphs, "engine", batch, precision, {**(options or {}), "cuda_graphs": True}, load=load, versus=without
        ),
    )


def lanes_sweep(
    lanes: Iterable[int] = range(1, 9), *, batch: int = 1, clients: int | None = None, precision: str | None = None,
    options: _Options | None = None,
) -> tuple[Contender, ...]:  # fmt: skip
    """Engines with 1 to 8 lanes under the same closed loop.

    Args:
        clients: of the closed loop; None takes two for each lane of the largest engine, so that no lane runs dry.
    """
    found = _listed(lanes, "lanes")
    load = ClosedLoop(2 * max(found) if clients is None else clients)
    return tuple(
        Contender(f"lanes {count} b{batch}", "engine", batch, precision, {**(options or {}), "lanes": count}, load=load,
                  versus=_first(f"lanes {found[0]} b{batch}", f"lanes {count} b{batch}"))
        for count in found
    )  # fmt: skip


def batcher_against_direct(
    *, clients: int = 64, max_batch_size: int = 64, load: Load | None = None, precision: str | None = None,
    options: _Options | None = None, batcher: _Options | None = None,
) -> tuple[Contender, ...]:  # fmt: skip
    """Many clients with one row each: through a DynamicBatcher, and to the engine directly.

    Args:
        load: None is a closed loop of ``clients``.
        batcher: further arguments of ``DynamicBatcher``.
    """
    load = ClosedLoop(clients) if load is None else load
    merged: _Options = {"max_batch_size": max_batch_size, **(batcher or {})}
    return (
        Contender("direct", "engine", 1, precision, options or {}, load=load),
        Contender("batcher", "batcher", 1, precision, options or {}, merged, load=load, versus="direct"),
    )


def _listed(values: Iterable[int], what: str) -> list[int]:
    found = [checked_int(value, f"one of {what}", minimum=1) for value in values]
    if not found:
        raise InvalidArgumentError(f"{what} are empty; expected at least one number")
    return found


def _first(reference: str, name: str) -> str | None:
    return None if name == reference else reference
