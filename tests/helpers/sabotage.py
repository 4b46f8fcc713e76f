"""What is done to a process to see its run survive: these change the process that calls them, or the files it left."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from ditkernels.data.digits import InMemoryBatches
from ditkernels.training.trainer import Trainer

KILLED = -signal.SIGKILL
CALLS = ("fsync", "replace", "unlink", "rmdir", "mkdir")


def kill_at_call(number: int) -> None:
    """Lets the process die in place of its ``number``-th system call that makes or removes something."""
    made = []

    def intercept(name: str) -> Any:
        genuine = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if len(made) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            made.append(name)
            return genuine(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, intercept(name))


def slow_steps(seconds: float) -> None:
    """Lets every training step take so much longer."""
    genuine = Trainer.train_step

    def train_step(self: Trainer, *args: Any) -> Any:
        time.sleep(seconds)
        return genuine(self, *args)

    Trainer.train_step = train_step  # type: ignore[method-assign]


def slow_reads(seconds: float, step: int) -> None:
    """Lets every batch from ``step`` on take so much longer to read."""
    genuine = InMemoryBatches.at

    def at(self: InMemoryBatches, number: int, positions: Any) -> Any:
        if number >= step:
            time.sleep(seconds)
        return genuine(self, number, positions)

    InMemoryBatches.at = at  # type: ignore[method-assign]


def flip_a_bit(path: Path) -> None:
    """Of the last but three byte."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
