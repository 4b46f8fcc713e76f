"""`ditkernels demo`: a small DiT learns real handwritten digits, draws some, and a classifier reads them."""

from __future__ import annotations

import argparse
from pathlib import Path

from ditkernels.commands import DEFAULT, DEVICE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ditkernels demo`."""
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help=f"folder to write to {DEFAULT}")
    parser.add_argument("--steps", type=int, default=1500, help=f"training steps {DEFAULT}")
    parser.add_argument("--seed", type=int, default=0, help=f"same seed, same picture {DEFAULT}")
    parser.add_argument("--device", default="auto", help=DEVICE)
    parser.add_argument("--guidance", type=float, default=3.0, help=f"guidance scale, 1 is none {DEFAULT}")
    parser.add_argument("--sampling-steps", type=int, default=100, help=f"DDPM steps, 1..1000 {DEFAULT}")


def run(args: argparse.Namespace) -> int:
    """Demonstrates; returns 0, or 1 if `ditkernels check` fails on this machine.

    Raises:
        ValueError, ImportError: as ``demonstrate``.
    """
    from ditkernels.demo import demonstrate

    done = demonstrate(
        args.out,
        steps=args.steps,
        seed=args.seed,
        device=args.device,
        guidance=args.guidance,
        sampling_steps=args.sampling_steps,
    )
    return 0 if done else 1
