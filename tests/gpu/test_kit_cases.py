"""Every case of the kit, through the engine and through a context of the caller's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.gpu.kit import Side, load_kit, run

_KIT = load_kit()
_CASES = [] if _KIT is None else _KIT.cases
_IDS = [f"{case['engine']}-{'x'.join(map(str, case['inputs'][0]['shape']))}" for case in _CASES]


@pytest.mark.parametrize("case", _CASES, ids=_IDS)
def test_case(side: Side, case: dict[str, Any], record: Callable[..., None]) -> None:
    inputs = side.kit.inputs(case)

    async def body() -> None:
        async with side.runtime() as runtime, await runtime.deserialize(side.plan(case["engine"])) as engine:
            by_engine = await engine.infer(inputs)
            timed = await engine.infer_timed(inputs)
            async with engine.create_execution_context() as context:
                by_context = await context.execute(inputs)
        errors = [side.kit.check(case, outputs) for outputs in (by_engine, timed.outputs, by_context)]
        assert 0 < timed.gpu_ms <= timed.latency_ms
        record(
            case["engine"], shape=str(case["inputs"][0]["shape"]), error=max(errors), allowed=case["relative_error"],
            latency_ms=timed.latency_ms, gpu_ms=timed.gpu_ms, result="pass",
        )  # fmt: skip

    run(body())


def test_three_dtypes(side: Side) -> None:
    case = side.kit.case("multi_io.fp16.vcx")

    async def body() -> None:
        async with side.runtime() as runtime, await runtime.deserialize(side.plan(case["engine"])) as engine:
            outputs = await engine.infer(side.kit.inputs(case))
            assert {t.name: t.dtype.numpy for t in engine.io_tensors if t.name in outputs} == {
                name: array.dtype for name, array in outputs.items()
            }
        found = {name: array.dtype.name for name, array in outputs.items()}
        assert found == {"sum": "float32", "floor": "int32", "half": "float16"}

    run(body())


def test_shape_tensor_is_read_on_the_host(side: Side) -> None:
    """Its values give the output's shape; the model expands x to it and doubles it."""
    x = np.arange(4, dtype=np.float32).reshape(1, 4)

    async def body() -> None:
        async with side.runtime() as runtime, await runtime.deserialize(side.plan("shape_input.fp32.vcx")) as engine:
            (tensor,) = [t for t in engine.io_tensors if t.name == "shape"]
            assert tensor.is_shape_tensor
            assert tensor.location.value == "host"
            for rows in (5, 3, 5):
                outputs = await engine.infer({"x": x, "shape": np.array([rows, 4], np.int32)})
                np.testing.assert_array_equal(outputs["y"], np.repeat(2 * x, rows, 0))

    run(body())


def test_two_profiles_with_switching(side: Side, record: Callable[..., None]) -> None:
    plan = side.plan("mlp_profiles.fp32.vcx")
    x = np.random.default_rng(7).standard_normal((256, 64)).astype(np.float32)
    rows = (1, 256, 8, 9, 3, 100)

    async def body() -> None:
        async with side.runtime() as runtime, await runtime.deserialize(plan) as engine:
            assert engine.num_optimization_profiles == 2
            whole = (await engine.infer({"x": x}))["y"]
            for n in rows:
                part = (await engine.infer({"x": x[:n]}))["y"]
                assert side.kit.error({"y": part}, {"y": whole[:n]}) < 5e-3
            switches = engine.statistics().profile_switches
            assert switches >= 5
            async with engine.create_execution_context() as context:
                for n in rows:
                    part = (await context.execute({"x": x[:n]}))["y"]
                    assert context.active_optimization_profile == (0 if n <= 8 else 1)
                    assert side.kit.error({"y": part}, {"y": whole[:n]}) < 5e-3
                context.set_optimization_profile(0)
                assert context.active_optimization_profile == 0
        record("mlp_profiles: switching", switches=switches, result="pass")

    run(body())
