"""What the docs say can be done: ops and backends there are, commands that parse, files that exist."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest

from ditkernels import ops
from ditkernels.ops import dispatch
from tests.helpers import commands
from tools.tree import ROOT

RESULTS = ROOT / "benchmarks/results/README.md"
# The log tells of what was, commands that are gone among it.
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted(set((ROOT / "docs").rglob("*.md")) - {ROOT / "docs/log.md"}),
    RESULTS,
]
FOLDERS = ("benchmarks", "tools/kernel_proof")
SCRIPTS = sorted(file for name in FOLDERS for file in (ROOT / name).glob("**/[!_]*.py") if not file.is_symlink())
COMMAND = re.compile(r"(?:torchrun .* -m )?(ditkernels [a-z].*|python -m (?:benchmarks|tools)\.\w.*)")
PATH = re.compile(r"(?<![\w/.<-])(?:benchmarks|csrc|ditkernels|docs|examples|tests|tools)/[\w./*-]*[\w*]")
PLACEHOLDERS = {"benchmarks/results/DIR"}


def commands_in(path: Path) -> list[list[str]]:
    """Every command of ours in a page or a docstring, be it a line of its own or between backticks, without its comment."""
    text = re.sub(r"^```.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = re.sub(r"\\+\n\s*", "", text)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    lines = [re.split(r" #|\s{2,}|$", line.strip(), maxsplit=1)[0] for line in text.splitlines()]
    found = [COMMAND.fullmatch(written) for written in (*lines, *spans)]
    # A sentence may begin a line with a command's name.
    return [shlex.split(match[1]) for match in found if match and "`" not in match[1]]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def rows_under(heading: str, page: str) -> list[str]:
    """The first cells of the table in a section of a page."""
    section = (ROOT / page).read_text(encoding="utf-8").split(f"# {heading}\n")[1].split("\n## ")[0]
    _, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
    return [row.split("|")[1] for row in rows]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_docs_list_the_public_ops_and_their_arguments() -> None:
    calls = re.findall(r"(\w+)\(([^)]*)\)", " ".join(rows_under("Ops", "docs/ops.md")))
    assert {name for name, _ in calls} == set(ops.__all__)
    for name, written in calls:
        known = " ".join(inspect.signature(getattr(ops, name)).parameters)
        unknown = [word for word in re.findall(r"\w+", written) if not re.search(rf"(\b|_){word}(\b|_)", known)]
        assert not unknown, f"{name} takes no {', '.join(unknown)}"


def test_the_docs_list_the_backends_of_attention() -> None:
    written = re.findall(r"`(\w+)`", " ".join(rows_under("Attention backends", "docs/models.md")))
    assert sorted(written) == sorted(dispatch.ATTENTION_BACKENDS)


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=name_of)
def test_every_command_parses(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands_in(path):
        words = [word for word in command if word != "..."]
        program = 3 if words[0] == "python" else 2
        if words != command or len(words) == program or words[-1].startswith("--"):
            # It is named, and not all that it needs is written.
            with pytest.raises(SystemExit) as stop:
                commands.parse([*words[:program], "--help"])
            shown = capsys.readouterr().out
            assert stop.value.code == 0, command
            assert not [word for word in words if word.startswith("--") and word not in shown], command
        else:
            commands.parse(words)


def test_commands_are_found() -> None:
    found = [" ".join(command) for command in commands_in(ROOT / "README.md")]
    assert "ditkernels train --config xl2.yaml --resume auto" in found
    assert "ditkernels sample results/digits --out samples --count 50000 --batch-size 64 --cfg-scale 1.5" in found
    assert "python -m benchmarks.speed.ops" in [" ".join(command) for command in commands_in(ROOT / "docs/measured.md")]
    assert "python -m benchmarks.speed.training --repeats 3" in [" ".join(c) for c in commands_in(RESULTS)]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\[[^]\"]*\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (path.parent / t).exists()]
    assert not missing


def paths_in(text: str) -> set[str]:
    """The paths in this tree that a text names, be they patterns, without those that its diffs add or a build makes."""
    added = re.findall(r"^--- /dev/null\n\+\+\+ (\S+)$", text, flags=re.MULTILINE)
    return {path for path in PATH.findall(text) if not path.endswith(".so")} - {*added}


@pytest.mark.parametrize("path", [*PAGES, ROOT / "Makefile"], ids=name_of)
def test_every_path_that_is_named_exists(path: Path) -> None:
    missing = {named for named in paths_in(path.read_text(encoding="utf-8")) if not any(ROOT.glob(named))}
    assert not missing - PLACEHOLDERS


def test_paths_are_found() -> None:
    assert "examples/digits.yaml" in paths_in("`examples/digits.yaml`, of which there are more")
    assert {"csrc/cpu/*", "tools/build_native.py"} <= paths_in((ROOT / "Makefile").read_text(encoding="utf-8"))
    assert {"tests/numerics.py", "ditkernels/reference.py"} <= paths_in((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def test_the_questions_quote_real_errors() -> None:
    page = (ROOT / "docs/faq.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^## `(.+)`$", page, flags=re.MULTILINE)
    files = [*(ROOT / "ditkernels").rglob("*.py"), ROOT / "tools/build_native.py"]
    # A message may be written in pieces that stand side by side.
    source = re.sub(r"\"\s*f?\"", "", "".join(file.read_text(encoding="utf-8") for file in files))
    assert len(quoted) >= 8
    for heading in quoted:
        pieces = [piece.strip(" :`'()") for piece in heading.split("...")]
        assert not [piece for piece in pieces if piece not in source], heading
