"""The diffusion process: tables, identities of q and p, losses, samplers, what they cost and what they
refuse."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from typing import get_type_hints

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ditkernels.diffusion import (
    GaussianDiffusion,
    NoiseSchedule,
    create_diffusion,
    named_beta_schedule,
    space_timesteps,
)
from ditkernels.diffusion.likelihood import discretized_gaussian_log_likelihood, normal_kl
from ditkernels.diffusion.schedule import Coefficients
from ditkernels.reference import DiT
from tests import numerics

AMPLIFICATION = 4 * numerics.EPSILON_AMPLIFICATION  # the inputs here are normals: up to 4
ALPHAS_CUMPROD = torch.from_numpy(create_diffusion("").alphas_cumprod.copy())
FIXED_SMALL = {"learn_sigma": False, "sigma_small": True}
FIXED_LARGE = {"learn_sigma": False, "sigma_small": False}
SHAPE = (4, 3, 5, 6)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def coefficients(diffusion: GaussianDiffusion, t: Tensor) -> Coefficients:
    """Every table of the schedule at t, float64, (B,)."""
    table = diffusion.schedule.at(t, torch.zeros(1, dtype=torch.float64))
    return Coefficients(*(column.flatten() for column in table))


def wavy(x: Tensor, t: Tensor) -> Tensor:
    """A model without meaning that mixes channels and pixels and depends on t, (B, C, …) -> (B, C, …)."""
    phase = t.view(-1, *[1] * (x.ndim - 1)) / 300
    return torch.sin(1.3 * x + phase) + 0.5 * x.roll(1, 1) - 0.2 * x.roll(2, -1)


def wavy_learned(x: Tensor, t: Tensor) -> Tensor:
    """``wavy`` beside a v inside and outside [−1, 1]: (B, C, …) -> (B, 2C, …)."""
    return torch.cat([wavy(x, t), 1.2 * torch.cos(2 * x)], dim=1)


class Oracle:
    """The model that knows x_start: returns the noise that is in x_t, by the tables of all 1000 original
    steps."""

    def __init__(self, x_start: Tensor, v: float | None = None) -> None:
        self.x_start, self.v = x_start, v

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha = ALPHAS_CUMPROD[t].view(-1, *[1] * (x.ndim - 1))
        epsilon = (x - alpha.sqrt() * self.x_start) / (1 - alpha).sqrt()
        return epsilon if self.v is None else torch.cat([epsilon, torch.full_like(epsilon, self.v)], dim=1)


# ---- Schedules and respacing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, expected",
    [
        (create_diffusion("").alphas_cumprod[0], "9.999e-01"),
        (create_diffusion("").alphas_cumprod[499], "7.85872429e-02"),
        (create_diffusion("").alphas_cumprod[999], "4.035829765e-05"),
        (math.sqrt(1 / create_diffusion("").alphas_cumprod[999] - 1), "1.57407281e+02"),
        (coefficients(create_diffusion(""), torch.tensor([1])).posterior_variance.item(), "5.4531876613e-05"),
        (create_diffusion("250").betas[1], "5.99065564e-04"),
        (create_diffusion("250").betas[-1], "7.75193450e-02"),
        (create_diffusion("ddim250").betas[-1], "7.72943222e-02"),
        (create_diffusion("50").betas[1], "6.16518795e-03"),
        (create_diffusion("ddim50").betas[-1], "3.246144475e-01"),
        (create_diffusion("").betas[0], "1.000000000000e-04"),
        (create_diffusion("").betas[-1], "2.000000000000e-02"),
        (create_diffusion("", "squaredcos_cap_v2").betas[-1], "9.990000000000e-01"),
    ],
)
def test_published_constants_to_the_last_digit(value, expected):
    digits = len(expected.split("e")[0]) - 2
    assert f"{value:.{digits}e}" == expected


@pytest.mark.parametrize(
    "respacing, head, last, count",
    [
        ("", [0, 1, 2, 3], 999, 1000),
        (None, [0, 1, 2, 3], 999, 1000),
        ("250", [0, 4, 8, 12], 999, 250),
        (250, [0, 4, 8, 12], 999, 250),
        ([250], [0, 4, 8, 12], 999, 250),
        ("ddim250", [0, 4, 8, 12], 996, 250),
        ("50", [0, 20, 41, 61], 999, 50),
        ("ddim50", [0, 20, 40, 60], 980, 50),
        ("10,15,20", [0, 37, 74, 111], 999, 45),
        ("2,1", [0, 499, 500], 500, 3),
    ],
)
def test_kept_timesteps(respacing, head, last, count):
    kept = create_diffusion(respacing).timestep_map
    assert (kept[: len(head)], kept[-1], len(kept)) == (head, last, count)


def test_sections_share_the_remainder_and_keep_their_ends():
    kept = space_timesteps(1000, [10, 15, 20])
    assert kept == space_timesteps(1000, "10,15,20")
    # 1000 = 334 + 333 + 333: the first section is one longer.
    assert [kept[i] for i in (0, 9, 10, 24, 25, 44)] == [0, 333, 334, 666, 667, 999]


def test_positions_on_one_half_round_as_the_published_running_sum_does():
    # Stride 49.95: position 10 is 499.5 exactly, which rounds to 500; summed up it is below one half.
    assert space_timesteps(1000, "21")[10] == 499


@settings(deadline=None)
@given(st.integers(2, 2000), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_sections_in_general(steps, counts):
    sizes = [steps // len(counts) + (i < steps % len(counts)) for i in range(len(counts))]
    if any(count > size for count, size in zip(counts, sizes)):
        with pytest.raises(ValueError, match="timestep_respacing"):
            space_timesteps(steps, counts)
        return
    kept = space_timesteps(steps, counts)
    assert all(a < b for a, b in pairwise(kept))
    start = 0
    for count, size in zip(counts, sizes):
        section = [step for step in kept if start <= step < start + size]
        assert len(section) == count
        assert section[0] == start
        assert count == 1 or section[-1] == start + size - 1
        start += size


@settings(deadline=None)
@given(st.integers(21, 1200), st.integers(2, 1200))
def test_strides_in_general(steps, wanted):
    possible = {len(range(0, steps, stride)): stride for stride in range(steps - 1, 0, -1)}
    if wanted in possible:
        assert space_timesteps(steps, f"ddim{wanted}") == list(range(0, steps, possible[wanted]))
    else:
        with pytest.raises(ValueError, match=f"exactly {wanted}"):
            space_timesteps(steps, f"ddim{wanted}")


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("respacing", ["250", "ddim50", "10,15,20", "2"])
def test_respaced_betas_keep_alphas_cumprod(name, respacing):
    whole, respaced = create_diffusion("", name), create_diffusion(respacing, name)
    np.testing.assert_array_equal(respaced.alphas_cumprod, whole.alphas_cumprod[respaced.timestep_map])
    product = torch.from_numpy(np.cumprod(1 - respaced.betas))
    # Absolutely, not relatively: a beta within 1e-9 of 1, as two cosine steps make it, has few digits left in
    # 1 − beta.
    numerics.assert_identity(product, torch.from_numpy(respaced.alphas_cumprod.copy()))
    assert respaced.num_timesteps == len(respaced.betas) == len(respaced.timestep_map)
    assert respaced.schedule.original_num_steps == 1000


def test_without_respacing_the_betas_stay_bit_for_bit():
    np.testing.assert_array_equal(create_diffusion("").betas, named_beta_schedule("linear", 1000))
    np.testing.assert_array_equal(create_diffusion("1000").betas, create_diffusion("").betas)


def test_linear_schedule_ends_at_the_same_noise_whatever_its_length():
    np.testing.assert_allclose(named_beta_schedule("linear", 4000)[[0, -1]], [2.5e-5, 5e-3])
    np.testing.assert_array_equal(named_beta_schedule("cosine", 77), named_beta_schedule("squaredcos_cap_v2", 77))


def exact_tables(name: str, steps: int, kept: list[int]) -> dict[str, list[mpmath.mpf]]:
    """Every table from the definitions, in 50 digits, written with none of the package's formulas in
    sight."""
    mp = mpmath.mp
    if name == "linear":
        scale = mp.mpf(1000) / steps
        first, last = scale * mp.mpf("1e-4"), scale * mp.mpf("0.02")
        betas = [first + (last - first) * i / (steps - 1) for i in range(steps)]
    else:
        bar = [mp.cos((mp.mpf(i) / steps + mp.mpf("0.008")) / mp.mpf("1.008") * mp.pi / 2) ** 2 for i in range(steps + 1)]
        betas = [min(1 - b / a, mp.mpf("0.999")) for a, b in pairwise(bar)]
    product, cumulative = mp.mpf(1), []
    for beta in betas:
        product *= 1 - beta
        cumulative.append(product)

    def odds(bar):
        return bar / (1 - bar)

    bars = [mp.mpf(1)] + [cumulative[i] for i in kept] + [mp.mpf(0)]
    tables: dict[str, list[mpmath.mpf]] = {field: [] for field in Coefficients._fields}
    for i in range(1, len(kept) + 1):
        prev, bar, following = bars[i - 1], bars[i], bars[i + 1]
        alpha = bar / prev
        beta = 1 - alpha
        # Bayes: 1/var = α/β + 1/(1 − ᾱ_prev); at the second step for the logarithm of the first.
        variance = 0 if i == 1 else 1 / (alpha / beta + 1 / (1 - prev))
        second = 1 / (bars[2] / bars[1] / (1 - bars[2] / bars[1]) + 1 / (1 - bars[1]))
        clipped = second if i == 1 else variance
        large = second if i == 1 else beta
        row = {
            "sqrt_alphas_cumprod": mp.sqrt(bar),
            "sqrt_alphas_cumprod_prev": mp.sqrt(prev),
            "sqrt_alphas_cumprod_next": mp.sqrt(following),
            "one_minus_alphas_cumprod": 1 - bar,
            "one_minus_alphas_cumprod_prev": 1 - prev,
            "sqrt_one_minus_alphas_cumprod": mp.sqrt(1 - bar),
            "sqrt_one_minus_alphas_cumprod_next": mp.sqrt(1 - following),
            "log_one_minus_alphas_cumprod": mp.log(1 - bar),
            "sqrt_recip_alphas_cumprod": 1 / mp.sqrt(bar),
            "sqrt_recipm1_alphas_cumprod": mp.sqrt((1 - bar) / bar),
            # The posterior mean weighs x_0 and x_t by what each says of x_{t−1}.
            "posterior_mean_coef1": 1 if i == 1 else variance * mp.sqrt(prev) / (1 - prev),
            "posterior_mean_coef2": variance * mp.sqrt(alpha) / beta,
            "posterior_variance": variance,
            "posterior_log_variance_clipped": mp.log(clipped),
            "log_betas": mp.log(beta),
            "fixed_large_variance": large,
            "fixed_large_log_variance": mp.log(large),
            "solver_state_coef": mp.sqrt((1 - prev) / (1 - bar)),
            # α_{t−1} − α_t·σ_{t−1}/σ_t, which is −α_{t−1}·(e^{−h} − 1).
            "solver_data_coef": mp.sqrt(prev) - mp.sqrt(bar * (1 - prev) / (1 - bar)),
            "solver_history_coef": 0
            if i in (1, len(kept))
            else mp.log(odds(prev) / odds(bar)) / (2 * mp.log(odds(bar) / odds(following))),
        }
        for field, value in row.items():
            tables[field].append(value)
    return tables


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("respacing", ["", "250", "ddim50", "10,15,20", "2"])
def test_tables_against_fifty_digits(name, respacing):
    diffusion = create_diffusion(respacing, name)
    kept = diffusion.timestep_map
    with mpmath.workdps(50):
        expected = exact_tables(name, 1000, kept)
    actual = coefficients(diffusion, torch.arange(len(kept)))
    for field in Coefficients._fields:
        np.testing.assert_allclose(
            getattr(actual, field).numpy(),
            [float(value) for value in expected[field]],
            rtol=numerics.DIFFUSION_TABLE_RTOL,
            atol=numerics.DIFFUSION_TABLE_ATOL,
            err_msg=field,
        )


def test_tables_are_read_only_float64():
    for table in (create_diffusion("10").betas, create_diffusion("10").alphas_cumprod):
        assert table.dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0


# ---- q ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 7), SHAPE, (4, 1, 2, 3, 4)], ids=str)
def test_q_sample_treats_every_sample_at_its_own_step(shape):
    diffusion = create_diffusion("250")
    x, noise, t = random(*shape), random(*shape, seed=1), torch.tensor([0, 249, 17, 17])
    x_t = diffusion.q_sample(x, t, noise)
    mean, variance, log_variance = diffusion.q_mean_variance(x, t)
    for i, step in enumerate(t):
        alpha = diffusion.alphas_cumprod[step]
        numerics.assert_identity(x_t[i], math.sqrt(alpha) * x[i] + math.sqrt(1 - alpha) * noise[i])
        numerics.assert_identity(mean[i], math.sqrt(alpha) * x[i])
        numerics.assert_identity(variance[i], torch.full_like(x[i], 1 - alpha))
        numerics.assert_identity(log_variance[i], torch.full_like(x[i], math.log(1 - alpha)))


def test_q_sample_draws_standard_normals_from_the_generator():
    diffusion = create_diffusion("")
    x, t = torch.zeros(SHAPE), torch.full((4,), 999)
    drawn = diffusion.q_sample(x, t, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, diffusion.q_sample(x, t, noise))
    assert not torch.equal(drawn, diffusion.q_sample(x, t))


def test_posterior_is_bayes_rule():
    """q(x_{t−1} | x_t, x_0) ∝ N(x_t; √α x_{t−1}, β) · N(x_{t−1}; √ᾱ_prev x_0, 1 − ᾱ_prev)."""
    diffusion = create_diffusion("50")
    x_0, x_t, t = random(*SHAPE), random(*SHAPE, seed=1), torch.tensor([1, 7, 48, 49])
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x_0, x_t, t)
    for i, step in enumerate(t.tolist()):
        prev, beta = diffusion.alphas_cumprod[step - 1], diffusion.betas[step]
        precision = (1 - beta) / beta + 1 / (1 - prev)
        expected = (math.sqrt(1 - beta) / beta * x_t[i] + math.sqrt(prev) / (1 - prev) * x_0[i]) / precision
        numerics.assert_identity(mean[i], expected, AMPLIFICATION)
        numerics.assert_identity(variance[i] * precision, torch.ones_like(x_0[i]), AMPLIFICATION)
        numerics.assert_identity(log_variance[i].exp(), variance[i])


def test_posterior_at_the_first_step_is_x_start_and_its_log_variance_is_clipped():
    diffusion = create_diffusion("")
    x_0, x_t, t = random(*SHAPE), random(*SHAPE, seed=1), torch.zeros(4, dtype=torch.int64)
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x_0, x_t, t)
    numerics.assert_identity(mean, x_0, AMPLIFICATION)
    assert not variance.any()
    _, second, _ = diffusion.q_posterior_mean_variance(x_0, x_t, t + 1)
    numerics.assert_identity(log_variance.exp(), second)


# ---- p ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v, weight", [(1.0, 1.0), (-1.0, 0.0), (0.0, 0.5), (0.5, 0.75), (3.0, 2.0)])
def test_learned_range_interpolates_logarithms(v, weight):
    diffusion = create_diffusion("50")
    t = torch.tensor([0, 1, 20, 49])
    out = diffusion.p_mean_variance(Oracle(random(*SHAPE), v), random(*SHAPE, seed=1), t)
    c = coefficients(diffusion, t)
    expected = weight * torch.from_numpy(np.log(diffusion.betas))[t] + (1 - weight) * c.posterior_log_variance_clipped
    expected = expected.view(-1, 1, 1, 1).expand(SHAPE)
    numerics.assert_identity(out["log_variance"], expected)
    numerics.assert_identity(out["variance"].log(), expected)


def test_fixed_variances():
    t = torch.tensor([0, 1, 20, 49])
    small, large = create_diffusion("50", **FIXED_SMALL), create_diffusion("50", **FIXED_LARGE)
    c = coefficients(small, t)
    for diffusion, first, later in (
        (small, 0.0, c.posterior_variance),
        (large, c.posterior_variance[1].item(), torch.from_numpy(large.betas.copy())[t]),
    ):
        out = diffusion.p_mean_variance(wavy, random(*SHAPE), t)
        expected = torch.cat([torch.tensor([first], dtype=torch.float64), later[1:]])
        numerics.assert_identity(out["variance"], expected.view(-1, 1, 1, 1).expand(SHAPE))
        clipped = torch.cat([c.posterior_variance[1:2], later[1:]]).log()
        numerics.assert_identity(out["log_variance"], clipped.view(-1, 1, 1, 1).expand(SHAPE))


def test_both_predictions_agree():
    x_t, t = random(*SHAPE), torch.tensor([0, 3, 20, 49])
    by_epsilon, by_xstart = create_diffusion("50"), create_diffusion("50", predict_xstart=True)
    alpha = torch.from_numpy(by_epsilon.alphas_cumprod.copy())[t].view(-1, 1, 1, 1)

    def xstart_model(x: Tensor, steps: Tensor) -> Tensor:
        epsilon, v = wavy_learned(x, steps).chunk(2, dim=1)
        return torch.cat([(x - (1 - alpha).sqrt() * epsilon) / alpha.sqrt(), v], dim=1)

    a = by_epsilon.p_mean_variance(wavy_learned, x_t, t, clip_denoised=False)
    b = by_xstart.p_mean_variance(xstart_model, x_t, t, clip_denoised=False)
    for key in ("mean", "variance", "log_variance", "pred_xstart"):
        numerics.assert_identity(a[key], b[key], AMPLIFICATION)
    posterior_mean, _, _ = by_epsilon.q_posterior_mean_variance(a["pred_xstart"], x_t, t)
    assert torch.equal(a["mean"], posterior_mean)


def test_denoised_fn_comes_before_clipping():
    diffusion, t = create_diffusion("50"), torch.tensor([0, 3, 20, 49])
    x_start = random(*SHAPE)
    model, x_t = Oracle(x_start, 0.0), random(*SHAPE, seed=1)

    def predicted(**kwargs) -> Tensor:
        return diffusion.p_mean_variance(model, x_t, t, **kwargs)["pred_xstart"]

    assert x_start.abs().max() > 1
    numerics.assert_identity(predicted(clip_denoised=False), x_start, AMPLIFICATION)
    numerics.assert_identity(predicted(), x_start.clamp(-1, 1), AMPLIFICATION)
    numerics.assert_identity(predicted(denoised_fn=lambda x: 5 * x), (5 * x_start).clamp(-1, 1), 5 * AMPLIFICATION)
    unclipped = predicted(denoised_fn=lambda x: 5 * x, clip_denoised=False)
    numerics.assert_identity(unclipped, 5 * x_start, 5 * AMPLIFICATION)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_model_gets_original_timesteps_and_its_kwargs(dtype):
    diffusion, seen = create_diffusion("10,15,20"), []

    def model(x: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
        seen.append((t, y, scale))
        return torch.cat([x, x], dim=1)

    t, y = torch.tensor([44, 0, 9, 10], dtype=dtype), torch.arange(4)
    kwargs = {"y": y, "scale": 2.0}
    diffusion.p_mean_variance(model, random(*SHAPE), t, model_kwargs=kwargs)
    diffusion.training_losses(model, random(*SHAPE), t, kwargs)
    diffusion.ddim_sample(model, random(*SHAPE), t, model_kwargs=kwargs)
    assert len(seen) == 3
    for steps, labels, scale in seen:
        assert steps.dtype == torch.int64
        assert steps.tolist() == [999, 0, 333, 334]
        assert labels is y
        assert scale == 2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_and_outputs_are_computed_in_float32(dtype):
    """A narrow x_0 and a narrow prediction cost no more than their own rounding: the arithmetic is
    float32's."""
    diffusion, t = create_diffusion("50"), torch.tensor([0, 3, 20, 49])
    x, noise = random(*SHAPE, dtype=dtype), random(*SHAPE, seed=1, dtype=dtype)
    narrow_model = lambda x, t: wavy_learned(x, t).to(dtype)  # noqa: E731
    wide_model = lambda x, t: wavy_learned(x, t).to(dtype).float()  # noqa: E731
    assert torch.equal(diffusion.q_sample(x, t, noise), diffusion.q_sample(x.float(), t, noise.float()))
    for name, out in diffusion.p_mean_variance(narrow_model, x, t).items():
        if name == "extra":
            assert out is None
            continue
        assert out.dtype == torch.float32
        assert torch.equal(out, diffusion.p_mean_variance(wide_model, x.float(), t)[name])
    for name, out in diffusion.training_losses(narrow_model, x, t, noise=noise).items():
        assert out.dtype == torch.float32
        assert torch.equal(out, diffusion.training_losses(wide_model, x.float(), t, noise=noise.float())[name])


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_float32_steps_stay_close_to_float64(schedule, eta):
    diffusion = create_diffusion("ddim50", schedule, **FIXED_SMALL)
    t = torch.arange(diffusion.num_timesteps)
    x, noise = random(len(t), 2, 3), random(len(t), 2, 3, seed=1)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return random(*x.shape, seed=3).to(x.dtype)

    for step, kwargs in ((diffusion.p_sample, {}), (diffusion.ddim_sample, {"eta": eta})):
        exact = step(model, x, t, noise=noise, **kwargs)
        rounded = step(model, x.float(), t, noise=noise.float(), **kwargs)
        for name, value in rounded.items():
            assert value.dtype == torch.float32
            for i, alpha in enumerate(diffusion.alphas_cumprod):
                # Each step by what it amplifies itself, on inputs up to 4.
                amplification = 4 * max(1.0, math.sqrt(1 / alpha - 1))
                numerics.assert_identity(value[i], exact[name][i], amplification)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_float32_tables_are_the_float64_tables_rounded_once(schedule):
    """1 − ᾱ, or its root, formed from a float32 ᾱ near 1 would keep three digits."""
    diffusion, t = create_diffusion("", schedule), torch.arange(1000)
    single = diffusion.schedule.at(t, torch.zeros(1, 1))
    double = diffusion.schedule.at(t, torch.zeros(1, 1, dtype=torch.float64))
    for field in Coefficients._fields:
        assert getattr(single, field).shape == (1000, 1)
        assert torch.equal(getattr(single, field), getattr(double, field).float()), field


# ---- Divergence and likelihood ---------------------------------------------------------------------------------------

moderate = st.floats(-8, 8, allow_nan=False)


@settings(deadline=None)
@given(moderate, moderate, moderate, moderate)
def test_kl_is_that_of_torch_and_never_negative(mean1, log_variance1, mean2, log_variance2):
    a, b, c, d = (torch.tensor([v], dtype=torch.float64) for v in (mean1, log_variance1, mean2, log_variance2))
    kl = normal_kl(a, b, c, d)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(a, (0.5 * b).exp()), torch.distributions.Normal(c, (0.5 * d).exp())
    )
    numerics.assert_identity(kl, expected)
    assert kl.item() >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_of_equals_is_exactly_zero_and_of_near_equals_not_negative(dtype):
    mean, log_variance = random(1000, dtype=dtype), 6 * random(1000, seed=1, dtype=dtype) - 5
    assert not normal_kl(mean, log_variance, mean, log_variance).any()
    nudged = torch.nextafter(log_variance, torch.full_like(log_variance, torch.inf))
    assert (normal_kl(mean, nudged, mean, log_variance) >= 0).all()


PIXELS = torch.arange(256, dtype=torch.float64) * 2 / 255 - 1


@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.2, 0.0, 0.71, 1.0])
@pytest.mark.parametrize("log_std", [-3.5, -1.0, 0.5])
def test_discretized_likelihood_is_a_distribution_over_pixels(mean, log_std):
    shape = torch.full((256,), mean, dtype=torch.float64), torch.full((256,), log_std, dtype=torch.float64)
    mass = discretized_gaussian_log_likelihood(PIXELS, *shape).exp()
    # The floor of 1e-12 a pixel may add up to 256 of itself.
    assert abs(mass.sum().item() - 1) <= 256e-12 + numerics.DIFFUSION_ROUNDINGS * torch.finfo(torch.float64).eps
    exact = torch.distributions.Normal(mean, math.exp(log_std))
    upper = torch.where(PIXELS > 0.999, 1.0, exact.cdf(PIXELS + 1 / 255))
    lower = torch.where(PIXELS < -0.999, 0.0, exact.cdf(PIXELS - 1 / 255))
    assert (mass - (upper - lower)).abs().max() <= numerics.NORMAL_CDF_APPROXIMATION


def published_normal_cdf(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def published_nll(x: np.ndarray, mean: np.ndarray, log_std: np.ndarray) -> np.ndarray:
    """The decoder's negative log likelihood as the papers' code writes it, in numpy float64."""
    inverse = np.exp(-log_std)
    upper = published_normal_cdf(inverse * (x - mean + 1 / 255))
    lower = published_normal_cdf(inverse * (x - mean - 1 / 255))
    inside = np.log(np.maximum(upper - lower, 1e-12))
    ends = np.where(x > 0.999, np.log(np.maximum(1 - lower, 1e-12)), inside)
    return -np.where(x < -0.999, np.log(np.maximum(upper, 1e-12)), ends)


def test_discretized_likelihood_equals_the_published_form():
    x = torch.cat([PIXELS, torch.tensor([-1.7, 1.9, 0.9985, -0.9985], dtype=torch.float64)])
    # Up to three standard deviations: further out the form with 1 − cdf has fewer digits than ours.
    mean = x + 0.03 * random(len(x), seed=4).tanh()
    log_std = torch.full_like(x, math.log(0.01))
    actual = -discretized_gaussian_log_likelihood(x, mean, log_std)
    expected = published_nll(x.numpy(), mean.numpy(), log_std.numpy())
    np.testing.assert_allclose(actual.numpy(), expected, rtol=numerics.DIFFUSION_TABLE_RTOL)


def test_discretized_likelihood_keeps_its_digits_and_gradient_in_the_tails():
    """Five to six standard deviations away float32 1 − cdf is rounding noise; on either side of the mean
    alike."""
    std, offset = 0.01, torch.tensor([0.055, -0.055, 0.062, -0.062])
    x = torch.zeros(4)
    mean = offset.clone().requires_grad_()
    log_likelihood = discretized_gaussian_log_likelihood(x, mean, torch.full((4,), math.log(std)))
    exact = discretized_gaussian_log_likelihood(x.double(), offset.double(), torch.full((4,), math.log(std), dtype=torch.float64))
    numerics.assert_identity(log_likelihood.detach(), exact, AMPLIFICATION)
    (gradient,) = torch.autograd.grad(log_likelihood.sum(), mean)
    assert (gradient * offset < 0).all()
    far = discretized_gaussian_log_likelihood(x, torch.full((4,), 5.0), torch.full((4,), math.log(std)))
    assert torch.equal(far, torch.full((4,), 1e-12).log())


# ---- Losses ----------------------------------------------------------------------------------------------------------

T_MIXED = torch.tensor([0, 1, 500, 999])


def mean_over_pixels(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


@pytest.mark.parametrize("options", [{}, {"rescale_learned_sigmas": True}, FIXED_SMALL, FIXED_LARGE], ids=str)
def test_a_model_that_returns_zero_has_the_mse_of_the_noise(options):
    diffusion = create_diffusion("", **options)
    x, noise = random(*SHAPE), random(*SHAPE, seed=1)
    channels = 6 if diffusion.variance == "learned_range" else 3
    losses = diffusion.training_losses(lambda x, t: x.new_zeros(4, channels, 5, 6), x, T_MIXED, noise=noise)
    numerics.assert_identity(losses["mse"], mean_over_pixels(noise**2))
    assert all(value.shape == (4,) for value in losses.values())
    if diffusion.variance == "learned_range":
        assert set(losses) == {"loss", "mse", "vb"}
        assert torch.equal(losses["loss"], losses["mse"] + losses["vb"])
    else:
        assert set(losses) == {"loss", "mse"}
        assert torch.equal(losses["loss"], losses["mse"])


def test_predicting_xstart_is_measured_against_xstart():
    diffusion = create_diffusion("", predict_xstart=True, learn_sigma=False)
    x, noise = random(*SHAPE), random(*SHAPE, seed=1)
    losses = diffusion.training_losses(lambda x, t: x, x, T_MIXED, noise=noise)
    expected = mean_over_pixels((x - diffusion.q_sample(x, T_MIXED, noise)) ** 2)
    numerics.assert_identity(losses["loss"], expected)


@pytest.mark.parametrize("respacing", ["", "50"])
def test_the_true_posterior_has_no_variational_loss(respacing):
    """With the true noise and v = −1, p is q(x_{t−1} | x_t, x_0): the divergence is 0 at every t > 0."""
    diffusion = create_diffusion(respacing)
    t = torch.tensor([1, 2, diffusion.num_timesteps // 2, diffusion.num_timesteps - 1])
    x = random(*SHAPE)
    losses = diffusion.training_losses(Oracle(x, -1.0), x, t)
    # The divergence divides squared errors of the mean by β̃ >= 5.4e-5: far below one rounding of the other
    # terms.
    numerics.assert_identity(losses["vb"], torch.zeros(4, dtype=torch.float64))
    numerics.assert_identity(losses["mse"], torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("v", [-1.0, 0.0, 1.0])
def test_variational_terms_from_first_principles(v):
    """KL in bits from torch.distributions at t > 0, the published decoder at t = 0, mean over pixels."""
    diffusion = create_diffusion("")
    x, noise = random(*SHAPE).clamp(-1, 1), random(*SHAPE, seed=1)
    x_t = diffusion.q_sample(x, T_MIXED, noise)
    model = lambda x, t: torch.cat([wavy(x, t), torch.full_like(x, v)], dim=1)  # noqa: E731
    vb = diffusion.training_losses(model, x, T_MIXED, noise=noise)["vb"]
    p = diffusion.p_mean_variance(model, x_t, T_MIXED, clip_denoised=False)
    q_mean, _, q_log_variance = diffusion.q_posterior_mean_variance(x, x_t, T_MIXED)
    q_normal = torch.distributions.Normal(q_mean, (0.5 * q_log_variance).exp())
    p_normal = torch.distributions.Normal(p["mean"], (0.5 * p["log_variance"]).exp())
    kl = mean_over_pixels(torch.distributions.kl_divergence(q_normal, p_normal)) / math.log(2)
    nll = published_nll(x[0].numpy(), p["mean"][0].numpy(), 0.5 * p["log_variance"][0].numpy()).mean() / math.log(2)
    numerics.assert_identity(vb[1:], kl[1:], AMPLIFICATION)
    np.testing.assert_allclose(vb[0].item(), nll, rtol=numerics.DIFFUSION_TABLE_RTOL)


def loss_gradients(diffusion: GaussianDiffusion, key: str) -> tuple[Tensor, Tensor]:
    """Gradients of one loss with regard to the model's prediction and its v, each (B, C, H, W)."""
    output = random(4, 6, 5, 6, seed=2).requires_grad_()
    losses = diffusion.training_losses(lambda x, t: output, random(*SHAPE), T_MIXED, noise=random(*SHAPE, seed=1))
    (gradient,) = torch.autograd.grad(losses[key].sum(), output)
    prediction, v = gradient.chunk(2, dim=1)
    return prediction, v


def test_mse_trains_the_prediction_and_vb_the_variance():
    diffusion = create_diffusion("")
    prediction, v = loss_gradients(diffusion, "vb")
    assert not prediction.any()
    assert (v.flatten(1).abs().sum(1) > 0).all()
    prediction, v = loss_gradients(diffusion, "mse")
    assert (prediction.flatten(1).abs().sum(1) > 0).all()
    assert not v.any()


def test_kl_trains_both():
    prediction, v = loss_gradients(create_diffusion("", use_kl=True), "loss")
    assert (prediction.flatten(1).abs().sum(1) > 0).all()
    assert (v.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("respacing", ["", "250"])
def test_scales_of_the_losses(respacing):
    schedule = create_diffusion(respacing).schedule
    steps = schedule.num_timesteps
    t = torch.tensor([0, 1, steps // 2, steps - 1])
    x, noise = random(*SHAPE), random(*SHAPE, seed=1)
    losses = {
        name: GaussianDiffusion(schedule, loss=name).training_losses(wavy_learned, x, t, noise=noise)
        for name in ("mse", "rescaled_mse", "kl", "rescaled_kl")
    }
    numerics.assert_identity(losses["rescaled_mse"]["vb"], losses["mse"]["vb"] * steps / 1000)
    numerics.assert_identity(losses["kl"]["loss"], losses["mse"]["vb"])
    numerics.assert_identity(losses["rescaled_kl"]["loss"], losses["mse"]["vb"] * steps)
    for name in ("kl", "rescaled_kl"):
        assert set(losses[name]) == {"loss", "vb"}
        assert torch.equal(losses[name]["loss"], losses[name]["vb"])
    assert create_diffusion(respacing).loss == "mse"
    assert create_diffusion(respacing, use_kl=True).loss == "rescaled_kl"
    assert create_diffusion(respacing, rescale_learned_sigmas=True).loss == "rescaled_mse"


@pytest.mark.parametrize("options", [{}, {"use_kl": True}, {"predict_xstart": True}, FIXED_SMALL], ids=str)
def test_a_sample_s_loss_does_not_depend_on_its_batch(options):
    diffusion = create_diffusion("", **options)
    model = wavy_learned if diffusion.variance == "learned_range" else wavy
    x, noise = random(*SHAPE), random(*SHAPE, seed=1)
    whole = diffusion.training_losses(model, x, T_MIXED, noise=noise)
    for i in range(4):
        alone = diffusion.training_losses(model, x[i : i + 1], T_MIXED[i : i + 1], noise=noise[i : i + 1])
        for name, value in alone.items():
            numerics.assert_identity(value, whole[name][i : i + 1], AMPLIFICATION)


def test_bits_per_dim_add_up():
    diffusion = create_diffusion("20", **FIXED_SMALL)
    x = random(*SHAPE).clamp(-1, 1)
    bpd = diffusion.calc_bpd_loop(
        Oracle(x.clone().requires_grad_()), x, clip_denoised=False, generator=torch.Generator().manual_seed(0)
    )
    assert {name: tuple(value.shape) for name, value in bpd.items()} == {
        "total_bpd": (4,),
        "prior_bpd": (4,),
        "vb": (4, 20),
        "xstart_mse": (4, 20),
        "mse": (4, 20),
    }
    assert not bpd["total_bpd"].requires_grad
    numerics.assert_identity(bpd["total_bpd"], bpd["prior_bpd"] + bpd["vb"].sum(1))
    # The oracle errs nowhere; only the last column, step 0, is left: what the decoder cannot tell.
    for errors in (bpd["vb"][:, :-1], bpd["xstart_mse"], bpd["mse"]):
        numerics.assert_identity(errors, torch.zeros_like(errors), AMPLIFICATION)
    assert (bpd["vb"][:, -1] > 1e-3).all()
    variance = 1 - diffusion.alphas_cumprod[-1]
    prior = 0.5 * (variance + (1 - variance) * x**2 - 1 - math.log(variance))
    numerics.assert_identity(bpd["prior_bpd"], mean_over_pixels(prior) / math.log(2))


# ---- Samplers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_denoised", [False, True])
@pytest.mark.parametrize("respacing", ["", "250", "ddim50", "10,15,20"])
def test_ddim_with_eta_one_is_ddpm_with_the_small_variance(respacing, clip_denoised):
    diffusion = create_diffusion(respacing, **FIXED_SMALL)
    t = torch.tensor([1, 2, diffusion.num_timesteps // 2, diffusion.num_timesteps - 1])
    x, noise = random(*SHAPE), random(*SHAPE, seed=1)
    ddim = diffusion.ddim_sample(wavy, x, t, clip_denoised, eta=1.0, noise=noise)
    ddpm = diffusion.p_sample(wavy, x, t, clip_denoised, noise=noise)
    numerics.assert_identity(ddim["sample"], ddpm["sample"], AMPLIFICATION)
    assert torch.equal(ddim["pred_xstart"], ddpm["pred_xstart"])
    assert not torch.allclose(ddim["sample"], diffusion.ddim_sample(wavy, x, t, clip_denoised)["sample"])


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_step_from_its_definition(eta):
    """Song et al. 2020, equations 12 and 16, with the difference 1 − ᾱ_prev − σ² as they write it."""
    diffusion = create_diffusion("50", **FIXED_SMALL)
    x, noise, t = random(*SHAPE), random(*SHAPE, seed=1), torch.tensor([0, 1, 20, 49])
    bar = torch.from_numpy(diffusion.alphas_cumprod.copy())
    prev = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])[t].view(-1, 1, 1, 1)
    bar = bar[t].view(-1, 1, 1, 1)
    sigma = eta * ((1 - prev) / (1 - bar)).sqrt() * (1 - bar / prev).sqrt()
    epsilon = wavy(x, torch.tensor(diffusion.timestep_map)[t])
    x_0 = (x - (1 - bar).sqrt() * epsilon) / bar.sqrt()
    expected = prev.sqrt() * x_0 + (1 - prev - sigma**2).clamp(min=0).sqrt() * epsilon + sigma * noise
    actual = diffusion.ddim_sample(wavy, x, t, clip_denoised=False, eta=eta, noise=noise)
    numerics.assert_identity(actual["pred_xstart"], x_0, AMPLIFICATION)
    numerics.assert_identity(actual["sample"], expected, AMPLIFICATION)


def test_a_learned_variance_plays_no_part_in_ddim():
    x, noise, t = random(*SHAPE), random(*SHAPE, seed=1), torch.tensor([0, 1, 20, 49])
    learned = create_diffusion("50").ddim_sample(wavy_learned, x, t, eta=1.0, noise=noise)
    fixed = create_diffusion("50", **FIXED_SMALL).ddim_sample(wavy, x, t, eta=1.0, noise=noise)
    assert torch.equal(learned["sample"], fixed["sample"])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("respacing", ["2", "ddim2", "3", "ddim5", "500,1"])
def test_long_strides_stay_finite_in_float32(respacing, schedule, eta):
    """1 − ᾱ_prev − σ² is a difference of near equals there; in float32 it can come out negative."""
    diffusion = create_diffusion(respacing, schedule, **FIXED_SMALL)
    noise = random(2, 3, 4, 4, dtype=torch.float32)
    sample = diffusion.ddim_sample_loop(wavy, noise.shape, noise, eta=eta)
    assert sample.isfinite().all()


@pytest.mark.parametrize("respacing", ["250", "ddim50", "10,15,20"])
def test_ddim_with_an_oracle_returns_x_start(respacing):
    diffusion = create_diffusion(respacing, **FIXED_SMALL)
    x = random(*SHAPE)
    sample = diffusion.ddim_sample_loop(Oracle(x), SHAPE, random(*SHAPE, seed=1), clip_denoised=False)
    numerics.assert_identity(sample, x, AMPLIFICATION)


@pytest.mark.parametrize("respacing", ["", "250", "ddim50"])
def test_ddim_reverse_after_forward_is_the_identity(respacing):
    diffusion = create_diffusion(respacing, **FIXED_SMALL)
    model, x = Oracle(random(*SHAPE)), random(*SHAPE, seed=1)
    t = torch.tensor([1, 2, diffusion.num_timesteps // 2, diffusion.num_timesteps - 1])
    earlier = diffusion.ddim_sample(model, x, t, clip_denoised=False)["sample"]
    back = diffusion.ddim_reverse_sample(model, earlier, t - 1, clip_denoised=False)["sample"]
    numerics.assert_identity(back, x, AMPLIFICATION)
    assert not torch.allclose(earlier, x)


def test_ddim_reverse_ends_in_pure_noise():
    diffusion = create_diffusion("50", **FIXED_SMALL)
    t = torch.full((4,), 49)
    last = diffusion.ddim_reverse_sample(wavy, random(*SHAPE), t, clip_denoised=False)
    numerics.assert_identity(last["sample"], wavy(random(*SHAPE), t * 0 + 999), AMPLIFICATION)


def test_ddim_reverse_loop_inverts_the_sampling_loop():
    diffusion = create_diffusion("50", **FIXED_SMALL)
    x = random(*SHAPE)
    latent = diffusion.ddim_reverse_sample_loop(Oracle(x), x, clip_denoised=False)
    numerics.assert_identity(diffusion.ddim_sample_loop(Oracle(x), SHAPE, latent, clip_denoised=False), x, AMPLIFICATION)
    # A constant prediction is integrated exactly, so the states at step 0 and at the last step determine each
    # other.
    constant = random(*SHAPE, seed=1)
    states = [out["sample"] for out in diffusion.ddim_sample_loop_progressive(lambda x, t: constant, SHAPE, x, clip_denoised=False)]
    back = diffusion.ddim_reverse_sample_loop(lambda x, t: constant, states[-2], clip_denoised=False)
    numerics.assert_identity(back, x, AMPLIFICATION * states[-2].abs().max().item())


def test_unit_normal_data_is_a_fixed_point_of_ddpm_with_the_large_variance():
    """For x_0 ~ N(0, 1) the true reverse step is √α·x_t + √β·noise, and E[noise | x_t] = √(1 − ᾱ)·x_t."""
    diffusion = create_diffusion("50", **FIXED_LARGE)
    x, noise, t = random(*SHAPE), random(*SHAPE, seed=1), torch.tensor([1, 2, 20, 49])

    def model(x: Tensor, t: Tensor) -> Tensor:
        return (1 - ALPHAS_CUMPROD[t]).sqrt().view(-1, 1, 1, 1) * x

    sample = diffusion.p_sample(model, x, t, clip_denoised=False, noise=noise)["sample"]
    beta = torch.from_numpy(diffusion.betas.copy())[t].view(-1, 1, 1, 1)
    numerics.assert_identity(sample, (1 - beta).sqrt() * x + beta.sqrt() * noise, AMPLIFICATION)


def test_p_sample_adds_the_learned_noise_except_at_the_first_step():
    diffusion = create_diffusion("50")
    x, noise, t = random(*SHAPE), random(*SHAPE, seed=1), torch.tensor([0, 1, 20, 49])
    out = diffusion.p_mean_variance(wavy_learned, x, t)
    sample = diffusion.p_sample(wavy_learned, x, t, noise=noise)["sample"]
    assert torch.equal(sample[0], out["mean"][0])
    expected = out["mean"] + out["variance"].sqrt() * noise
    numerics.assert_identity(sample[1:], expected[1:])


def test_cond_fn_moves_the_mean_and_the_score():
    diffusion, seen = create_diffusion("50"), []
    x, noise, t = random(*SHAPE), random(*SHAPE, seed=1), torch.tensor([0, 1, 20, 49])
    gradient = random(*SHAPE, seed=2)

    def cond_fn(x: Tensor, steps: Tensor, y: int) -> Tensor:
        seen.append((steps.tolist(), y))
        return gradient

    model = lambda x, t, y: wavy_learned(x, t)  # noqa: E731
    guided = {"cond_fn": cond_fn, "model_kwargs": {"y": 7}}
    plain = diffusion.p_sample(wavy_learned, x, t, noise=noise)["sample"]
    variance = diffusion.p_mean_variance(wavy_learned, x, t)["variance"]
    moved = diffusion.p_sample(model, x, t, noise=noise, **guided)["sample"]
    numerics.assert_identity(moved, plain + variance * gradient)

    shifted = lambda x, t: torch.cat([wavy(x, t) - root * gradient, torch.zeros_like(x)], dim=1)  # noqa: E731
    root = torch.from_numpy(np.sqrt(1 - diffusion.alphas_cumprod))[t].view(-1, 1, 1, 1)
    for step in (diffusion.ddim_sample, diffusion.ddim_reverse_sample):
        moved = step(model, x, t, clip_denoised=False, **guided)
        expected = step(shifted, x, t, clip_denoised=False)
        numerics.assert_identity(moved["sample"], expected["sample"], AMPLIFICATION)
        numerics.assert_identity(moved["pred_xstart"], expected["pred_xstart"], AMPLIFICATION)
    assert seen == [([0, 20, 408, 999], 7)] * 3


def every_loop(diffusion: GaussianDiffusion, **kwargs) -> dict[str, object]:
    noise = random(*SHAPE, seed=1)
    arguments = {"model": wavy_learned, "shape": SHAPE, "noise": noise, **kwargs}
    return {
        "p_sample": (diffusion.p_sample_loop, diffusion.p_sample_loop_progressive, arguments),
        "ddim": (diffusion.ddim_sample_loop, diffusion.ddim_sample_loop_progressive, arguments),
        "ddim_eta": (
            diffusion.ddim_sample_loop,
            diffusion.ddim_sample_loop_progressive,
            {**arguments, "eta": 0.5},
        ),
    }


@pytest.mark.parametrize("name", ["p_sample", "ddim", "ddim_eta"])
def test_progressive_forms_yield_every_step(name):
    diffusion = create_diffusion("10")
    loop, progressive, arguments = every_loop(diffusion)[name]
    seen = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert t.shape == (4,)
        seen.append(t[0].item())
        return wavy_learned(x, t)

    arguments["model"] = model
    generator = torch.Generator().manual_seed(5)
    steps = []
    for out in progressive(**arguments, generator=generator):
        assert torch.is_grad_enabled()
        assert set(out) == {"sample", "pred_xstart"}
        assert all(value.shape == SHAPE for value in out.values())
        steps.append(out["sample"])
    assert len(steps) == 10
    assert seen == diffusion.timestep_map[::-1]
    assert all(not torch.equal(a, b) for a, b in pairwise(steps))
    whole = loop(**arguments, generator=torch.Generator().manual_seed(5))
    assert torch.equal(whole, steps[-1])


def test_reverse_loop_yields_every_step():
    diffusion, seen = create_diffusion("10"), []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t[0].item())
        return wavy_learned(x, t)

    steps = list(diffusion.ddim_reverse_sample_loop_progressive(model, random(*SHAPE)))
    assert len(steps) == 9
    assert seen == diffusion.timestep_map[:-1]
    assert torch.equal(steps[-1]["sample"], diffusion.ddim_reverse_sample_loop(model, random(*SHAPE)))


LOOPS = ["p_sample_loop", "ddim_sample_loop", "dpm_solver_sample_loop", "ddim_reverse_sample_loop"]


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_has_the_parameters_of_its_progressive_form_and_returns_a_tensor(name):
    loop, progressive = getattr(GaussianDiffusion, name), getattr(GaussianDiffusion, f"{name}_progressive")
    assert inspect.signature(loop) == inspect.signature(progressive).replace(return_annotation="Tensor")
    assert get_type_hints(loop) == get_type_hints(progressive) | {"return": Tensor}
    assert loop.__qualname__ == f"GaussianDiffusion.{name}"
    assert loop.__doc__ != progressive.__doc__


@pytest.mark.parametrize("name", LOOPS)
def test_progressive_forms_check_at_the_call_and_ask_the_model_at_the_first_step(name):
    progressive = getattr(create_diffusion("10"), f"{name}_progressive")

    def model(x: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("asked")

    if name == "ddim_reverse_sample_loop":
        start, wrong = {"x_start": random(*SHAPE)}, {"x_start": random(*SHAPE).long()}
    else:
        start, wrong = {"shape": SHAPE, "noise": random(*SHAPE)}, {"noise": random(*SHAPE).long()}
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        progressive(model, **start | wrong)
    if name == "ddim_sample_loop":
        with pytest.raises(ValueError, match="eta: got 2"):
            progressive(model, **start, eta=2)
    steps = progressive(model, **start)
    with pytest.raises(RuntimeError, match="asked"):
        next(steps)


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_follows_a_progressive_form_that_a_subclass_overrides(name):
    steps = [{"sample": torch.zeros(2, 3)}, {"sample": torch.ones(2, 3)}]
    override = {f"{name}_progressive": lambda self, *args, **kwargs: iter(steps)}
    diffusion = type("Overriding", (GaussianDiffusion,), override)(NoiseSchedule(named_beta_schedule("linear", 50)))
    assert getattr(diffusion, name)(wavy, random(2, 3)) is steps[-1]["sample"]


@pytest.mark.parametrize("name", ["p_sample", "ddim", "ddim_eta"])
def test_loops_are_their_steps(name):
    diffusion = create_diffusion("10")
    loop, _, arguments = every_loop(diffusion)[name]
    x, generator = arguments["noise"], torch.Generator().manual_seed(5)
    for index in reversed(range(10)):
        t = torch.full((4,), index)
        if name == "p_sample":
            x = diffusion.p_sample(wavy_learned, x, t, generator=generator)["sample"]
        else:
            eta = arguments.get("eta", 0.0)
            x = diffusion.ddim_sample(wavy_learned, x, t, eta=eta, generator=generator)["sample"]
    assert torch.equal(loop(**arguments, generator=torch.Generator().manual_seed(5)), x)


def test_a_generator_decides_everything_drawn():
    diffusion = create_diffusion("10")

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return diffusion.p_sample_loop(wavy_learned, SHAPE, device="cpu", generator=generator)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    state = torch.random.get_rng_state()
    diffusion.training_losses(wavy_learned, draw(1), torch.arange(4), generator=torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.random.get_rng_state())


def test_without_a_device_or_noise_the_model_says_where():
    diffusion = create_diffusion("5", learn_sigma=False)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), device="meta"))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * self.scale

    assert diffusion.p_sample_loop(Model(), SHAPE).device.type == "meta"
    assert diffusion.ddim_sample_loop(Model().forward, SHAPE).device.type == "meta"
    assert diffusion.p_sample_loop(wavy, SHAPE, device="cpu").device.type == "cpu"
    assert diffusion.p_sample_loop(wavy, SHAPE, random(*SHAPE), device="cpu").device.type == "cpu"


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_and_single_batches(batch):
    diffusion, t = create_diffusion("5"), torch.zeros(batch, dtype=torch.int64)
    x = random(batch, 3, 4, 4)
    assert diffusion.p_sample_loop(wavy_learned, x.shape, x).shape == x.shape
    assert diffusion.training_losses(wavy_learned, x, t)["loss"].shape == (batch,)


def test_progress_shows_one_bar_of_all_steps(capsys):
    create_diffusion("10").p_sample_loop(wavy_learned, SHAPE, random(*SHAPE), progress=True)
    assert "10/10" in capsys.readouterr().err
    create_diffusion("10").p_sample_loop(wavy_learned, SHAPE, random(*SHAPE))
    assert not capsys.readouterr().err


# ---- Guidance with the reference DiT ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dit() -> DiT:
    torch.manual_seed(0)
    model = DiT(input_size=4, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


LABELS, NULL = torch.tensor([0, 3, 4]), torch.full((3,), 5)


def guided_prediction(dit: DiT, x: Tensor, t: Tensor, scale: float, channels: int | None) -> Tensor:
    """x_0 as predicted under guidance, conditional half only: (3, 4, 4, 4)."""
    kwargs = {"y": torch.cat([LABELS, NULL]), "cfg_scale": scale, "guided_channels": channels}
    out = create_diffusion("10").p_mean_variance(
        dit.forward_with_cfg, torch.cat([x, x]), torch.cat([t, t]), clip_denoised=False, model_kwargs=kwargs
    )
    return out["pred_xstart"][:3]


def plain_prediction(dit: DiT, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    out = create_diffusion("10").p_mean_variance(dit, x, t, clip_denoised=False, model_kwargs={"y": labels})
    return out["pred_xstart"]


@pytest.mark.parametrize("channels, guided", [(3, slice(0, 3)), (None, slice(0, 4))])
def test_guidance_scales_one_and_zero(dit, channels, guided):
    x, t = random(3, 4, 4, 4), torch.tensor([0, 4, 9])
    conditional, unconditional = plain_prediction(dit, x, t, LABELS), plain_prediction(dit, x, t, NULL)
    assert not torch.allclose(conditional, unconditional)
    numerics.assert_identity(guided_prediction(dit, x, t, 1.0, channels), conditional, AMPLIFICATION)
    zero = guided_prediction(dit, x, t, 0.0, channels)
    numerics.assert_identity(zero[:, guided], unconditional[:, guided], AMPLIFICATION)
    if channels == 3:
        numerics.assert_identity(zero[:, 3:], conditional[:, 3:], AMPLIFICATION)
    three = guided_prediction(dit, x, t, 3.0, channels)[:, guided]
    expected = unconditional + 3 * (conditional - unconditional)
    numerics.assert_identity(three, expected[:, guided], 3 * AMPLIFICATION)


def test_guided_trajectory_of_scale_one_is_the_conditional_trajectory(dit):
    diffusion = create_diffusion("10")
    x = random(3, 4, 4, 4)
    guided, plain = torch.cat([x, x]), x
    for index in reversed(range(10)):
        noise = random(3, 4, 4, 4, seed=index)
        t = torch.full((3,), index)
        guided = diffusion.p_sample(
            dit.forward_with_cfg,
            guided,
            torch.cat([t, t]),
            model_kwargs={"y": torch.cat([LABELS, NULL]), "cfg_scale": 1.0},
            noise=torch.cat([noise, noise]),
        )["sample"]
        plain = diffusion.p_sample(dit, plain, t, model_kwargs={"y": LABELS}, noise=noise)["sample"]
        # One step amplifies what the two batch sizes round differently; ten steps with clipping do not add up
        # to more.
        numerics.assert_identity(guided[:3], plain, 10 * AMPLIFICATION)


# ---- What a step costs besides its arithmetic ------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Counts what crosses from the host to the (meta) device, and lists the dtypes of floating results."""

    def __init__(self) -> None:
        super().__init__()
        self.copies, self.reads, self.dtypes = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        from_host = any(tensor.device.type == "cpu" for tensor in inputs)
        self.copies += from_host and any(tensor.device.type == "meta" for tensor in outputs)
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        self.dtypes |= {tensor.dtype for tensor in outputs if tensor.dtype.is_floating_point}
        return out


def all_work(diffusion: GaussianDiffusion) -> None:
    """Every public computation, on the meta device: it has no values, so any read by the host raises."""
    x = torch.empty(SHAPE, device="meta")
    t = torch.zeros(4, dtype=torch.int64, device="meta")
    diffusion.p_sample_loop(wavy_learned, SHAPE, device="meta")
    diffusion.ddim_sample_loop(wavy_learned, SHAPE, x, eta=0.5)
    diffusion.ddim_reverse_sample_loop(wavy_learned, x)
    diffusion.training_losses(wavy_learned, x, t)
    diffusion.p_sample(wavy_learned, x, t)
    diffusion.q_sample(x, t)
    diffusion.q_posterior_mean_variance(x, x, t)
    diffusion.calc_bpd_loop(wavy_learned, x)


def test_tables_cross_to_a_device_once():
    diffusion = create_diffusion("20")
    with Traffic() as first:
        diffusion.p_sample_loop(wavy_learned, SHAPE, device="meta")
    assert first.copies == 2, "the packed coefficients and the timestep map"
    with Traffic() as steady:
        all_work(diffusion)
    assert steady.copies == 0
    assert steady.reads == 0
    assert steady.dtypes == {torch.float32}


def test_a_default_device_does_not_reach_the_tables():
    x, t = random(*SHAPE), torch.arange(4)
    with torch.device("meta"):
        sample = create_diffusion("10").p_sample(wavy_learned, x, t)["sample"]
    assert sample.device.type == "cpu"


def test_losses_compile_into_one_graph():
    diffusion, t = create_diffusion(""), torch.tensor([0, 1, 500, 999])
    x, noise = random(*SHAPE, dtype=torch.float32), random(*SHAPE, seed=1, dtype=torch.float32)
    losses = lambda x, t: diffusion.training_losses(wavy_learned, x, t, noise=noise)["loss"]  # noqa: E731
    expected = losses(x, t)
    compiled = torch.compile(losses, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, t), expected)
    with pytest.raises(RuntimeError, match="0 to 999"):
        compiled(x, t + 1)


@pytest.mark.gpu
def test_steps_do_not_stall_the_host():
    diffusion = create_diffusion("20")
    x, t = torch.randn(SHAPE, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
    diffusion.training_losses(wavy_learned, x, t)
    torch.cuda.set_sync_debug_mode("error")
    try:
        diffusion.p_sample_loop(wavy_learned, SHAPE, x)
        diffusion.ddim_sample_loop(wavy_learned, SHAPE, x, eta=1.0)
        diffusion.training_losses(wavy_learned, x, t)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            {"timestep_respacing": "abc"},
            ValueError,
            r"timestep_respacing: got 'abc', allowed are '' .*'ddimN'",
        ),
        ({"timestep_respacing": "10,,5"}, ValueError, "timestep_respacing: got '10,,5'"),
        ({"timestep_respacing": "-5"}, ValueError, "timestep_respacing: got '-5'"),
        (
            {"timestep_respacing": "1001"},
            ValueError,
            "wants 1001 steps from section 0 of 1; allowed are 1 to 1000",
        ),
        (
            {"timestep_respacing": "9,600"},
            ValueError,
            "wants 600 steps from section 1 of 2; allowed are 1 to 500",
        ),
        ({"timestep_respacing": "0"}, ValueError, "wants 0 steps"),
        ({"timestep_respacing": "1"}, ValueError, r"got 1 step\(s\) out of 1000, a chain needs at least 2"),
        ({"timestep_respacing": []}, ValueError, "empty list"),
        ({"timestep_respacing": [10, 0]}, ValueError, "timestep_respacing: got 0"),
        ({"timestep_respacing": [2.5]}, TypeError, "timestep_respacing: got 2.5, allowed is an int"),
        ({"timestep_respacing": True}, TypeError, "timestep_respacing: got True"),
        (
            {"timestep_respacing": 2.5},
            TypeError,
            "timestep_respacing: got 2.5, allowed is a str, an int or a list",
        ),
        ({"timestep_respacing": "ddim"}, ValueError, "allowed after 'ddim' is a number"),
        ({"timestep_respacing": "ddim600"}, ValueError, "exactly 600; the nearest that work are .*ddim500"),
        ({"timestep_respacing": "ddim0"}, ValueError, "exactly 0"),
        (
            {"noise_schedule": "quadratic"},
            ValueError,
            "noise_schedule: got 'quadratic', allowed are 'linear'",
        ),
        (
            {"diffusion_steps": 20},
            ValueError,
            "diffusion_steps: got 20, allowed for the linear schedule are 21",
        ),
        ({"diffusion_steps": 1, "noise_schedule": "cosine"}, ValueError, "diffusion_steps: got 1"),
        ({"diffusion_steps": 100.0}, TypeError, "diffusion_steps: got 100.0, allowed is an int"),
        ({"sigma": "small"}, TypeError, "unexpected keyword argument 'sigma'"),
    ],
    ids=str,
)
def test_create_diffusion_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        create_diffusion(**{"timestep_respacing": "", **arguments})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: NoiseSchedule([0.1, 1.0]), "betas"),
        (lambda: NoiseSchedule([0.1, 0.0]), "betas"),
        (lambda: NoiseSchedule([0.1, float("nan")]), "betas"),
        (lambda: NoiseSchedule([[0.1, 0.2]]), "betas"),
        (lambda: NoiseSchedule([0.1, 0.2], [0, 2]), r"allowed are ascending steps out of 0\.\.1"),
        (lambda: NoiseSchedule([0.1, 0.2], [1, 0]), "ascending"),
        (lambda: NoiseSchedule([0.1, 0.2], [-1, 0]), "ascending"),
        (
            lambda: GaussianDiffusion(NoiseSchedule([0.1, 0.2]), loss="l1"),
            "loss: got 'l1', allowed are 'mse'",
        ),
        (lambda: GaussianDiffusion(NoiseSchedule([0.1, 0.2]), prediction="v"), "prediction: got 'v'"),
        (lambda: GaussianDiffusion(NoiseSchedule([0.1, 0.2]), variance="learned"), "variance: got 'learned'"),
    ],
)
def test_constructors_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


X = random(*SHAPE)
T = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "x, t, error, message",
    [
        (X, T + 10, ValueError, "t: got steps from 10 to 10, allowed are 0 to 9"),
        (X, T - 1, ValueError, "t: got steps from -1 to -1, allowed are 0 to 9"),
        (X, T[:3], ValueError, r"t: got shape \(3,\) on cpu, allowed is \(4,\) on cpu"),
        (X, T[0], ValueError, r"t: got shape \(\)"),
        (X, T.to("meta"), ValueError, "t: got shape .* on meta"),
        (X, T.double(), TypeError, "t: got torch.float64, allowed is a tensor of int64 or int32"),
        (X, T.bool(), TypeError, "t: got torch.bool"),
        (X, T.to(torch.uint8), TypeError, "t: got torch.uint8"),
        (X, 3, TypeError, "t: got int"),
        (X.long(), T, TypeError, "x: got torch.int64, allowed is a floating-point tensor"),
        (X.numpy(), T, TypeError, "x: got ndarray"),
        (X[:, 0, 0, 0], T, ValueError, r"x: got shape \(4,\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_steps_and_losses_refuse(x, t, error, message):
    diffusion = create_diffusion("10")
    calls = (
        lambda: diffusion.training_losses(wavy_learned, x, t),
        lambda: diffusion.q_sample(x, t),
        lambda: diffusion.q_mean_variance(x, t),
        lambda: diffusion.q_posterior_mean_variance(x, x, t),
        lambda: diffusion.p_mean_variance(wavy_learned, x, t),
        lambda: diffusion.p_sample(wavy_learned, x, t),
        lambda: diffusion.ddim_sample(wavy_learned, x, t),
        lambda: diffusion.ddim_reverse_sample(wavy_learned, x, t),
    )
    for call in calls:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("options, channels", [({}, 3), ({}, 7), (FIXED_SMALL, 6)], ids=str)
def test_a_model_with_the_wrong_number_of_channels_is_refused(options, channels):
    diffusion = create_diffusion("10", **options)
    expected = 6 if not options else 3
    model = lambda x, t: x.new_zeros(4, channels, 5, 6)  # noqa: E731
    message = rf"model: got output \(4, {channels}, 5, 6\) for x \(4, 3, 5, 6\), allowed is \(4, {expected}, 5, 6\)"
    with pytest.raises(ValueError, match=message):
        diffusion.training_losses(model, X, T)
    with pytest.raises(ValueError, match=message):
        diffusion.ddim_sample(model, X, T)
    with pytest.raises(ValueError, match="model: got output list"):
        diffusion.p_sample(lambda x, t: [x, x], X, T)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda d: d.q_sample(X, T, X[:, :2]),
            ValueError,
            r"noise: got shape \(4, 2, 5, 6\) on cpu, allowed is",
        ),
        (lambda d: d.q_sample(X, T, 0.0), TypeError, "noise: got float"),
        (lambda d: d.q_sample(X, T, X, generator=torch.Generator()), ValueError, "generator"),
        (lambda d: d.q_posterior_mean_variance(X[:1], X, T), ValueError, "x_start: got shape"),
        (lambda d: d.q_posterior_mean_variance(X.long(), X, T), TypeError, "x_start: got torch.int64"),
        (
            lambda d: d.p_sample_loop(wavy_learned, SHAPE, X.to("meta"), device="meta:1"),
            ValueError,
            "noise: got a tensor on meta, allowed is one on device=meta:1",
        ),
        (
            lambda d: d.training_losses(wavy_learned, X, T, noise=X.to("meta")),
            ValueError,
            "noise: got .* on meta",
        ),
        (lambda d: d.ddim_sample(wavy_learned, X, T, eta=1.5), ValueError, "eta: got 1.5, allowed are 0"),
        (lambda d: d.ddim_sample_loop(wavy_learned, SHAPE, X, eta=-0.1), ValueError, "eta: got -0.1"),
        (lambda d: d.p_sample_loop(wavy_learned, SHAPE), ValueError, "device: got None"),
        (
            lambda d: d.p_sample_loop(wavy_learned, (4, 3, 5, 5), X),
            ValueError,
            r"noise: got shape \(4, 3, 5, 6\)",
        ),
        (
            lambda d: d.p_sample_loop(wavy_learned, SHAPE, X, device="meta"),
            ValueError,
            "noise: got a tensor on cpu",
        ),
        (lambda d: d.p_sample_loop(wavy_learned, (4,), device="cpu"), ValueError, r"got shape \(4,\)"),
        (lambda d: d.p_sample_loop_progressive(wavy_learned, SHAPE), ValueError, "device: got None"),
        (
            lambda d: d.p_sample_loop(wavy_learned, SHAPE, X, eta=1.0),
            TypeError,
            "unexpected keyword argument 'eta'",
        ),
        (
            lambda d: d.p_sample(wavy_learned, X, T, cond_fn=lambda x, t: x[0]),
            ValueError,
            "cond_fn's result: got",
        ),
        (
            lambda d: d.training_losses(wavy_learned, X, T, {"y": 1}),
            TypeError,
            "unexpected keyword argument 'y'",
        ),
    ],
)
def test_loops_and_noise_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call(create_diffusion("10"))
