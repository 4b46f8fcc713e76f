"""What an earlier version wrote goes on: a run, samples and latents of toy size, made before the package's modules were moved.

`expected.json` holds what that version computed next. On the machine that made it the bits are the same; elsewhere numbers agree as
far as another machine's rounding lets them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditkernels import TrainConfig, train
from ditkernels.checkpoints.format import load_checkpoint, state_sha256
from ditkernels.cli import main
from ditkernels.data.latents import LatentFolder
from ditkernels.training.log import METRICS, read_metrics
from tests.numerics import AGREES_ELSEWHERE

EARLIER = Path(__file__).parent / "earlier"
EXPECTED: dict[str, Any] = json.loads((EARLIER / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(EARLIER / "run", tmp_path / "run")
    return tmp_path / "run"


def numbers(run: Path, name: str) -> dict[str, float]:
    return {str(row["step"]): row[name] for row in read_metrics(run / METRICS)}


def test_every_tensor_of_a_checkpoint_loads_unchanged() -> None:
    checkpoint = load_checkpoint(EARLIER / "run/checkpoints/step-00000003")
    assert {part: state_sha256(tensors) for part, tensors in checkpoint.parts.items()} == EXPECTED["sha256_after_3"]


def test_a_run_goes_on_at_its_step_with_the_same_data_and_noise(run: Path) -> None:
    result = train(TrainConfig(**EXPECTED["settings"], steps=6, results_dir=str(run), resume="auto"))
    assert result.step == 6
    for name in ("loss", "grad_norm"):
        expected = EXPECTED["losses" if name == "loss" else "grad_norms"]
        assert numbers(run, name) == pytest.approx(expected, rel=AGREES_ELSEWHERE)


def test_samples_agree_and_an_earlier_folder_of_samples_is_complete(tmp_path: Path) -> None:
    described = json.loads((EARLIER / "samples/metadata.json").read_text(encoding="utf-8"))
    flags = ["--count", "4", "--batch-size", "4", "--steps", "5", "--cfg-scale", "2", "--guided-channels", "all", "--clip-denoised"]
    flags += ["--formats", ",".join(described["formats"]), "--device", "cpu", "--seed", "3"]
    assert main(["sample", str(EARLIER / "run"), "--out", str(tmp_path / "new"), *flags]) == 0
    found, earlier = (np.load(folder / "latents.npy") for folder in (tmp_path / "new", EARLIER / "samples"))
    assert np.abs(found - earlier).max() <= AGREES_ELSEWHERE
    again = json.loads((tmp_path / "new/metadata.json").read_text(encoding="utf-8"))
    assert again | {"torch": None} == described | {"torch": None}


def test_latents_are_read_and_trained_on(tmp_path: Path) -> None:
    folder = LatentFolder.open(EARLIER / "latents")
    for number in range(len(folder.shards)):
        folder.verify(number)
    changed = {"data_path": str(EARLIER / "latents"), "image_size": 16, "num_classes": 2, "vae": "ema"}
    train(TrainConfig(**EXPECTED["settings"] | changed, steps=3, results_dir=str(tmp_path)))
    assert numbers(tmp_path, "loss") == pytest.approx(EXPECTED["losses_on_latents"], rel=AGREES_ELSEWHERE)


def this_machine() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {"torch": torch.__version__, "processor": model}


@pytest.mark.skipif(not this_machine().items() <= EXPECTED["made_by"].items(), reason="bits are torch's and the machine's")
def test_on_the_machine_that_made_it_the_bits_are_the_same(run: Path, tmp_path: Path) -> None:
    train(TrainConfig(**EXPECTED["settings"], steps=6, results_dir=str(run), resume="auto"))
    checkpoint = load_checkpoint(run / "checkpoints/step-00000006")
    assert {part: state_sha256(tensors) for part, tensors in checkpoint.parts.items()} == EXPECTED["sha256_after_6"]
    changed = {"data_path": str(EARLIER / "latents"), "image_size": 16, "num_classes": 2, "vae": "ema"}
    train(TrainConfig(**EXPECTED["settings"] | changed, steps=3, results_dir=str(tmp_path / "on_latents")))
    checkpoint = load_checkpoint(tmp_path / "on_latents/checkpoints/step-00000003")
    assert {part: state_sha256(tensors) for part, tensors in checkpoint.parts.items()} == EXPECTED["sha256_on_latents"]
