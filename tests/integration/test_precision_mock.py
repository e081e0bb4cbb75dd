"""The same code for every precision on the mock: accuracy of the digits model, and the models of the GPU kit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from tests.precision_zoo import MODELS, PrecisionModel

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits" / "digits.onnx"
#: Top-1 on the held-out set may fall by that much.
ALLOWED = {"fp16": 0.001, "bf16": 0.01, "int8": 0.01, "fp8": 0.01, "int4-weights": 0.02}
PROFILE = [{"image": ((1, 1, 8, 8), (64, 1, 8, 8), (450, 1, 8, 8))}]


@pytest.fixture(scope="module")
def digits() -> Any:
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(DIGITS.parent))
    try:
        import digits_data
    finally:
        sys.path.remove(str(DIGITS.parent))
    return digits_data.load()


async def probabilities(backend: Any, images: Any, precision: str | None, **options: Any) -> Any:
    async with trtx.open_engine(
        DIGITS, backend, precision=precision, profiles=PROFILE, require_precision=precision is not None, **options
    ) as engine:
        return (await engine.infer({"image": images}))["probabilities"]


@pytest.mark.parametrize("method", ["entropy", "minmax", "percentile"])
@pytest.mark.parametrize("word", list(ALLOWED))
async def test_digits_keep_their_accuracy(word: str, method: str, digits: Any, mock_backend: Any) -> None:
    training, held_out = digits
    calibrated = word in ("int8", "fp8")
    if method != "entropy" and not calibrated:
        pytest.skip("nothing is calibrated")
    chosen = np.random.default_rng(0).permutation(len(training))[:128]
    options = {"calibration": trtx.Calibration(training.images[chosen], method=method)} if calibrated else {}
    plain = await probabilities(mock_backend, held_out.images, None)
    found = await probabilities(mock_backend, held_out.images, word, **options)
    before, after = (float((p.argmax(1) == held_out.labels).mean()) for p in (plain, found))
    assert before > 0.97
    assert before - after <= ALLOWED[word], f"{word} {method}: {before:.4f} became {after:.4f}"
    assert not np.array_equal(plain, found), "the error is that of the precision, not none"


@pytest.mark.parametrize("word", ["fp16", "bf16", "int8", "fp8", "int4-weights"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
async def test_models_of_the_kit(model: PrecisionModel, word: str, mock_backend: Any) -> None:
    source, feeds = model.source(), model.feeds()
    options = model.options(word)
    if word not in model.words:
        with pytest.raises(trtx.PrecisionError, match=r"this model has none|nothing in this model"):
            async with trtx.open_engine(source, mock_backend, precision=word, profiles=model.profiles, **options):
                pytest.fail("it was built")
        return
    async with trtx.open_engine(
        source, mock_backend, precision=word, profiles=model.profiles, require_precision=True, **options
    ) as engine:
        comparison = await trtx.compare(source, engine, [feeds])
    for name, error in comparison.outputs.items():
        assert error.snr_db > model.snr_db[word], f"{name}: {error}"
