"""Guided samples of one batch: the trajectory from keyed noise to images, by any of the solvers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ditkernels.diffusion import GaussianDiffusion
from ditkernels.diffusion.sampling import with_bar
from ditkernels.reference import DiT
from ditkernels.rng import Stream, normals
from ditkernels.runtime import StopSignal
from ditkernels.sampling.config import SampleConfig
from ditkernels.sampling.denoiser import MODULATION_BYTES, Denoiser


def sample(
    model: DiT,
    diffusion: GaussianDiffusion,
    labels: Tensor | Sequence[int],
    config: SampleConfig,
    *,
    indices: Tensor | None = None,
    progress: bool = False,
    modulation_bytes: int = MODULATION_BYTES,
) -> Tensor:
    """One sample for each of `labels`, (B, C, H, W) float32 on the model's device.

    Arguments and errors as of :func:`sample_progressive`. The same seed and indices give the same samples on the same
    device with the same batch size and number of threads.
    """
    states = sample_progressive(
        model,
        diffusion,
        labels,
        config,
        indices=indices,
        progress=progress,
        modulation_bytes=modulation_bytes,
    )
    return deque(states, maxlen=1).pop()


def sample_progressive(
    model: DiT,
    diffusion: GaussianDiffusion,
    labels: Tensor | Sequence[int],
    config: SampleConfig,
    *,
    indices: Tensor | None = None,
    progress: bool = False,
    modulation_bytes: int = MODULATION_BYTES,
) -> Iterator[Tensor]:
    """`sample`, yielding the state (B, C, H, W) after each of the `diffusion.num_timesteps` steps.

    Args:
        model: in eval mode; for the best samples, the moving average of the trained weights.
        diffusion: usually respaced, `create_diffusion("250")`.
        labels: (B,) integers in 0..num_classes; num_classes is the null class.
        config: see SampleConfig.
        indices: (B,) int64, which images these are: an image's noise depends on its index, not on its place in the batch.
            Default: 0..B-1.
        progress: show a bar.
        modulation_bytes: memory for the shifts, scales and gates of many timesteps, computed ahead in one go; at least one
            timestep's are. 0 leaves them to the blocks.

    Raises:
        TypeError, ValueError: labels that are no integers, are not (B,), are none or out of range; guidance
            of a model without a null class; an interval that holds no step; a model in train mode, which would drop labels.
    """
    if model.training:
        raise ValueError("model: got one in train mode, which drops labels; allowed is model.eval()")
    labels = _check_labels(model, labels)
    indices = _check_indices(indices, labels)
    config = config.for_channels(model.in_channels)
    assert not isinstance(config.guided_channels, str)
    denoiser = Denoiser(
        model,
        labels,
        [float(t) for t in diffusion.timestep_map],
        scale=config.guidance_scale,
        guided_channels=config.guided_channels,
        interval=config.guidance_interval,
        modulation_bytes=modulation_bytes,
    )
    return _trajectory(denoiser, diffusion, config, indices, (model.in_channels, *model.input_size), progress)


def last_unless_stopped(states: Iterator[Tensor], stop: StopSignal) -> Tensor:
    """The last of the states; Stopped, if a signal comes between two."""

    def checked() -> Iterator[Tensor]:
        for state in states:
            stop.check()
            yield state

    return deque(checked(), maxlen=1).pop()


Step = Callable[[Tensor, Tensor, int], Tensor]


def _trajectory(
    denoiser: Denoiser,
    diffusion: GaussianDiffusion,
    config: SampleConfig,
    indices: Tensor,
    shape: tuple[int, ...],
    progress: bool,
) -> Iterator[Tensor]:
    def noise(step: int) -> Tensor:
        return normals(config.seed, Stream.SAMPLING_NOISE, step, indices, shape)

    step = _solver(denoiser, diffusion, config, noise)
    x = noise(0)
    steps = range(diffusion.num_timesteps)[::-1]
    for taken, index in enumerate(with_bar(steps) if progress else steps, start=1):
        with torch.no_grad():
            denoiser.move_to(index)
            x = step(x, torch.full_like(indices, index), taken)
        yield x


def _solver(denoiser: Denoiser, diffusion: GaussianDiffusion, config: SampleConfig, noise: Callable[[int], Tensor]) -> Step:
    """One step (x, t, number of the step, counted from 1) -> x of the config's solver."""
    clip = config.clip_denoised
    if config.solver == "ddim":
        return lambda x, t, taken: diffusion.ddim_sample(denoiser, x, t, clip)["sample"]
    if config.solver == "ddpm":

        def ancestral(x: Tensor, t: Tensor, taken: int) -> Tensor:
            # The last step adds none.
            drawn = noise(taken) if taken < diffusion.num_timesteps else torch.zeros_like(x)
            return diffusion.p_sample(denoiser, x, t, clip, noise=drawn)["sample"]

        return ancestral
    previous: Tensor | None = None

    def multistep(x: Tensor, t: Tensor, taken: int) -> Tensor:
        nonlocal previous
        result = diffusion.dpm_solver_sample(denoiser, x, t, clip, previous=previous)
        previous = result["pred_xstart"]
        return result["sample"]

    return multistep


def _check_labels(model: DiT, labels: Tensor | Sequence[int]) -> Tensor:
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, allowed is (B,) with B at least 1")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels: got {labels.dtype}, allowed are integers")
    last = model.y_embedder.rows - 1
    outside = labels[(labels < 0) | (labels > last)]
    if len(outside):
        raise ValueError(f"labels: got {outside[0].item()}, allowed are 0..{last}")
    return labels.to(device=next(model.parameters()).device, dtype=torch.int64)


def _check_indices(indices: Tensor | None, labels: Tensor) -> Tensor:
    if indices is None:
        return torch.arange(len(labels), device=labels.device)
    if indices.shape != labels.shape or indices.dtype != torch.int64:
        raise ValueError(f"indices: got {indices.dtype} of shape {tuple(indices.shape)}, allowed is int64 of {tuple(labels.shape)}")
    return indices.to(labels.device)
