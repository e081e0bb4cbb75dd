"""Starts the command ``trtx``.

``import trtx_py`` takes numpy, asyncio and half a second, which ``trtx --help`` and the shell's completion would wait
for without need. So the package is put in place here without its facade, which is loaded when something is first asked
of it. It must be outside the package: to import any part of that is to import all of it.
"""

import sys  # and nothing more: what is imported before `main` has begun, Ctrl-C ends with a traceback

__all__ = ["main"]


def main() -> None:
    """The entry point of ``trtx``."""
    try:
        import importlib

        from ._defer import reserve

        reserve()
        # Not `from trtx_py import cli`, which asks the package for the name first, and so loads it.
        code = importlib.import_module("trtx_py.cli").main()
    except KeyboardInterrupt:  # before, or behind, the part that says what it means
        sys.stderr.write("\ntrtx: error: interrupted\n")
        if "--json" in sys.argv and not getattr(sys.modules.get("trtx_py.cli._main"), "begun", False):
            sys.stdout.write('{"error": {"type": "KeyboardInterrupt", "message": "interrupted"}}\n')
        code = 1
    sys.exit(code)
