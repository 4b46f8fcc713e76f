"""The checkpoints in the folder of a run: where they lie, which is the newest whole one, which are kept."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import NamedTuple

from ditkernels.checkpoints.format import MANIFEST, CheckpointError, verify_checkpoint

FOLDER = "checkpoints"


class Found(NamedTuple):
    """The newest whole checkpoint of a run, None if there is none, and why newer ones were passed over."""

    path: Path | None
    broken: dict[Path, str]


def checkpoint_directory(run: Path, step: int) -> Path:
    """Where a run keeps its checkpoint of that step."""
    return run / FOLDER / f"step-{step:08d}"


def checkpoints_of(run: Path) -> dict[int, Path]:
    """The folders of a run's checkpoints by step, in order, whole or not."""
    found = {int(path.name.removeprefix("step-")): path for path in (run / FOLDER).glob("step-*[0-9]")}
    return dict(sorted(found.items()))


def newest_checkpoint(run: Path) -> Found:
    """The newest checkpoint of a run whose every checksum is right."""
    broken: dict[Path, str] = {}
    for path in reversed(checkpoints_of(run).values()):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            broken[path] = str(error)
        else:
            return Found(path, broken)
    return Found(None, broken)


def set_aside(path: Path) -> Path:
    """Renames a broken checkpoint, so that it is neither found nor counted again; returns where it now lies."""
    target = path.with_name(f"broken-{path.name}-{secrets.token_hex(4)}")
    os.replace(path, target)
    return target


def remove_old_checkpoints(run: Path, step: int, *, keep_last: int, keep_every: int) -> None:
    """Removes the checkpoints up to ``step`` that are neither among the last ones nor at a multiple of ``keep_every``."""
    upto = {at: path for at, path in checkpoints_of(run).items() if at <= step}
    whole = [at for at, path in upto.items() if (path / MANIFEST).exists()]
    kept = {*whole[-keep_last:], *(at for at in whole if keep_every and at % keep_every == 0)}
    for at, path in upto.items():
        if at not in kept:
            # Without its manifest it is no checkpoint, even if the rest of it should outlive a crash.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)
