"""All kinds of layers, and those of TensorRT's that are not among them."""

from __future__ import annotations

from typing import Any, NoReturn

from .._errors import InvalidArgumentError
from . import _pointwise, _products, _reductions, _sampling, _selection, _shaping
from ._checks import opened
from ._definition import LayerDefinition
from ._pointwise import PointwiseLayers
from ._products import ProductLayers
from ._reductions import ReductionLayers
from ._sampling import SamplingLayers
from ._selection import SelectionLayers
from ._shaping import ShapingLayers

TABLE: dict[str, LayerDefinition] = {
    **_pointwise.TABLE,
    **_products.TABLE,
    **_reductions.TABLE,
    **_sampling.TABLE,
    **_selection.TABLE,
    **_shaping.TABLE,
}

_BY_ONNX = "write this part as an ONNX model and parse that"


class AllLayers(PointwiseLayers, ProductLayers, ReductionLayers, SamplingLayers, SelectionLayers, ShapingLayers):
    """Every ``add_...`` method. Those that are refused say so, and what to do instead."""

    @opened
    def add_loop(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: InvalidArgumentError. Source: nvinfer1::INetworkDefinition::addLoop"""
        self._refuse("add_loop", "loops are not covered", f"{_BY_ONNX} (operators Loop and Scan)")

    @opened
    def add_if_conditional(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: InvalidArgumentError. Source: nvinfer1::INetworkDefinition::addIfConditional"""
        step = f"{_BY_ONNX} (operator If), or compute both branches and use add_select"
        self._refuse("add_if_conditional", "branches are not covered", step)

    @opened
    def add_rotary_embedding(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: InvalidArgumentError. Source: nvinfer1::INetworkDefinition::addRotaryEmbedding"""
        step = f"build it of add_slice, add_elementwise and add_concatenation, or {_BY_ONNX} (RotaryEmbedding)"
        self._refuse("add_rotary_embedding", "rotary embeddings are not covered", step)

    @opened
    def add_kv_cache_update(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: InvalidArgumentError. Source: nvinfer1::INetworkDefinition::addKVCacheUpdate"""
        self._refuse("add_kv_cache_update", "caches inside the engine are not covered", f"{_BY_ONNX} (TensorScatter)")

    @opened
    def add_dynamic_quantize(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: InvalidArgumentError. Source: nvinfer1::INetworkDefinition::addDynamicQuantize"""
        step = f"use add_quantize with a known scale, or {_BY_ONNX} (TRT_FP4DynamicQuantize)"
        self._refuse("add_dynamic_quantize", "scales that are found while running are not covered", step)

    @opened
    def add_moe(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: InvalidArgumentError. Source: nvinfer1::INetworkDefinition::addMoE"""
        self._refuse("add_moe", "mixtures of experts are not covered", f"{_BY_ONNX} (QMoE)")

    @opened
    def add_dist_collective(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: InvalidArgumentError. Source: nvinfer1::INetworkDefinition::addDistCollective"""
        step = "serve one engine on each device with trtx.MultiDevice"
        self._refuse("add_dist_collective", "collectives between devices are not covered", step)

    @opened
    def add_plugin_v3(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: InvalidArgumentError. Source: nvinfer1::INetworkDefinition::addPluginV3"""
        step = "parse an ONNX model whose node has the plugin's name as its operator; its creator is registered then"
        self._refuse("add_plugin_v3", "plugins as layers are not covered", step)

    def _refuse(self, method: str, what: str, step: str) -> NoReturn:
        raise InvalidArgumentError(f"{method} of {self._handle}: {what}; {step}")
