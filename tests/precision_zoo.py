"""Models that every precision is tried on: the GPU kit's, bert_small from its models.py, a small CNN, the digits."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from tests.conftest import kit_folder
from tests.model_zoo import KIT
from tests.quantize_models import cnn, images

WORDS = ("fp16", "bf16", "int8", "fp8", "int4-weights")
ROOT = Path(__file__).resolve().parents[1]
#: Signal to noise that each precision must leave on the mock, in dB; measured values lie some dB above.
SNR = {"fp16": 45.0, "bf16": 25.0, "int8": 15.0, "fp8": 15.0, "int4-weights": 5.0}
#: What has neither a product to quantize nor a matrix to store in 4 bits.
_WITHOUT_PRODUCTS = ("multi_io", "scale_big", "shape_input")
_WITHOUT_MATRICES = (*_WITHOUT_PRODUCTS, "superres", "silero_seq")


@dataclass(frozen=True)
class PrecisionModel:
    """A model, and what each precision makes of it.

    Attributes:
        words: precisions that it can have; the others are refused.
        snr_db: by precision.
    """

    name: str
    words: tuple[str, ...] = WORDS
    snr_db: Mapping[str, float] = None  # type: ignore[assignment]  # set below

    def __post_init__(self) -> None:
        object.__setattr__(self, "snr_db", SNR)

    def source(self) -> bytes:
        """Skips the test if the model is not on this machine."""
        if self.name == "digits":
            return (ROOT / "examples" / "digits" / "digits.onnx").read_bytes()
        if self.name == "small_cnn":
            return cnn().SerializeToString()
        if self.name == "bert_small":
            return _bert()
        return _KIT[self.name].source()

    @property
    def profiles(self) -> Any:
        """For ``open_engine``."""
        if self.name == "digits":
            return [{"image": ((1, 1, 8, 8), (8, 1, 8, 8), (32, 1, 8, 8))}]
        if self.name == "small_cnn":
            return [{"image": ((1, 1, 8, 8), (8, 1, 8, 8), (32, 1, 8, 8))}]
        if self.name == "bert_small":
            return [dict.fromkeys(("input_ids", "attention_mask"), ((1, 8), (2, 16), (8, 64)))]
        return _KIT[self.name].profiles()

    def feeds(self) -> dict[str, Any]:
        """One inference's inputs, the same each time."""
        rng = np.random.default_rng(7)
        if self.name == "digits":
            return {"image": rng.uniform(0, 16, (8, 1, 8, 8)).astype(np.float32)}
        if self.name == "small_cnn":
            return {"image": images(8)}
        if self.name == "bert_small":
            mask = np.ones((2, 16), np.int32)
            mask[1, 9:] = 0
            return {"input_ids": rng.integers(0, 8192, (2, 16)).astype(np.int32), "attention_mask": mask}
        return dict(_KIT[self.name].inputs())

    def options(self, word: str) -> dict[str, Any]:
        """What the word needs: calibration with the inputs themselves, since these models have no data; by the quick
        method, since the other's threshold is tested by itself."""
        return {"calibration": trtx.Calibration([self.feeds()], method="minmax")} if word in ("int8", "fp8") else {}


@cache
def _bert() -> bytes:
    kit = kit_folder()
    if kit is None:
        pytest.skip("no GPU kit here: neither TRTX_GPU_KIT nor ../shared/gpu-kit")
    spec = importlib.util.spec_from_file_location("kit_models", kit / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    blob: bytes = module.bert().SerializeToString()
    return blob


def _words(name: str) -> tuple[str, ...]:
    if name in _WITHOUT_PRODUCTS:
        return ("fp16", "bf16")
    return tuple(w for w in WORDS if w != "int4-weights") if name in _WITHOUT_MATRICES else WORDS


_KIT = {model.name: model for model in KIT if model.rtx is None}
MODELS = tuple(PrecisionModel(name, _words(name)) for name in ("digits", "small_cnn", "bert_small", *_KIT))
