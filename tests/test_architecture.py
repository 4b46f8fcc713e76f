"""The package is built as docs/architecture.md says: imports go down and never in a circle, and files are of a size to be read."""

from __future__ import annotations

import ast
import graphlib
import importlib
from collections.abc import Iterator, Mapping

import pytest

from ditkernels.cli import COMMANDS
from tests.helpers.architecture import PACKAGE, ROOMS, TIERS, files, module_of, room_of

SOURCES = {file: (PACKAGE / file).read_text(encoding="utf-8") for file in files()}
LONG = 600
WHY_LONG = "he file is long because "

# ---- Imports ---------------------------------------------------------------------------------------------------------


def arrows(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """For each file those that it imports, anywhere in it. The root, which every import runs first, counts where a name is used."""
    known = {module_of(file): file for file in sources}
    return {file: {known[module] for module in _imports(ast.parse(text), known)} - {file} for file, text in sources.items()}


def _imports(tree: ast.Module, known: Mapping[str, str]) -> Iterator[str]:
    nodes = list(ast.walk(tree))
    for node in nodes:
        match node:
            case ast.ImportFrom(level=0, module=str(module)) if _ours(module):
                yield from (f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module for alias in node.names)
            case ast.ImportFrom(level=level) if level:
                raise AssertionError(f"line {node.lineno}: imports begin at ditkernels")
            case ast.Import():
                for alias in node.names:
                    name = alias.asname or alias.name
                    if _ours(alias.name) and ("." in alias.name or any(isinstance(n, ast.Name) and n.id == name for n in nodes)):
                        yield alias.name
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"), args=[asked, *_]):
                named = asked.values[0] if isinstance(asked, ast.JoinedStr) else asked
                if isinstance(named, ast.Constant) and _ours(str(named.value)):
                    yield str(named.value).rstrip(".")


def _ours(module: str) -> bool:
    return module.partition(".")[0] == "ditkernels"


def upwards(sources: Mapping[str, str]) -> list[str]:
    """The imports of a file in a higher tier."""
    return [f"{a} -> {b}" for a, found in arrows(sources).items() for b in found if TIERS[room_of(b)] > TIERS[room_of(a)]]


def circle(sources: Mapping[str, str]) -> list[str]:
    """Files that import each other in a circle, none if there is no circle."""
    try:
        graphlib.TopologicalSorter(arrows(sources)).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_the_page_names_every_room_once() -> None:
    assert sorted(room for room, _ in ROOMS) == sorted({room_of(file) for file in SOURCES})
    assert [tier for _, tier in ROOMS] == sorted(TIERS.values()), "the lowest come first"


def test_no_import_goes_up() -> None:
    assert not upwards(SOURCES)


def test_no_files_import_each_other_in_a_circle() -> None:
    assert not circle(SOURCES)


def test_no_library_room_imports_a_command() -> None:
    importers = {room_of(a) for a, found in arrows(SOURCES).items() if any(room_of(b) == "commands" for b in found)}
    assert importers == {"commands", "cli"}


PLANTED = {
    "at the top": "from ditkernels.ops.norm import modulate_norm",
    "a module": "from ditkernels.ops import norm",
    "inside a function": "def f():\n    import ditkernels.ops.norm as n",
    "for type checkers": "if TYPE_CHECKING:\n    from ditkernels.ops.norm import modulate_norm",
    "by its name": "importlib.import_module('ditkernels.ops.norm')",
    "by a part of its name": "importlib.import_module(f'ditkernels.ops.norm.{name}')",
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_an_import_that_goes_up_is_found(planted: str) -> None:
    assert upwards({"rng.py": planted, "ops/__init__.py": "", "ops/norm/__init__.py": ""}) == ["rng.py -> ops/norm/__init__.py"]


@pytest.mark.parametrize("planted, found", [("import ditkernels", False), ("import ditkernels\nditkernels.train()", True)])
def test_the_root_counts_where_a_name_of_it_is_used(planted: str, found: bool) -> None:
    assert bool(upwards({"rng.py": planted, "__init__.py": ""})) == found


def test_a_circle_is_found() -> None:
    there_and_back = {"ops/a.py": "from ditkernels.ops import b", "ops/b.py": "def f():\n    from ditkernels.ops.a import g"}
    assert set(circle(there_and_back)) == {"ops/a.py", "ops/b.py"}


# ---- Sizes -----------------------------------------------------------------------------------------------------------


def test_long_files_and_no_others_say_why_they_are_long() -> None:
    long = {file for file, text in SOURCES.items() if len(text.splitlines()) > LONG}
    assert long == {file for file, text in SOURCES.items() if WHY_LONG in (ast.get_docstring(ast.parse(text)) or "")}


def test_the_root_holds_at_most_twelve_files() -> None:
    assert len([file for file in SOURCES if "/" not in file]) <= 12


def test_a_command_is_a_module_and_a_module_a_command() -> None:
    modules = {file.removeprefix("commands/").removesuffix(".py") for file in SOURCES if file.startswith("commands/")}
    assert modules - {"__init__"} == set(COMMANDS)
    for command in COMMANDS:
        module = importlib.import_module(f"ditkernels.commands.{command}")
        assert callable(module.add_arguments)
        assert callable(module.run)
