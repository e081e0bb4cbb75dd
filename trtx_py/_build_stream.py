"""A build that is watched step by step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import anyio

from ._aio import Poster, loop_poster
from ._errors import InvalidArgumentError
from ._origin import with_origin
from ._plan import Plan

if TYPE_CHECKING:
    from ._builder import OnProgress


@dataclass(frozen=True)
class BuildStep:
    """A step of a build that was completed.

    Attributes:
        phase: TensorRT's name for what it does; phases lie inside each other.
        step: of that phase, from 0.
        steps: how many the phase has.
    """

    phase: str
    step: int
    steps: int


class BuildStream:
    """A build under way. Made by ``builder.build_stream(...)``, to be used with ``async with``.

    ``async for step in stream`` gives each BuildStep once and ends with the build, whose error it raises. ``plan`` is
    there then. Leaving the block earlier stops the build at its next step, and waits until it has.
    """

    def __init__(self, build: Callable[[OnProgress], Plan], abort: Callable[[], None]) -> None:
        self._build = build
        self._abort = abort
        self._post: Poster | None = None
        self._news = anyio.Event()
        self._steps: deque[BuildStep] = deque()
        self._done = False
        self._told = False
        self._plan: Plan | None = None
        self._error: BaseException | None = None

    @property
    def plan(self) -> Plan:
        """What was built. Raises InvalidArgumentError before the build has ended, and after one that failed."""
        if self._plan is None:
            raise InvalidArgumentError(
                "there is no plan: the build failed" if self._done else "the build goes on; iterate to its end first"
            )
        return self._plan

    async def __aenter__(self) -> BuildStream:
        if self._post is not None:
            raise InvalidArgumentError("this build has been started before; call build_stream again for another")
        self._post = loop_poster()
        threading.Thread(target=with_origin(self._run), name="trtx_py-build", daemon=True).start()
        return self

    def _run(self) -> None:
        try:
            self._plan = self._build(self._on_progress)
        except BaseException as error:  # handed to the awaiter, whatever it is
            self._error = error
        self._tell(None)

    def _on_progress(self, phase: str, step: int, steps: int) -> None:
        self._tell(BuildStep(phase, step, steps))

    def _tell(self, step: BuildStep | None) -> None:
        """From the building thread: ``step`` was completed, or with None the build has ended."""

        def note() -> None:
            if step is None:
                self._done = True
            else:
                self._steps.append(step)
            # Each event is set once, and whoever waits has the one of that time: several may.
            news, self._news = self._news, anyio.Event()
            news.set()

        assert self._post is not None
        if not self._post(note):
            self._abort()  # the loop is closed, and nobody will see the rest

    def __aiter__(self) -> BuildStream:
        return self

    async def __anext__(self) -> BuildStep:
        if self._post is None:
            raise InvalidArgumentError("the build has not been started; use: async with builder.build_stream(...)")
        while not self._steps and not self._done:
            await self._news.wait()
        if self._steps:
            return self._steps.popleft()
        self._raise_once()
        raise StopAsyncIteration

    def _raise_once(self) -> None:
        if self._error is not None and not self._told:
            self._told = True
            raise self._error

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._abort()
        cancelled: BaseException | None = None
        with anyio.CancelScope(shield=True):
            while not self._done:
                try:
                    await self._news.wait()
                except anyio.get_cancelled_exc_class() as again:  # asyncio's own, which goes through the shield
                    cancelled = again
        if cancelled is not None:
            raise cancelled
