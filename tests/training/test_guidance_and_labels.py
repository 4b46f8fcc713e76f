"""One setting of guided channels for all that a run draws, and runs that are unconditional."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ditkernels import SampleConfig, create_diffusion, sample
from ditkernels.checkpoints.format import load_checkpoint
from ditkernels.checkpoints.run import checkpoint_directory
from ditkernels.cli import main
from ditkernels.evaluation.evaluate import OpenedReference
from ditkernels.models import DiT
from ditkernels.training import evaluations, factory
from ditkernels.training import trainer as trainer_module
from ditkernels.training.config import TrainConfig
from ditkernels.training.trainer import train

SMALL: dict[str, Any] = {
    **{"data_path": "digits", "vae": "none", "image_size": 8, "num_classes": 10, "device": "cpu", "num_workers": 0},
    **{"model": "DiT-S/8", "hidden_size": 16, "depth": 1, "num_heads": 2, "global_batch_size": 4, "optimizer": "torch"},
    **{"steps": 4, "ckpt_every": 2, "log_every": 1, "learning_rate": 1e-2, "flip": False},
}
FLAGS = ["--count", "1", "--batch-size", "1", "--steps", "2", "--device", "cpu", "--formats", "latents"]


def settings(folder: Path, **changed: Any) -> TrainConfig:
    return TrainConfig(**SMALL | {"results_dir": str(folder)} | changed)


def described(run: Path, out: Path, *flags: str) -> dict[str, Any]:
    assert main(["sample", str(run), "--out", str(out), *FLAGS, *flags]) == 0
    return json.loads((out / "metadata.json").read_text(encoding="utf-8"))["sampling"]


def weights_after(run: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(checkpoint_directory(run, step)).model)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- Guided channels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, guided", [(1, None), (3, None), (4, 3), (5, None), (16, None)])
def test_three_channels_of_four_are_guided_and_of_any_other_number_all(channels: int, guided: int | None) -> None:
    torch.manual_seed(0)
    model = DiT(2, 2, channels, 16, 1, 2, num_classes=2).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.3)
    drawn = {
        name: sample(model, create_diffusion("2"), [0], SampleConfig(guidance_scale=3.0, **chosen))
        for name, chosen in {"default": {}, "three": {"guided_channels": 3}, "all": {"guided_channels": None}}.items()
    }
    assert torch.equal(drawn["default"], drawn["all" if guided is None else "three"])
    assert torch.equal(drawn["three"], drawn["all"]) == (channels <= 3)


def test_grids_evaluations_and_samples_of_a_run_share_its_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    genuine, monitor = evaluations.sample_progressive, factory.Monitor
    monkeypatch.setattr(evaluations, "sample_progressive", lambda *a: seen.append(a[3].guided_channels) or genuine(*a))
    monkeypatch.setattr(factory, "Monitor", lambda *a, **rest: seen.append(a[1].guided_channels) or monitor(*a, **rest))
    monkeypatch.setattr(factory, "load_extractor", lambda *a: len)
    monkeypatch.setattr(trainer_module, "rehearse", lambda *_: None)
    nothing = OpenedReference(None, {}, None)
    monkeypatch.setattr(factory.OpenedReference, "of", lambda *_: nothing)
    drawn = {"sample_every": 4, "sample_steps": 2, "eval_every": 99, "eval_reference": "not read"}
    train(settings(tmp_path / "run", guided_channels="2", **drawn))
    assert seen == [2, 2]
    recorded = load_checkpoint(checkpoint_directory(tmp_path / "run", 4)).config["training"]["guided_channels"]
    assert recorded == "2"
    assert described(tmp_path / "run", tmp_path / "own")["guided_channels"] == 2
    assert described(tmp_path / "run", tmp_path / "all", "--guided-channels", "all")["guided_channels"] is None


def test_the_help_says_what_the_default_is_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("sample", "train"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "auto: 3 of 4, as in DiT's published samples, else all" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("value", ["0", "-1", "some", "1.5"])
def test_other_settings_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match="guided_channels: got"):
        TrainConfig(guided_channels=value)


# ---- Unconditional runs ----------------------------------------------------------------------------------------------


def test_an_unconditional_run_drops_no_labels_and_is_sampled_without_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    genuine = trainer_module.GaussianDiffusion.training_losses

    def losses(self: Any, model: Any, x: Any, t: Any, given: dict[str, Any], *rest: Any) -> Any:
        seen.append(given["y"])
        return genuine(self, model, x, t, given, *rest)

    monkeypatch.setattr(trainer_module.GaussianDiffusion, "training_losses", losses)
    found = train(settings(tmp_path / "run", unconditional=True, sample_every=4, sample_steps=2, steps=8))
    assert torch.cat(seen).tolist() == [0] * 32
    assert found.model.y_embedder.rows == 1
    assert described(tmp_path / "run", tmp_path / "samples")["guidance_scale"] == 1.0
    assert main(["sample", str(tmp_path / "run"), "--out", str(tmp_path / "o"), *FLAGS, "--cfg-scale", "2"]) == 2
    assert "allowed is 1: the model has no null class" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"eval_guidance: got 2\.0, allowed is 1"):
        train(settings(tmp_path / "other", unconditional=True, eval_every=4, eval_guidance=2.0))


def test_an_unconditional_run_of_an_earlier_version_goes_on_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"label_dropout: got 0\.1, allowed is 0 with unconditional"):
        train(settings(tmp_path / "new", unconditional=True, label_dropout=0.1))
    earlier = {"unconditional": True, "label_dropout": 0.1}
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "as_begun", lambda config, start: config)
        train(settings(tmp_path / "whole", **earlier))
        train(settings(tmp_path / "half", **earlier, steps=2))
    assert weights_after(tmp_path / "half", 2)["y_embedder.embedding_table.weight"].shape == (2, 16)
    train(settings(tmp_path / "half", unconditional=True, resume="auto"))
    assert same(weights_after(tmp_path / "half", 4), weights_after(tmp_path / "whole", 4))
    assert described(tmp_path / "half", tmp_path / "samples")["guidance_scale"] == 4.0
