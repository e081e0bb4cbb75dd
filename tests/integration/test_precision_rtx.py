"""Every precision through NVIDIA's own parser and builder, without a GPU: types, and no numbers."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

import trtx_py as trtx
from tests.precision_zoo import MODELS, WORDS, PrecisionModel
from tests.quantize_models import cnn, images, recurrent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed (extra: rtx)"
)
TYPES = {"fp16": "HALF", "bf16": "BF16", "int8": "INT8", "fp8": "FP8", "int4-weights": "INT4"}


async def build(source: bytes, word: str, profiles: Any, capability: str = "8.9", **options: Any) -> trtx.Plan:
    """A plan whose precisions were read from TensorRT-RTX's own network, and required."""
    with (
        trtx.Builder(backend="tensorrt_rtx") as builder, builder.create_network() as network,
        builder.create_config() as config,
    ):  # fmt: skip
        await network.parse_onnx_async(source)
        config.precision, config.require_precision = word, True
        config.compute_capabilities = (capability,)
        for name, value in options.items():
            setattr(config, name, value)
        for ranges in profiles or ():
            with builder.create_optimization_profile() as profile:
                for name, limits in ranges.items():
                    profile.set_shape(name, *limits)
                config.add_optimization_profile(profile)
        return await builder.build_serialized_network(network, config)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
async def test_it_builds_in_the_precision(model: PrecisionModel, word: str) -> None:
    source, options = model.source(), model.options(word)
    if word not in model.words:
        with pytest.raises(trtx.PrecisionError):
            await build(source, word, model.profiles, **options)
        return
    plan = await build(source, word, model.profiles, **options)
    layers = plan.header.build_options["layers_by_precision"]
    assert layers[TYPES[word]] >= 1, layers
    assert plan.header.precision == word
    assert {t.dtype for t in plan.header.io_tensors} == {t.dtype for t in await border(source)}


async def border(source: bytes) -> tuple[trtx.TensorInfo, ...]:
    with trtx.Builder(backend="tensorrt_rtx") as builder, builder.create_network() as network:
        await network.parse_onnx_async(source)
        return network.inputs + network.outputs


@pytest.mark.parametrize(
    ("word", "capability", "needed"), [("fp8", "8.6", "8.9"), ("bf16", "7.5", "8.0"), ("int4-weights", "7.5", "8.0")]
)
async def test_architectures_that_lack_a_type_are_named(word: str, capability: str, needed: str) -> None:
    options = {"calibration": trtx.Calibration(images())} if word == "fp8" else {}
    says = rf"tensorrt_rtx \S+ cannot build precision='{word}' for compute capability {capability}: it needs {needed}"
    with pytest.raises(trtx.PrecisionError, match=says):
        await build(cnn().SerializeToString(), word, None, capability, **options)


@pytest.mark.parametrize("word", ["fp16", "bf16"])
async def test_products_before_and_behind_an_lstm(word: str) -> None:
    plan = await build(recurrent().SerializeToString(), word, None)
    assert plan.header.build_options["layers_by_precision"][TYPES[word]] >= 2
