"""A checkpoint that several ranks wrote in pieces, as one file a part, as one process would write it."""

from __future__ import annotations

import os
from pathlib import Path

from ditkernels.checkpoints.format import CheckpointError, open_checkpoint, save_checkpoint
from ditkernels.checkpoints.run import resolve


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
    path = resolve(source)
    if path.is_file():
        raise CheckpointError(f"{path} is a file, allowed are a checkpoint's folder and a run's")
    save_checkpoint(target, open_checkpoint(path))
    return path
