from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

import trtx_py as trtx
from trtx_py.backends.registry import resolve_backend


@pytest.fixture
def nothing_stays_open() -> Iterator[None]:
    """Neither objects of trtx_py nor what the mock had to make for them; and nothing that would end a real process."""
    mock: Any = resolve_backend("mock", need="run")
    before = mock.leaks(), mock.damage()
    yield
    if trtx.live_objects():
        gc.collect()  # a cycle may hold them
    assert trtx.live_objects() == []
    assert (mock.leaks(), mock.damage()) == before
