"""Guided samples from a DiT."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditkernels.diffusion import GaussianDiffusion
from ditkernels.reference import DiT

SOLVERS = ("ddpm", "ddim")


@dataclass(frozen=True)
class SampleConfig:
    """How to draw samples; the defaults are those of the public DiT's sample.py.

    Args:
        solver: "ddpm" (ancestral, with the learned variance where there is one) or "ddim" (deterministic from
            the starting noise on).
        guidance_scale: uncond + scale·(cond − uncond) (Ho & Salimans 2022). 1 is the conditional model, for
            which the unconditional half is not computed; 0 the unconditional one.
        guided_channels: how many of the predicted noise's channels are guided: the first 3, as in the
            published samples, or all (None).
        clip_denoised: clip the predicted x_0 to [-1, 1] at every step: for pixels, not for latents.
        seed: fixes the starting noise and that of every step.

    Raises:
        ValueError: a value out of range.
    """

    solver: str = "ddpm"
    guidance_scale: float = 4.0
    guided_channels: int | None = 3
    clip_denoised: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver: got {self.solver!r}, allowed are {', '.join(map(repr, SOLVERS))}")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"guidance_scale: got {self.guidance_scale}, allowed is 0 or more")
        if self.guided_channels is not None and self.guided_channels < 1:
            raise ValueError(f"guided_channels: got {self.guided_channels}, allowed is 1 or more, or None")
        if not 0 <= self.seed < 2**32:
            # torch's CPU generator reads the low 32 bits only.
            raise ValueError(f"seed: got {self.seed}, allowed are 0..{2**32 - 1}")


def sample(
    model: DiT,
    diffusion: GaussianDiffusion,
    labels: Tensor | Sequence[int],
    config: SampleConfig,
    *,
    progress: bool = False,
) -> Tensor:
    """One sample for each of `labels`, (B, C, H, W) float32 on the model's device.

    Arguments and errors as of :func:`sample_progressive`. The same seed gives the same samples on the same
    device with the same number of threads.
    """
    return deque(sample_progressive(model, diffusion, labels, config, progress=progress), maxlen=1).pop()


def sample_progressive(
    model: DiT,
    diffusion: GaussianDiffusion,
    labels: Tensor | Sequence[int],
    config: SampleConfig,
    *,
    progress: bool = False,
) -> Iterator[Tensor]:
    """`sample`, yielding the state (B, C, H, W) after each of the `diffusion.num_timesteps` steps.

    Args:
        model: in eval mode; for the best samples, the moving average of the trained weights.
        diffusion: usually respaced, `create_diffusion("250")`.
        labels: (B,) integers in 0..num_classes; num_classes is the null class.
        config: see SampleConfig.
        progress: show a bar.

    Raises:
        TypeError, ValueError: labels that are no integers, are not (B,), are none or out of range; guidance
            of a model without a null class; a model in train mode, which would drop labels.
    """
    if model.training:
        raise ValueError("model: got one in train mode, which drops labels; allowed is model.eval()")
    labels = _check_labels(model, labels)
    loops = {"ddpm": diffusion.p_sample_loop_progressive, "ddim": diffusion.ddim_sample_loop_progressive}
    steps = loops[config.solver](
        _denoiser(model, labels, config),
        (len(labels), model.in_channels, *model.input_size),
        clip_denoised=config.clip_denoised,
        device=labels.device,
        progress=progress,
        generator=torch.Generator(labels.device).manual_seed(config.seed),
    )
    return (step["sample"] for step in steps)


def _denoiser(model: DiT, labels: Tensor, config: SampleConfig) -> _Conditional | _Guided:
    if config.guidance_scale == 1:
        return _Conditional(model, labels)
    if _label_rows(model) == model.num_classes:
        raise ValueError(
            f"guidance_scale: got {config.guidance_scale}, allowed is 1: the model has no null class, "
            "as it was made with class_dropout_prob 0"
        )
    return _Guided(model, labels, config.guidance_scale, config.guided_channels)


class _Conditional:
    def __init__(self, model: DiT, labels: Tensor) -> None:
        self.model = model
        self.labels = labels

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x, t, self.labels)


class _Guided:
    """The guided prediction: the batch is doubled on its way into the model, so no solver sees two halves."""

    def __init__(self, model: DiT, labels: Tensor, scale: float, guided_channels: int | None) -> None:
        self.model = model
        self.labels = torch.cat([labels, torch.full_like(labels, model.num_classes)])
        self.scale = scale
        self.guided_channels = guided_channels

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        doubled = self.model.forward_with_cfg(
            torch.cat([x, x]), torch.cat([t, t]), self.labels, self.scale, self.guided_channels
        )
        return doubled[: len(x)]


def _check_labels(model: DiT, labels: Tensor | Sequence[int]) -> Tensor:
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, allowed is (B,) with B at least 1")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels: got {labels.dtype}, allowed are integers")
    last = _label_rows(model) - 1
    outside = labels[(labels < 0) | (labels > last)]
    if len(outside):
        raise ValueError(f"labels: got {outside[0].item()}, allowed are 0..{last}")
    return labels.to(device=next(model.parameters()).device, dtype=torch.int64)


def _label_rows(model: DiT) -> int:
    return model.y_embedder.embedding_table.num_embeddings
