"""Data sets: labelled images in memory, and the order in which training sees them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

HELD_OUT_EVERY = 5


@dataclass(frozen=True)
class LabelledImages:
    """Images (N, C, H, W) float32 in [-1, 1] and their labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"images, labels: got shapes {tuple(self.images.shape)} and {tuple(self.labels.shape)}, "
                "allowed are (N, C, H, W) and (N,)"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> LabelledImages:
        """The same images on `device`."""
        return LabelledImages(self.images.to(device), self.labels.to(device))


def load_digits() -> tuple[LabelledImages, LabelledImages]:
    """The handwritten digits inside scikit-learn, as (train, held_out).

    1,797 grey 8 x 8 images in ten classes (UCI Optical Recognition of Handwritten Digits, Alpaydin and
    Kaynak 1998). Intensities 0..16 become [-1, 1]: images (N, 1, 8, 8) float32, labels (N,) int64 on the CPU.
    Every fifth image of each class is held out; the split never changes.

    Raises:
        ImportError: scikit-learn is not installed; the message names the extra that brings it.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise ImportError(
            f"the handwritten digits need scikit-learn ({error}): pip install ditkernels[demo]"
        ) from error

    pixels, targets = sklearn_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
    labels = torch.from_numpy(targets).long()
    held_out = _every_nth_of_each_class(labels, HELD_OUT_EVERY)
    return (
        LabelledImages(images[~held_out], labels[~held_out]),
        LabelledImages(images[held_out], labels[held_out]),
    )


def _every_nth_of_each_class(labels: Tensor, n: int) -> Tensor:
    # The file cycles through the classes for long stretches, so a plain stride would hold out two of them.
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        chosen[(labels == label).nonzero().flatten()[::n]] = True
    return chosen


class ShuffledStream:
    """An endless stream of sample indices: every epoch a fresh permutation, fixed by (seed, epoch).

    Batches are addressed by step and run across the ends of epochs, so a run that resumes at step k sees what
    an unbroken run would have seen, with nothing to restore.

    Args:
        length: samples in the data set.
        batch_size: indices a step.
        seed: fixes every permutation, together with the epoch.

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
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Tensor:
        """Indices (batch_size,) int64 of the samples of `step`, counted from 0."""
        position = step * self.batch_size
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
            # Not torch's CPU generator: it reads only the low 32 bits of a seed, which two keys do not fit.
            order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            self._order = torch.from_numpy(order)
            self._epoch = epoch
        return self._order
