"""``trtx cache``: the engine cache, looked at and cleaned up."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from ._app import CONTEXT, Command
from ._app import command as make_command
from ._session import Session, console, size_text, table
from ._values import SIZE, FolderPath, Number

if TYPE_CHECKING:
    from .. import CacheReport, EngineCache

_folder = click.option("--dir", "folder", type=FolderPath(), metavar="FOLDER",
                       help="Its folder; TRTX_CACHE_DIR or the default one if not given.")  # fmt: skip


@click.group("cache", context_settings=CONTEXT)
def command() -> None:
    """List, verify and remove plans that were built before."""


def _cache(folder: str | None) -> EngineCache:
    import trtx_py as trtx

    return trtx.EngineCache(folder)


@make_command("path", _folder)
def _path(session: Session, folder: str | None) -> None:
    """Print the folder."""
    cache = _cache(folder)
    session.answer({"path": cache.root, "max_bytes": cache.max_bytes}, lambda: click.echo(cache.root))


@make_command("list", _folder)
def _list(session: Session, folder: str | None) -> None:
    """List the plans, those used last first."""
    cache = _cache(folder)
    entries = cache.list()
    total = sum(entry.size_bytes for entry in entries)

    def show() -> None:
        if entries:
            rows = table("key", "model", "built with", "for", "precision", "size", "last used")
            for entry in entries:
                rows.add_row(
                    entry.key[:12], entry.model, f"{entry.flavour} {entry.version}",
                    ", ".join(entry.compute_capabilities), entry.precision or "-", size_text(entry.size_bytes),
                    time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used_s)),
                )  # fmt: skip
            console().print(rows)
        click.echo(f"{len(entries)} plans, {size_text(total)} of {size_text(cache.max_bytes)} in {cache.root}")

    session.answer({"path": cache.root, "bytes": total, "max_bytes": cache.max_bytes, "entries": entries}, show)


@make_command(
    "prune", _folder,
    click.option("--max-size", type=SIZE, metavar="SIZE", help="How large all files may be together: 4GiB."),
    click.option("--older-than", type=Number(0, 100_000), metavar="DAYS", help="Remove what was not used for so "
                 "many days, too."),
)  # fmt: skip
def _prune(session: Session, folder: str | None, max_size: int | None, older_than: float | None) -> None:
    """Remove what was not used for longest, and what killed builders have left."""
    age = None if older_than is None else older_than * 86400
    _report(session, _cache(folder).prune(max_size, age))


@make_command("verify", _folder)
def _verify(session: Session, folder: str | None) -> None:
    """Read everything, and remove what is damaged."""
    _report(session, _cache(folder).verify())


@make_command("clear", _folder, click.option("-y", "--yes", is_flag=True, help="Do not ask."))
def _clear(session: Session, folder: str | None, yes: bool) -> None:
    """Remove all plans."""
    cache = _cache(folder)
    if not yes:
        if session.json or not sys.stdin.isatty():
            raise click.UsageError("nobody can be asked whether to remove all plans; give --yes")
        click.confirm(f"Remove all {len(cache.list())} plans in {cache.root}?", abort=True, err=True)
    _report(session, cache.clear())


def _report(session: Session, report: CacheReport) -> None:
    def show() -> None:
        for place, why in report.removed.items():
            click.echo(f"removed {place}: {why}")
        click.echo(f"{report.checked} files, {len(report.removed)} removed, {size_text(report.freed_bytes)} freed")

    session.answer(report, show)


_SUBCOMMANDS: tuple[Any, ...] = (_list, _path, _verify, _prune, _clear)
for _each in _SUBCOMMANDS:
    assert isinstance(_each, Command)
    command.add_command(_each)
