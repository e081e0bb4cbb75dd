"""Tests of classifier.py that need no GPU: the fixture comes with trtx_py's pytest plugin.

pip install ".[mock]" pytest pytest-asyncio    # in a checkout of trtx_py
pytest examples/ci_with_mock
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from classifier import DigitReader

import trtx_py as trtx
from mock_backend import MockBackend

MODEL = Path(__file__).parents[1] / "digits" / "digits.onnx"
PROFILE = {"image": ((1, 1, 8, 8), (1, 1, 8, 8), (4, 1, 8, 8))}


def one() -> npt.NDArray[np.float32]:
    """A vertical stroke."""
    image = np.zeros((8, 8), np.float32)
    image[:, 3:5] = 16
    return image


@pytest.mark.asyncio
async def test_reads_a_one(mock_backend: MockBackend) -> None:
    async with trtx.open_engine(MODEL, backend=mock_backend, profiles=[PROFILE]) as engine:
        assert await DigitReader(engine).read([one(), one()]) == [1, 1]


@pytest.mark.asyncio
async def test_a_shape_that_the_gpu_would_refuse_is_refused(mock_backend: MockBackend) -> None:
    async with trtx.open_engine(MODEL, backend=mock_backend, profiles=[PROFILE]) as engine:
        with pytest.raises(trtx.ShapeError, match="image"):
            await engine.infer({"image": np.zeros((5, 1, 8, 8), np.float32)})
