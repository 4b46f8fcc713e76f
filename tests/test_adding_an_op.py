"""docs/adding-an-op.md is true: its changes, applied to a copy of the tree, give an op that passes its tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tools.tree import ROOT

DIFF = re.compile(r"^```diff\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_op_of_the_page_passes_its_tests(tmp_path: Path) -> None:
    page = (ROOT / "docs/adding-an-op.md").read_text(encoding="utf-8")
    for name in ("ditkernels", "tests", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    changes = DIFF.findall(page)
    assert len(changes) == 5
    apply = ["git", "apply", "-p0", "--unidiff-zero", "--recount", "-"]
    for change in changes:
        subprocess.run(apply, cwd=tmp_path, input=change, text=True, check=True, env=_outside_a_repository(tmp_path))
    chosen = "squared or schemas or reference_s or kernels_take or every_op"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", chosen]
    tests = ["tests/ops/test_squared_relu.py", "tests/ops/test_dispatch.py", "tests/diagnostics/test_check.py"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1", "DITKERNELS_CPU_LIBRARY": "none"}
    done = subprocess.run([*command, *tests], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


def _outside_a_repository(folder: Path) -> dict[str, str]:
    """git would take paths from the top of a repository that the folder may lie in."""
    return {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
