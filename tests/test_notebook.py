"""The notebook runs from its first cell to its last, at toy size, and is kept without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tools.tree import ROOT

NOTEBOOK = ROOT / "examples/quickstart.ipynb"
TOY = {"steps=600": "steps=2", "steps=25": "steps=2", "log_every=100": "log_every=1"}


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for full, toy in TOY.items():
        assert any(full in cell.source for cell in notebook.cells)
        for cell in notebook.cells:
            cell.source = cell.source.replace(full, toy)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = [str(output) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("parts fused, 0 left" in text for text in texts)


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)]
