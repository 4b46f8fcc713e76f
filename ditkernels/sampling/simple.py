"""Images in one call: of a loaded model, labels and a scale, the bytes that ``ditkernels sample`` writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from ditkernels.checkpoints.model import Loaded
from ditkernels.data.vae import load_vae
from ditkernels.diffusion import GaussianDiffusion, create_diffusion
from ditkernels.reference import DiT
from ditkernels.runtime import pinned_threads
from ditkernels.sampling import drawing
from ditkernels.sampling.config import AUTO, SampleConfig, guided_channels
from ditkernels.sampling.generate import Batches, decoded, draw_batch
from ditkernels.sampling.labels import Labels
from ditkernels.sampling.outputs import Pixels, to_pixels


@overload
def sample(
    model: Loaded | DiT,
    labels: Tensor | Sequence[int],
    *,
    steps: int | str = ...,
    guidance: float = ...,
    seed: int = ...,
    solver: str = ...,
    vae: str | None = ...,
    batch_size: int = ...,
) -> Pixels: ...


@overload
def sample(
    model: DiT, diffusion: GaussianDiffusion, labels: Tensor | Sequence[int], config: SampleConfig, **options: Any
) -> Tensor: ...


def sample(model: Any, *given: Any, **options: Any) -> Any:
    """Images for labels: ``sample(load_model(path), [207, 360], steps=50, guidance=4.0, seed=0)``.

    The long form, ``sample(model, diffusion, labels, config)``, returns what a model draws, latents for instance, as
    :func:`ditkernels.sampling.drawing.sample` says.

    Args:
        model: what ``load_model`` returned, or a DiT in eval mode; on the device that computes.
        labels: (B,) integers in 0..num_classes − 1.
        steps: respacing, as ``ditkernels sample --steps`` takes it (default: 250).
        guidance: scale (default: 4.0); 1 is none.
        seed: same seed, same images (default: 0).
        solver: "ddpm" (default), "ddim" or "dpm_solver".
        vae: what decodes latents (default: the one of the run that trained the model; "none" where it draws pixels).
        batch_size: images at once (default: 16); it decides how they are rounded.

    Returns:
        (B, H, W, 3) uint8, the bytes that ``ditkernels sample`` writes with the same settings on this device.

    Raises:
        ValueError: an argument out of range, or latents without a VAE to decode them.
        ImportError: a VAE needs diffusers.
    """
    if isinstance(given[0] if given else options.get("diffusion"), GaussianDiffusion):
        return drawing.sample(model, *given, **options)
    return _images(model, *given, **options)


def _images(
    model: Loaded | DiT,
    labels: Tensor | Sequence[int],
    *,
    steps: int | str = 250,
    guidance: float = 4.0,
    seed: int = 0,
    solver: str = "ddpm",
    vae: str | None = None,
    batch_size: int = 16,
) -> Pixels:
    dit = model.model if isinstance(model, Loaded) else model
    run = model.training if isinstance(model, Loaded) else {}
    decode = _decoder(dit, vae or run.get("vae"))
    config = SampleConfig(
        solver=solver,
        guidance_scale=guidance,
        guided_channels=guided_channels(run.get("guided_channels", AUTO)),
        clip_denoised=run.get("vae") == "none",
        seed=seed,
    )
    diffusion = create_diffusion(str(steps), learn_sigma=dit.learn_sigma)
    listed = Labels("listed", tuple(torch.as_tensor(labels).tolist()))
    listed.check(dit.num_classes)
    batches = Batches(len(listed.classes), batch_size)
    with pinned_threads(1), torch.no_grad():
        drawn = (draw_batch(dit, diffusion, listed, config, batches, batch) for batch in range(len(batches)))
        return np.concatenate([to_pixels(decoded(part, decode, batch_size)) for part in drawn])


def _decoder(model: DiT, vae: str | None) -> Callable[[Tensor], Tensor] | None:
    if vae is None and model.in_channels not in (1, 3):
        raise ValueError(
            f"vae: got none for a model that draws latents of {model.in_channels} channels; allowed are ema, mse, or a folder"
        )
    return None if vae in (None, "none") else load_vae(vae, next(model.parameters()).device).decode
