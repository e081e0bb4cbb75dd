"""Routes TensorRT's log lines to whoever asked for the work that caused them.

TensorRT keeps the first logger it is given for the whole process, whatever logger a later builder or runtime brings.
So each vendor module gets one logger that lives forever, and this router behind it decides where a line goes.
"""

from __future__ import annotations

import logging
import threading
from types import TracebackType

from ..._types import Severity
from ..protocols import LogSink

_log = logging.getLogger("trtx_py")
_LEVELS = tuple(Severity)


class Operation:
    """One call into TensorRT: lines logged by its thread go to its sink, errors and warnings are kept in ``lines``,
    ``errors`` counts the errors, and ``codes`` has their names where an IErrorRecorder tells them.

    Lines from TensorRT's own threads cannot be told apart; they are kept if no other operation runs. What a sink or
    another callback raised that must not be swallowed (KeyboardInterrupt) is raised again on exit.
    """

    __slots__ = ("_router", "codes", "errors", "failure", "lines", "sink")

    def __init__(self, router: LogRouter, sink: LogSink) -> None:
        self._router = router
        self.sink = sink
        self.lines: list[str] = []
        self.errors = 0
        self.codes: list[str] = []
        self.failure: BaseException | None = None

    def keep(self, severity: Severity, message: str) -> None:
        """Remember a line for the error that may follow."""
        if severity <= Severity.WARNING:
            self.lines.append(message)
        if severity <= Severity.ERROR:
            self.errors += 1

    def __enter__(self) -> Operation:
        self._router.push(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._router.pop(self)
        if error is None and self.failure is not None:
            raise self.failure


class _Running(threading.local):
    def __init__(self) -> None:
        self.stack: list[Operation] = []


class LogRouter:
    """Thread-safe; takes no lock on the way of a line, since TensorRT may log from a destructor at any moment."""

    def __init__(self) -> None:
        self._running = _Running()
        self._lock = threading.RLock()
        self._sinks: tuple[LogSink, ...] = ()
        self._operations: tuple[Operation, ...] = ()

    def open(self, sink: LogSink) -> None:
        """A builder or runtime with this sink came to be; to be closed as often as opened."""
        with self._lock:
            self._sinks = (*self._sinks, sink)

    def close(self, sink: LogSink) -> None:
        """A builder or runtime with this sink is gone."""
        with self._lock:
            sinks = list(self._sinks)
            if sink in sinks:
                sinks.remove(sink)
            self._sinks = tuple(sinks)

    def operation(self, sink: LogSink) -> Operation:
        """A context manager around one call into TensorRT."""
        return Operation(self, sink)

    def push(self, operation: Operation) -> None:
        self._running.stack.append(operation)
        with self._lock:
            self._operations = (*self._operations, operation)

    def pop(self, operation: Operation) -> None:
        self._running.stack.remove(operation)
        with self._lock:
            self._operations = tuple(other for other in self._operations if other is not operation)

    def note_code(self, code: str) -> None:
        """The error whose line comes next has this code. Raises nothing, as ``emit``."""
        stack, operations = self._running.stack, self._operations
        if stack:
            stack[-1].codes.append(code)
        elif len(operations) == 1:
            operations[0].codes.append(code)

    def emit(self, severity: int, message: str) -> None:
        """Deliver one line. Raises nothing: an exception here would unwind through C++."""
        try:
            level = _LEVELS[min(max(severity, 0), 4)]
            stack = self._running.stack
            if stack:
                stack[-1].keep(level, message)
                self._deliver((stack[-1].sink,), level, message, stack[-1])
                return
            operations = self._operations
            only = operations[0] if len(operations) == 1 else None
            if only is not None:
                only.keep(level, message)
            self._deliver(_distinct(self._sinks), level, message, only)
        except BaseException:
            _log.exception("a TensorRT log line could not be routed: %s", message)

    def _deliver(self, sinks: tuple[LogSink, ...], level: Severity, message: str, operation: Operation | None) -> None:
        for sink in sinks:
            try:
                sink(level, message)
            except Exception:
                _log.exception("a log sink failed on a line of TensorRT: %s", message)
            except BaseException as error:
                if operation is None:
                    _log.exception("a log sink was interrupted on a line of TensorRT: %s", message)
                elif operation.failure is None:
                    operation.failure = error


def _distinct(sinks: tuple[LogSink, ...]) -> tuple[LogSink, ...]:
    """Each sink once, in order. Compared by equality: bound methods are new objects on every access."""
    found: list[LogSink] = []
    for sink in sinks:
        if sink not in found:
            found.append(sink)
    return tuple(found)
