"""The docs site: it builds without a warning, and every link in it, to a page, a heading or a file, leads somewhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tools.tree import ROOT


class Page(HTMLParser):
    """What a page of the site links to, and what it can be linked by."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Keeps the links and the names of an element."""
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.add(value)
            if name == "id" and value:
                self.names.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "-d", str(folder / "trees")]
    done = subprocess.run([*build, str(ROOT / "docs"), str(folder / "html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


def dead_links(site: Path) -> Iterator[str]:
    """Every link of the site to a file or heading that it has not."""
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")}
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not target.is_file() or (target in pages and parts.fragment and parts.fragment not in pages[target].names):
                yield f"{file.relative_to(site)}: {link}"


def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    assert not sorted(dead_links(site))


def test_the_site_has_every_page(site: Path) -> None:
    pages = {file.relative_to(ROOT / "docs").with_suffix(".html") for file in (ROOT / "docs").rglob("*.md")}
    assert not [page for page in pages if not (site / page).is_file()]
    assert "What was measured, and what is owed" in (site / "results.html").read_text(encoding="utf-8")


def test_the_site_knows_the_public_names(site: Path) -> None:
    import ditkernels
    from ditkernels import ops

    names = {f"ditkernels.ops.{name}" for name in ops.__all__}
    # Modules have pages of their own; models of a size are one function by many names.
    others = ("diffusion", "models", "ops", "reference", "DiT_models", "__version__")
    names |= {f"ditkernels.{name}" for name in ditkernels.__all__ if name not in others and not name.startswith("DiT_")}
    text = "".join(file.read_text(encoding="utf-8") for file in (site / "api").glob("*.html"))
    assert not [name for name in sorted(names) if f'id="{name}"' not in text]


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="b.html">b</a><a href="a.html#top">t</a><a href="#low">l</a>', encoding="utf-8"
    )
    assert set(dead_links(tmp_path)) == {"a.html: b.html", "a.html: #low"}
