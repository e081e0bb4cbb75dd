"""The event loops that contenders run on, all in one thread, one at a time."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Loops:
    """asyncio's own loop and, where it is installed, uvloop's."""

    def __init__(self) -> None:
        self._loops: dict[str, asyncio.AbstractEventLoop] = {"asyncio": asyncio.new_event_loop()}
        try:
            uvloop: Any = importlib.import_module("uvloop")
        except ImportError:
            return
        self._loops["uvloop"] = uvloop.new_event_loop()

    @property
    def names(self) -> list[str]:
        return list(self._loops)

    def run(self, name: str, main: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end; the others stand still meanwhile."""
        return self._loops[name].run_until_complete(main)

    def close(self) -> None:
        for loop in self._loops.values():
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
