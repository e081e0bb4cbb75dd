"""An IErrorRecorder that sends errors where log lines go, with their codes."""

from __future__ import annotations

from typing import Any

from ..._types import Severity
from ._log_router import LogRouter


def make_recorder(module: Any, router: LogRouter) -> Any:
    """A recorder for all builders of a vendor module; None if its bindings have none.

    TensorRT gives an error to the recorder instead of the logger where there is one.

    Source: nvinfer1::IErrorRecorder
    """
    base: Any = getattr(module, "IErrorRecorder", None)
    if base is None:
        return None

    class Recorder(base):  # type: ignore[misc]  # the base is known only at run time
        def __init__(self) -> None:
            base.__init__(self)

        def report_error(self, code: Any, description: str) -> bool:
            router.note_code(str(getattr(code, "name", code)))
            router.emit(Severity.ERROR, description)
            return False  # nothing here needs TensorRT to stop at once

        # What is asked of a recorder later is answered by the operation that the error came from.

        def num_errors(self) -> int:
            return 0

        def get_error_code(self, index: int) -> Any:
            raise IndexError(index)

        def get_error_desc(self, index: int) -> str:
            raise IndexError(index)

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            """Nothing is kept here."""

    return Recorder()
