"""The kit's sections go through on the mock: figures mean nothing there, files and checks do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpu.kit import load_kit
from trtx_py.benchmark import load_result

from .agreement import main as agreement
from .runner import SECTIONS, main

pytestmark = [pytest.mark.models, pytest.mark.skipif(load_kit() is None, reason="needs the GPU kit: TRTX_GPU_KIT")]


def test_sections_leave_results_as_json_markdown_and_html(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), "--rehearse", "--only", "mlp_batches", "mlp_batcher"]) == 0
    swept = load_result(tmp_path / "mlp_batches.json")
    assert {each.status for each in swept.contenders} == {"measured"}
    assert not swept.meaningful
    assert "MOCK BACKEND" in (tmp_path / "mlp_batcher.md").read_text()


def test_figures_are_put_beside_those_from_outside(tmp_path: Path) -> None:
    assert agreement(["--out", str(tmp_path), "--rehearse", "--only", "mlp"]) == 0
    assert json.loads((tmp_path / "agreement.json").read_text())["mlp"]["latency"]["ratio"] > 0


@pytest.mark.parametrize("name", SECTIONS)
def test_sections_have_contenders_with_names_of_their_own(name: str) -> None:
    names = [contender.name for contender in SECTIONS[name][1](lambda engine: b"plan")]
    assert len(names) == len(set(names)) >= 2
