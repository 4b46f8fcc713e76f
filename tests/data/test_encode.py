"""Latents made once: the same bytes however they were made, and training on them is training on the images."""

import json
import multiprocessing
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ditkernels.cli import main
from ditkernels.data import latents as latents_module
from ditkernels.data.config import EncodeConfig
from ditkernels.data.encode import _begin, encode, settings_of
from ditkernels.data.folder import ImageFolder
from ditkernels.data.latents import INDEX, LatentFolder, LatentsError
from ditkernels.data.loader import stream_batches
from ditkernels.data.source import open_data
from ditkernels.data.vae import VAE, load_vae
from ditkernels.files import LOCK, FolderInUseError, FolderLock
from ditkernels.rng import Stream, normals
from ditkernels.training.config import TrainConfig
from ditkernels.training.factory import build_model, latent_shape, vae_for
from ditkernels.training.log import read_metrics
from ditkernels.training.trainer import Trainer
from tests.benchmarks.test_benchmarks import run as run_benchmark
from tests.helpers.sabotage import KILLED, kill_at_call
from tests.helpers.worlds import Among

CPU = torch.device("cpu")
SIZE = 8
SMALL_MODEL = [
    *("--image-size", "8", "--num-classes", "3"),
    *("--model", "DiT-S/2", "--hidden-size", "16", "--depth", "1"),
]
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


@pytest.fixture
def copied(encoded, tmp_path):
    out = tmp_path / "copied"
    shutil.copytree(encoded, out)
    return out


def content(folder):
    """Of all files but the lock, which whoever was killed leaves behind."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK}


# ---- What is stored --------------------------------------------------------------------------------------------------


def test_every_image_and_its_mirror_image_are_stored_with_their_posterior(images, vae, encoded):
    folder = LatentFolder.open(encoded)
    data = open_data(TrainConfig(data_path=str(images), image_size=SIZE, num_classes=3, global_batch_size=11))
    assert (len(folder), folder.shape, folder.dtype) == (11, (4, 4, 4), torch.float32)
    assert [shard.count for shard in folder.shards] == [4, 4, 3]
    assert folder.class_to_idx == data.class_to_idx == {"ant": 0, "bee": 1, "cat": 2}
    own = load_vae(vae, CPU)
    for index in range(11):
        image = data.train.folder.read(index, SIZE, 0).image
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
    index = json.loads((encoded / INDEX).read_text(encoding="utf-8"))
    stored = torch.cat([load_file(path)["moments"] for path in sorted(encoded.glob("*.safetensors"))])
    mean, std = stored.double().chunk(2, dim=2)
    assert index["image_size"] == SIZE
    assert index["unreadable"] == []
    assert (index["vae"]["scale"], index["vae"]["shift"], index["vae"]["factor"]) == (0.5, 0.25, 2)
    # z = mean + std·noise, over images, sides and pixels: its moments channel by channel.
    of_z = torch.sqrt(mean.var(dim=(0, 1, 3, 4), correction=0) + std.square().mean(dim=(0, 1, 3, 4)))
    torch.testing.assert_close(torch.tensor(index["statistics"]["std"]).double(), of_z)
    torch.testing.assert_close(torch.tensor(index["statistics"]["mean"]).double(), mean.mean(dim=(0, 1, 3, 4)))


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
    genuine = VAE.posterior

    def huge(self, shown):
        mean, std = genuine(self, shown)
        return mean * torch.where(torch.arange(len(mean)) == 1, 1e6, 1.0)[:, None, None, None], std

    monkeypatch.setattr(VAE, "posterior", huge)
    with pytest.raises(ValueError, match=r"dtype: got fp16, in which the latent of ant/1\.png is not finite.*bf16 and fp32"):
        encode(settings(images, vae, tmp_path, dtype="fp16"), CPU)


# ---- The same bytes --------------------------------------------------------------------------------------------------


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


def encode_and_die_at(call, config):
    """Encodes, but dies in place of its ``call``-th system call that makes or removes a file."""
    kill_at_call(call)
    encode(config, CPU)


def test_killed_at_any_instant_it_ends_with_the_bytes_of_an_unbroken_run(images, vae, encoded, tmp_path):
    call, status = 0, KILLED
    while status == KILLED:
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
    context = multiprocessing.get_context("fork")
    # If one dies the other must not wait for it.
    barrier = context.Barrier(2, timeout=60)
    config = settings(images, vae, tmp_path)
    both = [context.Process(target=encode, args=(config, CPU, Among(rank, 2, barrier.wait)), daemon=True) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=120)
    assert [process.exitcode for process in both] == [0, 0]
    assert content(tmp_path) == content(encoded)


def test_a_process_takes_the_shards_that_are_its_by_number(images, vae, tmp_path):
    config = settings(images, vae, tmp_path)
    with pytest.raises(TimeoutError):
        encode(config, CPU, Among(1, 2, barrier=waits_for_nobody(tmp_path, config)))
    assert [path.name for path in tmp_path.glob("latents-*")] == ["latents-00001.safetensors"]


def waits_for_nobody(out, config):
    """Process 0 makes the folder before the first barrier, and never comes to the second."""
    calls = []

    def barrier():
        if calls:
            raise TimeoutError
        calls.append(None)
        own = load_vae(config.vae, CPU)
        folder = ImageFolder.scan(config.data_path)
        _begin(out, settings_of(config, folder, own, CPU))

    return barrier


def test_a_batch_has_one_shape_whatever_is_left_for_it(images, vae, tmp_path, monkeypatch):
    shapes = []
    genuine = VAE.posterior

    def spied(self, shown):
        shapes.append(tuple(shown.shape))
        return genuine(self, shown)

    monkeypatch.setattr(VAE, "posterior", spied)
    encode(settings(images, vae, tmp_path, shard_size=5, batch_size=3), CPU)
    # Shards of 5, 5 and 1 in batches of 3: five batches, both sides of each.
    assert shapes == [(3, 3, SIZE, SIZE)] * 10


def test_the_number_of_reading_processes_changes_no_byte(images, vae, encoded, tmp_path):
    encode(settings(images, vae, tmp_path, num_workers=2), CPU)
    assert content(tmp_path) == content(encoded)


def test_a_damaged_shard_is_made_again_when_a_run_goes_on(images, vae, encoded, tmp_path, caplog):
    config = settings(images, vae, tmp_path)
    # The lock is one call; settings, then shards 0 and 1 with their records, are two calls a file.
    assert in_process(encode_and_die_at, 12, config) == KILLED
    assert sorted(path.name for path in (tmp_path / ".parts").iterdir()) == [
        "00000.json",
        "00001.json",
        "settings.json",
    ]
    flip_a_bit(tmp_path / "latents-00001.safetensors")
    encode(config, CPU)
    assert content(tmp_path) == content(encoded)
    assert "latents-00001.safetensors is missing or altered; it is made again" in caplog.text


def flip_a_bit(path, place=-1):
    held = bytearray(path.read_bytes())
    held[place] ^= 1
    path.write_bytes(held)


def test_a_finished_folder_is_mended(images, vae, copied, encoded, caplog):
    flip_a_bit(copied / "latents-00000.safetensors")
    (copied / "latents-00002.safetensors").unlink()
    before = (copied / "latents-00001.safetensors").stat().st_mtime_ns
    encode(settings(images, vae, copied), CPU)
    assert content(copied) == content(encoded)
    assert (copied / "latents-00001.safetensors").stat().st_mtime_ns == before
    assert caplog.text.count("is missing or altered; it is made again") == 2


@pytest.mark.parametrize("finished", [True, False])
def test_a_shard_of_images_that_have_changed_is_not_made_again(images, vae, encoded, tmp_path, finished):
    out, changed = tmp_path / "out", tmp_path / "images"
    shutil.copytree(images, changed)
    if finished:
        shutil.copytree(encoded, out)
    else:
        out.mkdir()
        assert in_process(encode_and_die_at, 12, settings(changed, vae, out)) == KILLED
    (out / "latents-00001.safetensors").unlink()
    Image.new("RGB", (10, 10)).save(changed / "bee" / "2.png")
    with pytest.raises(LatentsError, match=r"latents-00001\.safetensors cannot be made again: its images"):
        encode(settings(changed, vae, out), CPU)
    assert not (out / "latents-00001.safetensors").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_other_settings_is_refused(images, vae, encoded, tmp_path, finished):
    if finished:
        shutil.copytree(encoded, tmp_path, dirs_exist_ok=True)
    else:
        assert in_process(encode_and_die_at, 9, settings(images, vae, tmp_path)) == KILLED
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


# ---- Unreadable images -----------------------------------------------------------------------------------------------


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
    assert json.loads((out / INDEX).read_text(encoding="utf-8"))["unreadable"] == ["ant/2.png", "bee/0.png", "cat/2.png"]
    moments, labels = LatentFolder.open(out).read(torch.arange(11), torch.zeros(11).bool())
    clean, _ = LatentFolder.open(encoded).read(torch.arange(11), torch.zeros(11).bool())
    assert labels.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 0]
    torch.testing.assert_close(moments, clean[[0, 1, 4, 4, 4, 5, 6, 7, 8, 9, 0]])


def test_too_many_unreadable_images_are_an_error(damaged, vae, tmp_path):
    # The second time all shards are there, and their files are still too many.
    for _ in range(2):
        with pytest.raises(ValueError, match=r"unreadable images: got 3, allowed are 2 .*; the last one is cat/2"):
            encode(settings(damaged, vae, tmp_path / "out", max_unreadable=2), CPU)
    assert not (tmp_path / "out" / INDEX).exists()
    with pytest.raises(ValueError, match=r"unreadable images: got 2 in a row, the last .*bee/0\.png"):
        encode(settings(damaged, vae, tmp_path / "other", max_unreadable=1), CPU)


def test_unreadable_images_are_counted_as_soon_as_a_shard_is_done(damaged, vae, tmp_path):
    (damaged / "ant" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"unreadable images: got 3, allowed are 2"):
        encode(settings(damaged, vae, tmp_path / "out", max_unreadable=2), CPU)
    assert not (tmp_path / "out" / "latents-00001.safetensors").exists()


# ---- Shards that are missing or altered ------------------------------------------------------------------------------


def test_verifying_reads_every_shard_and_names_all_that_are_altered(copied, capsys):
    assert main(["encode", "--verify", "--out", str(copied)]) == 0
    assert "11 images in 3 shards, every SHA-256 is right\n" in capsys.readouterr().out
    for number in (0, 2):
        flip_a_bit(copied / f"latents-{number:05d}.safetensors")
    # A start of training does not read them.
    LatentFolder.open(copied)
    assert main(["encode", "--verify", "--out", str(copied)]) == 2
    told = capsys.readouterr().err
    assert "latents-00000.safetensors is altered" in told
    assert "latents-00002.safetensors is altered" in told
    assert "latents-00001" not in told


def test_a_missing_a_short_and_a_foreign_shard_are_named_at_once(copied):
    path = copied / "latents-00001.safetensors"
    held = path.read_bytes()
    path.write_bytes(held[:-1])
    with pytest.raises(LatentsError, match=rf"00001.safetensors has {len(held) - 1} bytes, .* {len(held)}"):
        LatentFolder.open(copied)
    path.write_bytes(b"\0" * len(held))
    with pytest.raises(LatentsError, match=r"00001.safetensors is no safetensors file"):
        LatentFolder.open(copied)
    tensors = load_file(copied / "latents-00000.safetensors")
    save_file({**tensors, "labels": tensors["labels"].double()}, path)
    assert path.stat().st_size == len(held)
    with pytest.raises(LatentsError, match=r"00001.safetensors is altered: it holds .*float64.* says .*int64"):
        LatentFolder.open(copied)
    path.unlink()
    with pytest.raises(LatentsError, match=r"00001.safetensors is missing, though latents.json lists it"):
        LatentFolder.open(copied)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text[:-20], "is damaged"),
        (lambda text: text.replace('"image_size": 8', '"image_size": 9'), "does not match its own SHA-256"),
        (
            lambda text: text.replace("ditkernels-latents", "something"),
            "is not the index of ditkernels-latents",
        ),
        (
            lambda text: text.replace('"format_version": 1', '"format_version": 2'),
            "format version 2, allowed is 1",
        ),
        (lambda text: "[]", "is not the index"),
    ],
)
def test_a_damaged_index_is_named(copied, change, message):
    path = copied / INDEX
    changed = change(path.read_text(encoding="utf-8"))
    assert changed != path.read_text(encoding="utf-8")
    path.write_text(changed, encoding="utf-8")
    with pytest.raises(LatentsError, match=message):
        LatentFolder.open(copied)


def test_a_folder_without_an_index_holds_no_latents(images):
    with pytest.raises(LatentsError, match=r"holds no latents: latents\.json is not there"):
        LatentFolder.open(images)


# ---- Training on them ------------------------------------------------------------------------------------------------


def run_of(path, vae, **changes):
    return TrainConfig(
        **{
            "data_path": str(path),
            "vae": vae,
            "image_size": SIZE,
            "num_classes": 3,
            "model": "DiT-S/2",
            "hidden_size": 16,
            "depth": 1,
            "num_heads": 2,
            "global_batch_size": 4,
            "device": "cpu",
            "num_workers": 0,
            **changes,
        }
    )


def seen_by_the_model(config, steps):
    """Latents and labels of each step."""
    data = open_data(config)
    vae = vae_for(config, data, CPU)
    trainer = Trainer(config, data, vae, build_model(config, latent_shape(config, data, vae)))
    positions = torch.arange(config.global_batch_size)
    for step in range(steps):
        batch = data.train[step]
        yield trainer.latents(batch.images, Stream.POSTERIOR, step, positions), batch.labels


def test_latents_in_training_are_those_of_the_images_by_the_same_keys(images, vae, encoded):
    # Eleven images in batches of four: three epochs, every position in the stored batches.
    of_images = list(seen_by_the_model(run_of(images, vae), 8))
    of_latents = list(seen_by_the_model(run_of(encoded, "ema"), 8))
    for (mine, my_labels), (theirs, their_labels) in zip(of_latents, of_images, strict=True):
        assert mine.shape == (4, 4, 4, 4)
        assert torch.equal(my_labels, their_labels)
        # The VAE's own rounding: a row lies elsewhere in another batch.
        torch.testing.assert_close(mine, theirs)
    plain = list(seen_by_the_model(run_of(encoded, "ema", flip=False), 8))
    mirrored = [(a != b).flatten(1).any(1) for (a, _), (b, _) in zip(of_latents, plain, strict=True)]
    assert 8 < torch.cat(mirrored).sum() < 24


def test_without_a_batch_of_another_shape_they_are_equal_bit_for_bit(images, vae, tmp_path):
    encode(settings(images, vae, tmp_path, batch_size=1), CPU)
    of_images = seen_by_the_model(run_of(images, vae, global_batch_size=1), 6)
    of_latents = seen_by_the_model(run_of(tmp_path, "ema", global_batch_size=1), 6)
    for (mine, _), (theirs, _) in zip(of_latents, of_images, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_latents_in_a_narrow_dtype_differ_by_its_rounding(images, vae, encoded, tmp_path, dtype):
    encode(settings(images, vae, tmp_path, dtype=dtype), CPU)
    eps = torch.finfo(latents_module.DTYPES[dtype]).eps
    wide = open_data(run_of(encoded, "ema"))
    steps = zip(
        seen_by_the_model(run_of(tmp_path, "ema"), 4),
        seen_by_the_model(run_of(encoded, "ema"), 4),
        strict=True,
    )
    for step, ((mine, _), (theirs, _)) in enumerate(steps):
        mean, std = wide.train[step].images.chunk(2, dim=1)
        noise = normals(0, Stream.POSTERIOR, step, torch.arange(4), (4, 4, 4))
        # Mean and standard deviation are each rounded by half a unit in the last place; fp32 adds its own.
        rounding = eps / 2 + 4 * torch.finfo(torch.float32).eps
        allowed = wide.latents.scale * (mean.abs() + (std * noise).abs()) * rounding
        assert ((mine - theirs).abs() <= allowed).all()
        assert not torch.equal(mine, theirs)


def test_a_run_on_latents_needs_neither_vae_nor_pillow(images, vae, encoded, tmp_path, monkeypatch):
    shown = ["--steps", "3", "--learning-rate", "1e-2", "--log-every", "1", "--results-dir"]
    common = [*SMALL_MODEL, "--num-heads", "2", "--global-batch-size", "4", "--device", "cpu", "--num-workers", "0"]
    held_out = ["--val-every", "3", "--val-images", "4", "--val-path"]
    flags = ["train", "--data-path", str(images), "--vae", vae, *common, *held_out, str(images), *shown]
    assert main([*flags, str(tmp_path / "images")]) == 0
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    flags = ["train", "--data-path", str(encoded), *common, *held_out, str(encoded), *shown]
    assert main([*flags, str(tmp_path / "latents")]) == 0
    of_images, of_latents = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("images", "latents"))
    for name in ("loss", "grad_norm", "validation_loss"):
        mine, theirs = ([row[name] for row in rows if name in row] for rows in (of_latents, of_images))
        assert len(mine) == (1 if name == "validation_loss" else 3)
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs))


def test_an_epoch_has_every_image_once_mirrored_or_not(encoded):
    data = open_data(run_of(encoded, "ema", global_batch_size=11))
    assert (data.length, data.shape, data.class_to_idx) == (11, (4, 4, 4), {"ant": 0, "bee": 1, "cat": 2})
    everything = load_everything(encoded)
    for step in range(3):
        moments, labels, *_ = data.train[step]
        found = [int((everything == row).flatten(2).all(2).any(1).nonzero()) for row in moments]
        assert sorted(found) == list(range(11))
        assert torch.bincount(labels).tolist() == [3, 5, 3]
    assert run_length(data, encoded) == 2 * 11 // 4


def load_everything(folder):
    return torch.cat([load_file(path)["moments"] for path in sorted(folder.glob("*.safetensors"))])


def run_length(data, folder):
    config = run_of(folder, "ema", epochs=2)
    return Trainer(config, data, None, build_model(config, data.shape)).total


def test_reading_processes_map_the_files_themselves(encoded):
    batches = open_data(run_of(encoded, "ema")).train
    alone = [batches[step] for step in range(4)]
    # What goes to a spawned process is the index, not what is mapped.
    assert len(pickle.dumps(batches)) < 4000
    assert not pickle.loads(pickle.dumps(batches)).folder._mapped
    for mine, theirs in zip(stream_batches(batches, range(4), workers=2, pin_memory=False), alone, strict=True):
        assert torch.equal(mine.images, theirs.images)
        assert torch.equal(mine.labels, theirs.labels)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_what_is_read_is_what_was_stored_in_its_dtype(images, vae, tmp_path, dtype):
    encode(settings(images, vae, tmp_path, dtype=dtype), CPU)
    order = torch.tensor([10, 0, 7, 3, 3])
    mirrored = torch.tensor([True, False, False, True, False])
    moments, labels = LatentFolder.open(tmp_path).read(order, mirrored)
    assert moments.dtype == latents_module.DTYPES[dtype]
    assert torch.equal(moments, load_everything(tmp_path)[order, mirrored.long()])
    assert labels.tolist() == [2, 0, 1, 1, 1]


# ---- What does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 16}, r"image_size: got 16, data_path .* holds latents of images of 8"),
        ({"num_classes": 2}, r"num_classes: got 2, but .* has 3 classes"),
        ({"val_path": "images"}, r"images\d+ holds no latents: latents\.json is not there"),
        ({"val_path": "other vae"}, r"val_path: .*other vae is of another VAE: encoder_sha256: .* there, "),
        ({"val_path": "classless"}, r"val_path: .*classless holds latents without classes"),
        ({"val_path": "fewer classes"}, r"val_path: the classes of .*fewer classes are not those of"),
    ],
)
def test_latents_that_do_not_fit_the_run_are_refused(images, vae, encoded, tmp_path, changes, message):
    changes = dict(changes)
    if "val_path" in changes:
        changes["val_path"] = str(held_out_latents(changes["val_path"], images, vae, tmp_path))
    with pytest.raises(ValueError, match=message):
        open_data(run_of(encoded, "ema", **changes))


def held_out_latents(kind, images, vae, tmp_path):
    if kind == "images":
        return images
    if kind == "other vae":
        vae = make_vae(tmp_path / "vae", seed=1)
    if kind == "fewer classes":
        images = shutil.copytree(images, tmp_path / "images")
        shutil.rmtree(images / "bee")
    encode(settings(images, vae, tmp_path / kind, unconditional=kind == "classless"), CPU)
    return tmp_path / kind


def test_latents_without_classes_train_unconditionally(images, vae, encoded, tmp_path):
    encode(settings(images, vae, tmp_path, unconditional=True), CPU)
    with pytest.raises(ValueError, match=r"holds latents without classes; allowed with --unconditional"):
        open_data(run_of(tmp_path, "ema"))
    for folder in (tmp_path, encoded):
        data = open_data(run_of(folder, "ema", unconditional=True))
        assert data.class_to_idx == {}
        assert not data.train[0].labels.any()


def test_the_vae_given_beside_latents_must_be_theirs(vae, encoded, tmp_path):
    data = open_data(run_of(encoded, vae))
    assert vae_for(run_of(encoded, vae), data, CPU).space == data.latents
    assert vae_for(run_of(encoded, "none"), data, CPU) is None
    # The default was not given, and nothing needs it: it need not even be there.
    assert vae_for(run_of(encoded, "ema"), data, CPU) is None
    other = make_vae(tmp_path / "weights", seed=1)
    with pytest.raises(ValueError, match=r"vae: .*weights is not the one that made the latents: encoder_sha256"):
        vae_for(run_of(encoded, other), data, CPU)
    scaled = make_vae(tmp_path / "scale", scale=1.0)
    with pytest.raises(ValueError, match=r"scale is not the one that made the latents: scale: 0\.5 there, 1\.0 here$"):
        vae_for(run_of(encoded, scaled), data, CPU)


@pytest.mark.parametrize("every", ["sample_every", "eval_every"])
def test_latents_that_shall_be_shown_need_their_vae(encoded, every):
    data = open_data(run_of(encoded, "none"))
    with pytest.raises(ValueError, match=f"vae: got 'none', but {every} decodes latents"):
        vae_for(run_of(encoded, "none", **{every: 2}), data, CPU)
    with pytest.raises(ValueError, match=r"sd-vae-ft-ema is not in the local"):
        vae_for(run_of(encoded, "ema", **{every: 2}), data, CPU)


def test_a_run_goes_on_with_latents_of_its_own_vae_only(images, vae, encoded, tmp_path, capsys):
    run = [
        "train",
        *SMALL_MODEL,
        "--num-heads",
        "2",
        "--global-batch-size",
        "4",
        "--device",
        "cpu",
        "--num-workers",
        "0",
    ]
    run += ["--resume", "auto", "--results-dir", str(tmp_path / "run"), "--data-path"]
    assert main([*run, str(images), "--vae", vae, "--steps", "1"]) == 0
    # What was begun on images goes on with their latents.
    assert main([*run, str(encoded), "--vae", vae, "--steps", "2"]) == 0
    other = tmp_path / "other"
    encode(settings(images, make_vae(tmp_path / "weights", seed=1), other), CPU)
    assert main([*run, str(other), "--vae", "none", "--steps", "3"]) == 2
    assert "encoder_sha256: " in capsys.readouterr().err


def test_the_benchmark_of_reading(tmp_path):
    size = (
        "--images",
        "40",
        "--latent-size",
        "4",
        "--batch",
        "8",
        "--batches",
        "3",
        "--folder",
        str(tmp_path),
    )
    rows = run_benchmark(
        "latents",
        *size,
        "--workers",
        "0,1",
        "--dtypes",
        "bf16",
        out=tmp_path / "l.json",
    )
    assert [(row["cache"], row["workers"]) for row in rows] == [
        ("warm", 0),
        ("warm", 1),
        ("cold", 0),
        ("cold", 1),
    ]
    assert all(row["of_needed"] == row["samples_per_s"] / 1000 for row in rows)
    # A sample is mean and standard deviation of 4 channels of 4 x 4 numbers of 2 bytes.
    assert all(row["mib_per_s"] == pytest.approx(row["samples_per_s"] * 256 / 2**20) for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["l.json"]


def test_a_second_encoding_in_a_folder_is_refused_by_name_of_the_first(images, vae, tmp_path):
    lock = FolderLock(tmp_path / "out")
    with pytest.raises(FolderInUseError, match=f"is in use by process {os.getpid()} on"):
        encode(settings(images, vae, tmp_path / "out"), CPU)
    lock.release()
    assert not (tmp_path / "out").exists()
