"""Files that a caller names, opened without waiting for what is none."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO


def open_plain(path: str) -> BinaryIO:
    """A file, to read. A pipe would wait for its other end, where no cancellation reaches; a device may have no end.

    Raises OSError, whose text says what to do.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder the kernel says that it is one
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device; read it, and give the bytes", path)
    return open(path, "rb")
