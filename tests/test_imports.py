"""`import ditkernels` never fails over an optional part, and says what keeps a second copy from loading."""

from __future__ import annotations

import compileall
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

import ditkernels
from ditkernels.ops import _native
from tools.tree import ROOT

PACKAGE = Path(ditkernels.__file__).parent
WORKS = """
import torch, ditkernels
from ditkernels.ops import _triton, dispatch
assert ditkernels.ops.modulate_norm(torch.ones(1, 1, 4)).tolist() == [[[0.0] * 4]]
print(dispatch.fingerprint())
print(dispatch.OPS["modulate_norm"].reasons(torch.ones(1, 1, 4), None, None, None, None, 1e-6, "layernorm", False)["triton"])
"""


def run(program: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Runs a program in a process that looks for modules in these places first."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DITKERNELS", "TRITON"))}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=300)


def printed(program: str, *path: Path) -> list[str]:
    done = run(program, *path)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# ---- Triton ----------------------------------------------------------------------------------------------------------

BROKEN = {
    "RuntimeError": ("raise RuntimeError('no driver\\n here')", "RuntimeError: no driver here"),
    "OSError": ("raise OSError('libcuda.so.1: cannot open shared object file')", "OSError: libcuda.so.1: cannot open"),
    "AttributeError": ("import os; os.nothing", "AttributeError: module 'os' has no attribute 'nothing'"),
    "another version": ("jit = lambda function: function", "ModuleNotFoundError: No module named 'triton.language'"),
}


@pytest.mark.parametrize("kind", [k if k == "RuntimeError" else pytest.param(k, marks=pytest.mark.slow) for k in BROKEN])
def test_whatever_tritons_import_raises_becomes_the_backends_reason(kind: str, tmp_path: Path) -> None:
    source, told = BROKEN[kind]
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(source, encoding="utf-8")
    # The trainer counts FLOPs with a module of torch that imports Triton, and forgives ImportError alone.
    _, reason = printed(f"{WORKS}\nimport ditkernels.training.trainer", tmp_path, PACKAGE.parent)
    assert reason.startswith(f"triton cannot be imported: {told}")


# ---- Installations without sources -----------------------------------------------------------------------------------


def copy_of_package(folder: Path, *, sources: bool) -> Path:
    package = folder / "ditkernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.json"))
    if not sources:
        compile_in_place(package)
    return package


def compile_in_place(package: Path) -> None:
    compileall.compile_dir(package, legacy=True, quiet=1)
    for source in package.rglob("*.py"):
        source.unlink()


@pytest.mark.slow
def test_without_sources_the_package_works_and_triton_says_why_not(tmp_path: Path) -> None:
    copy_of_package(tmp_path, sources=False)
    _, reason = printed(WORKS, tmp_path)
    assert reason.startswith("triton.jit, which reads sources, refuses ditkernels.ops._triton._probe: ")


@pytest.mark.slow
@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("sources", [False, True])
def test_a_fingerprint_tells_versions_apart_wherever_they_lie(tmp_path: Path, sources: bool, archived: bool) -> None:
    found = []
    for version in ("one", "other"):
        folder = tmp_path / version
        package = copy_of_package(folder, sources=True)
        (package / "ops/_rows.py").open("a", encoding="utf-8").write(f"\nVERSION = {version!r}\n")
        if not sources:
            compile_in_place(package)
        place = Path(shutil.make_archive(f"{folder}-archive", "zip", folder, "ditkernels")) if archived else folder
        found.append(printed(WORKS, place)[0])
    assert found[0] != found[1]


@pytest.mark.parametrize("version", ["2.10.0.dev20251101+cu130", "2.15.0.dev20261101", "2.10.0", "2.14.1+cu130"])
def test_nightlies_of_torch_satisfy_the_requirement(version: str) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (required,) = re.findall(r'"torch(>=[^"]*)"', text)
    assert version in SpecifierSet(required)
    assert "2.9.1" not in SpecifierSet(required)


# ---- Which copy is tested --------------------------------------------------------------------------------------------


def test_pytest_says_which_copy_it_tests_with_which_libraries() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", __file__]
    header = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout.partition("collected")[0].splitlines()
    assert f"ditkernels {ditkernels.__version__} in {PACKAGE}, torch {torch.__version__}" in header
    assert f"CUDA library: {_native.cuda_library()}" in header
    assert f"CPU library: {_native.cpu_library()}" in header


# ---- A second time in one process ------------------------------------------------------------------------------------

PURGE = """
import sys
def purge():
    for name in [name for name in sys.modules if name.partition(".")[0] == "ditkernels"]:
        del sys.modules[name]
"""
INTERRUPT = """
import torch.library
define, calls = torch.library.Library.define, iter(range({calls}))
def interrupted(*args, **rest):
    next(calls)
    return define(*args, **rest)
torch.library.Library.define = interrupted
try:
    import ditkernels.ops
except StopIteration:
    torch.library.Library.define = define
"""


@pytest.mark.parametrize(
    "program",
    [
        f"{PURGE}\nimport ditkernels.ops; purge(); import ditkernels.ops",
        pytest.param(f"{INTERRUPT.format(calls=20)}\nimport ditkernels.ops", marks=pytest.mark.slow),
        pytest.param(f"{PURGE}\n{INTERRUPT.format(calls=20)}\npurge(); import ditkernels.ops", marks=pytest.mark.slow),
    ],
    ids=["purged", "interrupted", "interrupted and purged"],
)
def test_a_second_import_says_to_restart(program: str) -> None:
    done = run(program, PACKAGE.parent)
    last = done.stderr.splitlines()[-1]
    assert last == "ImportError: ditkernels was loaded once already in this process; restart it", done.stderr
