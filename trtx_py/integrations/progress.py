"""A progress bar for builds, by rich. Extra: ``rich``.

with BuildProgressBar() as bar:
    plan = builder.build_serialized_network_sync(network, config, on_progress=bar)
"""

from __future__ import annotations

from types import TracebackType

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
except ImportError as error:
    raise ImportError(
        f"trtx_py.integrations.progress needs rich ({error}); install it with: pip install 'trtx-py[rich]'"
    ) from error

__all__ = ["BuildProgressBar"]


class BuildProgressBar:
    """What ``on_progress`` takes, and a context manager: a line for each phase of a build, with a bar.

    Args:
        console: where it is drawn; None is standard error. Nothing is drawn where that is no terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console or Console(stderr=True),
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> BuildProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, phase: str, step: int, steps: int) -> None:
        """A step was completed; on any thread."""
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(phase, total=steps)
        self._progress.update(self._tasks[phase], completed=step + 1, total=max(steps, step + 1))
