"""DPM-Solver++(2M) and the log-SNR spacing: orders of convergence on an analytic score, and their seams."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.studies import solvers as study
from ditkernels.diffusion import create_diffusion
from ditkernels.diffusion.schedule import half_log_snr
from tests.numerics import EPSILON_AMPLIFICATION, ORDER_MARGIN, assert_identity


@pytest.mark.parametrize("solver, order", [("ddim", 1), ("dpm_solver", 2)])
def test_the_order_of_convergence_on_uniform_log_snr(solver, order):
    steps = [65, 129, 257, 513]
    exact = study.state_at_the_smallest_noise("dpm_solver", "logsnr4097")
    errors = [(study.state_at_the_smallest_noise(solver, f"logsnr{n}") - exact).square().mean().sqrt().item() for n in steps]
    assert study.slope(steps, errors) == pytest.approx(order, abs=ORDER_MARGIN)


def test_the_score_is_the_gradient_of_the_diffused_density():
    """−σ·∇ log p(x_t) by autograd, with p written as what it is: a mixture of Gaussians of mean α·μ and variance α²s² + σ²."""
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    bar = create_diffusion("").alphas_cumprod[300]
    variance = bar * study.VARIANCE + 1 - bar
    parts = [
        weight * torch.exp(-(x - bar**0.5 * mean).square().sum(1) / (2 * variance))
        for weight, mean in zip(study.WEIGHTS, study.MEANS)
    ]
    gradient = torch.autograd.grad(sum(parts).log().sum(), x)[0]
    found = study.GaussianMixture()(x.detach(), torch.full((6,), 300))
    assert_identity(found, -((1 - bar) ** 0.5) * gradient, EPSILON_AMPLIFICATION)


def test_the_script_draws_the_figure(tmp_path, monkeypatch, capsys):
    flags = ["--steps", "9,17,33", "--reference", "129", "--json", str(tmp_path / "solvers.json")]
    monkeypatch.setattr("sys.argv", ["solvers", *flags, "--figure", str(tmp_path / "solvers.png")])
    study.main()
    rows = json.loads((tmp_path / "solvers.json").read_text(encoding="utf-8"))["rows"]
    assert [len(row["errors"]) for row in rows] == [3] * 4
    assert (tmp_path / "solvers.png").stat().st_size > 10_000
    assert "uniform log-SNR" in capsys.readouterr().out


def wavy(x, t):
    return torch.cos(1.3 * x + t.view(-1, 1).to(x.dtype) / 300)


@pytest.mark.parametrize("respacing", ["20", "logsnr20", "ddim20"])
def test_the_loop_is_its_steps_and_the_first_and_last_are_ddims(respacing):
    diffusion = create_diffusion(respacing, learn_sigma=False)
    noise = x = torch.randn(5, 3, dtype=torch.float64)
    states = list(diffusion.dpm_solver_sample_loop_progressive(wavy, x.shape, x, clip_denoised=False))
    previous = None
    for index, state in zip(reversed(range(20)), states, strict=True):
        t = torch.full((5,), index)
        result = diffusion.dpm_solver_sample(wavy, x, t, False, previous=previous)
        ddim = diffusion.ddim_sample(wavy, x, t, False)["sample"]
        if index in (0, 19):
            assert_identity(result["sample"], ddim, EPSILON_AMPLIFICATION)
        else:
            assert (result["sample"] - ddim).norm() > 1e-9 * ddim.norm()
        x, previous = result["sample"], result["pred_xstart"]
        assert torch.equal(state["sample"], x)
    assert torch.equal(diffusion.dpm_solver_sample_loop(wavy, noise.shape, noise, False), x)


def test_a_second_order_step_is_the_papers_formula():
    """Algorithm 2 of arXiv 2211.01095, written out with logarithms."""
    diffusion = create_diffusion("10", learn_sigma=False)
    alphas = np.sqrt(diffusion.alphas_cumprod)
    sigmas = np.sqrt(1 - diffusion.alphas_cumprod)
    lambdas = np.log(alphas / sigmas)
    x, before = torch.randn(2, 4, 3, dtype=torch.float64)
    result = diffusion.dpm_solver_sample(wavy, x, torch.full((4,), 6), clip_denoised=False, previous=before)
    h, h_before = lambdas[5] - lambdas[6], lambdas[6] - lambdas[7]
    r = h_before / h
    data = (1 + 1 / (2 * r)) * result["pred_xstart"] - before / (2 * r)
    expected = sigmas[5] / sigmas[6] * x - alphas[5] * (np.exp(-h) - 1) * data
    assert_identity(result["sample"], expected, EPSILON_AMPLIFICATION)


@pytest.mark.parametrize("noise_schedule", ["linear", "cosine"])
def test_log_snr_spacing_is_uniform_and_keeps_the_ends(noise_schedule):
    whole = create_diffusion("", noise_schedule)
    spaced = create_diffusion("logsnr33", noise_schedule)
    half = half_log_snr(spaced.alphas_cumprod)
    np.testing.assert_allclose(np.diff(half), np.diff(half).mean(), rtol=1e-6)
    np.testing.assert_allclose(spaced.alphas_cumprod[[0, -1]], whole.alphas_cumprod[[0, -1]], rtol=1e-6)
    assert spaced.num_timesteps == 33
    assert (spaced.timestep_map[0], spaced.timestep_map[-1]) == (0, 999)
    np.testing.assert_allclose(np.cumprod(1 - spaced.betas), spaced.alphas_cumprod, rtol=1e-9)


def test_the_model_is_asked_about_fractions_of_timesteps():
    diffusion = create_diffusion("logsnr4", learn_sigma=False)
    seen = []

    def model(x, t):
        seen.append(t[0].item())
        assert t.dtype == torch.float32
        return torch.zeros_like(x)

    diffusion.ddim_sample_loop(model, (2, 3), torch.randn(2, 3))
    assert seen == pytest.approx(diffusion.timestep_map[::-1], rel=1e-6)
    assert any(timestep % 1 for timestep in seen)


@pytest.mark.parametrize(
    "respacing, message",
    [("logsnr", "allowed after 'logsnr' is a number"), ("logsnr1", "got 1"), ("logsnr-5", "is a number")],
)
def test_a_log_snr_spacing_that_does_not_exist_is_named(respacing, message):
    with pytest.raises(ValueError, match=message):
        create_diffusion(respacing)


def test_a_previous_prediction_of_another_shape_is_named():
    diffusion = create_diffusion("10", learn_sigma=False)
    with pytest.raises(ValueError, match=r"previous: got shape \(4, 3\)"):
        diffusion.dpm_solver_sample(wavy, torch.randn(5, 3), torch.full((5,), 4), previous=torch.randn(4, 3))
