"""Fixtures for tests that run on the mock. Loaded by pytest through the ``pytest11`` entry point; imports lazily."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ._backend import MockBackend

__all__ = ["mock_backend", "mock_backend_factory", "trtx_backend_env"]


@pytest.fixture
def mock_backend_factory() -> Iterator[Callable[..., MockBackend]]:
    """Makes backends: call it with MockBackend's keyword arguments.

    At the end of the test every backend made through it must be clean: nothing leaked, nothing damaged. A test that
    leaves things open on purpose makes its MockBackend itself.
    """
    from ._backend import MockBackend

    made: list[MockBackend] = []

    def make(**options: Any) -> MockBackend:
        backend = MockBackend(**options)
        made.append(backend)
        return backend

    yield make
    failures = []
    for backend in made:
        try:
            backend.assert_clean()
        except AssertionError as error:
            failures.append(str(error))
        backend.close()
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)


@pytest.fixture
def mock_backend(mock_backend_factory: Callable[..., MockBackend]) -> MockBackend:
    """A fresh MockBackend with default options; leaks and damage fail the test at its end."""
    return mock_backend_factory()


@pytest.fixture
def trtx_backend_env(monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes the mock the default backend of trtx_py for one test; the value of TRTX_BACKEND that it sets."""
    monkeypatch.setenv("TRTX_BACKEND", "mock")
    return "mock"
