"""What a run will need later is tried before its first step, writes nothing where it fails, and moves no bit where it works."""

import errno
import os
import random
import stat
import sys

import numpy as np
import pytest
import torch

from ditkernels import files
from ditkernels.checkpoints.run import LOG
from ditkernels.training import trainer as trainer_module
from ditkernels.training.evaluations import Evaluations
from ditkernels.training.trainer import train
from tests.training.test_trainer import brightness, config, evaluated, losses, run, same_bits, small_model, some_data

ALL = {"val_every": 2, "val_images": 7, "sample_every": 2, "sample_steps": 2}


def capricious(images):
    """Features of an extractor that draws from every generator that a program has."""
    return brightness(images) + random.random() + np.random.rand() + torch.rand(())


def asked(tmp_path, **changes):
    return {**ALL, **evaluated(tmp_path, eval_extractor=f"{__name__}:capricious"), **changes}


def test_it_moves_no_bit_and_no_random_state(tmp_path, monkeypatch):
    def seed():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        return small_model(random=True)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    model = seed()
    rehearsed = run(tmp_path / "a", model=model, **asked(tmp_path / "a"))
    drawn = random.random(), np.random.rand(), torch.rand(())
    monkeypatch.setattr(trainer_module, "rehearse", lambda *_: None)
    model = seed()
    plain = run(tmp_path / "b", model=model, **asked(tmp_path / "b"))
    assert same_bits(rehearsed.model, plain.model)
    assert same_bits(rehearsed.ema, plain.ema)
    assert losses(tmp_path / "a/run") == losses(tmp_path / "b/run")
    assert drawn == (random.random(), np.random.rand(), torch.rand(()))


def test_one_batch_of_each_is_tried(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "ditkernels.training.evaluations.sample_progressive",
        lambda *args: drawn.append(args[1].num_timesteps) or [torch.zeros(16, 1, 4, 4)],
    )
    batches = []
    genuine = Evaluations._losses

    def counted(self, models, batch, start):
        batches.append(start)
        return genuine(self, models, batch, start)

    monkeypatch.setattr(Evaluations, "_losses", counted)
    monkeypatch.setattr(trainer_module, "open_folder", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, **asked(tmp_path, sample_steps=50, val_images=100))
    assert (drawn, batches) == ([2], [0])


def features_of_another_number(images):
    return torch.zeros(1, 3)


@pytest.mark.parametrize(
    "changes, missing, message",
    [
        ({"tensorboard": True}, "torch.utils.tensorboard", r"--tensorboard needs tensorboard.*pip install ditkernels\[log\]"),
        ({"wandb": True}, "wandb", r"--wandb needs wandb.*pip install ditkernels\[log\]"),
        ({"sample_every": 1000}, "PIL", r"need Pillow .*pip install ditkernels\[vae\]"),
        ({"val_path": "somewhere"}, None, "val_path: got somewhere, which nothing is measured on"),
        ({"warmup_steps": 5}, None, r"warmup_steps: got 5, allowed are 0\.\.4"),
        ({"eval_extractor": f"{__name__}:features_of_another_number"}, None, r"features: pool: got shape \(1, 3\)"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(tmp_path, monkeypatch, changes, missing, message):
    if missing is not None:
        monkeypatch.setitem(sys.modules, missing, None)
    settings = evaluated(tmp_path, **changes) if "eval_extractor" in changes else changes
    with pytest.raises((ValueError, ImportError), match=message):
        run(tmp_path, **settings)
    assert not (tmp_path / "run").exists()


def test_validation_without_held_out_images_is_refused_at_the_start(tmp_path):
    import dataclasses

    settings = config(tmp_path, val_every=1000)
    data = dataclasses.replace(some_data(settings), validation=None)
    with pytest.raises(ValueError, match="val_every: got 1000 and no held-out images, allowed is 0; val_path names some"):
        train(settings, model=small_model(), data=data)
    assert not (tmp_path / "run").exists()


def test_a_start_that_fails_leaves_a_run_as_it_was(tmp_path):
    run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="val_path"):
        run(tmp_path, resume="auto", val_path="somewhere", steps=6)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_where_folders_cannot_be_synced_the_run_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
    genuine = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        genuine(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files._say_unsynced.cache_clear()
    assert run(tmp_path).step == 4
    assert caplog.text.count("syncs no folders") >= 1
    assert (tmp_path / "run" / LOG).exists()
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.read(-1, 1))
    with pytest.raises(OSError, match="Bad file descriptor"):
        files.sync_directory(tmp_path)
