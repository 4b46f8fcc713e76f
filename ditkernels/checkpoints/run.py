"""The folder of a run: who owns it, what it tells of itself, where its checkpoints lie and which of them are kept.

A path that a user gives may name a run, a checkpoint, or weights of other programs: :func:`resolve` says what it stands for.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ditkernels.checkpoints.foreign import find_weights, read_foreign
from ditkernels.checkpoints.format import MANIFEST, PARTS, Checkpoint, CheckpointError, open_checkpoint, verify_checkpoint
from ditkernels.files import FolderLock, remove_leftovers, write_json, write_text
from ditkernels.runtime import World, take_folder

FOLDER = "checkpoints"
CONFIG, ENVIRONMENT, LOG = "config.yaml", "environment.json", "log.txt"

# A part of a checkpoint of ours, which counts for nothing without its manifest.
_PART = re.compile(rf"({'|'.join(PARTS)})(-\d{{5}}-of-\d{{5}})?-[0-9a-f]{{16}}\.safetensors")

logger = logging.getLogger(__name__)


# ---- The owner -------------------------------------------------------------------------------------------------------


class Run:
    """The folder of a run, and the right to work in it.

    Until :meth:`begin` nothing is written there but the lock, and a run that never begins leaves no trace.

    Args:
        folder: of the run; made by :meth:`lock` if it is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._lock: FolderLock | None = None
        self._log: logging.Handler | None = None
        self._level = logging.NOTSET

    def lock(self, world: World) -> None:
        """Takes the folder for the processes of ``world``.

        Raises:
            FolderInUseError: somebody else has it.
        """
        self._lock = take_folder(self.folder, world)

    def begin(self, config: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Writes ``config.yaml``, which ``--config`` takes, and ``environment.json``; from here on ``log.txt`` is kept.

        Args:
            config: settings by name, JSON values.
            environment: what the run is computed on and with.
        """
        remove_leftovers(self.folder)
        # JSON is YAML, and a line a setting can be read and changed by hand.
        write_text(self.folder / CONFIG, "".join(f"{name}: {json.dumps(value)}\n" for name, value in config.items()))
        write_json(self.folder / ENVIRONMENT, dict(environment))
        self._log = _LogFile(self.folder / LOG, encoding="utf-8", errors="backslashreplace")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        package = logging.getLogger("ditkernels")
        package.addHandler(self._log)
        self._level = package.level
        package.setLevel(min(logging.INFO, package.getEffectiveLevel()))

    def close(self) -> None:
        """Lets others in."""
        if self._log is not None:
            package = logging.getLogger("ditkernels")
            package.removeHandler(self._log)
            package.setLevel(self._level)
            self._log.close()
        if self._lock is not None:
            self._lock.release()

    def newest(self) -> Found:
        """The newest checkpoint whose every checksum is right."""
        return newest_checkpoint(self.folder)


class _LogFile(logging.FileHandler):
    """A log that a full disk ends, and not the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        logging.getLogger("ditkernels").removeHandler(self)
        logger.warning("%s: %s; training goes on without it", self.baseFilename, sys.exc_info()[1])


# ---- What a path stands for ------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The newest whole checkpoint of a run, None if there is none, and why newer ones were passed over."""

    path: Path | None
    broken: dict[Path, str]


def resolve(path: str | os.PathLike[str]) -> Path:
    """The checkpoint's folder or the file that a path stands for, every checksum verified.

    Broken checkpoints of a run are passed over, and that is said.

    Args:
        path: a run's folder, whose newest whole checkpoint is meant; a checkpoint's; or what :func:`read_foreign` takes.

    Raises:
        CheckpointError: there is no checkpoint, or none is whole; files are named.
    """
    path = Path(path)
    if path.is_file():
        return path
    if is_foreign(path):
        find_weights(path)
        return path
    if not is_run(path):
        verify_checkpoint(path)
        return path
    found = newest_checkpoint(path)
    if found.path is None:
        raise CheckpointError(f"{path} holds no whole checkpoint: {'; '.join(found.broken.values())}")
    for broken, reason in found.broken.items():
        logger.warning("passed over a broken checkpoint, %s: %s", broken, reason)
    return found.path


def read(path: Path) -> Checkpoint:
    """What :func:`resolve` has found; errors as of :func:`read_foreign`."""
    return read_foreign(path) if path.is_file() or is_foreign(path) else open_checkpoint(path)


def is_foreign(path: Path) -> bool:
    """Whether a folder is of another program: it is there, and nothing in it is of a run's or of a checkpoint of ours."""
    if not path.is_dir() or (path / MANIFEST).exists() or (path / FOLDER).is_dir():
        return False
    return not any(_PART.fullmatch(found.name) for found in path.iterdir())


def is_run(path: Path) -> bool:
    """Whether the folder holds checkpoints, rather than being one."""
    return not is_checkpoint(path) and bool(all_checkpoints_of(path))


# ---- Its checkpoints -------------------------------------------------------------------------------------------------


def checkpoint_directory(run: Path, step: int) -> Path:
    """Where a run keeps its periodic checkpoint of that step."""
    return run / FOLDER / f"step-{step:08d}"


def error_directory(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of that step that an error made it write."""
    return run / FOLDER / f"error-{step:08d}"


def checkpoints_of(run: Path) -> dict[int, Path]:
    """The folders of a run's periodic checkpoints by step, in order, whole or not."""
    return _by_step(run, "step")


def error_checkpoints_of(run: Path) -> dict[int, Path]:
    """The folders of what errors made a run write, as :func:`checkpoints_of`."""
    return _by_step(run, "error")


def _by_step(run: Path, kind: str) -> dict[int, Path]:
    found = {int(path.name.removeprefix(f"{kind}-")): path for path in (run / FOLDER).glob(f"{kind}-*[0-9]")}
    return dict(sorted(found.items()))


def all_checkpoints_of(run: Path) -> list[tuple[int, Path]]:
    """Steps and folders of both kinds, in the order of their steps; of one step the periodic one is last."""
    both = (*error_checkpoints_of(run).items(), *checkpoints_of(run).items())
    return sorted(both, key=lambda found: found[0])


def is_checkpoint(path: Path) -> bool:
    """Whether the folder has become a checkpoint; its files may be damaged."""
    return (path / MANIFEST).exists()


def newest_checkpoint(run: Path) -> Found:
    """The newest checkpoint of a run whose every checksum is right."""
    broken: dict[Path, str] = {}
    for _, path in reversed(all_checkpoints_of(run)):
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
    """Removes the checkpoints up to ``step`` that are neither among the last ones nor at a multiple of ``keep_every``.

    Those of errors are no part of this: ``step`` is past them.
    """
    upto = {at: path for at, path in checkpoints_of(run).items() if at <= step}
    whole = [at for at, path in upto.items() if is_checkpoint(path)]
    kept = {*whole[-keep_last:], *(at for at in whole if keep_every and at % keep_every == 0)}
    gone = [path for at, path in upto.items() if at not in kept]
    for path in (*gone, *(path for at, path in error_checkpoints_of(run).items() if at <= step)):
        _remove(path)


def remove_error_checkpoints(run: Path, *, other_than: int) -> None:
    """Removes what errors made the run write, but for that of one step."""
    for at, path in error_checkpoints_of(run).items():
        if at != other_than:
            _remove(path)


def _remove(path: Path) -> None:
    # Without its manifest it is no checkpoint, even if the rest of it should outlive a crash.
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)
