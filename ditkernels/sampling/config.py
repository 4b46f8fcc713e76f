"""How samples are drawn and written: one dataclass, and the names that its values and the command's flags are chosen from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral

SOLVERS = ("ddpm", "ddim", "dpm_solver")
FORMATS = ("png", "grid", "npz", "latents")
SCHEMES = ("balanced", "random", "spread", "data", "listed")
AUTO = "auto"
GUIDED_CHANNELS = "guided channels of the predicted noise: a number, all, or auto: 3 of 4, as in DiT's published samples, else all"


def guided_channels(text: str) -> int | str | None:
    """What ``SampleConfig.guided_channels`` is for a number, "all" or "auto". Raises ValueError for anything else."""
    if text in (AUTO, "all"):
        return None if text == "all" else AUTO
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"guided_channels: got {text!r}, allowed is a number from 1 on, all or auto")
    return int(text)


@dataclass(frozen=True)
class SampleConfig:
    """How to draw samples; the defaults are those of the public DiT's sample.py.

    Args:
        solver: "ddpm" (ancestral, with the learned variance where there is one); "ddim" or "dpm_solver" (DPM-Solver++(2M)),
            deterministic from the starting noise on.
        guidance_scale: uncond + scale·(cond − uncond) (Ho & Salimans 2022). 1 is the conditional model, for
            which the unconditional half is not computed; 0 is the null class, in every channel and the variance, for
            which the conditional half is not.
        guided_channels: how many of the predicted noise's channels are guided, the first ones; None: all. "auto": 3 of 4, which
            belongs to DiT's published samples of four latent channels; of any other number all.
        clip_denoised: clip the predicted x_0 to [-1, 1] at every step: for pixels, not for latents.
        seed: 0..2**64-1; with an image's index it fixes the image's noise, the starting one and that of every step.
        guidance_interval: (low, high), original timesteps, 0 the cleanest and 999 the noisiest: steps with
            low <= timestep <= high are guided, both ends included, the others conditional (Kynkäänniemi et al. 2024,
            arXiv 2404.07724). None guides all.

    Raises:
        ValueError: a value out of range.
    """

    solver: str = "ddpm"
    guidance_scale: float = 4.0
    guided_channels: int | str | None = AUTO
    clip_denoised: bool = False
    seed: int = 0
    guidance_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver: got {self.solver!r}, allowed are {', '.join(map(repr, SOLVERS))}")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"guidance_scale: got {self.guidance_scale}, allowed is 0 or more")
        if not _is_count(self.guided_channels) and self.guided_channels not in (None, AUTO):
            raise ValueError(f"guided_channels: got {self.guided_channels!r}, allowed is 1 or more, None for all, or {AUTO!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: got {self.seed!r}, allowed are the whole numbers 0..{2**64 - 1}")
        # JSON knows no integers of numpy.
        object.__setattr__(self, "seed", int(self.seed))
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not low <= high:
                raise ValueError(f"guidance_interval: got {low} to {high}, which is empty; allowed is low <= high")

    def for_channels(self, in_channels: int) -> SampleConfig:
        """The same for a model of so many channels, with ``guided_channels`` a number or None."""
        if self.guided_channels != AUTO:
            return self
        # Of fewer channels than 3 it says all; folders of samples of earlier versions have it on record.
        return replace(self, guided_channels=3 if in_channels <= 4 else None)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
