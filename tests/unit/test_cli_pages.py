"""The pages of the reference that are made of the code are what the code says."""

from __future__ import annotations

import click

from tests.cli import ROOT
from trtx_py.cli._app import app
from trtx_py.cli._pages import cli_page, trtexec_page
from trtx_py.cli._trtexec import NAMES

REFERENCE = ROOT / "docs" / "reference"
HINT = "run: python -m trtx_py.cli._pages docs/reference"


def test_the_page_of_commands_is_current() -> None:
    assert (REFERENCE / "cli.md").read_text(encoding="utf-8") == cli_page(), HINT


def test_the_page_of_trtexec_is_current() -> None:
    page = (REFERENCE / "trtexec.md").read_text(encoding="utf-8")
    assert page == trtexec_page(), HINT
    assert [name for name in NAMES if f"`--{name}`" not in page and f"`--{name}=" not in page] == []


def commands() -> list[tuple[str, click.Command]]:
    context = click.Context(app)
    found = []
    for name in app.list_commands(context):
        command = app.get_command(context, name)
        assert command is not None
        found.append((name, command))
        if isinstance(command, click.Group):
            found += [(f"{name} {sub}", each) for sub, each in command.commands.items()]
    return found


def test_every_command_and_every_option_is_listed_and_explained() -> None:
    page = (REFERENCE / "cli.md").read_text(encoding="utf-8")
    for name, command in commands():
        assert f" trtx {name}\n" in page
        assert command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (name, parameter.name)
                missing = [each for each in (*parameter.opts, *parameter.secondary_opts) if f"`{each}`" not in page]
                assert missing == [], name


def test_every_command_takes_what_every_command_takes() -> None:
    for name, command in commands():
        if not isinstance(command, click.Group):
            options = {option for parameter in command.params for option in parameter.opts}
            assert {"--json", "--debug", "--verbose", "--backend", "--device"} <= options, name
