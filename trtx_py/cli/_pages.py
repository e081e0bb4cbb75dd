"""The pages docs/reference/cli.md and trtexec.md, made of the commands and of the table themselves.

``python -m trtx_py.cli._pages docs/reference`` writes them; a test checks that they are what they would be.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from ._app import _COMMON, COMMANDS, Command, app
from ._build_options import build_options
from ._opening import loading_options
from ._trtexec import NAMES

_INTRO = """# The command line

`trtx` (or `python -m trtx_py`) comes with `pip install 'trtx-py[cli]'`. Every command:

- exits with 0, with 1 for a failure, and with 2 for arguments that cannot be used;
- writes one JSON object to standard output with `--json`, and nothing else there: the result, or
  `{"error": {"type": ..., "message": ...}}`;
- says what went wrong in one line on standard error, and with `--debug` in a traceback. Ctrl-C is such a failure: a
  build stops at its next step, and no file is left half-written;
- completes in bash, zsh and fish: `eval "$(trtx completion bash)"` in `~/.bashrc`.

Start with `trtx doctor`, which says what works on this machine:

```bash
trtx doctor
trtx build examples/digits/digits.onnx --backend mock -o digits.plan
trtx inspect digits.plan
trtx run digits.plan --backend mock --reference examples/digits/digits.onnx
```

The names of trtexec's options are understood by `build`, `run`, `bench` and `profile`: [a table](trtexec.md). Sizes
are bytes, or have K, M or G (`512M`, `1GiB`). Shapes are `1x3x224x224`, of inputs `image:1x3x224x224,mask:1x224`.

This page is made of the commands themselves (`python -m trtx_py.cli._pages docs/reference`).

"""

_TREXEC_INTRO = """# trtexec's options

`trtx build`, `run`, `bench` and `profile` understand trtexec's names, with values behind an equals sign or a blank:

```bash
trtexec --onnx=model.onnx --saveEngine=model.plan --fp16 --minShapes=x:1x3x224x224 \\
    --optShapes=x:8x3x224x224 --maxShapes=x:32x3x224x224 --memPoolSize=workspace:1024 --skipInference
trtx build --onnx=model.onnx --saveEngine=model.plan --fp16 --minShapes=x:1x3x224x224 \\
    --optShapes=x:8x3x224x224 --maxShapes=x:32x3x224x224 --memPoolSize=workspace:1024 --skipInference
```

trtexec builds and measures in one go; here these are two commands. An option that cannot be honoured is an error which
names it and what to use instead; none is ignored. Two options for one precision each (`--fp16 --int8`) are refused: one
precision is built, and what cannot have it stays in FP32.

This page is made of the table that translates (`python -m trtx_py.cli._pages docs/reference`).
"""


def cli_page() -> str:
    """The text of docs/reference/cli.md."""
    shared = {
        "common": _parameters(*_COMMON),
        "build": _parameters(build_options),
        "load": _parameters(loading_options),
    }
    parts = [
        _INTRO,
        "## Options of every command\n\n", _table(shared["common"]),
        "\n## Options of a build\n\nOf `build`, and of the commands that build a model before they use it. What the "
        "TensorRT at hand lacks fails the\nbuild by name; [what each does](../how-to/build-options.md).\n\n",
        _table(shared["build"]),
        "\n## Options of loading\n\nOf the commands that load a plan.\n\n", _table(shared["load"]),
    ]  # fmt: skip
    context = click.Context(app, info_name="trtx")
    for name in COMMANDS:
        found = app.get_command(context, name)
        assert found is not None
        parts.append(_section(found, click.Context(found, parent=context, info_name=name), shared))
        if isinstance(found, click.Group):
            inner = click.Context(found, parent=context, info_name=name)
            for sub in found.list_commands(inner):
                each = found.get_command(inner, sub)
                assert each is not None
                parts.append(_section(each, click.Context(each, parent=inner, info_name=sub), shared, level="###"))
    return "".join(parts)


def trtexec_page() -> str:
    """The text of docs/reference/trtexec.md."""
    lines = [_TREXEC_INTRO, "\n## Understood\n\n| trtexec | here | by |\n|---|---|---|\n"]
    for name in NAMES.values():
        if not name.refused:
            lines.append(
                f"| {_trtexec(name.name, name.value)} | {_cell(name.becomes)} | {', '.join(name.commands)} |\n"
            )
    lines.append("\n## Refused\n\n| trtexec | why, and what to use |\n|---|---|\n")
    for name in NAMES.values():
        if name.refused:
            lines.append(f"| {_trtexec(name.name, name.value)} | {_cell(name.refused)} |\n")
    return "".join(lines)


def _trtexec(name: str, value: str) -> str:
    return _cell(f"`--{name}={value}`" if value else f"`--{name}`")


def _parameters(*decorators: Callable[[Any], Any]) -> list[click.Option]:
    function: Any = lambda: None  # noqa: E731 - click collects the options on it
    for decorator in reversed(decorators):
        function = decorator(function)
    return [each for each in click.command()(function).params if isinstance(each, click.Option)]


def _section(
    found: click.Command, context: click.Context, shared: dict[str, list[click.Option]], level: str = "##"
) -> str:
    usage = " ".join([context.command_path, *found.collect_usage_pieces(context)])
    text = "\n\n".join(" ".join(part.split()) for part in (found.help or "").split("\n\n"))
    parts = [f"\n{level} trtx {context.command_path.removeprefix('trtx ')}\n\n    {usage}\n\n{_wrapped(text)}\n"]
    names = {option.opts[0] for option in found.params if isinstance(option, click.Option)}
    told: set[str] = {option.opts[0] for option in shared["common"]}
    groups = []
    for key, title in (("build", "[a build](#options-of-a-build)"), ("load", "[loading](#options-of-loading)")):
        ours = {option.opts[0] for option in shared[key]}
        if ours <= names:
            groups.append(title)
            told |= ours
    own = [each for each in found.params if isinstance(each, click.Option) and each.opts[0] not in told]
    if own:
        parts += ["\n", _table(own)]
    if groups:
        parts.append(f"\nAlso the options of {' and of '.join(groups)}.\n")
    if isinstance(found, Command) and found.trtexec:
        parts.append("\nUnderstands [trtexec's names](trtexec.md).\n")
    return "".join(parts)


def _wrapped(text: str) -> str:
    import textwrap

    return "\n\n".join(
        textwrap.fill(part, 118, break_long_words=False, break_on_hyphens=False) for part in text.split("\n\n")
    )


def _table(found: Iterable[click.Option]) -> str:
    rows = ["| option | meaning |\n|---|---|\n"]
    for option in found:
        names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
        kind = option.metavar or ("" if option.is_flag else _kind(option))
        default = ""
        if option.show_default and option.default not in (None, False, True, (), "") and not option.is_flag:
            default = f" Default: {option.default}."
        elif option.is_flag and option.secondary_opts and isinstance(option.default, bool):
            default = f" Default: `{(option.opts if option.default else option.secondary_opts)[0]}`."
        needed = " Needed." if option.required else ""
        rows.append(
            f"| {names}{' ' + _cell(f'`{kind}`') if kind else ''} | {_cell(option.help or '')}{default}{needed} |\n"
        )
    return "".join(rows)


def _kind(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return "|".join(str(choice) for choice in option.type.choices)
    return option.type.name.upper()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(folder: str) -> None:
    """Write both pages into ``folder``."""
    Path(folder, "cli.md").write_text(cli_page(), encoding="utf-8")
    Path(folder, "trtexec.md").write_text(trtexec_page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
