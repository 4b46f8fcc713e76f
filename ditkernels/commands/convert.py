"""`ditkernels convert`: checkpoints between the public DiT layout, diffusers' and ours."""

from __future__ import annotations

import argparse
from pathlib import Path

from ditkernels.checkpoints.config import LAYOUTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ditkernels convert`."""
    parser.description = "Converts checkpoints between the public DiT layout, diffusers' and ours, without loss."
    parser.add_argument("source", type=Path, help="a .pt or .safetensors file, a directory of diffusers' or of ours, or a run's")
    parser.add_argument("target", type=Path, help="a .pt or .safetensors file, or a directory; must not exist")
    parser.add_argument("--to", choices=LAYOUTS, required=True, help="the target's layout")
    parser.add_argument("--input-size", type=int, help="latent size, for diffusers' weights without config.json")
    parser.add_argument("--num-heads", type=int, help="heads of attention, for diffusers' config.json, at widths not in the paper")


def run(args: argparse.Namespace) -> int:
    """Converts; returns 0.

    Raises:
        CheckpointError: as ``convert``.
    """
    from ditkernels.checkpoints.convert import convert

    print(convert(args.source, args.target, args.to, input_size=args.input_size, num_heads=args.num_heads))
    return 0
