"""At scale 0 a guided step is the null class's alone; and labels that are spread."""

import itertools

import pytest
import torch

from ditkernels.diffusion import create_diffusion
from ditkernels.rng import Stream, normals
from ditkernels.sampling.config import SampleConfig
from ditkernels.sampling.drawing import sample
from ditkernels.sampling.labels import Labels
from tests.sampling.test_sampler import random_model

LABELS = [0, 2, 1]


def batches_of(monkeypatch, model):
    seen = []
    genuine = type(model).forward

    def forward(self, x, t, y):
        seen.append((len(x), y.tolist()))
        return genuine(self, x, t, y)

    monkeypatch.setattr(type(model), "forward", forward)
    return seen


@pytest.mark.parametrize("modulation_bytes", [0, 2**20])
@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_it_is_the_null_label_at_scale_one_bit_for_bit(monkeypatch, solver, modulation_bytes):
    model, diffusion = random_model(channels=4), create_diffusion("4")
    seen = batches_of(monkeypatch, model)
    zero = sample(model, diffusion, LABELS, SampleConfig(solver, 0.0), modulation_bytes=modulation_bytes)
    assert [count for count, _ in seen] == [3] * 4
    null = [model.num_classes] * 3
    assert torch.equal(zero, sample(model, diffusion, null, SampleConfig(solver, 1.0), modulation_bytes=modulation_bytes))
    assert not torch.equal(zero, sample(model, diffusion, LABELS, SampleConfig(solver, 1.0), modulation_bytes=modulation_bytes))


@pytest.mark.parametrize("modulation_bytes", [0, 2**20])
def test_outside_of_an_interval_steps_stay_conditional(monkeypatch, modulation_bytes):
    model, diffusion = random_model(channels=4), create_diffusion("4")
    seen = batches_of(monkeypatch, model)
    inside = (float(diffusion.timestep_map[1]), float(diffusion.timestep_map[2]))
    config = SampleConfig("ddim", 0.0, guidance_interval=inside)
    found = sample(model, diffusion, LABELS, config, modulation_bytes=modulation_bytes)
    assert [labels for _, labels in seen] == [LABELS, [model.num_classes] * 3, [model.num_classes] * 3, LABELS]
    monkeypatch.undo()
    x = normals(0, Stream.SAMPLING_NOISE, 0, torch.arange(3), (4, *model.input_size))
    for index in range(4)[::-1]:
        labels = [model.num_classes] * 3 if index in (1, 2) else LABELS
        y = torch.tensor(labels)
        t = torch.full((3,), index)
        with torch.no_grad():
            x = diffusion.ddim_sample(lambda z, s, y=y: model(z, s, y), x, t, False)["sample"]
    conditional = sample(model, diffusion, LABELS, SampleConfig("ddim", 1.0), modulation_bytes=modulation_bytes)
    # Modulation that is computed ahead is rounded otherwise.
    assert (found - x).norm() < 1e-3 * (conditional - x).norm()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 12, 1000])
def test_spread_labels_show_each_class_once_a_round_whatever_the_count(count):
    labels = Labels("spread", tuple(range(count)))
    first = labels.of(torch.arange(3 * count)).reshape(3, count)
    assert all(sorted(part.tolist()) == list(range(count)) for part in first)
    assert torch.equal(labels.of(torch.tensor([2 * count + 1])), first[2, 1:2] if count > 1 else labels.of(torch.tensor([0])))
    few = sorted(labels.of(torch.arange(min(count, 8))).tolist())
    if count == 1000:
        assert max(after - before for before, after in itertools.pairwise([*few, few[0] + count])) < 260
    assert labels.describe()["scheme"] == "spread"
