"""What the cache tells: through ``logging``, and what would repeat itself with every open only once."""

from __future__ import annotations

import logging
import threading

from .._errors import CacheError

log = logging.getLogger("trtx_py.cache")

_said: set[tuple[str, str | None]] = set()
_guard = threading.Lock()


def warn_once(root: str, verb: str, error: OSError | CacheError) -> None:
    """That a cache cannot be used; once in this process for each folder and cause."""
    cause = error.strerror if isinstance(error, OSError) else error.message
    with _guard:
        if (root, cause) in _said:
            return
        _said.add((root, cause))
    log.warning(
        "the engine cache %r cannot be %s, and plans are built without it: %s (said once; name another folder with "
        "TRTX_CACHE_DIR or cache=, or pass cache=False)",
        root,
        verb,
        error,
    )
