"""`ditkernels plot RUN...`: loss, speed and FID of training runs, side by side in one picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from ditkernels.commands import DEFAULT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ditkernels plot`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that `ditkernels train` wrote")
    parser.add_argument("--out", type=Path, default=Path("runs.png"), help=f"picture to write: .png, .svg, .pdf {DEFAULT}")


def run(args: argparse.Namespace) -> int:
    """Draws; returns 0.

    Raises:
        ValueError, ImportError: as ``draw_runs``.
    """
    from ditkernels.training.plot import draw_runs

    draw_runs(args.runs, args.out)
    print(f"wrote {args.out}")
    return 0
