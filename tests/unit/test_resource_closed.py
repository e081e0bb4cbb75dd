"""Use after close: every public method and property of every owned object is tried, new ones too."""

from __future__ import annotations

import asyncio
import inspect
import re
from typing import Any

import pytest

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.ownership import SAMPLE, grow_tree, matmul_model, shared_plan

#: What may be asked of a closed object: the rules of Resource itself, and what was known before and touches nothing.
ALLOWED = {
    "Resource": {"close", "aclose", "closed"},
    "Logger": {"severity", "log", "error", "warning", "info", "verbose", "attaching"},  # takes late lines, never raises
    "Builder": {"backend"},
    "BuilderConfig": {
        "workspace_bytes", "precision", "compute_capabilities", "optimization_level", "max_aux_streams",
        "profile_sharing", "flags", "optimization_profiles",
    },
    "Network": set(),
    "OptimizationProfile": {"ranges"},
    "Runtime": {"backend", "device"},
    "Engine": {"name", "io_tensors", "plan_header", "runtime", "statistics"},
    "ExecutionContext": {"engine"},
    "Device": {"ordinal", "memory_statistics", "pinned_statistics"},
    "Stream": {"device"},
    "Event": {"device"},
    "DeviceBuffer": {"nbytes", "device"},
    "PinnedBuffer": {"nbytes", "device"},
}  # fmt: skip
#: Properties that may be read after close, and not set.
SETTERS = {"workspace_bytes": 1, "precision": "fp32", "compute_capabilities": ("8.9",), "optimization_level": 1,
           "max_aux_streams": 1, "profile_sharing": False}  # fmt: skip


@pytest.fixture
def trees(mock_backend: MockBackend) -> Any:
    """A closed tree and an open one, whose objects serve as arguments."""
    closed, other = grow_tree(mock_backend), grow_tree(mock_backend)
    closed.close()
    yield closed, other
    other.close()


def arguments(method: Any, other: Any) -> dict[str, Any]:
    """Good values for the required parameters, by name; a new name must be added here."""
    samples = {
        "network": other.network, "config": other.config, "profile": other.profile, "plan": shared_plan(),
        "source": matmul_model(), "inputs": {"x": SAMPLE}, "name": "x", "shape": (2, 4), "min": (1, 4), "opt": (2, 4),
        "max": (3, 4), "stream": other.stream, "event": other.event, "end": other.event, "array": SAMPLE,
        "dtype": "float32", "nbytes": 16, "memory": other.buffer, "index": 0, "flag": "TF32", "handle": 0,
        "address": 256, "owner": None, "device": other.device,
    }  # fmt: skip
    needed = [
        p for p in inspect.signature(method).parameters.values() if p.default is p.empty and p.kind != p.VAR_KEYWORD
    ]
    return {p.name: samples[p.name] for p in needed}


KINDS = [kind for name in trtx.__all__ if isinstance(kind := getattr(trtx, name), type) and hasattr(kind, "aclose")]


def test_all_owned_kinds_are_known() -> None:
    assert {kind.__name__ for kind in KINDS} == ALLOWED.keys() - {"Resource"}


def call(target: Any, name: str, attribute: Any, other: Any) -> Any:
    if isinstance(attribute, property):
        return getattr(target, name)
    method = getattr(target, name)
    result = method(**arguments(method, other))
    if inspect.iscoroutine(result):
        return asyncio.run(result)
    return result


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_use_after_close(kind: type, trees: Any) -> None:
    closed, other = trees
    target: Any = next(item for item in closed.objects().values() if type(item) is kind)
    tried = 0
    for name in (name for name in dir(kind) if not name.startswith("_")):
        attribute = inspect.getattr_static(kind, name)
        if name in ALLOWED["Resource"] or isinstance(attribute, classmethod):
            continue
        if name in ALLOWED[kind.__name__]:
            if name not in ("log", "error", "warning", "info", "verbose"):
                call(target, name, attribute, other)  # must not raise
            if kind is trtx.BuilderConfig and name in SETTERS:
                with pytest.raises(trtx.ClosedError):
                    setattr(target, name, SETTERS[name])
            continue
        tried += 1
        with pytest.raises(trtx.ClosedError, match=re.escape(f"{target._handle} is closed")):
            call(target, name, attribute, other)
    assert tried or kind is trtx.Logger


def test_closed_object_as_an_argument(trees: Any, mock_backend: MockBackend) -> None:
    closed, other = trees
    attempts = [
        lambda: trtx.Builder(closed.logger, mock_backend),
        lambda: trtx.Runtime(closed.logger, mock_backend),
        lambda: other.config.add_optimization_profile(closed.profile),
        lambda: other.stream.wait(closed.event),
        lambda: other.event.record(closed.stream),
        lambda: other.event.elapsed_ms(closed.event),
        lambda: other.buffer.copy_from_host(SAMPLE, closed.stream),
        lambda: other.buffer.copy_to_host((1,), "f4", closed.stream),
        lambda: other.context.set_tensor_address("x", closed.buffer),
        lambda: other.context.enqueue_v3(closed.stream),
        lambda: trtx.Stream.from_handle(closed.device, 0, owner=None),
        lambda: trtx.DeviceBuffer.from_handle(closed.device, 256, 16, owner=None),
    ]
    for attempt in attempts:
        with pytest.raises(trtx.ClosedError):
            attempt()


def test_message_says_where_it_was_made(trees: Any) -> None:
    with pytest.raises(trtx.ClosedError, match=r"Engine#\d+ 'matmul' is closed; it was made at .*ownership\.py:\d+"):
        asyncio.run(trees[0].engine.infer({"x": SAMPLE}))
