"""BuilderOptions: what is checked at once, what a config makes of it, and what the mock refuses."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.ownership import PROFILE, SAMPLE, WEIGHTS, matmul_model
from trtx_py.cache import _content as content

SPEC = [PROFILE]


@pytest.fixture
def builder(mock_backend: MockBackend) -> Iterator[trtx.Builder]:
    with trtx.Builder(None, mock_backend) as made:
        yield made


def build(builder: trtx.Builder, **options: Any) -> trtx.Plan:
    with builder.create_network() as network:
        network.parse_onnx(matmul_model())
        with builder.create_config(trtx.BuilderOptions(profiles=SPEC, **options)) as config:
            return builder.build_serialized_network_sync(network, config)


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: trtx.BuilderOptions(refit="some"), "refit is 'some'; expected None or one of all, identical"),
    (lambda: trtx.BuilderOptions(strip_plan=True), 'give refit="all"'),
    (lambda: trtx.BuilderOptions(embed_runtime=False), "version_compatible plans only"),
    (lambda: trtx.BuilderOptions(embed_plugins=True), "no plugin_libraries to embed"),
    (lambda: trtx.BuilderOptions(plugin_libraries="lib.so"), "expected a sequence of paths"),  # type: ignore[arg-type]
    (lambda: trtx.BuilderOptions(plugin_libraries=(3,)), "one of plugin_libraries is int"),  # type: ignore[arg-type]
    (lambda: trtx.BuilderOptions(flags="TF32"), "flags is 'TF32'; expected a sequence of names"),  # type: ignore[arg-type]
    (lambda: trtx.BuilderOptions(tactic_sources=("not a name",)), "name of one of TensorRT's enumerators"),
    (lambda: trtx.BuilderOptions(tactic_dram_bytes=-1), "tactic_dram_bytes is -1; expected 0 to"),
    (lambda: trtx.BuilderOptions(threads=0), "threads is 0; expected 1 to"),
    (lambda: trtx.BuilderOptions(tiling=3), "tiling is 3"),  # type: ignore[arg-type]
    (lambda: trtx.BuilderOptions(tf32=1), "tf32 is 1; expected True or False"),  # type: ignore[arg-type]
    (lambda: trtx.BuilderOptions(timing_cache="x"), "timing_cache is str; expected TimingCache"),  # type: ignore[arg-type]
    (lambda: trtx.BuilderOptions(dla=0), "dla is int; expected DlaOptions"),  # type: ignore[arg-type]
    (lambda: trtx.BuilderOptions(preview_features={"X": 1}), "expected True or False"),  # type: ignore[dict-item]
    (lambda: trtx.BuilderOptions(preview_features=["X"]), "expected a mapping of names"),  # type: ignore[arg-type]
    (lambda: trtx.BuilderOptions(workspace_bytes=2**64), "workspace_bytes is .*; expected 0 to"),
    (lambda: trtx.BuilderOptions(max_tactics=2**31), "max_tactics is 2147483648; expected 1 to 2147483647"),
    (lambda: trtx.BuilderOptions(profiles=3), "profiles is int; expected a list of mappings"),  # type: ignore[arg-type]
    (lambda: trtx.BuilderOptions(profiles=PROFILE), "profiles is dict; expected a list"),  # type: ignore[arg-type]
    (lambda: trtx.BuilderOptions(plugin_creators=3), "plugin_creators is 3; expected a sequence"),  # type: ignore[arg-type]
    (lambda: trtx.BuilderOptions(tf32=True, precision="fp32"), "tf32 is True and precision 'fp32'"),
    (lambda: trtx.BuilderOptions(tf32=False, precision="tf32"), "tf32 is False and precision 'tf32'"),
    (lambda: trtx.BuilderOptions(refit="individual"), 'together with refit="individual"'),
    (lambda: trtx.BuilderOptions(refit="all", refittable_weights=("w",)), "and only then"),
    (lambda: trtx.BuilderOptions(refit="individual", refittable_weights="w"), "expected a sequence of names"),  # type: ignore[arg-type]
    (lambda: trtx.BuilderOptions(refit="individual", refittable_weights=(3,)), "expected names of weights"),  # type: ignore[arg-type]
    (lambda: trtx.DlaOptions(core=-1), "core is -1"),
    (lambda: trtx.DlaOptions(local_dram_bytes=-1), "local_dram_bytes is -1"),
    (lambda: trtx.TimingCache(b"x"), "TimingCache.path is bytes"),  # type: ignore[arg-type]
    (lambda: trtx.TimingCache("x", editable=1), "editable is 1"),  # type: ignore[arg-type]
    (lambda: trtx.EngineOptions(weight_streaming_bytes=-1), "weight_streaming_bytes is -1"),
]


@pytest.mark.parametrize(("make", "says"), WRONG, ids=[says for _, says in WRONG])
def test_nonsense_is_refused_at_once(make: Callable[[], object], says: str) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=says):
        make()


WRONG_LATER: list[tuple[Any, str]] = [
    ({"workspace_bytes": -1}, "workspace_bytes is -1"),
    ({"precision": "half"}, "precision is 'half'"),
    ({"compute_capabilities": ("x",)}, "compute capability is 'x'"),
    ({"profiles": [{}]}, "profile 0 is {}"),
    ({"profiles": [{"x": (1, 2)}]}, r"profile 0, 'x': \(1, 2\); expected three shapes"),
]


@pytest.mark.parametrize(("options", "says"), WRONG_LATER, ids=[says for _, says in WRONG_LATER])
def test_what_a_config_would_refuse_leaves_no_config(builder: trtx.Builder, options: Any, says: str) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=says):
        builder.create_config(trtx.BuilderOptions(**options))
    assert [item.kind for item in trtx.live_objects() if item.kind == "BuilderConfig"] == []


def test_only_options_are_options(builder: trtx.Builder) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match="options is dict; expected"):
        builder.create_config({"tf32": True})  # type: ignore[arg-type]


def test_options_become_attributes_flags_and_profiles(builder: trtx.Builder) -> None:
    options = trtx.BuilderOptions(
        workspace_bytes=1 << 20, optimization_level=2, max_aux_streams=1, compute_capabilities=("8.9", "12.0"),
        profiles=[PROFILE, PROFILE], flags=("debug",), tf32=True, sparse_weights=True, refit="identical",
        weight_streaming=True, version_compatible=True, embed_runtime=False, dla=trtx.DlaOptions(1),
        timing_cache=trtx.TimingCache("timings", editable=True, require_hit=True), tiling="full", threads=2,
    )  # fmt: skip
    with builder.create_config(options) as config:
        snapshot = config._snapshot()
        assert config.options is options
        assert (config.workspace_bytes, config.optimization_level, config.max_aux_streams) == (1 << 20, 2, 1)
        assert config.compute_capabilities == ("8.9", "12.0")
        assert len(config.optimization_profiles) == 2
        config.clear_flag("DEBUG")
    assert set(snapshot.flags) == {
        "DEBUG", "TF32", "SPARSE_WEIGHTS", "REFIT_IDENTICAL", "WEIGHT_STREAMING", "VERSION_COMPATIBLE",
        "EXCLUDE_LEAN_RUNTIME", "GPU_FALLBACK", "EDITABLE_TIMING_CACHE", "ERROR_ON_TIMING_CACHE_MISS",
    }  # fmt: skip
    assert snapshot.further == {
        "tf32": True, "dla": options.dla, "timing_cache": options.timing_cache, "tiling": "full", "threads": 2,
    }  # fmt: skip
    assert trtx.BuilderOptions(tf32=False).further == {"tf32": False}
    assert trtx.BuilderOptions().further == {}
    given: Any = {"threads": np.int64(2), "tactic_dram_bytes": np.int32(0)}
    numbers = trtx.BuilderOptions(**given).further
    assert numbers == {"threads": 2, "tactic_dram_bytes": 0}
    assert {type(one) for one in numbers.values()} == {int}


def test_options_do_not_change_behind_the_callers_back() -> None:
    features, libraries = {"aliased_plugin_io_10_03": True}, ["a.so"]
    options = trtx.BuilderOptions(preview_features=features, plugin_libraries=libraries)  # type: ignore[arg-type]
    features["x"] = False
    libraries.append("b.so")
    assert options.preview_features == {"ALIASED_PLUGIN_IO_10_03": True}
    assert options.plugin_libraries == ("a.so",)
    ranges: Any = {"x": ([1, 4], [2, 4], [8, 4])}
    options = trtx.BuilderOptions(profiles=(one for one in [ranges]), compute_capabilities=iter(["8.9"]))  # type: ignore[arg-type]
    ranges["x"][2][0] = 16
    ranges["y"] = ()
    assert options.profiles == ({"x": ((1, 4), (2, 4), (8, 4))},)
    assert options.compute_capabilities == ("8.9",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.tf32 = True  # type: ignore[misc]


def test_precision_and_tf32_do_not_contradict_each_other(builder: trtx.Builder) -> None:
    contrary: list[tuple[Any, str]] = [({"flags": ("TF32",)}, "fp32"), ({"tf32": False}, "tf32")]
    for options, precision in contrary:
        with builder.create_network() as network, builder.create_config(trtx.BuilderOptions(**options)) as config:
            network.parse_onnx(matmul_model())
            config.precision = precision
            with pytest.raises(trtx.InvalidArgumentError, match="TF32"):
                builder.build_serialized_network_sync(network, config)


def test_header_says_what_was_asked_for(builder: trtx.Builder) -> None:
    plan = build(builder, tiling="fast", preview_features={"ALIASED_PLUGIN_IO_10_03": True}, tf32=False)
    assert plan.header.build_options["tiling"] == "fast"
    assert plan.header.build_options["preview_features"] == {"ALIASED_PLUGIN_IO_10_03": True}
    assert plan.header.build_options["tf32"] is False


REFUSED_BY_THE_MOCK: dict[str, Any] = {
    "timing_cache": trtx.TimingCache("x"), "dla": trtx.DlaOptions(), "plugin_libraries": ("x.so",),
    "plugin_creators": (object(),), "account_memory": True, "hardware_compatibility": "ampere_plus",
    "runtime_platform": "windows_amd64", "engine_capability": "safety", "tactic_sources": ("CUBLAS",),
    "preview_features": {"FASTER_DYNAMIC_SHAPES_0805": True},
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), REFUSED_BY_THE_MOCK.items(), ids=REFUSED_BY_THE_MOCK)
def test_mock_refuses_by_name_what_tensorrt_rtx_lacks(builder: trtx.Builder, name: str, value: Any) -> None:
    with pytest.raises(trtx.BuilderError, match=rf"the mock (has no|refuses) {name}"):
        build(builder, **{name: value})


async def test_plugins_are_loaded_before_the_model_is_parsed(mock_backend: MockBackend) -> None:
    options = trtx.BuilderOptions(plugin_creators=(object(),))
    with pytest.raises(trtx.BuilderError, match="the mock has no plugin_creators"):
        async with trtx.open_engine(matmul_model(), mock_backend, builder_options=options, cache=False):
            raise AssertionError("nothing opens")
    assert mock_backend.calls["parse_onnx"] == 0
    with trtx.Builder(None, mock_backend) as builder:
        builder.load_plugins()  # nothing asked for, nothing refused
        with pytest.raises(trtx.InvalidArgumentError, match="one of plugin_libraries is int"):
            builder.load_plugins([3])  # type: ignore[list-item]


async def test_open_engine_takes_options(mock_backend: MockBackend) -> None:
    options = trtx.BuilderOptions(profiles=SPEC, refit="all", weight_streaming=True)
    async with trtx.open_engine(
        matmul_model(), mock_backend, builder_options=options, weight_streaming_bytes=0
    ) as engine:
        assert engine.io_tensors[0].ranges[0].max == (8, 4)
        assert engine.plan_header.build_options["flags"] == ["REFIT", "WEIGHT_STREAMING"]
        np.testing.assert_allclose((await engine.infer({"x": SAMPLE}))["y"], SAMPLE @ WEIGHTS, rtol=1e-5)


def test_what_cannot_be_told_apart_is_not_cached(tmp_path: Path) -> None:
    library = tmp_path / "plugins.so"
    library.write_bytes(b"first")
    first = content.builder_options(trtx.BuilderOptions(plugin_libraries=(library,)))
    library.write_bytes(b"second")
    assert content.builder_options(trtx.BuilderOptions(plugin_libraries=(library,))) != first
    for options in (
        trtx.BuilderOptions(plugin_creators=(object(),)), trtx.BuilderOptions(timing_cache=trtx.TimingCache("x")), None,
    ):  # fmt: skip
        with pytest.raises(content.UncacheableError):
            content.builder_options(options)
    assert content.builder_options(trtx.BuilderOptions(dla=trtx.DlaOptions()))["dla"]["core"] == 0


# Weights that stay on the host, and weights that change


async def test_weight_streaming_needs_a_plan_for_it(builder: trtx.Builder, mock_backend: MockBackend) -> None:
    async with trtx.Runtime(None, mock_backend) as runtime:
        with pytest.raises(trtx.EngineError, match="built without weight_streaming"):
            await runtime.deserialize(build(builder), weight_streaming_bytes=16)
        plan = build(builder, weight_streaming=True)
        async with await runtime.deserialize(plan) as whole:
            assert runtime.device.memory_statistics().current_bytes == whole._native.weights_bytes > 16
        async with await runtime.deserialize(plan, weight_streaming_bytes=16):
            assert runtime.device.memory_statistics().current_bytes == 16


async def test_refit_by_name_and_by_model(builder: trtx.Builder, mock_backend: MockBackend) -> None:
    import onnx

    plan = build(builder, refit="all")
    other = onnx.load_from_string(matmul_model())
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(WEIGHTS * 3, "w"))
    async with trtx.Runtime(None, mock_backend) as runtime:
        for by_model in (False, True):
            async with await runtime.deserialize(plan) as engine:
                async with engine.create_refitter() as refitter:
                    assert (refitter.names, refitter.missing) == (("w",), ())
                    if by_model:
                        refitter.set_onnx(other.SerializeToString())
                    else:
                        refitter.set_weights("w", WEIGHTS * 3)
                    await refitter.refit_async()
                found = (await engine.infer({"x": SAMPLE}))["y"]
            np.testing.assert_allclose(found, SAMPLE @ WEIGHTS * 3, rtol=1e-5)


async def test_refitter_is_one_threads_at_a_time(
    builder: trtx.Builder, mock_backend: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def slowly() -> None:
        reached.set()
        assert go_on.wait(30)

    async with (
        trtx.Runtime(None, mock_backend) as runtime,
        await runtime.deserialize(build(builder, refit="all")) as engine,
        engine.create_refitter() as refitter,
    ):
        monkeypatch.setattr(refitter._native, "refit", slowly)
        refitting = asyncio.create_task(refitter.refit_async())
        await asyncio.to_thread(reached.wait, 30)
        attempts: list[Callable[[], object]] = [
            lambda: refitter.set_weights("w", WEIGHTS),
            lambda: refitter.set_onnx(matmul_model()),
            refitter.refit,
        ]
        for attempt in attempts:
            with pytest.raises(trtx.BorrowedError, match="in use on another thread"):
                attempt()
        go_on.set()
        await refitting
        refitter.set_weights("w", WEIGHTS)


async def test_refit_of_single_weights(builder: trtx.Builder, mock_backend: MockBackend) -> None:
    with builder.create_network() as network:
        x = network.add_input("x", "float32", (1, 2, 3, 3))
        y = network.add_convolution_nd(x, 1, 1, np.ones(2, "f4"), np.zeros(1, "f4"), name="conv").output
        network.mark_output(y, "y")
        options = trtx.BuilderOptions(refit="individual", refittable_weights=("conv//bias",))
        with builder.create_config(options) as config:
            plan = builder.build_serialized_network_sync(network, config)
        options = trtx.BuilderOptions(refit="individual", refittable_weights=("conv",))
        says = "refittable_weights names conv; the network has no such weights"
        with builder.create_config(options) as config, pytest.raises(trtx.BuilderError, match=says):
            builder.build_serialized_network_sync(network, config)
    async with trtx.Runtime(None, mock_backend) as runtime, await runtime.deserialize(plan) as engine:
        async with engine.create_refitter() as refitter:
            assert refitter.names == ("conv//bias",)
            refitter.set_weights("conv//bias", np.full(1, 5, "f4"))
            refitter.refit()
        assert (await engine.infer({"x": np.zeros((1, 2, 3, 3), "f4")}))["y"][0, 0, 0, 0] == 5


async def test_model_of_another_type_is_no_refit(builder: trtx.Builder, mock_backend: MockBackend) -> None:
    import onnx

    other = onnx.load_from_string(matmul_model())
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(WEIGHTS.astype(np.float16), "w"))
    async with (
        trtx.Runtime(None, mock_backend) as runtime,
        await runtime.deserialize(build(builder, refit="all")) as engine,
    ):
        async with engine.create_refitter() as refitter:
            with pytest.raises(trtx.EngineError, match=r"'w' has \[4, 3\] of float32 there, \[4, 3\] of float16 here"):
                refitter.set_onnx(other.SerializeToString())
        np.testing.assert_allclose((await engine.infer({"x": SAMPLE}))["y"], SAMPLE @ WEIGHTS, rtol=1e-5)


async def test_refit_is_refused_where_it_would_be_wrong(builder: trtx.Builder, mock_backend: MockBackend) -> None:
    async with trtx.Runtime(None, mock_backend) as runtime:
        async with await runtime.deserialize(build(builder)) as engine:
            with pytest.raises(trtx.EngineError, match=r"BuilderOptions\(refit=\.\.\.\)"):
                engine.create_refitter()
        async with await runtime.deserialize(build(builder, refit="all")) as engine:
            async with engine.create_refitter() as refitter:
                with pytest.raises(trtx.InvalidArgumentError, match="no weights 'v'; there are w"):
                    refitter.set_weights("v", WEIGHTS)
                with pytest.raises(trtx.ShapeError, match="3 elements; expected 12"):
                    refitter.set_weights("w", WEIGHTS[0])
                with pytest.raises(trtx.DTypeError, match="are HALF; expected FLOAT"):
                    refitter.set_weights("w", WEIGHTS.astype(np.float16))
                await engine.infer({"x": SAMPLE})
                with pytest.raises(trtx.BorrowedError, match="refit before the first inference"):
                    refitter.refit()
            with pytest.raises(trtx.BorrowedError), engine.create_refitter():
                engine.close()
