"""What a run has left: its newest whole checkpoint, opened."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ditkernels.checkpoints import run as folder
from ditkernels.checkpoints.format import Checkpoint, load_checkpoint


class Newest(NamedTuple):
    """The newest whole checkpoint of a run, None if there is none, and why newer ones were passed over."""

    path: Path | None
    checkpoint: Checkpoint | None
    broken: dict[Path, str]


def newest_checkpoint(run: Path) -> Newest:
    found = folder.newest_checkpoint(run)
    return Newest(found.path, None if found.path is None else load_checkpoint(found.path), found.broken)
