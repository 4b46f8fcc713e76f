"""Every text file is read and written as UTF-8, whatever the locale says."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tools.tree import ROOT

FOLDERS = ("ditkernels", "benchmarks", "examples", "tests", "tools")
FILES = sorted((*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))))
# Their ``open`` gives no text file.
OTHERS = {"Image", "LatentFolder", "archive", "os", "tarfile"}


def without_encoding(source: str) -> Iterator[ast.Call]:
    """The calls that open a text file in the encoding of the locale."""
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and _opens_text(call) and all(keyword.arg != "encoding" for keyword in call.keywords):
            yield call


def _opens_text(call: ast.Call) -> bool:
    match call.func:
        case ast.Attribute(attr="read_text"):
            return not call.args  # that of a distribution takes a name
        case ast.Attribute(attr="write_text"):
            return True
        case ast.Attribute(attr="open", value=ast.Name(id=owner)) if owner in OTHERS:
            return False
        case ast.Name(id="open") | ast.Attribute(attr="fdopen"):
            mode = call.args[1:2]
        case ast.Attribute(attr="open"):
            mode = call.args[:1]
        case _:
            return False
    mode += [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    return not any(isinstance(value, ast.Constant) and "b" in str(value.value) for value in mode)


def test_text_is_utf_8() -> None:
    found = {file: list(without_encoding(file.read_text(encoding="utf-8"))) for file in FILES}
    assert not [f"{file.relative_to(ROOT)}:{call.lineno}" for file, calls in found.items() for call in calls]


@pytest.mark.parametrize(
    "source, found",
    [
        ("path.read_text()", True),
        ("path.read_text(encoding='utf-8')", False),
        ("path.write_text(text)", True),
        ("open(path)", True),
        ("open(path, 'a', encoding='utf-8')", False),
        ("open(path, 'rb')", False),
        ("open(path, mode='wb')", False),
        ("path.open('a')", True),
        ("path.open('xb')", False),
        ("os.fdopen(1, 'w')", True),
        ("Image.open(path)", False),
    ],
)
def test_the_test_finds_what_is_not(source: str, found: bool) -> None:
    assert any(without_encoding(source)) == found
