"""Samples a DiT of diffusers with guidance, accelerated in place. Random weights; a few seconds on a CPU.

    pip install ditkernels diffusers
    python examples/diffusers_sampling.py --steps 8

With the published weights: ``pipe = DiTPipeline.from_pretrained(...)``, then ``ditkernels.accelerate(pipe.transformer)``.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor

import ditkernels


@torch.no_grad()
def sample(model: DiTTransformer2DModel, labels: Tensor, steps: int, cfg_scale: float = 4.0) -> Tensor:
    """Latents (B, 4, 8, 8) for the labels, by DDIM with classifier-free guidance."""
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(steps)
    null = torch.full_like(labels, model.config.num_embeds_ada_norm)
    latents = torch.randn(len(labels), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for t in scheduler.timesteps:
        both = model(torch.cat([latents, latents]), t.expand(2 * len(labels)), torch.cat([labels, null])).sample[:, :4]
        cond, uncond = both.chunk(2)
        latents = scheduler.step(uncond + cfg_scale * (cond - uncond), t, latents).prev_sample
    return latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)

    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        num_layers=4,
        sample_size=8,
        out_channels=8,
        num_embeds_ada_norm=10,
    ).eval()
    labels = torch.tensor([0, 3, 7, 9])
    before = sample(model, labels, args.steps)
    ditkernels.accelerate(model)  # the one line
    after = sample(model, labels, args.steps)
    print(f"sampled {tuple(after.shape)}, largest difference from before {(after - before).abs().max():.1e}")


if __name__ == "__main__":
    main()
