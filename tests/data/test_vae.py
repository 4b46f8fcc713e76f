"""The autoencoder on the fly: latents by key, found locally, and refused where it does not fit."""

import sys

import pytest
import torch
from PIL import Image

from ditkernels.cli import main
from ditkernels.data.source import open_data
from ditkernels.data.vae import load_vae
from ditkernels.pretrained import arguments_of
from ditkernels.rng import Stream, normals
from ditkernels.training.config import TrainConfig
from ditkernels.training.factory import build_model, latent_shape
from ditkernels.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small AutoencoderKL with random weights: 3 channels to 4, edges halved once."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def vae(saved):
    return load_vae(saved, CPU)


@pytest.fixture
def images(tmp_path):
    for name in ("a", "b"):
        for index in range(3):
            (tmp_path / "images" / name).mkdir(exist_ok=True, parents=True)
            Image.effect_noise((10, 8), 60).convert("RGB").save(tmp_path / "images" / name / f"{index}.png")
    return str(tmp_path / "images")


def test_latents_are_scaled_draws_from_the_posterior(vae):
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    noise = torch.randn(2, 4, 4, 4)
    mean, std = vae.posterior(images)
    assert vae.latent_shape(8) == mean.shape[1:] == std.shape[1:] == (4, 4, 4)
    assert (std > 0).all()
    assert torch.equal(vae.latents(images, noise), (mean + std * noise) * 0.5)
    assert vae.decode(mean).shape == images.shape
    assert torch.equal(vae.decode(mean * 0.5), vae.autoencoder.decode(mean).sample)


def test_the_trainer_encodes_by_key(saved, vae, images):
    config = TrainConfig(
        data_path=images,
        vae=saved,
        image_size=8,
        num_classes=2,
        model="DiT-S/2",
        hidden_size=16,
        depth=1,
        num_heads=2,
        global_batch_size=4,
        device="cpu",
        num_workers=0,
    )
    data = open_data(config)
    model = build_model(config, latent_shape(config, data, vae))
    assert arguments_of(model)["in_channels"] == 4
    assert arguments_of(model)["input_size"] == [4, 4]
    trainer = Trainer(config, data, vae, model)
    batch = data.train[0]
    seen = []
    genuine = trainer.diffusion.training_losses

    def spied(model, x, *rest):
        seen.append(x)
        return genuine(model, x, *rest)

    trainer.diffusion.training_losses = spied
    trainer.train_step(batch, 5, 1e-3)
    noise = normals(0, Stream.POSTERIOR, 5, torch.arange(4), (4, 4, 4))
    assert torch.equal(seen[0], vae.latents(batch.images.float() / 127.5 - 1, noise))


def test_a_run_on_images_through_a_vae(saved, images, tmp_path, capsys):
    flags = [
        *(
            "train",
            "--data-path",
            images,
            "--vae",
            saved,
            "--image-size",
            "8",
            "--num-classes",
            "2",
            "--steps",
            "2",
        ),
        *("--model", "DiT-S/2", "--hidden-size", "16", "--depth", "1", "--num-heads", "2", "--device", "cpu"),
        *("--global-batch-size", "4", "--num-workers", "0", "--sample-every", "2", "--sample-steps", "2"),
        *(
            "--results-dir",
            str(tmp_path / "run"),
            "--val-path",
            images,
            "--val-every",
            "2",
            "--val-images",
            "4",
        ),
    ]
    assert main(flags) == 0
    with Image.open(tmp_path / "run" / "samples" / "step-00000002.png") as picture:
        assert picture.size == (32, 32)


@pytest.mark.parametrize("name", ["ema", "mse"])
def test_a_named_vae_that_is_not_here_says_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=f"hf download stabilityai/sd-vae-ft-{name}"):
        load_vae(name, CPU)


def test_a_vae_that_does_not_fit_is_named(vae, tmp_path):
    with pytest.raises(ValueError, match="image_size: got 9, the VAE needs a multiple of 2"):
        vae.latent_shape(9)
    with pytest.raises(ValueError, match="vae: got 'emma', which is no folder; allowed are ema, mse"):
        load_vae("emma", CPU)
    with pytest.raises(ValueError, match="holds no AutoencoderKL"):
        load_vae(str(tmp_path), CPU)


def test_a_missing_diffusers_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install ditkernels\[vae\]; --vae none"):
        load_vae("ema", CPU)
