"""Where a cache lies, and whether what lies there may be believed.

A plan is a program for the GPU, and a cached one is loaded without anybody looking at it. So a folder or a file counts
only if nobody but this user (or root, who needs no cache to do harm) can have put it there.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
from collections.abc import Iterator
from typing import BinaryIO

from .._arguments import checked_path
from .._errors import CacheError

ROOT_VARIABLE = "TRTX_CACHE_DIR"
_FOLDER = "trtx_py"


def default_root() -> str:
    """TRTX_CACHE_DIR, else trtx_py in XDG_CACHE_HOME, else in ~/.cache. Raises CacheError if there is no home."""
    named = os.environ.get(ROOT_VARIABLE)
    if named:
        return os.path.abspath(checked_path(named, ROOT_VARIABLE))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification: relative ones are to be ignored
        return os.path.join(base, _FOLDER)
    home = os.environ.get("HOME") or _home_of_account()
    if not os.path.isabs(home):
        raise CacheError(
            f"there is no place for an engine cache: the home folder is {home!r}, which is no absolute path; "
            f"set {ROOT_VARIABLE}, or pass cache=False",
            path=home,
        )
    return os.path.join(home, ".cache", _FOLDER)


def _home_of_account() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:  # a container may run under a number that no account has
        return ""


def distrust(status: os.stat_result, what: str) -> str | None:
    """Why others may have written it, None if they cannot have."""
    if status.st_uid not in (os.geteuid(), 0):
        return f"{what} belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{what} can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def trusted_folder(path: str, *, create: bool = False) -> bool:
    """True if it is there and safe; False if it is not there and was not to be created.

    Raises:
        CacheError: a symbolic link, no folder, another user's, or others may write to it.
        OSError: it cannot be created or looked at.
    """
    if create and not os.path.lexists(path):
        # The mode is the last folder's alone; those above get what the umask gives.
        os.makedirs(path, mode=0o700, exist_ok=True)
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    cure = "name another folder (TRTX_CACHE_DIR, cache=), or make this one your own alone (chown, chmod 700)"
    if stat.S_ISLNK(status.st_mode):
        raise CacheError(
            f"the engine cache {path!r} is a symbolic link to {os.readlink(path)!r}; whoever made it would choose "
            "which plans are loaded: expected a folder; name the folder itself",
            path=path,
        )
    if not stat.S_ISDIR(status.st_mode):
        raise CacheError(f"the engine cache {path!r} is not a folder; {cure}", path=path)
    reason = distrust(status, f"the engine cache {path!r}")
    if reason is not None:
        raise CacheError(f"{reason}; plans from there could be anybody's: {cure}", path=path)
    return True


@contextlib.contextmanager
def open_trusted(path: str) -> Iterator[BinaryIO]:
    """A file of the cache, to read.

    Raises:
        FileNotFoundError: there is none.
        UntrustedFileError: a link, no plain file, another user's, or others may write to it.
        OSError: it cannot be read.
    """
    try:
        # Non-blocking: a pipe that somebody put there must not hang us.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if os.path.islink(path):
            raise UntrustedFileError("it is a symbolic link") from error
        raise
    try:
        status = os.fstat(fd)  # of what was opened, whatever has the name by now
        reason = distrust(status, "it") if stat.S_ISREG(status.st_mode) else "it is not a plain file"
        if reason is not None:
            raise UntrustedFileError(reason)
    except BaseException:
        os.close(fd)
        raise
    with open(fd, "rb") as file:
        yield file


class UntrustedFileError(Exception):
    """A file in the cache that others may have written; never leaves this package."""
