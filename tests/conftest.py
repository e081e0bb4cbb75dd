"""What all tests share: nothing may be left open, and where the models are."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import trtx_py as trtx

SHARED_KIT = Path(__file__).resolve().parents[2] / "shared" / "gpu-kit"


def kit_folder() -> Path | None:
    """The GPU kit's folder: TRTX_GPU_KIT, or beside the checkout, or None."""
    named = os.environ.get("TRTX_GPU_KIT")
    for folder in ([Path(named)] if named else []) + [SHARED_KIT]:
        if (folder / "cases.json").is_file():
            return folder
    return None


@pytest.fixture(autouse=True)
def _nothing_left_open() -> Iterator[None]:
    """Every test leaves ``live_objects()`` as it found it: empty."""
    yield
    gc.collect()
    left = trtx.live_objects()
    assert not left, "left open:\n" + "\n".join(map(str, left))
