"""Gaussian diffusion: the forward process q, the learned reverse process p and the training losses.

This is mathematics only: a model is any callable, and the tensors say which device computes. docs/diffusion.md states the
formulas. Their sources are:

- Ho et al. 2020 (arXiv 2006.11239) for q, p and the losses;
- Nichol & Dhariwal 2021 (arXiv 2102.09672) for the learned variance and the hybrid loss;
- Song et al. 2020 (arXiv 2010.02502) for DDIM;
- Dhariwal & Nichol 2021 (arXiv 2105.05233) for gradient guidance (``cond_fn``).

These conventions hold for every method of a diffusion:

- x, x_start and noise are (B, C, …) floating point. The computation is float64 for float64 and float32 for everything
  narrower, and results have its dtype. The reason is that an error of the predicted noise grows by √(1/ᾱ − 1), which
  reaches 157 on the linear schedule.
- t is (B,) int64 or int32 on x's device. It holds steps of the (respaced) chain, 0 … num_timesteps − 1. Models and
  ``cond_fn`` get the *original* timesteps, ``timestep_map[t]``, as (B,) int64, or as float32 where they are fractions. A t
  out of range raises ValueError on a CPU. Elsewhere the device asserts, because reading t would stall the host.
- model(x, timesteps, **model_kwargs) returns the prediction, (B, C, …). Where the variance is learned, it returns the
  prediction and then v, together (B, 2C, …).
- ``noise`` holds the random numbers, and ``generator`` (a torch.Generator on x's device) says where to draw them. A caller
  gives at most one of the two. Only a loop takes both, because its ``noise`` is where it starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditkernels.diffusion.inputs import check_choice, check_like, check_timesteps, noise_for, widened
from ditkernels.diffusion.likelihood import (
    bits_per_dim,
    discretized_gaussian_log_likelihood,
    mean_flat,
    normal_kl,
)
from ditkernels.diffusion.schedule import Coefficients, FloatArray, NoiseSchedule

PREDICTIONS = ("epsilon", "x_start")
VARIANCES = ("learned_range", "fixed_small", "fixed_large")
LOSSES = ("mse", "rescaled_mse", "kl", "rescaled_kl")

Model = Callable[..., Tensor]
DenoisedFn = Callable[[Tensor], Tensor]
CondFn = Callable[..., Tensor]
ModelKwargs = dict[str, Any]
Sample = dict[str, Tensor]


class Denoiser(NamedTuple):
    """A model and what a sampler does with its prediction of x_0. Every sampler needs this, whatever its step."""

    model: Model
    clip_denoised: bool = True
    denoised_fn: DenoisedFn | None = None
    cond_fn: CondFn | None = None
    model_kwargs: ModelKwargs | None = None


class Reverse(NamedTuple):
    """p(x_{t−1} | x_t) and the predicted x_0 that it follows from, each of x's shape; ``extra`` is what else the model returned."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_xstart: Tensor
    extra: Any = None


class WrappedModel:
    """A model that takes steps of the chain: the one within gets the timesteps of the original chain."""

    def __init__(self, model: Model, schedule: NoiseSchedule) -> None:
        self.model = model
        self.schedule = schedule

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Any:
        return self.model(x, self.schedule.original_timesteps(ts), **kwargs)


class DiffusionProcess:
    """The processes q and p over a :class:`NoiseSchedule`, and the losses that make p undo q.

    ``prediction`` is what the model returns: "epsilon" or "x_start". ``variance`` is "learned_range" (the model returns v
    too), "fixed_small" (β̃) or "fixed_large" (β). ``loss`` is "mse", "rescaled_mse" (the variational term times
    num_timesteps / 1000), "kl" (the variational bound alone) or "rescaled_kl" (that bound times num_timesteps). Raises
    ValueError for any other value.

    ``schedule`` is an attribute, and so are its ``num_timesteps``, ``timestep_map``, ``betas`` and ``alphas_cumprod``.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        prediction: str = "epsilon",
        variance: str = "learned_range",
        loss: str = "mse",
    ) -> None:
        check_choice("prediction", prediction, PREDICTIONS)
        check_choice("variance", variance, VARIANCES)
        check_choice("loss", loss, LOSSES)
        self.schedule = schedule
        self.prediction = prediction
        self.variance = variance
        self.loss = loss

    @property
    def num_timesteps(self) -> int:
        return self.schedule.num_timesteps

    @property
    def timestep_map(self) -> list[Any]:
        return self.schedule.timestep_map

    @property
    def betas(self) -> FloatArray:
        return self.schedule.betas

    @property
    def alphas_cumprod(self) -> FloatArray:
        return self.schedule.alphas_cumprod

    # --------------------------------------------------------------------------------------------------------
    # The forward process q
    # --------------------------------------------------------------------------------------------------------

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean √ᾱ·x_0, the variance 1 − ᾱ and the log variance of q(x_t | x_0), each of x_start's shape."""
        x_start, t = self._check(x_start, t)
        c = self.schedule.at(t, x_start)
        return (
            c.sqrt_alphas_cumprod * x_start,
            c.one_minus_alphas_cumprod.expand_as(x_start),
            c.log_one_minus_alphas_cumprod.expand_as(x_start),
        )

    def q_sample(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A draw from q(x_t | x_0), of x_start's shape: √ᾱ·x_0 + √(1 − ᾱ)·noise."""
        x_start, t = self._check(x_start, t)
        return diffuse(self.schedule.at(t, x_start), x_start, noise_for(x_start, noise, generator))

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean, the variance β̃ and the clipped log variance of q(x_{t−1} | x_t, x_0), each of x_t's shape.

        At t = 0, where β̃ is 0, the log variance is that of t = 1.
        """
        x_t, t = self._check(x_t, t)
        x_start = widened(x_start, "x_start")
        check_like("x_start", x_start, x_t)
        c = self.schedule.at(t, x_t)
        return (
            posterior_mean(c, x_start, x_t),
            c.posterior_variance.expand_as(x_t),
            c.posterior_log_variance_clipped.expand_as(x_t),
        )

    # --------------------------------------------------------------------------------------------------------
    # The reverse process p
    # --------------------------------------------------------------------------------------------------------

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: ModelKwargs | None = None,
    ) -> dict[str, Any]:
        """p(x_{t−1} | x_t): a dict of ``mean``, ``variance``, ``log_variance``, ``pred_xstart``, each like x, and ``extra``.

        Where the model returns a tuple, its second part is ``extra``, which else is None.
        ``denoised_fn`` maps the predicted x_0 before ``clip_denoised`` clips it to [−1, 1]. Raises ValueError where the
        model's output does not have the shape that the variance asks for.
        """
        x, t = self._check(x, t)
        denoiser = Denoiser(model, clip_denoised, denoised_fn, None, model_kwargs)
        return self._reverse(denoiser, self.schedule.at(t, x), x, t)._asdict()

    def _reverse(self, denoiser: Denoiser, c: Coefficients, x: Tensor, t: Tensor) -> Reverse:
        output, v, extra = self._call(denoiser, x, t)
        return self._interpret(denoiser, c, x, output, v)._replace(extra=extra)

    def _wrap_model(self, model: Model) -> WrappedModel:
        """The model as a function of the chain's own steps; one that has been wrapped is returned."""
        return model if isinstance(model, WrappedModel) else WrappedModel(model, self.schedule)

    def _call(self, denoiser: Denoiser, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None, Any]:
        """The prediction, (B, C, …), v, which has the same shape or is None where the variance is fixed, and what else came."""
        output = self._wrap_model(denoiser.model)(x, t, **(denoiser.model_kwargs or {}))
        extra = None
        if isinstance(output, tuple):
            output, extra = output
        learned = self.variance == "learned_range"
        expected = (x.shape[0], x.shape[1] * (2 if learned else 1), *x.shape[2:])
        if not isinstance(output, Tensor) or output.shape != expected:
            came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"model: got output {came} for x {tuple(x.shape)}, allowed is {expected} with a variance that is {self.variance!r}"
            )
        output = output.to(x.dtype)
        if not learned:
            return output, None, extra
        prediction, v = output.chunk(2, dim=1)
        return prediction, v, extra

    def _predict_xstart(self, denoiser: Denoiser, c: Coefficients, x: Tensor, output: Tensor) -> Tensor:
        pred_xstart = output if self.prediction == "x_start" else xstart_from_epsilon(c, x, output)
        if denoiser.denoised_fn is not None:
            pred_xstart = denoiser.denoised_fn(pred_xstart)
        return pred_xstart.clamp(-1, 1) if denoiser.clip_denoised else pred_xstart

    def _interpret(self, denoiser: Denoiser, c: Coefficients, x: Tensor, output: Tensor, v: Tensor | None) -> Reverse:
        pred_xstart = self._predict_xstart(denoiser, c, x, output)
        variance, log_variance = self._variance(c, v)
        mean = posterior_mean(c, pred_xstart, x)
        return Reverse(mean, variance.expand_as(x), log_variance.expand_as(x), pred_xstart)

    def _variance(self, c: Coefficients, v: Tensor | None) -> tuple[Tensor, Tensor]:
        if v is not None:
            fraction = (v + 1) / 2
            log_variance = fraction * c.log_betas + (1 - fraction) * c.posterior_log_variance_clipped
            return log_variance.exp(), log_variance
        if self.variance == "fixed_large":
            return c.fixed_large_variance, c.fixed_large_log_variance
        return c.posterior_variance, c.posterior_log_variance_clipped

    # --------------------------------------------------------------------------------------------------------
    # Losses
    # --------------------------------------------------------------------------------------------------------

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: ModelKwargs | None = None,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Sample:
        """The losses of a batch at steps t, as a dict of (B,) tensors in the dtype of the computation.

        ``loss`` is what to minimise. The mse losses also give ``mse``, the mean square error of what the model predicts.
        With a learned variance they give ``vb`` too, the variational term in bits per dimension as it enters the loss:
        loss = mse + vb. This term trains v alone, because the prediction is detached in it. The kl losses also give
        ``vb``, which equals the loss. No loss clips the predicted x_0.
        """
        x_start, t = self._check(x_start, t)
        noise = noise_for(x_start, noise, generator)
        c = self.schedule.at(t, x_start)
        x_t = diffuse(c, x_start, noise)
        denoiser = Denoiser(model, clip_denoised=False, model_kwargs=model_kwargs)
        output, v, _ = self._call(denoiser, x_t, t)
        if self.loss in ("kl", "rescaled_kl"):
            vb = self._variational_term(self._interpret(denoiser, c, x_t, output, v), c, x_start, x_t, t)
            vb = vb * self.num_timesteps if self.loss == "rescaled_kl" else vb
            return {"loss": vb, "vb": vb}
        target = x_start if self.prediction == "x_start" else noise
        mse = mean_flat((target - output).square())
        if v is None:
            return {"loss": mse, "mse": mse}
        reverse = self._interpret(denoiser, c, x_t, output.detach(), v)
        vb = self._variational_term(reverse, c, x_start, x_t, t)
        if self.loss == "rescaled_mse":
            vb = vb * (self.num_timesteps / 1000)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _variational_term(self, reverse: Reverse, c: Coefficients, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """One term of the bound, (B,) bits per dimension: KL(q || p), or at t = 0 the decoder's negative log likelihood."""
        true_mean = posterior_mean(c, x_start, x_t)
        kl = normal_kl(true_mean, c.posterior_log_variance_clipped, reverse.mean, reverse.log_variance)
        nll = -discretized_gaussian_log_likelihood(x_start, reverse.mean, 0.5 * reverse.log_variance)
        return torch.where(t == 0, bits_per_dim(nll), bits_per_dim(kl))

    @torch.no_grad()
    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: ModelKwargs | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Sample:
        """The whole variational bound of x_start, in bits per dimension, with one draw of noise a step.

        The result is a dict. ``prior_bpd`` (B,) is KL(q(x_T | x_0) || N(0, 1)). ``vb`` (B, T) holds the terms of the
        steps, and ``total_bpd`` (B,) is their sum plus ``prior_bpd``. ``xstart_mse`` and ``mse``, (B, T) each, are the mean
        square errors of the predicted x_0 and of the predicted noise. T is num_timesteps, and column k is step T − 1 − k.
        """
        x_start, _ = self._check(x_start, step_of(x_start, 0))
        denoiser = Denoiser(model, clip_denoised, model_kwargs=model_kwargs)
        terms = [
            self._bound_terms(denoiser, x_start, step_of(x_start, step), noise_for(x_start, None, generator))
            for step in reversed(range(self.num_timesteps))
        ]
        vb, xstart_mse, mse = (torch.stack(columns, dim=1) for columns in zip(*terms))
        prior_bpd = self._prior_bpd(x_start)
        total_bpd = vb.sum(1) + prior_bpd
        return {
            "total_bpd": total_bpd,
            "prior_bpd": prior_bpd,
            "vb": vb,
            "xstart_mse": xstart_mse,
            "mse": mse,
        }

    def _bound_terms(self, denoiser: Denoiser, x_start: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.schedule.at(t, x_start)
        x_t = diffuse(c, x_start, noise)
        reverse = self._reverse(denoiser, c, x_t, t)
        epsilon = epsilon_from_xstart(c, x_t, reverse.pred_xstart)
        return (
            self._variational_term(reverse, c, x_start, x_t, t),
            mean_flat((reverse.pred_xstart - x_start).square()),
            mean_flat((epsilon - noise).square()),
        )

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        mean, _, log_variance = self.q_mean_variance(x_start, step_of(x_start, self.num_timesteps - 1))
        zero = torch.zeros_like(mean)
        return bits_per_dim(normal_kl(mean, log_variance, zero, zero))

    def _check(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x in the dtype of the computation, and t. The errors are those of widened and check_timesteps."""
        x = widened(x)
        check_timesteps(t, x, self.num_timesteps)
        return x, t


def step_of(x: Tensor, index: int) -> Tensor:
    """Step ``index`` for each sample of x, (B,) int64."""
    # full() writes on the device itself. A tensor made from a list would be copied there at every step.
    return torch.full(x.shape[:1], index, dtype=torch.int64, device=x.device)


# ---- Formulas, elementwise over x (B, C, …) with coefficients (B, 1, …) ----------------------------------------------


def diffuse(c: Coefficients, x_start: Tensor, noise: Tensor) -> Tensor:
    return c.sqrt_alphas_cumprod * x_start + c.sqrt_one_minus_alphas_cumprod * noise


def posterior_mean(c: Coefficients, x_start: Tensor, x_t: Tensor) -> Tensor:
    return c.posterior_mean_coef1 * x_start + c.posterior_mean_coef2 * x_t


def xstart_from_epsilon(c: Coefficients, x_t: Tensor, epsilon: Tensor) -> Tensor:
    return c.sqrt_recip_alphas_cumprod * x_t - c.sqrt_recipm1_alphas_cumprod * epsilon


def epsilon_from_xstart(c: Coefficients, x_t: Tensor, x_start: Tensor) -> Tensor:
    return (c.sqrt_recip_alphas_cumprod * x_t - x_start) / c.sqrt_recipm1_alphas_cumprod
