"""What a run will need hours from now is tried before its first step: held-out images, samples, features, loggers, the disk.

Nothing is written, and no random state moves: a run's bits are those that it has without.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ditkernels.data.source import TrainingData
from ditkernels.files import sync_directory
from ditkernels.reference import DiT
from ditkernels.runtime import World
from ditkernels.sampling.outputs import png_of
from ditkernels.training.config import TrainConfig
from ditkernels.training.distributed import Parallel
from ditkernels.training.ema import EMA
from ditkernels.training.evaluations import Evaluations
from ditkernels.training.log import SINK_MODULES

# A chain has two steps at least.
STEPS = 2


class Rehearsed(Protocol):
    """A trainer, as far as it is rehearsed."""

    config: TrainConfig
    data: TrainingData
    world: World
    parallel: Parallel
    ema: EMA[DiT]
    device: torch.device

    @property
    def total(self) -> int: ...

    @property
    def evaluations(self) -> Evaluations: ...


def rehearse(trainer: Rehearsed, folder: Path) -> None:
    """Tries what the settings ask for: a batch of validation, a grid of samples at two steps, features of a batch, loggers.

    Args:
        trainer: before its first step; called on all ranks.
        folder: of the run.

    Raises:
        ValueError, ImportError, OSError: what cannot be, with the setting that asks for it.
    """
    config = trainer.config
    _check_settings(trainer)
    for name, module in SINK_MODULES.items():
        if getattr(config, name):
            _import_sink(name, module)
    if trainer.world.first:
        sync_directory(folder)
    with _no_random_state_moved(trainer.device):
        if config.val_every:
            trainer.evaluations.validate(batches=trainer.world.size)
        if config.sample_every:
            pixels = trainer.evaluations.grid(STEPS)
            if pixels is not None:
                png_of(pixels)
        if trainer.evaluations.monitor is not None:
            trainer.evaluations.monitor.rehearse(trainer.parallel.whole(trainer.ema.model), STEPS)


def _check_settings(trainer: Rehearsed) -> None:
    config = trainer.config
    if config.val_path is not None and not config.val_every:
        raise ValueError(f"val_path: got {config.val_path}, which nothing is measured on; allowed with val_every of 1 or more")
    if config.warmup_steps > trainer.total:
        raise ValueError(f"warmup_steps: got {config.warmup_steps}, allowed are 0..{trainer.total}, the steps of the run")


def _import_sink(name: str, module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"--{name} needs {name} ({error}): pip install ditkernels[log]") from error


@contextmanager
def _no_random_state_moved(device: torch.device) -> Iterator[None]:
    """Whoever draws from a global generator in the block, be it a user's features, leaves it as it was."""
    pythons, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(pythons)
            np.random.set_state(numpys)
