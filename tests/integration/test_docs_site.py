"""The documentation site builds without a warning, leads nowhere that does not exist, and fetches nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("material", reason="the extra docs is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    # Whoever asks for something over the network asks nobody.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WARNING" not in result.stderr
    return folder


class Page(HTMLParser):
    """The links, the anchors and whatever a browser loads by itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(given.get("href", ""))
        elif tag in ("script", "img", "iframe", "source", "video") and given.get("src"):
            self.loads.append(given["src"])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}


def targets(pages: dict[Path, Page]) -> Iterator[tuple[Path, str, Path, str]]:
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if not parts.scheme and not parts.netloc:
                where = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                yield path, link, where / "index.html" if where.is_dir() else where, unquote(parts.fragment)


def test_links_and_anchors_lead_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    missing = []
    for path, link, where, anchor in targets(pages):
        found = where.exists() and where.is_relative_to(site)
        if not found or (anchor and where in pages and anchor not in pages[where].anchors):
            missing.append(f"{path.relative_to(site)} -> {link}")
    assert sorted({*missing}) == []


def test_files_outside_the_documentation_have_pages_of_their_own(pages: dict[Path, Page]) -> None:
    linked = {str(where) for _, _, where, _ in targets(pages)}
    for file in ("examples/oip_server/server.py", "capi/include/trtxpy.h", "Dockerfile", "examples/index"):
        assert any(where.endswith(f"/source/{file}.html") for where in linked), file


def test_every_page_is_reached_from_the_navigation(site: Path, pages: dict[Path, Page]) -> None:
    home = pages[site / "index.html"]
    reached = {(site / urlsplit(link).path).resolve() for link in home.links if not urlsplit(link).scheme}
    own = {path for path in pages if "source" not in path.relative_to(site).parts}
    assert len(own) > 40
    assert {str(path.relative_to(site)) for path in own - reached} == set()


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    loads = {load for page in pages.values() for load in page.loads}
    assert {load for load in loads if urlsplit(load).netloc or urlsplit(load).scheme not in ("", "data")} == set()
    assert {load for load in loads if load.endswith((".css", ".js"))}
    for sheet in site.rglob("*.css"):
        fetched = re.findall(r"url\([\"']?(?:https?:)?//[^)]*\)|@import[^;]*;", sheet.read_text(encoding="utf-8"))
        assert fetched == [], sheet.name


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "assets").glob("*.svg")), ids=lambda path: path.name)
def test_picture_is_well_formed_and_says_what_it_shows(picture: Path) -> None:
    root = ET.parse(picture).getroot()
    names = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert not names & {"script", "image", "foreignObject"}
    if picture.name != "icon.svg":
        assert {"title", "desc"} <= names
        assert f"assets/{picture.name}" in (ROOT / "docs" / "explanation" / "architecture.md").read_text()


def test_search_finds_the_pages(site: Path) -> None:
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "how-to/batching.html" in index
    assert "source/capi/include/trtxpy.h" not in index
