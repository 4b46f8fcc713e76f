"""`ditkernels consolidate`: a checkpoint that several ranks wrote in pieces, as one file a part."""

from __future__ import annotations

import argparse

import ditkernels.commands  # noqa: F401 (it refuses to run this file as a script)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ditkernels consolidate`."""
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's: its newest whole checkpoint")
    parser.add_argument("out", help="a new folder")


def run(args: argparse.Namespace) -> int:
    """Consolidates; returns 0.

    Raises:
        ValueError, OSError: as ``consolidate``.
    """
    from ditkernels.checkpoints.consolidate import consolidate

    path = consolidate(args.checkpoint, args.out)
    print(f"{path} is now in one file a part: {args.out}")
    return 0
