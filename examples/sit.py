"""Trains a SiT on the straight path from noise to data, then samples it with Euler steps. A few seconds on a CPU.

    pip install ditkernels timm
    python examples/sit.py --steps 20

x_t = (1 - t)·noise + t·data, and the model learns the velocity data - noise (Ma et al., arXiv 2401.08740).
"""

from __future__ import annotations

import argparse

import torch
from public_models import SiT
from torch import Tensor, nn
from train_public_dit import synthetic_batch

import ditkernels


def velocity_loss(model: nn.Module, data: Tensor, y: Tensor) -> Tensor:
    noise, t = torch.randn_like(data), torch.rand(len(data))
    position = t.view(-1, 1, 1, 1)
    return (model((1 - position) * noise + position * data, t, y) - (data - noise)).square().mean()


@torch.no_grad()
def sample(model: nn.Module, y: Tensor, steps: int = 10) -> Tensor:
    x = torch.randn(len(y), 4, 8, 8)
    for step in range(steps):
        x = x + model(x, torch.full((len(y),), step / steps), y) / steps
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    torch.manual_seed(0)

    model = SiT(input_size=8, hidden_size=96, depth=4, num_heads=4, num_classes=10)
    ditkernels.accelerate(model)  # the one line
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    for step in range(args.steps):
        loss = velocity_loss(model, *synthetic_batch(args.batch_size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0 or step == args.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}")

    images = sample(model.eval(), torch.arange(10))
    print(f"sampled {tuple(images.shape)}, mean {images.mean():+.3f}")


if __name__ == "__main__":
    main()
