"""The names of the public DiT's diffusion object: its tables, its enums, and the methods that programs reach into it for.

Tables are (T,) float64, T steps of the (respaced) chain. Tensors follow the conventions of gaussian.py, and the formulas are those
of the papers named there.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ditkernels.diffusion.gaussian import (
    CondFn,
    Denoiser,
    DiffusionProcess,
    Model,
    ModelKwargs,
    Sample,
    epsilon_from_xstart,
    posterior_mean,
    xstart_from_epsilon,
)
from ditkernels.diffusion.inputs import check_like
from ditkernels.diffusion.schedule import FloatArray


class ModelMeanType(enum.Enum):
    """What a model predicts; a diffusion of ours has EPSILON or START_X."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """Where the variance of a step comes from; no diffusion of ours has LEARNED."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """What is minimised."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """Whether it is the variational bound."""
        return self in (LossType.KL, LossType.RESCALED_KL)


_MEANS = {"epsilon": ModelMeanType.EPSILON, "x_start": ModelMeanType.START_X}


class PublicDiffusion(DiffusionProcess):
    """A diffusion process under the public names too."""

    @property
    def model_mean_type(self) -> ModelMeanType:
        return _MEANS[self.prediction]

    @property
    def model_var_type(self) -> ModelVarType:
        return ModelVarType[self.variance.upper()]

    @property
    def loss_type(self) -> LossType:
        return LossType[self.loss.upper()]

    @property
    def original_num_steps(self) -> int:
        return self.schedule.original_num_steps

    @property
    def use_timesteps(self) -> set[Any]:
        """The timesteps of the original chain that are kept: fractions under log-SNR spacing."""
        return set(self.schedule.timestep_map)

    @property
    def alphas_cumprod_prev(self) -> FloatArray:
        return self.schedule.alphas_cumprod_prev

    @property
    def alphas_cumprod_next(self) -> FloatArray:
        return self.schedule.alphas_cumprod_next

    @property
    def sqrt_alphas_cumprod(self) -> FloatArray:
        return self.schedule.table("sqrt_alphas_cumprod")

    @property
    def sqrt_one_minus_alphas_cumprod(self) -> FloatArray:
        return self.schedule.table("sqrt_one_minus_alphas_cumprod")

    @property
    def log_one_minus_alphas_cumprod(self) -> FloatArray:
        return self.schedule.table("log_one_minus_alphas_cumprod")

    @property
    def sqrt_recip_alphas_cumprod(self) -> FloatArray:
        return self.schedule.table("sqrt_recip_alphas_cumprod")

    @property
    def sqrt_recipm1_alphas_cumprod(self) -> FloatArray:
        return self.schedule.table("sqrt_recipm1_alphas_cumprod")

    @property
    def posterior_variance(self) -> FloatArray:
        return self.schedule.table("posterior_variance")

    @property
    def posterior_log_variance_clipped(self) -> FloatArray:
        return self.schedule.table("posterior_log_variance_clipped")

    @property
    def posterior_mean_coef1(self) -> FloatArray:
        return self.schedule.table("posterior_mean_coef1")

    @property
    def posterior_mean_coef2(self) -> FloatArray:
        return self.schedule.table("posterior_mean_coef2")

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_0 of x_t and its noise, like x_t."""
        x_t, t = self._check(x_t, t)
        check_like("eps", eps, x_t)
        return xstart_from_epsilon(self.schedule.at(t, x_t), x_t, eps)

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """The noise of x_t where x_0 is ``pred_xstart``, like x_t."""
        x_t, t = self._check(x_t, t)
        check_like("pred_xstart", pred_xstart, x_t)
        return epsilon_from_xstart(self.schedule.at(t, x_t), x_t, pred_xstart)

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """t itself: original timesteps are the matter of the wrapped model."""
        return t

    def condition_mean(
        self, cond_fn: CondFn, p_mean_var: Mapping[str, Any], x: Tensor, t: Tensor, model_kwargs: ModelKwargs | None = None
    ) -> Tensor:
        """The mean of a step, moved by its variance times the gradient that ``cond_fn`` returns; like x."""
        x, t = self._check(x, t)
        mean: Tensor = p_mean_var["mean"]
        return mean + p_mean_var["variance"] * self._gradient(cond_fn, x, t, model_kwargs)

    def condition_score(
        self, cond_fn: CondFn, p_mean_var: Mapping[str, Any], x: Tensor, t: Tensor, model_kwargs: ModelKwargs | None = None
    ) -> dict[str, Any]:
        """``p_mean_var`` with the ``pred_xstart`` and ``mean`` of a noise moved by −√(1 − ᾱ) times ``cond_fn``'s gradient."""
        x, t = self._check(x, t)
        c = self.schedule.at(t, x)
        gradient = self._gradient(cond_fn, x, t, model_kwargs)
        epsilon = epsilon_from_xstart(c, x, p_mean_var["pred_xstart"]) - c.sqrt_one_minus_alphas_cumprod * gradient
        pred_xstart = xstart_from_epsilon(c, x, epsilon)
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": posterior_mean(c, pred_xstart, x)}

    def _gradient(self, cond_fn: CondFn, x: Tensor, t: Tensor, model_kwargs: ModelKwargs | None) -> Tensor:
        gradient = self._wrap_model(cond_fn)(x, t, **(model_kwargs or {}))
        check_like("cond_fn's result", gradient, x)
        return gradient.to(x.dtype)

    def _vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: ModelKwargs | None = None,
    ) -> Sample:
        """A term of the variational bound, ``output`` (B,) bits per dimension, and ``pred_xstart``, like x_t."""
        x_t, t = self._check(x_t, t)
        check_like("x_start", x_start, x_t)
        c = self.schedule.at(t, x_t)
        reverse = self._reverse(Denoiser(model, clip_denoised, model_kwargs=model_kwargs), c, x_t, t)
        term = self._variational_term(reverse, c, x_start.to(x_t.dtype), x_t, t)
        return {"output": term, "pred_xstart": reverse.pred_xstart}
