"""Every figure records what it was measured with; sets of samples give a mean and a standard deviation."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ditkernels import cli
from ditkernels.checkpoints.format import Checkpoint, save_checkpoint
from ditkernels.checkpoints.model import load_model
from ditkernels.evaluation.evaluate import Evaluation, evaluate, load_reference
from ditkernels.evaluation.features import Features
from ditkernels.evaluation.record import differences
from ditkernels.evaluation.sets import notes_on, spreads_of
from tests.sampling.test_sampler import random_model

EXTRACTOR = ["--extractor", f"{__name__}:extract", "--device", "cpu"]


def extract(images: Tensor) -> Tensor:
    return images.float().flatten(1)[:, :3]


class Extractor(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images: Tensor) -> Tensor:
        return extract(images) * self.scale


def pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 6, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sets of samples of a checkpoint, the last one drawn otherwise, and a reference."""
    root = tmp_path_factory.mktemp("drawn")
    model = random_model(channels=1)
    raw = {name: weight + 0.01 for name, weight in model.state_dict().items()}
    config = {"model": {"num_heads": 2, "input_size": [4, 6], "num_classes": 3}}
    save_checkpoint(root / "checkpoint", Checkpoint(raw, model.state_dict(), 5, config))
    np.savez(root / "reference.npz", arr_0=pixels(30, 1))
    flags = ["--count", "8", "--batch-size", "4", "--steps", "3", "--device", "cpu", "--formats", "npz", "--labels", "spread"]
    for name, more in {
        "a": ["--seed", "1"],
        "b": ["--seed", "2"],
        "c": ["--seed", "2", "--weights", "raw", "--solver", "ddim", "--cfg-scale", "2", "--guidance-interval", "0,500"],
    }.items():
        assert cli.main(["sample", str(root / "checkpoint"), "--out", str(root / name), *flags, *more]) == 0
    return root


def test_the_json_records_what_was_measured_with_what(drawn: Path, tmp_path: Path) -> None:
    found = {}
    for name in ("a", "c"):
        command = ["eval", str(drawn / name / "samples.npz"), str(drawn / "reference.npz"), "--neighbours", "2"]
        assert cli.main([*command, "--split-size", "4", *EXTRACTOR, "--json", str(tmp_path / name)]) == 0
        found[name] = json.loads((tmp_path / name).read_text(encoding="utf-8"))["measured_with"]
    assert found["a"] == {
        "reference_sha256": hashlib.sha256((drawn / "reference.npz").read_bytes()).hexdigest(),
        "extractor": f"{__name__}:extract",
        "extractor_sha256": None,
        "count": 8,
        "reference_count": 30,
        "neighbours": 2,
        "split_size": 4,
        "weights_sha256": load_model(drawn / "checkpoint").digest,
        "weights": "ema",
        "steps": "3",
        "solver": "ddpm",
        "guidance_scale": 4.0,
        "guided_channels": 3,
        "guidance_interval": None,
        "seed": 1,
        "labels": "spread",
    }
    changed = {name: value for name, value in found["c"].items() if value != found["a"][name]}
    assert changed == {
        "weights_sha256": load_model(drawn / "checkpoint", weights="raw").digest,
        "weights": "raw",
        "solver": "ddim",
        "guidance_scale": 2.0,
        "guidance_interval": [0.0, 500.0],
        "seed": 2,
    }


def record_of(samples: Any = None, reference: Any = None, **settings: Any) -> dict[str, Any]:
    images = torch.from_numpy(pixels(8, 0).transpose(0, 3, 1, 2).copy())
    samples = iter([images]) if samples is None else samples
    return evaluate(samples, iter([images]) if reference is None else reference, **{"extractor": extract, **settings}).measured_with


def test_what_is_not_known_is_none() -> None:
    found = record_of(Features(torch.randn(9, 3)), Features(torch.randn(9, 3)))
    told = {name: value for name, value in found.items() if value is not None}
    assert told.keys() == {"reference_sha256", "count", "reference_count", "neighbours", "split_size"}


def test_a_reference_in_no_file_is_known_by_its_images() -> None:
    images = torch.from_numpy(pixels(8, 0).transpose(0, 3, 1, 2).copy())
    whole = load_reference(iter([images]), extractor=extract).sha256
    assert whole == load_reference(iter(images.split(3)), extractor=extract, batch_size=2).sha256
    other = images.clone()
    other[5, 1, 2, 3] += 1
    assert whole != load_reference(iter([other]), extractor=extract).sha256
    assert whole != load_reference(iter([images.flip(0)]), extractor=extract).sha256
    features = torch.randn(9, 3)
    by_dtype = {load_reference(Features(features.to(dtype))).sha256 for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    assert len(by_dtype) == 3
    wide = load_reference(iter([images.reshape(8, 3, 6, 4)]), extractor=extract).sha256
    assert wide != whole


def test_an_extractor_is_known_by_its_weights() -> None:
    one, same, other = (record_of(extractor=Extractor(scale)) for scale in (1.0, 1.0, 2.0))
    assert one["extractor"] == f"{__name__}:Extractor"
    assert one["extractor_sha256"] == same["extractor_sha256"] != other["extractor_sha256"]
    assert None not in (one["extractor_sha256"], other["extractor_sha256"])


def test_records_differ_in_all_but_the_weights_that_were_measured() -> None:
    before = {"weights_sha256": "a", "steps": "50", "k": 3, "seed": None}
    now = {"weights_sha256": "b", "steps": "250", "k": 3, "seed": 1, "new": True}
    assert differences(before, now) == ["steps 250, was 50", "seed 1, was unknown"]
    assert differences(now, now) == []


# ---- Several sets ----------------------------------------------------------------------------------------------------


def test_the_command_gives_mean_and_standard_deviation_over_sets(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(drawn / name / "samples.npz") for name in "abc"]
    reference = ["--reference", str(drawn / "reference.npz")]
    assert cli.main(["eval", *paths, *reference, *EXTRACTOR, "--json", str(tmp_path / "all")]) == 0
    shown = capsys.readouterr()
    found = json.loads((tmp_path / "all").read_text(encoding="utf-8"))
    assert [one["samples"] for one in found["sets"]] == paths
    alone = [evaluate(path, drawn / "reference.npz", extractor=extract) for path in paths]
    for name in ("fid", "precision", "recall"):
        values = [getattr(one, name) for one in alone]
        assert [one[name] for one in found["sets"]] == values
        assert found["mean"][name] == pytest.approx(np.mean(values), rel=1e-12)
        assert found["std"][name] == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    assert found["mean"].keys() == found["std"].keys() == {"fid", "precision", "recall"}
    assert "mean ± standard deviation over 3 sets" in shown.out
    assert f"FID             {found['mean']['fid']:.4f} ± {found['std']['fid']:.4f}" in shown.out
    (note,) = found["notes"]
    assert note.startswith("set 3 was drawn otherwise than set 1: weights raw, was ema; solver ddim, was ddpm; guidance_scale 2.0")
    assert f"note: {note}" in shown.err


def test_one_set_may_name_its_reference_too(drawn: Path, tmp_path: Path) -> None:
    samples, reference = str(drawn / "a/samples.npz"), str(drawn / "reference.npz")
    for name, sides in {"one": [samples, reference], "two": [samples, "--reference", reference]}.items():
        assert cli.main(["eval", *sides, *EXTRACTOR, "--json", str(tmp_path / name)]) == 0
    assert (tmp_path / "one").read_text(encoding="utf-8") == (tmp_path / "two").read_text(encoding="utf-8")


@pytest.mark.parametrize("count", [1, 3])
def test_sets_without_a_reference_are_refused(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", *["a.npz"] * count]) == 2
    assert f"--reference: got none and {count} paths, allowed are samples and their reference" in capsys.readouterr().err


def of(fid: float | None, **record: Any) -> Evaluation:
    measured_with = {"weights_sha256": "w", "seed": 0, "count": 8, **record}
    return Evaluation(fid, None, None, None, None, None, 8, 30, 5000, "unknown", measured_with=measured_with)


def test_a_metric_that_a_set_lacks_has_no_spread() -> None:
    assert spreads_of([of(1.0), of(None)]) == {}
    assert spreads_of([of(1.0), of(3.0)]) == {"fid": (2.0, pytest.approx(2**0.5))}
    with pytest.raises(ValueError, match="samples: got 1 set, a standard deviation needs at least 2"):
        spreads_of([of(1.0)])


def test_what_is_one_draw_is_told() -> None:
    one_draw = "sets 1 and 3 are of the same weights and seed, 0: they are one draw"
    assert notes_on([of(1.0), of(1.0, seed=1), of(1.0)]) == [one_draw]
    assert notes_on([of(1.0), of(1.0, weights_sha256="v")]) == []
    assert notes_on([of(1.0, seed=None), of(1.0, seed=None)]) == []
    assert notes_on([of(1.0), of(1.0, seed=1, count=9)]) == ["set 2 was drawn otherwise than set 1: count 9, was 8"]
