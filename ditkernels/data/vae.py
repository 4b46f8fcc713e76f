"""The autoencoder between images and the latents that a DiT learns: diffusers' AutoencoderKL, used while training or before."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkernels.checkpoints.format import state_sha256

NAMED = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
ENCODER = ("encoder.", "quant_conv.")


@dataclass(frozen=True)
class LatentSpace:
    """What the numbers of a latent mean. Latents and VAE belong together where all of this is equal.

    Attributes:
        encoder_sha256: over the encoder's weights. The decoder is left out: "ema" and "mse" are two decoders of one encoder, with
            the same latents.
        channels: of a latent.
        factor: edge of an image over edge of its latent.
        scale, shift: a latent is (z − shift)·scale.
    """

    encoder_sha256: str
    channels: int
    factor: int
    scale: float
    shift: float

    def draw(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """The latent of z = mean + std·noise; ``noise``: standard normals of the shape of ``mean``."""
        return (mean + std * noise - self.shift) * self.scale

    def differences(self, other: LatentSpace) -> list[str]:
        """What is not equal: "scale: 0.5 there, 1.0 here", where here is ``other``."""
        there, here = asdict(self), asdict(other)
        return [f"{name}: {there[name]} there, {here[name]} here" for name in there if there[name] != here[name]]


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

    @property
    def device(self) -> torch.device:
        """Where it is."""
        found: torch.device = self.autoencoder.device
        return found

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of z, each (B, channels, H / factor, W / factor), of images (B, 3, H, W) in [-1, 1]."""
        found = self.autoencoder.encode(images).latent_dist
        return found.mean, found.std

    @cached_property
    def space(self) -> LatentSpace:
        """What its latents mean."""
        weights = self.autoencoder.state_dict()
        encoder = {name: weights[name] for name in weights if name.startswith(ENCODER)}
        return LatentSpace(state_sha256(encoder), self.channels, self.factor, self.scale, self.shift)

    def latents(self, images: Tensor, noise: Tensor) -> Tensor:
        """A draw from the posterior, scaled; ``noise``: standard normals of a latent's shape."""
        return self.space.draw(*self.posterior(images), noise)

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
            raise ValueError(f"image_size: got {image_size}, the VAE needs a multiple of {self.factor}, by which it shrinks images")
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
        raise ImportError(f"a VAE needs diffusers ({error}): pip install ditkernels[vae]; --vae none trains on pixels") from error
    if name not in NAMED and not Path(name).is_dir():
        raise ValueError(f"vae: got {name!r}, which is no folder; allowed are ema, mse, a folder, none")
    source: str | os.PathLike[str] = NAMED.get(name, name)
    try:
        found = AutoencoderKL.from_pretrained(source, local_files_only=True, low_cpu_mem_usage=False)
    except (OSError, ValueError) as error:
        if name in NAMED:
            raise ValueError(
                f"vae: {source} is not in the local Hugging Face cache; 'hf download {source}' fetches it, "
                "or --vae takes the folder of a copy"
            ) from error
        raise ValueError(f"vae: {name} holds no AutoencoderKL: {error}") from error
    return VAE(found.to(device))
