"""Batches in order, made by worker processes or in this one: the same batches either way."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import signal_handling

from ditkernels.data.order import Batch, Steps
from ditkernels.files import first_line
from ditkernels.runtime import STOP_SIGNALS

_KILLED = re.compile(r"DataLoader worker .*(killed by signal|exited unexpectedly)")
# Seconds that workers have to end by themselves.
GRACE = 1.0
NO_ROOM = (
    "shared memory (/dev/shm) has no room for the images that were read: fewer num_workers (0 needs none), a smaller batch, "
    "or more of it (docker run --shm-size)"
)
NO_WORKER = "a process that reads images was killed, as the system does where memory is short: fewer num_workers, or more memory"


class DataWorkerError(OSError):
    """A process that reads images has died, or found no room for what it had read; the message says what to do."""


def stream_batches(batches: Steps, steps: Sequence[int], *, workers: int, pin_memory: bool) -> Generator[Batch, None, None]:
    """The batches of ``steps`` in order, made by ``workers`` processes, or in this one if 0; the same batches either way.

    Signals do not reach the workers: they end when the generator does, which should therefore be closed.

    A worker that is killed shows as an error at any place: see :func:`lost_readers_named`.

    Raises:
        DataWorkerError: shared memory is full.
    """
    loader: DataLoader[Batch | Exception] = DataLoader(
        _Carried(batches) if workers else batches,  # type: ignore[arg-type]
        sampler=steps,
        batch_size=None,
        num_workers=workers,
        collate_fn=_shared,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        # A fork server would be one more process of the group; a signal would end it, and its workers with it.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        # Otherwise it would draw a seed from the caller's.
        generator=torch.Generator(),
    )
    # Workers inherit the mask, and are born with signals held back until they ignore them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        for batch in iterator:
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        if workers:
            _end_workers(iterator)


def _end_workers(iterator: Any) -> None:
    """Ends them at once, be they in the middle of a read.

    DataLoader alone waits five seconds for each, sends the SIGTERM that they ignore, and waits again.
    """
    if iterator._shutdown:
        return
    iterator._workers_done_event.set()
    for queue in iterator._index_queues:
        queue.put(None)
    deadline = time.monotonic() + GRACE
    for worker in iterator._workers:
        worker.join(timeout=max(0.0, deadline - time.monotonic()))
    # Or it would be an error that they are gone.
    signal_handling._remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False
    for worker in iterator._workers:
        worker.kill()
    iterator._shutdown_workers()


@contextmanager
def lost_readers_named() -> Iterator[None]:
    """Around whatever takes batches: says what to do where a worker has been killed.

    Raises:
        DataWorkerError: in place of the RuntimeError that DataLoader raises then, wherever this process may be.
    """
    try:
        yield
    except RuntimeError as error:
        if not _KILLED.search(str(error)):
            raise
        raise DataWorkerError(f"{NO_ROOM if 'Bus error' in str(error) else NO_WORKER} ({first_line(error)})") from error


class _Carried:
    """Batches, or in their place the errors of files and disks: raised in a worker they would arrive as a traceback's text."""

    def __init__(self, batches: Steps) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> Batch | Exception:
        try:
            return self.batches[step]
        except (OSError, ValueError, MemoryError) as error:
            return error


def _shared(batch: Any) -> Any:
    """The batch; from a worker, in shared memory."""
    if get_worker_info() is None or isinstance(batch, Exception):
        return batch
    # The queue would share it later, in a thread whose errors nobody hears: the trainer would wait for good.
    try:
        batch.images.share_memory_()
        batch.labels.share_memory_()
    except RuntimeError as error:
        return DataWorkerError(f"{NO_ROOM} ({first_line(error)})")
    return batch


def _ignore_signals(_worker: int) -> None:
    # A terminal's Ctrl-C and a scheduler's SIGTERM reach the whole group; the trainer decides when its workers stop.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    torch.set_num_threads(1)
