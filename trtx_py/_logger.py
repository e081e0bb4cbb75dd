"""The Logger: where TensorRT's lines go, and how they get into exceptions."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO

from ._arguments import checked_path
from ._errors import InvalidArgumentError, TrtxError
from ._resource import Handle, Resource, State
from ._types import Severity
from .backends.protocols import LogSink

Handler = Callable[[Severity, str], None]

_LEVELS = {
    Severity.INTERNAL_ERROR: logging.CRITICAL,
    Severity.ERROR: logging.ERROR,
    Severity.WARNING: logging.WARNING,
    Severity.INFO: logging.INFO,
    Severity.VERBOSE: logging.DEBUG,
}
_COLOURS = {
    Severity.INTERNAL_ERROR: "\x1b[1;31m",
    Severity.ERROR: "\x1b[31m",
    Severity.WARNING: "\x1b[33m",
    Severity.VERBOSE: "\x1b[90m",
}
_RESET = "\x1b[0m"
_MAX_COLLECTED = 50  # a failing build can log thousands of lines; the last ones hold the reason


@dataclass(eq=False)  # blocks are told apart by identity: two empty ones are not the same
class _Collector:
    thread: int
    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.lines.append(line)
        if len(self.lines) > _MAX_COLLECTED:
            del self.lines[0]


class Logger(Resource):
    """Receives TensorRT's log lines and hands them to Python's ``logging``, a file, a terminal or a function.

    Thread-safe: TensorRT logs from threads of its own. Lines at WARNING and above that arrive while a call runs also
    become part of the exception if that call fails (``TrtxError.tensorrt_log``).

    Args:
        severity: lines less severe than this are dropped.
        handler: None sends lines to the logger named ``name`` of Python's ``logging``; a ``logging.Handler`` receives
            records without going through the logging tree; a function receives ``(severity, message)``.
        file: path of a text file that gets every line with the local time in milliseconds, opened for appending.
        console: True, or a text stream, writes lines to standard error (or that stream) too, in colour where it is a
            terminal and NO_COLOR is not set.
        name: name of the ``logging`` logger.

    Raises:
        InvalidArgumentError: the file cannot be opened, or handler, console or name is of no known kind.

    Source: nvinfer1::ILogger
    """

    def __init__(
        self,
        severity: Severity = Severity.INFO,
        handler: logging.Handler | Handler | None = None,
        *,
        file: str | os.PathLike[str] | None = None,
        console: bool | IO[str] = False,
        name: str = "trtx_py.tensorrt",
    ) -> None:
        if handler is not None and not isinstance(handler, logging.Handler) and not callable(handler):
            raise InvalidArgumentError(
                f"handler is {type(handler).__name__}; expected None, a logging.Handler or a function"
            )
        given: object = console
        if not isinstance(given, bool) and given is not None and not callable(getattr(given, "write", None)):
            raise InvalidArgumentError(f"console is {console!r}; expected True, False or a text stream")
        if not isinstance(name, str):
            raise InvalidArgumentError(f"name is {name!r}; expected the name of a logging.Logger")
        # A number is no path: open() would take over, and close, a descriptor that is the caller's.
        path = None if file is None else checked_path(file, "log file")
        self._severity = _checked_severity(severity)
        self._handler = handler
        self._logging = logging.getLogger(name)
        self._lock = threading.Lock()
        self._collectors: list[_Collector] = []
        self._console: IO[str] | None = sys.stderr if console is True else (console or None)
        self._colour = _is_terminal(self._console) and not os.environ.get("NO_COLOR")
        self._file: IO[str] | None = None
        self._broken: set[str] = set()
        with self._opening(None) as handle:
            if path is not None:
                try:
                    opened = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by release
                except OSError as error:
                    raise InvalidArgumentError(
                        f"log file {path!r} cannot be opened for appending: {error.strerror}; "
                        "give a path in a folder that exists and can be written"
                    ) from error
                self._file = opened
                handle.release = opened.close

    @property
    def severity(self) -> Severity:
        """Least severe lines that are kept. May be set at any time."""
        return self._severity

    @severity.setter
    def severity(self, value: Severity) -> None:
        self._severity = _checked_severity(value)

    def log(self, severity: Severity, message: str) -> None:
        """Take one line, as TensorRT would give it. Never raises: a failing handler is reported once and skipped."""
        # Whoever logs must not fail over it: a severity or message of another type is taken as well as it can be.
        severity = _nearest_severity(severity)
        message = _as_text(message).rstrip()
        if severity <= Severity.WARNING:
            self._collect(message)
        if severity > self._severity:
            return
        self._guarded("handler", lambda: self._emit(severity, message))
        if self._file is not None or self._console is not None:
            now = datetime.datetime.now().isoformat(sep=" ", timespec="milliseconds")
            # Each line of a message gets the time, so that the file can be searched, sorted and merged by line.
            line = "\n".join(f"{now} {severity.name:<14} {part}" for part in message.splitlines() or [""])
            # One by one: a full disk must not silence the terminal.
            self._guarded("file", lambda: self._write_file(line))
            self._guarded("console", lambda: self._write_console(severity, line))

    def _sink(self) -> LogSink:
        """What native code logs to. It does not keep the logger, and through its handler perhaps all of an application,
        alive: native code lives until its owner is released, which for a collected owner must be able to happen.
        """
        reference = weakref.ref(self)

        def log(severity: Severity, message: str) -> None:
            logger = reference()
            if logger is not None:
                if severity <= logger._severity or severity <= Severity.WARNING:  # a build has thousands of lines
                    logger.log(severity, message)
            else:
                logging.getLogger("trtx_py.tensorrt").log(_LEVELS[severity], "%s", message)

        return log

    def error(self, message: str) -> None:
        """Log a line at ERROR."""
        self.log(Severity.ERROR, message)

    def warning(self, message: str) -> None:
        """Log a line at WARNING."""
        self.log(Severity.WARNING, message)

    def info(self, message: str) -> None:
        """Log a line at INFO."""
        self.log(Severity.INFO, message)

    def verbose(self, message: str) -> None:
        """Log a line at VERBOSE."""
        self.log(Severity.VERBOSE, message)

    @contextlib.contextmanager
    def attaching(self) -> Iterator[None]:
        """Attach what TensorRT logs in this block, at WARNING and above, to a TrtxError that leaves it.

        Lines from the calling thread belong to this block alone; lines from TensorRT's own threads, which cannot be
        told apart, to every block that is open at that moment.
        """
        collector = _Collector(threading.get_ident())
        with self._lock:
            self._collectors.append(collector)
        try:
            yield
        except TrtxError as error:
            if not error.tensorrt_log:
                error.tensorrt_log = tuple(collector.lines)
            raise
        finally:
            with self._lock:
                self._collectors.remove(collector)

    def _collect(self, line: str) -> None:
        here = threading.get_ident()
        with self._lock:
            own = [c for c in self._collectors if c.thread == here]
            # The innermost block of this thread is the call that is running.
            for collector in own[-1:] or self._collectors:
                collector.add(line)

    def _emit(self, severity: Severity, message: str) -> None:
        handler = self._handler
        if handler is None:
            self._logging.log(_LEVELS[severity], "%s", message)
        elif isinstance(handler, logging.Handler):
            record = self._logging.makeRecord(self._logging.name, _LEVELS[severity], "tensorrt", 0, message, (), None)
            if record.levelno >= handler.level:
                handler.handle(record)
        else:
            handler(severity, message)

    def _write_file(self, line: str) -> None:
        with self._lock:
            if self._file is not None and not self._file.closed:
                self._file.write(line + "\n")

    def _write_console(self, severity: Severity, line: str) -> None:
        with self._lock:
            if self._console is not None:
                colour = _COLOURS.get(severity, "") if self._colour else ""
                self._console.write(f"{colour}{line}{_RESET if colour else ''}\n")

    def _guarded(self, what: str, emit: Callable[[], None]) -> None:
        # A log line must never break an inference or cross into TensorRT as an exception, whatever the handler does.
        try:
            emit()
        except Exception:
            if what not in self._broken:
                self._broken.add(what)
                logging.getLogger("trtx_py").exception("the log %s of %s failed; said once", what, self._handle)


class _DefaultLogger(Logger):
    """What a builder or runtime without a logger of its own uses: nobody owns it, so nothing lists or closes it."""

    @contextlib.contextmanager
    def _opening(
        self, parent: Resource | None, *, name: str = "", internal: bool = False, kind: str | None = None
    ) -> Iterator[Handle]:
        self._handle = Handle("Logger", None, name="default")
        self._handle.state = State.OPEN
        yield self._handle

    def __del__(self) -> None:
        return


def _checked_severity(value: Severity) -> Severity:
    try:
        return Severity(value)
    except ValueError:
        known = ", ".join(f"Severity.{severity.name}" for severity in Severity)
        raise InvalidArgumentError(f"severity is {value!r}; expected one of {known}") from None


def _nearest_severity(value: object) -> Severity:
    try:
        return Severity(value)  # type: ignore[arg-type]  # anything may come
    except ValueError:
        return Severity.ERROR


def _as_text(message: object) -> str:
    if isinstance(message, str):
        return message
    try:
        return str(message)
    except Exception as error:  # __str__ of a foreign object
        return f"(a {type(message).__name__} whose text cannot be had: {type(error).__name__})"


def _is_terminal(stream: IO[str] | None) -> bool:
    try:
        return bool(stream is not None and stream.isatty())
    except (AttributeError, ValueError):  # a stand-in with write() only; a closed stream
        return False


_default: _DefaultLogger | None = None
_default_lock = threading.Lock()


def checked_logger(logger: Logger | None) -> Logger:
    """``logger``, or the default one for None."""
    global _default
    if logger is None:
        with _default_lock:
            _default = _default or _DefaultLogger()
            return _default
    if not isinstance(logger, Logger):
        raise InvalidArgumentError(f"logger is {type(logger).__name__}; expected a trtx_py.Logger or None")
    logger._handle.require_open()
    return logger


def owner_of(logger: Logger) -> Logger | None:
    """The object to be owned by: a logger of the caller's, or nobody for the default one."""
    return None if isinstance(logger, _DefaultLogger) else logger


logging.getLogger("trtx_py").addHandler(logging.NullHandler())
