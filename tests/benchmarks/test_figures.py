"""Figures are drawn from measured data, and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import figures
from tools.tree import ROOT

ON_GPU = {
    "device": "NVIDIA H200",
    "compute_capability": "9.0",
    "torch": "2.11.0",
    "date": "2030-01-01T00:00",
    "commit": "abc",
}
MEASURED = [figure for figure in figures.FIGURES if figure.measured]
TIMING = {"median_ms": 2.0}


def rows_of(source: str) -> list[dict[str, Any]]:
    """Rows as the benchmark writes them, those without a speed among them."""
    note = {"contender": "triton", "backend": "xformers", "note": "cannot serve"}
    size = {"model": "DiT-XL/2", "input_size": 32}
    if source == "ops.json":
        common = {"op": "modulate_norm", "precision": "fp32+bf16", **TIMING}
        timed = [
            {**common, "contender": name, "pass": way, "of_copy": 0.8}
            for name in ("eager", "cuda")
            for way in ("forward", "backward")
        ]
    elif source == "training.json":
        common = {**size, "batch": 256, **TIMING}
        timed = [{**common, "contender": name, "images_per_s": 700.0} for name in ("eager-bf16", "ours-bf16")]
    elif source == "sampling.json":
        timed = [
            {**size, "contender": name, "batch": batch, "steps": 50, "images_per_s": 3.0 * batch, **TIMING}
            for name in ("eager-bf16", "sampler-bf16")
            for batch in (1, 8)
        ]
    else:
        timed = [
            {"shape": [32, tokens, 3, 16, 72], "backend": "cudnn", "pass": way, "tflops": 300.0, **TIMING}
            for tokens in (256, 1024)
            for way in ("forward", "backward")
        ]
    return [{"contender": "copy"}, *timed, note]


def write(folder: Path, source: str, **changed: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    result = {"environment": ON_GPU, "complete": True, "rows": rows_of(source), **changed}
    (folder / source).write_text(json.dumps(result), encoding="utf-8")


def draw(results: Path, out: Path, *names: str) -> None:
    figures.main(["--results", str(results), "--out", str(out), "--only", ",".join(names)])


@pytest.mark.parametrize("figure", MEASURED, ids=lambda figure: figure.file)
def test_a_figure_is_drawn_from_what_a_gpu_measured(figure: figures.Figure, tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "2030-01-01-nvidia-h200", figure.source)
    draw(tmp_path, tmp_path / "out", figure.file)
    assert (tmp_path / "out" / figure.file).read_bytes().startswith(b"\x89PNG")
    assert "NVIDIA H200, torch 2.11.0, 2030-01-01, commit abc" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changed", [{}, {"complete": False}, {"environment": {**ON_GPU, "compute_capability": None}}],
    ids=["nothing", "cut short", "on a CPU"],
)  # fmt: skip
def test_without_measured_data_it_is_not_drawn_and_named(
    changed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if changed:
        write(tmp_path / "2030-01-01-somewhere", "training.json", **changed)
    draw(tmp_path, tmp_path / "out", "training.png")
    assert not (tmp_path / "out").exists()
    assert "training.png: not drawn, there is no training.json (whole, of a GPU: make gpu)" in capsys.readouterr().out


def test_the_latest_result_is_taken(tmp_path: Path) -> None:
    for day in ("02", "03", "01"):
        of = {**ON_GPU, "date": f"2030-01-{day}T00:00"}
        write(tmp_path / f"of-{day}", "ops.json", environment=of)
    found = figures.data_of(MEASURED[0], tmp_path)
    assert found is not None
    assert found["environment"]["date"] == "2030-01-03T00:00"


def test_the_figures_in_the_docs_are_those_of_the_committed_data(tmp_path: Path) -> None:
    drawn = [figure for figure in figures.FIGURES if figure.source in ("guidance.json", "scaling.json", "solvers.json")]
    assert len(drawn) == 4
    draw(ROOT / "benchmarks/results", tmp_path, *(figure.file for figure in drawn))
    for figure in drawn:
        assert (tmp_path / figure.file).stat().st_size > 10_000
        assert (ROOT / "docs/figures" / figure.file).exists()
