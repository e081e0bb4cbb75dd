"""The progress bar of a build."""

from __future__ import annotations

import io

import pytest

import trtx_py as trtx
from mock_backend import MockBackend
from tests.unit.test_builder import Kit

pytest.importorskip("rich", reason="needs rich: pip install 'trtx-py[rich]'")

from rich.console import Console

from trtx_py.integrations.progress import BuildProgressBar


def test_bar_shows_the_phases_of_a_build(mock_backend: MockBackend) -> None:
    kit = Kit(mock_backend)
    drawn = io.StringIO()
    with BuildProgressBar(Console(file=drawn, force_terminal=True, width=100)) as bar:
        plan = kit.builder.build_serialized_network_sync(kit.network, kit.config, on_progress=bar)
    assert isinstance(plan, trtx.Plan)
    for text in ("Building engine from subgraph", "Tactic selection", "2/2"):
        assert text in drawn.getvalue()
    kit.network.close()
    kit.config.close()
    kit.builder.close()


def test_steps_beyond_what_was_announced() -> None:
    drawn = io.StringIO()
    with BuildProgressBar(Console(file=drawn, force_terminal=True, width=100)) as bar:
        bar("phase", 0, 0)
        bar("phase", 4, 3)
    assert "5/5" in drawn.getvalue()
