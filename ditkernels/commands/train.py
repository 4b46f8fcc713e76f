"""`ditkernels train`: a DiT on a folder of images or of latents, or on the digits."""

from __future__ import annotations

import argparse

from ditkernels.options import add_flags, from_flags
from ditkernels.training.config import TrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ditkernels train`: the fields of TrainConfig."""
    add_flags(parser, TrainConfig)


def run(args: argparse.Namespace) -> int:
    """Trains; returns 0, or 128 + the number of the signal that ended the run early.

    Raises:
        ValueError, FloatingPointError, OSError: as ``train``.
    """
    from ditkernels.runtime import recorded
    from ditkernels.training.trainer import train

    result = recorded(train)(from_flags(TrainConfig, args))
    return 0 if result.interrupted is None else 128 + result.interrupted
