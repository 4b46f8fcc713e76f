"""Three lines that train and three that sample: the images are the bytes that the command writes."""

import numpy as np
import pytest
import torch

import ditkernels
from ditkernels.checkpoints.format import Checkpoint, save_checkpoint
from ditkernels.cli import main
from tests.sampling.test_sampler import random_model
from tools.tree import ROOT

LABELS = [2, 0, 1, 1, 2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = random_model(channels=1)
    path = tmp_path_factory.mktemp("checkpoint")
    config = {"model": {"num_heads": 2, "input_size": [4, 6], "num_classes": 3}, "training": {"vae": "none"}}
    save_checkpoint(path, Checkpoint(model.state_dict(), model.state_dict(), 5, config))
    return path


def test_three_lines_sample_what_the_command_writes(checkpoint, tmp_path):
    model = ditkernels.load_model(checkpoint).to("cpu")
    images = ditkernels.sample(model, LABELS, steps=3, guidance=2.0, seed=7)
    (tmp_path / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS), encoding="utf-8")
    flags = ["--labels-file", str(tmp_path / "labels.txt"), "--count", "5", "--steps", "3", "--cfg-scale", "2", "--seed", "7"]
    more = ["--guided-channels", "all", "--device", "cpu", "--formats", "npz", "--out", str(tmp_path / "out")]
    assert main(["sample", str(checkpoint), *flags, *more]) == 0
    with np.load(tmp_path / "out/samples.npz") as written:
        assert (images.dtype, images.shape) == (np.uint8, (5, 4, 6, 3))
        assert np.array_equal(images, written["arr_0"])


def test_more_images_than_a_batch_holds(checkpoint):
    model = ditkernels.load_model(checkpoint).model
    many = ditkernels.sample(model, torch.tensor(LABELS), steps=2, batch_size=2)
    assert np.array_equal(many, ditkernels.sample(model, LABELS, steps=2, batch_size=2))
    assert len(many) == 5


def test_the_long_form_is_as_it_was(checkpoint):
    model = ditkernels.load_model(checkpoint).model
    config = ditkernels.SampleConfig(guidance_scale=2.0, guided_channels=None)
    drawn = ditkernels.sample(model, ditkernels.create_diffusion("2"), LABELS, config)
    named = ditkernels.sample(model, diffusion=ditkernels.create_diffusion("2"), labels=LABELS, config=config)
    assert drawn.shape == (5, 1, 4, 6)
    assert torch.equal(drawn, named)


def test_latents_need_a_vae_and_are_decoded_by_the_one_of_the_run(monkeypatch):
    model = random_model(channels=4)
    with pytest.raises(ValueError, match="vae: got none for a model that draws latents of 4 channels"):
        ditkernels.sample(model, LABELS, steps=2)
    asked = []

    class Doubling:
        def decode(self, latents):
            return latents[:, :3].clamp(-1, 1).repeat_interleave(2, -1).repeat_interleave(2, -2)

    monkeypatch.setattr("ditkernels.sampling.simple.load_vae", lambda name, device: asked.append(name) or Doubling())
    loaded = ditkernels.load_model.__globals__["Loaded"](model, Checkpoint({}, config={"training": {"vae": "mse"}}), "")
    assert ditkernels.sample(loaded, LABELS, steps=2).shape == (5, 8, 12, 3)
    assert ditkernels.sample(model, LABELS, steps=2, vae="ema").shape == (5, 8, 12, 3)
    assert asked == ["mse", "ema"]


@pytest.mark.parametrize(
    "labels, changes, message",
    [
        ([3], {}, r"labels: got 3, allowed are 0\.\.2"),
        ([], {}, "classes: got none"),
        ([0], {"guidance": -1.0}, "guidance_scale: got -1"),
    ],
)
def test_what_is_out_of_range_is_named(checkpoint, labels, changes, message):
    with pytest.raises(ValueError, match=message):
        ditkernels.sample(ditkernels.load_model(checkpoint), labels, steps=2, **changes)


def test_the_readmes_lines_train_and_sample(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = (part.split("```")[0] for part in text.split("```python\n")[1:] if "ditkernels.train(" in part)
    lines = [line for line in block.splitlines() if line and not line.startswith("import ")]
    assert len(lines) == 6
    monkeypatch.chdir(tmp_path)
    names = {"ditkernels": ditkernels}
    # The same lines at toy size.
    for full, toy in (("steps=400", "steps=2"), ('"hidden_size": 64', '"hidden_size": 16'), ("steps=50", "steps=2")):
        assert full in block
        block = block.replace(full, toy)
    exec(block, names)
    assert names["images"].shape == (3, 8, 8, 3)
    assert (tmp_path / "run").is_dir()
