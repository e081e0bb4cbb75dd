"""Fixtures for tests that run on the mock. Loaded by pytest through the ``pytest11`` entry point; imports lazily."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ._backend import MockBackend

__all__ = ["mock_backend", "mock_backend_factory", "trtx_backend_env"]


@pytest.fixture
def _private_engine_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A test that plans a fault for a build must not find the plan of an earlier one, of this run or another."""
    monkeypatch.setenv("TRTX_CACHE_DIR", str(tmp_path_factory.mktemp("trtx-cache")))


@pytest.fixture
def mock_backend_factory(_private_engine_cache: None) -> Iterator[Callable[..., MockBackend]]:
    """Makes backends: call it with MockBackend's keyword arguments. The engine cache of the test is its own, and empty.

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
    if any(_failure(backend) for backend in made):
        _release_what_was_dropped()
    failures = []
    for backend in made:
        failure = _failure(backend)
        if failure:
            failures.append(failure)
        backend.close()
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)


def _failure(backend: MockBackend) -> str | None:
    try:
        backend.assert_clean()
    except AssertionError as error:
        return str(error)
    return None


def _release_what_was_dropped() -> None:
    """What the test dropped is no leak, but it goes in the collector's time and on trtx_py's reaper thread."""
    trtx_py = sys.modules.get("trtx_py")
    for _ in range(2):  # releasing an object can let go of others that only the collector finds
        gc.collect()
        if trtx_py is not None:
            trtx_py.live_objects()  # waits for the reaper


@pytest.fixture
def mock_backend(mock_backend_factory: Callable[..., MockBackend]) -> MockBackend:
    """A fresh MockBackend with default options; leaks and damage fail the test at its end."""
    return mock_backend_factory()


@pytest.fixture
def trtx_backend_env(_private_engine_cache: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes the mock the default backend of trtx_py for one test; the value of TRTX_BACKEND that it sets.

    The engine cache of the test is its own, and empty.
    """
    monkeypatch.setenv("TRTX_BACKEND", "mock")
    return "mock"
