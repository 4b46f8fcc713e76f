"""Latents made once: the same bytes however they were made, and training on them is training on the images."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ditkernels import latents as latents_module
from ditkernels.config import TrainConfig
from ditkernels.data import open_data
from ditkernels.encode import EncodeConfig, encode
from ditkernels.latents import INDEX, LatentFolder
from ditkernels.vae import load_vae

CPU = torch.device("cpu")
SIZE = 8
CLASSES = {"ant": 3, "bee": 5, "cat": 3}


def make_vae(folder, seed=0, scale=0.5):
    """A small AutoencoderKL with random weights: 3 channels to 4, edges halved once, a posterior of every width."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    made = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=scale,
        shift_factor=0.25,
    )
    made.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for name, count in CLASSES.items():
        (root / name).mkdir()
        for index in range(count):
            # Brighter to the right, so that no image is its own mirror image.
            pixels = draw.integers(0, 200, (10, 12, 3)) + np.arange(12)[None, :, None] * 4
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")
    return root


def settings(images, vae, out, **changes):
    return EncodeConfig(
        **{
            "data_path": str(images),
            "vae": vae,
            "out": str(out),
            "image_size": SIZE,
            "dtype": "fp32",
            "batch_size": 4,
            "shard_size": 4,
            "num_workers": 0,
            "device": "cpu",
            **changes,
        }
    )


@pytest.fixture(scope="module")
def encoded(images, vae, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents")
    encode(settings(images, vae, out), CPU)
    return out


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------------------------
# What is stored
# ------------------------------------------------------------------------------------------------------------------


def test_every_image_and_its_mirror_image_are_stored_with_their_posterior(images, vae, encoded):
    folder = LatentFolder.open(encoded)
    data = open_data(TrainConfig(data_path=str(images), image_size=SIZE, num_classes=3, global_batch_size=11))
    assert (len(folder), folder.shape, folder.dtype) == (11, (4, 4, 4), torch.float32)
    assert [shard.count for shard in folder.shards] == [4, 4, 3]
    assert folder.class_to_idx == data.class_to_idx == {"ant": 0, "bee": 1, "cat": 2}
    own = load_vae(vae, CPU)
    for index in range(11):
        image, _ = data.train.folder.read(index, SIZE, 0)
        for side, shown in enumerate((image, image.flip(-1))):
            moments, labels = folder.read(torch.tensor([index]), torch.tensor([side == 1]))
            mean, std = own.posterior(shown[None].float() / 127.5 - 1)
            # Computed alone, and in a batch of four: only rounding differs.
            torch.testing.assert_close(moments, torch.cat([mean, std], dim=1))
            assert labels.item() == data.train.folder.labels[index]
        # Were it the mirrored latent, one encoding would do.
        both, _ = folder.read(torch.tensor([index, index]), torch.tensor([False, True]))
        assert (both[0] - both[1].flip(-1)).abs().max() > 1e-3


def test_the_index_says_what_the_latents_are(images, vae, encoded):
    index = json.loads((encoded / INDEX).read_text())
    stored = torch.cat([load_file(path)["moments"] for path in sorted(encoded.glob("*.safetensors"))])
    mean, std = stored.double().chunk(2, dim=2)
    assert index["image_size"] == SIZE
    assert index["unreadable"] == []
    assert (index["vae"]["scale"], index["vae"]["shift"], index["vae"]["factor"]) == (0.5, 0.25, 2)
    # z = mean + std·noise, over images, sides and pixels: its moments channel by channel.
    of_z = torch.sqrt(mean.var(dim=(0, 1, 3, 4), correction=0) + std.square().mean(dim=(0, 1, 3, 4)))
    torch.testing.assert_close(torch.tensor(index["statistics"]["std"]).double(), of_z)
    torch.testing.assert_close(
        torch.tensor(index["statistics"]["mean"]).double(), mean.mean(dim=(0, 1, 3, 4))
    )


def test_the_decoder_is_no_part_of_what_latents_mean(vae, tmp_path):
    own = load_vae(vae, CPU)
    other = load_vae(vae, CPU)
    other.autoencoder.decoder.conv_in.weight.data.add_(1)
    assert other.space == own.space
    another = load_vae(vae, CPU)
    another.autoencoder.encoder.conv_in.bias.data.add_(1)
    assert another.space.differences(own.space)[0].startswith("encoder_sha256: ")
    assert len(another.space.differences(own.space)) == 1


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_narrow_dtype_is_rounded_once(images, vae, encoded, tmp_path, dtype):
    encode(settings(images, vae, tmp_path, dtype=dtype), CPU)
    narrow = load_file(tmp_path / "latents-00001.safetensors")["moments"]
    wide = load_file(encoded / "latents-00001.safetensors")["moments"]
    assert torch.equal(narrow, wide.to(latents_module.DTYPES[dtype]))


def test_a_latent_that_the_dtype_cannot_hold_is_named(images, vae, tmp_path, monkeypatch):
    from ditkernels.vae import VAE

    genuine = VAE.posterior

    def huge(self, shown):
        mean, std = genuine(self, shown)
        return mean * torch.where(torch.arange(len(mean)) == 1, 1e6, 1.0)[:, None, None, None], std

    monkeypatch.setattr(VAE, "posterior", huge)
    with pytest.raises(
        ValueError, match=r"dtype: got fp16, in which the latent of ant/1\.png is not finite.*bf16 and fp32"
    ):
        encode(settings(images, vae, tmp_path, dtype="fp16"), CPU)


# ------------------------------------------------------------------------------------------------------------------
# The same bytes
# ------------------------------------------------------------------------------------------------------------------


def in_process(work, *arguments):
    """Runs ``work`` in a forked process and returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work(*arguments)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


CALLS = ("fsync", "replace", "unlink", "rmdir", "mkdir")


def encode_and_die_at(call, config):
    """Encodes, but dies in place of its ``call``-th system call that makes or removes a file."""
    made = []

    def intercepted(genuine):
        def stand_in(*args, **kwargs):
            if len(made) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            made.append(genuine)
            return genuine(*args, **kwargs)

        return stand_in

    for name in CALLS:
        setattr(os, name, intercepted(getattr(os, name)))
    encode(config, CPU)


def test_killed_at_any_instant_it_ends_with_the_bytes_of_an_unbroken_run(images, vae, encoded, tmp_path):
    call, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        out = tmp_path / str(call)
        config = settings(images, vae, out)
        status = in_process(encode_and_die_at, call, config)
        finished = {path.name: path.stat().st_mtime_ns for path in out.glob("latents-*.safetensors")}
        whole = len(list((out / ".parts").glob("0*.json")))
        encode(config, CPU)
        assert content(out) == content(encoded), f"killed at call {call}"
        kept = [name for name, time in finished.items() if (out / name).stat().st_mtime_ns == time]
        # What was finished is not made again.
        assert len(kept) >= whole
        call += 1
    assert status == 0
    assert call > 15


def test_two_processes_write_what_one_writes(images, vae, encoded, tmp_path):
    import multiprocessing

    from ditkernels.sampler import World

    barrier = multiprocessing.get_context("fork").Barrier(2)
    config = settings(images, vae, tmp_path)
    context = multiprocessing.get_context("fork")
    both = [
        context.Process(target=encode, args=(config, CPU, World(rank, 2, barrier.wait))) for rank in (0, 1)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=120)
        assert process.exitcode == 0
    assert content(tmp_path) == content(encoded)


def test_the_number_of_reading_processes_changes_no_byte(images, vae, encoded, tmp_path):
    encode(settings(images, vae, tmp_path, num_workers=2), CPU)
    assert content(tmp_path) == content(encoded)


def test_a_damaged_shard_is_made_again_when_a_run_goes_on(images, vae, encoded, tmp_path, capsys):
    config = settings(images, vae, tmp_path)
    # Settings, then shards 0 and 1 with their records, are two calls a file.
    assert in_process(encode_and_die_at, 11, config) == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / ".parts").iterdir()) == [
        "00000.json",
        "00001.json",
        "settings.json",
    ]
    flip_a_bit(tmp_path / "latents-00001.safetensors")
    encode(config, CPU)
    assert content(tmp_path) == content(encoded)
    assert "latents-00001.safetensors is missing or altered; it is made again" in capsys.readouterr().err


def flip_a_bit(path, place=-1):
    held = bytearray(path.read_bytes())
    held[place] ^= 1
    path.write_bytes(held)


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_other_settings_is_refused(images, vae, encoded, tmp_path, finished):
    if finished:
        shutil.copytree(encoded, tmp_path, dirs_exist_ok=True)
    else:
        assert in_process(encode_and_die_at, 8, settings(images, vae, tmp_path)) == -signal.SIGKILL
    before = content(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"holds latents of other settings: dtype: 'fp32' there, 'fp16' here; made_with\.batch_size: 4 there, 2 here$",
    ):
        encode(settings(images, vae, tmp_path, dtype="fp16", batch_size=2), CPU)
    assert content(tmp_path) == before


def test_other_images_and_another_vae_are_refused(images, vae, encoded, tmp_path):
    out = tmp_path / "latents"
    shutil.copytree(encoded, out)
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "ant" / "0.png").rename(tmp_path / "images" / "ant" / "z.png")
    with pytest.raises(ValueError, match=r"other settings: made_with\.files_sha256: "):
        encode(settings(tmp_path / "images", vae, out), CPU)
    shutil.copytree(vae, tmp_path / "vae")
    make_vae(tmp_path / "vae", seed=1)
    with pytest.raises(ValueError, match=r"other settings: vae\.encoder_sha256: "):
        encode(settings(images, str(tmp_path / "vae"), out), CPU)


def test_what_cannot_be_encoded_is_named(images, vae, tmp_path):
    with pytest.raises(ValueError, match=r"out: got .* which holds the images"):
        encode(settings(images, vae, images), CPU)
    with pytest.raises(ValueError, match="image_size: got 9, the VAE needs a multiple of 2"):
        encode(settings(images, vae, tmp_path, image_size=9), CPU)
    with pytest.raises(ValueError, match="vae: got 'none', allowed are ema, mse, a folder"):
        settings(images, "none", tmp_path)
    with pytest.raises(ValueError, match=r"data_path: .* is no folder"):
        encode(settings(tmp_path / "nowhere", vae, tmp_path / "out"), CPU)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------------
# Unreadable images
# ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(images, tmp_path):
    root = tmp_path / "damaged"
    shutil.copytree(images, root)
    # The last of a class and of a shard, two in a row, and the last of all.
    for file in ("ant/2.png", "bee/0.png", "cat/2.png"):
        (root / file).write_bytes(b"no image")
    return root


def test_an_unreadable_image_keeps_its_place_and_the_next_one_stands_in_it(damaged, vae, encoded, tmp_path):
    out = tmp_path / "out"
    encode(settings(damaged, vae, out, max_unreadable=3), CPU)
    assert json.loads((out / INDEX).read_text())["unreadable"] == ["ant/2.png", "bee/0.png", "cat/2.png"]
    moments, labels = LatentFolder.open(out).read(torch.arange(11), torch.zeros(11).bool())
    clean, _ = LatentFolder.open(encoded).read(torch.arange(11), torch.zeros(11).bool())
    assert labels.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 0]
    torch.testing.assert_close(moments, clean[[0, 1, 4, 4, 4, 5, 6, 7, 8, 9, 0]])


def test_too_many_unreadable_images_are_an_error(damaged, vae, tmp_path):
    with pytest.raises(ValueError, match=r"3 images are unreadable, allowed are 2 .*; the last one is cat/2"):
        encode(settings(damaged, vae, tmp_path / "out", max_unreadable=2), CPU)
    assert not (tmp_path / "out" / INDEX).exists()
    with pytest.raises(ValueError, match=r"2 images in a row are unreadable, the last .*bee/0\.png"):
        encode(settings(damaged, vae, tmp_path / "other", max_unreadable=1), CPU)


def test_unreadable_images_are_counted_as_soon_as_a_shard_is_done(damaged, vae, tmp_path):
    (damaged / "ant" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"3 images are unreadable, allowed are 2"):
        encode(settings(damaged, vae, tmp_path / "out", max_unreadable=2), CPU)
    assert not (tmp_path / "out" / "latents-00001.safetensors").exists()
