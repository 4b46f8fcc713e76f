"""The order in which training sees a data set.

A batch is a pure function of (seed, step): which samples, which of them are mirrored. So no number of worker processes and no
restart changes what a run trains on, and a checkpoint needs to remember the step alone.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ditkernels.rng import Stream, below, permutation


class ShuffledStream:
    """An endless stream of sample indices: every epoch a fresh permutation, keyed by (seed, epoch).

    Batches are addressed by step and run across the ends of epochs, so a run that resumes at step k sees what
    an unbroken run would have seen, with nothing to restore.

    Args:
        length: samples in the data set.
        batch_size: indices a step.
        seed: fixes every permutation, together with the epoch.

    Attributes:
        offset: how many more samples had been seen before step 0 than there were: not 0 where earlier steps were of another size,
            so that a run goes on at the sample it had come to.

    Raises:
        ValueError: `length` or `batch_size` is not positive, or `seed` is negative.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed: got {seed}, allowed is 0 or more")
        if length < 1:
            raise ValueError(f"length: got {length}, the data set must hold at least one sample")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, allowed is 1 or more")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.offset = 0
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Tensor:
        """Indices (batch_size,) int64 of the samples of `step`, counted from 0."""
        position = self.offset + step * self.batch_size
        end = position + self.batch_size
        pieces = []
        while position < end:
            epoch, start = divmod(position, self.length)
            piece = self._permutation(epoch)[start : start + end - position]
            pieces.append(piece)
            position += len(piece)
        return torch.cat(pieces)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._order = permutation(self.seed, epoch, self.length)
            self._epoch = epoch
        return self._order


class Unreadable(NamedTuple):
    """A file that should have been among the images, and why it is not."""

    file: str
    reason: str


class Batch(NamedTuple):
    """What a step trains on.

    Attributes:
        images: (B, C, H, W), float32 in [-1, 1] or uint8; where the data is latents, their moments (B, 2·C, h, w): mean, then
            standard deviation, fp32, bf16 or fp16.
        labels: (B,) int64.
        unreadable: files that should have been among them; the next readable ones stand in their place.
        animated: files of which the first frame was taken.
    """

    images: Tensor
    labels: Tensor
    unreadable: tuple[Unreadable, ...] = ()
    animated: tuple[str, ...] = ()


class Steps(Protocol):
    """Something whose item k is the batch of step k."""

    def __getitem__(self, step: int) -> Batch: ...


class Batches(Steps, Protocol):
    """A data set in the order of training: item k is the batch of step k, a pure function of the seed and k.

    Attributes:
        stream: says which samples are in it.
    """

    stream: ShuffledStream

    def at(self, step: int, positions: Tensor) -> Batch:
        """The samples at ``positions`` (n,) int64 of the batch of ``step``; no others are read."""


def mirrored(seed: int, step: int, positions: Tensor) -> Tensor:
    """Which of the positions (n,) of a batch are mirrored, (n,) bool."""
    return below(2, seed, Stream.FLIP, step, positions) == 1
