"""How many images each class has, as data of every kind tells it without reading an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import Dataset

from ditkernels.data.source import open_data, open_dataset
from ditkernels.training.config import TrainConfig
from ditkernels.training.trainer import train
from tests.helpers.runs import newest_checkpoint
from tools.tree import ROOT

LATENTS = ROOT / "tests/earlier/latents"


def config(path: Path | str, **changes: Any) -> TrainConfig:
    return TrainConfig(data_path=str(path), vae="none", global_batch_size=2, **changes)


def folder_of(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8)).save(root / name / f"{index}.png")
    return root


def test_of_a_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "images", {"a": 2, "b": 0, "c": 3})
    assert open_data(config(folder, image_size=8, keep_empty_classes=True)).images_per_class == (2, 0, 3)
    assert open_data(config(folder, image_size=8, unconditional=True)).images_per_class == (5,)


def test_of_latents_of_an_earlier_version() -> None:
    labels = torch.cat([load_file(shard)["labels"] for shard in sorted(LATENTS.glob("*.safetensors"))])
    data = open_data(config(LATENTS))
    expected = [(labels == label).sum().item() for label in range(len(data.class_to_idx))]
    assert data.images_per_class == tuple(expected)
    assert sum(expected) == data.length
    assert open_data(config(LATENTS, unconditional=True)).images_per_class == (data.length,)


class Described(Dataset[Any]):
    classes = ("a", "b", "c")

    def __init__(self, **told: Any) -> None:
        self.__dict__.update(told)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(1, 8, 8), (0, 2, 2, 0)[index]


@pytest.mark.parametrize("targets", [[0, 2, 2, 0], torch.tensor([0, 2, 2, 0]), np.array([0, 2, 2, 0], np.uint16)])
def test_of_the_targets_of_a_data_set(targets: Any, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"model": "DiT-S/8", "hidden_size": 16, "depth": 1, "num_heads": 2}
    train(
        config("", num_classes=4, steps=1, num_workers=0, device="cpu", results_dir=str(tmp_path), **sizes),
        data=Described(targets=targets),
    )
    checkpoint = newest_checkpoint(tmp_path).checkpoint
    assert checkpoint is not None
    assert checkpoint.state["images_per_class"] == [2, 0, 2, 0]


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"targets": [0, 2, 2]},
        {"targets": [0, 2, 3, 0]},
        {"targets": [0, -1, 2, 0]},
        {"targets": [0.0, 2.0, 2.0, 0.0]},
        {"targets": ["a", "c", "c", "a"]},
        {"targets": [[0], [2, 1], [2], [0]]},
        {"targets": [1, 0, 0, 1], "target_transform": lambda label: 1 - label},
    ],
)
def test_targets_that_are_not_the_labels_tell_nothing(told: dict[str, Any]) -> None:
    assert open_dataset(config(""), Described(**told)).images_per_class is None
    assert open_dataset(config("", unconditional=True), Described(**told)).images_per_class == (4,)


def test_of_the_digits() -> None:
    from sklearn.datasets import load_digits

    data = open_data(config("digits"))
    assert data.images_per_class is not None
    assert (len(data.images_per_class), sum(data.images_per_class)) == (10, data.length)
    whole = np.bincount(load_digits().target)
    assert all(0 < mine < all_of_it for mine, all_of_it in zip(data.images_per_class, whole, strict=True))
