"""SHA-256 of large things beside other work: hashing 100 MB takes as long as copying them several times."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

#: Below this a thread costs more than it saves.
_WORTH_A_THREAD = 1 << 20


class Hashing:
    """SHA-256 over some bytes, which are kept until it is there. Begins at once, on a thread if it is worth one."""

    def __init__(self, parts: Sequence[bytes | memoryview]) -> None:
        self._digest = b""
        self._thread: threading.Thread | None = None
        self._parts: Sequence[bytes | memoryview] = parts
        if sum(map(len, parts)) >= _WORTH_A_THREAD:
            thread = threading.Thread(target=self._work, name="trtx_py-hashing", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads: then here
                self._work()
            else:
                self._thread = thread
        else:
            self._work()

    def _work(self) -> None:
        hashed = hashlib.sha256()
        for part in self._parts:
            hashed.update(part)
        self._digest = hashed.digest()
        self._parts = ()

    def digest(self) -> bytes:
        """Waits for it."""
        if self._thread is not None:
            self._thread.join()
        return self._digest

    def hexdigest(self) -> str:
        """Waits for it."""
        return self.digest().hex()
