"""Use after close: every public method and property of every owned object is tried, new ones too."""

from __future__ import annotations

import asyncio
import inspect
import re
from typing import Any

import pytest

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.ownership import PROFILE, SAMPLE, grow_tree, matmul_model, shared_plan

#: What may be asked of a closed object: the rules of Resource itself, and what was known before and touches nothing.
ALLOWED = {
    "Resource": {"close", "aclose", "closed"},
    "Logger": {"severity", "log", "error", "warning", "info", "verbose", "attaching"},  # takes late lines, never raises
    "Builder": {"backend"},
    "BuilderConfig": {
        "workspace_bytes", "precision", "compute_capabilities", "optimization_level", "max_aux_streams",
        "profile_sharing", "flags", "optimization_profiles", "calibration", "precision_policy", "require_precision",
        "options",
    },
    "Network": set(),
    "OptimizationProfile": {"ranges"},
    "Runtime": {"backend", "device"},
    "Refitter": set(),
    "Engine": {"name", "io_tensors", "plan_header", "runtime", "statistics"},
    "ExecutionContext": {"engine"},
    "Device": {"ordinal", "memory_statistics", "pinned_statistics"},
    "Stream": {"device"},
    "Event": {"device"},
    "DeviceBuffer": {"nbytes", "device"},
    "PinnedBuffer": {"nbytes", "device"},
    "Slot": set(),
    "DeviceArray": {"shape", "dtype", "ndim", "size", "nbytes", "device"},
    # an alloc_rows that nobody entered has asked for nothing
    "DynamicBatcher": {"engine", "batch_sizes", "statistics", "alloc_rows"},
    "MultiDevice": {"devices", "io_tensors", "statistics", "alloc_inputs"},
}  # fmt: skip
#: Properties that may be read after close, and not set.
SETTERS = {"workspace_bytes": 1, "precision": "fp32", "compute_capabilities": ("8.9",), "optimization_level": 1,
           "max_aux_streams": 1, "profile_sharing": False, "calibration": None, "precision_policy": None,
           "require_precision": True}  # fmt: skip


@pytest.fixture
def trees(mock_backend: MockBackend) -> Any:
    """A closed tree and an open one, whose objects serve as arguments."""
    closed, other = grow_tree(mock_backend), grow_tree(mock_backend)
    closed.close()
    yield closed, other
    other.close()


@pytest.fixture
def others(trees: Any) -> dict[type, Any]:
    """Closed ones of the kinds that are made in passing, and of no part in the tree."""
    _, other = trees
    with other.engine.alloc_inputs({"x": (2, 4)}) as slot:
        array = trtx.DeviceArray.from_host(other.device, SAMPLE, other.stream)
        array.close()
    options = trtx.BuilderOptions(refit="all", profiles=[PROFILE])
    with other.builder.create_config(options) as config:
        plan = other.builder.build_serialized_network_sync(other.network, config)
    with other.runtime.deserialize_sync(plan) as engine, engine.create_refitter() as refitter:
        assert refitter.names == ("w",)
    batcher = trtx.DynamicBatcher(other.engine)
    batcher.close()
    return {
        trtx.Slot: slot, trtx.DeviceArray: array, trtx.Refitter: refitter, trtx.DynamicBatcher: batcher,
        trtx.MultiDevice: closed_pool(),
    }  # fmt: skip


def closed_pool() -> trtx.MultiDevice:
    async def open_and_close() -> trtx.MultiDevice:
        async with await trtx.MultiDevice.open(shared_plan(), backend="mock", devices=[0]) as pool:
            return pool

    return asyncio.run(open_and_close())


def test_what_is_entered_of_a_closed_object(others: dict[type, Any]) -> None:
    async def enter() -> None:
        with pytest.raises(trtx.ClosedError, match="closed"):
            async with others[trtx.MultiDevice].alloc_inputs({"x": (2, 4)}):
                pass
        with pytest.raises(trtx.ClosedError, match="closed"):
            async with others[trtx.DynamicBatcher].alloc_rows(1):
                pass

    asyncio.run(enter())


LAYER_PARAMETERS = """
input type op input1 input2 mode condition then_input else_input slopes to_type value alpha beta num_output_maps
kernel_shape kernel window_size input0 op0 op1 equation query key axes keep_dims bounds k axis scale bias window values
depth indices boxes scores max_output_boxes_per_class message start stride updates data pre_padding post_padding
sequence_lens grid tensor inputs _ __
"""


def arguments(method: Any, other: Any) -> dict[str, Any]:
    """Good values for the required parameters, by name; a new name must be added here."""
    samples = {
        "network": other.network, "config": other.config, "profile": other.profile, "plan": shared_plan(),
        "source": matmul_model(), "inputs": {"x": SAMPLE}, "name": "x", "shape": (2, 4), "min": (1, 4), "opt": (2, 4),
        "max": (3, 4), "stream": other.stream, "event": other.event, "end": other.event, "array": SAMPLE,
        "dtype": "float32", "nbytes": 16, "memory": other.buffer, "index": 0, "flag": "TF32", "handle": 0,
        "address": 256, "owner": None, "weights": SAMPLE, "device": other.device, "shapes": {"x": (2, 4)},
    }  # fmt: skip
    if isinstance(method.__self__, trtx.Network):
        samples |= dict.fromkeys(LAYER_PARAMETERS.split())  # nothing of them is looked at
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
def test_use_after_close(kind: type, trees: Any, others: dict[type, Any]) -> None:
    closed, other = trees
    target: Any = next((item for item in closed.objects().values() if type(item) is kind), others.get(kind))
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
