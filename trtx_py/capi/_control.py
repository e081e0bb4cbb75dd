"""What libtrtxpy calls: the control plane of the C ABI.

Every function is called on whatever thread the foreign caller has, with Python's lock, perhaps inside an event loop's
callback, and returns (0, results...) or (status, message): no exception leaves here. Addresses are the caller's;
memoryviews are valid during the call only.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

from .. import _native
from .._types import Array, Shape
from ..cuda._array import DeviceArray
from ._context import Buffer, Context, Info
from ._graph import Captured, Graph, Input, Output, Places, Port
from ._memory import copy as copy_memory
from ._models import GraphOptions, Ranges
from ._run import Given, Result
from ._status import failure

#: (ranges, precision, optimization level, lanes, slots, max_graphs, no_cuda_graphs)
Options = tuple[Ranges | None, str | None, int, int, int, int, bool]
Answer = tuple[Any, ...]

_lock = threading.Lock()
_contexts: dict[int, Context] = {}


def _answering(function: Callable[..., tuple[Any, ...] | None]) -> Callable[..., Answer]:
    """Exceptions become (status, message), and hold nothing of what their frames held."""

    @functools.wraps(function)
    def call(*args: Any) -> Answer:
        try:
            return 0, *(function(*args) or ())
        except BaseException as error:  # a KeyboardInterrupt too: C would not know what to do with it
            return failure(error)

    return call


# The library


@_answering
def start() -> tuple[object]:
    """The native lanes' functions, in a capsule."""
    return (_native.lane_table(),)


@_answering
def stop() -> None:
    """Close everything; the interpreter, or the library, ends."""
    with _lock:
        contexts = list(_contexts.values())
        _contexts.clear()
    with contextlib.ExitStack() as closing:  # whatever one of them raises, the others are closed
        for context in contexts:
            closing.callback(context.shut_down)


@_answering
def on_exit(address: int) -> None:
    """Call the C function ``void (*)(void)`` before the interpreter ends, without Python's lock."""
    atexit.register(ctypes.CFUNCTYPE(None)(address))


# Contexts


@_answering
def create_context(
    backend: str | None,
    device: int,
    completion: int,
    max_device_bytes: int,
    lean_library: str | None,
    max_cached_models: int,
    allow_host_code: bool,
) -> tuple[Context, Info]:
    context = Context(backend, device, completion, max_device_bytes, lean_library, max_cached_models, allow_host_code)
    with _lock:
        _contexts[id(context)] = context
    return context, context.info


@_answering
def destroy_context(context: Context) -> None:
    context.close()
    with _lock:
        _contexts.pop(id(context), None)


@_answering
def context_statistics(context: Context) -> tuple[int, ...]:
    return context.statistics()


# Graphs


@_answering
def open_onnx(
    context: Context, model: memoryview, weights: memoryview | None, options: Options
) -> tuple[Graph, tuple[Port, ...]]:
    graph = context.open_onnx(model, weights, GraphOptions(*options))
    return graph, graph.io


@_answering
def open_plan(context: Context, plan: memoryview, options: Options) -> tuple[Graph, tuple[Port, ...]]:
    graph = context.open_plan(plan, GraphOptions(*options))
    return graph, graph.io


@_answering
def open_file(context: Context, path: str, options: Options) -> tuple[Graph, tuple[Port, ...]]:
    graph = context.open_file(path, GraphOptions(*options))
    return graph, graph.io


@_answering
def close_graph(graph: Graph) -> None:
    graph.close()


@_answering
def graph_plan(graph: Graph) -> tuple[bytes]:
    assert graph.plan is not None
    return (graph.plan,)


@_answering
def max_graphs(graph: Graph) -> tuple[int]:
    return (graph.max_graphs,)


@_answering
def capture(graph: Graph, shapes: tuple[Shape, ...]) -> tuple[Captured, tuple[Shape, ...], Places]:
    captured = graph.capture(shapes)
    try:
        return captured, captured.outputs, captured.places
    except BaseException:
        captured.release()
        raise


@_answering
def release(captured: Captured) -> None:
    captured.release()


@_answering
def infer(
    graph: Graph, inputs: tuple[Input, ...], on_device: bool
) -> tuple[list[Array | DeviceArray], tuple[Output, ...]]:
    results, where = graph.infer(inputs, on_device=on_device)
    return results, tuple(where)


@_answering
def drop(results: list[Array | DeviceArray]) -> None:
    """Free what ``infer`` gave: now, and not when the thread that releases what was collected comes to it."""
    for result in results:
        if isinstance(result, DeviceArray):
            result.close()


# Memory


@_answering
def alloc(context: Context, nbytes: int, location: int) -> tuple[Buffer, int]:
    buffer = context.allocate(nbytes, on_device=location == 1)
    return buffer, buffer.address


@_answering
def free(buffer: Buffer) -> None:
    buffer.close()


@_answering
def copy(context: Context, to: int, to_device: bool, source: int, source_device: bool, nbytes: int) -> None:
    copy_memory(context.device, to, to_device, source, source_device, nbytes)


# One-shot calls


@_answering
def run(
    context: Context,
    model: memoryview,
    weights: memoryview | None,
    inputs: tuple[Given, ...] | None,
    options: Options,
) -> tuple[list[Array], tuple[Result, ...]]:
    return context.run(model, weights, inputs, GraphOptions(*options))
