"""What one run of a command has in common with every other: where its words go, and in which form."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from types import FrameType

    from rich.console import Console
    from rich.table import Table

#: TensorRT's own lines; at WARNING and above they are part of the exception, so by default nobody sees them twice.
_TENSORRT_LOG = "trtx_py.tensorrt"

#: So many times Ctrl-C asks, before it ends the event loop wherever that is.
_PATIENT_PRESSES = 2

_T = TypeVar("_T")


class OutputError(Exception):
    """What was printed did not reach whoever reads it: a full disk, mostly."""


@dataclass
class Session:
    """One run.

    Attributes:
        json: one JSON object on standard output, and nothing else there.
        debug: tracebacks instead of one line.
        verbose: log lines at INFO and below, TensorRT's among them.
        backend, device: what the command works with; None and 0 where nothing was said.
        answered: the JSON object was written.
        interrupted: what to say of what was left behind, if Ctrl-C ends the command now.
    """

    json: bool = False
    debug: bool = False
    verbose: bool = False
    backend: str | None = None
    device: int = 0
    answered: bool = False
    interrupted: str = "nothing was written"

    def answer(self, data: Any, show: Callable[[], None]) -> None:
        """The command's result: as one JSON object, or as ``show`` prints it. Raises OutputError, BrokenPipeError."""
        try:
            if self.json:
                self.answered = True
                click.echo(json_text(plain(data), indent=1))
            else:
                show()
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"standard output cannot be written: {error.strerror or error}") from error

    def note(self, text: str) -> None:
        """A line beside the result, on standard error."""
        click.echo(text, err=True)


def plain(value: Any) -> Any:
    """``value`` of dataclasses, enumerators and arrays' scalars as JSON knows it; infinities and NaN become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    listed = getattr(value, "tolist", None)
    if callable(listed):  # numpy's scalars and arrays
        return plain(listed())
    return str(value)


def json_text(data: Any, indent: int | None = None) -> str:
    """``data`` as JSON. Where it has what standard output cannot take, such as bytes of a file's name that are no text,
    all that is not ASCII is escaped."""
    text = json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")  # strict, whatever standard output does
    except UnicodeEncodeError:
        return json.dumps(data, indent=indent, allow_nan=False)
    return text


def console() -> Console:
    """Standard output, for tables; without colours where it is no terminal."""
    from rich.console import Console

    found = Console(file=sys.stdout, highlight=False)
    if not found.is_terminal:
        # What is read by another program must not be folded at 80 columns.
        found = Console(file=sys.stdout, highlight=False, width=200)
    return found


def table(*columns: str) -> Table:
    """An empty table with these headings."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def one_line_name(path: str) -> str:
    """A file's name; quoted if it has line breaks, or what a terminal would obey."""
    return path if path.isprintable() else repr(path)


def size_text(number: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


class _Lines(logging.Handler):
    """Log records on standard error, as it is when the record comes: tests and callers replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # a closed or full standard error must not end the command
            sys.stderr.write(f"trtx: {record.levelname.lower()}: {record.getMessage()}\n")


@contextlib.contextmanager
def logging_for(session: Session) -> Iterator[None]:
    """The library's warnings on standard error; with ``--verbose`` everything."""
    ours, tensorrt = logging.getLogger("trtx_py"), logging.getLogger(_TENSORRT_LOG)
    before = (ours.level, ours.propagate, tensorrt.level)
    handler = _Lines()
    ours.addHandler(handler)
    ours.propagate = False
    ours.setLevel(logging.DEBUG if session.verbose else logging.WARNING)
    tensorrt.setLevel(logging.NOTSET if session.verbose else logging.CRITICAL + 1)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.level, ours.propagate, tensorrt.level = before


def run_async(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end. Ctrl-C cancels it, so that a build stops, what was measured is saved, and everything
    is closed; a second one cancels that too, as far as it may be. The third, should nothing else help, ends the loop.

    asyncio raises KeyboardInterrupt at the second one, Python 3.10's at the first, wherever the program is just then:
    it may be in the line that was about to save something.
    """
    import asyncio  # not at the top: `trtx --help` does without
    import signal
    import threading

    presses = 0
    task: asyncio.Task[Any] | None = None

    async def main() -> _T:
        nonlocal task
        task = asyncio.current_task()
        return await work

    def pressed(number: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if task is None or task.done() or presses > _PATIENT_PRESSES:
            raise KeyboardInterrupt
        task.cancel()
        task.get_loop().call_soon_threadsafe(lambda: None)  # the signal alone would not end the wait for events

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, pressed)
    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        if not presses:
            raise
        raise KeyboardInterrupt from None
    finally:
        if task is None:  # Ctrl-C came before the loop got to it
            work.close()
        if ours and signal.getsignal(signal.SIGINT) is pressed:  # a server has handlers of its own
            signal.signal(signal.SIGINT, signal.default_int_handler)


def forget_stdout() -> None:
    """Nobody reads it any more, or its disk is full: what is still buffered is not written at exit, which would fail
    once more, outside of anybody's reach."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


__all__ = [
    "OutputError",
    "Session",
    "console",
    "forget_stdout",
    "json_text",
    "logging_for",
    "one_line_name",
    "plain",
    "run_async",
    "size_text",
    "table",
]
