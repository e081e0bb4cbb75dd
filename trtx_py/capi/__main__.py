"""What a C compiler needs to use libtrtxpy: ``cc program.c $(python -m trtx_py.capi --cflags --libs)``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence

from . import _paths


def _cflags() -> str:
    return shlex.join([f"-I{_paths.include()}"])


def _libs() -> str:
    folder = os.path.dirname(_paths.library())
    # the linker's own separator inside -Wl is the comma
    rpath = ["-Xlinker", "-rpath", "-Xlinker", folder] if "," in folder else [f"-Wl,-rpath,{folder}"]
    return shlex.join([f"-L{folder}", "-ltrtxpy", *rpath])


def _version() -> str:
    from .. import __version__

    return __version__


ANSWERS: dict[str, tuple[Callable[[], str], str]] = {
    "--cflags": (_cflags, "for the compiler: where trtxpy.h and trtxpy.hpp are"),
    "--libs": (_libs, "for the linker; the program finds the library again when it runs"),
    "--path": (_paths.library, "the library's file, for dlopen"),
    "--pkgconfigdir": (_paths.pkgconfig, "the folder of trtxpy.pc, for PKG_CONFIG_PATH"),
    "--cmakedir": (_paths.cmake, "the folder of trtxpy-config.cmake, for trtxpy_DIR"),
    "--version": (_version, "the version of trtx_py"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was asked for: flags on one line, quoted for a shell; anything else as it is, one a line."""
    parser = argparse.ArgumentParser(prog="python -m trtx_py.capi", description="How a C compiler finds libtrtxpy.")
    for option, (_, meaning) in ANSWERS.items():
        parser.add_argument(option, dest="asked", action="append_const", const=option, help=meaning)
    asked: list[str] = parser.parse_args(arguments).asked or []
    if not asked:
        parser.error("say what to print: " + ", ".join(ANSWERS))
    if not os.path.isfile(_paths.library()):
        sys.stderr.write(
            f"error: there is no {_paths.library()}: in a checkout run `bash scripts/build-native`, "
            "elsewhere reinstall trtx-py\n"
        )
        return 1
    flags = [ANSWERS[option][0]() for option in asked if option in ("--cflags", "--libs")]
    others = [ANSWERS[option][0]() for option in asked if option not in ("--cflags", "--libs")]
    sys.stdout.write("\n".join([*others, *([" ".join(flags)] if flags else [])]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
