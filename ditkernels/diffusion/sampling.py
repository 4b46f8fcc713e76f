"""Samplers: single steps of DDPM (Ho et al. 2020), DDIM (Song et al. 2020) and DPM-Solver++(2M) (Lu et al. 2022), and the
loops over them.

gaussian.py states the conventions, and docs/diffusion.md states the formulas.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ditkernels.diffusion.gaussian import (
    CondFn,
    DenoisedFn,
    Denoiser,
    Model,
    ModelKwargs,
    Sample,
    epsilon_from_xstart,
    step_of,
)
from ditkernels.diffusion.inputs import check_like, noise_for, widened
from ditkernels.diffusion.public import PublicDiffusion
from ditkernels.diffusion.schedule import Coefficients

Diffusion = TypeVar("Diffusion")
Arguments = ParamSpec("Arguments")


def _over_the_steps_of(
    progressive: Callable[Concatenate[Diffusion, Arguments], Iterator[Sample]],
) -> Callable[[Callable[[Diffusion, Iterator[Sample]], Tensor]], Callable[Concatenate[Diffusion, Arguments], Tensor]]:
    """A decorator that gives a method the parameters of ``progressive``. The body gets the steps that ``progressive`` yields.

    Type checkers, help() and inspect.signature() see those parameters, and the type that the method returns.
    """

    def decorate(method: Callable[[Diffusion, Iterator[Sample]], Tensor]) -> Callable[Concatenate[Diffusion, Arguments], Tensor]:
        @wraps(method)
        def loop(self: Diffusion, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
            # The lookup by name lets a subclass change the loop by overriding the progressive method alone.
            steps = getattr(self, progressive.__name__)(*args, **kwargs)
            return method(self, steps)

        returned = inspect.signature(method).return_annotation
        loop.__annotations__ = progressive.__annotations__ | {"return": returned}
        loop.__signature__ = inspect.signature(progressive).replace(return_annotation=returned)  # type: ignore[attr-defined]
        return loop

    return decorate


class GaussianDiffusion(PublicDiffusion):
    """A diffusion to train on and to draw from. :func:`ditkernels.diffusion.create_diffusion` makes one."""

    # --------------------------------------------------------------------------------------------------------
    # One step of a sampler
    # --------------------------------------------------------------------------------------------------------

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs | None = None,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Sample:
        """x_{t−1} from x_t by ancestral sampling (DDPM): a dict of ``sample`` and ``pred_xstart``, each like x.

        The step at t = 0 adds no noise. ``cond_fn(x, timesteps, **model_kwargs)`` returns ∇ log p(y | x), of x's shape. The
        step adds the variance times this gradient to the mean.
        """
        x, t = self._check(x, t)
        denoiser = Denoiser(model, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return self._ddpm_step(denoiser, x, t, noise_for(x, noise, generator))

    def _ddpm_step(self, denoiser: Denoiser, x: Tensor, t: Tensor, noise: Tensor) -> Sample:
        reverse = self._reverse(denoiser, self.schedule.at(t, x), x, t)
        mean = reverse.mean
        if denoiser.cond_fn is not None:
            mean = self.condition_mean(denoiser.cond_fn, reverse._asdict(), x, t, denoiser.model_kwargs)
        noisy = (t > 0).view(-1, *[1] * (x.ndim - 1))
        return {
            "sample": mean + noisy * torch.exp(0.5 * reverse.log_variance) * noise,
            "pred_xstart": reverse.pred_xstart,
        }

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs | None = None,
        eta: float = 0.0,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Sample:
        """x_{t−1} from x_t by DDIM: a dict of ``sample`` and ``pred_xstart``, each like x.

        The step adds noise of standard deviation σ = eta·√β̃. With eta = 0 it is deterministic and draws no noise. With
        eta = 1 it is DDPM with the fixed small variance. A learned variance plays no part. ``cond_fn`` shifts the
        predicted noise by −√(1 − ᾱ) times its gradient. Raises ValueError for eta outside [0, 1].
        """
        x, t = self._check(x, t)
        _check_eta(eta)
        denoiser = Denoiser(model, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return self._ddim_step(denoiser, x, t, eta, noise_for(x, noise, generator) if eta else None)

    def _ddim_step(self, denoiser: Denoiser, x: Tensor, t: Tensor, eta: float, noise: Tensor | None) -> Sample:
        c = self.schedule.at(t, x)
        pred_xstart, epsilon = self._denoise(denoiser, c, x, t)
        # This is 1 − ᾱ_prev − σ² without the difference, which at long strides would cancel, even to below zero.
        squared = (1 - eta**2) * c.one_minus_alphas_cumprod_prev
        squared = squared + eta**2 * c.posterior_mean_coef2.square() * c.one_minus_alphas_cumprod
        sample = c.sqrt_alphas_cumprod_prev * pred_xstart + squared.sqrt() * epsilon
        if noise is not None:
            sample = sample + eta * c.posterior_variance.sqrt() * noise
        return {"sample": sample, "pred_xstart": pred_xstart}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs | None = None,
    ) -> Sample:
        """x_{t+1} from x_t by DDIM run backwards: a dict of ``sample`` and ``pred_xstart``, each like x.

        ᾱ counts as 0 after the last step, so the sample there is the predicted noise itself.
        """
        x, t = self._check(x, t)
        denoiser = Denoiser(model, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return self._ddim_reverse_step(denoiser, x, t)

    def _ddim_reverse_step(self, denoiser: Denoiser, x: Tensor, t: Tensor) -> Sample:
        c = self.schedule.at(t, x)
        pred_xstart, epsilon = self._denoise(denoiser, c, x, t)
        sample = c.sqrt_alphas_cumprod_next * pred_xstart + c.sqrt_one_minus_alphas_cumprod_next * epsilon
        return {"sample": sample, "pred_xstart": pred_xstart}

    def dpm_solver_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs | None = None,
        *,
        previous: Tensor | None = None,
    ) -> Sample:
        """x_{t−1} from x_t by DPM-Solver++(2M): a dict of ``sample`` and ``pred_xstart``, each like x.

        The step is deterministic. ``previous``, like x, is the ``pred_xstart`` of the step before, at t + 1. Without it the
        step is of first order, which is DDIM's. A learned variance plays no part. ``cond_fn`` acts as in ddim_sample.
        """
        x, t = self._check(x, t)
        if previous is not None:
            previous = widened(previous, "previous")
            check_like("previous", previous, x)
        denoiser = Denoiser(model, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return self._dpm_solver_step(denoiser, x, t, previous)

    def _dpm_solver_step(self, denoiser: Denoiser, x: Tensor, t: Tensor, previous: Tensor | None) -> Sample:
        c = self.schedule.at(t, x)
        pred_xstart, _ = self._denoise(denoiser, c, x, t)
        data = pred_xstart
        if previous is not None:
            data = data + c.solver_history_coef * (data - previous)
        return {
            "sample": c.solver_state_coef * x + c.solver_data_coef * data,
            "pred_xstart": pred_xstart,
        }

    def _denoise(self, denoiser: Denoiser, c: Coefficients, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted x_0, clipped and guided, and the noise that goes with it: samplers of the ODE step on these."""
        if denoiser.cond_fn is None:
            output, _, _ = self._call(denoiser, x, t)
            pred_xstart = self._predict_xstart(denoiser, c, x, output)
        else:
            moved = self.condition_score(denoiser.cond_fn, self._reverse(denoiser, c, x, t)._asdict(), x, t, denoiser.model_kwargs)
            pred_xstart = moved["pred_xstart"]
        return pred_xstart, epsilon_from_xstart(c, x, pred_xstart)

    # --------------------------------------------------------------------------------------------------------
    # Whole trajectories. Autograd is off inside a step, and as the caller has it between steps.
    # --------------------------------------------------------------------------------------------------------

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> Iterator[Sample]:
        """p_sample_loop as an iterator over the results of its steps: num_timesteps dicts like those of p_sample.

        The call checks the arguments. The model first runs at the first ``next``.
        """
        x = _starting_noise(model, shape, noise, device, generator)
        denoiser = Denoiser(model, clip_denoised, denoised_fn, cond_fn, model_kwargs)

        def step(x: Tensor, t: Tensor) -> Sample:
            return self._ddpm_step(denoiser, x, t, noise_for(x, None, generator))

        return _trajectory(step, x, range(self.num_timesteps)[::-1], progress)

    @_over_the_steps_of(p_sample_loop_progressive)
    def p_sample_loop(self, steps: Iterator[Sample]) -> Tensor:
        """Samples of ``shape`` (B, C, …) by DDPM over all steps, starting from ``noise`` (default: drawn).

        The samples are float64 if ``noise`` is, and float32 otherwise. ``device`` is by default that of ``noise``, or
        without ``noise`` that of the model's parameters. ``progress`` shows a tqdm bar. ``generator`` draws the noise of
        the steps, and the starting noise too unless ``noise`` is given. The other arguments are those of p_sample. Raises
        ValueError where shape, noise and device contradict each other, or where nothing names a device.
        """
        return _last_sample(steps)

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        generator: torch.Generator | None = None,
    ) -> Iterator[Sample]:
        """ddim_sample_loop as an iterator over the results of its steps: num_timesteps dicts like those of ddim_sample."""
        _check_eta(eta)
        x = _starting_noise(model, shape, noise, device, generator)
        denoiser = Denoiser(model, clip_denoised, denoised_fn, cond_fn, model_kwargs)

        def step(x: Tensor, t: Tensor) -> Sample:
            return self._ddim_step(denoiser, x, t, eta, noise_for(x, None, generator) if eta else None)

        return _trajectory(step, x, range(self.num_timesteps)[::-1], progress)

    @_over_the_steps_of(ddim_sample_loop_progressive)
    def ddim_sample_loop(self, steps: Iterator[Sample]) -> Tensor:
        """Samples of ``shape`` (B, C, …) by DDIM over all steps: as p_sample_loop, with the ``eta`` of ddim_sample."""
        return _last_sample(steps)

    def dpm_solver_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> Iterator[Sample]:
        """dpm_solver_sample_loop as an iterator over the results of its steps: num_timesteps dicts like dpm_solver_sample's."""
        x = _starting_noise(model, shape, noise, device, generator)
        denoiser = Denoiser(model, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        previous: Tensor | None = None

        def step(x: Tensor, t: Tensor) -> Sample:
            nonlocal previous
            result = self._dpm_solver_step(denoiser, x, t, previous)
            previous = result["pred_xstart"]
            return result

        return _trajectory(step, x, range(self.num_timesteps)[::-1], progress)

    @_over_the_steps_of(dpm_solver_sample_loop_progressive)
    def dpm_solver_sample_loop(self, steps: Iterator[Sample]) -> Tensor:
        """Samples of ``shape`` (B, C, …) by DPM-Solver++(2M) over all steps: as p_sample_loop."""
        return _last_sample(steps)

    def ddim_reverse_sample_loop_progressive(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs | None = None,
        progress: bool = False,
    ) -> Iterator[Sample]:
        """ddim_reverse_sample_loop as an iterator over the results of its steps: num_timesteps − 1 dicts."""
        x, _ = self._check(x_start, step_of(x_start, 0))
        denoiser = Denoiser(model, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        step = partial(self._ddim_reverse_step, denoiser)
        return _trajectory(step, x, range(self.num_timesteps - 1), progress)

    @_over_the_steps_of(ddim_reverse_sample_loop_progressive)
    def ddim_reverse_sample_loop(self, steps: Iterator[Sample]) -> Tensor:
        """The latent, like x_start, from which ``ddim_sample_loop(noise=latent)`` comes back to x_start.

        x_start counts as the state at step 0. From there num_timesteps − 1 steps lead to the state at the last step, where
        sampling begins. The return is exact for a model whose prediction does not change along a step. For others it is
        exact up to the ODE's discretisation.
        """
        return _last_sample(steps)


# ---- Trajectories ----------------------------------------------------------------------------------------------------


def _trajectory(step: Callable[[Tensor, Tensor], Sample], x: Tensor, steps: Sequence[int], progress: bool) -> Iterator[Sample]:
    """Feeds x through ``step(x, t)`` for each of ``steps`` and yields the results. The "sample" of one is the next x.

    All samplers share this loop. A sampler that looks back at earlier predictions keeps them in its ``step``.
    """
    for index in with_bar(steps) if progress else steps:
        with torch.no_grad():
            result = step(x, step_of(x, index))
        x = result["sample"]
        yield result


def with_bar(steps: Sequence[int]) -> Iterator[int]:
    """The steps of a trajectory, with a bar that shows how far it is."""
    from tqdm.auto import tqdm

    return iter(tqdm(steps))


def _last_sample(results: Iterator[Sample]) -> Tensor:
    return deque(results, maxlen=1).pop()["sample"]


def _starting_noise(
    model: Model,
    shape: Sequence[int],
    noise: Tensor | None,
    device: torch.device | str | None,
    generator: torch.Generator | None,
) -> Tensor:
    shape = tuple(shape)
    if noise is None:
        return widened(torch.randn(shape, device=_device_for(model, device), dtype=torch.float32, generator=generator))
    noise = widened(noise, "noise")
    if tuple(noise.shape) != shape:
        raise ValueError(f"noise: got shape {tuple(noise.shape)}, allowed is that of the samples, {shape}")
    if device is not None and not _same_device(noise.device, torch.device(device)):
        raise ValueError(f"noise: got a tensor on {noise.device}, allowed is one on device={device}")
    return noise


def _same_device(actual: torch.device, asked: torch.device) -> bool:
    return actual.type == asked.type and asked.index in (None, actual.index)


def _device_for(model: Model, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    parameter = next(owner.parameters(), None) if isinstance(owner, nn.Module) else None
    if parameter is None:
        raise ValueError("device: got None, and no noise or model parameters to take it from; allowed is any torch device")
    return parameter.device


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta}, allowed are 0 (deterministic) to 1 (as noisy as DDPM)")
