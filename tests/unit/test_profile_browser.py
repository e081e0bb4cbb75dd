"""The page in a real browser, narrow and wide: no error, nothing fetched, every plot drawn, no name obeyed."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest

import trtx_py as trtx
from tests.browser import find_browser, look
from tests.unit.profile_reports import WICKED, batched, report, wicked
from trtx_py.profiling import ProfileReport, profile

pytestmark = pytest.mark.slow

_DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits" / "digits.onnx"


async def _profiled() -> ProfileReport:
    async with trtx.open_engine(_DIGITS, backend="mock", lanes=2) as engine:
        return await profile(engine, {"image": np.zeros((4, 1, 8, 8), np.float32)}, requests=200, concurrency=3)


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("kind", ["profiled", "filled", "batched", "wicked"])
def test_page_in_a_browser(kind: str, width: int, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    browser = find_browser()
    if browser is None:
        pytest.skip("no Chromium here, and TRTX_BROWSER names none")
    if kind == "profiled":
        made = asyncio.run(_profiled())
    else:
        made = {"filled": report, "batched": batched, "wicked": wicked}[kind]()
    page = tmp_path / "page.html"
    made.write_html(page)
    seen = look(page, width, browser)
    if os.environ.get("OUT"):
        (Path(os.environ["OUT"]) / f"profile-{kind}-{width}.png").write_bytes(seen.png)
    assert seen.problems == []
    assert seen.requests == []
    assert seen.overflow == 0
    assert len(seen.plots) >= 5
    for wide, high, marks in seen.plots:
        assert 0.8 * min(width, 1240) < wide <= width
        assert high >= 150
        assert marks >= 1
    if kind == "wicked":
        assert WICKED.replace("\x1b", "") in seen.text.replace("\x1b", "")
