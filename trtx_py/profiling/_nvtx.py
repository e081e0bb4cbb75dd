"""Ranges for NVIDIA's tools (Nsight Systems), where somebody asks for them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from .._errors import BackendUnavailableError

_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


class Ranges(Protocol):
    """Marks spans of time by name; they may overlap and begin and end on different threads."""

    def span(self, name: str) -> AbstractContextManager[None]: ...


class NoRanges:
    """Ranges that nobody looks at."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """The same object that does nothing, each time."""
        return _NOTHING


class NvtxRanges:
    """Ranges of the domain "trtx_py", through the ``nvtx`` package.

    Process ranges, not those that a thread pushes and pops: requests of one event loop overlap.

    Raises:
        BackendUnavailableError: the package is not installed.
    Source: nvtxDomainRangeStartEx, nvtxDomainRangeEnd
    """

    def __init__(self) -> None:
        try:
            self._nvtx: Any = importlib.import_module("nvtx")
        except ImportError as error:
            raise BackendUnavailableError(
                "nvtx=True needs NVIDIA's nvtx package, which is not installed: pip install 'trtx-py[nvtx]', or leave "
                "nvtx=False"
            ) from error

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """One range, from here to the end of the block."""
        started = self._nvtx.start_range(message=name, domain="trtx_py")
        try:
            yield
        finally:
            self._nvtx.end_range(started)
