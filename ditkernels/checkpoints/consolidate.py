"""`ditkernels consolidate`: a checkpoint that several ranks wrote in pieces, as one file a part, as one process would write it."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    print("ditkernels: error: run `python -m ditkernels consolidate ...`", file=sys.stderr)
    sys.exit(2)

import argparse
import os
from pathlib import Path

from ditkernels.checkpoint import (
    MANIFEST,
    CheckpointError,
    checkpoints_of,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)


def consolidate(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Writes the checkpoint at ``source`` to ``target`` in whole tensors; every checksum is verified first.

    One part (model, ema, optimizer) is in memory at a time.

    Args:
        source: a checkpoint's folder, or a run's, whose newest whole checkpoint is meant.
        target: a new folder, or an empty one.

    Returns:
        The folder that was read.

    Raises:
        CheckpointError: there is none, or a file of it is missing, cut short or altered; it is named.
        ValueError: ``target`` holds something.
        OSError: it could not be written; there is no half of a checkpoint.
    """
    source, target = Path(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"out: {target} is there and not empty, allowed is a new folder")
    path, checkpoint = source, None
    if not (source / MANIFEST).exists() and checkpoints_of(source):
        found = newest_checkpoint(source)
        if found.path is None:
            raise CheckpointError(f"{source} holds no whole checkpoint: {'; '.join(found.broken.values())}")
        path, checkpoint = found.path, found.checkpoint
    save_checkpoint(target, checkpoint or load_checkpoint(path))
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ditkernels consolidate`."""
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's: its newest whole checkpoint")
    parser.add_argument("out", help="a new folder")


def run(args: argparse.Namespace) -> int:
    """Consolidates; returns 0."""
    path = consolidate(args.checkpoint, args.out)
    print(f"{path} is now in one file a part: {args.out}")
    return 0
