"""A real builder (here: a stand-in that behaves like one) joined with the mock's runtime."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mock_backend import JoinedBackend, MockBackend, PlanPayload
from trtx_py._errors import BuilderError, ParserError, VersionMismatchError
from trtx_py._types import BuildOptions, ShapeRange
from trtx_py.backends.registry import backend_names

X = np.array([[-1, 2, -3, 4]], np.float32)
N4 = {"x": ShapeRange((1, 4), (2, 4), (8, 4))}


class RealLike(MockBackend):
    """A backend under another name that remembers what it built."""

    def __init__(self, **options):
        super().__init__(flavour="tensorrt_rtx", version="1.7.1.116", **options)
        self.plans = []

    def create_builder(self, log):
        builder = super().create_builder(log)
        build = builder.build_serialized_network

        def remember(network, options, progress):
            plan = build(network, options, progress)
            self.plans.append((plan, options))
            return plan

        monkey: Any = builder
        monkey.build_serialized_network = remember
        return builder


@pytest.fixture
def joined():
    backend = JoinedBackend(RealLike(), MockBackend(operators="any"))
    yield backend
    backend.mock.assert_clean()


def build(backend, model, options):
    builder = backend.create_builder(lambda severity, text: None)
    try:
        network = builder.create_network()
        try:
            network.parse_onnx(model, None)
            return builder.build_serialized_network(network, options, None)
        finally:
            network.destroy()
    finally:
        builder.destroy()


def test_info(joined):
    assert joined.info.name == joined.info.flavour == "tensorrt_rtx+mock"
    assert joined.info.version == "1.7.1.116"


def test_plan_tells_of_the_real_one(joined, models):
    plan = build(joined, models.relu(), BuildOptions(profiles=(N4,)))
    ((real, options),) = joined._real.plans
    assert options.compute_capabilities == ("8.9",)
    payload = PlanPayload.from_bytes(plan)
    assert payload.flavour == "tensorrt_rtx+mock"
    assert payload.real_plan == {"bytes": len(real), "sha256": hashlib.sha256(real).hexdigest()}
    assert tuple(plan[24:28]) == (1, 7, 1, 116)


def test_runs(joined, models):
    plan = build(joined, models.relu(), BuildOptions(profiles=(N4,)))
    driver = joined.driver
    driver.cuInit(0)
    driver.cuCtxPushCurrent(driver.cuDevicePrimaryCtxRetain(0))
    runtime = joined.create_runtime(lambda *_: None, device=0, lean_library=None, allow_host_code=False)
    assert (runtime.flavour, runtime.version) == ("tensorrt_rtx+mock", "1.7.1.116")
    engine = runtime.deserialize(plan)
    context = engine.create_context()
    context.set_input_shape("x", (1, 4))
    x, y = driver.cuMemAlloc(16), driver.cuMemAlloc(16)
    context.set_tensor_address("x", x)
    context.set_tensor_address("y", y)
    driver.cuMemcpyHtoDAsync(x, X.ctypes.data, 16, 0)
    context.execute_async_v3(0)
    result = np.zeros_like(X)
    driver.cuMemcpyDtoHAsync(result.ctypes.data, y, 16, 0)
    np.testing.assert_array_equal(result, np.maximum(X, 0))
    with pytest.raises(VersionMismatchError):
        runtime.deserialize(build(joined._real, models.relu(), BuildOptions(profiles=(N4,))))
    driver.cuMemFree(x)
    driver.cuMemFree(y)
    context.destroy()
    engine.destroy()
    runtime.destroy()
    driver.cuDevicePrimaryCtxRelease(0)


def test_the_real_errors_come_through(joined, models):
    from onnx import helper

    node = helper.make_node("Det", ["x"], ["y"], name="d")
    with pytest.raises(ParserError, match="tensorrt-rtx"):
        build(joined, models.make([node], [("x", "FLOAT", [2, 2])], [("y", "FLOAT", [])]), BuildOptions())
    with pytest.raises(BuilderError, match="profile"):
        build(joined, models.relu(), BuildOptions())
    joined._real.assert_clean()


def test_a_backend_that_cannot_build_cannot_be_joined():
    real = RealLike()
    real._info = dataclasses.replace(real.info, can_build=False)
    with pytest.raises(BuilderError, match="cannot build"):
        JoinedBackend(real)


def test_with_the_real_builder(models):
    """NVIDIA's own parser and builder, which need no GPU."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from trtx_py.backends.registry import resolve_backend

    joined = JoinedBackend(resolve_backend("tensorrt_rtx", need="build"))
    payload = PlanPayload.from_bytes(build(joined, models.relu(), BuildOptions(profiles=(N4,))))
    assert payload.compute_capabilities == ("8.9",)
    assert payload.tensors[0].ranges == (N4["x"],)
    assert payload.real_plan is not None
    assert payload.real_plan["bytes"] > 10_000
    with pytest.raises(ParserError) as caught:
        build(joined, models.relu().replace(b"Relu", b"Rela"), BuildOptions(profiles=(N4,)))
    assert [issue.operator for issue in caught.value.issues] == ["Rela"]
    joined.mock.assert_clean()


def test_every_joined_name_is_documented():
    root = Path(__file__).parents[3]
    for page in ("README.md", "docs/reference/environment.md"):
        text = (root / page).read_text(encoding="utf-8")
        assert [name for name in backend_names() if f"`{name}`" not in text] == []
