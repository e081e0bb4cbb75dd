"""Hooks of mkdocs (mkdocs.yml): a file outside docs/ that a page links to becomes a page of the site.

In a checkout such a link leads to the file itself, so the pages need nothing of this. On the site it leads to
``source/PATH.html``, which shows the file: Markdown as it reads, anything else as highlighted text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^(`{3,}).*?^\1\s*$", re.DOTALL | re.MULTILINE)
LANGUAGES = {".py": "python", ".c": "c", ".h": "c", ".cpp": "cpp", ".hpp": "cpp", ".rs": "rust", ".json": "json"}
LANGUAGES |= {".toml": "toml", ".yml": "yaml", ".sh": "bash", ".service": "ini", "Dockerfile": "docker"}


def outside(target: str, uri: str) -> str | None:
    """The path in the repository that a link on the page ``uri`` leads to; None if it stays in docs/ or leaves both."""
    if "://" in target or target.startswith(("/", "mailto:")):
        return None
    base = posixpath.dirname(uri[len("source/") :] if uri.startswith("source/") else f"docs/{uri}")
    path = posixpath.normpath(posixpath.join(base, target))
    if path.startswith("..") or (path.startswith("docs/") and not uri.startswith("source/")):
        return None
    return path


def page_of(path: str) -> str:
    """Where on the site a file of the repository is shown, as mkdocs names sources."""
    if path.startswith("docs/"):
        return path[len("docs/") :]
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def shown(path: str) -> str:
    """The text of the page that shows a file or a folder."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(entry.name for entry in file.iterdir() if entry.name != "__pycache__")
        return "\n".join([f"# {path}", "", *(f"- `{name}`" for name in names), ""])
    text = file.read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    language = LANGUAGES.get(file.suffix) or LANGUAGES.get(file.name, "text")
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n````{language}\n{text.rstrip()}\n````\n"


def links(text: str) -> list[re.Match[str]]:
    """Links of a page, but for what looks like one inside a block of code."""
    code = [(match.start(), match.end()) for match in FENCE.finditer(text)]
    found = LINK.finditer(text)
    return [match for match in found if not any(start <= match.start() < end for start, end in code)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the linked files, and of Markdown among them what that links to in turn."""
    pages = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    while pages:
        uri, text = pages.pop()
        for match in links(text):
            path = outside(match[1], uri)
            if path is None or files.get_file_from_path(page_of(path)) is not None:
                continue
            if not (ROOT / path).exists():
                raise PluginError(f"{uri} links to {match[1]}, which does not exist")
            content = shown(path)
            added = File.generated(config, page_of(path), content=content)
            added.inclusion = added.inclusion.__class__.NOT_IN_NAV
            files.append(added)
            if path.endswith(".md"):
                pages.append((added.src_uri, content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files outside docs/ into links to the pages that show them."""
    uri = page.file.src_uri
    for match in reversed(links(markdown)):
        path = outside(match[1], uri)
        if path is not None:
            target = posixpath.relpath(page_of(path), posixpath.dirname(uri) or ".") + (match[2] or "")
            markdown = markdown[: match.start()] + target + markdown[match.end() :]
    return markdown
