"""Batches in order, made by worker processes or in this one: the same batches either way."""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from ditkernels.data.order import Batch, Steps

SHIELDED = (signal.SIGINT, signal.SIGTERM)


def stream_batches(batches: Steps, steps: Sequence[int], *, workers: int, pin_memory: bool) -> Generator[Batch, None, None]:
    """The batches of ``steps`` in order, made by ``workers`` processes, or in this one if 0; the same batches either way.

    Signals do not reach the workers: they end when the generator does, which should therefore be closed.
    """
    loader: DataLoader[Batch | Exception] = DataLoader(
        _Carried(batches) if workers else batches,  # type: ignore[arg-type]
        sampler=steps,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        # A fork server would be one more process of the group; a signal would end it, and its workers with it.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        # Otherwise it would draw a seed from the caller's.
        generator=torch.Generator(),
    )
    # Workers inherit the mask, and are born with signals held back until they ignore them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
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
            # At the interpreter's exit they would be sent the SIGTERM that they ignore, and waited for.
            iterator._shutdown_workers()  # type: ignore[attr-defined]


class _Carried:
    """Batches, or in their place the errors of files and disks: raised in a worker they would arrive as a traceback's text."""

    def __init__(self, batches: Steps) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> Batch | Exception:
        try:
            return self.batches[step]
        except (OSError, ValueError, MemoryError) as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_signals(_worker: int) -> None:
    # A terminal's Ctrl-C and a scheduler's SIGTERM reach the whole group; the trainer decides when its workers stop.
    for number in SHIELDED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SHIELDED)
    torch.set_num_threads(1)
