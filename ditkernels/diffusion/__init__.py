"""Diffusion: noise schedules, losses and samplers. This is mathematics only: nothing here knows a kernel or a device."""

from __future__ import annotations

from collections.abc import Sequence

from ditkernels.diffusion.public import LossType, ModelMeanType, ModelVarType
from ditkernels.diffusion.sampling import GaussianDiffusion
from ditkernels.diffusion.schedule import (
    FloatArray,
    NoiseSchedule,
    named_beta_schedule,
    space_timesteps,
    uniform_log_snr_timesteps,
)

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "NoiseSchedule",
    "create_diffusion",
    "named_beta_schedule",
    "space_timesteps",
]


def create_diffusion(
    timestep_respacing: str | int | Sequence[int] | None,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = 1000,
) -> GaussianDiffusion:
    """The diffusion of DiT: train with ``create_diffusion("")``, sample with ``create_diffusion("250")``.

    ``timestep_respacing`` says which of the ``diffusion_steps`` the chain keeps. "" keeps all of them. "250", "10,15,20",
    "ddim50" and a list of steps per section mean what :func:`space_timesteps` says. "logsnr20" gives 20 fractions of
    timesteps at equal distances in log-SNR, for solvers of the ODE (:func:`uniform_log_snr_timesteps`).

    ``noise_schedule`` is "linear" or "squaredcos_cap_v2", also called "cosine". With ``predict_xstart`` the model predicts
    x_0, otherwise the noise. With ``learn_sigma`` it also returns v, which interpolates the variance. Otherwise the
    variance is fixed, at β̃ if ``sigma_small`` and at β if not.

    With ``use_kl`` the loss is the variational bound times the number of steps. Otherwise it is the mean square error, to
    which a learned variance adds the variational term. ``rescale_learned_sigmas`` multiplies that term by
    num_timesteps / 1000. As in the public DiT, ``sigma_small`` has no effect on a learned variance, and
    ``rescale_learned_sigmas`` has none under ``use_kl`` or a fixed variance.

    Raises ValueError or TypeError for a schedule, respacing or number of steps that does not exist. The message says what
    does.
    """
    betas = named_beta_schedule(noise_schedule, diffusion_steps)
    schedule = NoiseSchedule(betas, _timesteps(betas, timestep_respacing))
    fixed = "fixed_small" if sigma_small else "fixed_large"
    squared_error = "rescaled_mse" if rescale_learned_sigmas else "mse"
    return GaussianDiffusion(
        schedule,
        prediction="x_start" if predict_xstart else "epsilon",
        variance="learned_range" if learn_sigma else fixed,
        loss="rescaled_kl" if use_kl else squared_error,
    )


def _timesteps(betas: FloatArray, respacing: str | int | Sequence[int] | None) -> Sequence[float]:
    if not isinstance(respacing, str) or not respacing.startswith("logsnr"):
        return space_timesteps(len(betas), respacing)
    number = respacing.removeprefix("logsnr")
    if not number.isdecimal():
        raise ValueError(f"timestep_respacing: got {respacing!r}, allowed after 'logsnr' is a number, as in 'logsnr20'")
    return uniform_log_snr_timesteps(betas, int(number))
