"""The studies run from end to end at toy size, and say what they found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.studies import digits as study
from tests.helpers import commands


def run(name: str, *arguments: str, out: Path) -> list[dict[str, Any]]:
    """Runs a script as the shell would, and returns the rows of its JSON."""
    commands.run(f"benchmarks.studies.{name}", "--device", "cpu", "--json", str(out), *arguments)
    return json.loads(out.read_text(encoding="utf-8"))["rows"]


def test_scaling(tmp_path, capsys):
    toy = (
        "--sizes",
        "16x1,32x1",
        "--patches",
        "4,2",
        "--train-steps",
        "3",
        "--batch-size",
        "4",
        "--count",
        "20",
    )
    figures = ("--sampling-steps", "2,4", "--figures", str(tmp_path))
    rows = run("scaling", *toy, *figures, out=tmp_path / "scaling.json")
    assert [row["model"] for row in rows[::2]] == ["16x1/4", "16x1/2", "32x1/4", "32x1/2"]
    assert rows[1]["sampling_gflops"] == pytest.approx(4 * rows[1]["gflops"])
    gflops = [row["gflops"] for row in rows[::2]]
    assert gflops[0] < gflops[1] < gflops[3]
    assert all(row["distance"] > 0 for row in rows)
    for name in ("scaling-models.png", "scaling-steps.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert "32x1/2" in capsys.readouterr().out


def test_scaling_names_a_wrong_size(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("scaling", "--sizes", "20x2", out=tmp_path / "scaling.json")
    assert "allowed is WIDTHxDEPTH" in capsys.readouterr().err


def test_guidance(tmp_path):
    toy = ("--train-steps", "3", "--batch-size", "4", "--count", "20", "--sampling-steps", "2")
    figure = ("--scales", "1,3", "--figure", str(tmp_path / "guidance.png"))
    rows = run("guidance", *toy, *figure, out=tmp_path / "guidance.json")
    assert [row["scale"] for row in rows] == [1.0, 3.0]
    assert all(0 <= row["accuracy"] <= 1 and row["diversity"] > 0 for row in rows)
    assert (tmp_path / "guidance.png").stat().st_size > 10_000


def test_the_judge_reads_real_digits_and_its_features_are_its_network():
    digits, judge, reference = study.real_digits()
    pixels = torch.from_numpy(study.pixels_of(digits.images))
    features = judge(pixels)
    assert (features.logits.argmax(1) == digits.labels).double().mean() > 0.95
    assert features.pool.shape == (len(digits), 64)
    assert reference.count == len(digits)


def test_training_for_the_studies_learns():
    digits, _, _ = study.real_digits()
    fresh, trained = (study.train(study.new_model(16, 1, 4, 0), digits, steps=steps, batch_size=32, seed=0) for steps in (1, 200))
    t = torch.full((len(digits),), 500)
    diffusion = study.create_diffusion("")
    losses = []
    for model in (fresh, trained):
        generator = torch.Generator().manual_seed(1)
        found = diffusion.training_losses(model, digits.images, t, {"y": digits.labels}, generator=generator)
        losses.append(found["mse"].mean().item())
    assert losses[1] < 0.8 * losses[0]
