"""What keeps figures from being compared is said, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ditkernels.evaluation import notes
from ditkernels.evaluation.evaluate import Evaluation, evaluate
from ditkernels.evaluation.features import Features

NO_PR = ["fid", "inception_score", "sfid"]


def extract(images: torch.Tensor) -> Features:
    rows = images.float().flatten(1)
    return Features(rows[:, :3], rows[:, 3:5], rows[:, 5:9] / 100)


def pixels(count: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def npz(path: Path, images: np.ndarray) -> Path:
    path.parent.mkdir(exist_ok=True)
    np.savez(path, arr_0=images)
    return path


def folder(path: Path, images: np.ndarray, suffix: str) -> Path:
    path.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(path / f"{index}{suffix}")
    return path


def found(samples: Any, reference: Any, **settings: Any) -> Evaluation:
    return evaluate(samples, reference, **{"extractor": extract, "metrics": NO_PR, "split_size": 10, **settings})


def test_images_that_compare_have_no_notes(tmp_path: Path) -> None:
    samples = folder(tmp_path / "samples", pixels(20), ".png")
    assert found(samples, npz(tmp_path / "r.npz", pixels(30, seed=1))).notes == []


def test_images_of_another_size(tmp_path: Path) -> None:
    reference = npz(tmp_path / "r.npz", pixels(30, size=16, seed=1))
    assert found(npz(tmp_path / "s.npz", pixels(20)), reference).notes == [
        "the samples are 8 x 8, the reference is 16 x 16: images of another size have other features"
    ]


def test_files_of_another_format(tmp_path: Path) -> None:
    samples, reference = pixels(20), pixels(30, seed=1)
    said = ["the samples' files are {}, the reference's {}: compression changes features".format]
    jpeg, webp = folder(tmp_path / "jpeg", samples, ".jpg"), folder(tmp_path / "webp", reference, ".webp")
    lossless = npz(tmp_path / "r.npz", reference)
    assert found(jpeg, lossless).notes == [said[0]("JPEG", "without loss")]
    assert found(lossless, jpeg).notes == [said[0]("without loss", "JPEG")]
    assert found(jpeg, webp).notes == [said[0]("JPEG", "WEBP")]
    assert found(jpeg, folder(tmp_path / "other", reference, ".jpeg")).notes == []
    stream = iter([torch.from_numpy(samples.transpose(0, 3, 1, 2).copy())])
    assert found(stream, webp).notes == []


def test_duplicates(tmp_path: Path) -> None:
    samples, reference = pixels(20), pixels(30, seed=1)
    repeated = npz(tmp_path / "s.npz", np.concatenate([samples, samples[:3], samples[:3]]))
    of_both = npz(tmp_path / "r.npz", np.concatenate([reference, reference[:1], samples[4:6]]))
    assert found(repeated, of_both).notes == [
        "6 of the 26 images of the samples repeat others of them",
        "1 of the 33 images of the reference repeat others of them",
        "2 different images of the samples are in the reference too",
    ]
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    repeats = evaluate(Features(torch.cat([rows, rows[:2]])), Features(rows + 1), metrics=["fid"]).notes
    assert repeats == ["2 of the 22 images of the samples repeat others of them"]


def test_fewer_images_than_features(tmp_path: Path) -> None:
    few = npz(tmp_path / "s.npz", pixels(3))
    enough = npz(tmp_path / "r.npz", pixels(30, seed=1))
    singular = "the covariance is singular and FID too large"
    assert found(few, enough, metrics=["fid", "sfid"]).notes == [f"FID of 3 images with 3 features each: {singular}"]
    assert found(enough, few, metrics=["fid"]).notes == [f"FID against 3 images with 3 features each: {singular}"]
    two = npz(tmp_path / "two.npz", pixels(2))
    assert f"sFID of 2 images with 2 features each: {singular}".replace("and FID", "and sFID") in found(two, enough).notes


def test_fewer_images_than_a_split(tmp_path: Path) -> None:
    reference = npz(tmp_path / "r.npz", pixels(30, seed=1))
    samples = npz(tmp_path / "s.npz", pixels(20))
    assert found(samples, reference, split_size=20).notes == []
    said = found(samples, reference, split_size=21).notes
    assert said == ["the Inception Score is of 20 images, less than one split of 21: it rises with the images"]


def test_counts_of_precision_and_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, reference = npz(tmp_path / "s.npz", pixels(20)), npz(tmp_path / "r.npz", pixels(30, seed=1))
    (said,) = found(samples, reference, metrics=["precision_recall"]).notes
    assert said.startswith("precision and recall are of 20 images against 30, ADM's of 50,000 against 10,000")
    monkeypatch.setattr(notes, "ADM_COUNTS", (20, 30))
    assert found(samples, reference, metrics=["precision_recall"]).notes == []


@pytest.mark.parametrize(
    "scheme, classes, said",
    [
        ("balanced", "0-20", ["20 images of 21 classes: the first 20 alone; --labels spread shows classes from all over"]),
        ("spread", "0-20", ["20 images of 21 classes: some are missing"]),
        ("random", "0-20", ["20 images of 21 classes: some are missing"]),
        ("balanced", "0-19", []),
        ("listed", "3,4," * 12 + "3", []),
        ("balanced", "what", []),
    ],
)
def test_fewer_images_than_classes(scheme: str, classes: str, said: list[str], tmp_path: Path) -> None:
    samples = npz(tmp_path / "samples/samples.npz", pixels(20))
    described = {"labels": {"scheme": scheme, "classes": classes}}
    (tmp_path / "samples/metadata.json").write_text(json.dumps(described), encoding="utf-8")
    assert found(samples, npz(tmp_path / "r.npz", pixels(30, seed=1))).notes == said
