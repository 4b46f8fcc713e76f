"""The docs site: ``make docs`` builds it into build/docs. Every page also reads as plain Markdown in the source tree."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package that is documented is this tree's

from ditkernels._version import __version__  # noqa: E402

project = "ditkernels"
author = "the ditkernels authors"
project_copyright = "the ditkernels authors, Apache-2.0"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = f"ditkernels {release}"
html_static_path = ["_static"]
html_css_files = ["wide-tables.css"]
html_copy_source = False
html_show_sphinx = False

myst_heading_anchors = 3
# The public API is short and its arguments have defaults worth reading, so it stays in the order and the form of the source.
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

# Pages that lie elsewhere in the source tree, by the name that they have in the site: there a short page stands for each.
ELSEWHERE = {
    "changes": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "results": "benchmarks/results/README.md",
    "security": "SECURITY.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def show_pages_from_elsewhere(app: Sphinx, name: str, source: list[str]) -> None:
    """Puts the text of a page from elsewhere in the place of the short one, and leads links to such pages to the site's own."""
    docs = Path(app.srcdir)
    file = ROOT / ELSEWHERE[name] if name in ELSEWHERE else docs / f"{name}.md"
    text = file.read_text(encoding="utf-8") if name in ELSEWHERE else source[0]
    app.env.note_dependency(file)
    shown = {ROOT / there: docs / f"{page}.md" for page, there in ELSEWHERE.items()}

    def led(link: re.Match[str]) -> str:
        target = (file.parent / link[1]).resolve()
        return os.path.relpath(shown.get(target, target), (docs / name).parent)

    source[0] = LINK.sub(led, text)


def setup(app: Sphinx) -> None:
    """Registers what this file adds to Sphinx."""
    app.connect("source-read", show_pages_from_elsewhere)
