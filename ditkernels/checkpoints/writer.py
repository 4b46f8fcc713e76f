"""Writes the checkpoints of a run while training goes on, from a snapshot, in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ditkernels.checkpoints.format import Checkpoint, save_checkpoint
from ditkernels.checkpoints.run import (
    checkpoint_directory,
    error_directory,
    is_checkpoint,
    remove_error_checkpoints,
    remove_old_checkpoints,
)


class CheckpointWriter:
    """Writes the checkpoints of a run in a thread of its own, one at a time, and removes old ones.

    Args:
        run: the run's folder.
        keep_last, keep_every: as of :func:`remove_old_checkpoints`.
    """

    def __init__(self, run: Path, *, keep_last: int, keep_every: int) -> None:
        self.run = run
        self.keep_last = keep_last
        self.keep_every = keep_every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Takes a snapshot and returns; the writing goes on. Waits for the one before; errors as of :meth:`wait`."""
        self.wait()
        self._begin(checkpoint, checkpoint_directory(self.run, _step_of(checkpoint)), self._remove_old)

    def save_for_error(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint beside the periodic ones, in place of the one of an error before, and waits for it.

        Returns:
            Where it is: that of the same step, where a periodic one is there.

        Raises:
            OSError: it could not be written.
        """
        step = _step_of(checkpoint)
        if self._writing is not None:
            # Whether it could be written is not the question any more.
            self._writing.exception()
            self._writing = None
        periodic = checkpoint_directory(self.run, step)
        if is_checkpoint(periodic):
            return periodic
        self._begin(checkpoint, error_directory(self.run, step), self._remove_other_errors)
        self.wait()
        return error_directory(self.run, step)

    def wait(self) -> None:
        """Returns once the last one is on the disk.

        Raises:
            OSError: it could not be written; the ones before are untouched.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def raise_failure(self) -> None:
        """:meth:`wait`, but only if the writing is over."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def close(self) -> None:
        """Lets a write in progress end, and the thread with it; raises nothing."""
        self._thread.shutdown(wait=True)

    def _begin(self, checkpoint: Checkpoint, directory: Path, then: Callable[[int], None]) -> None:
        self._writing = self._thread.submit(self._write_snapshot(checkpoint, directory, then))

    def _write_snapshot(self, checkpoint: Checkpoint, directory: Path, then: Callable[[int], None]) -> Callable[[], None]:
        """Takes the snapshot; returns what writes it and calls ``then`` with its step."""
        return partial(self._write, checkpoint.snapshot(), directory, then)

    def _write(self, checkpoint: Checkpoint, directory: Path, then: Callable[[int], None]) -> None:
        save_checkpoint(directory, checkpoint)
        then(_step_of(checkpoint))

    def _remove_old(self, step: int) -> None:
        remove_old_checkpoints(self.run, step, keep_last=self.keep_last, keep_every=self.keep_every)

    def _remove_other_errors(self, step: int) -> None:
        remove_error_checkpoints(self.run, other_than=step)


def _step_of(checkpoint: Checkpoint) -> int:
    assert checkpoint.step is not None
    return checkpoint.step


class IdleWriter(CheckpointWriter):
    """The writer of a rank that has nothing to write."""

    def __init__(self, run: Path) -> None:
        super().__init__(run, keep_last=1, keep_every=0)

    def save(self, checkpoint: Checkpoint) -> None:
        """Nothing."""

    def save_for_error(self, checkpoint: Checkpoint) -> Path:
        """Nothing; where the others have written it."""
        return error_directory(self.run, _step_of(checkpoint))
