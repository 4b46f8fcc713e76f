"""Public names: they come when they are asked for, functions stay functions, and old paths still work and warn once."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ditkernels
from ditkernels import _moved
from tools.tree import ROOT

SOURCE = Path(ditkernels.__file__)
OLD = [name for name in _moved.MOVED if name != "data"]


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "always::DeprecationWarning", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def printed(program: str) -> str:
    done = run(program)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- Where names live ------------------------------------------------------------------------------------------------


def test_what_type_checkers_see_is_what_is_imported() -> None:
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    homes = {
        alias.name: "" if (module := node.module or "") == "ditkernels" else module.removeprefix("ditkernels.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name: home for name, home in homes.items() if home} == ditkernels._HOMES
    assert {name for name, home in homes.items() if not home} == set(ditkernels._ROOMS)
    assert sorted({*homes, "__version__"}) == sorted(ditkernels.__all__)


@pytest.mark.parametrize("name", ditkernels.__all__)
def test_every_public_name_is_there_and_listed(name: str) -> None:
    assert getattr(ditkernels, name) is getattr(ditkernels, name)
    assert name in dir(ditkernels)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(AttributeError, match="module 'ditkernels' has no attribute 'DiT_XXL_2'"):
        ditkernels.DiT_XXL_2  # noqa: B018


# ---- Old paths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", OLD)
def test_an_old_path_finds_every_name_in_its_new_homes(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    full = f"ditkernels.{old}"
    for name in [name for name in sys.modules if name == full or name.startswith(f"{full}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.warns(DeprecationWarning, match=f"{full} has moved to ditkernels"):
        module = importlib.import_module(full)
    for home in _moved.MOVED[old]:
        found = importlib.import_module(f"ditkernels.{home}")
        public = [name for name, value in vars(found).items() if getattr(value, "__module__", None) == found.__name__]
        assert all(hasattr(module, name) for name in public)
    with pytest.raises(AttributeError, match=f"module '{full}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


PUBLIC = {
    "checkpoint": "load_public_checkpoint, load_checkpoint, save_checkpoint, Checkpoint, CheckpointError, newest_checkpoint",
    "config": "TrainConfig",
    "data": "load_digits, open_data, ImageFolder, TrainingData, LabelledImages, LatentBatches",
    "evaluate": "Inception, evaluate, Evaluation, load_reference, Features, METRICS",
    "evaluate.monitor": "Monitor",
    "flops": "count, rows",
    "sampler": "SampleConfig, load_model, sample, sample_progressive, generate, Job, Batches, Labels, World, SOLVERS",
    "trainer": "train, Trainer, TrainResult",
    "vae": "load_vae, VAE, LatentSpace",
}


@pytest.mark.parametrize("old", PUBLIC)
def test_what_programs_import_from_an_old_path_still_comes_and_warns_once(old: str) -> None:
    line = f"from ditkernels.{old} import {PUBLIC[old]}"
    done = run(f"{line}\n{line}\nimport ditkernels.{old}")
    assert done.returncode == 0, done.stderr
    warnings = [text for text in done.stderr.splitlines() if "DeprecationWarning" in text]
    where = "<string>:1: DeprecationWarning: ditkernels."
    expected = {text for text in warnings if text.startswith(where)}
    assert expected == set(warnings)
    assert any(f"ditkernels.{old} has moved to" in text for text in warnings)
    if old != "data":
        assert len(warnings) == 1 + ("." in old), "each module warns once, and the package that it lay in"


@pytest.mark.parametrize("first, second", [("evaluate", "evaluate.monitor"), ("evaluate.monitor", "evaluate")])
def test_evaluate_stays_the_function_in_whichever_order_old_paths_are_imported(first: str, second: str) -> None:
    program = f"""
import ditkernels.{first}, ditkernels.{second}
from ditkernels.evaluate.monitor import Monitor
import ditkernels.evaluation.evaluate, ditkernels.accelerate.report
assert callable(ditkernels.evaluate) and callable(ditkernels.accelerate)
from ditkernels import accelerate, evaluate
print(evaluate.__module__, accelerate.__module__, Monitor.__module__)
"""
    assert printed(program).split() == ["ditkernels.evaluation.evaluate", "ditkernels.accelerate", "ditkernels.evaluation.monitor"]


def test_a_folder_that_an_update_left_behind_hides_no_old_path(tmp_path: Path) -> None:
    (tmp_path / "sampler" / "__pycache__").mkdir(parents=True)
    program = (
        f"import ditkernels; ditkernels.__path__.insert(0, {str(tmp_path)!r}); from ditkernels.sampler import sample; print(sample)"
    )
    assert "function sample" in printed(program)


def test_no_code_of_ours_uses_an_old_path() -> None:
    old = {f"ditkernels.{name}" for name in OLD}
    for folder in ("ditkernels", "tests", "benchmarks", "tools", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                named = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
                if isinstance(node, ast.ImportFrom) and node.module is not None:
                    named = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                used = (named & old) - {"ditkernels.evaluate"}  # the function
                assert not used, f"{path}:{node.lineno}: {used}"


def test_no_page_uses_an_old_path() -> None:
    # The log tells of what was.
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(set((ROOT / "docs").rglob("*.md")) - {ROOT / "docs/log.md"})]
    for page in pages:
        for name in re.findall(r"\bditkernels\.(\w+(?:\.\w+)?)", page.read_text(encoding="utf-8")):
            assert name == "evaluate" or not {name, name.partition(".")[0]} & set(OLD), f"{page}: ditkernels.{name}"
