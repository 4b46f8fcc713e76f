"""The sampler on a GPU: replayed CUDA graphs draw what the plain loop draws, and a step never waits for the device."""

from __future__ import annotations

import pytest
import torch

from ditkernels.diffusion import create_diffusion
from ditkernels.models import DiT as FusedDiT
from ditkernels.reference import CONDITIONINGS
from ditkernels.sampling.config import SOLVERS, SampleConfig
from ditkernels.sampling.drawing import sample, sample_progressive
from tests.numerics import assert_trajectory
from tests.sampling.test_sampler import GUIDANCE, LABELS, by_hand, random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("solver", SOLVERS)
def test_graphs_draw_what_the_plain_reference_draws_on_a_cpu(solver, guidance, conditioning):
    config = SampleConfig(solver, **{"guidance_scale": 2.0, "seed": 1, **GUIDANCE[guidance]})
    plain = random_model(conditioning=conditioning)
    fused = random_model(conditioning=conditioning, model_class=FusedDiT)
    for model in (plain, fused):
        for parameter in model.parameters():
            parameter.data *= 0.5
    diffusion = create_diffusion("6")
    low = by_hand(plain, diffusion, config)
    exact = by_hand(plain.double(), diffusion, config)
    drawn = [state.cpu() for state in sample_progressive(fused.cuda(), diffusion, LABELS, config)]
    assert_trajectory(drawn, low, exact)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_a_step_never_waits_for_the_device(solver, guidance):
    model = random_model(model_class=FusedDiT).cuda()
    config = SampleConfig(solver, **{"guidance_scale": 2.0, **GUIDANCE[guidance]})
    room = 2 * 6 * 4 * (2 * 6 * 16 + 2 * 16) + 1
    states = sample_progressive(model, create_diffusion("12"), LABELS, config, modulation_bytes=room)
    # capture, and the first of each kind of step, may wait
    for _ in range(9):
        next(states)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        remaining = list(states)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert len(remaining) == 3


def test_the_same_bytes_twice():
    model = random_model(model_class=FusedDiT).cuda()
    first = sample(model, create_diffusion("6"), LABELS, SampleConfig())
    assert torch.equal(sample(model, create_diffusion("6"), LABELS, SampleConfig()), first)
