"""The C ABI: trtxpy_dispatch over C0, and while a Python thread burns the interpreter lock."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from tests.gpu.kit import BACKEND

from .bare_contenders import P0, Bench, C0Event, C0Flag
from .capi_client import Client, Dispatch, WithBurner
from .checks import Contender, Reference
from .mock_engine import SHAPE, small_model
from .rig import Rig, Settings, interleave
from .samples import Samples, compare
from .workloads import Inputs, Workload


def _compared(samples: dict[str, Samples], plain: str, burnt: str) -> dict[str, Any]:
    return compare(samples[burnt], samples[plain])


def run_capi(rig: Rig, workload: Workload) -> dict[str, Any]:
    """One engine at one shape, interleaved with both C loops over bare driver calls."""
    inputs = Inputs(rig.kit, workload)
    with contextlib.ExitStack() as undo:
        engine = rig.bare.deserialize(rig.plan_bytes(workload.engine))
        bench = Bench(rig.bare, rig.floor, engine, inputs.shapes, inputs.first)
        undo.callback(bench.close)
        client = Client(BACKEND, rig.lean_library)
        undo.callback(client.close)
        graph = undo.enter_context(client.graph(rig.plan_bytes(workload.engine), is_plan=True))
        in_place = Dispatch(client, graph, inputs.shapes, in_place=True)
        undo.callback(in_place.close)
        copied = Dispatch(client, graph, inputs.shapes, in_place=False)
        undo.callback(copied.close)
        burnt = WithBurner(in_place)
        contenders: list[Contender] = [C0Event(bench), C0Flag(bench), in_place, copied, burnt]
        reference = Reference(P0(bench), inputs)
        result: dict[str, Any] = {
            "engine": workload.engine,
            "shapes": {name: list(shape) for name, shape in inputs.shapes.items()},
            "errors_to_p0": reference.check(contenders, second=False),
        }
        if rig.settings.check_only:
            return result
        rounds, count = rig.settings.rounds(workload)
        for each in (in_place, copied):
            each.fill(inputs.first)
        bench.lane.fill(inputs.first)
        samples = interleave(contenders, rounds, count)
        result["errors_to_p0_changed_inputs"] = reference.check(contenders, second=True)
        c0 = min(("c0_event", "c0_flag"), key=lambda name: samples[name].percentile(50))
        result["c0"] = c0
        result["contenders"] = {
            name: each.summary() | {"over_c0": compare(each, samples[c0])} for name, each in samples.items()
        }
        result["burnt_over_plain"] = _compared(samples, in_place.name, burnt.name)
    return result


def run_capi_on_mock(settings: Settings) -> dict[str, Any]:
    """On the mock that computes nothing: what the library itself takes, and that the lock has no part in it."""
    model = small_model()
    with contextlib.ExitStack() as undo:
        client = Client("mock:instant")
        undo.callback(client.close)
        graph = undo.enter_context(client.graph(model, is_plan=False))
        in_place = Dispatch(client, graph, {"x": SHAPE}, in_place=True)
        undo.callback(in_place.close)
        copied = Dispatch(client, graph, {"x": SHAPE}, in_place=False)
        undo.callback(copied.close)
        zeros = in_place.outputs({"x": np.ones(SHAPE, np.float32)})
        if any(array.any() for array in zeros.values()):
            raise AssertionError("the mock that computes nothing gives zeros, and this was something else")
        contenders: list[Contender] = [in_place, copied, WithBurner(in_place)]
        samples = interleave(contenders, settings.count(40, 20), settings.count(5000, 2000))
        return {
            "contenders": {name: each.summary() for name, each in samples.items()},
            "burnt_over_plain": _compared(samples, in_place.name, contenders[2].name),
        }
