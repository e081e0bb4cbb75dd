"""The engine cache with the real TensorRT-RTX as the builder, on a machine without a GPU: plans for SM 8.9."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import trtx_py as trtx
from trtx_py.backends.tensorrt._builder import Builder as VendorBuilder

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed (extra: rtx)"
)

BACKEND = "tensorrt_rtx"
TARGET: dict[str, Any] = {"compute_capabilities": ("8.9",)}


def save_model(folder: Path, seed: int = 0) -> Path:
    """A convolution and a matrix product whose weights lie in a file beside the model; only that file has the seed."""
    rng = np.random.default_rng(seed)
    weights = {"k": rng.standard_normal((8, 3, 3, 3)), "w": rng.standard_normal((8, 4))}
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1]),
         helper.make_node("GlobalAveragePool", ["c"], ["p"]), helper.make_node("Flatten", ["p"], ["f"]),
         helper.make_node("MatMul", ["f", "w"], ["y"])], "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "small.onnx"
    (folder / "small.bin").unlink(missing_ok=True)
    onnx.save_model(model, path, save_as_external_data=True, location="small.bin", size_threshold=0)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> trtx.EngineCache:
    return trtx.EngineCache(tmp_path / "cache")


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often TensorRT-RTX really built."""
    counted: Counter[str] = Counter()
    build = VendorBuilder.build_serialized_network

    def counting(self: VendorBuilder, *arguments: Any) -> Any:
        counted["builds"] += 1
        return build(self, *arguments)

    monkeypatch.setattr(VendorBuilder, "build_serialized_network", counting)
    return counted


async def test_plan_is_found_again(cache: trtx.EngineCache, count: Counter[str], tmp_path: Path) -> None:
    path = save_model(tmp_path)
    built = await cache.plan(path, BACKEND, **TARGET)
    found = await cache.plan(path, BACKEND, **TARGET)
    assert (found, found.header) == (built, built.header)
    assert count["builds"] == 1
    (entry,) = cache.list()
    assert (entry.flavour, entry.compute_capabilities, entry.model) == ("tensorrt_rtx", ("8.9",), "small.onnx")
    assert entry.version == built.header.version


async def test_changed_weight_or_target_or_option_misses(
    cache: trtx.EngineCache, count: Counter[str], tmp_path: Path
) -> None:
    path = save_model(tmp_path)
    before = path.read_bytes()
    plans = [await cache.plan(path, BACKEND, **TARGET)]
    plans.append(await cache.plan(path, BACKEND, compute_capabilities=("8.6",)))
    plans.append(await cache.plan(path, BACKEND, compute_capabilities=("8.6", "8.9")))
    plans.append(await cache.plan(path, BACKEND, optimization_level=1, **TARGET))
    save_model(tmp_path, seed=1)
    assert path.read_bytes() == before
    plans.append(await cache.plan(path, BACKEND, **TARGET))
    assert count["builds"] == 5
    assert len({plan.sha256 for plan in plans}) == 5
    assert plans[-1].header.onnx_sha256 != plans[0].header.onnx_sha256


async def test_flipped_bit_is_built_again(cache: trtx.EngineCache, count: Counter[str], tmp_path: Path) -> None:
    path = save_model(tmp_path)
    await cache.plan(path, BACKEND, **TARGET)
    (name,) = os.listdir(os.path.join(cache.root, "plans"))
    file = tmp_path / "cache" / "plans" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    await cache.plan(path, BACKEND, **TARGET)
    assert count["builds"] == 2
    assert cache.verify().removed == {}


async def test_build_that_fails_keeps_nothing(cache: trtx.EngineCache, tmp_path: Path) -> None:
    path = save_model(tmp_path)
    with pytest.raises(trtx.BuilderError):
        await cache.plan(path, BACKEND, compute_capabilities=("3.5",))
    assert cache.list() == ()
    assert os.listdir(os.path.join(cache.root, "plans")) == os.listdir(os.path.join(cache.root, "locks")) == []


async def test_without_a_gpu_and_a_target_it_is_the_builders_own_error(cache: trtx.EngineCache, tmp_path: Path) -> None:
    if trtx.device_count(BACKEND):
        pytest.skip("there is a GPU")
    with pytest.raises(trtx.BuilderError, match="compute_capabilities"):
        await cache.plan(save_model(tmp_path), BACKEND)
    assert cache.list() == ()


async def test_joined_backend_serves_what_it_finds(count: Counter[str], tmp_path: Path) -> None:
    """NVIDIA's builder and the mock's runtime, through the default cache of open_engine."""
    path = save_model(tmp_path)
    sample = np.random.default_rng(5).standard_normal((2, 3, 16, 16)).astype(np.float32)
    results = []
    for _ in range(2):
        async with trtx.open_engine(path, "tensorrt_rtx+mock") as engine:
            results.append((await engine.infer({"x": sample}))["y"])
    assert count["builds"] == 1
    np.testing.assert_array_equal(results[0], results[1])
