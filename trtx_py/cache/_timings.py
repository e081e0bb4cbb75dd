"""Times of kernels that TensorRT has measured, kept beside the plans: a build measures only what none has before.

One file for each TensorRT, driver and GPU, whatever the models. TensorRT-RTX measures nothing: see ``_kernels``.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .._build import BuildRequest
from .._builder_options import BuilderOptions, TimingCache
from .._errors import CacheError, TrtxError
from ._content import UncacheableError
from ._entry import DamagedEntryError, read_blob, write_blob
from ._lock import FileLock
from ._said import log, warn_once

_OFF = "DISABLE_TIMING_CACHE"
#: Whoever has the lock only merges two files.
_ATTEMPTS, _POLL_S = 40, 0.05


@dataclass(frozen=True)
class KeptTimings(TimingCache):
    """A TimingCache that checks what it reads, and adds to what is kept instead of replacing it.

    That something fails is a logged warning: it costs time and nothing else.

    Attributes:
        root: of the cache, for messages.
        key: hash of what the times depend on.
        lock: makes the folders and takes the lock of a key, None if somebody else has it.
        is_there: False if nothing was kept yet.
        began_with: what the build was given.
    """

    root: str = field(kw_only=True)
    key: str = field(kw_only=True)
    lock: Callable[[str], FileLock | None] = field(kw_only=True, repr=False)
    is_there: Callable[[], bool] = field(kw_only=True, repr=False)
    began_with: list[bytes] = field(default_factory=list, init=False, repr=False, compare=False)

    def _read(self) -> bytes:
        self.began_with[:] = [self._kept()]
        return self.began_with[0]

    def _kept(self) -> bytes:
        try:
            return read_blob(os.fspath(self.path), self.key) if self.is_there() else b""
        except FileNotFoundError:
            return b""
        except DamagedEntryError as error:
            log.warning("the times of kernels in the engine cache are damaged and are measured again: %s", error)
        except (OSError, CacheError) as error:
            warn_once(self.root, "read", error)
        return b""

    def _replace(self, content: bytes, combined: Callable[[bytes], bytes]) -> None:
        try:
            held = self._locked()
            if held is None:
                log.warning("the times of kernels are not kept: another process holds their lock")
                return
            with held:
                kept = self._kept()
                if kept and kept not in (content, *self.began_with):  # meanwhile other builds have added theirs
                    content = combined(kept)
                if kept != content:
                    write_blob(os.fspath(self.path), self.key, content)
                else:
                    with contextlib.suppress(OSError):  # when it was used last decides only what is pruned first
                        os.utime(self.path, follow_symlinks=False)
        except (OSError, CacheError) as error:
            warn_once(self.root, "written", error)
        except TrtxError as error:
            log.warning("the times of kernels are not kept: %s", error)

    def _locked(self) -> FileLock | None:
        for _ in range(_ATTEMPTS):
            held = self.lock(self.key)
            if held is not None:
                return held
            time.sleep(_POLL_S)
        return None


def with_timings(request: BuildRequest, kept: Callable[[], KeptTimings]) -> BuildRequest:
    """``request`` with the times that are kept, unless it says itself where they are, or wants none.

    Args:
        kept: where they are; may raise UncacheableError.
    """
    if not getattr(request.backend, "has_timing_cache", False):
        return request
    given = request.options.get("builder_options")
    options = BuilderOptions() if given is None else given
    if not isinstance(options, BuilderOptions) or options.timing_cache is not None:
        return request
    flags = request.options.get("flags") or ()
    if not isinstance(flags, (str, list, tuple, set, frozenset)):
        return request  # an iterator can be read once, and that is the build's to do
    named = [flags] if isinstance(flags, str) else flags
    if any(str(name).upper() == _OFF for name in [*named, *options.builder_flags]):
        return request
    try:
        timings = kept()
    except UncacheableError:
        return request
    return replace(request, options={**request.options, "builder_options": replace(options, timing_cache=timings)})
