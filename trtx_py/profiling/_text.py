"""A report as plain text and as markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from ._report import ProfileReport
from ._rows import Block, blocks, headline, name_of, widths

_WIDTH = 100


def as_text(report: ProfileReport, *, top: int = 20) -> str:
    """At most 100 columns; no colours, no box drawing."""
    lines = textwrap.wrap(f"Profile of {printable(name_of(report))}: {headline(report)}", _WIDTH)
    for block in blocks(report, top=top):
        lines += ["", block.title, *(f"  {line}" for line in _table(block))]
        for note in block.notes:
            lines += textwrap.wrap(printable(note), _WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines) + "\n"


def _table(block: Block) -> Iterator[str]:
    if not block.columns:
        return
    cells = [tuple(map(printable, row)) for row in block.rows]
    others = sum(size + 2 for size in widths(block.columns, cells)[1:])
    # Names give way, figures never: the first column is cut, and a table of names alone its second.
    first = max(_WIDTH - 2 - others, 12)
    cells = [(_cut(row[0], first), *(_cut(cell, _WIDTH - 12) for cell in row[1:])) for row in cells]
    sizes = widths(block.columns, cells)
    names_only = len(block.columns) == 2 and not any(block.columns)
    for row in ([block.columns] if any(block.columns) else []) + cells:
        rest = (
            cell.ljust(size) if names_only else cell.rjust(size) for cell, size in zip(row[1:], sizes[1:], strict=True)
        )
        yield "  ".join([row[0].ljust(sizes[0]), *rest]).rstrip()[: _WIDTH - 2]


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size - 3]}..."


def as_markdown(report: ProfileReport, *, top: int = 20) -> str:
    """Headings, tables and sentences."""
    lines = [f"# Profile of {_escaped(name_of(report))}", "", f"{headline(report)}."]
    for block in blocks(report, top=top):
        lines += ["", f"## {block.title}"]
        if block.columns:
            rules = ["---", *("---:" for _ in block.columns[1:])]
            lines += ["", _row(block.columns), _row(rules, escape=False), *(_row(row) for row in block.rows)]
        for note in block.notes:
            lines += ["", _escaped(note)]
    return "\n".join(lines) + "\n"


def _row(cells: tuple[str, ...] | list[str], *, escape: bool = True) -> str:
    return f"| {' | '.join(map(_escaped, cells) if escape else cells)} |"


def _escaped(text: str) -> str:
    """Names come from models: none of it is markup, of markdown or of HTML in it."""
    text = printable(text)
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, f"\\{mark}" if mark not in "<>" else {"<": "&lt;", ">": "&gt;"}[mark])
    return text


def printable(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in text)
