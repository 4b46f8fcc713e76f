"""The rooms of the package as docs/architecture.md draws them, lowest first."""

from __future__ import annotations

import re
from pathlib import Path

import ditkernels
from tools.tree import ROOT

PACKAGE = Path(ditkernels.__file__).parent
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
ROOMS = [(room, int(tier)) for tier, room in re.findall(r"^\| (\d+) \| `(\w+)(?:/|\.py)` \|", PAGE, flags=re.MULTILINE)]
TIERS = dict(ROOMS)


def files() -> list[str]:
    """The package's Python files, as paths inside it."""
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room_of(file: str) -> str:
    """The room of a path inside the package."""
    return file.partition("/")[0].removesuffix(".py")


def module_of(file: str) -> str:
    """The module that a path inside the package holds."""
    return ".".join(("ditkernels", *file.removesuffix(".py").removesuffix("__init__").split("/"))).rstrip(".")
