"""Latents as LightningDiT stores them: normalised as there, drawn by key, and what is missing is named."""

import pytest
import torch
from safetensors.torch import save_file

from ditkernels.cli import main
from ditkernels.data.latents import LatentsError
from ditkernels.data.lightning import LightningBatches, LightningFolder
from ditkernels.data.order import mirrored
from ditkernels.training.config import TrainConfig
from ditkernels.training.trainer import train
from tests.training.test_trainer import same_bits

SHAPE = (3, 4, 4)
COUNTS = (5, 1, 4)
QUICK = {
    "model": "DiT-S/2",
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "global_batch_size": 4,
    "device": "cpu",
    "num_workers": 0,
}


@pytest.fixture
def root(tmp_path):
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "latents"
    folder.mkdir()
    for number, count in enumerate(COUNTS):
        draws = {name: torch.randn(count, *SHAPE, generator=generator) for name in ("latents", "latents_flip")}
        labels = torch.randint(3, (count,), generator=generator)
        labels[0] = 2
        save_file({**draws, "labels": labels}, folder / f"latents_rank00_shard{number:03d}.safetensors")
    statistics = {"mean": torch.randn(1, 3, 1, 1, generator=generator), "std": torch.rand(1, 3, 1, 1, generator=generator) + 0.5}
    torch.save(statistics, folder / "latents_stats.pt")
    return folder


def all_of(root, name):
    from safetensors.torch import load_file

    return torch.cat([load_file(path)[name] for path in sorted(root.glob("*.safetensors"))])


def test_a_batch_is_what_lightningdit_would_see_by_keyed_draws(root):
    batches = LightningBatches(LightningFolder(root), 4, 7, flip=True, unconditional=False)
    statistics = torch.load(root / "latents_stats.pt")
    sides = (all_of(root, "latents"), all_of(root, "latents_flip"))
    taken = set()
    for step in range(6):
        batch = batches[step]
        chosen, flipped = batches.stream.batch(step), mirrored(7, step, torch.arange(4))
        for row, (index, side) in enumerate(zip(chosen, flipped, strict=True)):
            expected = (sides[int(side)][index] - statistics["mean"][0]) / statistics["std"][0]
            torch.testing.assert_close(batch.images[row], expected)
            taken.add(bool(side))
        assert torch.equal(batch.labels, all_of(root, "labels")[chosen])
    assert taken == {True, False}
    plain = LightningBatches(LightningFolder(root), 4, 7, flip=False, unconditional=True)[0]
    assert plain.labels.tolist() == [0] * 4


def settings(root, folder, **changes):
    return TrainConfig(**{**QUICK, "data_path": str(root), "results_dir": str(folder), "steps": 4, **changes})


def test_a_run_trains_on_them_and_goes_on_bit_for_bit(root, tmp_path, capsys):
    whole = train(settings(root, tmp_path / "whole", num_workers=2, val_path=str(root), val_every=2, val_images=4))
    assert (whole.model.in_channels, whole.model.input_size, whole.model.num_classes) == (3, (4, 4), 3)
    train(settings(root, tmp_path / "run", steps=2))
    assert same_bits(whole.model, train(settings(root, tmp_path / "run", resume="auto")).model)
    flags = ["--steps", "2", "--count", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["sample", str(tmp_path / "run"), *flags]) == 2
    assert "--vae: got none, and what made the latents of this run is not known" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "run"), *flags, "--formats", "latents"]) == 0
    with pytest.raises(ValueError, match="sample_every: got 2, allowed is 0: what made these latents is not known"):
        train(settings(root, tmp_path / "grids", sample_every=2))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"latents_stats\.pt is missing"),
        (b"no torch file", r"latents_stats\.pt is no file of plain tensors"),
        ({"mean": torch.zeros(3)}, "allowed are mean and std of 3 numbers each"),
        ({"mean": torch.zeros(2), "std": torch.ones(2)}, "allowed are mean and std of 3 numbers each"),
        ({"mean": torch.zeros(3), "std": torch.zeros(3)}, "a std that is not above 0"),
    ],
)
def test_statistics_must_be_there(root, content, message):
    path = root / "latents_stats.pt"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(LatentsError, match=message):
        LightningFolder(root)


@pytest.mark.parametrize("damage", ["cut", "key", "shape", "labels", "none"])
def test_a_piece_of_another_layout_is_named(root, damage):
    path = sorted(root.glob("*.safetensors"))[1]
    latents = torch.zeros(2, *SHAPE)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "none":
        for other in root.glob("*.safetensors"):
            other.unlink()
    else:
        content = {"latents": latents, "latents_flip": latents.clone(), "labels": torch.zeros(2, dtype=torch.int64)}
        changed = {
            "key": ("latents_flip", None),
            "shape": ("latents", torch.zeros(2, 3, 4, 5)),
            "labels": ("labels", torch.zeros(2)),
        }
        name, value = changed[damage]
        content[name] = value
        save_file({key: tensor for key, tensor in content.items() if tensor is not None}, path)
    with pytest.raises(LatentsError, match=r"safetensors"):
        LightningFolder(root)
