"""The autoencoder between images and the latents that a DiT learns: diffusers' AutoencoderKL, used while training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMED = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


class VAE:
    """A frozen AutoencoderKL.

    Args:
        autoencoder: diffusers' module; it is put in eval mode.

    Attributes:
        channels: of a latent.
        factor: edge of an image over edge of its latent.
        scale, shift: a latent is (z − shift)·scale.
    """

    def __init__(self, autoencoder: Any) -> None:
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        config = autoencoder.config
        self.channels: int = config.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.scale: float = config.scaling_factor
        self.shift: float = getattr(config, "shift_factor", None) or 0.0

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of z, each (B, channels, H / factor, W / factor), of images (B, 3, H, W) in [-1, 1]."""
        found = self.autoencoder.encode(images).latent_dist
        return found.mean, found.std

    def latents(self, images: Tensor, noise: Tensor) -> Tensor:
        """A draw from the posterior, scaled; ``noise``: standard normals of a latent's shape."""
        mean, std = self.posterior(images)
        return (mean + std * noise - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), nominally in [-1, 1], of scaled latents."""
        return self.autoencoder.decode(latents / self.scale + self.shift).sample

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, H, W) of the latent of a square image.

        Raises:
            ValueError: the autoencoder does not divide such an image evenly.
        """
        if image_size % self.factor:
            raise ValueError(
                f"image_size: got {image_size}, the VAE needs a multiple of {self.factor}, by which it shrinks images"
            )
        return self.channels, image_size // self.factor, image_size // self.factor


def load_vae(name: str, device: torch.device) -> VAE:
    """The autoencoder of that name; nothing is downloaded.

    Args:
        name: "ema" or "mse", the fine-tuned autoencoders of the public DiT, from the local Hugging Face cache; or a folder that
            ``AutoencoderKL.save_pretrained`` wrote.
        device: where it goes; it stays in fp32.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: no such autoencoder here; the message says how to get it.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError(
            f"a VAE needs diffusers ({error}): pip install ditkernels[vae]; --vae none trains on pixels"
        ) from error
    if name not in NAMED and not Path(name).is_dir():
        raise ValueError(f"vae: got {name!r}, which is no folder; allowed are ema, mse, a folder, none")
    source: str | os.PathLike[str] = NAMED.get(name, name)
    try:
        found = AutoencoderKL.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        if name in NAMED:
            raise ValueError(
                f"vae: {source} is not in the local Hugging Face cache; 'hf download {source}' fetches it, "
                "or --vae takes the folder of a copy"
            ) from error
        raise ValueError(f"vae: {name} holds no AutoencoderKL: {error}") from error
    return VAE(found.to(device))
