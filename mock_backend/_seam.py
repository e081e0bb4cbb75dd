"""What every TensorRT-seam call of the mock passes through: counting, faults, log lines, typed errors."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

from trtx_py._errors import CudaError, EngineError, TrtxError
from trtx_py._types import Severity
from trtx_py.backends.protocols import LogSink

from ._driver import MockDriver
from ._faults import FaultPlan
from ._site import call_site

__all__ = ["ErrorType", "Ledger", "LiveObject", "Seam"]

#: Makes the error that a call promises, from its text and the log lines behind it.
ErrorType = Callable[[str, tuple[str, ...]], TrtxError]


class Ledger:
    """The TensorRT objects that are open, and orders of destruction that end a real process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._open: dict[int, LiveObject] = {}
        self._damage: list[str] = []

    def enter(self, item: LiveObject) -> int:
        with self._lock:
            number = next(self._numbers)
            self._open[number] = item
            return number

    def leave(self, number: int, item: LiveObject) -> None:
        """``item`` is being destroyed; open objects that live inside it are damage."""
        with self._lock:
            self._open.pop(number, None)
            orphans = [str(other) for other in self._open.values() if other.parent is item]
            self._damage += [f"{item} was destroyed before {orphan}" for orphan in orphans]

    def blame(self, text: str) -> None:
        with self._lock:
            self._damage.append(text)

    def leaks(self) -> list[str]:
        with self._lock:
            return [str(item) for item in self._open.values()]

    def damage(self) -> list[str]:
        with self._lock:
            return list(self._damage)


class Seam:
    """What the objects of one backend share."""

    def __init__(self, driver: MockDriver, faults: FaultPlan, log: LogSink, ledger: Ledger) -> None:
        self.driver = driver
        self.faults = faults
        self.log = log
        self.ledger = ledger

    def enter(self, call: str, error: ErrorType) -> None:
        """Count ``call``; raise what ``error`` makes if a fault strikes it."""
        outcome = self.faults.enter(call)
        if outcome is None:
            return
        if outcome.lose_device:
            self.driver.mock.lose(outcome.code, str(outcome))
        raise self.refuse(call, f"{outcome} (code {outcome.code})", error)

    def refuse(self, call: str, text: str, error: ErrorType, *, code: str = "4: API Usage Error") -> TrtxError:
        """Log ``text`` the way TensorRT words a failure, and make the typed error for it."""
        line = f"{call}: Error Code {code} ({text})"
        self.log(Severity.ERROR, line)
        return error(text, (line,))


class LiveObject:
    """Base of builder, network, runtime, engine and context: knows whether it was destroyed, and by what it is held.

    Using or destroying an object twice would end a real process; here it raises and is kept as damage.
    """

    kind = "object"

    def __init__(self, seam: Seam, parent: LiveObject | None, label: str = "") -> None:
        self._seam = seam
        self.parent = parent
        self._label = label
        self._site = call_site()
        self._destroyed_at = ""
        self._number = seam.ledger.enter(self)

    def destroy(self) -> None:
        """Free what the object holds. A second call raises EngineError; TensorRT would crash."""
        if self._destroyed_at:
            text = f"{self} was destroyed twice, first at {self._destroyed_at}"
            self._seam.ledger.blame(text)
            raise EngineError(text)
        self._seam.enter("destroy", lambda text, log: EngineError(f"{self}: {text}", tensorrt_log=log))
        self._destroyed_at = call_site()
        self._seam.ledger.leave(self._number, self)
        self._release()

    def _release(self) -> None:
        """Give back device memory and the like."""

    def _alive(self, call: str, error: ErrorType) -> None:
        holder: LiveObject | None = self
        while holder is not None:
            if holder._destroyed_at:
                text = f"{call}: {holder} was destroyed at {holder._destroyed_at}"
                self._seam.ledger.blame(text)
                raise error(text, ())
            holder = holder.parent

    def _on_device(self, device: int, call: str, error: ErrorType) -> None:
        """The device must be current and usable; a CudaError becomes the cause of the typed error."""
        try:
            current = self._seam.driver.require_healthy(call)
        except CudaError as cause:
            failure = self._seam.refuse(call, str(cause), error, code="1: Cuda Driver")
            raise failure from cause
        if current != device:
            raise self._seam.refuse(call, f"device {current} is current, but {self} is on device {device}", error)

    def __str__(self) -> str:
        name = f" {self._label!r}" if self._label else ""
        return f"{self.kind}{name} made at {self._site}"
