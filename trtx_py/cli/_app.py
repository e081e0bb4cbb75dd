"""The commands by name, and what all of them take."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ._session import Session, logging_for
from ._trtexec import translated
from ._values import OUTPUT

#: Module of each command, in the order in which people need them. Bound in a module as ``command``.
COMMANDS = {
    "doctor": "_doctor",
    "build": "_build",
    "convert": "_convert",
    "calibrate": "_calibrate",
    "inspect": "_inspect",
    "run": "_run",
    "compare": "_compare",
    "bench": "_bench",
    "profile": "_profile",
    "cache": "_cache",
    "serve": "_serve",
    "completion": "_completion",
}

_F = TypeVar("_F", bound=Callable[..., Any])


class Command(click.Command):
    """A command with the options that every one has. Attribute ``trtexec``: names of trtexec are understood."""

    trtexec = False

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's, after trtexec's names were replaced by ours."""
        try:
            if self.trtexec and not ctx.resilient_parsing:
                args = translated(self.name or "", args)
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx  # whose help tells more
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """As click's; what is common to all commands goes into the session."""
        session = ctx.find_object(Session)
        assert session is not None
        for name in ("json", "debug", "verbose", "backend", "device"):
            if name in ctx.params:
                setattr(session, name, ctx.params.pop(name))
        _overwrites_nothing(ctx)
        if self.name != "completion":
            _import_numpy()
            _knows_backend(ctx, "--backend", session.backend)
            _knows_backend(ctx, "--target", ctx.params.get("target"))
        with logging_for(session):
            return super().invoke(ctx)


def _import_numpy() -> None:
    """Before anything else does, and with Ctrl-C kept for later: numpy's import takes KeyboardInterrupt for a module
    that cannot be loaded, and prints a traceback of its own."""
    import signal

    caught = {signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, caught)
    try:
        with contextlib.suppress(ImportError):  # the command says it, or does without
            importlib.import_module("ml_dtypes")  # which imports numpy from C again
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _knows_backend(ctx: click.Context, option: str, name: str | None) -> None:
    """Fail if there is no such backend, also in a command that does without."""
    if name is None:
        return
    from .._errors import InvalidArgumentError
    from ..backends.registry import check_backend_name

    try:
        check_backend_name(name)
    except InvalidArgumentError as error:
        raise click.BadParameter(str(error), ctx, param_hint=option) from error


def _overwrites_nothing(ctx: click.Context) -> None:
    """Fail if a file to write is one that is read, or is to be written twice."""
    import os

    there: dict[str, str] = {}
    # Those to write last, however the command has them ordered.
    for parameter in sorted(ctx.command.params, key=lambda each: each.type is OUTPUT):
        value = ctx.params.get(parameter.name or "")
        if not isinstance(parameter.type, click.Path) and parameter.name != "model":  # convert's may be a file
            continue
        for path in value if isinstance(value, (tuple, list)) else (value,):
            if not path:
                continue
            real = os.path.realpath(path)
            if parameter.type is OUTPUT and real in there:
                raise click.BadParameter(f"{path!r} is given for {there[real]} too", ctx, parameter)
            there[real] = parameter.get_error_hint(ctx)


class Commands(click.Group):
    """A group that imports a command's module when it is asked for it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of COMMANDS, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """None if there is no such command."""
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = importlib.import_module(f".{COMMANDS[cmd_name]}", __package__).command
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with the nearest name for one that there is none of."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in COMMANDS:
            import difflib

            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(COMMANDS)}"
            raise click.UsageError(f"there is no command {name!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_COMMON = (
    click.option("--json", is_flag=True, help="One JSON object on standard output, and nothing else there."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error instead of one line."),
    click.option("-v", "--verbose", is_flag=True, help="Log lines on standard error, TensorRT's among them."),
    click.option(
        "--backend", metavar="NAME", shell_complete=lambda ctx, param, begun: _backends(begun),
        help="mock, tensorrt, tensorrt_rtx, tensorrt_lean, tensorrt_dispatch, tensorrt+mock or tensorrt_rtx+mock; "
        "without it TRTX_BACKEND, else the best TensorRT that is installed.",
    ),
    click.option(
        "--device", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Number of the GPU."
    ),
)  # fmt: skip


def _backends(begun: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    from ..backends._flavours import FLAVOURS

    names = ["mock", *FLAVOURS, *(f"{name}+mock" for name, flavour in FLAVOURS.items() if flavour.can_build)]
    return [CompletionItem(name) for name in names if name.startswith(begun)]


def command(
    name: str, *groups: Callable[[Any], Any], trtexec: bool = False, epilog: str | None = None
) -> Callable[[Callable[..., Any]], Command]:
    """Make a command of a function ``f(session, **options)``, with options of its own and of ``groups``."""

    def make(function: Callable[..., Any]) -> Command:
        decorated: Any = click.pass_obj(function)
        for option in reversed([*groups, *_COMMON]):
            decorated = option(decorated)
        made = click.command(name, cls=Command, context_settings=CONTEXT, epilog=epilog)(decorated)
        made.trtexec = trtexec
        return made

    return make


def options(*several: Callable[[_F], _F]) -> Callable[[_F], _F]:
    """Several options as one decorator, in the order in which ``--help`` shows them."""

    def decorate(function: _F) -> _F:
        for option in reversed(several):
            function = option(function)
        return function

    return decorate


def _version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from .. import __version__

        click.echo(f"trtx {__version__}")
        ctx.exit()


@click.group(cls=Commands, context_settings=CONTEXT, no_args_is_help=False, invoke_without_command=True)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
@click.pass_context
def app(ctx: click.Context) -> None:
    """Build, look at, run, measure and serve TensorRT engines.

    `trtx doctor` says what works on this machine. Names of trtexec's options (--onnx=, --saveEngine=, --fp16, ...) are
    understood by build, run, bench and profile.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
