"""The whole model on the triton backend, interpreted: four conditionings, every gradient, and twenty steps of training."""

from __future__ import annotations

import copy

import pytest
import torch

from ditkernels import create_diffusion, reference
from ditkernels.reference import CONDITIONINGS
from tests import numerics
from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.test_models import F32, F64, forward_backward, pair

TINY = {"input_size": (4, 6), "hidden_size": 40, "depth": 2, "num_heads": 2, "num_classes": 5}


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_rounds_no_worse_than_the_reference(conditioning: str) -> None:
    fused, plain = pair(F32, conditioning=conditioning, **TINY)
    exact = forward_backward(copy.deepcopy(plain).double(), F64)
    got, low = forward_backward(fused), forward_backward(plain)
    for name, value in exact.items():
        numerics.assert_model_contract(got[name], low[name], value, name)


def losses(model: reference.DiT, steps: int, dtype: torch.dtype) -> list[float]:
    """Of training steps on one fixed stream of latents, labels, timesteps and noise."""
    diffusion = create_diffusion("")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        x, noise = (torch.randn(3, 4, *model.input_size, generator=generator).to(dtype) for _ in range(2))
        t = torch.randint(0, 1000, (3,), generator=generator)
        y = torch.randint(0, 6, (3,), generator=generator)
        loss = diffusion.training_losses(model, x, t, {"y": y}, noise)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_twenty_training_steps_stay_with_the_reference() -> None:
    fused, plain = pair(F32, **{**TINY, "depth": 1})
    exact = losses(copy.deepcopy(plain).double(), 20, F64)
    got, low = losses(fused, 20, F32), losses(plain, 20, F32)
    assert exact[-1] < exact[0]
    numerics.assert_drift(got, low, exact)
