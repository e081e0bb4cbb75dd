"""One builder at a time: a lock that ends with its process, however that ends.

``flock`` on a file beside the plan. The kernel lets go of it when the process dies, so nothing is left to time out; it
works between threads too, since each attempt opens the file anew. Attempts never block: who waits asks again, and can
stop waiting.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading

_CONTENDED = frozenset({errno.EAGAIN, errno.EACCES})


class FileLock:
    """A lock that is held. Made by ``try_lock``."""

    def __init__(self, path: str, fd: int) -> None:
        self._path = path
        self._fd = fd

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """Idempotent. The file goes first: whoever opened it before notices, and opens the next one."""
        fd, self._fd = self._fd, -1
        if fd >= 0 and _forget(fd):
            with contextlib.suppress(OSError):  # a folder that became read-only keeps an empty file
                if _is_at(self._path, fd):
                    os.unlink(self._path)
            os.close(fd)


def try_lock(path: str) -> FileLock | None:
    """The lock, or None if somebody holds it. Raises OSError where there can be none: read-only, no locks, full."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        _remember(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, fd):
                return FileLock(path, fd)
        except BaseException as error:
            _forget(fd)
            os.close(fd)
            if isinstance(error, OSError) and error.errno in _CONTENDED:
                return None
            raise
        _forget(fd)  # it was released, and removed, while we opened it
        os.close(fd)


def _is_at(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


# A forked child shares the open files of its parent, and with them the locks: it would hold them after the parent died.
_open: set[int] = set()
_guard = threading.Lock()


def _remember(fd: int) -> None:
    with _guard:
        _open.add(fd)


def _forget(fd: int) -> bool:
    """False in a forked child, where it is closed already and its number may mean something else."""
    with _guard:
        known = fd in _open
        _open.discard(fd)
        return known


def _after_fork() -> None:
    global _guard
    _guard = threading.Lock()  # another thread of the parent may have held it
    for fd in _open:
        with contextlib.suppress(OSError):
            os.close(fd)  # does not unlock: the parent has it open still
    _open.clear()


os.register_at_fork(after_in_child=_after_fork)
