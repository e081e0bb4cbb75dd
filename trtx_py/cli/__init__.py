"""The command line, ``trtx``. Extra: ``cli``.

Modules here import click and nothing heavy when they are imported; what a command needs it imports when it runs,
because ``trtx --help`` and the shell's completion load all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit code: 0, 1 for a failure, 2 for arguments that cannot be used.

    Args:
        arguments: without the program's name; None takes those of this process.
    """
    try:
        import click  # noqa: F401 - here to say what is missing
        import rich  # noqa: F401
    except ImportError as error:
        sys.stderr.write(f"trtx: the command line is not installed ({error}); pip install 'trtx-py[cli]'\n")
        return 1
    from ._main import run

    return run(list(sys.argv[1:] if arguments is None else arguments))
