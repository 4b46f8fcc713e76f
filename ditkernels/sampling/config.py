"""How samples are drawn and written: one dataclass, and the names that its values and the command's flags are chosen from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

SOLVERS = ("ddpm", "ddim", "dpm_solver")
FORMATS = ("png", "grid", "npz", "latents")
SCHEMES = ("balanced", "random", "spread", "listed")


@dataclass(frozen=True)
class SampleConfig:
    """How to draw samples; the defaults are those of the public DiT's sample.py.

    Args:
        solver: "ddpm" (ancestral, with the learned variance where there is one); "ddim" or "dpm_solver" (DPM-Solver++(2M)),
            deterministic from the starting noise on.
        guidance_scale: uncond + scale·(cond − uncond) (Ho & Salimans 2022). 1 is the conditional model, for
            which the unconditional half is not computed; 0 is the null class, in every channel and the variance, for
            which the conditional half is not.
        guided_channels: how many of the predicted noise's channels are guided: the first 3, as in the
            published samples, or all (None).
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
    guided_channels: int | None = 3
    clip_denoised: bool = False
    seed: int = 0
    guidance_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver: got {self.solver!r}, allowed are {', '.join(map(repr, SOLVERS))}")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"guidance_scale: got {self.guidance_scale}, allowed is 0 or more")
        if self.guided_channels is not None and self.guided_channels < 1:
            raise ValueError(f"guided_channels: got {self.guided_channels}, allowed is 1 or more, or None")
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: got {self.seed!r}, allowed are the whole numbers 0..{2**64 - 1}")
        # JSON knows no integers of numpy.
        object.__setattr__(self, "seed", int(self.seed))
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not low <= high:
                raise ValueError(f"guidance_interval: got {low} to {high}, which is empty; allowed is low <= high")
