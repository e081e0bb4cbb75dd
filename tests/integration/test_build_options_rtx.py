"""Build options, progress and plugins with the real tensorrt-rtx, which needs no GPU to build."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from tests.unit.ownership import PROFILE, matmul_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed (extra: rtx)"
)

BASE: dict[str, Any] = {"compute_capabilities": ("8.9",), "profiles": [PROFILE]}


def build(**options: Any) -> trtx.Plan:
    with trtx.Builder(None, "tensorrt_rtx") as builder, builder.create_network() as network:
        network.parse_onnx(matmul_model())
        with builder.create_config(trtx.BuilderOptions(**{**BASE, **options})) as config:
            return builder.build_serialized_network_sync(network, config)


HONOURED: list[dict[str, Any]] = [
    {"tactic_dram_bytes": 1 << 20, "tactic_shared_memory_bytes": 1 << 16},
    {"tactic_sources": ("jit_convolutions",)},
    {"timing_iterations": 2, "max_tactics": 3},
    {"tiling": "full", "tiling_l2_bytes": 1 << 20},
    {"preview_features": {"aliased_plugin_io_10_03": True}},
    {"profiling_verbosity": "detailed"},
    {"engine_capability": "standard", "threads": 2},
    {"sparse_weights": True, "weight_streaming": True, "tf32": False},
    {"version_compatible": True, "embed_runtime": False},
    {"compute_capabilities": ("8.0", "8.9", "12.0")},
    {"profiles": [PROFILE, {"x": ((8, 4), (16, 4), (32, 4))}]},
]


@pytest.mark.parametrize("options", HONOURED, ids=["+".join(options) for options in HONOURED])
def test_option_is_honoured(options: dict[str, Any]) -> None:
    assert len(build(**options)) > 1000


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hardware_compatibility": "ampere_plus"}, "refused hardware_compatibility: AMPERE_PLUS was asked for"),
    ({"runtime_platform": "windows_amd64"}, "refused runtime_platform"),
    ({"dla": trtx.DlaOptions()}, "finds 0 DLA cores here"),
    ({"timing_cache": trtx.TimingCache("timings")}, r"has no timing cache.*runtime_cache=path"),
    ({"tactic_sources": ("CUBLAS",)}, "has no tactic source CUBLAS; it has EDGE_MASK_CONVOLUTIONS"),
    ({"preview_features": {"PROFILE_SHARING_0806": True}}, "has no preview feature PROFILE_SHARING_0806"),
    ({"plugin_libraries": ("/nonexistent.so",)}, "could not load the plugin library '/nonexistent.so'"),
    ({"plugin_creators": (object(),)}, "has no addPluginV3 in its bindings"),
    ({"flags": ("FP16",)}, "has no builder flag FP16"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=[next(iter(options)) for options, _ in REFUSED])
def test_option_is_refused_by_name_and_version(options: dict[str, Any], says: str) -> None:
    with pytest.raises(trtx.BuilderError, match=rf"tensorrt_rtx 1\.\d+.* {says}"):
        build(**options)


def test_codes_of_a_failed_build() -> None:
    with pytest.raises(trtx.BuilderError) as caught:
        build(engine_capability="safety")
    assert caught.value.codes
    assert all(code.isupper() for code in caught.value.codes)
    assert caught.value.tensorrt_log


# Progress


def slow_network(network: trtx.Network) -> None:
    """Some convolutions, so that the build has steps to stop at."""
    x = network.add_input("x", "float32", (1, 16, 32, 32))
    kernel = np.random.default_rng(0).standard_normal((16, 16, 3, 3)).astype(np.float32)
    for _ in range(12):
        x = network.add_activation(network.add_convolution_nd(x, 16, 3, kernel, padding=1).output, "tanh").output
    network.mark_output(x, "y")


async def test_steps_of_a_real_build() -> None:
    async with trtx.Builder(None, "tensorrt_rtx") as builder, builder.create_network() as network:
        slow_network(network)
        async with builder.create_config(trtx.BuilderOptions(compute_capabilities=("8.9",))) as config:
            async with builder.build_stream(network, config) as stream:
                steps = [step async for step in stream]
            assert len(stream.plan) > 1000
    assert len(steps) > 3
    assert all(0 <= step.step <= step.steps for step in steps)
    assert len({step.phase for step in steps}) > 1


async def test_abort_ends_the_build_within_100_ms_of_its_next_step() -> None:
    """The time from the wish to stop until the block is left, at the best of a few: other processes share the cores."""
    best = float("inf")
    async with trtx.Builder(None, "tensorrt_rtx") as builder, builder.create_network() as network:
        slow_network(network)
        async with builder.create_config(trtx.BuilderOptions(compute_capabilities=("8.9",))) as config:
            for _ in range(4):
                async with builder.build_stream(network, config) as stream:
                    async for _step in stream:
                        break
                    asked = time.perf_counter()
                best = min(best, time.perf_counter() - asked)
                with pytest.raises(trtx.InvalidArgumentError, match="the build failed"):
                    _ = stream.plan
            assert builder.build_serialized_network_sync(network, config)  # the builder is none the worse
    assert best < 0.1


# Plugins


def test_plugin_written_in_python_is_refused_since_it_would_end_the_process() -> None:
    import tensorrt_rtx as trt

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = "FrobnicateForTests", "1", ""
            self.field_names = trt.PluginFieldCollection([])

    with trtx.Builder(None, "tensorrt_rtx") as builder:
        with pytest.raises(trtx.BuilderError, match=r"tensorrt_rtx 1\.\d+.* has no addPluginV3 in its bindings"):
            builder.load_plugins(creators=[Creator()])
        with pytest.raises(trtx.BuilderError, match=r"could not load the plugin library '/nonexistent\.so'"):
            builder.load_plugins(["/nonexistent.so"])
    assert not hasattr(trt.INetworkDefinition, "add_plugin_v3")
