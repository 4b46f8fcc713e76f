"""Writes the checkpoints of a run while training goes on, from a snapshot, in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ditkernels.checkpoints.format import Checkpoint, save_checkpoint
from ditkernels.checkpoints.run import checkpoint_directory, remove_old_checkpoints


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
        self._writing = self._thread.submit(self._write_snapshot(checkpoint))

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

    def _write_snapshot(self, checkpoint: Checkpoint) -> Callable[[], None]:
        """Takes the snapshot; returns what writes it."""
        return partial(self._write, checkpoint.snapshot())

    def _write(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.step is not None
        save_checkpoint(checkpoint_directory(self.run, checkpoint.step), checkpoint)
        self._remove_old(checkpoint.step)

    def _remove_old(self, step: int) -> None:
        remove_old_checkpoints(self.run, step, keep_last=self.keep_last, keep_every=self.keep_every)


class IdleWriter(CheckpointWriter):
    """The writer of a rank that has nothing to write."""

    def __init__(self, run: Path) -> None:
        super().__init__(run, keep_last=1, keep_every=0)

    def save(self, checkpoint: Checkpoint) -> None:
        """Nothing."""
