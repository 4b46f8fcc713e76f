"""The examples run, in seconds, and do what they say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ditkernels
from ditkernels.reference import DiT
from tests import numerics
from tools.tree import ROOT

EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DITKERNELS")}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(printed: str) -> list[float]:
    return [float(match) for match in re.findall(r"loss ([\d.]+)", printed)]


@pytest.mark.parametrize("name", ["train_public_dit.py", "sit.py"])
def test_training_runs_on_fused_ops_and_learns(name: str) -> None:
    pytest.importorskip("torchvision", reason="timm needs torchvision, which cannot be had here")
    pytest.importorskip("timm")
    printed = run(name, "--steps", "20")
    assert "(across blocks)  fused: gated_residual_norm, final_layer" in printed
    first, *_, last = losses(printed)
    assert last < 0.9 * first


def test_diffusers_sampling_gives_the_same_images() -> None:
    pytest.importorskip("diffusers")
    printed = run("diffusers_sampling.py", "--steps", "4")
    assert "fused: gated_residual_norm, final_layer" in printed
    difference = re.search(r"sampled \(4, 4, 8, 8\), largest difference from before (\S+)", printed)
    assert difference is not None
    assert float(difference[1]) < numerics.GUIDED_SAMPLES


def test_every_example_is_run_here() -> None:
    assert {p.name for p in EXAMPLES.glob("*.py")} == {
        "diffusers_sampling.py",
        "public_models.py",
        "sit.py",
        "train_public_dit.py",
    }


def test_training_starts_from_weights_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision", reason="timm needs torchvision, which cannot be had here")
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["train_public_dit.py", "--steps", "0", "--init-from", str(tmp_path / "a.ckpt")])
    started = []
    monkeypatch.setattr(ditkernels, "accelerate", started.append)
    state = DiT(input_size=8, hidden_size=96, depth=4, num_heads=4, num_classes=10).state_dict()
    torch.save({"state_dict": {f"ema_model._orig_mod.{name}": v.bfloat16() for name, v in state.items()}}, tmp_path / "a.ckpt")
    runpy.run_path(str(EXAMPLES / "train_public_dit.py"), run_name="__main__")
    found = started[0].state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], v.bfloat16().float()) for name, v in state.items())
