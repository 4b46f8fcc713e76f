"""Many samples: labels, files, resuming, several processes; image i is image i however it was made."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditkernels import cli
from ditkernels.checkpoints.format import Checkpoint, CheckpointError, save_checkpoint
from ditkernels.checkpoints.model import load_model
from ditkernels.checkpoints.run import checkpoint_directory
from ditkernels.diffusion import create_diffusion
from ditkernels.files import FolderLock
from ditkernels.models import DiT
from ditkernels.reference import CONDITIONINGS, SIZES
from ditkernels.sampling import outputs
from ditkernels.sampling.config import SampleConfig
from ditkernels.sampling.drawing import sample, sample_progressive
from ditkernels.sampling.generate import Batches, Job, draw, generate
from ditkernels.sampling.labels import Labels, as_ranges, parse_classes, read_labels
from ditkernels.sampling.outputs import grid_of, to_pixels
from tests.helpers.worlds import Among
from tests.sampling.test_sampler import random_model
from tools.tree import ROOT

FLAGS = [
    "--count",
    "11",
    "--batch-size",
    "4",
    "--steps",
    "4",
    "--device",
    "cpu",
    "--formats",
    "png,grid,npz,latents",
]
# Long enough after its first batch to be killed in the middle by a busy machine.
LONGER = [*FLAGS, "--count", "43", "--steps", "40"]


@pytest.fixture(scope="module")
def model():
    return random_model(channels=1)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    raw = {name: weight + 0.01 for name, weight in model.state_dict().items()}
    config = {"model": {"num_heads": 2, "input_size": [4, 6], "num_classes": 3}}
    save_checkpoint(path, Checkpoint(raw, model.state_dict(), 5, config))
    return path


def job(**changes):
    settings = {
        "labels": Labels("balanced", (0, 1, 2)),
        "config": SampleConfig(guidance_scale=2.0),
        "batches": Batches(11, 4),
        "formats": ("png", "grid", "npz", "latents"),
    }
    return Job(**{**settings, **changes})


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A run of one process, never interrupted."""
    out = tmp_path_factory.mktemp("whole")
    generate(model, create_diffusion("4"), job(), out, progress=False)
    return out


# ---- What is written -------------------------------------------------------------------------------------------------


def test_every_format_holds_the_same_samples_in_order(model, whole):
    diffusion = create_diffusion("4")
    labels = torch.arange(12) % 3
    expected = [sample(model, diffusion, labels[part], job().config, indices=part) for part in torch.arange(12).split(4)]
    drawn = torch.cat(expected)[:11]
    assert np.array_equal(np.load(whole / "latents.npy"), drawn.numpy())
    with np.load(whole / "samples.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], to_pixels(drawn))
        assert arrays["arr_1"].tolist() == labels[:11].tolist()
        pixels = arrays["arr_0"]
    from PIL import Image

    files = sorted((whole / "images").iterdir())
    assert [file.name for file in files] == [f"{index:06d}.png" for index in range(11)]
    for file, image in zip(files, pixels, strict=True):
        assert np.array_equal(np.array(Image.open(file)), image)
    assert np.array_equal(np.array(Image.open(whole / "grid.png")), grid_of(list(pixels)))
    assert not (whole / ".parts").exists()
    described = json.loads((whole / "metadata.json").read_text(encoding="utf-8"))
    assert described["labels"] == {"scheme": "balanced", "classes": "0-2", "order": "interleaved"}
    assert described["sampling"]["guidance_scale"] == 2.0
    assert described["timesteps"] == create_diffusion("4").timestep_map


def test_draw_gives_the_same_batches_without_files(model, whole):
    found = list(draw(model, create_diffusion("4"), job().labels, job().config, Batches(11, 4)))
    assert [len(part) for part in found] == [4, 4, 3]
    assert np.array_equal(torch.cat(found).numpy(), np.load(whole / "latents.npy"))


def test_a_larger_run_begins_with_the_smaller_one(model, whole, tmp_path):
    generate(model, create_diffusion("4"), job(batches=Batches(14, 4)), tmp_path, progress=False)
    assert np.array_equal(np.load(tmp_path / "latents.npy")[:11], np.load(whole / "latents.npy"))


def test_pixels_are_clamped_and_truncated():
    images = torch.tensor([-2.0, -1.0, 0.0, 0.5, 0.999, 1.0, 3.0]).view(1, 1, 1, 7)
    assert to_pixels(images)[0, 0, :, 0].tolist() == [0, 0, 128, 191, 255, 255, 255]
    assert to_pixels(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)
    with pytest.raises(ValueError, match="images: got 4 channels"):
        to_pixels(torch.zeros(2, 4, 4, 5))
    with pytest.raises(ValueError, match="not finite"):
        to_pixels(torch.full((1, 3, 2, 2), float("nan")))


def test_the_decoder_sees_whole_batches(model, tmp_path):
    seen = []

    def decode(latents):
        seen.append(len(latents))
        return latents.expand(-1, 3, -1, -1)

    generate(model, create_diffusion("4"), job(), tmp_path, decode=decode, progress=False)
    assert seen == [4, 4, 4]


# ---- Resuming, several processes -------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_where_it_was(model, whole, tmp_path, monkeypatch):
    module = sys.modules["ditkernels.sampling.generate"]
    drawn = []

    def stops_at_the_third(*arguments, **options):
        drawn.append(options["indices"][0].item())
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return sample_progressive(*arguments, **options)

    monkeypatch.setattr(module, "sample_progressive", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        generate(model, create_diffusion("4"), job(), tmp_path, progress=False)
    assert not (tmp_path / "metadata.json").exists()
    generate(model, create_diffusion("4"), job(), tmp_path, progress=False)
    assert drawn == [0, 4, 8, 8]
    assert contents(tmp_path) == contents(whole)
    generate(model, create_diffusion("4"), job(), tmp_path, progress=False)
    assert len(drawn) == 4, "a finished run drew again"


def test_two_workers_share_what_is_missing(model, whole, tmp_path):
    barrier = threading.Barrier(2)
    (tmp_path / ".parts").mkdir()
    workers = [
        threading.Thread(
            target=generate,
            args=(model, create_diffusion("4"), job(), tmp_path),
            kwargs={"world": Among(rank, 2, barrier.wait), "progress": False},
        )
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert contents(tmp_path) == contents(whole)


def torchrun(checkpoint, out):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "-m", "ditkernels", "sample", str(checkpoint), "--out", str(out), *LONGER],
        env=environment,
        start_new_session=True,
        cwd=ROOT,
    )


def kill_all_that_write_to(out):
    """torchrun gives each worker a session of its own, so the group of the launcher is not all of it."""
    for folder in Path("/proc").glob("[0-9]*"):
        # A process may be gone by now.
        with contextlib.suppress(OSError):
            if os.fsencode(out) in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)


def test_two_processes_and_a_kill_and_restart_write_the_same_bytes(checkpoint, tmp_path):
    one, two, killed = tmp_path / "one", tmp_path / "two", tmp_path / "killed"
    assert cli.main(["sample", str(checkpoint), "--out", str(one), *LONGER]) == 0
    assert torchrun(checkpoint, two).wait(timeout=300) == 0
    assert contents(two) == contents(one)

    process = torchrun(checkpoint, killed)
    deadline = time.monotonic() + 300
    while not list(killed.glob(".parts/batch-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.002)
    kill_all_that_write_to(killed)
    process.wait()
    assert not (killed / "metadata.json").exists(), "killed too late to prove anything"
    # A folder is free within a second of its owner's death, which here is nobody's child.
    time.sleep(1)
    assert cli.main(["sample", str(checkpoint), "--out", str(killed), *LONGER]) == 0
    assert contents(killed) == contents(one)


def test_a_process_that_outlived_its_run_does_not_trip_the_next_one(tmp_path, monkeypatch):
    path, replace, processes = tmp_path / "000000.png", os.replace, iter([1, 2])
    monkeypatch.setattr(os, "getpid", lambda: next(processes))

    def interrupted(source, target):
        monkeypatch.setattr(os, "replace", replace)
        outputs.write_bytes(path, b"the same bytes")
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    outputs.write_bytes(path, b"the same bytes")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(path.name, b"the same bytes")]


def test_what_a_killed_process_had_begun_to_write_is_removed(model, tmp_path):
    (tmp_path / "out" / "images").mkdir(parents=True)
    for folder in (tmp_path / "out", tmp_path / "out" / "images"):
        (folder / ".000000.png.77.tmp").write_bytes(b"begun")
    generate(model, create_diffusion("4"), job(), tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"batches": Batches(11, 5)}, "batch_size: 4 there, 5 here"),
        ({"config": SampleConfig(guidance_scale=2.0, seed=1)}, "sampling.seed: "),
        ({"labels": Labels("random", (0, 1, 2))}, "labels.scheme: "),
        ({"record": {"precision": "bf16"}}, "precision: None there, 'bf16' here"),
        ({"threads": 2}, "threads: 1 there, 2 here"),
    ],
)
def test_a_run_with_other_settings_is_not_resumed(model, whole, changes, named):
    before = contents(whole)
    with pytest.raises(ValueError, match=f"cannot be resumed: .*{named}"):
        generate(model, create_diffusion("4"), job(**changes), whole, progress=False)
    assert contents(whole) == before


# ---- Labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", [("png", "grid", "npz", "latents"), ("latents",), ("png",), ("grid",)])
@pytest.mark.parametrize("complete", [True, False])
def test_a_larger_count_goes_on_and_the_first_images_keep_their_bytes(model, tmp_path, monkeypatch, formats, complete):
    module = sys.modules["ditkernels.sampling.generate"]
    small, large = ({"batches": Batches(count, 4), "formats": formats} for count in (6, 11))
    generate(model, create_diffusion("4"), job(**large), tmp_path / "whole", progress=False)
    if not complete:
        monkeypatch.setattr(module, "_assemble", lambda *_: 1 / 0)
    with contextlib.nullcontext() if complete else pytest.raises(ZeroDivisionError):
        generate(model, create_diffusion("4"), job(**small), tmp_path / "grown", progress=False)
    monkeypatch.undo()
    drawn = []
    genuine = sample_progressive
    monkeypatch.setattr(module, "sample_progressive", lambda *a, **k: drawn.append(k["indices"][0].item()) or genuine(*a, **k))
    generate(model, create_diffusion("4"), job(**large), tmp_path / "grown", progress=False)
    recoverable = not complete or "npz" in formats or "latents" in formats
    assert drawn == ([4, 8] if recoverable else [0, 4, 8])
    assert contents(tmp_path / "grown") == contents(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"count: got 6, .*grown is of 11; allowed are as many or more"):
        generate(model, create_diffusion("4"), job(**small), tmp_path / "grown", progress=False)


def test_a_list_of_labels_may_grow_at_its_end_alone(model, tmp_path):
    def listed(*classes):
        return job(labels=Labels("listed", classes), batches=Batches(len(classes), 4), formats=("latents",))

    generate(model, create_diffusion("4"), listed(2, 0, 1, 1), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"labels\.classes"):
        generate(model, create_diffusion("4"), listed(2, 0, 0, 1, 2), tmp_path, progress=False)
    generate(model, create_diffusion("4"), listed(2, 0, 1, 1, 2), tmp_path, progress=False)
    assert len(np.load(tmp_path / "latents.npy")) == 5


def test_a_part_that_was_cut_short_is_drawn_again(model, whole, tmp_path, monkeypatch):
    module = sys.modules["ditkernels.sampling.generate"]
    monkeypatch.setattr(module, "_assemble", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, create_diffusion("4"), job(), tmp_path, progress=False)
    monkeypatch.undo()
    cut, flipped = (tmp_path / f".parts/batch-{batch:06d}.npz" for batch in (0, 1))
    cut.write_bytes(cut.read_bytes()[:-30])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    generate(model, create_diffusion("4"), job(), tmp_path, progress=False)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("content", ["{", "[]", '{"count": "4"}', ""])
def test_settings_that_cannot_be_read_are_named(model, tmp_path, content):
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"run\.json .*is not known"):
        generate(model, create_diffusion("4"), job(), tmp_path, progress=False)


def test_of_nested_settings_the_one_that_differs_is_named(model, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(ValueError, match=r"resumed: sampling\.seed: 0 there, 1 here$"):
        generate(model, create_diffusion("4"), job(config=SampleConfig(guidance_scale=2.0, seed=1)), tmp_path / "run")


def test_a_run_on_latents_names_its_vae_and_one_on_pixels_clips(checkpoint, model, tmp_path, capsys):
    for vae in ("mse", "none"):
        config = {"model": {"num_heads": 2, "input_size": [4, 6], "num_classes": 3}, "training": {"vae": vae}}
        save_checkpoint(tmp_path / vae, Checkpoint(model.state_dict(), model.state_dict(), 5, config))
    flags = ["--steps", "2", "--device", "cpu", "--count", "2", "--guided-channels", "all"]
    assert cli.main(["sample", str(tmp_path / "mse"), "--out", str(tmp_path / "out"), *flags]) == 2
    assert "--vae: got none, and the run was trained on latents of the VAE 'mse'; --vae mse" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for name, run, more in (("run", "none", []), ("bare", "none", ["--no-clip-denoised"])):
        assert cli.main(["sample", str(tmp_path / run), "--out", str(tmp_path / name), *flags, *more]) == 0
    told = [json.loads((tmp_path / name / "metadata.json").read_text(encoding="utf-8")) for name in ("run", "bare")]
    assert [there["sampling"]["clip_denoised"] for there in told] == [True, False]


def test_samples_may_be_drawn_with_tf32_products(checkpoint, tmp_path, monkeypatch):
    seen = []
    module = sys.modules["ditkernels.sampling.generate"]
    genuine = module.draw_batch
    monkeypatch.setattr(module, "draw_batch", lambda *a: seen.append(torch.get_float32_matmul_precision()) or genuine(*a))
    before = torch.get_float32_matmul_precision()
    assert cli.main(["sample", str(checkpoint), "--out", str(tmp_path / "out"), *FLAGS[:8], "--precision", "tf32"]) == 0
    assert set(seen) == {"high"}
    assert torch.get_float32_matmul_precision() == before


def test_balanced_labels_are_interleaved_and_random_ones_keyed():
    indices = torch.arange(1000)
    balanced = Labels("balanced", (5, 7, 7, 9))
    assert balanced.of(indices)[:6].tolist() == [5, 7, 7, 9, 5, 7]
    random = Labels("random", (5, 7, 9), seed=3)
    drawn = random.of(indices)
    assert torch.equal(random.of(indices[500:]), drawn[500:])
    assert not torch.equal(Labels("random", (5, 7, 9), seed=4).of(indices), drawn)
    counts = [(drawn == label).sum().item() for label in (5, 7, 9)]
    assert min(counts) > 280
    assert (drawn[1:] == drawn[:-1]).float().mean() < 0.4
    listed = Labels("listed", (2, 0))
    assert listed.of(torch.tensor([1, 0])).tolist() == [0, 2]
    with pytest.raises(ValueError, match="the list has 2 labels"):
        listed.of(torch.tensor([2]))


@given(st.lists(st.integers(0, 12), min_size=1))
def test_classes_survive_being_written_as_ranges(classes):
    assert parse_classes(as_ranges(classes)) == tuple(classes)


def test_classes_and_label_files_are_read(tmp_path):
    assert parse_classes("207, 360,3-5") == (207, 360, 3, 4, 5)
    for text in ("", "a", "1-", "-1", "5-4", "1,,2"):
        with pytest.raises(ValueError, match="classes: got"):
            parse_classes(text)
    path = tmp_path / "labels.txt"
    path.write_text("3\n1\n2\n", encoding="utf-8")
    assert read_labels(path) == (3, 1, 2)
    path.write_text("3\n\n2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: got ''"):
        read_labels(path)
    with pytest.raises(ValueError, match="no such file"):
        read_labels(tmp_path / "missing.txt")


# ---- Bad input -------------------------------------------------------------------------------------------------------


def test_labels_out_of_range_are_named(model, tmp_path):
    wrong = job(labels=Labels("balanced", (0, 3)))
    with pytest.raises(ValueError, match=r"labels: got 3, allowed are 0\.\.2"):
        generate(model, create_diffusion("4"), wrong, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_list_need_not_cover_the_padding(model, whole, tmp_path):
    listed = Labels("listed", tuple(index % 3 for index in range(11)))
    generate(model, create_diffusion("4"), job(labels=listed), tmp_path, progress=False)
    assert (tmp_path / "samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Batches(0, 4), "count: got 0"),
        (lambda: Batches(4, 0), "batch_size: got 0"),
        (lambda: job(formats=("png", "jpg")), "formats: got jpg, allowed are png"),
        (lambda: job(formats=()), "formats: got none"),
        (lambda: job(threads=0), "threads: got 0"),
        (lambda: job(labels=Labels("listed", (0, 1))), "got a list of 2 for 11 images"),
        (lambda: Labels("sorted", (0,)), "labels: got 'sorted'"),
        (lambda: Labels("balanced", ()), "classes: got none"),
    ],
)
def test_a_job_that_cannot_be_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_no_vae_may_be_said_as_in_training(checkpoint, tmp_path):
    flags = (*FLAGS, "--count", "2", "--steps", "2", "--vae", "none")
    assert cli.main(["sample", str(checkpoint), "--out", str(tmp_path), *flags]) == 0
    assert json.loads((tmp_path / "metadata.json").read_text(encoding="utf-8"))["vae"] is None


def test_latents_as_images_need_a_vae(tmp_path):
    four = random_model(channels=4)
    with pytest.raises(ValueError, match="4 channels and no VAE; allowed is latents"):
        generate(four, create_diffusion("4"), job(), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    generate(four, create_diffusion("4"), job(formats=("latents",)), tmp_path, progress=False)
    assert np.load(tmp_path / "latents.npy").shape == (11, 4, 4, 6)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps", "5000"], "timestep_respacing: got '5000'"),
        (["--guidance-interval", "3"], "--guidance-interval: got '3'"),
        (["--guidance-interval", "1,2"], "guidance_interval: got 1.0 to 2.0, which holds no step"),
        (["--guided-channels", "some"], "guided_channels: got 'some'"),
        (["--classes", "0-9"], "labels: got 3, allowed are 0..2"),
        (["--classes", "0", "--labels-file", "x"], "only one of the two"),
    ],
)
def test_the_command_names_a_wrong_flag(checkpoint, tmp_path, capsys, flags, message):
    assert cli.main(["sample", str(checkpoint), "--out", str(tmp_path / "o"), *FLAGS, *flags]) == 2
    assert message in capsys.readouterr().err


# ---- Loading ---------------------------------------------------------------------------------------------------------


def test_raw_and_ema_weights_are_told_apart(checkpoint, model):
    ema, raw = load_model(checkpoint), load_model(checkpoint, weights="raw")
    assert torch.equal(ema.model.final_layer.linear.weight, model.final_layer.linear.weight)
    torch.testing.assert_close(raw.model.final_layer.linear.bias, model.final_layer.linear.bias + 0.01)
    assert ema.digest != raw.digest
    assert ema.model.training is False
    assert (ema.model.input_size, ema.model.num_classes, ema.model.num_heads) == ((4, 6), 3, 2)
    with pytest.raises(ValueError, match="weights: got 'best'"):
        load_model(checkpoint, weights="best")


def test_a_training_run_stands_for_its_newest_whole_checkpoint(checkpoint, tmp_path, caplog):
    for step in (9, 10):
        shutil.copytree(checkpoint, checkpoint_directory(tmp_path, step))
    assert load_model(tmp_path).digest == load_model(checkpoint).digest
    (checkpoint_directory(tmp_path, 10) / "manifest.json").unlink()
    assert load_model(tmp_path).digest == load_model(checkpoint).digest
    assert "passed over a broken checkpoint" in caplog.text
    assert "step-00000010" in caplog.text
    (checkpoint_directory(tmp_path, 9) / "manifest.json").unlink()
    with pytest.raises(CheckpointError):
        load_model(tmp_path)


def test_a_second_sampling_in_a_folder_is_refused_by_name_of_the_first(checkpoint, tmp_path, capsys):
    lock = FolderLock(tmp_path / "out")
    assert cli.main(["sample", str(checkpoint), "--out", str(tmp_path / "out"), "--formats", "latents", "--device", "cpu"]) == 2
    assert f"is in use by process {os.getpid()} on" in capsys.readouterr().err
    lock.release()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_the_architecture_follows_from_bare_weights(conditioning, learn_sigma, tmp_path):
    model = DiT(
        8,
        2,
        3,
        SIZES["S"]["hidden_size"],
        1,
        6,
        mlp_ratio=1.0,
        num_classes=5,
        learn_sigma=learn_sigma,
        conditioning=conditioning,
    )
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    found = load_model(tmp_path / "bare.pt").model
    shown = (
        "input_size",
        "patch_size",
        "in_channels",
        "num_heads",
        "num_classes",
        "learn_sigma",
        "conditioning",
    )
    assert [getattr(found, name) for name in shown] == [getattr(model, name) for name in shown]
    assert found.state_dict().keys() == model.state_dict().keys()


def test_what_cannot_be_loaded_is_named(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="num_heads: unknown for a model of width 16"):
        load_model(tmp_path / "odd.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt does not hold a DiT's weights"):
        load_model(tmp_path / "other.pt")
    save_checkpoint(tmp_path / "raw", Checkpoint(model.state_dict(), config={"model": {"num_heads": 2}}))
    with pytest.raises(CheckpointError, match="holds no moving average"):
        load_model(tmp_path / "raw")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-mark", "utf-16-be-mark"])
def test_a_labels_file_may_have_a_mark_and_blank_lines_at_its_end(encoding, tmp_path):
    mark = "\ufeff" if encoding.endswith("-mark") else ""
    (tmp_path / "labels.txt").write_bytes(f"{mark}3\r\n1\r\n2\r\n\r\n \r\n".encode(encoding.removesuffix("-mark")))
    assert read_labels(tmp_path / "labels.txt") == (3, 1, 2)


@pytest.mark.parametrize(
    "content, message",
    [(b"3\n\n1\n", r"labels\.txt, line 2: got ''"), (b"3\n\xff\n", r"labels\.txt is no text of UTF-8 or UTF-16")],
)
def test_other_labels_files_are_refused_by_name(content, message, tmp_path):
    (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / "labels.txt")
