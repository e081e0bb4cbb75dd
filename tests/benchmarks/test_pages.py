"""The page of benchmarks says what the results in the tree say."""

from __future__ import annotations

import pytest

from tests.benchmarks import pages


def test_the_page_is_what_the_results_give() -> None:
    page = pages.PAGE.read_text(encoding="utf-8")
    assert pages.with_results(page) == page, "run python -m tests.benchmarks.pages"


def test_pictures_and_results_are_there() -> None:
    for name in ("ladder", "batches", "lanes"):
        assert (pages.RESULTS / f"{name}.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")
    for path in pages.RESULTS.glob("*.json"):
        if path.stem != "agreement":
            assert pages.result(path.stem).complete


@pytest.mark.parametrize(
    ("value", "text"), [(26.884, "26.88"), (1234.5, "1,234"), (0.82641, "0.8264"), (55584.0, "55,584")]
)
def test_numbers(value: float, text: str) -> None:
    assert pages.number(value) == text
