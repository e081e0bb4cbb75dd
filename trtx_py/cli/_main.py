"""One run of the command line: errors become one line and an exit code."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

import click

from .._errors import TrtxError
from ._app import app
from ._session import OutputError, Session, forget_stdout, json_text

OK, FAILURE, USAGE = 0, 1, 2
_MAX_LINE = 2000
#: From here on an interruption is told here, and not where the command was started.
begun = False


class Failure(click.ClickException):
    """The command did its work, and the result is not what was wanted; the text says what. Exit code 1."""


def run(arguments: Sequence[str]) -> int:
    """Run the command that ``arguments`` name, and return its exit code."""
    global begun
    # Errors may come before click has read the options that say how errors are to be shown.
    session = Session(json="--json" in arguments, debug="--debug" in arguments)
    try:
        begun = True
        _open_standard_streams()
        return _guarded(list(arguments), session)
    except BrokenPipeError:  # `trtx ... | head`
        forget_stdout()
        return FAILURE
    except (OSError, OutputError) as error:  # what was printed did not reach the disk
        forget_stdout()
        if session.debug:
            traceback.print_exc()
        else:
            _tell(error.args[0] if isinstance(error, OutputError) else f"standard output: {one_line(error)}")
        return FAILURE


def _open_standard_streams() -> None:
    """Those that were closed go nowhere; else the first files that are opened would take their numbers, and get what
    vendors' libraries print."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the least number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+" if number == 0 else "w"))  # noqa: SIM115 - for good
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A file's name may be no text, and a model's none of the terminal's: as standard error does it already.
        sys.stdout.reconfigure(errors="backslashreplace")


def _guarded(arguments: list[str], session: Session) -> int:
    try:
        # Without standalone mode exceptions come here, and what is returned is the code of ctx.exit().
        result = app.main(arguments, prog_name="trtx", standalone_mode=False, obj=session)
        sys.stdout.flush()
    except (BrokenPipeError, OutputError):
        raise
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.UsageError as error:
        return _failed(session, error, _usage_text(error), USAGE)
    except click.ClickException as error:
        return _failed(session, error, error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        return _failed(session, error, f"interrupted; {session.interrupted}", FAILURE)
    except (TrtxError, OSError, ImportError, MemoryError, ValueError) as error:
        return _failed(session, error, one_line(error), FAILURE)
    except Exception as error:
        text = f"internal error: {type(error).__name__}: {one_line(error)}; --debug shows where"
        return _failed(session, error, text, FAILURE)
    return result if isinstance(result, int) else OK


def one_line(error: BaseException) -> str:
    """An error's text without its line breaks; those of TensorRT have many."""
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename!r}: " if error.filename is not None else ""
        return f"{named}{error.strerror}"
    if isinstance(error, MemoryError) and not str(error):
        return "there is not enough memory"
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
    text = text.replace(":; ", ": ")
    return text if len(text) <= _MAX_LINE else f"{text[:_MAX_LINE]}... (--debug shows all)"


def _usage_text(error: click.UsageError) -> str:
    path = error.ctx.command_path if error.ctx is not None else "trtx"
    text = " ".join(error.format_message().split())
    return f"{text.rstrip('.')}; see {path} --help"


def _failed(session: Session, error: BaseException, text: str, code: int) -> int:
    if session.debug:
        sys.stderr.write("".join(traceback.format_exception(error)))
    else:
        _tell(text)
    if session.json and not session.answered:
        session.answered = True
        click.echo(json_text({"error": {"type": type(error).__name__, "message": text}}))
    return code


def _tell(text: str) -> None:
    # Of a file's name or a model's text a terminal would obey the rest, or break the line.
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
    with contextlib.suppress(OSError):  # if nobody can be told, the exit code remains
        sys.stderr.write(f"trtx: error: {shown}\n")
