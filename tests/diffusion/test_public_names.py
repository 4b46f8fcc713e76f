"""The names of the public diffusion object, each against the formula of its paper, on the whole chain and respaced."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditkernels.diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType, create_diffusion

RESPACINGS = ("", "25", "ddim50", "logsnr20")


def betas_of(diffusion: GaussianDiffusion) -> np.ndarray:
    """The betas of the respaced chain, by their definition."""
    kept = diffusion.alphas_cumprod
    return 1 - kept / np.append(1, kept[:-1])


@pytest.mark.parametrize("respacing", RESPACINGS)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_tables_follow_from_the_betas(respacing: str, schedule: str) -> None:
    diffusion = create_diffusion(respacing, schedule)
    betas = betas_of(diffusion)
    bar = np.cumprod(1 - betas)
    before, behind = np.append(1, bar[:-1]), np.append(bar[1:], 0)
    variance = betas * (1 - before) / (1 - bar)
    expected = {
        "betas": betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": before,
        "alphas_cumprod_next": behind,
        "sqrt_alphas_cumprod": np.sqrt(bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - bar),
        "log_one_minus_alphas_cumprod": np.log(1 - bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / bar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / bar - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.append(variance[1], variance[1:])),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - bar),
        "posterior_mean_coef2": (1 - before) * np.sqrt(1 - betas) / (1 - bar),
    }
    for name, values in expected.items():
        found = getattr(diffusion, name)
        assert found.dtype == np.float64, name
        # Betas of the definition come out of a difference.
        np.testing.assert_allclose(found, values, rtol=1e-9 if respacing == "" else 1e-7, atol=1e-12, err_msg=name)


def test_the_whole_chain_to_twelve_digits() -> None:
    betas = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - betas)
    before = np.append(1, bar[:-1])
    diffusion = create_diffusion("")
    variance = betas * (1 - before) / (1 - bar)
    np.testing.assert_allclose(diffusion.posterior_variance, variance, rtol=1e-12)
    np.testing.assert_allclose(diffusion.posterior_mean_coef1, betas * np.sqrt(before) / (1 - bar), rtol=1e-12)
    np.testing.assert_allclose(diffusion.posterior_mean_coef2, (1 - before) * np.sqrt(1 - betas) / (1 - bar), rtol=1e-12)


def test_kinds_are_the_public_enums() -> None:
    usual = create_diffusion("")
    assert (usual.model_mean_type, usual.model_var_type) == (ModelMeanType.EPSILON, ModelVarType.LEARNED_RANGE)
    assert (usual.loss_type, usual.loss_type.is_vb()) == (LossType.MSE, False)
    other = create_diffusion("", use_kl=True, predict_xstart=True, learn_sigma=False, sigma_small=True)
    assert (other.model_mean_type, other.model_var_type) == (ModelMeanType.START_X, ModelVarType.FIXED_SMALL)
    assert (other.loss_type, other.loss_type.is_vb()) == (LossType.RESCALED_KL, True)
    large = create_diffusion("", learn_sigma=False, rescale_learned_sigmas=True)
    assert (large.model_var_type, large.loss_type) == (ModelVarType.FIXED_LARGE, LossType.RESCALED_MSE)
    assert [kind.value for kind in ModelMeanType] == [1, 2, 3]
    assert [kind.name for kind in ModelVarType] == ["LEARNED", "FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"]


def test_timesteps_of_the_original_chain() -> None:
    respaced = create_diffusion("10")
    assert respaced.original_num_steps == 1000
    assert respaced.use_timesteps == set(respaced.timestep_map) == set(range(0, 1000, 111))
    fractions = create_diffusion("logsnr20")
    assert any(step % 1 for step in fractions.use_timesteps)
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    t = torch.tensor([3, 7])
    x = torch.zeros(2, 1, 2, 2)
    for wrapped in (fractions._wrap_model(model), fractions._wrap_model(fractions._wrap_model(model))):
        wrapped(x, fractions._scale_timesteps(t))
        assert torch.equal(seen.pop(), torch.tensor([fractions.timestep_map[3], fractions.timestep_map[7]]).float())


X, START = (torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (0, 1))
T = torch.tensor([0, 1, 5, 9])


def at(table: np.ndarray) -> Tensor:
    return torch.from_numpy(table.copy())[T].view(-1, 1, 1, 1)


def model(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    return torch.cat([0.3 * x + t.view(-1, 1, 1, 1) / 1000, (3 * x).tanh()], dim=1)


def cond_fn(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    return -x * t.view(-1, 1, 1, 1) / 500


def test_predictions_of_noise_and_start_are_each_others_inverse() -> None:
    diffusion = create_diffusion("10")
    noise = diffusion._predict_eps_from_xstart(X, T, START)
    bar = at(diffusion.alphas_cumprod)
    torch.testing.assert_close(bar.sqrt() * START + (1 - bar).sqrt() * noise, X, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(diffusion._predict_xstart_from_eps(X, T, noise), START, rtol=1e-12, atol=1e-10)


def test_condition_mean_and_score_move_by_the_gradient() -> None:
    diffusion = create_diffusion("10")
    plain = diffusion.p_mean_variance(model, X, T, clip_denoised=False)
    timesteps = torch.tensor(diffusion.timestep_map)[T]
    gradient = cond_fn(X, timesteps)
    found = diffusion.condition_mean(cond_fn, plain, X, T)
    torch.testing.assert_close(found, plain["mean"] + plain["variance"] * gradient, rtol=1e-12, atol=1e-12)
    moved = diffusion.condition_score(cond_fn, plain, X, T)
    bar = at(diffusion.alphas_cumprod)
    noise = (X - bar.sqrt() * plain["pred_xstart"]) / (1 - bar).sqrt() - (1 - bar).sqrt() * gradient
    start = (X - (1 - bar).sqrt() * noise) / bar.sqrt()
    torch.testing.assert_close(moved["pred_xstart"], start, rtol=1e-9, atol=1e-9)
    mean = at(diffusion.posterior_mean_coef1) * start + at(diffusion.posterior_mean_coef2) * X
    torch.testing.assert_close(moved["mean"], mean, rtol=1e-9, atol=1e-9)
    assert moved["variance"] is plain["variance"]


@pytest.mark.parametrize("loop, method", [("p_sample_loop", "condition_mean"), ("ddim_sample_loop", "condition_score")])
def test_the_loops_call_what_a_subclass_puts_in_its_place(loop: str, method: str) -> None:
    calls = []

    class Own(GaussianDiffusion):
        pass

    def own(self: GaussianDiffusion, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return getattr(GaussianDiffusion, method)(self, *args, **kwargs)

    setattr(Own, method, own)
    diffusion = Own(create_diffusion("10").schedule)
    torch.manual_seed(0)
    found = getattr(diffusion, loop)(model, X.shape, noise=X, clip_denoised=False, cond_fn=cond_fn)
    assert len(calls) == 10
    torch.manual_seed(0)
    assert torch.equal(found, getattr(create_diffusion("10"), loop)(model, X.shape, noise=X, clip_denoised=False, cond_fn=cond_fn))
    torch.manual_seed(0)
    assert not torch.equal(found, getattr(create_diffusion("10"), loop)(model, X.shape, noise=X, clip_denoised=False))


def test_extra_is_what_else_a_model_returns() -> None:
    diffusion = create_diffusion("10")
    found = diffusion.p_mean_variance(lambda *args: (model(*args), "features"), X, T)
    plain = diffusion.p_mean_variance(model, X, T)
    assert (found["extra"], plain["extra"]) == ("features", None)
    assert torch.equal(found["mean"], plain["mean"])


def test_terms_of_the_bound_are_those_of_the_loss() -> None:
    diffusion = create_diffusion("10", use_kl=True)
    noise = torch.randn(START.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    terms = diffusion._vb_terms_bpd(model, START, diffusion.q_sample(START, T, noise), T, clip_denoised=False)
    losses = diffusion.training_losses(model, START, T, noise=noise)
    torch.testing.assert_close(10 * terms["output"], losses["loss"])
    assert terms["pred_xstart"].shape == START.shape
