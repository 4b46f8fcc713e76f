"""`ditkernels convert`: checkpoints between the public DiT layout, diffusers' and ours."""

from __future__ import annotations

import argparse
from pathlib import Path

from ditkernels.checkpoints.config import LAYOUTS
from ditkernels.commands import add_weights_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ditkernels convert`."""
    parser.description = "Converts checkpoints between the public DiT layout, diffusers' and ours, without loss."
    parser.add_argument(
        "source", type=Path, help="a run, a checkpoint, or a file or folder of other programs (docs/checkpoints.md)"
    )
    parser.add_argument("target", type=Path, help="a .pt or .safetensors file, or a directory; must not exist")
    parser.add_argument("--to", choices=LAYOUTS, required=True, help="the target's layout")
    add_weights_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Converts; returns 0.

    Raises:
        CheckpointError: as ``convert``.
    """
    from ditkernels.checkpoints.convert import convert

    told = {name: getattr(args, name) for name in ("input_size", "num_heads", "null_class")}
    print(convert(args.source, args.target, args.to, **told))
    return 0
