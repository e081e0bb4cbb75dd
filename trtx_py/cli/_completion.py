"""``trtx completion``: what a shell needs to complete commands and options."""

from __future__ import annotations

import click

from ._app import command as make_command
from ._session import Session

_HOW = {
    "bash": 'eval "$(trtx completion bash)"  # in ~/.bashrc',
    "zsh": 'eval "$(trtx completion zsh)"  # in ~/.zshrc',
    "fish": "trtx completion fish > ~/.config/fish/completions/trtx.fish",
}


@make_command("completion", click.argument("shell", type=click.Choice(list(_HOW))))
def command(session: Session, shell: str) -> None:
    """Print a script that makes SHELL complete commands and options.

    In bash: eval "$(trtx completion bash)".
    """
    from click.shell_completion import get_completion_class

    from ._app import app

    found = get_completion_class(shell)
    assert found is not None
    # Of bash, click asks its version first, which must not go wrong where there is no bash.
    script = found(app, {}, "trtx", "_TRTX_COMPLETE")
    text = script.source_template % script.source_vars()
    session.answer({"shell": shell, "how": _HOW[shell], "script": text}, lambda: click.echo(text))
