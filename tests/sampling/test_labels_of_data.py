"""Labels as often as the training data has them: drawn by image index, recorded, and refused without a record."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from ditkernels import cli
from ditkernels.checkpoints.format import Checkpoint, save_checkpoint
from ditkernels.rng import Stream, words
from ditkernels.sampling.labels import Labels
from tests.sampling.test_sampler import random_model

COUNTS = (5, 0, 90, 305)
FLAGS = ["--steps", "2", "--device", "cpu", "--formats", "npz", "--batch-size", "4"]


def test_each_image_of_the_data_is_as_likely_as_another() -> None:
    labels = Labels.of_data(COUNTS, None, seed=7)
    drawn = labels.of(torch.arange(20_000))
    every = np.repeat(np.arange(4), COUNTS)
    word = words(7, Stream.SAMPLING_LABEL, 0, torch.arange(20_000), 1)[:, 0].numpy()
    assert np.array_equal(drawn.numpy(), every[(word.astype(object) * len(every) // 2**32).astype(int)])
    found = np.bincount(drawn.numpy(), minlength=4)
    assert found[1] == 0
    share = np.array(COUNTS)[[0, 2, 3]] / sum(COUNTS)
    assert scipy.stats.chisquare(found[[0, 2, 3]], share * 20_000).pvalue > 1e-3


def test_a_label_depends_on_seed_and_index_alone() -> None:
    labels = Labels.of_data(COUNTS, None, seed=7)
    whole = labels.of(torch.arange(400))
    assert torch.equal(labels.of(torch.arange(100, 110)), whole[100:110])
    assert not torch.equal(Labels.of_data(COUNTS, None, seed=8).of(torch.arange(400)), whole)


def test_chosen_classes_keep_their_shares() -> None:
    labels = Labels.of_data(COUNTS, (3, 0, 9), seed=0)
    assert labels.weights == (305, 5, 0)
    assert set(labels.of(torch.arange(1000)).tolist()) == {0, 3}
    with pytest.raises(ValueError, match=r"classes: got 1,8-9, which have no images in the training data"):
        Labels.of_data(COUNTS, (1, 8, 9), seed=0)
    with pytest.raises(ValueError, match=r"weights: got 1 for 2 classes, allowed is one for each"):
        Labels("data", (0, 1), weights=(3,))


def checkpoint_with(path: Path, state: dict[str, object]) -> Path:
    model = random_model(channels=1)
    config = {"model": {"num_heads": 2, "input_size": [4, 6], "num_classes": 3}}
    save_checkpoint(path, Checkpoint(model.state_dict(), model.state_dict(), 5, config, state=state))
    return path


def test_the_command_draws_from_the_checkpoints_record(tmp_path: Path) -> None:
    checkpoint = checkpoint_with(tmp_path / "checkpoint", {"images_per_class": [1, 0, 7]})
    flags = [*FLAGS, "--labels", "data", "--seed", "3", "--count", "9"]
    assert cli.main(["sample", str(checkpoint), "--out", str(tmp_path / "o"), *flags]) == 0
    described = json.loads((tmp_path / "o/metadata.json").read_text(encoding="utf-8"))["labels"]
    assert described == {"scheme": "data", "classes": "0-2", "order": "interleaved", "images_per_class": "1,0,7", "seed": 3}
    with np.load(tmp_path / "o/samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == Labels.of_data([1, 0, 7], None, 3).of(torch.arange(9)).tolist()


@pytest.mark.parametrize("state", [{}, {"images_per_class": None}])
def test_without_a_record_it_is_refused(state: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = checkpoint_with(tmp_path / "checkpoint", state)
    assert cli.main(["sample", str(checkpoint), "--out", str(tmp_path / "o"), *FLAGS, "--labels", "data"]) == 2
    said = f"--labels: got data, but {checkpoint} records no images per class; allowed are balanced, random, spread"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("scheme, count, told", [("balanced", 2, True), ("balanced", 3, False), ("spread", 2, False)])
def test_fewer_images_than_classes_in_turn_name_spread(
    scheme: str, count: int, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ditkernels")
    checkpoint = checkpoint_with(tmp_path / "checkpoint", {})
    flags = [*FLAGS, "--labels", scheme, "--count", str(count)]
    assert cli.main(["sample", str(checkpoint), "--out", str(tmp_path / "o"), *flags]) == 0
    said = f"{count} images in turn show the first {count} of 3 classes; --labels spread shows classes from all over"
    assert (said in caplog.text) == told
