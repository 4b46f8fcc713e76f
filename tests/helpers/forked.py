"""Training in processes that are forked from a server which has imported everything, and whether two runs end alike."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ditkernels.cli import main
from ditkernels.training.log import METRICS, read_metrics
from tests.helpers.runs import newest_checkpoint


def child(
    argv: list[str],
    environment: dict[str, str],
    log: str,
    ready: Connection,
    sabotage: tuple[Any, ...] | None,
) -> None:
    """Trains in a forked process and writes to ``log``; ``sabotage``, a function and its arguments, is called before."""
    # A group of its own, as a job has, and each rank of torchrun's; a signal to the group reaches the data workers too.
    os.setsid()
    torch.set_num_threads(1)
    os.environ.update(environment)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, encoding="utf-8")
    if sabotage is not None:
        sabotage[0](*sabotage[1:])
    ready.send(None)
    sys.exit(main(argv))


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run that are no measurement of speed or memory."""
    kept = ("step", "loss", "grad_norm", "learning_rate", "skipped")
    return [{name: row.get(name) for name in kept} for row in read_metrics(folder / METRICS)]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The :func:`rows` that tell of training: an evaluation that an error broke off is not made up for."""
    return [row for row in rows(folder) if row["loss"] is not None]


def assert_same_end(folder: Path, unbroken: Path, told: Callable[[Path], list[dict[str, Any]]] = rows) -> None:
    mine, theirs = newest_checkpoint(folder), newest_checkpoint(unbroken)
    assert not mine.broken
    assert mine.checkpoint.step == theirs.checkpoint.step
    assert mine.checkpoint.parts.keys() == theirs.checkpoint.parts.keys()
    for part, tensors in theirs.checkpoint.parts.items():
        found = mine.checkpoint.parts[part]
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors), part
    assert mine.checkpoint.state == theirs.checkpoint.state
    assert told(folder) == told(unbroken)
