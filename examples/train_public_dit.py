"""Trains a public DiT as its own train.py does, with one line added. Synthetic latents; a few seconds on a CPU.

    pip install ditkernels timm
    python examples/train_public_dit.py --steps 20

In your own clone: ``from models import DiT_models``, and the same one line before EMA, DDP and torch.compile.
"""

from __future__ import annotations

import argparse
from copy import deepcopy

import torch
from public_models import DiT
from torch import Tensor, nn

import ditkernels
from ditkernels import create_diffusion


def synthetic_batch(size: int) -> tuple[Tensor, Tensor]:
    """Latents (B, 4, 8, 8) whose mean follows their label."""
    y = torch.randint(0, 10, (size,))
    return 0.2 * torch.randn(size, 4, 8, 8) + (y / 5 - 1).view(-1, 1, 1, 1), y


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float = 0.99) -> None:
    for average, parameter in zip(ema.parameters(), model.parameters()):
        average.lerp_(parameter, 1 - decay)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--init-from", help="weights of the same model, as docs/checkpoints.md lists them")
    args = parser.parse_args()
    torch.manual_seed(0)

    model = DiT(input_size=8, hidden_size=96, depth=4, num_heads=4, num_classes=10)
    if args.init_from is not None:
        model.load_state_dict(ditkernels.load_model(args.init_from, num_heads=4).model.state_dict())
    ditkernels.accelerate(model)  # the one line
    ema = deepcopy(model).requires_grad_(False)
    diffusion = create_diffusion(timestep_respacing="")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)

    for step in range(args.steps):
        x, y = synthetic_batch(args.batch_size)
        t = torch.randint(0, diffusion.num_timesteps, (args.batch_size,))
        loss = diffusion.training_losses(model, x, t, {"y": y})["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_ema(ema, model)
        if step % 5 == 0 or step == args.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
